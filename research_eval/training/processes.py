"""The processes that torchrun started, as one group that trains one model (torch.distributed).

Every process has the whole model and computes its rows of each batch; gradients and statistics of a batch are summed
over all of them. So the numbers of a run do not depend on the number of processes, except for rounding.

W processes
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from research_eval.errors import ConfigError
from research_eval.layers.collective import Part, part_of_batch
from research_eval.seeding import derive_seed
from research_eval.training.checkpointer import Checkpointer
from research_eval.training.runtime import choose_device
from research_eval.training.state import TrainingState

TIMEOUT = timedelta(minutes=5)  # of one exchange: torchrun itself notices a process that has died
BUCKET = 25 * 2**20  # bytes of gradients that one exchange carries


class Processes:
    """The group of all processes. Its main process is the one of rank 0.

    `device` comes from the config. On "cuda", each process takes another GPU. Raises ConfigError if the machine has too
    few GPUs, or if the process cannot join the group.
    """

    def __init__(self, seed: int, device: str = "auto", init_method: str = "env://") -> None:
        uses_gpus = choose_device(device).type == "cuda"
        if uses_gpus:
            number = int(os.environ.get("LOCAL_RANK", "0"))
            if number >= torch.cuda.device_count():
                raise ConfigError(
                    f"this machine has {torch.cuda.device_count()} GPUs, and torchrun started more processes on it: "
                    "lower --nproc_per_node, or set training_params.device to cpu"
                )
            torch.cuda.set_device(number)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if uses_gpus else "gloo"
        try:
            distributed.init_process_group(backend, init_method, timeout=TIMEOUT, rank=rank, world_size=size)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"process {rank} of {size} could not join the others: {error}. Start all of them with torchrun."
            ) from error
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.is_main = self.rank == 0
        self._seed = seed
        self._device = torch.device("cuda") if uses_gpus else torch.device("cpu")

    def close(self) -> None:
        """Leave the group."""
        distributed.destroy_process_group()

    # ------------------------------------------------------------------------------------------------ one message

    def tell(self, message: bytes) -> bytes:
        """Send what the main process gives to all, which receive it; the argument of the others does not matter."""
        size = self.sum(torch.tensor([len(message) if self.is_main else 0]))
        content = torch.zeros(int(size), dtype=torch.uint8, device=self._device)
        if not len(content):
            return b""
        if self.is_main:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        distributed.broadcast(content, 0)
        return content.cpu().numpy().tobytes()

    # ------------------------------------------------------------------------------------------------ the training

    def begin(self, model: nn.Module, checkpointer: Checkpointer, total_steps: int) -> TrainingState:
        """The others need not see the folder of the main process: they receive the content of its checkpoint."""
        state = TrainingState()
        content = b""
        if self.is_main:
            state = checkpointer.restore(total_steps)
            if state.step:
                checkpointer.save(state)  # the one that was read may be the one before
                content = checkpointer.path.read_bytes()
        content = self.tell(content)
        if content and not self.is_main:
            checkpointer.path.write_bytes(content)
            state = checkpointer.restore(total_steps)
        self._check_equal(model)
        return state

    def _check_equal(self, model: nn.Module) -> None:
        """Raise RuntimeError if a process has other weights than the main one: it runs another version, say."""
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        if self.tell(digest.digest()) != digest.digest():
            raise RuntimeError(
                f"process {self.rank} starts with other weights than process 0: all need the same data, the same "
                "version of the program and of torch, and the same type of processor"
            )

    def own(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Every W-th row, so that all processes get rows of similar lengths; all rows of a batch with fewer than W."""
        return rows[self.rank :: self.size] if len(rows) >= self.size else rows

    def weight(self, num_rows: int) -> float:
        return 1.0 if num_rows >= self.size else 1 / self.size

    @contextmanager
    def part(self, num_rows: int, step: int, number: int) -> Iterator[None]:
        """Inside, torch's global generators belong to this process alone: dropout draws other numbers in each.

        They follow from the run's seed, the rank and the step, so a checkpoint need not hold them. The generators
        outside are the same in all processes. Draws of the routing come from them, for the whole batch.
        """
        outside = _Generator(self._device)
        part = Part(self.size, num_rows, slice(self.rank, None, self.size), self.sum, outside.used)
        torch.manual_seed(derive_seed(self._seed, "dropout", self.rank, step, number))
        try:
            with part_of_batch(part):
                yield
        finally:
            outside.restore()

    def sum(self, values: Tensor) -> Tensor:
        total = values.to(self._device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        own = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
        anywhere = self.sum(own).tolist()
        members = [parameter for parameter, count in zip(trained, anywhere, strict=True) if count]
        for parameter in members:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in members if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def agree(self, number: int | None) -> int | None:
        answers = torch.zeros(self.size, dtype=torch.int64)
        answers[self.rank] = -1 if number is None else number
        return next((answer for answer in self.sum(answers).tolist() if answer != -1), None)


class _Generator:
    """torch's global generator of a device, as it was at the start of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = self._get()

    def _get(self) -> Tensor:
        return torch.cuda.get_rng_state() if self._device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        (torch.cuda.set_rng_state if self._device.type == "cuda" else torch.set_rng_state)(state)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the draws are the next ones of this generator."""
        inside = self._get()
        self._set(self._state)
        try:
            yield
        finally:
            self._state = self._get()
            self._set(inside)

    def restore(self) -> None:
        """Go on with this generator."""
        self._set(self._state)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type, of about `BUCKET` bytes together."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        for gradient in (one for one in gradients if one.dtype == dtype):
            bucket.append(gradient)
            if sum(one.nbytes for one in bucket) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

"""The processes that torchrun started, as one group that trains one model (torch.distributed).

Every process computes its rows of each batch; gradients and statistics of a batch are summed over all of them. So the
numbers of a run do not depend on the number of processes, except for rounding. Every process has the whole model,
unless its parameters lie in slices (see `slices`).

W processes
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from research_eval.config.sections import ParallelParams
from research_eval.errors import ConfigError
from research_eval.files import SLICES_FOLDER, write_atomically
from research_eval.layers.collective import Named, Part, part_of_batch, shared_by
from research_eval.seeding import derive_seed
from research_eval.training.checkpoint import save_slices, slice_name
from research_eval.training.checkpointer import Checkpointer
from research_eval.training.parallel import Found
from research_eval.training.runtime import choose_device
from research_eval.training.slices import Slices, cut, fill_zeros
from research_eval.training.state import TrainingState

TIMEOUT = timedelta(minutes=5)  # of one exchange: torchrun itself notices a process that has died
LARGE = 2 * 2**30  # bytes of weights from which "auto" writes slices
ROUND = 4  # batches that a process evaluates between two exchanges: the memory has the records of so many
BUCKET = 25 * 2**20  # bytes of gradients that one exchange carries


class Processes:
    """The group of all processes. Its main process is the one of rank 0.

    `device` comes from the config. On "cuda", each process takes another GPU. Raises ConfigError if the machine has too
    few GPUs, or if the process cannot join the group.
    """

    def __init__(
        self,
        seed: int,
        device: str = "auto",
        layout: ParallelParams | None = None,
        init_method: str = "env://",
    ) -> None:
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
        self._seed, self._layout = seed, layout or ParallelParams()
        self._slices: Slices | None = None
        self._shared: Path | None = None  # the checkpoint of the main process, if all write their slices beside it
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

    def gather(self, own: Named) -> list[Named]:
        """The tensors of every process, by rank, in the memory of the host."""
        # Clones, because safetensors refuses tensors that share memory.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in own.items()
        }
        message = safetensors.torch.save(plain) if plain else b""
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(message)
        numbers = self.sum(sizes).tolist()
        padded = torch.zeros(max(numbers), dtype=torch.uint8, device=self._device)
        if not len(padded):
            return [{} for _ in numbers]
        if message:
            padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in numbers]
        distributed.all_gather(parts, padded)
        contents = [part[:number].cpu().numpy().tobytes() for part, number in zip(parts, numbers, strict=True)]
        return [safetensors.torch.load(content) if content else {} for content in contents]

    # ------------------------------------------------------------------------------------------------ the training

    def begin(
        self, loss_of: nn.Module, optimizer: torch.optim.Optimizer, checkpointer: Checkpointer, total_steps: int
    ) -> TrainingState:
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
        self._check_equal(loss_of)
        is_large = sum(one.nbytes for one in loss_of.parameters()) >= LARGE
        self._slices = cut(loss_of, optimizer, self._layout, self._device)
        if self._slices is not None:
            self._shared = self._shared_checkpoint(checkpointer.path, is_large)
        return state

    def _shared_checkpoint(self, path: Path, is_large: bool) -> Path | None:
        """The checkpoint of the main process, if all processes write into its folder.

        Raises ConfigError if the config asks for it, and a process does not see the folder.
        """
        asked = self._layout.checkpoint
        if asked == "single" or (asked == "auto" and not is_large):
            return None
        place = Path(self.tell(str(path.resolve()).encode()).decode())
        sign = self.tell(secrets.token_bytes(16))
        file = place.parent / SLICES_FOLDER / "sign"
        if self.is_main:
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, sign)
        self.sum(torch.zeros(1))
        sees = file.is_file() and file.read_bytes() == sign
        see = int(self.sum(torch.tensor([sees], dtype=torch.int64)))
        if self.is_main:
            file.unlink()
        if see == self.size:
            return place
        if asked == "auto":
            return None
        raise ConfigError(
            f"training_params.parallel.checkpoint: {self.size - see} of {self.size} processes do not see "
            f"{place.parent}: sharded needs a folder that all share. Choose single."
        )

    def _check_equal(self, loss_of: nn.Module) -> None:
        """Raise RuntimeError if a process has other weights than the main one: it runs another version, say."""
        digest = hashlib.sha256()
        for name, tensor in loss_of.state_dict().items():
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

    def backward(self, loss: Tensor) -> None:
        if self._slices is None:
            loss.backward()
        else:
            self._slices.backward(loss, self.sum)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._slices is not None:
            parameters = self._slices.sum_gradients(self.sum)
        members = fill_zeros([parameter for parameter in parameters if parameter.requires_grad], self.sum)
        for bucket in _buckets([parameter.grad for parameter in members if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> None:
        if self._slices is None:
            torch.nn.utils.clip_grad_norm_(parameters, largest)
            return
        self._slices.clip(largest, self.sum)

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self._slices.whole() if self._slices is not None else nullcontext():
            yield

    def shared(self, work: Callable[[], Found]) -> Found:
        """A model that draws random numbers needs those of one process: then every process does all the work."""
        before = _Generator(self._device)
        with shared_by(self._in_shares):
            found = work()
        if self.agree(1 if before.has_moved() else None) is None:
            return found
        before.restore()
        return work()

    def _in_shares(self, items: Iterable[Any], work: Callable[[Any], Named]) -> Iterator[Named]:
        """Item i is for process i modulo W. Every process takes part in every exchange, also without an item."""
        rest = iter(items)
        while some := list(islice(rest, ROUND * self.size)):
            own = {number: work(some[number]) for number in range(self.rank, len(some), self.size)}
            found = self.gather(
                {f"{number} {name}": tensor for number, one in own.items() for name, tensor in one.items()}
            )
            for number in range(len(some)):
                prefix = f"{number} "
                their = found[number % self.size]
                yield {name.removeprefix(prefix): their[name] for name in their if name.startswith(prefix)}

    def save(self, checkpointer: Checkpointer, state: TrainingState) -> None:
        if self._slices is not None and self._shared is not None:
            rows = self._slices.own_rows()
            save_slices(self._shared, slice_name(state.step, self.rank, self.size), rows)
            self.sum(torch.zeros(1))  # all have written
            if self.is_main:
                checkpointer.in_slices = rows
                names = [slice_name(state.step, rank, self.size) for rank in range(self.size)]
                checkpointer.save(state, self._slices.whole_moments(), names)
            return
        moments = None if self._slices is None else self._slices.moments(keeps=self.is_main)
        with self.whole():
            if self.is_main:
                checkpointer.save(state, moments)

    def end(self) -> None:
        if self._slices is not None:
            self._slices.join()
            self._slices = None

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

    def has_moved(self) -> bool:
        """Whether numbers have been drawn since."""
        return not torch.equal(self._get(), self._state)

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

"""Parameters that lie in slices in several processes, and the optimiser that sees only the own slices.

Two things cut parameters along their first dimension. torch's FSDP2 (`fully_shard`) joins each parameter while it
computes. With expert parallelism, rows travel to the process of their expert (see `layers/exchange.py`), and nothing is
joined. Inside `Slices.whole` the model is the ordinary one, for evaluations and files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable

from research_eval.config.sections import ParallelParams
from research_eval.errors import ConfigError
from research_eval.layers.causal.products import ExpertMatrix
from research_eval.layers.dispatch import Dispatcher, Executing, Execution, set_execution
from research_eval.layers.exchange import Exchange
from research_eval.layers.experts import ExpertPool
from research_eval.layers.stacked import Stacked
from research_eval.models.base_model import EvaluableModel
from research_eval.training.checkpoint import flatten_optimizer
from research_eval.training.muon import Muon

Sum = Callable[[Tensor], Tensor]  # over all processes
Places = list[tuple[nn.Module, str]]  # the owners of a parameter, and its name in each
MOST_OF_MEMORY = 0.6  # that weights, gradients and moments may take before "auto" cuts them
MUON_NEEDS_WHOLE = "training_params.parallel.data: fsdp cuts matrices, and muon needs them whole. Choose ddp, or adamw."


@dataclass
class Slice:
    """A parameter of which this process has a part, cut along one dimension into rows."""

    places: Places
    inside: nn.Parameter  # what the modules have between the steps
    own: nn.Parameter  # the own rows, as the optimiser sees them; the same memory as `inside`
    num_rows: int  # of the whole parameter
    group: Any  # the processes that have all rows together
    dim: int = 0  # that the rows are counted along
    copies: Any = None  # the processes with the same rows, if their gradients have to be summed
    share: float = 0.0  # of the mean over all experts, in the gradient of each (see ExpertPool.sharing)

    @property
    def first(self) -> int:
        """The number of the first own row."""
        return min(distributed.get_rank(self.group) * self._per_process, self.num_rows)

    @property
    def is_first_copy(self) -> bool:
        """Whether no process before this one has the same rows."""
        return self.copies is None or distributed.get_rank(self.copies) == 0

    @property
    def _per_process(self) -> int:
        """Rows of a process; the last ones may have fewer."""
        return -(-self.num_rows // distributed.get_world_size(self.group))

    def put(self, parameter: nn.Parameter) -> None:
        """Let the modules have this parameter."""
        for owner, leaf in self.places:
            owner._parameters[leaf] = parameter

    def cut(self, whole: Tensor) -> Tensor:
        """The own rows of a tensor that has all of them."""
        count = min(self._per_process, self.num_rows - self.first)
        return whole.narrow(self.dim, self.first, count).clone(memory_format=torch.contiguous_format)

    def join(self, own: Tensor) -> Tensor:
        """The tensor with all rows, of which each process has its own. All processes have to call it."""
        shape = list(own.shape)
        shape[self.dim] = self._per_process
        padded = own.new_zeros(shape)
        padded.narrow(self.dim, 0, own.shape[self.dim]).copy_(own.detach())
        parts = [torch.empty_like(padded) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, self.dim).narrow(self.dim, 0, self.num_rows).contiguous()

    def share_gradient(self) -> None:
        """Do with the gradient of the own rows what a hook does with that of the whole parameter."""
        if not self.share or self.own.grad is None:
            return
        mean = self.own.grad.sum(0)
        if self.dim == 0:
            distributed.all_reduce(mean, group=self.group)
        experts = self.num_rows if self.dim == 0 else len(self.own)
        self.own.grad.lerp_((mean / experts).expand_as(self.own.grad), self.share)


class Slices:
    """The parameters of a training that lie in slices, once `cut_experts` and `cut_all` have cut them.

    `loss_of` is the module whose forward pass is a training step. The optimiser has its parameters.
    """

    def __init__(self, loss_of: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.pieces: list[Slice] = []
        self._loss_of, self._optimizer = loss_of, optimizer
        pools = [one for one in loss_of.modules() if isinstance(one, ExpertPool)]
        self._shares = {one: pool.gradient_share for pool in pools for one in pool.sharing()}
        self._execution: Execution | None = None  # while the experts lie in several processes
        self._is_fully_cut = False
        self._hooks: list[tuple[dict[int, Any], int, Any]] = []  # of FSDP2, which join and cut in a forward pass

    def _optimised(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    # ----------------------------------------------------------------------------------------------------- cutting

    def cut_experts(self, group: Any, copies: Any) -> None:
        """Keep the own experts of every stack; from now on rows travel to their experts."""
        for parameter, places in expert_stacks(self._loss_of).items():
            piece = Slice(places, parameter, parameter, len(parameter), group, copies=copies)
            piece.inside = piece.own = nn.Parameter(piece.cut(parameter.detach()), parameter.requires_grad)
            piece.put(piece.own)
            self._add(piece, parameter)
        execution = next(one.execution for one in self._loss_of.modules() if isinstance(one, Executing))
        self._execution = replace(execution, dispatcher=Exchange(group))
        set_execution(self._loss_of, self._execution)

    def cut_all(self, mesh: Any, units: Sequence[nn.Module]) -> None:
        """Let torch's FSDP2 cut every parameter that is whole. A unit joins its parameters for its own passes only.

        All others are joined from the first use to the end of the backward pass. That suits a pool of experts, which is
        used several times in a pass.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard
        from torch.distributed.tensor import Shard

        # FSDP2 cannot cut a number without a dimension.
        kept = {piece.own for piece in self.pieces} | {one for one in self._loss_of.parameters() if not one.ndim}
        before = {one: places for one, places in places_of(self._loss_of).items() if one not in kept}

        def along(parameter: nn.Parameter) -> Any:
            """A stack of one expert has one row, so its next dimension is cut."""
            is_even = parameter.ndim > 1 and parameter.shape[1] % mesh.size() == 0
            return Shard(1 if is_even and len(parameter) % mesh.size() else 0)

        for module in (*units, self._loss_of):
            earlier = {number for hooks in _hooks(module) for number in hooks}
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=module is not self._loss_of,
                shard_placement_fn=along,
                ignored_params=kept,
            )
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # gradients are sums, and gloo can only sum
            module.set_force_sum_reduction_for_comms(True)
            self._hooks += [(hooks, number, hooks[number]) for hooks in _hooks(module) for number in {*hooks} - earlier]
        for parameter, places in before.items():
            owner, leaf = places[0]
            inside: Any = owner._parameters[leaf]
            own = nn.Parameter(inside.to_local().detach(), parameter.requires_grad)
            dim = inside.placements[0].dim
            self._add(Slice(places, inside, own, parameter.shape[dim], mesh.get_group(), dim), parameter)
        self._is_fully_cut = True

    def _add(self, piece: Slice, before: nn.Parameter) -> None:
        """Let the optimiser have the own rows and their moments in the place of the whole parameter."""
        self.pieces.append(piece)
        piece.share = self._shares.get(before, 0.0)
        state = self._optimizer.state.pop(before, None)
        for group in self._optimizer.param_groups:
            group["params"] = [piece.own if one is before else one for one in group["params"]]
        if state is not None:
            self._optimizer.state[piece.own] = {
                key: piece.cut(value) if isinstance(value, Tensor) and value.shape == before.shape else value
                for key, value in state.items()
            }

    # -------------------------------------------------------------------------------------------------- one step

    def backward(self, loss: Tensor, total: Sum) -> None:
        """The backward pass.

        FSDP2 waits for the gradients of the same parameters in all processes. One that no own row uses therefore gets
        zeros, if another process uses it.
        """
        if not self._is_fully_cut:
            loss.backward()
            return
        first = loss.view_as(loss)  # its hook runs before those of FSDP2
        first.register_hook(lambda _: Variable._execution_engine.queue_callback(lambda: self._fill_joined(total)))
        first.backward()

    def _fill_joined(self, total: Sum) -> None:
        cut = {id(piece.inside) for piece in self.pieces}
        joined = (one for one in self._loss_of.parameters() if one.ndim and id(one) not in cut)
        fill_zeros([one for one in joined if one.requires_grad], total)

    def sum_gradients(self, total: Sum) -> list[nn.Parameter]:
        """Give the slices the summed gradients of their rows. Returns the parameters that are whole.

        FSDP2 has summed its own in the backward pass. Those of experts are summed over the processes that have the same
        ones.
        """
        cut = {id(piece.inside) for piece in self.pieces}
        fill_zeros([piece.own for piece in self.pieces if piece.own is piece.inside], total)
        for piece in self.pieces:
            gradient: Any = piece.inside.grad
            if gradient is not None and piece.own is not piece.inside:
                piece.own.grad = gradient.to_local()
                piece.inside.grad = None
            if gradient is not None and piece.copies is not None:
                distributed.all_reduce(gradient, group=piece.copies)
            piece.share_gradient()
        return [one for one in self._loss_of.parameters() if id(one) not in cut]

    def clip(self, largest: float, total: Sum) -> None:
        """Scale the gradient of the whole model down to this norm."""
        copies = {id(piece.own): distributed.get_world_size(piece.group) for piece in self.pieces}
        gradients = [(one.grad, copies.get(id(one), 1)) for one in self._optimised() if one.grad is not None]
        # Every slice lies in several processes, unless all of them have one together.
        squares = [gradient.double().square().sum().cpu() * parts for gradient, parts in gradients]
        norm = (total(torch.stack(squares).sum()) / distributed.get_world_size()).sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in gradients:
            gradient.mul_(factor.to(gradient))

    # ----------------------------------------------------------------------------------------------------- joining

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the modules have whole parameters, and nothing travels. All processes have to enter the block."""
        for piece in self.pieces:
            piece.put(nn.Parameter(piece.join(piece.own), piece.own.requires_grad))
        for hooks, number, _ in self._hooks:
            del hooks[number]
        if self._execution is not None:
            set_execution(self._loss_of, replace(self._execution, dispatcher=Dispatcher()))
        try:
            yield
        finally:
            for hooks, number, hook in self._hooks:
                hooks[number] = hook
            for piece in self.pieces:
                piece.put(piece.inside)
            if self._execution is not None:
                set_execution(self._loss_of, self._execution)

    def moments(self, keeps: bool) -> dict[str, Tensor]:
        """What `flatten_optimizer` returns of the whole optimiser, in the memory of processes with `keeps` alone.

        All processes have to call it.
        """
        pieces = {id(piece.own): piece for piece in self.pieces}
        found: dict[str, Tensor] = {}
        for number, parameter in enumerate(self._optimised()):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    continue
                piece = pieces.get(id(parameter))
                joined = piece.join(value) if piece is not None and value.shape == parameter.shape else value
                if keeps:
                    found[f"{number}.{key}"] = joined.cpu()
        return found

    def own_rows(self) -> dict[str, tuple[Tensor, list[int]]]:
        """The slices as a checkpoint names them: own rows; dimension, number of the first one, and of all rows.

        The rows of experts that several processes have are those of the first one.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in self._loss_of.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"model/{name.removeprefix('model.')}")
        numbers = {id(one): number for number, one in enumerate(self._optimised())}
        found = {}
        for piece in self.pieces:
            rows = dict.fromkeys(names[id(piece.inside)], piece.own.detach())
            for key, value in self._optimizer.state.get(piece.own, {}).items():
                if isinstance(value, Tensor) and value.shape == piece.own.shape:
                    rows[f"optimizer/{numbers[id(piece.own)]}.{key}"] = value
            for name, own in rows.items():
                kept = own if piece.is_first_copy else own.narrow(piece.dim, 0, 0)
                found[name] = kept, [piece.dim, piece.first, piece.num_rows]
        return found

    def whole_moments(self) -> dict[str, Tensor]:
        """The moments that no slice has, as `flatten_optimizer` names them."""
        cut = self.own_rows()
        return {name: one for name, one in flatten_optimizer(self._optimizer).items() if f"optimizer/{name}" not in cut}

    def join(self) -> None:
        """Give the model its whole parameters for good. All processes have to call it."""
        with self.whole():
            joined = [owner._parameters[leaf] for owner, leaf in (piece.places[0] for piece in self.pieces)]
        for piece, parameter in zip(self.pieces, joined, strict=True):
            assert parameter is not None
            piece.put(parameter)
        for hooks, number, _ in self._hooks:
            del hooks[number]
        if self._execution is not None:
            set_execution(self._loss_of, replace(self._execution, dispatcher=Dispatcher()))


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """What torch calls before and after a forward pass of the module, by numbers that are unique."""
    return module._forward_pre_hooks, module._forward_hooks


def cut(
    loss_of: nn.Module, optimizer: torch.optim.Optimizer, layout: ParallelParams, device: torch.device
) -> Slices | None:
    """Cut the parameters as the config asks for; None if every process keeps the whole model.

    Processes with neighbouring ranks hold the experts together. Raises ConfigError for a model that cannot be cut so.
    """
    fully = layout.data == "fsdp" or (layout.data == "auto" and _is_large(loss_of, device))
    if layout.experts == 1 and not fully:
        return None
    _check(loss_of, optimizer, layout, fully)
    slices, size, rank = Slices(loss_of, optimizer), distributed.get_world_size(), distributed.get_rank()
    if layout.experts > 1:
        together = [list(range(first, first + layout.experts)) for first in range(0, size, layout.experts)]
        groups = [distributed.new_group(ranks) for ranks in together]
        copies = [distributed.new_group(list(ranks)) for ranks in zip(*together, strict=True)]
        has_copies = len(groups) > 1
        slices.cut_experts(groups[rank // layout.experts], copies[rank % layout.experts] if has_copies else None)
    if fully:
        from torch.distributed.device_mesh import init_device_mesh

        units = [unit for one in loss_of.modules() if isinstance(one, EvaluableModel) for unit in one.units()]
        slices.cut_all(init_device_mesh(device.type, (size,)), units)
    return slices


def _is_large(loss_of: nn.Module, device: torch.device) -> bool:
    """Whether weights, gradients and two moments take most of this process's share of the memory."""
    needed = 4 * sum(parameter.nbytes for parameter in loss_of.parameters())
    if device.type == "cuda":
        return needed > MOST_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return needed * processes > MOST_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check(loss_of: nn.Module, optimizer: torch.optim.Optimizer, layout: ParallelParams, fully: bool) -> None:
    """Raise ConfigError for what cannot be cut."""
    where = "training_params.parallel"
    if fully and isinstance(optimizer, Muon):
        raise ConfigError(MUON_NEEDS_WHOLE)
    if layout.experts == 1:
        return
    if any(isinstance(one, ExpertPool) and one.scans for one in loss_of.modules()):
        raise ConfigError(f"{where}.experts: scan experts (num_scan_experts) stay in every process. Set it to 1.")
    numbers = {len(parameter) for parameter in expert_stacks(loss_of)}
    if not numbers:
        raise ConfigError(f"{where}.experts: the model has no experts. Set it to 1.")
    if any(number % layout.experts for number in numbers):
        raise ConfigError(f"{where}.experts: {layout.experts} does not divide the {max(numbers)} experts of the model")


def fill_zeros(parameters: Sequence[nn.Parameter], total: Sum) -> list[nn.Parameter]:
    """Give each parameter a gradient if any process has one of it, and return these parameters."""
    own = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    members = [one for one, count in zip(parameters, total(own).tolist(), strict=True) if count]
    for parameter in members:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return members


def places_of(module: nn.Module) -> dict[nn.Parameter, Places]:
    """The owners of every parameter, and its names there; tied parameters have several."""
    found: dict[nn.Parameter, Places] = {}
    for owner in module.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            found.setdefault(parameter, []).append((owner, leaf))
    return found


def expert_stacks(module: nn.Module) -> dict[nn.Parameter, Places]:
    """The parameters whose first dimension numbers the experts that a router chooses."""
    routed = {
        owner
        for path, owner in module.named_modules()
        if isinstance(owner, Stacked | ExpertMatrix) and "experts" in path.split(".")
    }
    return {one: places for one, places in places_of(module).items() if places[0][0] in routed}

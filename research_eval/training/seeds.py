"""Trainings of one config with several seeds, whose steps are taken as one.

A small model costs mostly what its operations cost to call, so eight models in one operation cost less than eight
operations. The weights of all seeds lie in one parameter, seed first, of which the weights of each model are
views; gradients and moments likewise. Whatever sums over samples is done for each seed with the call of a single
training, and the rest is elementwise, so that the numbers are those of a single training.

S seeds  B batch of one seed  L length  R rows of one seed  I in  O out  D width  V vocabulary
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from research_eval.datasets.token_data import Batch
from research_eval.layers.kernels import EPSILON
from research_eval.layers.stacked import Dropout, StackedLayerNorm, StackedLinear
from research_eval.models.base_model import logits_of
from research_eval.training.checkpoint import generator_states, restore_generators
from research_eval.training.evaluate import Evaluation, Scoring, evaluate, evaluation_of, rows_of
from research_eval.training.fit import Meter, Step, Training, step_loss, take

log = logging.getLogger(__name__)

VECTOR = 16  # numbers: of a tensor's rest behind the last full one an optimiser rounds otherwise
SMALL_PRODUCT = 400  # multiplications: below, torch has a batched product that rounds otherwise
MAX_SEEDS = 8  # in one stack
MAX_PARAMETERS = 300_000  # of one model; a larger one is busy with products, which stacking does not make cheaper
LAYERS = (nn.Linear, nn.LayerNorm, nn.Embedding, StackedLinear, StackedLayerNorm)
T = TypeVar("T")


class _Linear(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight, self.bias = (_stacked([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """x [S B, ..., I] -> [S B, ..., O]."""
        seeds, (out, width) = len(self.weight), self.weight.shape[-2:]
        x_SRI = x.reshape(seeds, -1, width)
        weight_SOI, bias_SO = self.weight.view(seeds, out, width), self.bias.view(seeds, out)
        if x_SRI[0].numel() * out < SMALL_PRODUCT:
            y_SRO = torch.stack(list(map(F.linear, x_SRI, weight_SOI, bias_SO)))
        else:
            y_SRO = _Product.apply(x_SRI, weight_SOI, bias_SO)  # type: ignore[no-untyped-call]
        return y_SRO.view(*x.shape[:-1], out)


class _Product(torch.autograd.Function):
    """Its gradients are the products that those of a single layer are, and not their transposes."""

    @staticmethod
    def forward(ctx: Any, x_SRI: Tensor, weight_SOI: Tensor, bias_SO: Tensor) -> Tensor:
        ctx.save_for_backward(x_SRI, weight_SOI)
        return torch.baddbmm(bias_SO.unsqueeze(1), x_SRI, weight_SOI.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SRO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_SRI, weight_SOI = ctx.saved_tensors
        to_weight = torch.bmm(gradient_SRO.transpose(1, 2), x_SRI)
        return torch.bmm(gradient_SRO, weight_SOI), to_weight, gradient_SRO.sum(1)


class _LayerNorm(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], scale: str, shift: str) -> None:
        super().__init__()
        self._names = scale, shift
        for name in self._names:
            self.register_parameter(name, _stacked([getattr(layer, name) for layer in layers]))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """x [S B, ..., D] -> the same shape."""
        scale_SD, shift_SD = (self.get_parameter(name).flatten(1) for name in self._names)
        normed: Tensor = _Norm.apply(x, scale_SD, shift_SD)  # type: ignore[no-untyped-call]
        return normed


class _Norm(torch.autograd.Function):
    """Backward one seed at a time, with the call of a single training, because it sums over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_SD: Tensor, shift_SD: Tensor) -> Tensor:
        seeds, width = scale_SD.shape
        x_SRD = x.reshape(seeds, -1, width)
        normed_SRD, mean_SR1, rate_SR1 = torch.native_layer_norm(x_SRD, [width], None, None, EPSILON)
        ctx.save_for_backward(x_SRD, mean_SR1, rate_SR1, scale_SD, shift_SD)
        return torch.addcmul(shift_SD.unsqueeze(1), normed_SRD, scale_SD.unsqueeze(1)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_SRD, mean_SR1, rate_SR1, scale_SD, shift_SD = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        parts = zip(gradient.reshape(x_SRD.shape), x_SRD, mean_SR1, rate_SR1, scale_SD, shift_SD, strict=True)
        seeds = [
            backward(to_y, x, x.shape[1:], mean, rate, scale, shift, [True] * 3)
            for to_y, x, mean, rate, scale, shift in parts
        ]
        to_x, to_scale, to_shift = (torch.stack(members) for members in zip(*seeds, strict=True))
        return to_x.view(gradient.shape), to_scale, to_shift


class _Embedding(nn.Module):
    def __init__(self, tables: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = _stacked([table.weight for table in tables])
        self.num_embeddings, self.embedding_dim = tables[0].num_embeddings, tables[0].embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids [S B, L] of which none is padding -> [S B, L, D]."""
        seeds = len(self.weight)
        first_S = torch.arange(0, seeds * self.num_embeddings, self.num_embeddings)
        rows = ids + first_S.repeat_interleave(len(ids) // seeds).unsqueeze(1)
        return F.embedding(rows, self.weight.flatten(0, 1))


class _Dropout(nn.Module):
    def __init__(self, layer: Dropout, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.p, self._layer, self._generators = layer.p, layer, generators

    def forward(self, x: Tensor) -> Tensor:
        """x [S B, ...] -> the same shape, each seed with draws of its own."""
        return self._layer.masked(x, self._generators)


def _stacked(parameters: Sequence[Any]) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach() for parameter in parameters]))


def _swapped(module: nn.Module, originals: Sequence[nn.Module], generators: Sequence[torch.Generator]) -> None:
    """Put the layers of all seeds in the place of those of one."""
    for name, child in module.named_children():
        layers: list[Any] = [original.get_submodule(name) for original in originals]
        if isinstance(child, nn.Linear | StackedLinear):
            new: nn.Module = _Linear(layers)
        elif isinstance(child, nn.LayerNorm):
            new = _LayerNorm(layers, "weight", "bias")
        elif isinstance(child, StackedLayerNorm):
            new = _LayerNorm(layers, "scale", "shift")
        elif isinstance(child, nn.Embedding):
            new = _Embedding(layers)
        elif isinstance(child, Dropout):
            new = _Dropout(child, generators)
        else:
            _swapped(child, layers, generators)
            continue
        setattr(module, name, new)


class Stack:
    """The models of several trainings as one, after a step of their own that has given their optimisers moments."""

    def __init__(self, steps: Sequence[Step], generators: Sequence[torch.Generator]) -> None:
        models = [step.model for step in steps]
        self._model = copy.deepcopy(models[0])
        _swapped(self._model, models, generators)
        self._parameters = [self._model.get_parameter(name) for name, _ in models[0].named_parameters()]
        self._optimizers = [step.optimizer for step in steps]
        self._apart: list[tuple[nn.Parameter, Sequence[nn.Parameter]]] = []
        stacked: dict[nn.Parameter, Sequence[nn.Parameter]] = {}
        state: dict[Tensor, dict[str, Any]] = {}
        for whole, parts in zip(
            self._parameters, zip(*(model.parameters() for model in models), strict=True), strict=True
        ):
            for part, row in zip(parts, whole.detach(), strict=True):
                part.data = row
            if parts[0].numel() % VECTOR:
                self._apart.append((whole, parts))
                stacked[parts[0]] = parts
                state |= {part: optimizer.state[part] for part, optimizer in zip(parts, self._optimizers, strict=True)}
            else:
                stacked[parts[0]] = [whole]
                state[whole] = self._share(parts)
        kind: Callable[..., torch.optim.Optimizer] = type(self._optimizers[0])
        self._optimizer = kind(
            [
                {**group, "params": [one for part in group["params"] for one in stacked[part]]}
                for group in self._optimizers[0].param_groups
            ]
        )
        self._optimizer.state.update(state)
        self._scores_alike: bool | None = None  # not known yet

    def _share(self, parts: Sequence[nn.Parameter]) -> dict[str, Any]:
        """The moments of all seeds, of which those of each become views; they have one count of steps."""
        entries = [optimizer.state[part] for optimizer, part in zip(self._optimizers, parts, strict=True)]
        shared = {}
        for name, value in entries[0].items():
            moment = isinstance(value, Tensor) and value.ndim > 0
            shared[name] = torch.stack([entry[name] for entry in entries]) if moment else value
            for number, entry in enumerate(entries):
                entry[name] = shared[name][number] if moment else value
        return shared

    def release(self) -> None:
        """Trainings go on by themselves: each with a count of steps of its own."""
        for optimizer in self._optimizers:
            for entry in optimizer.state.values():
                entry.update({name: value.clone() for name, value in entry.items() if isinstance(value, Tensor)})

    def _gradients(self, steps: Sequence[Step]) -> None:
        """Those of each seed's loss, and clipped as its own."""
        if not self._model.training:
            self._model.train()
        for batches in zip(*(step.micro_batches for step in steps), strict=True):
            logits = logits_of(self._model, _joined(batches))
            parts = zip(steps, batches, logits.split(len(batches[0].labels)), strict=True)
            torch.stack([step_loss(step, batch, logits_BC) for step, batch, logits_BC in parts]).sum().backward()
        limit = steps[0].config.optimizer_params.grad_clip_norm
        if limit is not None:
            self._clip(limit)

    def _clip(self, limit: float) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norms_SP = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients], 1)
        scale_S = (limit / (torch.linalg.vector_norm(norms_SP, dim=1) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale_S.view(-1, *[1] * (gradient.ndim - 1)))

    def take(self, steps: Sequence[Step]) -> None:
        """What `take` does for each of them."""
        self._gradients(steps)
        for group, one in zip(self._optimizer.param_groups, self._optimizers[0].param_groups, strict=True):
            group["lr"] = one["lr"]
        for whole, parts in self._apart:
            for part, gradient in zip(parts, cast(Tensor, whole.grad), strict=True):
                part.grad = gradient
        self._optimizer.step()
        for parameter in (*self._parameters, *(part for _, parts in self._apart for part in parts)):
            parameter.grad = None

    def score(self, scorings: Sequence[Scoring]) -> list[Evaluation]:
        """What `evaluate` gives for each of them; the first time found out by both ways."""
        together = self._scored(scorings) if self._scores_alike is not False else None
        if together is not None and self._scores_alike:
            return together
        alone = [evaluate(*scoring) for scoring in scorings]
        if together is not None:
            pairs = zip(together, alone, strict=True)
            self._scores_alike = all(np.array_equal(one.losses_N, other.losses_N) for one, other in pairs)
        return alone

    @torch.no_grad()
    def _scored(self, scorings: Sequence[Scoring]) -> list[Evaluation] | None:
        """None where the batches of the seeds differ in shape or have padding."""
        self._model.eval()
        scores, rows = [], []
        for batches in zip(*(scoring.batches for scoring in scorings), strict=True):
            if not _same_shapes([[batch] for batch in batches]):
                return None
            batch = _joined(batches)
            logits = logits_of(self._model, batch).float()
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            scores.append([each.view(len(scorings), -1) for each in (batch.labels, logits.argmax(-1), losses)])
            rows.append([rows_of(batch) for batch in batches])
        truth_SN, guess_SN, losses_SN = (torch.cat(parts, 1) for parts in zip(*scores, strict=True))
        rows_SN = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        seeds = zip(truth_SN, guess_SN, losses_SN, rows_SN, strict=True)
        return [evaluation_of(*of_seed, scorings[0].num_classes) for of_seed in seeds]


def _joined(batches: Sequence[Batch]) -> Batch:
    """Those of all seeds, without padding, one behind the other."""
    ids, keep, labels = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:3])
    return Batch(ids, keep, labels, num_tokens=ids.numel())


class _Lane(Generic[T]):
    """One of the trainings, with the generators that it would draw from if it were alone."""

    def __init__(self, training: Training[T]) -> None:
        self.due: Step | Scoring | None = None  # what comes next
        self.result: T | None = None
        self.error: Exception | None = None
        self.generator = torch.Generator()
        self._training = training

    def _advance(self, go: Callable[[], Step | Scoring]) -> None:
        self.due = None
        try:
            self.due = go()
        except StopIteration as end:
            self.result = end.value
        except Exception as problem:
            self.error = problem

    def _enter(self) -> None:
        restore_generators({"cpu": self.generator.get_state()}, self._values)

    def _leave(self) -> None:
        tensors, self._values = generator_states()
        self.generator.set_state(tensors["cpu"])

    def start(self) -> None:
        """Up to the first step."""
        self._advance(partial(next, self._training))
        self._leave()

    def go_on(self, evaluation: Evaluation | None = None) -> None:
        """By itself, but for the evaluation where it is given."""
        self._enter()
        self._advance(partial(self._training.send, evaluation))
        self._leave()

    def finish(self) -> None:
        """All that is left, by itself."""
        if self.due is not None:
            self._enter()
        while self.due is not None:
            self._advance(partial(next, self._training))

    def taken(self) -> None:
        """The step has been taken by the stack."""
        entered = False

        def enter() -> None:
            nonlocal entered
            entered = True
            self._enter()

        self._advance(partial(self._training.send, enter))
        if entered:
            self._leave()

    def fail(self, problem: BaseException) -> None:
        """What was due has gone wrong in the stack."""
        self._enter()
        self._advance(partial(self._training.throw, problem))


def side_by_side(trainings: Iterable[Training[T]]) -> Iterator[list[T]]:
    """What each of them returns, in their order; those that went on together at a time.

    Up to `MAX_SEEDS` go on together while that gives the same numbers in less time; the others alone. An error of one
    is raised when those that it went on with have ended.
    """
    waiting = deque(trainings)
    while waiting:
        lanes = [_Lane(waiting.popleft())]
        lanes[0].start()
        if _may_stack(lanes[0].due):
            lanes += [_Lane(waiting.popleft()) for _ in range(min(len(waiting), MAX_SEEDS - 1))]
            for lane in lanes[1:]:
                lane.start()
            _take_together(lanes)
        for lane in lanes:
            lane.finish()
        for lane in lanes:
            if lane.error is not None:
                raise lane.error
        yield [cast(T, lane.result) for lane in lanes]


def _may_stack(step: Step | Scoring | None) -> bool:
    return (
        isinstance(step, Step)
        and step.model.stackable
        and all(map(_is_known, step.model.modules()))
        and step.runtime.device.type == "cpu"
        and step.runtime.precision == "fp32"
        and not step.config.training_params.compile
        and step.model.get_parameter_count() <= MAX_PARAMETERS
    )


def _is_known(module: nn.Module) -> bool:
    """Whether its own weights, if it has any, can be stacked; a foreign model may have layers of all kinds."""
    if isinstance(module, nn.LayerNorm) and (len(module.normalized_shape) > 1 or module.eps != EPSILON):
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd) or any(True for _ in module.buffers(recurse=False)):
        return False
    return None not in module._parameters.values() if isinstance(module, LAYERS) else not module._parameters


def _take_together(lanes: Sequence[_Lane[T]]) -> None:
    """The steps of all as one, until some differ in shape or the stack does not pay."""
    for lane in lanes:
        if lane.due is not None:
            lane.go_on()  # the moments of an optimiser begin with its first step
    stack: Stack | None = None
    tried = False
    while len(live := [lane for lane in lanes if lane.due is not None]) > 1:
        steps = [lane.due for lane in live if isinstance(lane.due, Step)]
        scorings = [lane.due for lane in live if isinstance(lane.due, Scoring)]
        if steps and (scorings or not _alike(steps)):
            break
        if steps and stack is None:
            generators = [lane.generator for lane in live]
            if not (tried or _pays(steps, generators)):
                break
            tried, stack = True, Stack(steps, generators)
        evaluations: Sequence[Evaluation | None] = [None] * len(live)
        try:
            if stack is not None and steps:
                stack.take(steps)
            elif stack is not None:
                evaluations = stack.score(scorings)
        except BaseException as problem:  # each training is to meet it where it stands
            for lane in live:
                lane.fail(problem)
            return
        for lane, evaluation in zip(live, evaluations, strict=True):
            if steps:
                lane.taken()
            else:
                lane.go_on(evaluation)
        if stack is not None and any(lane.due is None for lane in live):
            stack.release()
            stack = None
    if stack is not None:
        stack.release()


def _alike(steps: Sequence[Step]) -> bool:
    return _same_shapes([step.micro_batches for step in steps])


def _same_shapes(batches: Sequence[Sequence[Batch]]) -> bool:
    """Whether all seeds have batches of the same shape, and none has padding."""
    shapes = {tuple(batch.input_ids.shape for batch in of_seed) for of_seed in batches}
    return len(shapes) == 1 and all(
        batch.num_tokens == batch.input_ids.numel() for of_seed in batches for batch in of_seed
    )


def _pays(steps: Sequence[Step], generators: Sequence[torch.Generator]) -> bool:
    same, times_faster = compare(steps, generators)
    log.debug("%d seeds: together %.2f times faster, same numbers: %s", len(steps), times_faster, same)
    return same and times_faster > 1


def compare(steps: Sequence[Step], generators: Sequence[torch.Generator]) -> tuple[bool, float]:
    """Whether a stack does to all models and moments what their own steps do, to the bit, and how much faster.

    The steps are undone.
    """
    steps = [step._replace(meter=Meter()) for step in steps]
    draws = [generator.get_state() for generator in generators]
    before = _contents(steps)
    begun = time.perf_counter()
    for step, state in zip(steps, draws, strict=True):
        torch.set_rng_state(state)
        take(step)
    alone = time.perf_counter() - begun
    expected = _contents(steps)
    _restore(steps, before)
    stack = Stack(steps, generators)
    for _ in range(2):  # the first time takes longer
        begun = time.perf_counter()
        stack.take(steps)
        together = time.perf_counter() - begun
        found = _contents(steps)
        _restore(steps, before)
        for generator, state in zip(generators, draws, strict=True):
            generator.set_state(state)
    stack.release()
    return all(map(torch.equal, found, expected)), alone / together


def _tensors(steps: Sequence[Step]) -> Iterator[Tensor]:
    """The weights of all models and the moments of their optimisers."""
    for step in steps:
        for parameter in step.model.parameters():
            yield parameter.detach()
            yield from (value for value in step.optimizer.state[parameter].values() if isinstance(value, Tensor))


def _contents(steps: Sequence[Step]) -> list[Tensor]:
    return [tensor.clone() for tensor in _tensors(steps)]


def _restore(steps: Sequence[Step], contents: Sequence[Tensor]) -> None:
    for tensor, content in zip(_tensors(steps), contents, strict=True):
        tensor.copy_(content)

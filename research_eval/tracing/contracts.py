"""What a Mixture-of-Experts layer promises, and whether a model keeps it: a line per contract with figure and verdict.

R rows  K experts per token  E experts
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from research_eval.routing.report import load_metrics
from research_eval.routing.token_classes import route_agreement
from research_eval.tracing.decisions import UNKNOWN
from research_eval.tracing.find import RoutedLayer
from research_eval.tracing.record import Recorder

HOLDS, FAILS, UNSURE, SKIPPED = "holds", "FAILS", "look", "not checked"
CLOSE = 1e-4  # relative difference of a loss from its formula
QUIET = (nn.modules.dropout._DropoutNd,)
SEED = 7
LEFT_OUT = ("labels", "use_cache")  # arguments of the first call that the checks do not give
NOTHING_SEEN = "no token was seen"


@dataclass(frozen=True)
class Contract:
    """One line of the report."""

    name: str
    verdict: str
    figure: str

    def __str__(self) -> str:
        return f"{self.name:<12} {self.verdict:<12} {self.figure}"


def contract_lines(record: Recorder, checks: bool = True) -> list[str]:
    """The report on a trace. With `checks` the model is called again, with a part of its first input."""
    first = f"{type(record.model).__name__}: {len(record.layer_names)} routed layers, {record.num_tokens:,} tokens"
    return [first, *map(str, contracts(record, checks))]


def contracts(record: Recorder, checks: bool = True) -> list[Contract]:
    """All contracts in order."""
    found = [_seen(record), _load(record), _entropy(record), _drops(record), _weights(record), _balance(record)]
    called = {
        "sparsity": sparsity,
        "causality": causality,
        "padding": padding,
        "train/eval": train_eval,
        "aux loss": auxiliary_loss,
    }
    reason = _why_not(record, checks)
    if reason is not None:
        return found + [Contract(name, SKIPPED, reason) for name in called]
    with record.paused():
        return found + [_attempt(name, record, check) for name, check in called.items()]


def _why_not(record: Recorder, checks: bool) -> str | None:
    """Why the model is not called again; None if it is."""
    if not checks or record.is_ours:
        return "" if not checks else "the tests of this package hold its own models to it"
    return "the model was called without token ids" if record.first_call is None else None


def _attempt(name: str, record: Recorder, check: Callable[[Recorder], Contract]) -> Contract:
    """A check of a foreign model, which may not take the call: the reason stands in its line."""
    try:
        return check(record)
    except Exception as problem:
        return Contract(name, SKIPPED, f"{type(problem).__name__}: {problem}".split("\n")[0][:160])


# ------------------------------------------------------------------------------------------- from what was recorded


def _seen(record: Recorder) -> Contract:
    for (layer, reason), calls in record.unread.items():
        if calls:
            layers = len({name for (name, _), number in record.unread.items() if number})
            text = f"{layers} of {len(record.layer_names)} layers were not read in some calls"
            return Contract("seen", UNSURE, f"{text}; {layer} ({calls} calls): {reason}")
    silent = [name for name, total in zip(record.layer_names, record.totals, strict=True) if not total.tokens]
    if silent:
        return Contract("seen", UNSURE, f"{len(silent)} layers made no decision, such as {silent[0]}")
    return Contract("seen", HOLDS, "every decision of every layer was read")


def _load(record: Recorder) -> Contract:
    if not any(total.tokens for total in record.totals):
        return Contract("load", SKIPPED, NOTHING_SEEN)
    dead, most = 0, 0.0
    for total in record.totals:
        if len(total.counts_E):
            dead += load_metrics(total.counts_E[None])["dead_experts"]
            most = max(most, float(total.counts_E.max() / max(total.counts_E.sum(), 1) * total.num_experts))
    verdict = HOLDS if not dead and most < 3 else UNSURE
    return Contract("load", verdict, f"{dead} dead experts; the busiest has {most:.2f} times its even share")


def _entropy(record: Recorder) -> Contract:
    shares = [
        entropy / np.log(total.num_experts)
        for total in record.totals
        if (entropy := total.mean_entropy()) is not None and total.num_experts > 1
    ]
    if not shares:
        return Contract("entropy", SKIPPED, "no gate was seen")
    if not np.isfinite(shares).all():
        return Contract("entropy", FAILS, "the probabilities of a gate are not numbers")
    verdict = UNSURE if max(shares) > 0.98 or min(shares) < 0.02 else HOLDS
    return Contract("entropy", verdict, f"{min(shares):.3f} to {max(shares):.3f} of its largest value, by layer")


def _drops(record: Recorder) -> Contract:
    tokens = sum(total.tokens for total in record.totals)
    dropped = sum(total.dropped for total in record.totals)
    if not tokens:
        return Contract("drops", SKIPPED, NOTHING_SEEN)
    text = f"{dropped:,} of {tokens:,} decisions ran fewer experts than {max(total.k for total in record.totals)}"
    return Contract("drops", HOLDS if not dropped else UNSURE, text)


def _weights(record: Recorder) -> Contract:
    sums = [found for total in record.totals if (found := total.weight_sums()) is not None]
    if not sums:
        return Contract("weights", SKIPPED, "the experts' call has no weights")
    if not np.isfinite(sums).all():
        return Contract("weights", FAILS, "the weights of a token are not numbers")
    low, high = min(one[0] for one in sums), max(one[1] for one in sums)
    return Contract("weights", HOLDS, f"the weights of a token sum to {low:.4f} to {high:.4f}")


def _balance(record: Recorder) -> Contract:
    losses = [found for total in record.totals if (found := total.balance_loss()) is not None]
    if not losses:
        return Contract("balance", SKIPPED, "no gate was seen")
    k = max(total.k for total in record.totals)
    worst = float(np.max(losses))  # keeps NaN
    text = f"formula on the executed choice: mean of the layers {np.mean(losses):.4f}, largest {worst:.4f} (even: {k})"
    return Contract("balance", HOLDS if worst < 1.5 * k else UNSURE, text)


# -------------------------------------------------------------------------------------------- by calling the model


@contextmanager
def _steady(model: nn.Module, training: bool = False) -> Iterator[None]:
    """The model in one mode without dropout, with fixed draws.

    Afterwards its mode, its buffers and the generators are what they were.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(one, one.clone()) for one in model.buffers()]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(SEED)
            model.train(training)
            for module in model.modules():
                if isinstance(module, QUIET):
                    module.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _call(record: Recorder, **changes: Any) -> Recorder:
    """What is decided about the first input of the trace, with some arguments changed."""
    return _called(record, **changes)[0]


def _called(record: Recorder, **changes: Any) -> tuple[Recorder, Any]:
    assert record.first_call is not None
    arguments = {**record.first_call, **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None and name not in LEFT_OUT}
    fresh = Recorder(record.model, names=[layer.name for layer in record.layers])
    with fresh:
        output = record.model(**arguments)
    return fresh, output


def _decisions(record: Recorder, layer: int) -> Tensor:
    """The experts of all rows in one layer, sorted, [R, K]."""
    parts = [np.asarray(table["experts"].combine_chunks().values) for table in record.parts()]
    layers = len(record.layer_names)
    whole_RLK = np.concatenate(parts).reshape(record.num_tokens, layers, -1)
    return torch.from_numpy(np.sort(whole_RLK[:, layer], axis=1).astype(np.int64))


def _ids_and_mask(record: Recorder) -> tuple[Tensor, Tensor]:
    """The first input: ids and mask [B, n]."""
    assert record.first_call is not None
    ids, mask = record.first_call[record.ids_name], record.first_call.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask


def sparsity(record: Recorder) -> Contract:
    """Experts that a row did not choose have no influence on its output: their weights are changed by 1."""
    largest = 0.0
    for layer in record.layers:
        state: list[Tensor] = []
        handle = layer.block.register_forward_pre_hook(
            lambda module, args, kwargs, state=state: state.append(
                next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)).detach()
            ),
            with_kwargs=True,
        )
        with _steady(record.model):
            try:
                _call(record)
            finally:
                handle.remove()
            row = state[0].reshape(-1, state[0].shape[-1])[:1].unsqueeze(0)
            before, chosen = _block_output(layer, row)
            with _changed_experts(layer, set(range(layer.num_experts)) - chosen):
                after, again = _block_output(layer, row)
        if again == chosen:
            largest = max(largest, float((after - before).abs().max()))
    text = f"changing the unchosen experts changes an output by {largest:.3g} at most"
    return Contract("sparsity", HOLDS if largest == 0 else FAILS, text)


def _block_output(layer: RoutedLayer, row_11I: Tensor) -> tuple[Tensor, set[int]]:
    """The block's output for one row, and the experts that worked."""
    alone = Recorder(layer.block, names=[layer.name.rpartition(".")[2]])
    with alone:
        output = layer.block(row_11I)
    found = output[0] if isinstance(output, tuple) else output
    experts = {int(one) for table in alone.parts() for one in np.asarray(table["experts"].combine_chunks().values)}
    return found.detach().clone(), experts - {UNKNOWN}


@contextmanager
def _changed_experts(layer: RoutedLayer, numbers: set[int]) -> Iterator[None]:
    """The weights of these experts plus 1, and afterwards what they were, to the bit."""
    if layer.is_list:
        changed = [
            one
            for number, child in enumerate(layer.experts.children())
            if number in numbers
            for one in child.parameters()
        ]
        views = [one.data for one in changed]
    else:
        stacked = [one for one in layer.experts.parameters(recurse=False) if len(one) == layer.num_experts]
        views = [one.data[number] for one in stacked for number in numbers]
    before = [view.clone() for view in views]
    try:
        for view in views:
            view.add_(1)
        yield
    finally:
        for view, value in zip(views, before, strict=True):
            view.copy_(value)


def causality(record: Recorder) -> Contract:
    """A later token changes no earlier choice: the last real token of each row is replaced."""
    ids_Bn, mask_Bn = _ids_and_mask(record)
    last_B = (mask_Bn != 0).long().mul(torch.arange(ids_Bn.shape[1])).argmax(1)
    other_Bn = ids_Bn.clone()
    rows_B = torch.arange(len(ids_Bn))
    other_Bn[rows_B, last_B] = torch.where(ids_Bn[rows_B, last_B] > 4, ids_Bn[rows_B, last_B] - 1, 5)
    with _steady(record.model):
        first, second = _call(record), _call(record, **{record.ids_name: other_Bn})
    earlier = (torch.arange(ids_Bn.shape[1]) < last_B[:, None]) & (mask_Bn != 0)
    changed = _share_changed(first, second, earlier.reshape(-1))
    return Contract(
        "causality", HOLDS if changed == 0 else FAILS, f"{changed:.1%} of earlier choices change with a later token"
    )


def padding(record: Recorder) -> Contract:
    """Padding changes no choice: the first row stands alone, and with padding behind it."""
    ids_Bn, mask_Bn = _ids_and_mask(record)
    row_1n = ids_Bn[:1, mask_Bn[0] != 0]
    length = row_1n.shape[1]
    padded_1n = torch.cat([row_1n, torch.zeros(1, 5, dtype=row_1n.dtype)], 1)
    mask_1n = (torch.arange(length + 5) < length).long().unsqueeze(0)
    with _steady(record.model):
        alone = _call(record, **{record.ids_name: row_1n, "attention_mask": torch.ones_like(row_1n)})
        behind = _call(record, **{record.ids_name: padded_1n, "attention_mask": mask_1n})
    differ = [
        float((_decisions(alone, layer) != _decisions(behind, layer)[:length]).any(1).float().mean())
        for layer in range(len(record.layer_names))
    ]
    return Contract(
        "padding",
        HOLDS if max(differ) == 0 else FAILS,
        f"{max(differ):.1%} of the choices change with padding behind them",
    )


def train_eval(record: Recorder) -> Contract:
    """Training without dropout chooses as evaluation does."""
    with _steady(record.model):
        evaluated = _call(record)
    with _steady(record.model, training=True):
        trained = _call(record)
    changed = _share_changed(evaluated, trained, None)
    return Contract(
        "train/eval", HOLDS if changed == 0 else UNSURE, f"{changed:.1%} of the choices differ in training mode"
    )


def _share_changed(first: Recorder, second: Recorder, kept_R: Tensor | None) -> float:
    """The largest share over the layers of rows with other experts."""
    shares = []
    for layer in range(len(first.layer_names)):
        changed_R = (_decisions(first, layer) != _decisions(second, layer)).any(1)
        chosen_R = changed_R if kept_R is None else changed_R[kept_R]
        shares.append(float(chosen_R.float().mean()) if len(chosen_R) else 0.0)
    return max(shares)


def auxiliary_loss(record: Recorder) -> Contract:
    """The loss that the model reports is the formula on the executed choice, over the real tokens of all layers."""
    with _steady(record.model):
        called, output = _called(record, output_router_logits=True)
    reported = getattr(output, "aux_loss", None)
    if reported is None:
        return Contract("aux loss", SKIPPED, "the model reports none")
    losses = [total.balance_loss() for total in called.totals]
    known = [one for one in losses if one is not None]
    if not known:
        return Contract("aux loss", SKIPPED, "no gate was seen")
    pooled = copy.deepcopy(called.totals[0])
    for total in called.totals[1:]:
        pooled.counts_E = pooled.counts_E + total.counts_E
        pooled.probability_E = pooled.probability_E + total.probability_E
        pooled.tokens, pooled.with_probability = (
            pooled.tokens + total.tokens,
            pooled.with_probability + total.with_probability,
        )
    formula = pooled.balance_loss()
    assert formula is not None
    difference = abs(float(reported) - formula) / formula
    text = f"reported {float(reported):.5f}; pooled formula {formula:.5f}, mean of the layers {np.mean(known):.5f}"
    return Contract("aux loss", HOLDS if difference < CLOSE else FAILS, text)


def agreement(first: Recorder, second: Recorder) -> list[tuple[str, float, float]]:
    """Per layer the share of tokens with the same first expert in two traces of the same tokens, and that by chance.

    The experts of the second trace are renamed to agree as often as possible. Raises ValueError for traces of other
    tokens.
    """
    mine, other = (np.concatenate([np.asarray(part["token"]) for part in one.parts()]) for one in (first, second))
    if first.layer_names != second.layer_names or not np.array_equal(mine, other):
        raise ValueError("the traces are not of the same tokens and layers")
    layers = range(len(first.layer_names))
    paths = [np.stack([_first_experts(one, layer) for layer in layers], axis=1) for one in (first, second)]
    shares, chance = route_agreement(paths[0], paths[1], np.random.default_rng(0))
    return list(zip(first.layer_names, shares, chance, strict=True))


def _first_experts(record: Recorder, layer: int) -> Any:
    """The first expert of every kept token in one layer, as it was recorded."""
    layers = len(record.layer_names)
    parts = []
    for table in record.parts():
        flat = np.asarray(table["experts"].combine_chunks().values)
        parts.append(flat.reshape(table.num_rows, layers, -1)[:, layer, 0])
    return np.concatenate(parts).astype(np.int64)

"""What every router of a model decides, token by token, while the model runs as always.

R rows: tokens of one call  K experts per token  E experts  L layers  B batch  n tokens of a sequence in one call
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.models.base_model import EvaluableModel
from research_eval.routing.record import RoutingRecord
from research_eval.tracing.decisions import UNKNOWN, Seen, Totals
from research_eval.tracing.find import RoutedLayer, find_layers
from research_eval.wording import printable

FORMAT_VERSION = 1
FACTS_FILE, TOKENS_FILE = "trace.json", "tokens.parquet"
BUFFERED_TOKENS = 100_000  # in memory, before they go to the disk
KEPT_ROWS, KEPT_TOKENS = 4, 64  # of the first call, for the checks that call the model again
NO_IDS = ("mask", "position", "label", "type", "cache")  # in the name of an argument that is no matrix of token ids

OFTEN, OTHER_ROWS, NO_MATCH = (
    "the model calls it several times in one forward pass",
    "it gets another number of rows than other layers",
    "its experts read rows that neither the gate nor the layer was given",
)


class Recorder:
    """Records the decisions of all routed layers while it is entered. The model's outputs stay the same, to the bit.

    `names` are the modules with the experts; without them the layers are found by their structure. `every` keeps each
    n-th token; sums over all tokens are exact all the same. At most `buffered` tokens are held in memory; more go to
    files in a temporary folder. Calls outside the model's own `forward`, as those of gradient checkpointing, are not
    recorded, and neither is a call that fails. `unread` counts the calls of a layer whose decisions could not be read,
    with the reason. Raises ConfigError for a model without routed layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        names: Sequence[str] = (),
        every: int = 1,
        buffered: int = BUFFERED_TOKENS,
    ) -> None:
        if every < 1 or buffered < 1:
            raise ConfigError(f"trace: every={every} and buffered={buffered}: expected at least 1")
        self.model, self.tokenizer, self._every, self._buffered = model, tokenizer, every, buffered
        self.layers: list[RoutedLayer] = []
        self._recorder = model.recorder() if isinstance(model, EvaluableModel) else None
        self.is_ours = isinstance(model, EvaluableModel)
        if self.is_ours:
            recorder = self._recorder
            if recorder is None:
                raise ConfigError(f"trace: {type(model).__name__} has no routed layer")
            self.layer_names = [f"step {step + 1}" for step in range(recorder.num_steps)]
            sizes = [recorder.num_experts] * recorder.num_steps
        else:
            self.layers = find_layers(model, names)
            self.layer_names = [layer.name for layer in self.layers]
            sizes = [layer.num_experts for layer in self.layers]
        self.totals = [Totals(size) for size in sizes]
        self.domains: list[str] = []  # names, if the sequences come from several sources
        self.sequence_domains: list[int] = []  # the number of each sequence's domain
        self.unread: Counter[tuple[str, str]] = Counter()  # (layer, reason)
        self.first_call: dict[str, Any] | None = None  # arguments by name; None without token ids
        self.ids_name = ""  # of the argument with the token ids
        self.num_tokens = self.num_sequences = 0
        self._handles: list[Any] = []
        self._inside = self._paused = False
        self._seen: list[Seen] = []
        self._columns: list[dict[str, NDArray[Any]]] = []
        self._in_memory = 0
        self._parts: list[Path] = []
        self._folder: Path | None = None

    # ------------------------------------------------------------------------------------------------------- hooks

    def __enter__(self) -> Self:
        if self._handles:
            raise ConfigError("trace: the block is entered already")
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        add(self.model.register_forward_hook(self._after, always_call=True))
        if self.is_ours:
            add(_Listener(self._recorder, self._note_ours))
        for number, layer in enumerate(self.layers):
            if layer.gate is not None:
                add(layer.gate.register_forward_pre_hook(self._input_hook(number), with_kwargs=True))
                add(layer.gate.register_forward_hook(self._gate_hook(number)))
            if not layer.is_list:
                add(layer.experts.register_forward_pre_hook(self._experts_hook(number), with_kwargs=True))
                continue
            add(layer.block.register_forward_pre_hook(self._input_hook(number, is_block=True), with_kwargs=True))
            for expert, module in enumerate(layer.experts.children()):
                add(module.register_forward_pre_hook(self._expert_hook(number, expert), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls of the model in this block are not recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _note_ours(self, record: RoutingRecord) -> None:
        """Our models push their decisions to a recorder, in evaluation; this one listens too."""
        if not self._inside:
            return
        chosen_DK = record.experts_DK.detach().cpu()
        weights_DK = record.weights_DK.detach().float().cpu()
        probabilities = None if record.probabilities_DA is None else record.probabilities_DA.detach().float().cpu()
        if probabilities is not None and probabilities.shape[1] > self.totals[0].num_experts:
            probabilities = probabilities[:, : self.totals[0].num_experts]  # without the action to stop
        seen = self._seen[record.step]
        seen.chosen_RK, seen.weights_RK = chosen_DK, weights_DK
        seen.log_probabilities_RE = None if probabilities is None else probabilities.clamp_min(1e-30).log()
        if record.token_D is not None and record.sample_D is not None:
            self._places[record.step] = record.sample_D.detach().cpu(), record.token_D.detach().cpu()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        self._inside = True
        self._seen = [Seen() for _ in self.layer_names]
        self._places: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layer_names)
        given = _by_name(module, args, kwargs)
        self._ids = _token_ids(given)
        places = given.get("position_ids")
        self._positions = places if isinstance(places, Tensor) and places.ndim == 2 else None
        mask = given.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self.first_call is None and not self.is_ours and self._ids is not None:
            self.first_call = {name: _small(value) for name, value in given.items()}
            self.ids_name = next(name for name, value in given.items() if value is self._ids)

    def _experts_hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._inside:
                return
            seen = self._seen[number]
            seen.calls += 1
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            whole = [one for one in tensors if not one.is_floating_point() and one.dtype != torch.bool]
            if not whole:
                return
            chosen_RK = whole[0].detach().reshape(-1, whole[0].shape[-1])
            seen.chosen_RK = chosen_RK.cpu().long()
            size = self.layers[number].num_experts
            for one in tensors[1:]:
                if one.is_floating_point() and one.shape[-1] in (chosen_RK.shape[1], size):
                    weights = one.detach().reshape(-1, one.shape[-1]).float()
                    if len(weights) == len(chosen_RK):
                        is_whole = weights.shape[1] != chosen_RK.shape[1]
                        seen.weights_RK = (weights.gather(1, chosen_RK) if is_whole else weights).cpu()
                        break

        return hook

    def _gate_hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._inside:
                self._seen[number].gate_put_out(output, self.layers[number].num_experts)

        return hook

    def _input_hook(self, number: int, is_block: bool = False) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = _first_tensor(args, kwargs)
            if not self._inside or states is None:
                return
            seen = self._seen[number]
            seen.calls += is_block
            if self.layers[number].is_list:
                rows_RI = states.detach().reshape(-1, states.shape[-1])
                seen.inputs = [*seen.inputs, rows_RI] if is_block else [rows_RI, *seen.inputs]

        return hook

    def _expert_hook(self, number: int, expert: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = _first_tensor(args, kwargs)
            if self._inside and states is not None:
                rows = states.detach().reshape(-1, states.shape[-1])
                known = self._seen[number].rows
                known.setdefault(expert, []).append(rows)

        return hook

    # ------------------------------------------------------------------------------------------------------ records

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        self._inside = False
        if output is None:  # the call has failed
            return
        for layer, seen in zip(self.layer_names, self._seen, strict=True):
            if seen.calls > 1:
                self.unread[layer, OFTEN] += 1
                seen.chosen_RK = None
            elif seen.rows:
                seen.find_chosen()
                self.unread[layer, NO_MATCH] += seen.chosen_RK is None
        known = [seen.chosen_RK for seen in self._seen if seen.chosen_RK is not None]
        if not known:
            return
        rows = self._ids.numel() if self._ids is not None else 0
        if not any(len(one) == rows for one in known):
            rows = max(len(one) for one in known)
        columns = self._where(rows)
        real_R = torch.from_numpy(columns["real"])
        width = max(one.shape[1] for one in known)
        experts_RLK = np.full((rows, len(self._seen), width), UNKNOWN, np.int16)
        weights_RLK = np.full((rows, len(self._seen), width), np.nan, np.float16)
        for number, seen in enumerate(self._seen):
            if seen.chosen_RK is None:
                continue
            if len(seen.chosen_RK) != rows:
                self.unread[self.layer_names[number], OTHER_ROWS] += 1
                continue
            chosen_RK, weights_RK = seen.chosen_RK, seen.weights_RK
            probabilities_RE = seen.probabilities(rows)
            self.totals[number].add(
                chosen_RK[real_R],
                None if weights_RK is None else weights_RK[real_R],
                None if probabilities_RE is None else probabilities_RE[real_R],
            )
            experts_RLK[:, number, : chosen_RK.shape[1]] = chosen_RK.numpy()
            if weights_RK is not None:
                weights_RLK[:, number, : weights_RK.shape[1]] = weights_RK.numpy()
        kept_R = (self.num_tokens + np.arange(rows)) % self._every == 0
        self.num_tokens += rows
        columns |= {"experts": experts_RLK, "weights": weights_RLK}
        self._columns.append({name: column[kept_R] for name, column in columns.items()})
        self._in_memory += int(kept_R.sum())
        if self._in_memory >= self._buffered:
            self._spill()

    def _where(self, rows: int) -> dict[str, NDArray[Any]]:
        """Token, sequence and position of every row, and whether it is no padding."""
        place = next((one for one in self._places if one is not None), None)
        ids_Bn = self._ids
        if place is not None:  # a model of ours that routes tokens: padding is not among them
            sample_R, position_R = (one.numpy() for one in place)
            token_R = np.full(rows, UNKNOWN) if ids_Bn is None else ids_Bn.cpu().numpy()[sample_R, position_R]
            real_R = np.ones(rows, bool)
        elif ids_Bn is not None and ids_Bn.numel() == rows:
            token_R = ids_Bn.reshape(-1).cpu().numpy()
            sample_R, position_R = np.divmod(np.arange(rows), ids_Bn.shape[1])
            real_R = np.ones(rows, bool)
            mask = self._mask
            if mask is not None and mask.shape[0] == ids_Bn.shape[0] and mask.shape[1] >= ids_Bn.shape[1]:
                # With a cache the mask also covers what was read before: its last columns are these tokens.
                real_R = mask[:, -ids_Bn.shape[1] :].reshape(-1).cpu().numpy() != 0
                position_R = position_R + mask.shape[1] - ids_Bn.shape[1]
            if self._positions is not None and self._positions.shape[1] == ids_Bn.shape[1]:
                position_R = self._positions.expand(len(ids_Bn), -1).reshape(-1).cpu().numpy()
        else:  # decisions about whole samples, or rows that no token is known for
            token_R, position_R = np.full(rows, UNKNOWN), np.zeros(rows, np.int64)
            sample_R, real_R = np.arange(rows), np.ones(rows, bool)
        first, self.num_sequences = self.num_sequences, self.num_sequences + int(sample_R.max(initial=-1)) + 1
        return {
            "token": token_R.astype(np.int32),
            "sequence": (first + sample_R).astype(np.int32),
            "position": position_R.astype(np.int32),
            "real": real_R,
        }

    # --------------------------------------------------------------------------------------------------------- files

    def _spill(self) -> None:
        """Move what is in memory to a file."""
        if not self._columns:
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="goe-trace-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"part_{len(self._parts):05}.parquet"
        pq.write_table(_table(self._columns), path, compression="zstd")
        self._parts.append(path)
        self._columns, self._in_memory = [], 0

    def parts(self) -> list[pa.Table]:
        """What was recorded, in order, as tables of at most `buffered` tokens and those of one call."""
        found = [pq.read_table(path) for path in self._parts]
        return found + ([_table(self._columns)] if self._columns else [])

    def facts(self) -> dict[str, Any]:
        """What holds for the whole trace, for JSON. A figure that is no number is None."""
        found = {
            "version": FORMAT_VERSION,
            "model": type(self.model).__name__,
            "layers": self.layer_names,
            "num_experts": [total.num_experts for total in self.totals],
            "k": [total.k for total in self.totals],
            "tokens": self.num_tokens,
            "every": self._every,
            "load": [(total.counts_E / max(int(total.counts_E.sum()), 1)).round(6).tolist() for total in self.totals],
            "balance_loss": [total.balance_loss() for total in self.totals],
            "entropy": [total.mean_entropy() for total in self.totals],
            "dropped": [total.dropped for total in self.totals],
            "weight_sums": [total.weight_sums() for total in self.totals],
            "domains": self.domains,
            "sequence_domains": self.sequence_domains,
            "unread": [[layer, reason, calls] for (layer, reason), calls in self.unread.items() if calls],
        }
        return {name: _numbers_only(value) for name, value in found.items()}

    def save(self, folder: str | Path) -> Path:
        """Write the trace into a folder, or replace it there: `tokens.parquet` and `trace.json`. Returns the folder."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        temporary = place / f".{TOKENS_FILE}"
        used: set[int] = set()
        writer: pq.ParquetWriter | None = None
        try:
            for path in [*self._parts, None]:
                table = pq.read_table(path) if path is not None else _table(self._columns) if self._columns else None
                if table is not None:
                    used |= set(np.unique(np.asarray(table["token"])).tolist())
                    writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                    writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise ConfigError("trace: nothing was recorded. Call the model inside the block.")
        facts = {**self.facts(), "names": _names(self.tokenizer, used - {UNKNOWN})}
        content = json.dumps(facts, allow_nan=False).encode()
        temporary.replace(place / TOKENS_FILE)
        write_atomically(place / FACTS_FILE, content)
        return place


def _table(columns: Sequence[dict[str, NDArray[Any]]]) -> pa.Table:
    """The calls of a model as one table: experts and weights are lists of L K numbers."""
    width = max(one["experts"].shape[2] for one in columns)
    arrays: dict[str, Any] = {}
    for name in columns[0]:
        parts = [_widened(one[name], width) if one[name].ndim == 3 else one[name] for one in columns]
        whole = np.concatenate(parts)
        if whole.ndim == 3:
            flat = pa.array(whole.reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, whole.shape[1] * whole.shape[2])
        else:
            arrays[name] = pa.array(whole)
    return pa.table(arrays)


def _widened(values_RLK: NDArray[Any], width: int) -> NDArray[Any]:
    missing = width - values_RLK.shape[2]
    fill = UNKNOWN if values_RLK.dtype == np.int16 else np.nan
    return np.pad(values_RLK, ((0, 0), (0, 0), (0, missing)), constant_values=fill) if missing else values_RLK


def _names(tokenizer: Any, used: set[int]) -> dict[str, str]:
    """The text of each token, if there is a tokenizer of transformers or of the library tokenizers."""
    if tokenizer is None:
        return {}
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return {str(one): printable(str(tokenizer.convert_ids_to_tokens(one))) for one in sorted(used)}
    return {str(one): printable(tokenizer.id_to_token(one) or str(one)) for one in sorted(used)}


def _numbers_only(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, list):
        return [_numbers_only(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; those of `*args` have none, but for the first: the token ids."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return dict(kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= dict(zip(("input_ids",), value, strict=False))
        else:
            found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.ndim), None)


def _token_ids(given: dict[str, Any]) -> Tensor | None:
    """The token ids among the arguments of a model: the first matrix of whole numbers that has no other purpose."""
    for name, ids in {"input_ids": given.get("input_ids"), **given}.items():
        if any(part in name for part in NO_IDS):
            continue
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() and ids.dtype != torch.bool:
            return ids
    return None


def _small(value: Any) -> Any:
    """A part of a matrix of the first call; other values as they are, but for caches and labels."""
    if isinstance(value, Tensor):
        return value[:KEPT_ROWS, :KEPT_TOKENS].detach().clone() if value.ndim == 2 else None
    return value if isinstance(value, bool | int | float | str) else None


class _Listener:
    """Hears what a model of ours pushes to its recorder, until it is removed. Several can hear the same recorder."""

    def __init__(self, recorder: Any, heard: Callable[[RoutingRecord], None]) -> None:
        self._recorder, self._before, self._wanted = recorder, vars(recorder).get("push"), recorder.wants
        recorder.wants = "everything"
        push = recorder.push

        def listening(record: RoutingRecord) -> None:
            push(record)
            heard(record)

        recorder.push = listening

    def remove(self) -> None:
        if self._before is None:
            del self._recorder.push
        else:
            self._recorder.push = self._before
        self._recorder.wants = self._wanted

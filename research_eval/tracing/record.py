"""What every router of a model decides, token by token, while the model runs as always.

R rows: tokens of one call  K experts per token  E experts  L layers  B batch  n tokens of a sequence in one call
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from research_eval.tracing.find import RoutedLayer, find_layers
from research_eval.wording import printable

FORMAT_VERSION = 1
FACTS_FILE, TOKENS_FILE = "trace.json", "tokens.parquet"
BUFFERED_TOKENS = 100_000  # in memory, before they go to the disk
KEPT_ROWS, KEPT_TOKENS = 4, 64  # of the first call, for the checks that call the model again
UNKNOWN = -1


@dataclass
class Totals:
    """Sums over all real tokens of a layer, whether they are kept or not."""

    num_experts: int
    tokens: int = 0
    k: int = 0
    dropped: int = 0  # tokens with fewer than K experts
    counts_E: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    probability_E: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    with_probability: int = 0
    entropy: float = 0.0
    weight_low: float = np.inf  # of the sums of a token's weights
    weight_high: float = -np.inf

    def add(self, chosen_RK: Tensor, weights_RK: Tensor | None, probabilities_RE: Tensor | None) -> None:
        """Add the decisions about some real tokens."""
        if not len(self.counts_E):
            self.counts_E = np.zeros(self.num_experts, np.int64)
            self.probability_E = np.zeros(self.num_experts)
        self.tokens += len(chosen_RK)
        self.k = max(self.k, chosen_RK.shape[1])
        is_used_RK = chosen_RK >= 0
        if weights_RK is not None and len(weights_RK):
            is_used_RK = is_used_RK & (weights_RK != 0)
            sums_R = weights_RK.sum(1)
            self.weight_low = min(self.weight_low, float(sums_R.min()))
            self.weight_high = max(self.weight_high, float(sums_R.max()))
        self.dropped += int((is_used_RK.sum(1) < chosen_RK.shape[1]).sum())
        self.counts_E += np.bincount(chosen_RK[chosen_RK >= 0].numpy(), minlength=self.num_experts)
        if probabilities_RE is not None:
            self.probability_E += probabilities_RE.double().sum(0).numpy()
            self.with_probability += len(probabilities_RE)
            self.entropy += float(torch.special.entr(probabilities_RE.double()).sum())

    def mean_entropy(self) -> float | None:
        """Of the gate's probabilities, in nats."""
        return self.entropy / self.with_probability if self.with_probability else None

    def weight_sums(self) -> list[float] | None:
        """The smallest and the largest sum of a token's weights."""
        return [self.weight_low, self.weight_high] if np.isfinite(self.weight_low) else None

    def balance_loss(self) -> float | None:
        """E sum_i f_i P_i with f the assignments of an expert per token, as transformers defines it; K is balanced."""
        if not self.with_probability or not self.tokens:
            return None
        share_E = self.counts_E / self.tokens
        return float(self.num_experts * (share_E * self.probability_E / self.with_probability).sum())


@dataclass
class _Seen:
    """What one layer decided in the present call of the model."""

    chosen_RK: Tensor | None = None
    weights_RK: Tensor | None = None
    logits_RE: Tensor | None = None
    states: Tensor | None = None  # of a layer with a list of experts: the input of the block
    rows: dict[int, Tensor] = field(default_factory=dict)  # expert -> its input rows


class Recorder:
    """Records the decisions of all routed layers while it is entered. The model's outputs stay the same, to the bit.

    `names` are the modules with the experts; without them the layers are found by their structure. `every` keeps each
    n-th token; sums over all tokens are exact all the same. At most `buffered` tokens are held in memory; more go to
    files in a temporary folder. Calls outside the model's own `forward`, as those of gradient checkpointing, are not
    recorded. Raises ConfigError for a model without routed layers.
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
        self.first_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.num_tokens = self.num_sequences = 0
        self._handles: list[Any] = []
        self._inside = False
        self._seen: list[_Seen] = []
        self._columns: list[dict[str, NDArray[Any]]] = []
        self._in_memory = 0
        self._parts: list[Path] = []
        self._folder: Path | None = None

    # ------------------------------------------------------------------------------------------------------- hooks

    def __enter__(self) -> Self:
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        add(self.model.register_forward_hook(self._after, always_call=True))
        if self.is_ours:
            self._listen()
        for number, layer in enumerate(self.layers):
            if layer.gate is not None:
                add(layer.gate.register_forward_hook(self._gate_hook(number)))
            if not layer.is_list:
                add(layer.experts.register_forward_pre_hook(self._experts_hook(number), with_kwargs=True))
                continue
            add(layer.block.register_forward_pre_hook(self._block_hook(number), with_kwargs=True))
            for expert, module in enumerate(layer.experts.children()):
                add(module.register_forward_pre_hook(self._expert_hook(number, expert)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.is_ours:
            self._recorder.__dict__.pop("push", None)

    def _listen(self) -> None:
        """Our models push their decisions to a recorder, in evaluation; this one listens too."""
        recorder: Any = self._recorder
        push = type(recorder).push

        def listening(record: RoutingRecord) -> None:
            push(recorder, record)
            if self._inside:
                self._note_ours(record)

        recorder.push = listening

    def _note_ours(self, record: RoutingRecord) -> None:
        chosen_DK = record.experts_DK.detach().cpu()
        weights_DK = record.weights_DK.detach().float().cpu()
        probabilities = None if record.probabilities_DA is None else record.probabilities_DA.detach().float().cpu()
        if probabilities is not None and probabilities.shape[1] > self.totals[0].num_experts:
            probabilities = probabilities[:, : self.totals[0].num_experts]  # without the action to stop
        seen = self._seen[record.step]
        seen.chosen_RK, seen.weights_RK = chosen_DK, weights_DK
        seen.logits_RE = None if probabilities is None else probabilities.clamp_min(1e-30).log()
        if record.token_D is not None and record.sample_D is not None:
            self._places[record.step] = record.sample_D.detach().cpu(), record.token_D.detach().cpu()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        self._seen = [_Seen() for _ in self.layer_names]
        self._places: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layer_names)
        self._ids = _first(kwargs.get("input_ids"), *args)
        places = kwargs.get("position_ids")
        self._positions = places if isinstance(places, Tensor) and places.ndim == 2 else None
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self.first_call is None and not self.is_ours and self._ids is not None:
            self.first_call = _small(args), {key: _small_one(value) for key, value in kwargs.items()}

    def _experts_hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._inside:
                return
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            whole = [one for one in tensors if not one.is_floating_point() and one.dtype != torch.bool]
            if not whole:
                return
            chosen_RK = whole[0].detach().reshape(-1, whole[0].shape[-1])
            seen = self._seen[number]
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
            if not self._inside:
                return
            size = self.layers[number].num_experts
            for one in output if isinstance(output, tuple | list) else (output,):
                if isinstance(one, Tensor) and one.is_floating_point() and one.shape[-1] == size:
                    self._seen[number].logits_RE = one.detach().reshape(-1, size).float().cpu()
                    return

        return hook

    def _block_hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside:
                states = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
                self._seen[number].states = None if states is None else states.detach().reshape(-1, states.shape[-1])

        return hook

    def _expert_hook(self, number: int, expert: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._inside and args and isinstance(args[0], Tensor):
                rows = args[0].detach().reshape(-1, args[0].shape[-1])
                known = self._seen[number].rows.get(expert)
                self._seen[number].rows[expert] = rows if known is None else torch.cat([known, rows])

        return hook

    # ------------------------------------------------------------------------------------------------------ records

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        self._inside = False
        for seen in self._seen:
            if seen.rows and seen.states is not None:
                seen.chosen_RK = matched_rows(seen.states.cpu(), {e: rows.cpu() for e, rows in seen.rows.items()})
        known = [seen.chosen_RK for seen in self._seen if seen.chosen_RK is not None]
        if not known:
            return
        rows = max(len(one) for one in known)
        columns = self._where(rows)
        real_R = torch.from_numpy(columns["real"])
        width = max(one.shape[1] for one in known)
        experts_RLK = np.full((rows, len(self._seen), width), UNKNOWN, np.int16)
        weights_RLK = np.full((rows, len(self._seen), width), np.nan, np.float16)
        for number, seen in enumerate(self._seen):
            if seen.chosen_RK is None or len(seen.chosen_RK) != rows:
                continue
            chosen_RK, weights_RK = seen.chosen_RK, seen.weights_RK
            probabilities_RE = None if seen.logits_RE is None else seen.logits_RE.softmax(-1)
            if probabilities_RE is not None and len(probabilities_RE) != rows:
                probabilities_RE = None
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
        """What holds for the whole trace, for JSON."""
        return {
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
        }

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
        temporary.replace(place / TOKENS_FILE)
        facts = {**self.facts(), "names": _names(self.tokenizer, used - {UNKNOWN})}
        write_atomically(place / FACTS_FILE, json.dumps(facts, allow_nan=False).encode())
        return place


def matched_rows(states_RI: Tensor, rows: dict[int, Tensor]) -> Tensor:
    """Which experts read each row of the block's input, [R, K], the smaller number first.

    UNKNOWN stands where a row has fewer. The rows of an expert are found by their values; equal ones are taken in
    order.
    """
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(states_RI.contiguous().float().numpy()):
        places.setdefault(row.tobytes(), []).append(place)
    chosen: list[list[int]] = [[] for _ in range(len(states_RI))]
    for expert in sorted(rows):
        taken: dict[bytes, int] = {}
        for row in rows[expert].contiguous().float().numpy():
            key = row.tobytes()
            number = taken.get(key, 0)
            taken[key] = number + 1
            if number < len(places.get(key, ())):
                chosen[places[key][number]].append(expert)
    width = max((len(one) for one in chosen), default=0)
    return torch.tensor([one + [UNKNOWN] * (width - len(one)) for one in chosen], dtype=torch.long).reshape(-1, width)


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


def _first(*candidates: Any) -> Tensor | None:
    """The token ids among the arguments of a model: the first matrix of whole numbers."""
    for one in candidates:
        ids = getattr(one, "input_ids", one)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() and ids.dtype != torch.bool:
            return ids
    return None


def _small(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_small_one(one) for one in args)


def _small_one(value: Any) -> Any:
    """A part of a matrix of the first call; other values as they are, but for caches and labels."""
    if isinstance(value, Tensor):
        return value[:KEPT_ROWS, :KEPT_TOKENS].detach().clone() if value.ndim == 2 else None
    return value if isinstance(value, bool | int | float | str) else None

"""Several processes that train one model: the numbers are those of one process, for every model and mode.

The processes are forked, so that nothing is imported again. `GOE_REPETITIONS=50` takes 50 steps, and tries every router
mode with every halting rule in two and four processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    ROOT,
    Ended,
    command,
    history,
    python,
    repeatable,
    results,
    run_in,
    small_settings,
    write_config,
)

from research_eval import main
from research_eval.config.sections import ParallelParams
from research_eval.errors import ConfigError
from research_eval.layers import collective
from research_eval.models.base_model import EvaluableModel, Outcome
from research_eval.registry import MODELS_MAP
from research_eval.routing import record
from research_eval.runs.group import Silent
from research_eval.runs.prepare import prepare
from research_eval.schema import config_from_dict
from research_eval.system.world import rank_and_size
from research_eval.tasks.base import Evaluation, task_of
from research_eval.training.checkpoint import load_checkpoint
from research_eval.training.fit import _evaluated, fit
from research_eval.training.parallel import OneProcess
from research_eval.training.processes import Processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")

REPETITIONS = int(os.environ.get("GOE_REPETITIONS", "0"))
STEPS = max(6, REPETITIONS)
BATCH = 13
MODES = ("gate", "st", "st_dense", "reinforce", "q", "published")
HALTS = ("off", "confidence", "ponder", "action")
SECONDS = max(120, 20 * REPETITIONS)  # for the work of one process


def settings(model_type: str, **params: Any) -> dict[str, Any]:
    """A training with SGD, whose last batch has two rows: fewer than four processes."""
    params = {"embed_dim": 8, "num_heads": 2, "dropout": 0.0} | params
    return small_settings(
        model_type=model_type,
        dataset_name="majority",
        epochs=1,
        batch_size=BATCH,
        dataset_params={"num_samples": (BATCH * (STEPS - 1) + 2) * 5 // 4, "seq_len": 9},
        model_params={name: value for name, value in params.items() if value is not None},
        optimizer_params={"name": "sgd", "lr": 0.05, "momentum": 0.9, "grad_clip_norm": 1.0},
        training_params={"log_every": 4, "max_steps": STEPS},
    )


def halting(mode: str, halt: str) -> dict[str, Any]:
    priced = {"path_penalty_coef": 0.01} if halt in ("ponder", "action") else {}
    return settings("goe_original", router_mode=mode, halt=halt, **priced)


def text(model_type: str, **params: Any) -> dict[str, Any]:
    """Lines of which the answers count alone, so that processes have different numbers of targets."""
    settings_of_lines = settings(model_type, **params)
    settings_of_lines |= {"dataset_type": "language_modeling", "dataset_name": "addition_text"}
    settings_of_lines["dataset_params"] = {"num_samples": 200, "val_samples": 20, "test_samples": 0}
    return settings_of_lines


CASES: dict[str, dict[str, Any]] = {
    "dense": settings("dense"),
    "looped": settings("looped"),
    "lstm": settings("lstm", num_heads=None),
    "moe": settings("moe", balance_bias_rate=0.01),
    "goe": settings("goe"),
    "goe_scan": settings("goe_scan", embed_dim=None, num_heads=None, dropout=None, num_nodes=4, num_walkers=2),
    "scan experts": settings(
        "goe_original", num_total_experts=4, num_scan_experts=2, scan_nodes=4, scan_walkers=2, pool="last"
    ),
    "shared gradients": settings("goe_original", expert_sharing=0.5),
    "all terms": settings(
        "goe_original", halt="action", contrastive_loss_coef=0.1, path_heads_coef=0.1, router_entropy_coef=0.01
    ),
    "random routes": settings("goe_original", route="random"),
    "exploring": settings("goe_original", exploration=0.5),
    **{f"{mode}, {halt}": halting(mode, halt) for mode, halt in zip(MODES, HALTS[1:] * 2, strict=True)},
    "text, dense": text("dense"),
    "text, moe": text("moe", top_k_experts=2),
    "text, goe": text("goe", num_total_experts=4, max_path_len=2),
    "text, goe_original": text("goe_original", num_total_experts=4, max_path_len=2, halt="confidence"),
    "micro-batches": settings("moe") | {"training_params": {**settings("moe")["training_params"]}},
    "micro-batches of text": text("moe"),
}
for name in ("micro-batches", "micro-batches of text"):
    CASES[name]["training_params"] = {**CASES[name]["training_params"], "gradient_accumulation_steps": 3}
SELDOM = ("dense", "looped", "shared gradients", "exploring", "text, dense", "text, goe", "micro-batches")
if REPETITIONS:
    CASES |= {f"{mode}, {halt}": halting(mode, halt) for mode in MODES for halt in HALTS}

Trained = tuple[dict[str, torch.Tensor], list[tuple[int, dict[str, float]]]]  # weights and buffers, values of the log


class Kept(Silent):
    """Keeps the values of the log, without speeds."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []

    def train_values(self, step: int, values: dict[str, float]) -> None:
        self.values.append((step, {name: value for name, value in values.items() if "second" not in name}))

    def epoch_end(self, step: int, evaluation: Evaluation, model_metrics: dict[str, Any], scored: Any) -> None:
        self.values.append((step, {"val_loss": evaluation.loss}))


def trained(config: dict[str, Any], folder: Path, group: Processes | None = None) -> Trained:
    checked = config_from_dict(config)
    runtime, data, model = prepare(checked)
    kept = Kept()
    folder.mkdir(parents=True, exist_ok=True)
    fit(model, data, checked, runtime, folder, kept, group)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, kept.values


def in_processes(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns in each of so many forked processes, which torchrun might have started."""

    def body(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        torch.save(work(rank), folder / f"answer.{rank}")

    folder.mkdir(parents=True, exist_ok=True)
    members = [multiprocessing.get_context("fork").Process(target=body, args=(rank,)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join(SECONDS)
    assert [member.exitcode for member in members] == [0] * size
    return [torch.load(folder / f"answer.{rank}", weights_only=False) for rank in range(size)]  # our own file


def in_a_group(
    size: int, folder: Path, work: Callable[[Processes], Any], layout: ParallelParams | None = None
) -> list[Any]:
    """What `work` returns in each process of a group."""

    def joined(rank: int) -> Any:
        group = Processes(0, "cpu", layout, f"file://{folder / 'meeting'}")
        try:
            return work(group)
        finally:
            group.close()

    return in_processes(size, folder, joined)


def all_close(found: Trained, expected: Trained, tolerance: float = 1e-5) -> None:
    weights, values = expected
    for name, tensor in weights.items():
        torch.testing.assert_close(
            found[0][name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert [(step, set(row)) for step, row in found[1]] == [(step, set(row)) for step, row in values]
    for (_, row), (step, other) in zip(found[1], values, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5), step


@pytest.mark.parametrize("size", [2, 4])
def test_the_numbers_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    names = [name for name in CASES if name not in SELDOM] if size == 2 else ["moe", "q, ponder", "text, moe"]
    names = list(CASES) if REPETITIONS else names
    found = in_a_group(
        size, tmp_path, lambda group: [trained(CASES[name], tmp_path / str(group.rank) / name, group) for name in names]
    )
    for number, name in enumerate(names):
        expected = trained(CASES[name], tmp_path / "alone" / name)
        all_close(found[0][number], expected)
        for other in found[1:]:  # the processes themselves agree to the bit
            assert all(torch.equal(other[number][0][key], tensor) for key, tensor in found[0][number][0].items()), name


CUT = ("moe", "goe", "all terms", "shared gradients", "q, ponder", "text, moe", "text, goe", "micro-batches")
LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "fsdp": (2, {"data": "fsdp"}, ("moe", "scan experts", "q, ponder", "text, goe")),
    "experts": (2, {"experts": 2}, ("goe", "shared gradients", "text, moe")),
    "experts in pairs": (4, {"data": "fsdp", "experts": 2}, ("all terms", "moe")),
}
if REPETITIONS:
    LAYOUTS = {
        "fsdp": (2, {"data": "fsdp"}, ("dense", "looped", "lstm", "goe_scan", "scan experts", *CUT)),
        "experts": (2, {"experts": 2}, CUT),
        "fsdp and experts": (2, {"data": "fsdp", "experts": 2}, CUT),
        "fsdp of four": (4, {"data": "fsdp"}, CUT),
        "experts in four": (4, {"experts": 4}, CUT),
        "experts in pairs": (4, {"data": "fsdp", "experts": 2}, CUT),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_give_the_numbers_of_one_process(name: str, tmp_path: Path) -> None:
    size, layout, cases = LAYOUTS[name]
    found = in_a_group(
        size,
        tmp_path,
        lambda group: [trained(CASES[case], tmp_path / str(group.rank) / case, group) for case in cases],
        ParallelParams.model_validate(layout),
    )
    for number, case in enumerate(cases):
        all_close(found[0][number], trained(CASES[case], tmp_path / "alone" / case))
        for other in found[1:]:
            assert all(torch.equal(other[number][0][key], tensor) for key, tensor in found[0][number][0].items()), case


class Counting:
    """Counts the batches that a model computes in evaluation mode."""

    def __init__(self, model: EvaluableModel) -> None:
        self.number = 0
        run = model.run

        def counted(batch: Any) -> Any:
            self.number += 1
            return run(batch)

        model.run = counted  # type: ignore[method-assign]


class KeepsMore(MODELS_MAP["dense"]):  # type: ignore[misc]
    """A user's model that sums something itself: processes cannot know what one of them has not seen."""

    def start_recording(self) -> None:
        self.seen = 0

    def run(self, batch: Any) -> Any:
        if not self.training:
            self.seen += len(batch.labels)
        return super().run(batch)

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return {"seen": self.seen}


class Draws(MODELS_MAP["dense"]):  # type: ignore[misc]
    """A user's model that draws random numbers in evaluation mode."""

    def run(self, batch: Any) -> Any:
        found = super().run(batch)
        return Outcome(found.outputs + torch.randn_like(found.outputs))


def exact(value: Any) -> Any:
    """The value with arrays as lists, so that == compares it."""
    if isinstance(value, dict):
        return {name: exact(one) for name, one in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def evaluated(config: dict[str, Any], batch_size: int, group: Any) -> tuple[dict[str, Any], int]:
    """All that an evaluation of untrained weights leaves, and how many batches this process computed."""
    checked = config_from_dict(config)
    runtime, data, model = prepare(checked)
    runtime.seed(3, "evaluation")
    counting = Counting(model)
    task, batches = task_of(checked.task, data), data.validation.batches(batch_size)
    found = _evaluated(model, batches, data, task, runtime, group)
    left = dict(vars(found)) | {"metrics": model.get_model_specific_metrics(), "draw": torch.rand(1).item()}
    recorder = model.recorder()
    if recorder is not None:
        left |= {name: getattr(recorder, name)() for name in ("paths", "expert_shares", "probabilities", "values")}
        left |= {"strengths": recorder.strengths(), "decisions": recorder.decisions_per_step()}
        if recorder.is_about_tokens():
            left |= {f"tokens {n}": [list(a) for a in recorder.token_choices(n)] for n in range(recorder.num_steps)}
    return exact(left), counting.number


EVALUATED: dict[str, dict[str, Any]] = {
    name: CASES[name]
    for name in ("dense", "moe", "goe", "q, ponder", "goe_scan", "random routes", "text, moe", "text, goe_original")
}
EVALUATED["confidence"] = settings("goe_original", halt="confidence")


@pytest.mark.parametrize(("size", "batch_size"), [(2, 5), (3, 2), (4, 100)])
def test_an_evaluation_is_shared_and_leaves_what_that_of_one_process_leaves(
    size: int, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven shares, several exchanges, and one batch for four processes."""
    monkeypatch.setattr(record, "MAX_TOKENS", 20)  # so that the recorder thins out its tokens
    found = in_a_group(
        size, tmp_path, lambda group: {name: evaluated(one, batch_size, group) for name, one in EVALUATED.items()}
    )
    for name, config in EVALUATED.items():
        alone, number = evaluated(config, batch_size, OneProcess())
        for rank, member in enumerate(found):
            assert member[name] == (alone, len(range(rank, number, size))), (name, rank)


@pytest.mark.parametrize(("model", "computed"), [(KeepsMore, 1), (Draws, 1.5)])
def test_an_evaluation_that_cannot_be_shared_is_done_by_each_process(
    model: type[EvaluableModel], computed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws show only when half of the batches are done."""
    monkeypatch.setitem(MODELS_MAP, "mine", model)
    config = settings("mine")
    alone, number = evaluated(config, 2, OneProcess())
    for member in in_a_group(2, tmp_path, lambda group: evaluated(config, 2, group)):
        assert member == (alone, computed * number)


def test_an_epoch_with_dropout_is_repeated_exactly(tmp_path: Path) -> None:
    """Dropout draws other numbers in each process, and routing draws the same ones."""
    config = settings("goe_original", dropout=0.3, router_mode="st", router_input="state")

    def twice(group: Processes) -> list[Trained]:
        return [trained(config, tmp_path / f"{group.rank}{again}", group) for again in "ab"]

    first, second = in_a_group(2, tmp_path, twice)
    for one, other in ((first[0], first[1]), (first[0], second[0])):
        assert all(torch.equal(one[0][key], tensor) for key, tensor in other[0].items())
    alone = trained(config, tmp_path / "alone")
    assert any(not torch.allclose(alone[0][key], tensor, atol=1e-3) for key, tensor in first[0][0].items())


def test_statistics_and_draws_of_a_batch_do_not_depend_on_who_holds_its_rows() -> None:
    """Two parts by hand: their values are those of the whole batch, and their gradients add up to its gradient."""
    rows_BD = torch.randn(5, 3, requires_grad=True)
    parts = [rows_BD[0::2], rows_BD[1::2]]

    def statistic(part_BD: torch.Tensor) -> torch.Tensor:
        mean = collective.batch_mean(part_BD.mean(0), len(part_BD))
        total = collective.batch_sum(part_BD.sum(0))
        return (mean.square() * total).sum()

    (expected,) = torch.autograd.grad(statistic(rows_BD), rows_BD)
    torch.manual_seed(3)
    drawn_B = collective.drawn(rows_BD[:, 0], torch.Tensor.uniform_)
    gradients, values, draws = [], [], []
    for rank in range(2):

        def sum_of(own: torch.Tensor) -> torch.Tensor:
            """What the other process would add: only the two calls of `statistic` ask."""
            if own.numel() == 4:
                return torch.cat([rows_BD.detach().sum(0), torch.tensor([5.0])])
            return rows_BD.detach().sum(0)

        part = collective.Part(2, 5, slice(rank, None, 2), sum_of, contextlib.nullcontext)
        with collective.part_of_batch(part):
            value = statistic(parts[rank])
            torch.manual_seed(3)
            draws.append(collective.drawn(parts[rank][:, 0], torch.Tensor.uniform_))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, rows_BD)[0])
    torch.testing.assert_close(torch.stack(values), statistic(rows_BD).detach().expand(2))
    torch.testing.assert_close(sum(gradients), expected)
    assert torch.equal(drawn_B[0::2], draws[0]) and torch.equal(drawn_B[1::2], draws[1])


@pytest.mark.parametrize(("name", "option"), [("goe", "max_path_len"), ("moe", "num_layers")])
def test_a_deeper_model_exchanges_its_statistics_as_seldom(
    name: str, option: str, build_model: Callable[..., EvaluableModel]
) -> None:
    """Each exchange inside the forward pass is a place where the faster process waits."""
    counts = []
    for depth in (2, 4):
        exchanged: list[torch.Tensor] = []

        def sum_of(own: torch.Tensor, seen: list[torch.Tensor] = exchanged) -> torch.Tensor:
            seen.append(own)
            return own

        model = build_model(name, **{option: depth}).train()
        with collective.part_of_batch(collective.Part(2, 8, slice(0, None, 2), sum_of, contextlib.nullcontext)):
            model(torch.randint(1, 9, (4, 6)))
            assert model.auxiliary_losses()
        counts.append(len(exchanged))
    assert counts[0] == counts[1] <= 2


# ------------------------------------------------------------------------------------------------- whole commands


@pytest.fixture(name="port")
def _port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of torchrun, but for rank and size."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GOE_DB", raising=False)


def started(folder: Path, *words: str, size: int = 2) -> list[Any]:
    """The command in so many forked processes, each in a folder of its own, as on machines that share no files."""

    def body(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        own = folder / f"machine{rank}"
        own.mkdir(exist_ok=True)
        os.chdir(own)
        ended = command(main.cli, "run", "--json_config_path", str(folder / "config.json"), *words)
        (own / "ended.json").write_text(json.dumps([ended.code, ended.out, ended.err]))

    members = [multiprocessing.get_context("fork").Process(target=body, args=(rank,)) for rank in range(size)]
    for member in members:
        member.start()
    return members


def ends(folder: Path, members: list[Any]) -> list[Ended]:
    for member in members:
        member.join(SECONDS)
    assert all(member.exitcode is not None for member in members), "a process hangs"
    return [Ended(*json.loads((folder / f"machine{rank}" / "ended.json").read_text())) for rank in range(len(members))]


LONG: dict[str, Any] = {
    "model_type": "goe_original",
    "epochs": 3,
    "batch_size": 13,
    "dataset_params": {"num_samples": 180, "seq_len": 6},
    "model_params": {"dropout": 0.1, "router_mode": "st"},
    "training_params": {"log_every": 5},
}


def stored(folder: Path) -> tuple[dict[str, Any], list[tuple[int, str, float]]]:
    """Metrics and history of the only run in a folder."""
    with results(folder) as store:
        (row,) = store.experiments()
        assert row["status"] == "finished"
        metrics = repeatable(store.metrics(row["experiment_id"]))
    return metrics, history(folder, row["experiment_id"])


def test_a_command_of_two_processes_stores_one_run(tmp_path: Path, port: None) -> None:
    path = write_config(tmp_path, model_type="moe", model_params={"dropout": 0.0})
    first, second = ends(tmp_path, started(tmp_path))
    assert first.code == second.code == 0, first.err + second.err
    assert "finished" in first.out
    assert second.out + second.err == ""
    assert list((tmp_path / "machine1").iterdir()) == [tmp_path / "machine1" / "ended.json"]
    metrics, _ = stored(tmp_path / "machine0")
    alone = run_in(tmp_path, config_from_dict(json.loads(path.read_text()))).metrics
    assert metrics["final_val_f1"] == alone["final_val_f1"]
    assert metrics["final_val_loss"] == pytest.approx(alone["final_val_loss"], abs=1e-4)
    again, _ = ends(tmp_path, started(tmp_path, "--resume"))  # it is finished: nobody trains, nobody waits
    assert again.code == 0
    assert stored(tmp_path / "machine0")[0] == metrics


def until_a_checkpoint(folder: Path) -> None:
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit and not list(folder.glob("machine0/runs/*/checkpoint.safetensors")):
        time.sleep(0.01)


def test_processes_that_are_killed_go_on_exactly(tmp_path: Path, port: None) -> None:
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, **LONG)
    ends(tmp_path / "undisturbed", started(tmp_path / "undisturbed"))
    expected = stored(tmp_path / "undisturbed" / "machine0")
    folder = tmp_path / "disturbed"
    for _ in range(max(1, REPETITIONS // 5)):
        members = started(folder, "--resume")
        until_a_checkpoint(folder)
        os.kill(members[1].pid, signal.SIGKILL)
        for member in members:
            member.join(SECONDS)
        assert members[0].exitcode, "the first process hangs, or has not noticed"
        first, _ = ends(folder, started(folder, "--resume"))
        assert first.code == 0, first.err
        assert stored(folder / "machine0") == expected
        shutil.rmtree(folder / "machine0")


@pytest.mark.parametrize("layout", [{}, {"data": "fsdp", "experts": 2}])
@pytest.mark.parametrize("size", [1, 4] if REPETITIONS else [1])
def test_a_signal_to_one_stops_all_and_the_checkpoint_fits_any_number(
    size: int, layout: dict[str, Any], tmp_path: Path, port: None
) -> None:
    changes = {"model_params": {"dropout": 0.0}, "optimizer_params": {"name": "sgd", "lr": 0.05}}
    training = {"training_params": {**LONG["training_params"], "parallel": layout}}
    path = write_config(tmp_path, **LONG | changes | training)
    members = started(tmp_path)
    until_a_checkpoint(tmp_path)
    os.kill(members[1].pid, signal.SIGTERM)
    assert ends(tmp_path, members)[0].code == 128 + signal.SIGTERM
    assert ends(tmp_path, started(tmp_path, "--resume", size=size))[0].code == 0
    metrics, _ = stored(tmp_path / "machine0")
    expected = run_in(tmp_path, config_from_dict(json.loads(path.read_text()))).metrics
    assert metrics["final_val_loss"] == pytest.approx(expected["final_val_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--json_config_path", "config.json", "--seeds", "0-1"), "--seeds: torchrun started 2 processes"),
        (("tune", "--dataset_name", "parity"), "a study: torchrun started 2 processes"),
        (("compare", "parity"), "a comparison: torchrun started 2 processes"),
    ],
)
def test_several_processes_train_one_run_and_nothing_else(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = command(main.cli, *words)
    assert ended.code == 2
    assert message in ended.err


def test_options_that_are_not_tried_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    cut = {"data": "fsdp", "experts": 2}
    for options, message in (
        ({"compile": True}, "compile: is not tried"),
        ({"device": "cuda:1"}, "device: several"),
        ({"parallel": {"experts": 3}}, "parallel.experts: 3 does not divide the 2 processes"),
        ({"ema_decay": 0.9, "parallel": cut}, "ema_decay: a moving average needs whole weights"),
    ):
        path = write_config(tmp_path, training_params=options)
        ended = command(main.cli, "run", "--json_config_path", path)
        assert ended.code == 2
        assert message in ended.err


SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
SHARDED = {"data": "fsdp", "experts": 2, "checkpoint": "sharded"}


@pytest.mark.parametrize("sizes", [(2, 1), (4, 2), (1, 4)] if REPETITIONS else [(2, 4)])
def test_slices_in_files_fit_any_number_of_processes(sizes: tuple[int, int], tmp_path: Path) -> None:
    """A training of which the first half is done by some processes, and the second by others."""
    config = settings("goe_original") | {"optimizer_params": SGD}
    half = {**config["training_params"], "max_steps": STEPS // 2, "checkpoint_every": STEPS // 2}
    layout = ParallelParams.model_validate(SHARDED)
    folder = tmp_path / "shared"
    for number, (size, options) in enumerate(zip(sizes, (half, config["training_params"]), strict=True)):
        changed = config | {"training_params": options}

        def work(group: Processes, changed: dict[str, Any] = changed) -> Trained:
            return trained(changed, folder if group.is_main else tmp_path / f"own.{group.rank}", group)

        if size == 1:
            found = trained(changed, folder)
        else:
            found = in_a_group(size, tmp_path / str(number), work, layout)[0]
            written = sorted(file.name for file in (folder / "checkpoint.slices").iterdir())
            assert {f"{options['max_steps']}.{rank}-of-{size}.safetensors" for rank in range(size)} <= set(written)
    alone = trained(config, tmp_path / "alone")
    for name, tensor in alone[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_slices_that_are_damaged_or_missing_are_named(tmp_path: Path) -> None:
    config = settings("moe") | {"optimizer_params": SGD}
    config["training_params"] = {**config["training_params"], "checkpoint_every": STEPS // 2}
    folder, layout = tmp_path / "shared", ParallelParams.model_validate(SHARDED)
    in_a_group(2, tmp_path, lambda group: trained(config, tmp_path / "shared", group), layout)
    whole, _ = load_checkpoint(folder / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for name, tensor in whole.items() if tensor.is_floating_point())
    newest, before = (folder / "checkpoint.slices" / f"{step}.1-of-2.safetensors" for step in (STEPS, STEPS // 2))
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    _, values = load_checkpoint(folder / "checkpoint.safetensors")  # goes on from the one before
    assert values["state"]["step"] == STEPS // 2
    before.unlink()
    with pytest.raises(ConfigError, match=before.name):
        load_checkpoint(folder / "checkpoint.safetensors")


def test_slices_need_a_folder_that_all_see(tmp_path: Path) -> None:
    def work(group: Processes) -> str:
        tell = group.tell

        def elsewhere(message: bytes) -> bytes:
            heard = tell(message)
            return heard if group.is_main or not heard.startswith(b"/") else b"/nowhere/checkpoint"

        group.tell = elsewhere  # type: ignore[method-assign]
        try:
            trained(settings("moe"), tmp_path / str(group.rank), group)
        except ConfigError as error:
            return str(error)
        return ""

    found = in_a_group(2, tmp_path, work, ParallelParams.model_validate(SHARDED))
    assert all("1 of 2 processes do not see" in text for text in found), found


def test_what_cannot_be_cut_is_said(tmp_path: Path) -> None:
    muon = settings("moe") | {"optimizer_params": {"name": "muon"}}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (settings("dense"), {"experts": 2}, "the model has no experts"),
        (settings("moe", num_experts=3), {"experts": 2}, "2 does not divide the 3 experts"),
        (CASES["scan experts"], {"experts": 2}, "num_scan_experts"),
        (muon, {"data": "fsdp"}, "muon needs them whole"),
    ]

    def work(group: Processes) -> list[str]:
        said = []
        for number, (config, layout, _) in enumerate(cases):
            group._layout = ParallelParams.model_validate(layout)
            with pytest.raises(ConfigError) as caught:
                trained(config, tmp_path / f"{group.rank}.{number}", group)
            said.append(str(caught.value))
        return said

    for said in in_a_group(2, tmp_path, work):
        for text, (_, _, message) in zip(said, cases, strict=True):
            assert message in text and text.startswith("training_params.parallel"), text


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("0", "0"), ("-1", "2"), (None, "2")])
def test_nonsense_in_the_environment_is_named(rank: str | None, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        rank_and_size()


def test_one_process_imports_nothing_for_several() -> None:
    program = (
        "import sys; from research_eval.training import fit; from research_eval import experiment; "
        "print('research_eval.training.processes' in sys.modules)"
    )
    assert python("-c", program, folder=ROOT).out == "False\n"

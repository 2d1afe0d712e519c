"""The files in benchmarks/ run at small sizes, and what they compare is the same mathematics.

B batch  L length  D width
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, benchmark, executed_with, python
from torch.nn import functional as F

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


naive_goe, timing = benchmark("naive_goe"), benchmark("timing")
needs_transformers = pytest.mark.skipif(
    not timing.installed("transformers"), reason="the peers need requirements-dev.txt"
)


@settings(max_examples=20, deadline=None)
@given(
    num_experts=st.integers(1, 5),
    steps=st.integers(1, 4),
    layers=st.integers(1, 2),
    length=st.integers(1, 7),
    samples=st.integers(1, 9),
    padded=st.booleans(),
    kernels=st.sampled_from(["auto", "plain", "grouped"]),
)
def test_goe_original_and_the_naive_loop_are_the_same_function(
    num_experts: int, steps: int, layers: int, length: int, samples: int, padded: bool, kernels: Any
) -> None:
    model = naive_goe.goe_original(16, 24, num_experts, steps, num_heads=2, expert_layers=layers)
    batch = naive_goe.padded_batch(samples, length, padded)
    with executed_with(model, kernels):
        found = naive_goe.check(model, *batch, torch.arange(samples) % 4)
    assert set(found) == {"logits", "loss", "gradients", "logits in evaluation"}


def test_the_naive_loop_with_torchs_attention_is_the_same_loop() -> None:
    model = naive_goe.goe_original(16, 24, 3, 4, num_heads=2)
    ids_BL, keep_BL = naive_goe.padded_batch(8, 6, padded=True)
    matmul, sdpa = (naive_goe.NaiveGoE(model, attend) for attend in ("matmul", "sdpa"))
    torch.testing.assert_close(matmul(ids_BL, keep_BL), sdpa(ids_BL, keep_BL), rtol=1e-5, atol=1e-5)


def test_both_balance_their_experts_alike() -> None:
    """Ten training steps that move weights, statistics and biases: the paths stay the same."""
    model = naive_goe.goe_original(16, 24, 4, 3, num_heads=2).train()
    naive = naive_goe.NaiveGoE(model).train()
    ids_BL, keep_BL = naive_goe.padded_batch(12, 6, padded=True)
    labels_B = torch.arange(12) % 4
    for _ in range(10):
        losses = []
        for module in (model, naive):
            logits_BC = module(ids_BL, attention_mask=keep_BL)
            auxiliary = naive.auxiliary_loss if module is naive else model.get_auxiliary_loss()
            losses.append(F.cross_entropy(logits_BC, labels_B) + auxiliary)
            losses[-1].backward()
            torch.optim.SGD(module.parameters(), lr=0.1).step()
            module.zero_grad()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
        model.after_step(0.0)
        naive.after_step()
    torch.testing.assert_close(model.balance.bias, naive.balance_bias)
    assert model.balance.bias.any()


@pytest.mark.parametrize(("padded", "share"), [(False, 1.0), (True, 0.5)])
def test_batches_are_full_or_half_empty(padded: bool, share: float) -> None:
    ids_BL, keep_BL = naive_goe.padded_batch(400, 32, padded)
    assert float(keep_BL.float().mean()) == pytest.approx(share, abs=0.03)
    assert torch.equal(ids_BL != 0, keep_BL)


def test_ratios_are_taken_within_a_round() -> None:
    """A slow second round slows both: the ratio of the medians would be another."""
    rounds = timing.Rounds({"ours": [1.0, 10.0, 2.0], "peer": [3.0, 20.0, 2.0]})
    assert rounds.faster("ours", "peer") == (2.0, 1.0, 3.0)
    assert rounds.median("ours") == 2.0


def test_contestants_take_turns() -> None:
    order: list[str] = []
    chosen = timing.Settings(seconds=0.0)

    def contestant(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            start = chosen.clock()
            while chosen.clock() < start + timing.MIN_CALL:
                pass

        return run

    rounds = timing.measure({name: contestant(name) for name in "ab"}, 1e-9, chosen)
    warm_up = 4
    assert order[warm_up:] == ["a", "b", "b", "a", "a", "b"][: len(order) - warm_up]
    assert all(seconds >= timing.MIN_CALL for times in rounds.seconds.values() for seconds in times)


@needs_transformers
@pytest.mark.parametrize("sizes", [(16, 32, 4, 2, 8), (8, 16, 5, 2, 8), (16, 8, 3, 3, 8)])
def test_transformers_experts_compute_what_ours_do(sizes: tuple[int, ...]) -> None:
    benchmark("peers").same_layers(sizes)


@needs_transformers
def test_peers_have_about_as_many_weights() -> None:
    models = benchmark("peer_models")
    shape = models.Shape(64, 2, 32, 4, 100)
    sizes = {
        make.__name__: sum(
            p.numel() for name, p in make(shape).named_parameters() if "pos" not in name and "wpe" not in name
        )
        for make in (models.ours, models.gpt2, models.bert)
    }
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    mixtures = models.Shape(64, 2, 32, 4, 100, 8, 2)
    ours, peer = (
        sum(p.numel() for p in model.parameters())
        for model in (models.ours_moe(mixtures, 192), models.mixture("Mixtral", mixtures, 192))
    )
    assert 0.95 < peer / ours < 1.01


def test_an_exponent_is_the_slope_in_logarithms() -> None:
    sizes = [1, 2, 4, 8]
    assert benchmark("scaling").exponent(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_plain_loops_make_what_the_tasks_make() -> None:
    data = benchmark("data_speed")
    parity = importlib.import_module("research_eval.datasets.parity")
    addition = importlib.import_module("research_eval.datasets.addition")
    for sample in data.parity_loop(50):
        assert parity.solve(sample["input_ids"]) == sample["label"]
    for sample in data.addition_loop(50):
        assert addition.solve(sample["input_ids"], base=10) == sample["label"]


def test_the_peak_of_a_step_is_what_it_holds_at_once() -> None:
    memory = benchmark("memory")

    def step() -> None:
        first = torch.empty(2**20)  # 4 MiB
        del first
        second, third = torch.empty(2**20), torch.empty(2**20)
        del second, third

    assert memory.peak_of_tensors(step) == 2 * 2**22


Answer = Callable[..., dict[str, dict[str, list[dict[str, Any]]]]]


@pytest.fixture(name="answer")
def _answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answer:
    """answer(file, *flags): the tables by question, at small sizes."""

    def answer(file: str, *flags: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
        common = ["--tiny", "--seconds", "0", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [file, *common, *flags])
        benchmark(file).main()
        kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
        return {each["question"]: each["tables"] for each in kept}

    return answer


def test_the_floors_are_replays_of_the_step(answer: Answer) -> None:
    floors = benchmark("floors")
    shape = (16, 32, 4, 2, 6, 4)
    model, batch = floors.model_of(shape), floors.batch_of(shape, False)
    with floors.Recorded() as recorded:
        floors.step_of(model, batch, train=False)()
    counted = sum(2 * math.prod(args[-2].shape) * args[-1].shape[-1] for _, args, _ in recorded.products)
    attention = 4.0 * 6**2 * 16 * 2 * 2 * 4  # two blocks at two steps, four samples
    assert counted == pytest.approx(4 * model.get_flops_per_sample(6) - attention, rel=0.01)
    assert len(recorded.attention) >= 4
    steps, shares, spare, predicting = answer("floors")["floors"].values()
    for row in shares:
        found = {name: value for name, value in row.items() if name.endswith(", %")}
        assert sum(found.values()) == pytest.approx(100, abs=5), "each event has one kind"
        assert min(found["products, %"], found["attention, %"], found["norms, %"]) > 0
    assert {floors.kind_of(name) for name in ("aten::mm", "aten::addmm_", "aten::bmm")} == {"products"}
    assert {floors.kind_of(name) for name in ("aten::view", "SlicedLinear", "add")} == {"calls"}
    assert {row["what"] for row in steps} == {"train", "infer"}
    assert all(row["rounds"] >= timing.MIN_ROUNDS for row in steps)
    assert {"loop/P", "loop/PA", "ours/P", "ours/PA"} <= set(steps[0])
    assert spare[0]["in vain"] > 0
    assert [row["what"] for row in predicting] == ["naive loop", "load(...).predict", "goe predict"]


def test_both_ways_along_the_sequence_are_measured(answer: Answer) -> None:
    ((row,),) = answer("scan_speed")["scan"].values()
    assert row["B M K^3"] == row["B"] * row["M"] * row["K"] ** 3
    assert all(row[f"{picks}, {place}"][0] > 0 for picks in ("numbers", "weights") for place in ("last", "every place"))


@needs_transformers
@pytest.mark.parametrize(
    ("question", "columns"),
    [
        ("dense", {"x GPT-2 (erf-GELU, causal)", "x BERT", "x nn.TransformerEncoderLayer"}),
        ("dense_dropout", {"x GPT-2 (erf-GELU, causal)", "x BERT", "x nn.TransformerEncoderLayer"}),
        ("bf16", {"x fp32", "x naive loop fp32"}),
        ("moe", {"x transformers grouped_mm", "x transformers eager", "x Mixtral grouped_mm"}),
        ("moe_lm", {"x Mixtral grouped_mm", "x OLMoE grouped_mm"}),
        ("goe", {"x naive loop", "x naive loop with SDPA", "time over floor"}),
        ("goe_infer", {"x naive loop", "x naive loop with SDPA", "time over floor"}),
        ("goe_dropout", {"x naive loop", "x naive loop with SDPA", "time over floor"}),
    ],
)
def test_every_peer_is_measured(
    question: str, columns: set[str], answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    ((title, rows),) = answer("peers", "--question", question)[question].items()
    *measured, gpu = rows
    assert f"{title}\n\n| {' | '.join(rows[0])} |" in capsys.readouterr().out
    assert set(gpu.values()) == {"on a GPU", timing.NOT_MEASURED}
    for row in measured:
        assert columns <= row.keys() and timing.NOT_MEASURED not in row.values()
        assert all(smallest > 0 for column in columns for _, smallest, _ in [row[column] or (1, 1, 1)])


def test_scaling_has_a_curve_for_every_size_and_a_picture(answer: Answer, tmp_path: Path) -> None:
    curves, idle = answer("scaling", "--picture", str(tmp_path / "scaling.png"))["scaling"].values()
    assert [row["cost against"] for row in curves] == ["experts", "path length", "sequence length", "batch", "width"]
    assert all(len(row["sizes"]) == len(row["ms per step"]) for row in curves)
    assert [row["paths"] for row in idle] == ["the same paths", "paths through all"]
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_eight_seeds_are_measured_beside_one(answer: Answer) -> None:
    ((row,),) = answer("seeds")["seeds"].values()
    assert row["ratio"][0] > 0 and row["8 seeds, s"] > 0


def test_idle_experts_are_on_no_path() -> None:
    peers = benchmark("peers")
    model = peers.goe_model((16, 32, 4, 3, 6, 64), 0.0).train()
    batch = naive_goe.padded_batch(64, 6, False)
    model(*batch)
    assert model.balance.counts[:, 2:].any()
    model.after_step(0.5)
    peers.idle_behind(model, 2)
    model(*batch)
    assert model.balance.counts[:, :2].any() and not model.balance.counts[:, 2:].any()


def test_data_is_measured(answer: Answer) -> None:
    generation, batches = answer("data_speed")["data"].values()
    assert [row["what"] for row in generation] == ["parity, 16 tokens", "addition, 3 digits"]
    assert all(row["Batches.take, us"] > 0 for row in batches)


def test_the_first_step_of_the_quickstart_is_seen(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    startup = benchmark("startup")
    chosen = ["import research_eval", "quickstart, to the end of the first step"]
    monkeypatch.setattr(startup, "COMMANDS", {name: startup.COMMANDS[name] for name in chosen})
    (rows,) = answer("startup")["startup"].values()
    assert [row["what"] for row in rows] == chosen
    assert rows[0]["wall s"] < rows[1]["wall s"]


def test_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    flags = ["--tiny", "--output", tmp_path, "--compared", "goe_full", "--compared", "loss"]
    ended = python(BENCHMARKS / "memory.py", *flags, folder=tmp_path, fresh=True)
    assert ended.code == 0, ended.err
    steps, loss = json.loads((tmp_path / "memory_cpu_1.json").read_text())["tables"].values()
    assert [row["contestant"] for row in steps[:3]] == ["ours", "naive loop", "naive loop with SDPA"]
    assert all(row["tensors, MiB"] > 0 for row in steps)
    assert loss[1]["copies of the logits beside them"] >= 1  # torch's makes the gradient, at least


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("file", ["peers", "scaling", "memory"])
def test_without_a_gpu_the_tables_say_so(file: str, answer: Answer) -> None:
    for tables in answer(file, "--device", "cuda").values():
        for rows in tables.values():
            assert all(timing.NOT_MEASURED in row.values() for row in rows)

"""Fair comparisons: matching, tuning, verdicts, the whole command, its certificate and what stops it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from research_eval.comparing import whole
from research_eval.comparing.match import CANDIDATES, DEPTH_OPTIONS, Match, _formula, _timed, cost_of, match
from research_eval.comparing.protocol import Place, Plan, compare
from research_eval.comparing.sizes import Coarse, Fine, Sizes, around, nearest
from research_eval.comparing.speeds import Bracket, Speed, compare_speeds
from research_eval.comparing.tuning import RATE, Arm, Changes, Trial, alternatives, lengthened, rates_around, tune
from research_eval.comparing.verdicts import verdicts
from research_eval.config.sections import ExperimentConfig
from research_eval.datasets.providers import load_splits
from research_eval.datasets.token_data import DataSplits
from research_eval.db_utils import DB_FILE, Store
from research_eval.experiment import Result
from research_eval.main import cli
from tests.support import command, small_config, write_config

ROUTED = ("moe", "goe", "goe_original")
MATCHED = ("dense", "looped", "lstm", *ROUTED)


def data_of(config: ExperimentConfig) -> DataSplits:
    return load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)


# ------------------------------------------------------------------------------------------------------------- matching


@given(width=st.integers(1, 40), target=st.floats(10, 1e5), offset=st.integers(0, 50), slope=st.floats(0.5, 30))
def test_the_search_finds_the_nearest_whole_number(width: int, target: float, offset: int, slope: float) -> None:
    """Against a look at every value."""

    def cost(sizes: Sizes) -> float:
        return offset + slope * sizes["n"] * sizes["width"]

    found = nearest(cost, lambda sizes: Fine("n", 1, 300), [Coarse("width", [width])], target, tol=0.0)
    best = min(range(1, 301), key=lambda n: abs(cost({"n": n, "width": width}) / target - 1))
    assert found.error(target) == pytest.approx(abs(cost({"n": best, "width": width}) / target - 1))


def test_the_search_keeps_the_first_coarse_size_that_will_do() -> None:
    def cost(sizes: Sizes) -> float | None:
        return None if sizes["width"] == 8 else sizes["n"] * sizes["width"]

    widths = Coarse("width", [8, 100, 10])  # 8 cannot be built, and 100 has no whole number near 250
    found = nearest(cost, lambda sizes: Fine("n", 1, 100), [widths], 250, tol=0.01)
    assert found == ({"width": 10, "n": 25}, 250)
    with pytest.raises(ValueError, match="no model"):
        nearest(lambda sizes: None, lambda sizes: Fine("n", 1, 100), [widths], 250, tol=0.01)


def test_widths_around_a_width() -> None:
    assert around(16, 8, 2) == [16, 24, 8, 32]


def random_base(seed: int) -> ExperimentConfig:
    """A config as users write them."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4]))
    name = str(rng.choice(["parity", "majority", "tables"]))
    return small_config(
        model_type=str(rng.choice(["dense", "moe", "goe_original"])),
        dataset_name=name,
        dataset_params={"num_samples": 200} | ({} if name == "tables" else {"seq_len": int(rng.integers(6, 24))}),
        model_params={"embed_dim": heads * 2 * int(rng.integers(4, 17)), "num_heads": heads},
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("axis", ["total_params", "active_params"])
def test_every_model_can_be_matched_in_parameters(axis: str, seed: int) -> None:
    base = random_base(seed)
    data = data_of(base)
    target = cost_of(base, axis, data)
    for model_type in MATCHED:
        found = match(base, model_type, axis, 0.02, data)
        assert found.is_matched, f"{model_type}: {found.ratio} with {found.sizes}"
        assert found.target == target
        assert cost_of(found.config, axis, data) == found.cost  # the checked config, and not the one of the search
        assert found.config.dataset_params == base.dataset_params


@pytest.mark.parametrize("seed", range(int(os.environ.get("GOE_REPETITIONS", "2"))))
def test_every_model_can_be_matched_in_executed_flops(seed: int) -> None:
    base = random_base(seed)
    data = data_of(base)
    for model_type in MATCHED:
        found = match(base, model_type, "flops", 0.02, data)
        assert found.is_matched, f"{model_type}: {found.ratio} with {found.sizes}"
        assert cost_of(found.config, "flops", data) == pytest.approx(found.cost)


def test_a_model_that_seems_as_fast_is_not_said_to_have_no_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The median is within the tolerance, and its interval is not."""
    monkeypatch.chdir(tmp_path)
    near = Match(small_config(), "latency", 1.009, 1.0, 0.02, {}, Speed(1.009, 0.999, 1.0245, 1.0))
    monkeypatch.setattr("research_eval.comparing.match.match", lambda *_: near)
    ended = command(cli, "match", write_config(tmp_path), "--axis", "latency", "--models", "dense")
    assert ended.code == 1
    assert "takes 0.999 to 1.024 times as long" in ended.err and "no sizes" not in ended.err


class FakeTimed:
    """A model whose time follows from its FLOPs and its number of blocks, with noise: seldom, and then much, slower."""

    def __init__(self, seconds: float, rng: np.random.Generator, noise: float = 0.05, disturbed: float = 0.05) -> None:
        self.seconds, self.batches, self._rng, self._noise, self._disturbed = seconds, [None], rng, noise, disturbed

    def repetition(self) -> list[float]:
        spike = 2.0 if self._rng.random() < self._disturbed else 1.0
        return [self.seconds * spike * math.exp(self._rng.normal(0, self._noise))]


def fake_seconds(config: ExperimentConfig, data: DataSplits, overhead: float) -> float:
    """A block costs a fixed time, more with a router; so does a FLOP."""
    depth = next((config.model_params[name] for name in DEPTH_OPTIONS if name in config.model_params), 2)
    per_block = overhead * (1.5 if config.model_type in ROUTED else 1.0)
    return per_block * depth + 1e-9 * _formula(config, data)


def fake_clock(monkeypatch: pytest.MonkeyPatch, overhead: float, seed: int, noise: float = 0.05) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(
        "research_eval.comparing.match._timed",
        lambda config, data: FakeTimed(fake_seconds(config, data, overhead), rng, noise),
    )


@pytest.mark.parametrize("seed", range(int(os.environ.get("GOE_REPETITIONS", "2"))))
def test_every_model_can_be_matched_in_latency(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, overhead = random_base(seed), 5e-5
    fake_clock(monkeypatch, overhead, seed)
    data = data_of(base)
    for model_type in MATCHED:
        found = match(base, model_type, "latency", 0.02, data)
        true = fake_seconds(found.config, data, overhead) / fake_seconds(base, data, overhead)
        assert found.is_matched and abs(true - 1) <= 0.02, f"{model_type}: {true} {found.speed} with {found.sizes}"
        assert all(found.config.model_params[name] == value for name, value in found.sizes.items())


def test_a_model_that_is_too_slow_at_any_size_is_not_called_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_config(model_type="looped", model_params={"embed_dim": 16, "num_loops": 4})
    fake_clock(monkeypatch, 1.0, 0)  # nothing but the blocks takes time
    monkeypatch.setattr("research_eval.comparing.match.CANDIDATES", 2)
    found = match(base, "moe", "latency", 0.02, data_of(base))
    assert not found.is_matched
    assert found.sizes["num_layers"] == 3  # comes closest: a block of `moe` takes 1.5 times as long
    assert found.ratio == pytest.approx(4.5 / 4, rel=0.05)


def test_a_model_that_is_too_fast_at_any_size_gets_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_config(model_type="moe", model_params={"embed_dim": 16, "num_layers": 4})
    fake_clock(monkeypatch, 1.0, 0)  # a block of `moe` takes as long as 1.5 blocks of `dense`
    monkeypatch.setattr("research_eval.comparing.match.CANDIDATES", 2)
    found = match(base, "dense", "latency", 0.02, data_of(base))
    assert found.is_matched and found.sizes["num_layers"] == 6


def test_a_machine_that_is_too_busy_to_tell_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_clock(monkeypatch, 5e-5, 0, noise=1.0)
    ended = command(cli, "match", write_config(tmp_path), "--axis", "latency", "--models", "looped")
    assert ended.code == 1
    assert "NOT MATCHED" in ended.out
    assert "this machine is too busy to say more" in ended.err


@given(slope=st.floats(0.3, 1.0), fixed=st.floats(0.0, 0.8), start=st.floats(0.05, 20.0))
def test_the_bracket_finds_the_flops_of_a_time(slope: float, fixed: float, start: float) -> None:
    """Time = fixed + (1 - fixed) FLOPs^slope, which is 1 at 1."""
    bracket = Bracket(start)
    for _ in range(CANDIDATES):
        flops = bracket.proposals()[0]
        time = fixed + (1 - fixed) * flops**slope
        if abs(time - 1) <= 0.01:
            return
        bracket.add(flops, time)
    raise AssertionError(f"{flops} FLOPs take {time}")


@pytest.mark.parametrize(("true", "verdict"), [(1.0, "within"), (1.08, "outside"), (0.93, "outside")])
def test_speeds_are_compared_until_it_is_certain(true: float, verdict: str) -> None:
    right = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        speed = compare_speeds(FakeTimed(1.0, rng), FakeTimed(true, rng), 0.02)  # type: ignore[arg-type]
        right += speed.is_within(0.02) if verdict == "within" else speed.is_outside(0.02)
        assert not (speed.is_outside(0.02) if verdict == "within" else speed.is_within(0.02))
    assert right == 40


def test_a_pass_that_was_disturbed_does_not_count() -> None:
    """Other programs slow half of the passes of the second model, and nearly none of the first."""
    rng = np.random.default_rng(0)
    speed = compare_speeds(FakeTimed(1.0, rng, 0.01), FakeTimed(1.0, rng, 0.01, 0.49), 0.02)  # type: ignore[arg-type]
    assert speed.is_within(0.02)


def test_latency_is_measured_in_turn() -> None:
    """Two equal models take the same time, whatever the machine does beside them."""
    base = small_config(model_params={"embed_dim": 32, "num_layers": 2})
    data = data_of(base)
    speed = compare_speeds(_timed(base, data), _timed(base, data), 0.5)
    assert speed.is_within(0.5) and speed.milliseconds > 0


def test_the_time_of_other_programs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_config(training_params={"device": "cpu", "num_threads": 1})
    timed = _timed(base, data_of(base))
    monkeypatch.setattr(timed.model, "run", lambda batch: time.sleep(0.05))
    assert max(timed.repetition()) < 0.025


def test_a_match_keeps_what_both_models_have() -> None:
    base = small_config(model_params={"embed_dim": 16, "num_layers": 3, "dropout": 0.25, "pool": "max"})
    data = data_of(base)
    found = match(base, "goe_original", "active_params", 0.02, data, {"num_total_experts": 2}).config.model_params
    assert {name: found[name] for name in ("dropout", "pool", "num_total_experts")} == {
        "dropout": 0.25,
        "pool": "max",
        "num_total_experts": 2,
    }
    assert found["max_path_len"] == 3
    assert match(base, "dense", "flops", 0.02, data).config == base


def test_match_writes_one_config_for_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, model_params={"embed_dim": 16})
    ended = command(cli, "match", path, "--axis", "total_params", "--models", "moe,looped", "--out", "sizes")
    assert ended.code == 0, ended.err
    written = sorted(file.name for file in Path("sizes").iterdir())
    assert [name.rpartition("_")[2] for name in written] == ["looped.json", "moe.json"]
    again = command(cli, "match", path, "--axis", "total_params", "--models", "moe", "looped", "--out", "sizes")
    assert again.code == 0, "equal files may be there"
    (tmp_path / "sizes" / written[0]).write_text("{}")
    refused = command(cli, "match", path, "--axis", "total_params", "--models", "looped", "--out", "sizes")
    assert refused.code == 2
    assert "is another file" in refused.err
    dry = command(cli, "run", "--json_config_path", tmp_path / "sizes" / written[1], "--dry_run")
    assert dry.code == 0, dry.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--axis", "flop"], "Did you mean 'flops'?"),
        (["--tol", "2"], "--tol: expected a share"),
        (["--models", "moe,"], "--models: expected names"),
        (["--models", "mou"], "mou"),
    ],
)
def test_match_refuses(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path)
    ended = command(cli, "match", path, *(["--models", "moe"] if "--models" not in words else []), *words)
    assert ended.code == 2
    assert message in ended.err
    assert not Path("matched").exists()


@pytest.mark.parametrize("tol", [0.02, 1e-3, 1e-9])
def test_a_smaller_tolerance_finds_sizes_that_are_nearer(tol: float) -> None:
    """A routed layer with one expert fewer numbers in its feed-forward layer costs exactly what a dense one costs."""
    base = small_config(model_params={"embed_dim": 64, "num_layers": 2})
    found = match(base, "moe", "flops", tol, data_of(base))
    assert found.is_matched
    assert found.cost == pytest.approx(found.target, rel=tol, abs=0)


def test_sizes_that_do_not_exist_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, model_type="moe", model_params={"embed_dim": 4, "num_heads": 2, "dim_feedforward": 1})
    ended = command(cli, "match", path, "--models", "goe_original", "--axis", "total_params")
    assert ended.code == 1
    assert "NOT MATCHED" in ended.out
    assert "were found" in ended.err


# --------------------------------------------------------------------------------------------------------------- tuning


class Landscape:
    """Stands for trainings: each arm has a best rate, and a setting may add to the score."""

    def __init__(self, best: dict[str, float], bonus: dict[str, float] | None = None) -> None:
        self.best, self.bonus = best, bonus or {}

    def __call__(self, wanted: Sequence[tuple[Arm, Changes]]) -> None:
        for arm, changes in wanted:
            value = -abs(math.log(changes[RATE] / self.best[arm.name]))
            value += sum(self.bonus.get(f"{key}={found}", 0.0) for key, found in changes.items() if key != RATE)
            arm.add(Trial(changes, value, value, ["run"]))


def arms_of(*model_types: str, lr: float = 2e-3) -> list[Arm]:
    return [Arm(name, small_config(model_type=name, optimizer_params={"lr": lr})) for name in model_types]


@pytest.mark.parametrize("num_trials", [3, 4, 8, 12])
@pytest.mark.parametrize("best", [(2e-3, 2e-3, 2e-3), (1e-5, 2e-3, 2e-3), (2e-3, 0.05, 0.5)])
def test_every_arm_has_the_same_trials(num_trials: int, best: tuple[float, ...]) -> None:
    arms = arms_of("dense", "goe_original", "lstm")
    added = tune(arms, num_trials, Landscape(dict(zip(("dense", "goe_original", "lstm"), best, strict=True))))
    assert [len(arm.trials) for arm in arms] == [num_trials + added] * 3
    first = [tuple(trial.changes[RATE] for trial in arm.trials[: num_trials - num_trials // 3 + added]) for arm in arms]
    assert num_trials < 4 or len(set(first)) == 1, "the same rates"


def test_the_grid_grows_for_all_arms_until_the_best_rate_is_inside() -> None:
    arms = arms_of("dense", "moe")
    assert tune(arms, 3, Landscape({"dense": 0.03, "moe": 2e-3})) == 2
    assert arms[0].rates == arms[1].rates == [0.0005, 0.002, 0.008, 0.032, 0.13]
    assert [arm.edge for arm in arms] == [0, 0]
    arms = arms_of("dense", "moe")
    assert tune(arms, 3, Landscape({"dense": 2e-3, "moe": 1e-6})) == 2
    assert [arm.edge for arm in arms] == [0, -1], "it is said that the best rate may be smaller"


def test_a_declared_setting_that_helps_is_kept() -> None:
    arms = arms_of("goe_original", "dense")
    key, value = alternatives(arms[0])[0]
    tune(arms, 8, Landscape({"goe_original": 2e-3, "dense": 2e-3}, {f"{key}={value}": 1.0}))
    assert arms[0].best.changes[key] == value
    assert arms[0].configured().optimizer_params.router_lr_mult == value


def test_an_arm_without_declared_settings_tries_more_rates() -> None:
    arms = arms_of("lstm", "goe_original")
    tune(arms, 12, Landscape({"lstm": 2.5e-3, "goe_original": 2e-3}))
    assert len(arms[0].rates) > len({trial.changes[RATE] for trial in arms[0].trials[:8]})


def test_a_rate_that_was_only_lucky_is_not_kept() -> None:
    """The largest rate trains well with one seed of three; the third one with all."""
    arms, scores = arms_of("goe_original", "dense"), {0.0005: [0.7] * 9, 0.002: [0.75] * 9, 0.008: [0.9, 0.5, 0.6]}

    def evaluate(wanted: Sequence[tuple[Arm, Changes]]) -> None:
        for arm, changes in wanted:
            value = scores.get(changes[RATE], [0.1])[arm.runs_of(changes)]
            arm.add(Trial(changes, value, value, ["run"]))

    tune(arms, 3, evaluate, num_confirmed=2)
    assert [arm.best.changes[RATE] for arm in arms] == [0.002] * 2
    assert {trial.changes[RATE]: len(trial.experiment_ids) for trial in arms[0].trials} == {
        **dict.fromkeys((0.0005, 0.032), 1),
        **dict.fromkeys((0.002, 0.008), 2),
    }
    assert arms[0].trials[2].value == pytest.approx(0.7)


def test_a_run_that_did_not_finish_ends_the_hopes_of_its_settings() -> None:
    good, lost = Trial({RATE: 1.0}, 0.5, 0.5, ["a", "b"]), Trial({RATE: 1.0}, -math.inf, None, ["c"])
    assert good.joined(lost) == Trial({RATE: 1.0}, -math.inf, None, ("a", "b", "c"))
    assert good.joined(Trial({RATE: 1.0}, 0.8, 0.8, ["c"])).value == pytest.approx(0.6)


def test_a_model_that_is_still_learning_makes_the_training_longer_before_more_is_tried() -> None:
    arms = arms_of("dense", "moe")

    def evaluate(wanted: Sequence[tuple[Arm, Changes]]) -> None:
        for arm, changes in wanted:
            value = -abs(math.log(changes[RATE] / 2e-3))
            arm.add(Trial(changes, value, value, ["run"], is_learning=arm.name == "moe"))

    assert tune(arms, 6, evaluate, may_lengthen=True) is None
    assert [len(arm.trials) for arm in arms] == [4, 4]
    for arm in arms:
        arm.trials = []
    assert tune(arms, 6, evaluate) is not None
    assert len(arms[0].trials) == len(arms[1].trials) > 4


def test_rates_are_spaced_evenly() -> None:
    assert rates_around(1e-3, 5) == [0.00025, 0.0005, 0.001, 0.002, 0.004]


def test_a_longer_training_is_longer_in_its_own_unit() -> None:
    assert lengthened(small_config(epochs=3), 2).epochs == 6
    given = small_config(training_params={"max_steps": 10})
    assert lengthened(given, 2).training_params.max_steps == 20


# ------------------------------------------------------------------------------------------------------------- verdicts


class Noisy:
    """Stands for trainings of equal arms, whose best rates differ: the score falls with the distance to the best one.

    Every declared setting has the same effect on all arms.
    """

    def __init__(self, rng: np.random.Generator, arms: Sequence[Arm], curvature: float, effect: float) -> None:
        self.rng, self.curvature, self.effect = rng, curvature, effect
        self.best = {arm.name: 2e-3 * 2 ** rng.uniform(-1, 1) for arm in arms}

    def quality(self, arm: Arm, changes: Changes) -> float:
        distance = math.log2(changes[RATE] / self.best[arm.name])
        return 0.7 - self.curvature * distance**2 + self.effect * (len(changes) - 1)

    def scores(self, arm: Arm, changes: Changes, count: int) -> list[float]:
        return (self.quality(arm, changes) + self.rng.normal(0, 0.02, count)).tolist()

    def __call__(self, wanted: Sequence[tuple[Arm, Changes]]) -> None:
        for arm, changes in wanted:
            (value,) = self.scores(arm, changes, 1)
            arm.add(Trial(changes, value, value, ["run"]))


@pytest.mark.parametrize("num_confirmed", [0, 2])
@pytest.mark.parametrize(
    ("curvature", "effect"), [(0.0, 0.0), (0.01, 0.0), (0.01, -0.01), (0.03, -0.03)], ids=lambda value: str(value)
)
def test_equal_arms_are_seldom_called_different(curvature: float, effect: float, num_confirmed: int) -> None:
    """500 comparisons of three equal arms, each tuned by eight noisy trials: at most 5 % make any claim."""
    rng, wrong = np.random.default_rng(0), 0
    config = small_config(model_type="goe_original", optimizer_params={"lr": 2e-3})
    for _ in range(500):
        arms = [Arm(name, config) for name in ("a", "b", "c")]
        made = Noisy(rng, arms, curvature, effect)
        tune(arms, 8, made, num_confirmed=num_confirmed)
        scores, noise = {}, {}
        for arm in arms:
            scores[arm.name] = made.scores(arm, arm.best.changes, 5)
            noise[arm.name] = float(np.std(made.scores(arm, arm.best.changes, 5), ddof=1))
        wrong += any("better" in one.text for one in verdicts(scores, noise=noise))
    assert wrong <= 0.05 * 500


def test_luck_in_the_tuning_widens_the_tests() -> None:
    scores = {"a": [0.9, 0.91, 0.92, 0.9, 0.91], "b": [0.7, 0.72, 0.69, 0.71, 0.7]}
    (exact,), (wide,) = verdicts(scores), verdicts(scores, noise={"a": 0.04, "b": 0.03})
    assert exact.difference.interval is not None and wide.difference.interval is not None
    assert exact.difference.p_value is not None and wide.difference.p_value is not None
    error = np.std(np.subtract(scores["a"], scores["b"]), ddof=1) / math.sqrt(5)
    factor = math.sqrt(error**2 + 0.35**2 * (0.04**2 + 0.03**2)) / error
    widths = [one.high - one.low for one in (exact.difference.interval, wide.difference.interval)]
    assert widths[1] == pytest.approx(factor * widths[0])
    t = exact.difference.mean / error / factor
    assert wide.difference.p_value == pytest.approx(2 * scipy.stats.t.sf(t, 4))


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_verdicts_do_not_depend_on_the_order_of_arms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(mean, 0.01, 5).tolist() for name, mean in (("a", 0.7), ("b", 0.72), ("c", 0.9))}
    texts = {frozenset((one.first, one.second)): one.text for one in verdicts(scores)}
    turned = {frozenset((one.first, one.second)): one.text for one in verdicts(dict(reversed(scores.items())))}
    assert texts == turned


def test_the_words_of_a_verdict() -> None:
    better = {"a": [0.9, 0.91, 0.92, 0.9, 0.91], "b": [0.7, 0.72, 0.69, 0.71, 0.7]}
    assert verdicts(better)[0].text == "a is better"
    assert verdicts(better, sign=-1)[0].text == "b is better"
    near = {"a": [0.9, 0.901, 0.899, 0.9, 0.9005], "b": [0.9002, 0.9, 0.9, 0.8995, 0.9]}
    assert verdicts(near, margin=0.01)[0].text == "equal within 0.01"
    open_one = {"a": [0.9, 0.7, 0.8], "b": [0.85, 0.9, 0.6]}
    assert verdicts(open_one)[0].text == "open"
    assert "common seed" in verdicts({"a": [0.9], "b": [0.8]})[0].text
    lost = {**better, "c": [0.9, math.nan, 0.9, 0.9, 0.9]}
    assert [one.text for one in verdicts(lost)] == ["a is better", "a seed did not finish", "a seed did not finish"]
    assert verdicts({"a": [1.0] * 3, "b": [1.0] * 3})[0].text.startswith("every seed")


# -------------------------------------------------------------------------------------------------------- whole command


SMALL = ("--seeds", "3", "--tuning", "3", "--max_lengthened", "0", "--set", "training_params.log_every=50")


@pytest.fixture(name="rows")
def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV of 150 rows with string labels, and its folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    rng = np.random.default_rng(0)
    good, bad = ["fine", "lovely", "superb"], ["dull", "awful", "boring"]
    lines = ["text,label"]
    for number in range(150):
        label = "good" if number % 2 else "bad"
        words = rng.choice(good if number % 2 else bad, 2).tolist() + rng.choice(list("abcdefghijkl"), 4).tolist()
        lines.append(f"{' '.join(words)} {number},{label}")
    path = tmp_path / "films.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.usefixtures("one_process")  # test_suites.py has a pool
def test_the_recipe_for_texts_has_the_options_of_the_first_model(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[ExperimentConfig] = []
    monkeypatch.setattr(whole, "compare_and_report", lambda base, *_: bases.append(base) or ([], []))
    for first in ("dense", "lstm"):
        ended = command(cli, "compare", "films.csv", "--models", f"{first},moe", "--set", "scheduler_params.name=wsd")
        assert ended.code == 0, ended.err
    assert [base.model_type for base in bases] == ["dense", "lstm"]
    assert ["bigram_buckets" in base.model_params for base in bases] == [True, False]
    assert {base.training_params.label_smoothing for base in bases} == {0.1}
    assert {base.scheduler_params.name for base in bases} == {"wsd"}, "a flag is stronger"
    Path("rows.json").write_text("\ufeff" + " " * 100 + '[{"text": "a", "label": "b"}]', encoding="utf-8")
    assert command(cli, "compare", "rows.json", "--models", "dense,moe").code == 0
    assert bases[-1].dataset_params["data_dir"] == "rows.json", "a list is no config"
    for wrong, message in (
        (["--set", "scheduler_params.name=cosine"], "--set scheduler_params.name: expected one of"),
        (["--set", "epochs=2", "--epochs", "3"], "--set: epochs is given by another flag too"),
        (["--margin", "inf"], "--margin: expected a positive number, got inf"),
        (["--max_lengthened", "-4"], "--max_lengthened: expected at least 0, got -4"),
    ):
        ended = command(cli, "compare", "films.csv", "--models", "dense,moe", *wrong)
        assert (ended.code, ended.err.startswith(message)) == (2, True), ended.err


def test_a_comparison_of_a_table_of_texts(
    rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = ["compare", "films.csv", "--models", "dense,goe_original", *SMALL, "--epochs", "2"]
    words += ["--set", "model_params.embed_dim=16", "--set", "model_params.num_heads=2"]
    first = command(cli, *words)
    assert first.code == 0, first.err
    folder = rows.parent / "comparisons" / "films"
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["contracts"]["every arm has the same number of trials"]
    assert certificate["tuning_seeds"] == [1000, 1001, 1002], "two further runs of the best rate"
    assert certificate["contracts"]["no trial scored the test split"]
    assert certificate["contracts"]["no trial had a reported seed"]
    assert certificate["contracts"]["every seed has the same data in all arms"]
    assert [arm["name"] for arm in certificate["arms"]] == ["dense", "goe_original"]
    for arm in certificate["arms"]:
        assert arm["is_matched"]
        assert {name: arm["config"]["dataset_params"][name] for name in ("test_size", "val_size")} == {
            "test_size": 0.2,
            "val_size": 0.2,
        }
        assert [cell["seed"] for cell in arm["cells"]] == [0, 1, 2]
        assert arm["config"]["scheduler_params"]["name"] == "cosine_warmup", "texts have a recipe"
        assert arm["config"]["model_params"]["bigram_buckets"] == 20_000
    assert "majority class" in first.out
    assert "TF-IDF" in first.out
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "").split("</style>")[1].replace("http://www.w3.org", "")
    with Store(DB_FILE, read_only=True) as store:
        rows_before = len(store.experiments())
        scored = [row for row in store.experiments() if "test_f1" in store.metrics(row["experiment_id"])]
    assert len(scored) == 6, "the tuning never saw the test rows"
    runs = [run for arm in certificate["arms"] for trial in arm["trials"] for run in trial["experiment_ids"]]
    assert rows_before == len(runs) + 6

    again = command(cli, *words)
    assert again.code == 0
    assert again.out == first.out, "a second call reads what is there"
    with Store(DB_FILE, read_only=True) as store:
        assert len(store.experiments()) == rows_before

    checked = command(cli, "compare", "--verify", folder / "certificate.json", "--cells", "2", "--quiet")
    assert checked.code == 0, checked.err
    assert checked.out.count("the same") == 2
    for arm in certificate["arms"]:
        for cell in arm["cells"]:
            cell["score"] += 0.5
        arm["interval"] = [5.0, 6.0]
    (folder / "other.json").write_text(json.dumps(certificate))
    refused = command(cli, "compare", "--verify", folder / "other.json", "--quiet")
    assert refused.code == 1
    assert "DOES NOT HOLD" in refused.out
    with monkeypatch.context() as patch:
        stopped = Result("id", "interrupted", {}, tmp_path_factory.mktemp("run"), exit_code=130)
        patch.setattr("research_eval.experiment.run", lambda *_, **__: stopped)
        assert command(cli, "compare", "--verify", folder / "certificate.json", "--quiet").code == 130
    cell = certificate["arms"][0]["cells"][0]
    for change, message in (
        ({**cell, "seed": "0"}, "the certificate is damaged: arms.0.cells.0.seed"),
        ({**cell, "score": None}, "no seed in it has a score"),
    ):
        certificate["arms"] = [{**certificate["arms"][0], "cells": [change]}]
        (folder / "other.json").write_text(json.dumps(certificate))
        refused = command(cli, "compare", "--verify", folder / "other.json", "--quiet")
        assert refused.code == 2 and message in refused.err, refused.err


@pytest.mark.usefixtures("one_process")
def test_a_comparison_that_was_stopped_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell exists once, wherever the first call was stopped."""
    monkeypatch.chdir(tmp_path)
    base = small_config(epochs=1)
    data, plan = data_of(base), Plan(("dense", "looped"), num_seeds=3, num_trials=3, max_lengthened=0)
    real = __import__("research_eval.studies.seeds", fromlist=["run"]).run
    done: list[str] = []

    def stops_after(count: int) -> Any:
        def run(config: ExperimentConfig, **options: Any) -> Result:
            if len(done) >= count:
                raise KeyboardInterrupt
            found: Result = real(config, **options)
            done.append(found.experiment_id)
            return found

        return run

    for count in (2, 8, 100):
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr("research_eval.studies.seeds.run", stops_after(count))
            try:
                outcome = compare(base, plan, data, Place(DB_FILE))
            except KeyboardInterrupt:
                assert count < 100
    with Store(DB_FILE, read_only=True) as store:
        rows = store.experiments()
    assert len({row["full_config_json"] for row in rows}) == len(rows)
    assert len(rows) == sum(len(trial.experiment_ids) for arm in outcome.arms for trial in arm.trials) + 6


@pytest.mark.usefixtures("one_process")
def test_a_run_that_ends_by_an_accident_stops_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not count as a bad setting, and the same call continues."""
    monkeypatch.chdir(tmp_path)
    base = small_config(epochs=1)
    data, plan = data_of(base), Plan(("dense", "looped"), num_seeds=3, num_trials=3, max_lengthened=0)
    real = __import__("research_eval.studies.seeds", fromlist=["run"]).run

    def breaks(config: ExperimentConfig, **options: Any) -> Result:
        if config.model_type == "looped" and config.optimizer_params.lr > 1e-3:
            raise OSError("the disk is full")
        found: Result = real(config, **options)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("research_eval.studies.seeds.run", breaks)
        with pytest.raises(OSError, match="the disk is full"):
            compare(base, plan, data, Place(DB_FILE))
    outcome = compare(base, plan, data, Place(DB_FILE))
    assert all(trial.score is not None for arm in outcome.arms for trial in arm.trials)


def test_controls_are_arms_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost the same, are tuned with as many trials, and keep what makes them controls."""

    def trained(configs: Sequence[ExperimentConfig], *_: Any) -> list[Result]:
        metrics = {"final_val_f1": 0.5, "test_f1": 0.5}
        return [Result(str(number), "finished", metrics, Path()) for number in range(len(configs))]

    monkeypatch.setattr("research_eval.comparing.protocol._trained", trained)
    base = small_config(model_params={"embed_dim": 32, "num_layers": 2})
    plan = Plan(("dense", "goe_original"), num_seeds=3, num_trials=12, controls=True)
    outcome = compare(base, plan, data_of(base))
    found = {arm.name: arm for arm in outcome.arms}
    assert list(found) == [
        *("dense", "dense, hashed bigrams", "dense, one wide layer", "goe_original"),
        *("goe_original, frozen router", "goe_original, random routes", "goe_original, hash of the input"),
    ]
    assert len({len(arm.trials) for arm in outcome.arms}) == 1
    for name, arm in found.items():
        assert outcome.matches[name].is_matched, f"{name}: {outcome.matches[name].ratio}"
        for trial in arm.trials:
            values = arm.configured(trial.changes).to_dict()
            for key, value in arm.fixed.items():
                section, _, option = key.partition(".")
                assert values[section][option] == value
    assert len({arm.config.experiment_name for arm in outcome.arms}) == len(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["films.csv"], "--models such as"),
        (["films.csv", "--models", "dense"], "at least two models"),
        (["film.csv", "--models", "dense,moe"], "no known task"),
        (["films.csv", "--models", "dense,moe", "--tuning", "2"], "--tuning: expected at least 3"),
        (["films.csv", "--models", "dense,moe", "--tol", "2"], "--tol: expected a share"),
        (["--verify", "films.csv"], "films.csv"),
        (["films.csv", "--models", "dense,moe", "--verify", "x.json"], "leave TASK_OR_DATA"),
    ],
)
def test_compare_refuses(words: list[str], message: str, rows: Path) -> None:
    ended = command(cli, "compare", *words)
    assert ended.code == 2
    assert message in ended.err
    assert sorted(path.name for path in rows.parent.iterdir() if path.name != ".goe_cache") == ["films.csv"]

"""New configs from past runs: they run, nobody has run them before, and they say where they come from."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MODELS, command, python, results, run_in, small_config
from torch import nn

from research_eval import experiment, suggest_configs
from research_eval.db_utils import DB_FILE, Store, canonical_json
from research_eval.errors import ConfigError
from research_eval.registry import MODELS_MAP
from research_eval.schema import ExperimentConfig, config_from_dict, load_config
from research_eval.store.tables import experiments_table
from research_eval.studies.distributions import random_pick
from research_eval.studies.novelty import rehearse
from research_eval.studies.past_runs import identity
from research_eval.studies.perturbation import perturbed, space_around
from research_eval.studies.suggestion import Request, Suggestion, suggest

SHIPPED = sorted(MODELS_MAP)
# A space of three configs.
LAYERS = {
    "model_params": {"num_layers": [1, 2, 3], "embed_dim": 8, "num_heads": 2, "dropout": 0.1}
    | {"dim_feedforward_factor": 1.0},
    "optimizer_params": {"lr": 0.001, "weight_decay": 0.01},
    "scheduler_params": {"name": "none"},
}


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / DB_FILE)) as store:
        yield store


def enter(
    store: Store,
    config: ExperimentConfig,
    value: float | None,
    status: str = "finished",
    run_type: str = "json",
    metric: str = "final_val_f1",
    stored: dict[str, Any] | None = None,
) -> str:
    """File a run as if it had been trained; its id counts the runs."""
    run_id = f"run{len(store.experiments())}"
    store.start_experiment(
        experiment_id=run_id,
        run_type=run_type,
        experiment_name=config.experiment_name,
        model_type=config.model_type,
        dataset_name=config.dataset_name,
        dataset_type=config.dataset_type,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        config=config.to_dict() if stored is None else stored,
        environment={},
    )
    if status == "finished" or value is not None:
        store.finish_experiment(run_id, {} if value is None else {metric: value})
    if status != "finished":  # also for a run with metrics, whose status no method of the store changes
        with store._engine.begin() as connection:
            changed = experiments_table.update().where(experiments_table.c.experiment_id == run_id)
            connection.execute(changed.values(status=status))
    return run_id


def ask(store: Store, **wishes: Any) -> list[Suggestion]:
    return suggest(store, Request(**{"dataset_name": "parity", "model_type": "dense", **wishes}))


def sources(found: list[Suggestion]) -> list[str]:
    """The runs that suggestions come from, each once."""
    return list(dict.fromkeys(re.findall(r"run\d+", " ".join(suggestion.source for suggestion in found))))


def applied(config: dict[str, Any], suggestion: Suggestion) -> dict[str, Any]:
    """A config with the changes that a suggestion reports."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    for name, left, right in suggestion.changes:
        *sections, key = name.split(".")
        target = copy
        for section in sections:
            target = target[section]
        assert target.get(key, "(absent)") == left
        target[key] = right
        if right == "(absent)":
            del target[key]
    return copy


# ------------------------------------------------------------------------------------------------- what comes out


def test_a_suggestion_is_a_config_with_a_name_a_source_and_what_changed(store: Store, tmp_path: Path) -> None:
    config = small_config(experiment_name="first", seed=3)
    enter(store, config, 0.9812)
    enter(store, small_config(experiment_name="second try/ü", model_params={"num_layers": 1}), 0.5)
    found = ask(store, num_variations_per_config=3)
    assert [suggestion.config.experiment_name for suggestion in found] == [
        *(f"first_var{number}" for number in (1, 2, 3)),
        *(f"second try/ü_var{number}" for number in (1, 2, 3)),
    ]
    assert found[0].source == "from run run0 (final_val_f1 0.9812)"
    for number, suggestion in enumerate(found[:3], 1):
        complete = suggestion.config.to_dict()
        digest = hashlib.sha256(canonical_json(complete).encode()).hexdigest()[:8]
        assert suggestion.file_name == f"first_var{number}_{digest}.json"
        assert json.loads(suggestion.to_json()) == complete
        assert suggestion.changes
        name = suggestion.config.experiment_name
        assert applied(config.to_dict(), suggestion) | {"experiment_name": name} == complete
        kept = ("dataset_type", "dataset_name", "dataset_params", "epochs", "batch_size", "seed", "training_params")
        assert all(complete[key] == config.to_dict()[key] for key in kept)
    assert re.fullmatch(r"second_try___[0-9a-f]{8}_var1_[0-9a-f]{8}\.json", found[3].file_name)


def test_the_same_seed_gives_the_same_files_and_another_one_others(store: Store) -> None:
    for layers, value in ((1, 0.5), (2, 0.6), (3, 0.7)):
        enter(store, small_config(model_params={"num_layers": layers}), value)
    for strategy in ("perturb", "tpe"):
        first, again, other = (
            {
                one.file_name: one.to_json()
                for one in ask(store, strategy=strategy, top_n=2, num_variations_per_config=1, seed=seed)
            }
            for seed in (0, 0, 1)
        )
        assert len(first) == 2 and first == again and not set(first) & set(other)


@pytest.mark.parametrize("model", MODELS)
def test_suggestions_of_every_model_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "draw_pictures", lambda *_: None)  # the larger part of such short runs
    monkeypatch.setattr("research_eval.runs.scores.measure_flops", lambda *_, **__: (0.0, 0.0))
    settings = {"model_type": model, "epochs": 1, "dataset_params": {"num_samples": 40, "seq_len": 4}}
    with Store(str(tmp_path / DB_FILE)) as store:
        enter(store, small_config(**settings), 0.5)
        enter(store, small_config(**settings, model_params={"num_heads": 1}), 0.6)
        found = [
            *ask(store, model_type=model, top_n=1, perturbation_magnitude=0.3),
            *ask(store, model_type=model, top_n=1, strategy="tpe"),
        ]
    assert len({identity(suggestion.config.to_dict()) for suggestion in found}) == 4
    for suggestion in found:
        assert run_in(tmp_path, suggestion.config).status == "finished"


def test_suggest_and_run_in_turns(tmp_path: Path) -> None:
    config = small_config(epochs=1, dataset_params={"num_samples": 40, "seq_len": 4})
    start = run_in(tmp_path, config).metrics["final_val_f1"]
    run_in(tmp_path, small_config(epochs=1, dataset_params={"num_samples": 40, "seq_len": 4}, seed=1))
    for turn in range(2):
        ended = command(
            suggest_configs.main,
            *("--dataset_name", "parity", "--model-type", "dense", "--db", tmp_path / DB_FILE, "--quiet"),
            *("--output-dir", tmp_path / "new", "--top_n", "1", "--strategy", "tpe" if turn else "perturb"),
        )
        assert ended.code == 0 and ended.err == ""
        for path in ended.out.split():
            assert run_in(tmp_path, load_config(path)).status == "finished"
    with results(tmp_path) as store:
        rows = store.runs("parity", ["final_val_f1"])
    assert len(rows) == 6 and len({identity(json.loads(row.config_json)) for row in rows}) == 5
    assert max(row.metrics["final_val_f1"] for row in rows) >= start


# ------------------------------------------------------------------------------------------------ which runs count


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("final_val_f1", "run1"),
        ("final_val_loss", "run0"),
        ("inference_latency_ms_batch", "run0"),
        ("param_count", "run0"),
        ("mean_path_length", "run1"),
    ],
)
def test_the_direction_of_a_metric_is_known(store: Store, metric: str, best: str) -> None:
    enter(store, small_config(model_params={"num_layers": 1}), 1.0, metric=metric)
    enter(store, small_config(model_params={"num_layers": 2}), 2.0, metric=metric)
    assert sources(ask(store, metric_name=metric, top_n=1)) == [best]


def test_the_seeds_of_a_config_are_one_template_with_their_mean(store: Store) -> None:
    lucky, steady = small_config(model_params={"num_layers": 1}), small_config(model_params={"num_layers": 2})
    operational = {"training_params": {"log_every": 7, "num_threads": 2}, "experiment_name": "watched"}
    enter(store, lucky, 1.0)
    for seed, value in enumerate((0.2, 0.1)):
        enter(store, small_config(**operational, model_params={"num_layers": 1}, seed=seed + 1), value)
    enter(store, steady, 0.6)
    enter(store, small_config(model_params={"num_layers": 2}, seed=9), 0.5, run_type="optuna_trial")
    found = ask(store, top_n=3, num_variations_per_config=1)
    assert [suggestion.source for suggestion in found] == [
        "from run run0 (final_val_f1 0.4333, mean of 3 seeds)",  # the others may be luck: see the next test
        "from run run3 (final_val_f1 0.55, mean of 2 seeds)",
    ]


@pytest.mark.parametrize("metric", ["final_val_f1", "final_val_loss"])
def test_a_lucky_seed_comes_after_the_configs_with_enough_seeds(
    metric: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    sign = 1 if metric == "final_val_f1" else -1
    caplog.set_level(logging.INFO, "research_eval")

    def enter_config(layers: int, *values: float) -> None:
        for seed, value in enumerate(values):
            enter(store, small_config(model_params={"num_layers": layers}, seed=seed), sign * value, metric=metric)

    def ranked() -> list[str]:
        return sources(ask(store, metric_name=metric, top_n=4, num_variations_per_config=1))

    enter_config(1, 0.99)
    enter_config(2, 0.98, 0.5)
    assert ranked() == ["run1", "run0"], "two seeds are the most that a config has"
    enter_config(3, 0.6, 0.6, 0.6)
    enter_config(4, 0.7, 0.7, 0.7, 0.7, 0.7)
    caplog.clear()
    assert ranked() == ["run6", "run3", "run0", "run1"]
    assert f"run run0 has the best {metric}, but 1 seed(s) only" in caplog.text


def test_only_finished_runs_with_a_number_are_templates(store: Store) -> None:
    enter(store, small_config(model_params={"num_layers": 1}), 0.1)
    for layers, status in enumerate(("failed", "running", "diverged", "pruned", "interrupted"), 2):
        enter(store, small_config(model_params={"num_layers": layers}), 0.9, status=status)
    enter(store, small_config(model_params={"num_layers": 7}), math.nan)
    enter(store, small_config(model_params={"num_layers": 8}), None)
    enter(store, small_config(model_type="moe"), 0.9)
    assert sources(ask(store, top_n=9)) == ["run0"]


def test_past_runs_of_any_status_are_not_suggested_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def with_layers(layers: int, **changes: Any) -> ExperimentConfig:
        fixed = LAYERS["model_params"] | {"num_layers": layers}
        return small_config(model_params=fixed, scheduler_params={"name": "none"}, **changes)

    enter(store, with_layers(1), 0.5)
    enter(store, with_layers(2, seed=7, experiment_name="other"), None, status="failed")
    (found,) = ask(store, num_variations_per_config=5, narrowing=LAYERS, perturbation_magnitude=9)
    assert found.config.model_params["num_layers"] == 3
    assert "only 1 of 5 new configs" in caplog.text
    enter(store, with_layers(3), 0.4)
    for strategy in ("perturb", "tpe"):
        with pytest.raises(ConfigError, match="no new config was found"):
            ask(store, narrowing=LAYERS, strategy=strategy)


def test_runs_of_an_earlier_program_are_completed_or_passed_over(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(model_params={"num_layers": 1})
    short = {"experiment_name": "old", "model_type": "dense", "dataset_type": "synthetic", "dataset_name": "parity"}
    short |= {"epochs": 2, "batch_size": 16, "dataset_params": {"num_samples": 100, "seq_len": 6}}
    short |= {"model_params": {"embed_dim": 8, "num_heads": 2, "num_layers": 1}}
    enter(store, config, 0.9, stored=short)
    enter(store, config, 0.8, stored={"lr": 0.1})  # what Optuna calls the parameters of a trial
    enter(store, config, 0.7)
    found = ask(store, top_n=5)
    assert sources(found) == ["run2"]  # the newest of two equal configs
    assert "1 runs have configs that the program does not take" in caplog.text and "run run1" in caplog.text


def test_templates_of_several_tasks_are_pointed_out(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    enter(store, small_config(dataset_params={"num_samples": 40, "seq_len": 4}), 0.9)
    enter(store, small_config(dataset_params={"num_samples": 40, "seq_len": 5}), 0.8)
    assert {one.config.dataset_params["seq_len"] for one in ask(store)} == {4, 5}
    assert "2 different dataset_params" in caplog.text


# ----------------------------------------------------------------------------------------------------------- steps

STARTS: dict[str, list[dict[str, Any]]] = {
    "dense": [{"embed_dim": 24, "num_heads": 3, "dropout": 0.0}, {"embed_dim": 7, "num_heads": 7, "num_layers": 9}],
    "moe": [{"embed_dim": 32, "num_heads": 8, "num_experts": 4, "top_k_experts": 4}, {"num_experts": 11}],
    "goe": [{"max_path_len": 6, "num_total_experts": 3, "balance_loss_coef": 0.0}],
    "goe_original": [
        {"num_total_experts": 2, "max_visits": 1, "max_path_len": 2},
        {"router_mode": "st", "gumbel_tau": 0.3, "gumbel_tau_min": 0.001, "dropout": 0.99},
        {"gumbel_tau": 5.0, "gumbel_tau_min": 4.0},
    ],
}
ALL_STARTS = [(model, params) for model in SHIPPED for params in ({}, *STARTS.get(model, []))]


@pytest.mark.parametrize(("model", "params"), ALL_STARTS)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(magnitude=st.sampled_from([1e-9, 0.1, 1.0, 1e9]), seed=st.integers(0, 10**6))
def test_whatever_a_step_breaks_is_repaired(model: str, params: dict[str, Any], magnitude: float, seed: int) -> None:
    config = small_config(model_type=model, model_params=params, optimizer_params={"name": "sgd"}).to_dict()
    space = space_around(config_from_dict(config), {})
    changed = perturbed(config, space, magnitude, np.random.default_rng(seed))
    checked = config_from_dict(changed).to_dict()
    assert magnitude < 0.1 or identity(checked) != identity(config)
    for parameter in space.parameters:  # no step is longer than the interval
        value, before = (one[parameter.section].get(parameter.key) for one in (checked, config))
        if parameter.key == "lr":
            assert before / 34 < value < before * 34
        if parameter.key == "num_layers":
            assert abs(value - before) <= 3


def variations(model: str, magnitude: float, count: int, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    narrowing = changes.pop("narrowing", {})
    config = small_config(model_type=model, **changes)
    space, rng = space_around(config, narrowing), np.random.default_rng(0)
    return config.to_dict(), [perturbed(config.to_dict(), space, magnitude, rng) for _ in range(count)]


def test_larger_magnitudes_are_larger_changes() -> None:
    rates, discrete = [], []
    for magnitude in (0.01, 0.05, 0.2, 0.6):
        config, varied = variations("moe", magnitude, 200, model_params={"embed_dim": 64, "num_experts": 4})
        rate = config["optimizer_params"]["lr"]
        rates.append(np.mean([abs(math.log(one["optimizer_params"]["lr"] / rate)) for one in varied]))
        keys = ("embed_dim", "num_layers", "num_experts")
        discrete.append(
            np.mean([one["model_params"][key] != config["model_params"][key] for one in varied for key in keys])
        )
    assert rates == sorted(rates) and rates[-1] > 10 * rates[0]
    assert discrete == sorted(discrete) and discrete[-1] > 3 * discrete[0]


def test_the_size_of_a_step_is_the_magnitude_on_the_scale_of_the_interval() -> None:
    """Annotations: lr from 3e-4 to 1e-2 in logarithms, dropout from 0 to 0.3."""
    _, varied = variations("dense", 0.1, 3000, model_params={"dropout": 0.5}, optimizer_params={"lr": 1e-3})
    rates = [math.log(one["optimizer_params"]["lr"] / 1e-3) for one in varied]
    assert np.std(rates) == pytest.approx(0.1 * math.log(1e-2 / 3e-4), rel=0.05)
    dropout = [one["model_params"]["dropout"] - 0.5 for one in varied]
    assert np.std(dropout) == pytest.approx(0.1 * 0.3, rel=0.05)
    assert abs(np.mean(rates)) < 0.02 and abs(np.mean(dropout)) < 0.002


def test_choices_go_to_their_neighbours_and_whole_numbers_by_one_at_least() -> None:
    _, varied = variations("moe", 0.1, 400, model_params={"embed_dim": 64, "num_layers": 3, "num_experts": 5})
    models = [one["model_params"] for one in varied]
    assert {model["embed_dim"] for model in models} == {32, 64, 128}
    assert {model["num_experts"] for model in models} == {4, 5, 8}
    assert {2, 3, 4} <= {model["num_layers"] for model in models} <= {1, 2, 3, 4, 5}
    kept = np.mean([model["embed_dim"] == 64 for model in models])
    searched = 12  # parameters that could be the one that moves in any case
    assert kept == pytest.approx(0.7 * (1 - 1 / searched), abs=0.07)
    assert {one["scheduler_params"]["name"] for one in varied} == {"none", "cosine_warmup"}


def test_one_value_moves_at_any_magnitude() -> None:
    config, varied = variations("dense", 1e-6, 30, narrowing=LAYERS, model_params={"num_layers": 2})
    assert {one["model_params"]["num_layers"] for one in varied} == {1, 3}
    config, varied = variations("moe", 1e-6, 60)
    moved = {
        key for one in varied for key, value in one["model_params"].items() if value != config["model_params"][key]
    }
    assert {"embed_dim", "num_layers", "num_experts", "num_heads", "top_k_experts"} <= moved


def test_a_value_outside_what_a_study_searches_stays_there() -> None:
    far = {"dropout": 0.6, "num_layers": 12, "embed_dim": 256, "num_heads": 16}
    _, varied = variations("dense", 0.05, 100, model_params=far, optimizer_params={"lr": 0.3, "weight_decay": 0.0})
    assert all(0.5 < one["model_params"]["dropout"] < 0.7 for one in varied)
    assert {11, 12, 13} <= {one["model_params"]["num_layers"] for one in varied}
    assert {256, 128} == {one["model_params"]["embed_dim"] for one in varied}
    assert all(0.1 < one["optimizer_params"]["lr"] < 0.9 for one in varied)
    assert {one["optimizer_params"]["weight_decay"] for one in varied} == {0.0}  # off stays off


def test_a_narrowing_is_kept_to_and_pulls_the_start_into_it() -> None:
    narrowing = {
        "batch_size": [4, 8],
        "model_params": {
            "embed_dim": [24, 30],
            "num_heads": {"low": 2, "high": 6},
            "dense": {"num_layers": {"low": 2, "high": 8, "step": 3}},
            "dropout": {"low": 0.1, "high": 0.2},
            "pool": "last",
            "positional_encoding": ["none", "alibi"],
            "dim_feedforward": {"low": 8, "high": 64, "log": True},
        },
        "training_params": {"label_smoothing": {"low": 0.0, "high": 0.25, "step": 0.1}},
    }
    start = {"embed_dim": 24, "num_heads": 3, "num_layers": 5}
    _, varied = variations("dense", 0.2, 150, narrowing=narrowing, batch_size=8, model_params=start)
    checked = [config_from_dict(one).to_dict() for one in varied[:10]] + varied
    models = [one["model_params"] for one in checked]
    assert {one["batch_size"] for one in checked} == {4, 8}
    assert {model["embed_dim"] for model in models} == {24, 30}
    assert {2, 3, 4} <= {model["num_heads"] for model in models} <= {2, 3, 4, 5, 6}
    assert {model["num_layers"] for model in models} == {2, 5, 8}
    assert {model["pool"] for model in models} == {"last"}
    assert {model["positional_encoding"] for model in models} == {"none", "alibi"}
    smoothing = {one["training_params"]["label_smoothing"] for one in checked}
    assert {0.0, 0.1} <= smoothing <= {0.0, 0.1, 0.2}
    assert all(0.1 <= model["dropout"] <= 0.2 and 8 <= model["dim_feedforward"] <= 64 for model in models)
    assert {model.get("dim_feedforward_factor") for model in models} == {None}  # searched only without dim_feedforward


def test_conditional_parameters_come_and_go_with_their_condition() -> None:
    narrowing = {"optimizer_params": {"name": ["adamw", "sgd"]}, "model_params": {"router_mode": ["gate", "st"]}}
    for start in ("adamw", "sgd"):
        _, varied = variations(
            "goe_original",
            0.3,
            60,
            narrowing=narrowing,
            optimizer_params={"name": start},
            model_params={"gate_scale": 1.7, "gumbel_tau_min": 0.001},
        )
        assert {one["optimizer_params"]["name"] for one in varied} == {"adamw", "sgd"}
        for one in varied[:20]:
            assert ("momentum" in one["optimizer_params"]) == (one["optimizer_params"]["name"] == "sgd")
            model = config_from_dict(one).model_params
            if model["router_mode"] == "st":
                assert model["gate_scale"] == 2.0  # its default again


def test_what_is_not_called_for_is_left_as_it_is() -> None:
    """`gumbel_tau` says nothing to a gate, but the constructor compares it with `gumbel_tau_min`."""
    changes = {"gumbel_tau": 5.0, "gumbel_tau_min": 4.0}
    _, varied = variations("goe_original", 0.3, 20, model_params=changes)
    assert {one["model_params"]["gumbel_tau"] for one in varied} == {5.0}
    search = space_around(small_config(model_type="goe_original", model_params=changes), {}).search
    drawn = config_from_dict(search.sample(random_pick(np.random.default_rng(0))))
    assert drawn.model_params["gumbel_tau"] == 5.0


# ------------------------------------------------------------------------------------------------------- rehearsals


def test_a_config_that_the_data_refuses_is_not_suggested(store: Store) -> None:
    """With the right path given, a model needs an expert for every function, which only the data knows."""
    data = {"num_samples": 40, "num_functions": 4}
    oracle = {"route": "oracle", "num_total_experts": 4, "max_path_len": 2, "embed_dim": 8, "num_heads": 2}
    settings: dict[str, Any] = {"model_type": "goe_original", "dataset_name": "planted_paths", "dataset_params": data}
    config = small_config(**settings, model_params=oracle)
    assert rehearse(config) is None
    too_few = small_config(**settings, model_params=oracle | {"num_total_experts": 2})
    assert "num_total_experts=2" in str(rehearse(too_few))
    enter(store, config, 0.9)
    found = ask(store, dataset_name="planted_paths", model_type="goe_original", top_n=1, num_variations_per_config=8)
    models = [suggestion.config.model_params for suggestion in found]
    assert len(found) == 8
    assert all(model["num_total_experts"] >= 4 and model["max_path_len"] >= 2 for model in models)


def test_a_rehearsal_leaves_the_generators_alone() -> None:
    import torch

    before = torch.get_rng_state()
    assert rehearse(small_config(model_type="moe")) is None
    assert torch.equal(before, torch.get_rng_state())


class Fragile(nn.Module):
    """Somebody's model that fails beyond a size."""

    def __init__(self, vocab_size: int, num_classes: int, hidden: int = 4) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(vocab_size, hidden), nn.Linear(hidden, num_classes)
        self.hidden = hidden

    def forward(self, input_ids, attention_mask=None):
        assert self.hidden <= 8, "too large"
        return self.output(self.embedding(input_ids).mean(1))


def test_a_class_from_outside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "fragile", Fragile)
    enter(store, small_config(model_type="fragile"), 0.5)
    found = ask(store, model_type="fragile", num_variations_per_config=3)
    names = {change.name.partition(".")[0] for suggestion in found for change in suggestion.changes}
    assert names <= {"optimizer_params", "scheduler_params"}
    wide = {"model_params": {"hidden": {"low": 2, "high": 20}}}
    found = ask(store, model_type="fragile", narrowing=wide, num_variations_per_config=6, perturbation_magnitude=1)
    assert all(suggestion.config.model_params["hidden"] <= 8 for suggestion in found)
    with pytest.raises(ConfigError, match="AssertionError: too large"):
        ask(store, model_type="fragile", narrowing={"model_params": {"hidden": [9, 10]}})


def test_text_need_not_be_at_hand(store: Store, tmp_path: Path) -> None:
    data = {"data_dir": str(tmp_path / "elsewhere"), "max_length": 8}
    enter(store, small_config(dataset_type="real_world", dataset_name="mine", dataset_params=data), 0.5)
    found = ask(store, dataset_name="mine")
    assert len(found) == 2 and all(one.config.dataset_params["data_dir"] == data["data_dir"] for one in found)


# ------------------------------------------------------------------------------------------------------------- TPE


def enter_rates(store: Store, score: Callable[[float], float], metric: str = "final_val_f1") -> None:
    """Twenty runs that differ in their learning rate only, and in what it is worth."""
    for share in np.linspace(0, 1, 20):
        rate = 3e-4 * (1e-2 / 3e-4) ** float(share)
        enter(store, small_config(optimizer_params={"lr": rate}), score(float(share)), metric=metric)


@pytest.mark.parametrize(("metric", "is_cost"), [("final_val_f1", False), ("final_val_loss", True)])
def test_tpe_goes_where_the_runs_were_good(store: Store, metric: str, is_cost: bool) -> None:
    enter_rates(store, lambda share: share, metric)
    found = ask(store, strategy="tpe", metric_name=metric, top_n=3, num_variations_per_config=5)
    assert len({suggestion.file_name for suggestion in found}) == 15
    rates = [math.log(suggestion.config.optimizer_params.lr) for suggestion in found]
    middle = (math.log(3e-4) + math.log(1e-2)) / 2
    assert np.median(rates) < middle if is_cost else np.median(rates) > middle
    assert all("fitted on 20 runs, nearest run run" in suggestion.source for suggestion in found)


def test_tpe_compares_with_the_nearest_run(store: Store) -> None:
    enter_rates(store, lambda share: share)
    enter(store, small_config(model_params={"num_layers": 3}), 0.1)
    stored = {row["experiment_id"]: json.loads(row["full_config_json"]) for row in store.experiments()}
    for suggestion in ask(store, strategy="tpe"):
        (near,) = sources([suggestion])
        name = suggestion.config.experiment_name
        complete = suggestion.config.to_dict()
        assert applied(stored[near], suggestion) | {"experiment_name": name} == complete
        layers = complete["model_params"]["num_layers"]
        rates = {
            run_id: abs(math.log(config["optimizer_params"]["lr"] / complete["optimizer_params"]["lr"]))
            for run_id, config in stored.items()
            if config["model_params"]["num_layers"] == 2
        }
        if layers <= 2:  # of runs that agree in everything but the rate, that with the nearest rate
            assert near == min(rates, key=lambda run_id: rates[run_id])


def test_tpe_takes_runs_of_one_task_and_budget(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="research_eval")
    enter(store, small_config(), 0.9)
    enter(store, small_config(seed=1, model_params={"embed_dim": 200, "num_layers": 30, "dropout": 0.7}), 0.8)
    for changes in (
        {"epochs": 3},
        {"batch_size": 8},
        {"dataset_params": {"num_samples": 100, "seq_len": 7}},
        {"optimizer_params": {"weight_decay": 0.0}},  # has no place on a log scale
    ):
        enter(store, small_config(**changes), 0.7)
    found = ask(store, strategy="tpe")
    assert found[0].source.startswith("fitted on 2 runs")
    assert "4 finished runs are left out" in caplog.text
    assert {one.config.epochs for one in found} == {2} and {one.config.batch_size for one in found} == {16}
    searched = ask(store, strategy="tpe", narrowing={"batch_size": [8, 16]})
    assert searched[0].source.startswith("fitted on 3 runs")


def test_tpe_needs_two_runs(store: Store) -> None:
    enter(store, small_config(), 0.9)
    enter(store, small_config(epochs=9), 0.8)
    with pytest.raises(ConfigError, match=r"1 of 2 finished runs .* Use --strategy perturb"):
        ask(store, strategy="tpe")
    enter(store, small_config(seed=1), 0.7)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        assert len(ask(store, strategy="tpe")) == 6
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(verbosity)


# --------------------------------------------------------------------------------------------------------- command


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the results of two runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)
    with Store(DB_FILE) as store:
        enter(store, small_config(experiment_name="my run"), 0.9)
        enter(store, small_config(model_params={"num_layers": 1}), None, status="failed")
        enter(store, small_config(model_type="moe"), None, status="running")
    return tmp_path


PARITY = ("--dataset_name", "parity", "--model_type", "dense")


def test_the_command_writes_files_and_says_what_is_in_them(folder: Path) -> None:
    ended = command(suggest_configs.main, *PARITY)
    assert ended.code == 0, ended.err
    paths = sorted((folder / "suggested_configs").iterdir())
    assert len(paths) == 2
    for path in paths:
        config = json.loads(path.read_text())
        assert load_config(path).to_dict() == config
        text = ended.out.partition(f"suggested_configs/{path.name}\n")[2]
        rate = config["optimizer_params"]["lr"]
        assert text.startswith("  from run run0 (final_val_f1 0.9)\n  ")
        assert f"  optimizer_params.lr 0.001 -> {rate}\n" in text.partition("suggested_configs/")[0]
    last = ended.out.splitlines()[-1]
    assert re.fullmatch(
        r"To run the first: python research_eval/main\.py --json_config_path suggested_configs/\S+", last
    )
    before = {path: path.read_bytes() for path in paths}
    again = command(suggest_configs.main, "--dataset-name=parity", "--model-type=dense", "--quiet", "--db", DB_FILE)
    assert again.code == 0 and sorted(again.out.split()) == [f"suggested_configs/{path.name}" for path in paths]
    assert {path: path.read_bytes() for path in (folder / "suggested_configs").iterdir()} == before


def test_a_search_space_file_narrows(folder: Path) -> None:
    (folder / "space.json").write_text('{"model_params": {"num_layers": [4, 5], "dropout": 0.25} /* tried */}')
    ended = command(suggest_configs.main, *PARITY, "--search_space", "space.json", "--quiet")
    models = [json.loads(Path(path).read_text())["model_params"] for path in ended.out.split()]
    assert ended.code == 0 and {model["dropout"] for model in models} == {0.25}
    assert {model["num_layers"] for model in models} <= {4, 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_n", "0"], "--top_n: has to be at least 1, got 0"),
        (["--num-variations-per-config", "-1"], "--num_variations_per_config: has to be at least 1"),
        (["--num_variations_per_config", "1001"], "--num_variations_per_config: has to be at most 1,000, got 1,001"),
        (["--strategy", "tpe", "--top_n", "501"], "--num_variations_per_config: has to be at most 1,000, got 1,002"),
        (["--perturbation_magnitude", "0"], "--perturbation_magnitude: has to be a positive number, got 0.0"),
        (["--perturbation_magnitude", "nan"], "--perturbation_magnitude: has to be a positive number"),
        (["--perturbation_magnitude", "inf"], "--perturbation_magnitude: has to be a positive number"),
        (["--perturbation_magnitude", "0.1", "--strategy", "tpe"], "of no use with --strategy tpe"),
        (["--seed", "-1"], "--seed: has to be at least 0"),
        (["--strategy", "tpes"], "invalid choice: 'tpes'"),
        (["--strategy", "tpe"], "Use --strategy perturb"),
        (["--metric_name", "test_f1"], "--metric_name: 'test_f1' is a score of the test split"),
        (["--metric_name", "final_val_f2"], "Did you mean 'final_val_f1'?"),
        (["--dataset_name", "paritys"], "--dataset_name: no runs on 'paritys' in"),
        (["--dataset_name", "paritys"], "Did you mean 'parity'?"),
        (["--model_type", "dens"], "--model_type: no runs of 'dens' on parity in"),
        (["--model_type", "dens"], "Did you mean 'dense'?"),
        (["--model_type", "moe"], "there are 1 running"),
        (["--top_m", "3"], "Did you mean '--top_n'?"),
        (["--db", "nowhere.db"], "no results at"),
        (["--output_dir", DB_FILE], f"--output_dir: {DB_FILE} cannot be written"),
        (["--search_space", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--search_space", "bad.json"], "--search_space: model_params.num_layers: "),
        (["--search_space", "data.json"], "--search_space: dataset_params: a suggestion keeps those of the run"),
    ],
)
def test_what_the_user_has_to_change_is_a_message(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "bad.json").write_text('{"model_params": {"num_layers": [0]}}')
    (folder / "data.json").write_text('{"dataset_params": {"seq_len": 4}}')
    ended = command(suggest_configs.main, *PARITY, *arguments)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err and ended.out == ""
    assert not (folder / "suggested_configs").exists()


def test_a_file_that_was_edited_is_not_overwritten(folder: Path) -> None:
    first, second = command(suggest_configs.main, *PARITY, "--quiet").out.split()
    Path(second).write_text("{}")
    Path(first).unlink()
    ended = command(suggest_configs.main, *PARITY)
    assert ended.code == 2 and f"{second}: is there with other content" in ended.err
    assert Path(second).read_text() == "{}" and not Path(first).exists()


def test_help_needs_no_heavy_imports(tmp_path: Path) -> None:
    script = (
        "import sys; from research_eval.suggest_configs import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'optuna', 'pydantic', 'sqlalchemy', 'numpy'} & set(sys.modules)))"
    )
    ended = python("-c", script, folder=tmp_path, fresh=True)
    assert ended.code == 0 and ended.out.splitlines()[-1] == "[]" and "--perturbation_magnitude" in ended.out

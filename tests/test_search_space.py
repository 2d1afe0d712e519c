"""What studies and suggestions may try: every draw is a config that the program takes, and nothing else is drawn."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from research_eval.annotations import Choice, Divides, Positive, Range, When
from research_eval.errors import ConfigError
from research_eval.registry import MODELS_MAP
from research_eval.schema import config_from_dict
from research_eval.studies.distributions import Infeasible, contains, grid_values, known_values, random_pick
from research_eval.studies.novelty import rehearse
from research_eval.studies.space import SearchSpace, build_space, read_search_space

BASE = {
    "dataset_type": "synthetic",
    "dataset_name": "parity",
    "epochs": 1,
    "batch_size": 8,
    "dataset_params": {"num_samples": 40, "seq_len": 5},
    "training_params": {"device": "cpu"},
}
SHIPPED = sorted(MODELS_MAP)
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
# Values that do not go with each other, or only some of them.
AWKWARD = {
    "embed_dim": st.lists(st.sampled_from([4, 6, 7, 12, 24, 30]), min_size=1),
    "num_heads": st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1) | st.just({"low": 1, "high": 6}),
    "num_experts": st.lists(st.sampled_from([1, 2, 5]), min_size=1),
    "top_k_experts": st.lists(st.integers(1, 4), min_size=1) | st.just({"low": 1, "high": 4}) | st.just(2),
    "num_total_experts": st.lists(st.integers(1, 4), min_size=1),
    "max_visits": st.integers(1, 2) | st.just([1, 2]),
    "max_path_len": st.lists(st.integers(1, 6), min_size=1) | st.just({"low": 1, "high": 6, "step": 2}),
    "num_layers": st.just(1),
    "expert_layers": st.just([1, 1]),
    "dropout": st.sampled_from([[0, 0.5], {"low": 0.1, "high": 0.25, "step": 0.1}]),
}


def space_of(*models: str, narrowing: dict[str, Any] | None = None, **base: Any) -> SearchSpace:
    return build_space(models, BASE | base, narrowing or {})


def keys_of(space: SearchSpace) -> set[str]:
    return {parameter.name for parameters in space.parameters.values() for parameter in parameters}


def draws(space: SearchSpace, count: int, seed: int = 0) -> Iterator[tuple[dict[str, Any], dict[str, Any], Any]]:
    """Configs, the values they were made of and the distributions of these; fewer where values do not go together."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}

        def pick(name: str, distribution: BaseDistribution, params=params, distributions=distributions) -> Any:
            params[name], distributions[name] = random_pick(rng)(name, distribution), distribution
            return params[name]

        try:
            yield space.sample(pick), params, distributions
        except Infeasible:
            continue


@st.composite
def narrowings(draw: st.DrawFn, model: str) -> dict[str, Any]:
    (parameters,) = space_of(model).parameters.values()
    awkward = [name for name in AWKWARD if name in {parameter.key for parameter in parameters}]
    chosen = draw(st.lists(st.sampled_from(awkward), unique=True)) if awkward else []
    narrowing: dict[str, Any] = {"model_params": {name: draw(AWKWARD[name]) for name in chosen}}
    names = draw(st.sampled_from([None, "sgd", ["adamw", "sgd"], ["sgd"]]))
    narrowing["optimizer_params"] = {} if names is None else {"name": names}
    schedules = draw(st.sampled_from([None, "wsd", ["none", "wsd", "cosine_warmup"], "none"]))
    narrowing["scheduler_params"] = {} if schedules is None else {"name": schedules}
    return narrowing


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("model", SHIPPED)
def test_every_sample_is_a_config_that_trains(model: str) -> None:
    for number, (config, _, _) in enumerate(draws(space_of(model), 6)):
        checked = config_from_dict(config)
        assert checked.model_type == model and checked.dataset_params["num_samples"] == 40
        if number == 0:
            assert rehearse(checked) is None


@pytest.mark.parametrize("model", SHIPPED)
@settings(max_examples=10, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_a_narrowed_space_gives_valid_configs_inside_it_and_finds_them_again(model: str, data: st.DataObject) -> None:
    narrowing = data.draw(narrowings(model))
    space = space_of(model, narrowing=narrowing)
    for config, params, distributions in draws(space, 1, data.draw(st.integers(0, 99))):
        checked = config_from_dict(config).to_dict()
        for key, allowed in narrowing["model_params"].items():
            value = checked["model_params"][key]
            if isinstance(allowed, dict):
                steps = (value - allowed["low"]) / allowed.get("step", 1)
                assert allowed["low"] <= value <= allowed["high"] and math.isclose(steps, round(steps), abs_tol=1e-9)
            else:
                assert value in (allowed if isinstance(allowed, list) else [allowed])
        assert ("momentum" in checked["optimizer_params"]) == (checked["optimizer_params"]["name"] == "sgd")
        assert ("optimizer_params.momentum" in params) == (checked["optimizer_params"]["name"] == "sgd")
        assert ("scheduler_params.warmup_factor" in params) == (checked["scheduler_params"]["name"] != "none")
        assert space.locate(checked) == (params, distributions)
        assert config_from_dict(space.sample(known_values(params))).to_dict() == checked


def test_a_config_outside_the_space_is_not_found() -> None:
    space = space_of("moe")
    ((config, params, _),) = draws(space, 1)
    complete = config_from_dict(config).to_dict()
    assert space.locate(complete) is not None
    for section, key, value in (
        ("model_params", "dropout", 0.9),
        ("model_params", "num_layers", 7),
        ("model_params", "embed_dim", 48),
        ("model_params", "dim_feedforward_factor", None),
        ("optimizer_params", "lr", 1.0),
        ("scheduler_params", "name", "wsd"),
    ):
        assert space.locate(complete | {section: complete[section] | {key: value}}) is None, key
    assert space.locate(complete | {"model_type": "dense"}) is None
    assert params


# ----------------------------------------------------------------------------------- values that go with each other


def test_what_does_not_fit_never_comes_out() -> None:
    narrowing = {"embed_dim": [24, 30], "num_heads": [3, 4, 5], "num_experts": [1, 2], "top_k_experts": [1, 2, 3, 4]}
    space = space_of("moe", narrowing={"model_params": narrowing})
    seen = set()
    for config, _, _ in draws(space, 200):
        model = config["model_params"]
        assert model["embed_dim"] % model["num_heads"] == 0 and model["top_k_experts"] <= model["num_experts"]
        seen.add(tuple(model[key] for key in narrowing))
    assert seen == {
        (width, heads, experts, top)
        for width, heads in ((24, 3), (24, 4), (30, 3), (30, 5))
        for experts, top in ((1, 1), (2, 1), (2, 2))
    }


def test_values_of_which_none_fits_are_infeasible() -> None:
    heads = space_of("dense", narrowing={"model_params": {"embed_dim": [7], "num_heads": {"low": 2, "high": 6}}})
    with pytest.raises(Infeasible, match=r"no value of dense\.num_heads divides embed_dim=7"):
        heads.sample(random_pick(np.random.default_rng()))
    narrowing = {"num_experts": [2], "top_k_experts": [3, 4]}
    for domain in ([3, 4], {"low": 3, "high": 4}):
        top = space_of("moe", narrowing={"model_params": narrowing | {"top_k_experts": domain}})
        with pytest.raises(Infeasible, match=r"moe\.top_k_experts is at most num_experts=2"):
            top.sample(random_pick(np.random.default_rng()))
        assert list(top.grid()) == []


def test_a_path_is_no_longer_than_all_visits() -> None:
    narrowing = {"num_total_experts": [1, 2], "max_visits": [1, 2], "max_path_len": {"low": 1, "high": 9}}
    space = space_of("goe_original", narrowing={"model_params": narrowing})
    longest: dict[int, int] = {}
    for config, _, _ in draws(space, 200):
        model = config["model_params"]
        visits = model["num_total_experts"] * model["max_visits"]
        longest[visits] = max(longest.get(visits, 0), model["max_path_len"])
    assert longest == {1: 1, 2: 2, 4: 4}


def test_parameters_of_another_routing_mode_are_not_searched() -> None:
    modes = space_of("goe_original", narrowing={"model_params": {"router_mode": ["gate", "st"]}})
    for _, params, _ in draws(modes, 20):
        is_gate = params["goe_original.router_mode"] == "gate"
        assert ("goe_original.gate_scale" in params) == is_gate
        assert ("goe_original.gumbel_tau" in params) != is_gate
    assert "goe_original.gumbel_tau" not in keys_of(space_of("goe_original"))
    for fixed in (
        space_of("goe_original", narrowing={"model_params": {"router_mode": "st"}}),
        space_of("goe_original", model_params={"router_mode": "st"}),
    ):
        assert "goe_original.gumbel_tau" in keys_of(fixed) and "goe_original.gate_scale" not in keys_of(fixed)


def test_a_narrowed_distribution_goes_by_its_own_name() -> None:
    """Optuna refuses a categorical distribution that changes under one name, and a number in another interval never."""
    space = space_of("moe", narrowing={"model_params": {"embed_dim": [2, 8]}})
    names: dict[str, set[str]] = {}
    for _, _, distributions in draws(space, 100):
        for name, distribution in distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                names.setdefault(name, set()).add(json.dumps(distribution.choices))
    assert {name: len(choices) for name, choices in names.items()} == dict.fromkeys(names, 1)
    assert {"moe.num_heads", "moe.num_heads of 1, 2"} <= set(names)


# ------------------------------------------------------------------------------------------------------------ grid


def test_the_grid_is_what_brute_force_finds() -> None:
    values = {
        "embed_dim": [24, 30],
        "num_heads": [3, 4, 5],
        "num_experts": [1, 2, 4],
        "top_k_experts": [1, 2, 3],
        "name": ["none", "cosine_warmup"],
        "warmup_factor": [0.05, 0.1],
    }
    fixed = {"num_layers": 1, "dropout": 0.0, "dim_feedforward_factor": 1.0, "balance_loss_coef": 0.01}
    narrowing = {
        "model_params": fixed | {key: values[key] for key in list(values)[:4]},
        "optimizer_params": {"lr": 0.001, "weight_decay": 0.0},
        "scheduler_params": {key: values[key] for key in ("name", "warmup_factor")},
    }
    expected = set()
    for width, heads, experts, top, name, warmup in itertools.product(*values.values()):
        if width % heads == 0 and top <= experts:
            expected.add((width, heads, experts, top, name, warmup if name != "none" else None))
    places = ("moe.embed_dim", "moe.num_heads", "moe.num_experts", "moe.top_k_experts", "scheduler_params.name")
    found = []
    for params in space_of("moe", narrowing=narrowing).grid():
        plain = {name.partition(" of ")[0]: value for name, value in params.items()}
        found.append((*(plain[place] for place in places), plain.get("scheduler_params.warmup_factor")))
    assert len(found) == len(set(found)) and set(found) == expected


@pytest.mark.parametrize("model", SHIPPED)
def test_every_point_of_a_grid_is_in_the_space(model: str) -> None:
    space = space_of(model)
    for params in itertools.islice(space.grid(), 5):
        checked = config_from_dict(space.sample(known_values(params))).to_dict()
        located = space.locate(checked)
        assert located is not None and located[0] == params


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (CategoricalDistribution((3, 1, 2)), [3, 1, 2]),
        (IntDistribution(2, 8, step=3), [2, 5, 8]),
        (IntDistribution(1, 100, log=True), [1, 10, 100]),
        (FloatDistribution(0.0, 1.0), [0.0, 0.5, 1.0]),
        (FloatDistribution(1e-4, 1.0, log=True), [1e-4, 1e-2, 1.0]),
        (FloatDistribution(0.0, 0.5, step=0.25), [0.0, 0.25, 0.5]),
        (FloatDistribution(2.0, 2.0), [2.0]),
    ],
)
def test_the_points_of_a_distribution(distribution: BaseDistribution, expected: list[Any]) -> None:
    assert grid_values(distribution) == pytest.approx(expected, rel=1e-9)
    assert all(contains(distribution, value) for value in grid_values(distribution))


@given(st.floats(1e-3, 10), st.floats(0, 5), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_draw_is_contained_and_what_lies_beside_is_not(low: float, width: float, log: bool, seed: int) -> None:
    distribution = FloatDistribution(low, low + width, log=log)
    assert contains(distribution, random_pick(np.random.default_rng(seed))("x", distribution))
    assert not contains(distribution, low * 0.999 - 1e-6) and not contains(distribution, (low + width) * 1.001 + 1e-6)
    assert not contains(distribution, None) and not contains(distribution, "1") and not contains(distribution, True)


def test_whole_numbers_and_choices_are_told_from_others() -> None:
    assert not contains(IntDistribution(1, 4), 2.5) and contains(IntDistribution(1, 4), 2)
    assert not contains(IntDistribution(1, 7, step=3), 3) and contains(IntDistribution(1, 7, step=3), 4)
    assert not contains(CategoricalDistribution((1, 2)), True) and not contains(CategoricalDistribution((1, 2)), 1.0)


# ------------------------------------------------------------------------------------------------ building a space


def test_what_the_base_fixes_is_not_searched() -> None:
    narrowing = {"batch_size": [16, 32], "optimizer_params": {"lr": [0.1, 0.2]}, "model_params": {"dropout": [0.1]}}
    fixed = space_of(
        "dense", narrowing=narrowing, optimizer_params={"lr": 0.005}, model_params={"dropout": 0.2, "embed_dim": 64}
    )
    assert {"batch_size", "optimizer_params.lr", "dense.dropout", "dense.embed_dim"} & keys_of(fixed) == set()
    for config, _, _ in draws(fixed, 5):
        assert config["batch_size"] == 8 and config["optimizer_params"]["lr"] == 0.005
        assert config["model_params"]["dropout"] == 0.2 and config["model_params"]["embed_dim"] == 64
    free = build_space(["dense"], {key: value for key, value in BASE.items() if key != "batch_size"}, narrowing)
    assert {config["batch_size"] for config, _, _ in draws(free, 30)} == {16, 32}


def test_an_alias_is_accepted_and_stands_under_its_canonical_name() -> None:
    space = space_of("moe", narrowing={"model_params": {"num_experts_per_layer": [3]}})
    assert [config["model_params"]["num_experts"] for config, _, _ in draws(space, 2)] == [3, 3]
    paths = space_of("goe", narrowing={"model_params": {"goe": {"num_total_experts_pool": 6}}})
    assert {config["model_params"]["num_total_experts"] for config, _, _ in draws(paths, 2)} == {6}


def test_several_model_types_share_what_is_not_their_own() -> None:
    narrowing = {"model_params": {"embed_dim": [16], "num_experts": [2], "goe": {"embed_dim": 32, "max_path_len": [2]}}}
    space = space_of("moe", "goe", "moe", narrowing=narrowing)
    assert space.model_types == ("moe", "goe")
    widths = set()
    for config, params, distributions in draws(space, 40):
        own = {name.partition(".")[0] for name in params} & set(SHIPPED)
        assert own == {config["model_type"]} == {params["model_type"]}
        assert "optimizer_params.lr" in params
        widths.add((config["model_type"], config["model_params"]["embed_dim"]))
        assert space.locate(config_from_dict(config).to_dict()) == (params, distributions)
    assert widths == {("moe", 16), ("goe", 32)}
    assert "for all: 4 searched" in space.describe() and "  moe.num_experts: one of 2" in space.describe()


class Plain(nn.Module):
    """No annotation says what may be tried."""

    def __init__(self, vocab_size, num_classes, hidden=16, depth: int = 1):
        super().__init__()


class Rules(nn.Module):
    """Every word that a constructor may use."""

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        size: Annotated[int | None, Range(2, 12, step=2)] = None,
        parts: Annotated[int, Range(1, 8), Divides("size")] = 1,
        kind: Annotated[str, Choice("plain", "soft")] = "plain",
        heat: Annotated[Positive, Range(0.1, 10.0, log=True), When("kind", "soft")] = 1.0,
    ) -> None:
        super().__init__()


def test_a_class_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "plain", Plain)
    plain = space_of("plain")
    assert {name.partition(".")[0] for name in keys_of(plain)} == {"optimizer_params", "scheduler_params"}
    narrowed = space_of("plain", narrowing={"model_params": {"hidden": [4, 8], "depth": {"low": 1, "high": 3}}})
    assert {config["model_params"]["depth"] for config, _, _ in draws(narrowed, 30)} == {1, 2, 3}
    monkeypatch.setitem(MODELS_MAP, "rules", Rules)
    for config, params, _ in draws(space_of("rules"), 50):
        model = config["model_params"]
        assert model["size"] in (2, 4, 6, 8, 10, 12) and model["size"] % model["parts"] == 0
        assert ("heat" in model) == ("rules.heat" in params) == (model["kind"] == "soft")


def test_a_space_survives_pickling() -> None:
    space = space_of("moe", "goe_original", narrowing={"model_params": {"moe": {"num_heads": [1, 2]}}})
    copy = pickle.loads(pickle.dumps(space))
    assert copy.describe() == space.describe()
    for (config, params, _), (again, *_) in zip(draws(space, 5), draws(copy, 5), strict=True):
        assert config == again
        assert copy.locate(config_from_dict(config).to_dict())[0] == params


class Last(nn.Module):
    """One parameter that waits for five which come after it."""

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        product: Annotated[int, Range(1, 99, upto=("e", "d", "c", "b", "a"))] = 1,
        a: Annotated[int, Range(1, 2)] = 1,
        b: Annotated[int, Range(1, 2)] = 1,
        c: Annotated[int, Range(1, 2)] = 1,
        d: Annotated[int, Range(1, 2)] = 1,
        e: Annotated[int, Range(1, 2)] = 1,
    ) -> None:
        super().__init__()


def test_the_order_of_the_walk_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides what a seeded sampler draws, so it may not follow the order of a set of names."""
    monkeypatch.setitem(MODELS_MAP, "last", Last)
    (parameters,) = space_of("last").parameters.values()
    assert [parameter.key for parameter in parameters][:6] == ["a", "b", "c", "d", "e", "product"]


# -------------------------------------------------------------------------------------------- files that are wrong


@pytest.mark.parametrize(
    ("narrowing", "message"),
    [
        ({"model_parms": {}}, "unknown key 'model_parms'. Did you mean 'model_params'?"),
        ({"epochs": [1, 2]}, "unknown key 'epochs'"),
        ({"model_params": 3}, "model_params: expected an object, got 3"),
        ({"optimizer_params": {"lrate": 1}}, "optimizer_params: unknown key 'lrate'"),
        ({"model_params": {"moe": {"embed_dims": 3}}}, "model_params.moe: unknown key 'embed_dims'"),
        ({"model_params": {"embed_dims": 3}}, "model_params: unknown key 'embed_dims'"),
        ({"model_params": {"goe": {"embed_dim": 3}}}, "model_params.goe: not among --model_types moe"),
        ({"model_params": {"moe": 3}}, "model_params.moe: expected an object, got 3"),
        ({"model_params": {"embed_dim": []}}, "model_params.embed_dim: an empty list leaves no value"),
        ({"model_params": {"embed_dim": [8, 0]}}, "model_params.embed_dim: "),
        ({"model_params": {"embed_dim": [8, True]}}, "model_params.embed_dim: "),
        ({"model_params": {"embed_dim": [8, [8]]}}, "model_params.embed_dim: "),
        ({"model_params": {"embed_dim": "8"}}, "model_params.embed_dim: "),
        ({"model_params": {"embed_dim": {"low": 8}}}, "model_params.embed_dim: a range has the keys low, high"),
        ({"model_params": {"embed_dim": {"low": 8, "high": 9, "lag": 1}}}, "model_params.embed_dim: a range has"),
        ({"model_params": {"embed_dim": {"low": 8.5, "high": 9}}}, "model_params.embed_dim: "),
        (
            {"model_params": {"embed_dim": {"low": 9, "high": 8}}},
            "model_params.embed_dim: expected numbers low <= high",
        ),
        ({"model_params": {"embed_dim": {"low": 1, "high": 8, "step": 0.5}}}, "model_params.embed_dim: step"),
        ({"model_params": {"dropout": {"low": 0, "high": 0.5, "step": 0}}}, "model_params.dropout: step"),
        ({"model_params": {"dropout": {"low": 0, "high": 0.5, "log": True}}}, "model_params.dropout: a log scale"),
        ({"model_params": {"dropout": {"low": 0, "high": 0.5, "log": 1}}}, "model_params.dropout: expected numbers"),
        ({"model_params": {"dropout": {"low": 0, "high": 1.5}}}, "model_params.dropout: "),
        ({"model_params": {"pool": {"low": "a", "high": "b"}}}, "model_params.pool: "),
        ({"scheduler_params": {"name": ["none", "cosine"]}}, "scheduler_params.name: "),
        ({"training_params": {"compile": {"low": False, "high": True}}}, "training_params.compile: "),
        ({"dataset_params": {"seqlen": 4}}, "dataset_params: unknown key 'seqlen'. Did you mean 'seq_len'?"),
        ({"batch_size": 0}, "batch_size: "),
    ],
)
def test_a_wrong_narrowing_is_explained(narrowing: dict[str, Any], message: str) -> None:
    base = {key: value for key, value in BASE.items() if key not in ("batch_size", "training_params")}
    with pytest.raises(ConfigError) as caught:
        build_space(["moe"], base, narrowing)
    assert str(caught.value).startswith(f"--search_space: {message}")


def test_an_unknown_model_type_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"unknown 'dens'\. Did you mean 'dense'"):
        space_of("dens")


def test_a_search_space_file(tmp_path: Path) -> None:
    file = tmp_path / "space.json"
    file.write_text('{"$schema": "x", // what is tried\n "model_params": {"embed_dim": [8, 16],},}')
    assert read_search_space(file) == {"model_params": {"embed_dim": [8, 16]}}
    file.write_text('{"model_params": {"embed_dim": 1, "embed_dim": 2}}')
    with pytest.raises(ConfigError, match="embed_dim"):
        read_search_space(file)
    for text in ("[1]", "{", ""):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"space\.json"):
            read_search_space(file)


@pytest.mark.parametrize("key", ["dropout", "balance_loss_coef"])
def test_a_range_whose_step_does_not_divide_it_ends_at_its_last_step(key: str) -> None:
    space = space_of("moe", narrowing={"model_params": {key: {"low": 0.1, "high": 0.25, "step": 0.1}}})
    assert {round(config["model_params"][key], 9) for config, _, _ in draws(space, 20)} == {0.1, 0.2}

"""Which parameter gets which rate and decay, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP
from research_eval.schema import OptimizerParams, SchedulerParams
from research_eval.training.optimizers import build_optimizer, build_schedule, learning_rate_factor, parameter_groups

PARAMS = OptimizerParams(lr=0.01, weight_decay=0.3, router_lr_mult=0.5, expert_lr_mult=3.0)


def settings_by_name(model: nn.Module, params: OptimizerParams = PARAMS) -> dict[str, tuple[float, float]]:
    """Parameter -> (weight decay, learning rate / lr)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["weight_decay"], round(group["lr"] / params.lr, 6))
        for group in parameter_groups(model, params)
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", MODELS_MAP)
def test_every_trainable_parameter_is_in_one_group(name: str, build_model: Callable[..., EvaluableModel]) -> None:
    model = build_model(name)
    frozen = next(model.parameters()).requires_grad_(False)
    members = [parameter for group in parameter_groups(model, PARAMS) for parameter in group["params"]]
    assert len(members) == len({id(parameter) for parameter in members})
    assert {id(parameter) for parameter in model.parameters()} - {id(p) for p in members} == {id(frozen)}


@pytest.mark.parametrize("name", MODELS_MAP)
def test_only_matrices_are_decayed(name: str, build_model: Callable[..., EvaluableModel]) -> None:
    for parameter, (decay, _) in settings_by_name(build_model(name)).items():
        owner, _, leaf = parameter.rpartition(".")
        matrix = leaf.startswith("weight") and not owner.endswith(("norm", "token", "bigram"))
        assert decay == (0.3 if matrix else 0.0), parameter


@pytest.mark.parametrize("name", MODELS_MAP)
def test_routers_and_experts_have_rates_of_their_own(name: str, build_model: Callable[..., EvaluableModel]) -> None:
    rates = {parameter: rate for parameter, (_, rate) in settings_by_name(build_model(name)).items()}
    for parameter, rate in rates.items():
        path = parameter.split(".")
        expected = 0.5 if "router" in path else 3.0 if "experts" in path else 1.0
        assert rate == (10.0 if path[-1] in ("edge_logits", "start_logits") else expected), parameter
    assert len(set(rates.values())) == {"dense": 1, "looped": 1, "lstm": 1, "goe_scan": 2}.get(name, 3)


def test_hand_made_parameters() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(3, 4),
            "norm": nn.LayerNorm(4),
            "gains": nn.ParameterList([torch.ones(4), torch.ones(4, 4)]),
            "router": nn.ModuleDict({"experts": nn.Linear(4, 2), "routers": nn.Linear(4, 2, bias=False)}),
        }
    )
    model["tied"] = nn.Linear(4, 3, bias=False)
    model["tied"].weight = model["table"].weight
    assert settings_by_name(model) == {
        "table.weight": (0.0, 1.0),
        "norm.weight": (0.0, 1.0),
        "norm.bias": (0.0, 1.0),
        "gains.0": (0.0, 1.0),  # a vector
        "gains.1": (0.3, 1.0),
        "router.experts.weight": (0.3, 3.0),  # the innermost name counts
        "router.experts.bias": (0.0, 3.0),
        "router.routers.weight": (0.3, 0.5),
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimiser_takes_the_groups(name: str) -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    params = OptimizerParams(name=name, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(layer, params)
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 2), torch.full((2,), 3.0)
    bias = layer.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), 0.95))  # both decay by lr * weight_decay here
    torch.testing.assert_close(layer.bias.detach(), bias - (0.1 if name == "adamw" else 0.3))


# ------------------------------------------------------------------------------------------------------- the schedule

COSINE = SchedulerParams(name="cosine_warmup", warmup_factor=0.2, min_lr_factor=0.1)


def test_vectors_of_experts_are_no_matrix_for_muon(build_model: Callable[..., EvaluableModel]) -> None:
    """Muon would mix them: the update of one expert would depend on the other experts."""
    model = build_model("goe_original")
    groups = parameter_groups(model, OptimizerParams(name="muon"))
    factors = {parameter: group["factors"] for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert factors[named["experts.gate.weight"]] == 0
    assert factors[named["experts.blocks.0.attention.output.weight"]] == 1


def test_known_values_of_the_learning_rate() -> None:
    """Two of ten steps rise to the full rate, then half a cosine falls to a tenth of it."""
    factors = [learning_rate_factor(step, 10, COSINE) for step in range(12)]
    fall = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share / 8)) for share in range(9)]
    assert factors == pytest.approx([1 / 3, 2 / 3, *fall, 0.1])
    assert fall[0] == 1.0
    assert fall[4] == pytest.approx(0.55)
    assert [learning_rate_factor(step, 10, SchedulerParams()) for step in (0, 5, 10)] == [1.0] * 3


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.999),
    floor=st.floats(0, 1),
)
def test_the_rate_rises_once_and_falls_once(total: int, warmup: float, floor: float) -> None:
    params = SchedulerParams(name="cosine_warmup", warmup_factor=warmup, min_lr_factor=floor)
    factors = [learning_rate_factor(step, total, params) for step in range(total + 1)]
    top = round(warmup * total)
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[top:], factors[top + 1 :], strict=False))
    assert factors[top] == (1.0 if top < total else pytest.approx(1.0))
    if top < total:
        assert factors[-1] == pytest.approx(floor)


def test_the_schedule_scales_every_group() -> None:
    model = nn.ModuleDict({"router": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(model, PARAMS)
    schedule = build_schedule(optimizer, COSINE, 10)
    for step in range(4):
        expected = [base * learning_rate_factor(step, 10, COSINE) for base in (0.005, 0.005, 0.01, 0.01)]
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx(expected)
        optimizer.step()
        schedule.step()

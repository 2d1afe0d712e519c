"""What must hold for every model in `MODELS_MAP`, and for the routed ones in particular.

B batch  L length  D width  C classes  N experts  T steps of a path
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Build, below, evaluated, exactly, gradients, loss_of, set_policy, stop_biases, wake
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from research_eval.annotations import options_of
from research_eval.datasets.token_data import Batches, TokenData
from research_eval.errors import ConfigError
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.path.choice import ChoiceSettings
from research_eval.layers.routing import balance_of, mean_entropy_loss, mean_of_rows
from research_eval.models.base_model import AdaptedModel, AuxiliaryLoss, EvaluableModel, adapt, auxiliary_terms
from research_eval.models.goe_original import GoEOriginalClassifier
from research_eval.models.moe import MoETransformerClassifier
from research_eval.registry import MODELS_MAP
from research_eval.schema import OptimizerParams, context_arguments
from research_eval.training.evaluate import measure_flops
from research_eval.training.optimizers import build_optimizer
from research_eval.training.runtime import Runtime

SAMPLED = {"router_mode": "st"}
PONDER = {"halt": "ponder", "halt_warmup": 0.0, "path_penalty_coef": 0.01}
ACTION = {"halt": "action", "path_penalty_coef": 0.01}
EVERY_MODEL = [pytest.param(name, {}, id=name) for name in MODELS_MAP]
# Beside its defaults: every mode, every way to halt and every route that needs nothing but the input.
OF_GOE_ORIGINAL = {
    "state": {"router_input": "state"},
    "cursor": {"router_input": "cursor"},
    "st": SAMPLED,
    "st_dense": {"router_mode": "st_dense"},
    "reinforce": {"router_mode": "reinforce"},
    "q": {"router_mode": "q"},
    "published": {"router_mode": "published"},
    "confidence": {"halt": "confidence", "exit_threshold": 0.4},
    "ponder": PONDER,
    "action": ACTION,
    "st-ponder": SAMPLED | PONDER,
    "reinforce-action": {"router_mode": "reinforce"} | ACTION,
    "q-action": {"router_mode": "q"} | ACTION,
    "token": {"route": "token", "route_token": 2},
    "hash": {"route": "hash"},
    "random-confidence": {"route": "random", "halt": "confidence", "exit_threshold": 0.5},
    "terms": {"contrastive_loss_coef": 0.1, "router_entropy_coef": 0.1, "path_heads_coef": 0.1},
}
EVERY_VARIANT = [
    *EVERY_MODEL,
    pytest.param("goe", {"num_layers": 2}, id="goe-two-routers"),
    pytest.param("moe", {"top_k_experts": 1, "balance_bias_rate": 0.01}, id="moe-top-1"),
    *(
        pytest.param("goe_original", arguments, id=f"goe_original-{name}")
        for name, arguments in OF_GOE_ORIGINAL.items()
    ),
]
ROUTED = [variant for variant in EVERY_VARIANT if variant.values[0] in ("moe", "goe", "goe_original")]
# Routers that the task loss reaches through the coefficient of the expert's change.
TAUGHT = [
    variant
    for variant in ROUTED
    if variant.values[1].get("router_mode") not in ("reinforce", "q", "published") and "route" not in variant.values[1]
]
TRICKS = {"bigram_buckets": 50, "token_dropout": 0.1, "dropout": 0.1}

every_model = pytest.mark.parametrize(("name", "arguments"), EVERY_MODEL)
every_variant = pytest.mark.parametrize(("name", "arguments"), EVERY_VARIANT)
every_routed_variant = pytest.mark.parametrize(("name", "arguments"), ROUTED)


def taking(argument: str) -> list[str]:
    """The models whose constructor has this argument."""
    return [name for name, cls in MODELS_MAP.items() if argument in options_of(cls)]


def tricks(name: str) -> dict[str, Any]:
    """Those of the regularising arguments that the model has."""
    return context_arguments(MODELS_MAP[name], TRICKS)


def trained(model: EvaluableModel, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The auxiliary terms of one forward pass in training mode; the model is left as it was."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(2)
    logits_BC = model.train()(ids_BL)
    model.task_loss(logits_BC, ids_BL.count_nonzero(1) % 3)  # some terms learn from it
    terms = {name: term.raw.detach() for name, term in auxiliary_terms(model).items()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    model.eval()
    return terms


# ------------------------------------------------------------------------------------------------------- every model


@every_variant
def test_padding_changes_nothing(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = wake(build_model(name, **arguments))
    logits_BC, paths = evaluated(model, ids_BL)
    terms = trained(model, ids_BL)
    padded_BL = F.pad(ids_BL, (0, 6))
    assert_close(evaluated(model, padded_BL)[0], logits_BC, rtol=1e-5, atol=1e-5)
    assert evaluated(model, padded_BL)[1] == paths
    assert_close(trained(model, padded_BL), terms, rtol=1e-5, atol=1e-5)
    assert_close(model(padded_BL, attention_mask=padded_BL != 0), logits_BC, rtol=1e-5, atol=1e-5)

    mate_L = torch.randint(1, 13, (40,))
    joined_BL = torch.cat([F.pad(ids_BL, (0, 40 - ids_BL.shape[1])), mate_L.unsqueeze(0)])
    joined_BC, joined_paths = evaluated(model, joined_BL)
    assert_close(joined_BC[:-1], logits_BC, rtol=1e-5, atol=1e-5)
    assert joined_paths[:-1] == paths


@pytest.mark.parametrize("pool", ["mean", "max", "first", "last"])
@pytest.mark.parametrize("name", taking("pool"))
def test_padding_changes_nothing_for_any_pooling(
    name: str, pool: str, build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = wake(build_model(name, pool=pool, bigram_buckets=20))
    ids_BL = torch.cat([ids_BL, torch.zeros_like(ids_BL[:1])])  # an empty sample too
    assert_close(model(F.pad(ids_BL, (0, 6))), model(ids_BL), rtol=1e-5, atol=1e-5)


@every_variant
def test_a_sample_does_not_notice_its_batch(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = wake(build_model(name, **arguments))
    logits_BC, paths = evaluated(model, ids_BL)
    order = [4, 0, 5, 2, 1, 3]
    permuted_BC, permuted_paths = evaluated(model, ids_BL[order])
    assert_close(permuted_BC, logits_BC[order], rtol=1e-5, atol=1e-5)
    assert permuted_paths == [paths[row] for row in order if paths]
    for row, sample_L in enumerate(ids_BL):
        alone_1C, path = evaluated(model, sample_L[sample_L != 0].unsqueeze(0))
        assert_close(alone_1C[0], logits_BC[row], rtol=1e-5, atol=1e-5)
        assert path == paths[row : row + 1]


@every_variant
def test_evaluation_repeats_and_leaves_no_trace(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = wake(build_model(name, **tricks(name), **arguments))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    first = evaluated(model, ids_BL)
    generator = torch.get_rng_state()
    second = evaluated(model, ids_BL)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert torch.equal(generator, torch.get_rng_state())
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)


@every_variant
def test_empty_and_one_token_samples_are_finite(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    model = wake(build_model(name, **arguments))
    mixed_BL = torch.tensor([[0, 0, 0], [4, 0, 0], [4, 5, 6]])
    for ids_BL in (mixed_BL, mixed_BL[:1], mixed_BL[:2, :1]):
        for training in (False, True):
            loss = loss_of(model.train(training), ids_BL, torch.zeros(len(ids_BL), dtype=torch.long))
            assert loss.isfinite()
            for key, gradient in gradients(loss, model).items():
                assert gradient.isfinite().all(), key
    values = [value for value in model.get_model_specific_metrics().values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in values)


@every_model
def test_any_length_works(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    """Nothing is cut: the last of 600 tokens counts."""
    model = wake(build_model(name, **arguments))
    model(torch.ones(1, 5, dtype=torch.long))
    ids_BL = torch.randint(1, 13, (1, 600)).repeat(2, 1)
    ids_BL[1, -1] = ids_BL[0, -1] % 12 + 1
    long_BC = model(ids_BL)
    assert long_BC.isfinite().all()
    assert not torch.equal(long_BC[0], long_BC[1])


@every_variant
def test_class_zero_is_an_ordinary_class(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = wake(build_model(name, **arguments))
    logits_BC = model(ids_BL)
    loss = model.task_loss(logits_BC, torch.zeros(6, dtype=torch.long))
    assert_close(loss, -logits_BC.log_softmax(-1)[:, 0].mean(), rtol=1e-5, atol=1e-6)
    (gradient_BC,) = torch.autograd.grad(loss, logits_BC)
    assert_close(gradient_BC * 6, logits_BC.softmax(-1) - torch.tensor([1.0, 0.0, 0.0]), rtol=1e-4, atol=1e-6)
    smooth = model.task_loss(logits_BC, torch.zeros(6, dtype=torch.long), label_smoothing=0.3)
    assert_close(smooth, 0.7 * loss - 0.3 * logits_BC.log_softmax(-1).mean(), rtol=1e-5, atol=1e-6)


@every_variant
def test_every_parameter_gets_a_finite_gradient(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model = wake(build_model(name, **tricks(name), **arguments)).train()
    loss_of(model, ids_BL, labels_B).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or below(key, "experts"), key  # an expert may be idle


@every_variant
def test_bf16_is_close_to_fp32(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model = wake(build_model(name, **arguments))
    logits_BC, paths = evaluated(model, ids_BL)
    runtime = Runtime("cpu", "bf16")
    with runtime.autocast():
        low_BC, low_paths = evaluated(model, ids_BL)
    same = torch.tensor([a == b for a, b in zip(paths, low_paths, strict=True)] or [True] * 6)
    assert same.sum() >= 4  # a near tie may fall either way
    assert_close(low_BC.float()[same], logits_BC[same], rtol=0.1, atol=0.1)
    with runtime.autocast():
        loss = loss_of(model.train(), ids_BL, labels_B)
    assert loss.dtype == torch.float32
    for key, gradient in gradients(loss, model).items():
        assert gradient.isfinite().all(), key


@every_model
def test_no_buffer_needs_double_precision(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    """Apple's GPUs have none."""
    assert torch.float64 not in {tensor.dtype for tensor in build_model(name, **arguments).state_dict().values()}


# ------------------------------------------------------------------------------------------------------- golden steps

# Task loss + auxiliary loss before and after one step of plain SGD with lr 0.1.
GOLDEN = {
    "dense": (1.2130446, 1.2229135),
    "goe": (1.0928785, 1.0586911),
    "goe_original": (1.4064442, 1.1705241),
    "goe_scan": (1.1024156, 1.1138264),
    "looped": (1.4416075, 1.2166845),
    "lstm": (1.2619852, 0.8372416),
    "moe": (1.0940267, 1.1909471),
}


@every_model
def test_the_golden_training_step(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model = build_model(name, **tricks(name), **arguments)
    optimizer = build_optimizer(model, OptimizerParams(name="sgd", lr=0.1, weight_decay=0.01))
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        loss = loss_of(model.train(), ids_BL, labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step((step + 1) / 2)
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(GOLDEN.get(name), abs=1e-5), (
        f"{name}: the first two training losses are {losses}. Update GOLDEN when you meant to change the model's "
        "mathematics, its initial values or its use of random numbers, and say so in the changelog; a refactoring must "
        "not move them."
    )


# ------------------------------------------------------------------------------------------------------ size and cost


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dense", {}),
        ("dense", {"num_layers": 3, "dim_feedforward": 20}),
        ("moe", {}),
        ("moe", {"num_experts": 5, "top_k_experts": 3, "dim_feedforward_factor": 0.5}),
        ("moe", {"num_experts": 1, "top_k_experts": 1}),
        ("goe", {}),
        ("goe", {"num_layers": 2, "max_path_len": 2, "router_hidden_dim": 10}),
        ("goe_original", {}),
        ("goe_original", {"expert_layers": 2, "max_path_len": 4, "router_hidden_dim": 10}),
        ("goe_original", {"num_total_experts": 1, "max_path_len": 4}),  # all visits spent before the path is full
        ("goe_original", {"route": "hash", "num_total_experts": 1, "max_path_len": 4}),
        ("goe_original", {"halt": "confidence", "min_path_len": 2}),  # the head reads every exit
        *(("goe_original", {"router_mode": mode}) for mode in ("st_dense", "q", "published")),
        ("goe_original", {"halt": "ponder"}),  # an untrained router never stops in evaluation
    ],
)
def test_flops_are_those_that_run(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    model, length = build_model(name, **arguments), 9
    tokens = torch.randint(1, 13, (8 * length,), dtype=torch.int32).numpy()
    data = TokenData(tokens, np.arange(0, len(tokens) + 1, length), np.zeros(8, np.int64))
    executed, _ = measure_flops(model, Batches(data, batch_size=4), Runtime("cpu"))
    assert model.get_flops_per_sample(length) == executed


def test_parameters_are_counted_by_hand(build_model: Build) -> None:
    """embed_dim 16, vocabulary 13, 3 classes; feed-forward width 32."""
    attention = 16 * 48 + 48 + 16 * 16 + 16
    feed_forward = 16 * 32 + 32 + 32 * 16 + 16
    block = attention + feed_forward + 2 * 32
    ends = 13 * 16 + 32 + 32 + 16 * 3 + 3

    dense = build_model("dense", num_layers=3)
    assert dense.get_parameter_count() == dense.get_active_parameter_count() == ends + 3 * block

    moe = build_model("moe", num_layers=2, num_experts=5, top_k_experts=2)
    other = attention + 2 * 32 + 16 * 5
    assert moe.get_parameter_count() == ends + 2 * (other + 5 * feed_forward)
    assert moe.get_active_parameter_count() == ends + 2 * (other + 2 * feed_forward)

    goe = build_model("goe", num_total_experts=5, max_path_len=2, router_hidden_dim=6)
    router = (16 * 6 + 6) + 3 * (16 * 6 + 6 * 6 + 6 + 6) + (6 * 5 + 5)
    assert goe.get_parameter_count() == ends + router + 5 * block
    assert goe.get_active_parameter_count() == ends + router + 2 * block
    two = build_model("goe", num_layers=2, num_total_experts=5, max_path_len=2, router_hidden_dim=6)
    assert two.get_active_parameter_count() == ends + 2 * router + 4 * block
    assert build_model("goe", num_total_experts=2).get_active_parameter_count() == ends + 2 * block + sum(
        parameter.numel() for parameter in build_model("goe", num_total_experts=2).router.parameters()
    )

    original = build_model(
        "goe_original", num_total_experts=5, max_path_len=2, expert_layers=2, router_hidden_dim=6, max_visits=1
    )
    gated = block + (16 * 16 + 16) + (16 * 16 + 16)
    expert = 2 * gated + 16 + 1 + 16
    router = 2 * (32 * 6 + 6) + 5 * 6 + 2 * 6 + 2 * (6 * 6 + 6)  # both maps once per step
    assert original.get_parameter_count() == ends + router + 5 * expert
    assert original.get_active_parameter_count() == ends + router + 2 * expert


@every_model
def test_frozen_parameters_do_not_count(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    model = build_model(name, **arguments)
    before = model.get_parameter_count()
    frozen = next(model.parameters()).requires_grad_(False)
    assert before - model.get_parameter_count() == frozen.numel()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("moe", {"num_experts": 2, "top_k_experts": 3}, "top_k_experts=3 is more than num_experts=2"),
        ("goe_original", {"min_path_len": 4, "max_path_len": 3}, "min_path_len=4 is more than max_path_len=3"),
        ("goe_original", {"gumbel_tau": 0.1}, "gumbel_tau_min=0.3 is more than gumbel_tau=0.1"),
        ("goe_original", {"exit_threshold": 0.5}, "exit_threshold=0.5 needs halt=\"confidence\", not 'off'"),
        *(
            (
                "goe_original",
                {"route": route, "halt": halt},
                f"halt='{halt}' is decided by the router, but route='{route}'",
            )
            for route in ("token", "hash", "random", "oracle")
            for halt in ("ponder", "action")
        ),
        *((name, {"num_heads": 3}, "num_heads=3 does not divide embed_dim=16") for name in taking("num_heads")),
        *(
            (name, {"dim_feedforward": 8, "dim_feedforward_factor": 2.0}, "dim_feedforward=8 and dim_feedforward_fac")
            for name in taking("dim_feedforward")
        ),
    ],
)
def test_impossible_arguments_are_explained(
    name: str, arguments: dict[str, Any], message: str, build_model: Build
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, **arguments)


# -------------------------------------------------------------------------------------------------------- the routers


@pytest.mark.parametrize(("name", "arguments"), TAUGHT)
def test_the_task_loss_alone_teaches_the_router(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Some of it at once, and all of it as soon as the last layer's weights are no longer zero."""
    model = build_model(name, **arguments).train()
    for every in (any, all):
        found = gradients(model.task_loss(model(ids_BL), labels_B), model)
        routers = [gradient for key, gradient in found.items() if below(key, "router")]
        assert every(bool(gradient.any()) for gradient in routers)
        assert routers
        wake(model).train()


def used_experts(model: EvaluableModel) -> set[int]:
    """The experts of the last forward pass; of any layer for the mixture, whose layers have experts of their own."""
    if isinstance(model, MoETransformerClassifier):
        assert model.outcome is not None
        return {int(expert) for layer in model.outcome.details for expert in layer.chosen_SK.flatten()}
    paths = model.recorded_paths()
    assert paths is not None
    return set(paths[paths >= 0].tolist())


@every_routed_variant
def test_idle_experts_have_no_gradient_and_no_influence(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    many = {"num_experts" if name == "moe" else "num_total_experts": 12}
    model = wake(build_model(name, **many, **arguments))
    ids_BL, labels_B = ids_BL[4:], labels_B[4:]
    logits_BC, _ = evaluated(model, ids_BL)
    used = used_experts(model)
    idle = sorted(set(range(12)) - used)
    assert idle
    experts = {key: parameter for key, parameter in model.named_parameters() if below(key, "experts")}
    found = gradients(loss_of(model, ids_BL, labels_B), model)
    for key in experts:
        assert len(found[key]) == 12
        assert not found[key][idle].any(), key
        assert found[key][sorted(used)].any(), key
    with torch.no_grad():
        for parameter in experts.values():
            parameter[idle] = 100.0
    assert torch.equal(evaluated(model, ids_BL)[0], logits_BC)
    with torch.no_grad():
        for parameter in experts.values():
            parameter[sorted(used)] += 0.5
    assert not torch.allclose(evaluated(model, ids_BL)[0], logits_BC)


@every_routed_variant
def test_routes_differ_between_samples(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor
) -> None:
    """Otherwise the tests of batches and padding above would not test dispatch."""
    model = wake(build_model(name, **arguments))
    _, paths = evaluated(model, ids_BL)
    assert len(used_experts(model)) > 1
    if paths:
        assert len({tuple(path) for path in paths}) > 1
        lengths = {sum(expert >= 0 for expert in path) for path in paths}
        assert (len(lengths) > 1) == ("halt" in arguments)


def share_layers(dense: EvaluableModel, one_expert: EvaluableModel, layers: int) -> None:
    """Copy embedding and head, and the only expert into each of the dense blocks."""
    state = one_expert.state_dict()
    inner = {key.removeprefix("experts.blocks.0."): value for key, value in state.items() if below(key, "experts")}
    ends = {key: value for key, value in state.items() if key.startswith(("embedding.", "head."))}
    blocks = {f"layers.{layer}.{key}": value for layer in range(layers) for key, value in inner.items()}
    dense.load_state_dict(ends | blocks)


def test_one_expert_of_goe_is_a_dense_model_with_shared_layers(build_model: Build, ids_BL: torch.Tensor) -> None:
    goe = wake(build_model("goe", num_total_experts=1, max_path_len=3))
    dense = build_model("dense", num_layers=3).eval()
    share_layers(dense, goe, layers=3)
    assert_close(goe(ids_BL), dense(ids_BL), rtol=1e-5, atol=1e-5)


def test_one_expert_of_moe_is_the_dense_model(build_model: Build, ids_BL: torch.Tensor) -> None:
    """Also several experts that are all the same one, as the weights of the chosen add up to 1."""
    for experts, top_k in ((1, 1), (3, 2), (3, 3)):
        moe = wake(build_model("moe", num_experts=experts, top_k_experts=top_k))
        with torch.no_grad():
            for key, parameter in moe.named_parameters():
                if below(key, "experts"):
                    parameter.copy_(parameter[:1].clone().expand_as(parameter))
        dense = build_model("dense").eval()
        state = {
            key.replace(".experts.", "."): value[:1] if below(key, "experts") else value
            for key, value in moe.state_dict().items()
        }
        dense.load_state_dict({key: state[key] for key in dense.state_dict()})
        assert_close(moe(ids_BL), dense(ids_BL), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_expert_of_goe_original_is_a_closed_form(scale: float, build_model: Build, ids_BL: torch.Tensor) -> None:
    """Its probability is 1, so c = gate_scale: h <- h + c (E(h) - h), and E(h) itself at c = 1."""
    model = wake(build_model("goe_original", num_total_experts=1, max_path_len=2, gate_scale=scale))
    keep_BL = ids_BL != 0
    h_BLD = model.embedding(ids_BL, keep_BL)
    for _ in range(2):
        image_BLD = model.experts(h_BLD, keep_BL, Dispatch.single(6))
        h_BLD = image_BLD if scale == 1 else 2 * image_BLD - h_BLD
    assert_close(model(ids_BL), model.head(h_BLD, keep_BL), rtol=1e-5, atol=1e-5)
    model.choice = ChoiceSettings("st").mode()  # straight-through: the value of c is 1
    if scale == 1:
        assert_close(model(ids_BL), model.head(h_BLD, keep_BL), rtol=1e-5, atol=1e-5)


@every_variant
def test_state_survives_a_checkpoint(
    name: str, arguments: dict[str, Any], build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Weights and whatever else training moves: the next training loss is the same number."""
    arguments = arguments | tricks(name) | ({"balance_bias_rate": 0.3} if name in ("moe", "goe_original") else {})
    model = wake(build_model(name, **arguments)).train()
    optimizer = build_optimizer(model, OptimizerParams())
    for step in range(3):
        loss_of(model, ids_BL, labels_B).backward()
        optimizer.step()
        model.after_step((step + 1) / 4)
    copy = build_model(name, **arguments).train()
    copy.load_state_dict(model.state_dict())
    fresh = dict(build_model(name, **arguments).named_buffers())
    moved = {key.rpartition(".")[2] for key, value in model.named_buffers() if not torch.equal(value, fresh[key])}
    state = {"moe": {"balance_bias"}, "goe_original": {"load", "progress"}, "goe_scan": {"progress"}}
    expected = state.get(name, set())
    if name == "goe_original":
        expected |= {"bias"} if "router_mode" not in arguments else set()
        expected |= {"mean", "variance", "batches"} if model.value.action_values is not None else set()
        expected |= {"mean_TS", "variance_TS", "batches_T"} if model.policy.features is not None else set()
    assert moved == expected
    losses = []
    for each in (model, copy):
        torch.manual_seed(5)
        losses.append(loss_of(each, ids_BL, labels_B).detach())
        each.after_step(1.0)
    assert torch.equal(losses[0], losses[1])
    assert_close(dict(copy.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- goe_original: its paths


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    num_experts=st.integers(1, 3),
    max_visits=st.integers(1, 3),
    max_path_len=st.integers(1, 5),
    ponder=st.booleans(),
    data=st.data(),
)
def test_paths_keep_their_limits(
    seed: int, num_experts: int, max_visits: int, max_path_len: int, ponder: bool, data: st.DataObject
) -> None:
    shortest = data.draw(st.integers(0, max_path_len), "min_path_len")
    torch.manual_seed(seed)
    model = GoEOriginalClassifier(
        vocab_size=13, num_classes=3, embed_dim=4, num_heads=1, num_total_experts=num_experts, max_visits=max_visits,
        max_path_len=max_path_len, min_path_len=shortest, halt="ponder" if ponder else "off",
    ).eval()  # fmt: skip
    nn.init.normal_(model.policy.router.policy.weight, std=3.0)
    nn.init.normal_(model.policy.router.policy.bias, std=1.0)
    model(torch.randint(1, 13, (8, 5)))
    possible = min(max_path_len, num_experts * max_visits)
    for path in model.recorded_paths().tolist():
        length = sum(expert >= 0 for expert in path)
        assert all(expert == -1 for expert in path[length:])
        assert all(path.count(expert) <= max_visits for expert in range(num_experts))
        assert min(shortest, possible) <= length <= possible
        assert ponder or length == possible


def test_a_stopped_sample_no_longer_counts(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = wake(build_model("goe_original", **PONDER))
    logits_BC, paths = evaluated(model, ids_BL)
    lengths = torch.tensor([sum(expert >= 0 for expert in path) for path in paths])
    assert 1 in lengths
    assert 3 in lengths
    entropies_BT = torch.from_numpy(model.recorder().entropies())
    assert_close(entropies_BT > 0, torch.arange(3) < lengths.unsqueeze(1))
    first = lengths == 1
    with exactly(model, 1):
        assert_close(model(ids_BL)[first], logits_BC[first], rtol=1e-5, atol=1e-6)


def test_the_coefficient_is_the_scaled_probability(build_model: Build, ids_BL: torch.Tensor) -> None:
    """gate: h + 2 p (E(h) - h); st: h + (E(h) - h), with the gradient of p in training."""
    model = build_model("goe_original", max_path_len=1).eval()
    set_policy(model, [0.4, 0.3, 0.2, 0.1, 1e-4])
    keep_BL = ids_BL != 0
    h_BLD = model.embedding(ids_BL, keep_BL)
    delta_BLD = model.experts(h_BLD, keep_BL, Dispatch([6, 0, 0, 0])) - h_BLD
    assert_close(model(ids_BL), model.head(h_BLD + 0.8 * delta_BLD, keep_BL), rtol=1e-5, atol=1e-5)
    model.choice = ChoiceSettings("st").mode()
    assert_close(model(ids_BL), model.head(h_BLD + delta_BLD, keep_BL), rtol=1e-5, atol=1e-5)


def test_the_balancing_bias_moves_the_choice_but_not_the_coefficient(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("goe_original", max_path_len=1).eval()
    set_policy(model, [0.3, 0.25, 0.25, 0.2, 1e-4])
    model.balance.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.5]))
    keep_BL = ids_BL != 0
    h_BLD = model.embedding(ids_BL, keep_BL)
    delta_BLD = model.experts(h_BLD, keep_BL, Dispatch([0, 0, 0, 6])) - h_BLD
    assert_close(model(ids_BL), model.head(h_BLD + 0.4 * delta_BLD, keep_BL), rtol=1e-5, atol=1e-5)


def test_the_balancing_bias_does_not_send_back_to_a_spent_expert(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("goe_original", max_visits=1).eval()
    set_policy(model, [0.4, 0.3, 0.2, 0.1, 1e-4])
    model.balance.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert evaluated(model, ids_BL)[1] == [[3, 0, 1]] * 6


def test_sampling_is_noisy_in_training_alone(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("goe_original", **SAMPLED)
    set_policy(model, [0.25] * 4 + [1e-4])
    counts = []
    for training in (False, True):
        model.train(training)
        model.balance.counts.zero_()
        model.start_recording()
        for _ in range(20):
            model(ids_BL)
        paths = model.recorded_paths()
        counts.append(
            model.balance.counts.sum(0) if training else torch.from_numpy(np.bincount(paths[paths >= 0], minlength=4))
        )
    assert counts[0].tolist() == [240, 120, 0, 0]  # the first of equals, two visits each
    assert counts[1].min() > 60  # 90 on average


def test_the_temperature_falls_and_a_cold_router_still_learns(
    build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model = build_model("goe_original", gumbel_tau=2.0, gumbel_tau_min=0.02, max_path_len=1, **SAMPLED).eval()
    set_policy(model, [0.4, 0.3, 0.2, 0.1, 1e-4])
    for progress, tau in ((0.0, 2.0), (0.35, 0.2), (0.7, 0.02), (1.0, 0.02)):
        model.after_step(progress)
        evaluated(model, ids_BL)
        powers = torch.tensor([0.4, 0.3, 0.2, 0.1]).double() ** (1 / tau)
        entropy = torch.special.entr(powers / powers.sum()).sum() / math.log(4)
        assert model.get_model_specific_metrics()["router_entropy"] == pytest.approx(float(entropy), abs=1e-5)
    model = wake(model).train()
    found = gradients(model.task_loss(model(ids_BL), labels_B), model)
    assert all(gradient.isfinite().all() for gradient in found.values())


# ------------------------------------------------------------------------------------------ goe_original: its losses


def terms_of(model: EvaluableModel, ids_BL: torch.Tensor) -> dict[str, AuxiliaryLoss]:
    model.train()(ids_BL)
    return model.auxiliary_losses()


def test_known_values_of_the_router_terms(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("goe_original", router_entropy_coef=0.5, max_path_len=1, router_init=0.0)
    with torch.no_grad():
        model.policy.router.policy.bias.zero_()
    terms = terms_of(model, ids_BL)  # uniform: the load is close to even, stopping is masked
    assert_close(terms["diversity_loss"].raw, torch.tensor(1 - math.log(4)))
    assert_close(terms["z_loss"].raw, torch.tensor(math.log(4) ** 2))
    assert_close(terms["router_entropy_loss"].raw, torch.tensor(-math.log(4)))
    assert terms["router_entropy_loss"].weight == 0.5
    model.after_step(1.0)
    assert terms_of(model, ids_BL)["router_entropy_loss"].weight == pytest.approx(0.05)
    with torch.no_grad():
        model.policy.router.policy.bias.copy_(torch.tensor([50.0, -50, -50, -50, 0]))  # clamped to +-10
    model.balance.load.copy_(torch.tensor([1.0, 0, 0, 0]))
    collapsed = terms_of(model, ids_BL)
    assert_close(collapsed["diversity_loss"].raw, torch.tensor(4.0), rtol=1e-5, atol=1e-5)
    assert_close(collapsed["z_loss"].raw, torch.tensor(100.0))
    assert_close(collapsed["router_entropy_loss"].raw, torch.tensor(0.0), rtol=0, atol=1e-5)
    alone = terms_of(build_model("goe_original", num_total_experts=1), ids_BL)
    assert_close(alone["diversity_loss"].raw, torch.tensor(1.0))


def test_the_load_is_a_running_share_of_executed_decisions(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("goe_original", max_path_len=3, max_visits=2).train()
    set_policy(model, [0.7, 0.2, 0.05, 0.05, 1e-4])
    model(ids_BL)  # twice expert 0, then expert 1
    taken_TN = F.one_hot(torch.tensor([0, 0, 1]), 4)
    assert_close(model.balance.load, 0.5 * torch.full((3, 4), 0.25) + 0.5 * taken_TN)
    assert_close(model.balance.counts, 6.0 * taken_TN)
    model.after_step(0.1)
    assert_close(model.balance.bias, 1e-3 - 2e-3 * taken_TN)
    assert not model.balance.counts.any()
    model = build_model("goe_original", router_per_step=False).train()  # then all steps share one
    set_policy(model, [0.7, 0.2, 0.05, 0.05, 1e-4])
    model(ids_BL)
    assert_close(model.balance.load, 0.5 * torch.full((1, 4), 0.25) + 0.5 * torch.tensor([[2 / 3, 1 / 3, 0, 0]]))
    assert_close(model.balance.counts, torch.tensor([[12.0, 6, 0, 0]]))
    model.after_step(0.1)
    assert_close(model.balance.bias, torch.tensor([[-1e-3, -1e-3, 1e-3, 1e-3]]))
    assert not model.balance.counts.any()


@pytest.mark.parametrize(
    ("term", "learning_rate"),
    [
        ("balance of the batch", 0.003),
        ("balance of the batch", 0.02),
        ("mean entropy", 0.003),
        ("mean entropy", 0.02),
        ("diversity loss", 0.003),  # its running load follows a router that moves faster than this too late
    ],
)
def test_a_collapsed_router_recovers(term: str, learning_rate: float, build_model: Build) -> None:
    """Each term alone at least halves the spread of the mean probabilities in 60 steps, and so does what is trained."""
    model = wake(build_model("goe_original", max_path_len=1, balance_bias_rate=0.0)).train()
    with torch.no_grad():
        model.policy.router.policy.weight.mul_(0.2)
        model.policy.router.policy.bias[0] += 3
    model.balance.load.copy_(torch.tensor([1.0, 0, 0, 0]))
    optimizer = torch.optim.Adam(model.policy.router.parameters(), lr=learning_rate)
    ids_BL = torch.randint(1, 13, (64, 3))
    spreads = []
    for _ in range(61):
        model(ids_BL)
        experts_RN = torch.cat(model.outcome.details.logits)[:, :-1].softmax(-1)
        mean_N = experts_RN.detach().mean(0)
        spreads.append(float(mean_N.std(correction=0) / mean_N.mean()))
        if term == "balance of the batch":
            loss = balance_of(model.balance.counts[0] / model.balance.counts.sum(), mean_of_rows(experts_RN))
        elif term == "mean entropy":
            loss = mean_entropy_loss(mean_of_rows(experts_RN))
        else:
            loss = model.auxiliary_losses()["diversity_loss"].raw
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(0.0)
    assert spreads[0] > 1
    assert spreads[-1] < spreads[0] / 2


def test_the_contrastive_loss_shapes_the_experts(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = wake(build_model("goe_original", contrastive_loss_coef=1.0))
    found = gradients(terms_of(model, ids_BL)["contrastive_loss"].raw, model)
    assert any(gradient.any() for key, gradient in found.items() if below(key, "experts"))


def test_the_pondered_loss_by_pencil(build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor) -> None:
    """T = 3 and p_stop = 1/2 at the two exits before the last: pi = 1/2, 1/4, 1/4; prior 0.4, 0.24, 0.144 / 0.784."""
    model = build_model("goe_original", max_visits=3, halt="ponder", halt_warmup=0.4, path_penalty_coef=0.5)
    set_policy(model, [0.125] * 4 + [0.5])
    model.train()
    exits = []
    for depth in (1, 2, 3):
        with exactly(model, depth):
            exits.append(model(ids_BL))
    losses = [F.cross_entropy(logits_BC, labels_B) for logits_BC in exits]

    warm = model.task_loss(model(ids_BL), labels_B)  # at first the whole path counts
    assert_close(warm, losses[2], rtol=1e-5, atol=1e-6)
    assert [model.auxiliary_losses()[name].weight for name in ("ponder_kl", "path_penalty")] == [0, 0]
    model.after_step(0.4)
    model.balance.bias.zero_()
    logits_BC = model(ids_BL)
    expected = 0.5 * losses[0] + 0.25 * losses[1] + 0.25 * losses[2]
    assert_close(model.task_loss(logits_BC, labels_B), expected, rtol=1e-5, atol=1e-6)
    terms = model.auxiliary_losses()
    assert_close(terms["path_penalty"].raw, torch.tensor(0.5 * 1 + 0.25 * 2 + 0.25 * 3))
    pi, prior = np.array([0.5, 0.25, 0.25]), np.array([0.4, 0.24, 0.144]) / 0.784
    assert_close(terms["ponder_kl"].raw, torch.tensor(float((pi * np.log(pi / prior)).sum())).float())
    assert [terms[name].weight for name in ("ponder_kl", "path_penalty")] == [0.01, 0.5]
    evaluated_BC = model.eval()(ids_BL)
    assert_close(model.task_loss(evaluated_BC, labels_B), losses[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [-10.0, 10.0])
def test_a_router_sure_of_stopping_has_finite_gradients(
    bias: float, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    """Exit probabilities of exactly 0 and 1."""
    model = build_model("goe_original", **PONDER).train()
    with torch.no_grad():
        model.policy.router.policy.bias.fill_(-bias)
        stop_biases(model).fill_(bias)
    found = gradients(loss_of(model, ids_BL, labels_B), model)
    assert all(gradient.isfinite().all() for gradient in found.values())


# ------------------------------------------------------------------------------------------------- the other losses


def test_the_mixture_averages_its_terms_over_layers(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = wake(build_model("moe", num_layers=2, num_experts=3, top_k_experts=2))
    model(ids_BL)
    balances, squares = [], []
    for layer in model.outcome.details:
        assert len(layer.logits_SN) == (ids_BL != 0).sum()  # no padding
        probabilities_SN = layer.logits_SN.softmax(-1)
        load_N = layer.chosen_SK.flatten().bincount(minlength=3) / layer.chosen_SK.numel()
        balances.append(3 * sum(load_N[e] * probabilities_SN[:, e].mean() for e in range(3)))
        squares.append(layer.logits_SN.exp().sum(-1).log().square().mean())
    terms = model.auxiliary_losses()
    assert_close(terms["balance_loss"].raw, sum(balances) / 2)
    assert_close(terms["z_loss"].raw, sum(squares) / 2)
    total = 0.01 * terms["balance_loss"].raw + 1e-3 * terms["z_loss"].raw
    assert_close(model.get_auxiliary_loss(), total)


def test_the_mixture_reports_the_load_of_its_layers(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = wake(build_model("moe"))
    model.start_recording()
    model(ids_BL[:3])
    model(ids_BL[3:])
    parts = model.get_model_specific_metrics()
    model.start_recording()
    assert model.get_model_specific_metrics() == {}
    model(ids_BL)
    whole = model.get_model_specific_metrics()
    assert parts["expert_load"] == whole["expert_load"]
    assert parts["router_entropy"] == pytest.approx(whole["router_entropy"], abs=1e-6)
    assert [sum(row) for row in whole["expert_load"]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert 0 < whole["router_entropy"] <= 1


def test_the_mixture_counts_only_what_is_trained(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("moe", top_k_experts=2).train()
    for times in (1, 2):
        model(ids_BL)
        assert {float(layer.counts.sum()) for layer in model._routed()} == {2.0 * times * int((ids_BL != 0).sum())}
    counts = [layer.counts.clone() for layer in model._routed()]
    model.eval()(ids_BL)
    assert all(map(torch.equal, counts, [layer.counts for layer in model._routed()]))


def test_the_mixture_balances_by_bias_when_asked(build_model: Build, ids_BL: torch.Tensor) -> None:
    for rate in (0.0, 0.01):
        model = wake(build_model("moe", balance_bias_rate=rate)).train()
        model(ids_BL)
        counts = [layer.counts.clone() for layer in model._routed()]
        model.after_step(0.5)
        for layer, counts_N in zip(model._routed(), counts, strict=True):
            assert_close(layer.balance_bias, -rate * torch.sign(counts_N - counts_N.mean()))
            assert not layer.counts.any()


def test_the_simple_router_averages_its_balance_over_steps(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model("goe", num_layers=2).eval()
    with torch.no_grad():
        for router in model.router:
            router.policy.weight.zero_()
            router.policy.bias.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]).log())
    _, paths = evaluated(model, ids_BL)
    assert paths == [[0] * 6] * 6
    assert_close(model.auxiliary_losses()["balance_loss"].raw, torch.tensor(4 * 0.7))
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)
    assert model.get_model_specific_metrics()["router_entropy"] == pytest.approx(entropy)


# ------------------------------------------------------------------------------------------------- foreign classes


class Foreign(nn.Module):
    """Has the documented methods and no common base class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(input_ids).mean(1)

    def get_auxiliary_loss(self) -> torch.Tensor:
        return self.table.weight.square().sum()

    def get_model_specific_metrics(self) -> dict[str, Any]:
        return {"norm": 1.0}

    def get_parameter_count(self) -> int:
        return 7


def test_a_foreign_module_works_through_an_adapter() -> None:
    model = adapt(Foreign(), "foreign")
    assert isinstance(model, AdaptedModel)
    assert model.get_model_name() == "foreign"
    assert model.get_parameter_count() == model.get_active_parameter_count() == 7
    assert model.get_model_specific_metrics() == {"norm": 1.0}
    assert model.get_flops_per_sample(3) is None
    ids_BL = torch.tensor([[1, 2], [3, 4]])
    assert_close(model(ids_BL), Foreign.forward(model.model, ids_BL))
    (term,) = auxiliary_terms(model).items()
    assert term[0] == "auxiliary_loss"
    assert_close(term[1].weight * term[1].raw, model.model.table.weight.square().sum())


def test_a_module_with_forward_alone_is_enough() -> None:
    model = adapt(nn.Linear(2, 3), "linear")
    assert model.get_parameter_count() == 9
    assert model.get_auxiliary_loss() is None
    assert model.get_model_specific_metrics() == {}
    assert auxiliary_terms(model) == {}


def test_adapting_keeps_our_own_models_and_refuses_other_things(build_model: Build) -> None:
    model = build_model("dense")
    assert adapt(model, "dense") is model
    with pytest.raises(ConfigError, match="'thing' is a int"):
        adapt(3, "thing")


@every_model
def test_models_know_their_name(name: str, arguments: dict[str, Any], build_model: Build) -> None:
    assert build_model(name, **arguments).get_model_name() == name

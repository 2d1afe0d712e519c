"""Positional encodings: what each of them can tell apart, and what it cannot.

B batch  L length  D width  H heads  C channels of a head
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from research_eval.datasets.token_data import Batches, TokenData
from research_eval.errors import ConfigError
from research_eval.layers.block import Attention, rotated, with_distances
from research_eval.layers.dispatch import Dispatch
from research_eval.layers.packing import Layout
from research_eval.layers.text import (
    RANDOM_RANGE,
    PositionalEncoding,
    TokenEmbedding,
    sinusoids,
    sinusoids_at,
    spread_positions,
)
from research_eval.models.base_model import EvaluableModel
from research_eval.training.evaluate import measure_flops
from research_eval.training.runtime import Runtime

Build = Callable[..., EvaluableModel]

MODELS = ["dense", "looped", "moe", "goe", "goe_original"]
every_model = pytest.mark.parametrize("name", MODELS)
every_encoding = pytest.mark.parametrize("encoding", get_args(PositionalEncoding))


def awake(model: EvaluableModel) -> EvaluableModel:
    """Routers start undecided; random weights send samples apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name.split(".") and parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model.eval()


# ------------------------------------------------------------------------------------------------------- every model


@every_encoding
@every_model
def test_padding_batch_mates_and_repetition_change_nothing(
    name: str, encoding: str, build_model: Build, ids_BL: torch.Tensor
) -> None:
    model = awake(build_model(name, positional_encoding=encoding))
    logits_BC = model(ids_BL)
    assert torch.equal(model(ids_BL), logits_BC)
    mates_BL = F.pad(torch.randint(1, 13, (2, 40)), (0, 0))
    joined_BL = torch.cat([F.pad(ids_BL, (0, 33)), mates_BL])
    assert_close(model(joined_BL)[:6], logits_BC, rtol=1e-5, atol=1e-5)
    for row, sample_L in enumerate(ids_BL):
        assert_close(model(sample_L[sample_L != 0].unsqueeze(0))[0], logits_BC[row], rtol=1e-5, atol=1e-5)


@every_encoding
@every_model
def test_empty_samples_long_samples_and_gradients_are_finite(
    name: str, encoding: str, build_model: Build, ids_BL: torch.Tensor, labels_B: torch.Tensor
) -> None:
    model = awake(build_model(name, positional_encoding=encoding))
    assert model(torch.tensor([[0, 0], [3, 0]])).isfinite().all()
    long_1L = torch.randint(1, 13, (1, 300))
    changed_1L = long_1L.clone()
    changed_1L[0, -1] = long_1L[0, -1] % 12 + 1
    assert not torch.equal(model(long_1L), model(changed_1L))  # nothing is cut
    model.train()
    model.task_loss(model(ids_BL), labels_B).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# What a classifier with mean pooling can tell about the order of its tokens.
SEES_ORDER = {"sin": True, "none": False, "rope": True, "alibi": True, "random": True}
SEES_DIRECTION = {"sin": True, "none": False, "rope": True, "alibi": False, "random": True}
SEES_PLACE = {"sin": True, "none": False, "rope": False, "alibi": False}


@every_encoding
@every_model
def test_an_encoding_sees_order_and_direction_or_not(name: str, encoding: str, build_model: Build) -> None:
    """ "none" sees a bag of tokens, "alibi" distances without a sign."""
    model = awake(build_model(name, positional_encoding=encoding))
    ids_BL = torch.randint(1, 13, (8, 9))
    logits_BC = model(ids_BL)
    for order, seen in (([3, 1, 0, 8, 5, 7, 6, 2, 4], SEES_ORDER), (list(range(8, -1, -1)), SEES_DIRECTION)):
        other_BC = model(ids_BL[:, order])
        if seen[encoding]:
            assert (other_BC - logits_BC).abs().max() > 1e-4
        else:
            assert_close(other_BC, logits_BC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoding", SEES_PLACE)
@every_model
def test_a_relative_encoding_does_not_see_the_place(name: str, encoding: str, build_model: Build) -> None:
    """Behind masked tokens a sample stands further to the right; distances stay."""
    model = awake(build_model(name, positional_encoding=encoding))
    ids_BL = torch.randint(1, 13, (8, 9))
    logits_BC = model(ids_BL)
    moved_BC = model(F.pad(ids_BL, (5, 0), value=4), attention_mask=F.pad(torch.ones(8, 9), (5, 0)).bool())
    if SEES_PLACE[encoding]:
        assert (moved_BC - logits_BC).abs().max() > 1e-4
    else:
        assert_close(moved_BC, logits_BC, rtol=1e-4, atol=1e-5)


@every_encoding
@every_model
def test_bf16_is_close(name: str, encoding: str, build_model: Build, ids_BL: torch.Tensor) -> None:
    model = build_model(name, positional_encoding=encoding).eval()
    logits_BC = model(ids_BL)
    with Runtime("cpu", "bf16").autocast():
        assert_close(model(ids_BL).float(), logits_BC, rtol=0.1, atol=0.1)


@every_model
def test_odd_heads_cannot_rotate(name: str, build_model: Build) -> None:
    with pytest.raises(ConfigError, match="embed_dim=12 over num_heads=4 gives 3 per head, which has to be even"):
        build_model(name, embed_dim=12, num_heads=4, positional_encoding="rope")
    build_model(name, embed_dim=12, num_heads=4, positional_encoding="alibi")


@every_encoding
def test_an_encoding_costs_no_products(encoding: str, build_model: Build) -> None:
    """The formula holds, so attention stays fused also with a bias: torch counts it as one kernel."""
    model = build_model("dense", positional_encoding=encoding)
    data = TokenData(np.ones(72, np.int32), np.arange(0, 73, 9), np.zeros(8, np.int64))
    executed, _ = measure_flops(model, Batches(data, batch_size=4), Runtime("cpu"))
    assert model.get_flops_per_sample(9) == executed


# ------------------------------------------------------------------------------------------------------ the formulas


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 9), half=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_rotation_is_multiplication_by_a_complex_number(length: int, half: int, seed: int) -> None:
    torch.manual_seed(seed)
    x_BHLC = torch.randn(2, 3, length, 2 * half, dtype=torch.float64)
    turned_BHLC = rotated(x_BHLC)
    for position in range(length):
        for pair in range(half):
            angle = position * 10_000 ** (-pair / half)
            before = torch.complex(x_BHLC[:, :, position, pair], x_BHLC[:, :, position, pair + half])
            after = before * complex(math.cos(angle), math.sin(angle))
            assert_close(turned_BHLC[:, :, position, pair], after.real, rtol=1e-5, atol=1e-5)
            assert_close(turned_BHLC[:, :, position, pair + half], after.imag, rtol=1e-5, atol=1e-5)


def test_distances_and_slopes_are_those_of_alibi() -> None:
    bias_1HLL = with_distances(None, 8, torch.zeros(1, 8, 5, 4))
    for head in range(8):
        for i in range(5):
            for j in range(5):
                assert float(bias_1HLL[0, head, i, j]) == pytest.approx(-abs(i - j) * 2.0 ** -(head + 1))
    assert float(with_distances(None, 2, torch.zeros(1, 2, 2, 4))[0, :, 0, 1].neg().log2().sum()) == -(4 + 8)
    mask_B11L = torch.tensor([[True, True, False], [True, True, True]])[:, None, None]
    masked = with_distances(mask_B11L, 2, torch.zeros(2, 2, 3, 4))
    assert masked[0, :, :, 2].eq(float("-inf")).all()
    assert masked.isfinite().sum() == 2 * 3 * (2 + 3)


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_attention_follows_the_formula_with_padding(encoding: Any) -> None:
    layer, lengths = Attention(8, 2, positional_encoding=encoding), [3, 5, 1]
    h_BLD = torch.randn(3, 5, 8)
    keep_BL = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    fast_BLD = layer(h_BLD, Layout.whole(keep_BL), Dispatch.single(3))
    for h_LD, result_LD, length in zip(h_BLD, fast_BLD, lengths, strict=True):
        y_LD = F.layer_norm(h_LD[:length], (8,))
        query_HLC, key_HLC, value_HLC = (
            part.view(length, 2, 4).transpose(0, 1)
            for part in F.linear(y_LD, layer.input.weight[0], layer.input.bias[0]).split(8, dim=-1)
        )
        heads = []
        for head, (query_LC, key_LC) in enumerate(zip(query_HLC, key_HLC, strict=True)):
            scores_LL = torch.zeros(length, length)
            for i in range(length):
                for j in range(length):
                    key_C = key_LC[j]
                    if encoding == "rope":  # turn the key back by the distance; the query stays
                        key_C = rotated(key_C.expand(1, 1, 6, 4))[0, 0, abs(j - i)]
                        query_C = query_LC[i]
                        if j < i:
                            key_C, query_C = key_LC[j], rotated(query_C.expand(1, 1, 6, 4))[0, 0, i - j]
                        scores_LL[i, j] = query_C @ key_C / 2
                    else:
                        scores_LL[i, j] = query_LC[i] @ key_C / 2 - abs(i - j) * 2.0 ** (-4 * (head + 1))
            heads.append(scores_LL.softmax(-1) @ value_HLC[head])
        attended_LD = F.linear(torch.cat(heads, -1), layer.output.weight[0], layer.output.bias[0])
        assert_close(result_LD[:length], attended_LD, rtol=1e-4, atol=1e-5)


def test_sinusoids_at_whole_numbers_are_the_table() -> None:
    for width in (7, 8):
        assert torch.equal(sinusoids_at(torch.arange(30.0), width), sinusoids(30, width))
    for position, channel in ((0, 0), (3, 4), (29, 7)):
        angle = position * 10_000 ** (-(channel // 2 * 2) / 8)
        expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
        assert float(sinusoids(30, 8)[position, channel]) == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------------- random positions


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5), seed=st.integers(0, 2**16))
@example(lengths=[9], seed=339)  # draws a gap that rounding would swallow
def test_random_positions_increase_within_the_range(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    keep_BL = torch.arange(30) < torch.tensor(lengths).unsqueeze(1)
    for training in (False, True):
        positions_BL = spread_positions(keep_BL, training)
        for row_L, length in zip(positions_BL, lengths, strict=True):
            own = row_L[:length]
            assert ((own > 0) & (own <= RANDOM_RANGE)).all()
            assert (own.diff() > 0).all()
            if not training:
                steps = torch.arange(1, length + 1) / (length + 1)
                assert_close(own, RANDOM_RANGE * steps, rtol=1e-5, atol=1e-3)


def test_random_positions_are_sorted_uniform_draws_around_those_of_evaluation() -> None:
    keep_BL = torch.ones(20_000, 4, dtype=torch.bool)
    positions_BL = spread_positions(keep_BL, training=True) / RANDOM_RANGE
    places = torch.arange(1, 5)
    assert_close(positions_BL.mean(0), places / 5, rtol=0, atol=0.008)  # order statistics: Beta(i, n + 1 - i)
    assert_close(positions_BL.var(0), places * (5 - places) / (25 * 6), rtol=0.05, atol=0)
    assert_close(spread_positions(keep_BL[:1], training=False)[0] / RANDOM_RANGE, places / 5)


def test_training_draws_anew_and_evaluation_does_not(ids_BL: torch.Tensor) -> None:
    embedding = TokenEmbedding(13, 8, 0, 0.0, positional_encoding="random")
    keep_BL = ids_BL != 0
    assert not torch.equal(embedding(ids_BL, keep_BL), embedding(ids_BL, keep_BL))
    embedding.eval()
    before = torch.get_rng_state()
    assert torch.equal(embedding(ids_BL, keep_BL), embedding(ids_BL, keep_BL))
    assert torch.equal(torch.get_rng_state(), before)

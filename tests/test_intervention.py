"""Changes of the routing of a trained model: experts left out, forbidden or swapped, and given paths.

B batch  L length  T steps
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from research_eval.datasets.token_data import Batch
from research_eval.errors import ConfigError
from research_eval.layers.intervention import NOTHING, Intervention
from research_eval.models.base_model import EvaluableModel, logits_of
from research_eval.registry import CHOICES, LANGUAGE_MODELS, MODELS_MAP

B, L, CLASSES, EXPERTS, STEPS = 24, 9, 3, 5, 3
HALTS = ("off", "confidence", "ponder", "action")


def batch_of(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(2, 11, (B, L), generator=generator)
    ids_BL[:6, 5:] = 0
    return Batch(
        ids_BL, ids_BL > 0, torch.randint(CLASSES, (B,), generator=generator), num_tokens=int((ids_BL > 0).sum())
    )


def shaken(model: EvaluableModel, seed: int = 1) -> EvaluableModel:
    """The model with weights at which experts differ and a balance bias that overturns choices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("balance_bias"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
            if name.endswith("threshold"):
                buffer.fill_(0.6)
    return model.eval()


def goe_original(**options: Any) -> EvaluableModel:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "num_heads": 2, "num_total_experts": EXPERTS, "max_path_len": STEPS, "max_visits": 3}
    model = MODELS_MAP["goe_original"](vocab_size=11, num_classes=CLASSES, **{**sizes, **options})
    return shaken(model)


def routed(model_type: str) -> EvaluableModel:
    torch.manual_seed(0)
    if model_type == "goe_original":
        return goe_original()
    sizes = {"goe": {"num_total_experts": EXPERTS, "max_path_len": STEPS}, "moe": {"num_experts": EXPERTS}}[model_type]
    return shaken(MODELS_MAP[model_type](vocab_size=11, num_classes=CLASSES, embed_dim=16, num_heads=2, **sizes))


def language_model(**options: Any) -> EvaluableModel:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "num_heads": 2, "num_total_experts": EXPERTS, "max_path_len": STEPS}
    return shaken(LANGUAGE_MODELS["goe"](vocab_size=11, max_length=L, **sizes, **options))


@torch.no_grad()
def outputs(model: EvaluableModel, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
    """The outputs of an evaluation and the recorded paths."""
    model.start_recording()
    found = logits_of(model, batch)
    paths = model.recorded_paths()
    assert paths is not None
    return found, paths


ALL = [*(("goe_original", mode, halt) for mode in sorted(CHOICES) for halt in HALTS), ("goe", "", ""), ("moe", "", "")]


def model_of(kind: tuple[str, str, str]) -> EvaluableModel:
    return goe_original(router_mode=kind[1], halt=kind[2]) if kind[1] else routed(kind[0])


@pytest.mark.parametrize("kind", ALL, ids="-".join)
def test_a_block_leaves_every_bit_as_it_was(kind: tuple[str, str, str]) -> None:
    model, batch = model_of(kind), batch_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, paths = outputs(model, batch)
    used = int(paths[0, 0])
    changes: list[dict[str, Any]] = [{"skip": [used]}, {"forbid": [used]}, {"swap": {used: (used + 1) % EXPERTS}}]
    for change in [*changes, *({**change, "step": 0} for change in changes)]:
        with model.intervene(**change):
            changed, _ = outputs(model, batch)
        assert not torch.equal(changed, expected)
    with pytest.raises(RuntimeError, match="in the block"), model.intervene(skip=[0]):
        raise RuntimeError("in the block")
    found, again = outputs(model, batch)
    assert torch.equal(found, expected)
    assert (again == paths).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind[0] != "moe"], ids="-".join)
def test_the_recorded_path_gives_the_recorded_outputs(kind: tuple[str, str, str]) -> None:
    """Samples are given their own paths, one path after the other.

    Other samples then go to the same experts. On CPUs without AVX-512, how MKL rounds a row of a product depends on the
    number of rows.
    """
    model, batch = model_of(kind), batch_of()
    expected, paths = outputs(model, batch)
    for path in np.unique(paths, axis=0):
        rows = np.flatnonzero((paths == path).all(1))
        taken = [int(expert) for expert in path if expert >= 0]
        if not taken:
            continue
        with model.intervene(path=taken):
            found, forced = outputs(model, batch)
        torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-6)
        ends_early = kind[2] == "confidence"
        assert ends_early or (forced[:, : len(taken)] == taken).all()


@pytest.mark.parametrize("kind", ALL, ids="-".join)
def test_an_expert_that_is_not_used_may_be_left_out_or_forbidden(kind: tuple[str, str, str]) -> None:
    model, batch = model_of(kind), batch_of()
    with model.intervene(forbid=[2]):
        expected, paths = outputs(model, batch)
        assert (paths != 2).all()
    with model.intervene(forbid=[2], skip=[2], swap={2: 4}):
        found, _ = outputs(model, batch)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("route", ["token", "hash", "random"])
def test_a_fixed_route_goes_round_a_forbidden_expert(route: str) -> None:
    model, batch = goe_original(route=route), batch_of()
    _, free = outputs(model, batch)
    with model.intervene(forbid=[1, 2]):
        _, paths = outputs(model, batch)
    assert not np.isin(paths, [1, 2]).any()
    if route != "random":
        kept = ~np.isin(free, [1, 2])
        assert (paths[kept] == free[kept]).all()
        assert (paths[~kept] == 3).all()


def test_skipping_is_the_walk_without_that_expert() -> None:
    """A slow and obvious version: with c = 1 the states are the outputs of the experts, one after the other."""
    model: Any = goe_original(router_mode="st", router_input="features")
    batch = batch_of()
    _, paths = outputs(model, batch)
    with model.intervene(skip=[int(paths[0, 0])]):
        found, _ = outputs(model, batch)
    with torch.no_grad():
        h_BLD = model.embedding(batch.input_ids, batch.attention_mask)
        packing = model.experts.packing(batch.attention_mask, batch.num_tokens)
        for step in range(STEPS):
            action_B = torch.from_numpy(paths[:, step])
            action_B = action_B.masked_fill(action_B == int(paths[0, 0]), EXPERTS)
            h_BLD = model.experts.step(h_BLD, packing, action_B, torch.ones(B), False, False).h_BLD
        expected = model.head(h_BLD, batch.attention_mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_swapped_expert_is_one_with_the_other_ones_weights() -> None:
    model, batch = routed("goe"), batch_of()
    with model.intervene(swap={0: 3}):
        swapped, paths = outputs(model, batch)
    assert (paths != 0).all()
    pools = [part for name, part in model.named_modules() if name.split(".")[-1] == "experts"]
    with torch.no_grad():
        for parameter in (one for pool in pools for one in pool.parameters() if len(one) == EXPERTS):
            parameter[0] = parameter[3]
    copied, _ = outputs(model, batch)
    torch.testing.assert_close(swapped, copied, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"route": "bigram"}, {"top_k_experts": 2}], ids=str)
def test_language_models_are_changed_too(options: dict[str, Any]) -> None:
    model: Any = language_model(**options)
    model.learn_text(np.random.default_rng(0).integers(2, 11, 500).astype(np.int32), 0)
    batch = batch_of()
    expected, _ = outputs(model, batch)
    with model.intervene(forbid=[0, 1]):
        found, paths = outputs(model, batch)
    assert not np.isin(paths, [0, 1]).any()
    assert not torch.equal(found, expected)
    with model.intervene(skip=range(EXPERTS)):
        nothing, _ = outputs(model, batch)
    with model.intervene(skip=range(EXPERTS), swap={0: 1}):
        also_nothing, _ = outputs(model, batch)
    assert torch.equal(nothing, also_nothing)
    found, _ = outputs(model, batch)
    assert torch.equal(found, expected)


def test_blocks_can_be_nested() -> None:
    for kind in ("goe", "goe_original", "moe"):
        model, batch = routed(kind), batch_of()
        with model.intervene(skip=range(EXPERTS)):
            outer, _ = outputs(model, batch)
            with model.intervene(forbid=[1]):
                inner, _ = outputs(model, batch)
            again, _ = outputs(model, batch)
        with model.intervene(forbid=[1]):
            expected, _ = outputs(model, batch)
        assert torch.equal(again, outer)
        assert torch.equal(inner, expected)


@pytest.mark.parametrize(
    "change",
    [{"skip": [1.5]}, {"skip": 1}, {"skip": ["1"]}, {"step": "a"}, {"path": 5}, {"path": "01"}, {"swap": [(1, 2)]}],
)
def test_only_whole_numbers_are_taken(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected whole numbers"), routed("goe").intervene(**change):
        pass
    with routed("goe").intervene(skip=[np.int64(1)], step=np.int32(0)):
        pass


def test_what_cannot_be_changed_is_said() -> None:
    model = routed("goe")
    for words, change in {
        "there is no expert 5": {"skip": [5]},
        "there is no expert -1": {"swap": {-1: 0}},
        "every expert is forbidden": {"forbid": range(5)},
        "there is no step 3": {"skip": [0], "step": 3},
        "a path has 1 to 3 experts, and this one has 4": {"path": [0] * 4},
    }.items():
        with pytest.raises(ConfigError, match=words), model.intervene(**change):  # type: ignore[arg-type]
            pass
    with pytest.raises(ConfigError, match="a token has 2 experts"), routed("moe").intervene(path=[0]):
        pass
    with pytest.raises(ConfigError, match="and a token needs 2"), routed("moe").intervene(forbid=[0, 1, 2, 3]):
        pass
    with pytest.raises(ConfigError, match="training mode"), routed("goe").train().intervene(skip=[0]):
        pass
    dense = MODELS_MAP["dense"](vocab_size=11, num_classes=CLASSES, embed_dim=16, num_heads=2).eval()
    with pytest.raises(ConfigError, match="has no experts"), dense.intervene(skip=[0]):
        pass


def test_nothing_is_nothing() -> None:
    assert Intervention(step=2, skip=frozenset([1])).at(1) is NOTHING

"""What the router of `goe_original` reads, how it starts and explores, and how its balance fades.

B batch  L length  N experts  T steps  S width of a summary
"""

from __future__ import annotations

import pytest
import torch
from support import Build, evaluated
from torch.testing import assert_close

from research_eval.errors import ConfigError
from research_eval.layers.path.router import RunningStatistics, TokenFeatures
from research_eval.models.goe_original import GoEOriginalClassifier


def model_with(build_model: Build, **arguments: object) -> GoEOriginalClassifier:
    model = build_model("goe_original", **arguments)
    assert isinstance(model, GoEOriginalClassifier)
    return model


def paths_of(model: GoEOriginalClassifier, ids_BL: torch.Tensor) -> list[list[int]]:
    model.eval()
    return evaluated(model, ids_BL)[1]


def test_features_are_moved_by_no_training(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = model_with(build_model)
    before = paths_of(model, ids_BL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("policy.router"):
                parameter.add_(torch.randn_like(parameter))
    assert paths_of(model, ids_BL) == before
    assert "policy.features.table_VD" in model.state_dict()  # but a checkpoint keeps them


def test_a_router_of_states_moves_with_the_states(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = model_with(build_model, router_input="state")
    before = paths_of(model, ids_BL)
    with torch.no_grad():
        model.embedding.token.weight.normal_()
    assert paths_of(model, ids_BL) != before


def test_a_cursor_reads_one_token_per_step(build_model: Build) -> None:
    model = model_with(build_model, router_input="cursor", max_path_len=2)
    ids_BL = torch.randint(1, 9, (200, 5), generator=torch.Generator().manual_seed(0))
    routes: list[dict[int, set[int]]] = [{}, {}]
    for tokens, path in zip(ids_BL.tolist(), paths_of(model, ids_BL), strict=True):
        routes[0].setdefault(tokens[0], set()).add(path[0])
        routes[1].setdefault((tokens[0], tokens[1]), set()).add(path[1])  # type: ignore[arg-type]  # visits count, too
    for step in routes:
        assert all(len(experts) == 1 for experts in step.values())
    assert len({next(iter(experts)) for experts in routes[0].values()}) > 1


def test_a_cursor_behind_the_end_reads_nothing() -> None:
    features = TokenFeatures(9, 4, cursor=True)
    ids_BL = torch.tensor([[3, 0], [3, 5]])
    read_BS = features(ids_BL, ids_BL != 0, step=1)
    assert_close(read_BS[0], torch.zeros(8))
    assert_close(read_BS[1], features.table_VD[5].repeat(2))


def test_pooled_features_ignore_padding_and_know_the_order() -> None:
    features = TokenFeatures(9, 16)
    short_BL, padded_BL = torch.tensor([[3, 5]]), torch.tensor([[3, 5, 0, 0]])
    assert_close(features(padded_BL, padded_BL != 0, 0), features(short_BL, short_BL != 0, 0))
    turned_BL = torch.tensor([[5, 3]])
    assert not torch.allclose(features(turned_BL, turned_BL != 0, 0), features(short_BL, short_BL != 0, 0))


def test_the_statistics_are_those_of_all_running_samples_so_far() -> None:
    statistics = RunningStatistics(2, 3)
    batches = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1)) * 5 + 2
    running_B = torch.tensor([True, True, True, False, True, False])
    for batch_BS in batches:
        statistics(batch_BS, running_B, step=1)
    seen_XS = batches[:, running_B].flatten(0, 1)
    assert_close(statistics.mean_TS[1], seen_XS.mean(0))
    assert (statistics.variance_TS[1] / seen_XS.var(0, correction=0) - 1).abs().max() < 0.5  # about means so far
    assert_close(statistics.mean_TS[0], torch.zeros(3))  # the other step saw nothing
    before = statistics.mean_TS.clone()
    statistics.eval()
    standardized = statistics(batches[0], running_B, step=1)
    assert_close(statistics.mean_TS, before)
    assert_close(standardized, (batches[0] - before[1]) / (statistics.variance_TS[1].sqrt() + 1e-3))


def test_steps_have_routers_of_their_own(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = model_with(build_model, max_path_len=2, max_visits=2)
    assert model.policy.router is not None
    before = paths_of(model, ids_BL)
    with torch.no_grad():
        model.policy.router.policy.weight.chunk(2)[1].neg_()
    after = paths_of(model, ids_BL)
    assert [path[0] for path in after] == [path[0] for path in before]
    assert [path[1] for path in after] != [path[1] for path in before]


def test_the_spread_of_the_first_logits_is_set(build_model: Build, ids_BL: torch.Tensor) -> None:
    undecided = model_with(build_model, router_init=0.0, max_path_len=1)
    undecided(ids_BL)
    assert all((logits[:, :-1] == 0).all() for logits in undecided.outcome.details.logits)
    spread = model_with(build_model, router_init=4.0, max_path_len=1)
    spread(ids_BL)
    assert torch.cat(spread.outcome.details.logits)[:, :-1].std() > 0.3


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)])
def test_exploration_fades(progress: float, share: float, build_model: Build) -> None:
    model = model_with(build_model, exploration=0.5, max_path_len=1, num_total_experts=4)
    ids_BL = torch.randint(1, 9, (3000, 4), generator=torch.Generator().manual_seed(0))
    best = [path[0] for path in paths_of(model, ids_BL)]
    model.train()
    model.policy.router.statistics.eval()  # type: ignore[union-attr]  # the same features as in evaluation
    model.after_step(progress)
    model(ids_BL)
    taken = torch.cat([step.experts_R for step in model.outcome.details.steps]).bincount(minlength=4)
    if share == 0:
        assert taken.tolist() == torch.tensor(best).bincount(minlength=4).tolist()
    expected = (1 - share) * torch.tensor(best).bincount(minlength=4) + share * 3000 / 4
    assert ((taken - expected).abs() < 5 * (3000 / 4) ** 0.5 * share + 1).all()


def test_exploration_keeps_the_limit_of_visits(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = model_with(build_model, exploration=0.9, max_path_len=3, max_visits=1, num_total_experts=3)
    model.train()
    model(ids_BL)
    experts = torch.cat([step.experts_R for step in model.outcome.details.steps]).bincount(minlength=3)
    assert experts.tolist() == [len(ids_BL)] * 3  # each expert once per sample


def test_balancing_fades(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = model_with(build_model, balance_decay=0.5, balance_bias_rate=0.1, diversity_loss_coef=0.2)
    model.train()
    moved, weights = [], []
    for progress in (0.0, 0.25, 0.5, 0.75):
        model.after_step(progress)  # counts are empty: only the progress moves
        before = model.balance.bias.clone()
        model(ids_BL)
        weights.append(model.auxiliary_losses()["diversity_loss"].weight)
        model.after_step(progress)
        moved.append(float((model.balance.bias - before).abs().max()))
    assert moved == pytest.approx([0.1, 0.05, 0, 0])
    assert weights == pytest.approx([0.2, 0.1, 0, 0])


def test_every_step_is_balanced_on_its_own(build_model: Build, ids_BL: torch.Tensor) -> None:
    """Two experts that swap places from step to step are balanced over the path, but not within a step."""
    model = model_with(build_model, num_total_experts=2, max_path_len=2, max_visits=1, balance_bias_rate=0.1)
    model.balance.counts.copy_(torch.tensor([[10.0, 0.0], [0.0, 10.0]]))
    model.after_step(0.1)
    assert_close(model.balance.bias, torch.tensor([[-0.1, 0.1], [0.1, -0.1]]))
    shared = model_with(build_model, num_total_experts=2, max_path_len=2, router_per_step=False, balance_bias_rate=0.1)
    shared.balance.counts.copy_(torch.tensor([[10.0, 10.0]]))
    shared.after_step(0.1)
    assert_close(shared.balance.bias, torch.zeros(1, 2))


def test_experts_of_two_kinds_cannot_be_tied(build_model: Build) -> None:
    with pytest.raises(ConfigError, match="tie_experts needs experts of one kind, not num_scan_experts=1"):
        model_with(build_model, tie_experts=True, num_scan_experts=1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_experts_share_a_part_of_their_gradients(share: float, build_model: Build, ids_BL: torch.Tensor) -> None:
    found = {}
    for given in (0.0, share):
        torch.manual_seed(0)
        model = model_with(build_model, expert_sharing=given, num_scan_experts=1).eval()
        model(ids_BL).square().sum().backward()
        found[given] = {name: parameter.grad for name, parameter in model.named_parameters()}
    stacks = [name for name in found[0.0] if name.startswith(("experts.blocks.", "experts.gate."))]
    assert stacks
    for name, own in found[0.0].items():
        if own is None:
            continue
        expected = (1 - share) * own + share * own.mean(0, keepdim=True) if name in stacks else own
        assert_close(found[share][name], expected)


def test_tied_experts_stay_equal(build_model: Build, ids_BL: torch.Tensor) -> None:
    model = model_with(build_model, tie_experts=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = [parameter.clone() for parameter in model.experts.parameters()]
    for _ in range(2):
        model(ids_BL).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.experts.parameters(), strict=True))
    for parameter in model.experts.parameters():
        assert_close(parameter, parameter[:1].expand_as(parameter))

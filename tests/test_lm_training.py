"""Training of language models: exact resume, repeatability, what is scored, and the optimiser for matrices."""

from __future__ import annotations

import contextlib
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import history, repeatable, run_in, small_config, stop_at
from torch import nn
from torch.testing import assert_close

from research_eval.analysis.report_routes import read_samples
from research_eval.analyze_results import main
from research_eval.annotations import Range
from research_eval.config.sections import OptimizerParams
from research_eval.datasets.token_data import IGNORED, Batch
from research_eval.db_utils import DB_FILE
from research_eval.errors import ConfigError
from research_eval.layers.block import Attention
from research_eval.layers.causal.products import ExpertMatrix
from research_eval.registry import LANGUAGE_MODELS
from research_eval.runs.prepare import prepare
from research_eval.schema import config_from_dict
from research_eval.studies.space import build_space
from research_eval.tasks.base import task_of
from research_eval.training.evaluate import evaluate
from research_eval.training.length import Length
from research_eval.training.muon import Muon, orthogonalised
from research_eval.training.optimizers import build_optimizer, parameter_groups
from research_eval.training.runtime import Runtime
from research_eval.training.step import Meter, take_step

WORDS = ("the king", "a rose", "my lord", "sweet night", "no man", "O heaven")
SMALL = {"embed_dim": 16, "num_heads": 2, "dim_feedforward": 24}
POOL = {**SMALL, "num_total_experts": 4, "max_path_len": 2}
PARAMS: dict[str, dict[str, Any]] = {
    "dense": {**SMALL, "num_layers": 2, "dropout": 0.1},
    "looped": {**SMALL, "num_loops": 2},
    "lstm": {"embed_dim": 16},
    "moe": {**SMALL, "num_layers": 2, "num_experts": 3},
    "goe": {**POOL, "route": "bigram", "dropout": 0.1},
    "goe_original": {**POOL, "halt": "confidence", "exit_threshold": 0.2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verses of a few words in an order that follows from the line number."""
    folder = tmp_path_factory.mktemp("verses")
    rng = np.random.default_rng(0)
    for split, lines in (("train", 120), ("validation", 30)):
        text = "".join(f"{' '.join(rng.choice(WORDS, 3))},\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def settings(corpus: Path, model_type: str = "dense", **changes: Any) -> dict[str, Any]:
    data = {"data_dir": str(corpus), "block_size": 16, "ngram_baseline": False} | changes.pop("dataset_params", {})
    training = {"max_steps": 12, "eval_every": 5, "log_every": 1, "device": "cpu", "num_threads": 1}
    return {
        "model_type": model_type,
        "dataset_type": "language_modeling",
        "dataset_name": "verses",
        "batch_size": 8,
        "dataset_params": data,
        "model_params": PARAMS[model_type] | changes.pop("model_params", {}),
        "training_params": training | changes.pop("training_params", {}),
        **changes,
    }


# ------------------------------------------------------------------------------------------------------ whole trainings


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    model_type: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_from_dict(settings(corpus, model_type, training_params={"max_steps": 12, "ema_decay": 0.9}))
    for name in ("whole", "again", "parts"):
        (tmp_path / name).mkdir()
    whole = run_in(tmp_path / "whole", config)
    again = run_in(tmp_path / "again", config)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert run_in(tmp_path / "parts", config).status == "interrupted"
    parts = run_in(tmp_path / "parts", config, resume=True)
    assert whole.status == parts.status == "finished"
    assert repeatable(whole.metrics) == repeatable(again.metrics) == repeatable(parts.metrics)
    losses = [
        [(step, value) for step, name, value in history(tmp_path / folder, found.experiment_id) if name == "train_loss"]
        for folder, found in (("whole", whole), ("parts", parts))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_evaluations_come_after_each_period_and_at_the_end(corpus: Path, tmp_path: Path) -> None:
    found = run_in(tmp_path, config_from_dict(settings(corpus)))
    steps = [step for step, name, _ in history(tmp_path, found.experiment_id) if name == "val_loss"]
    assert steps == [5, 10, 12]


def test_a_model_learns_what_can_be_learned(corpus: Path, tmp_path: Path) -> None:
    """Half of the characters follow from those before; a model that knows only their frequency has about 2.7 nats."""
    config = settings(corpus, "goe", training_params={"max_steps": 120, "eval_every": 120})
    metrics = run_in(tmp_path, config_from_dict(config)).metrics
    assert metrics["final_val_loss"] < 1.5
    assert metrics["final_val_perplexity"] == pytest.approx(math.exp(metrics["final_val_loss"]))
    assert metrics["final_val_bits_per_byte"] == pytest.approx(metrics["final_val_loss"] / math.log(2))
    assert metrics["tokens_per_second"] > 0
    assert metrics["inference_flops_per_token"] == pytest.approx(metrics["inference_flops_per_sample"] / 16)


# -------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("options", "total", "evaluations"),
    [
        ({"max_steps": 12, "eval_every": 5}, 12, 3),
        ({"max_tokens": 1000, "eval_every": 4}, 8, 2),  # 8 x 16 tokens a step
        ({"max_tokens": 1000, "gradient_accumulation_steps": 2}, 4, 1),
    ],
)
def test_the_length_in_steps_or_tokens(options: dict[str, Any], total: int, evaluations: int, corpus: Path) -> None:
    given = settings(corpus)
    given["training_params"] = options
    config = config_from_dict(given)
    length = Length.of(config, prepare(config).data.train)
    assert (length.total, length.evaluations) == (total, evaluations)


def test_one_length_is_enough(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        config_from_dict(settings(corpus, training_params={"max_steps": 5, "max_tokens": 100}))
    given = settings(corpus)
    given["training_params"] = {}
    with pytest.raises(ConfigError, match="epochs"):
        config_from_dict(given)


# --------------------------------------------------------------------------------------------------------------- scores


def test_every_target_is_scored_once_whatever_the_batch(corpus: Path) -> None:
    prepared = prepare(config_from_dict(settings(corpus)))
    task = task_of(None, prepared.data)
    validation, found = prepared.data.validation, []
    for batch_size in (1, 7, 64):
        batches = validation.batches(batch_size)
        found.append(evaluate(prepared.model, batches, prepared.data.vocab_size, prepared.runtime, task))
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-6)
    assert found[0].loss == pytest.approx(found[2].loss, abs=1e-6)
    text = (corpus / "validation.txt").read_text(encoding="utf-8")
    assert found[0].details["scored_targets"] == [len(text) - 1]
    assert found[0].loss == pytest.approx(math.log(prepared.data.vocab_size), abs=1e-5), "the head starts at zero"


def test_unknown_characters_are_not_scored(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text((corpus / "train.txt").read_text())
    (tmp_path / "validation.txt").write_text("the king, €, a rose\n" * 3)
    prepared = prepare(config_from_dict(settings(tmp_path)))
    task = task_of(None, prepared.data)
    batches = prepared.data.validation.batches(4)
    found = evaluate(prepared.model, batches, prepared.data.vocab_size, prepared.runtime, task)
    assert found.details["scored_targets"] == [20 * 3 - 1 - 3]


# ----------------------------------------------------------------------------------------------------------------- muon


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 20, 8), (1, 8, 20), (2, 12, 12)):
        matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
        values = torch.linalg.svdvals(orthogonalised(matrices))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_each_expert_is_a_matrix_of_its_own() -> None:
    torch.manual_seed(0)
    stack = ExpertMatrix(3, 8, 6)
    apart = nn.ModuleList(ExpertMatrix(1, 8, 6) for _ in range(3))
    gradient = torch.randn(3, 6, 8)
    for number, one in enumerate(apart):
        assert isinstance(one, ExpertMatrix)
        one.weight.data.copy_(stack.weight.data[number : number + 1])
        one.weight.grad = gradient[number : number + 1].clone()
    stack.weight.grad = gradient.clone()
    params = OptimizerParams(name="muon", lr=0.1, weight_decay=0.1)
    for module in (stack, apart):
        build_optimizer(module, params).step()
    joined = torch.cat([one.weight for one in apart if isinstance(one, ExpertMatrix)])
    assert torch.allclose(stack.weight, joined, atol=1e-6)


def test_maps_that_stand_side_by_side_are_taken_apart() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2)
    before = attention.input.weight.detach().clone()
    attention.input.weight.grad = torch.randn_like(before)
    gradient = attention.input.weight.grad.clone()
    build_optimizer(attention, OptimizerParams(name="muon", lr=0.1, weight_decay=0.0)).step()
    momentum = gradient * 0.05
    update = gradient.lerp(momentum, 0.95)
    expected = torch.cat([orthogonalised(part) for part in update.chunk(3, 1)], 1)
    assert torch.allclose(before - attention.input.weight, 0.1 * expected, atol=1e-5)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    from research_eval.annotations import build

    model = build(LANGUAGE_MODELS["goe"], {"vocab_size": 9, "max_length": 8, **POOL, "bigram_buckets": 5})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimizerParams(name="muon", lr=0.1, adam_lr=0.01, router_lr_mult=0.5))
    found = {names[id(one)]: group for group in groups for one in group["params"]}
    assert len(found) == len(names)
    for name, group in found.items():
        is_matrix = name.startswith(("layers.", "experts."))
        assert bool(group["factors"]) is is_matrix, name
        assert group["lr"] == (0.1 if is_matrix else 0.005 if "router" in name.split(".") else 0.01), name


def test_the_other_half_is_torch_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Embedding(5, 4), nn.Embedding(5, 4)
    theirs.load_state_dict(ours.state_dict())
    muon = build_optimizer(ours, OptimizerParams(name="muon", lr=0.1, adam_lr=0.02))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    assert isinstance(muon, Muon)
    for _ in range(4):
        gradient = torch.randn(5, 4)
        for module, optimizer in ((ours, muon), (theirs, adamw)):
            module.weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"name": "adamw", "adam_lr": 0.1}, "unless name is 'muon'"),
        ({"name": "muon", "momentum": 0.9}, "name is 'sgd'"),
    ],
)
def test_options_of_another_rule_are_refused(options: dict[str, Any], part: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=part):
        config_from_dict(settings(corpus, optimizer_params=options))


def test_running_text_has_its_own_defaults(corpus: Path) -> None:
    config = config_from_dict(settings(corpus))
    assert (config.optimizer_params.name, config.optimizer_params.lr) == ("muon", 0.02)
    assert config.scheduler_params.name == "wsd"
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    adamw = config_from_dict(settings(corpus, optimizer_params={"name": "adamw"}))
    assert adamw.optimizer_params.lr == 1e-3
    faster = config_from_dict(settings(corpus, optimizer_params={"lr": 0.1}))
    assert (faster.optimizer_params.name, faster.optimizer_params.lr) == ("muon", 0.1)


def test_a_classifier_trains_with_muon(tmp_path: Path) -> None:
    given = {
        "model_type": "moe",
        "dataset_type": "synthetic",
        "dataset_name": "majority",
        "epochs": 1,
        "batch_size": 16,
    }
    given |= {"dataset_params": {"num_samples": 60}, "model_params": {"embed_dim": 16}}
    given |= {"optimizer_params": {"name": "muon", "lr": 0.02}, "training_params": {"device": "cpu"}}
    assert run_in(tmp_path, config_from_dict(given)).status == "finished"


def test_the_sliding_loss_is_that_of_windows_with_more_context(corpus: Path, tmp_path: Path) -> None:
    data = {"eval_stride": 4}
    config = config_from_dict(settings(corpus, training_params={"max_steps": 30}, dataset_params=data))
    metrics = run_in(tmp_path, config).metrics
    assert metrics["final_val_loss_sliding"] != metrics["final_val_loss"]
    assert metrics["final_val_loss_sliding"] == pytest.approx(metrics["final_val_loss"], abs=0.3)
    assert metrics["generalisation_gap"] < metrics["final_val_loss"]


def test_the_loss_by_position_averages_to_the_loss(corpus: Path, tmp_path: Path) -> None:
    metrics = run_in(tmp_path, config_from_dict(settings(corpus))).metrics
    bands = metrics["val_loss_by_position"]
    assert len(bands) == 8
    assert np.mean(bands) == pytest.approx(metrics["final_val_loss"], abs=0.02)  # the last block may be shorter


def test_a_study_searches_the_rates_of_muon(corpus: Path) -> None:
    base = {"dataset_type": "language_modeling", "dataset_name": "verses", "dataset_params": {"data_dir": str(corpus)}}
    space = build_space(["goe"], base, {})
    domains = {parameter.name: parameter.domain for parameter in space.parameters["goe"]}
    assert vars(domains["optimizer_params.lr"]) == vars(Range(5e-3, 0.1, log=True))
    assert "optimizer_params.weight_decay" in domains
    assert space.base["optimizer_params"]["name"] == "muon"
    other = build_space(["goe"], base, {"optimizer_params": {"name": "adamw", "lr": {"low": 1e-3, "high": 1e-2}}})
    assert other.base["optimizer_params"]["name"] == "adamw"


class Unigram(torch.nn.Module):
    """One vector of logits for every token, and the mean loss over the targets that count."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_V = torch.nn.Parameter(torch.zeros(4))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        targets_S = batch.labels.flatten()
        loss = F.cross_entropy(self.logits_V.expand(len(targets_S), -1), targets_S, ignore_index=IGNORED)
        return loss, {"train_loss": loss}


def test_accumulated_batches_count_every_target_once() -> None:
    """The second batch has as many rows as the first and a fifth of its targets."""
    labels_BL = torch.tensor([[0, 1, 1, 2, 1], [3, IGNORED, IGNORED, IGNORED, IGNORED]])
    found = []
    for parts in ([labels_BL], labels_BL.split(1)):
        model = Unigram()
        batches = [Batch(part, part >= 0, part) for part in parts]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        take_step(model, batches, optimizer, None, Runtime("cpu", "fp32"), Meter())
        found.append(model.logits_V.detach())
    assert_close(found[0], found[1])


def test_the_log_counts_every_target_once() -> None:
    labels_BL = torch.tensor([[0, 1, 1, 2, 1], [3, IGNORED, IGNORED, IGNORED, IGNORED]])
    model, meter = Unigram(), Meter()
    with torch.no_grad():
        model.logits_V.copy_(torch.arange(4.0))
    for part in labels_BL.split(1):
        meter.add(model(Batch(part, part >= 0, part))[1], Batch(part, part >= 0, part))
    whole = model(Batch(labels_BL, labels_BL >= 0, labels_BL))[0]
    assert meter.read()["train_loss"] == pytest.approx(float(whole.detach()))


def test_texts_written_during_the_training_change_nothing_and_survive_a_resume(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config_from_dict(settings(corpus, "goe"))
    written = config_from_dict(settings(corpus, "goe", training_params={"sample_during_training": 30}))
    for name in ("plain", "whole", "parts"):
        (tmp_path / name).mkdir()
    expected = repeatable(run_in(tmp_path / "plain", plain).metrics)
    whole = run_in(tmp_path / "whole", written)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert run_in(tmp_path / "parts", written).status == "interrupted"
    parts = run_in(tmp_path / "parts", written, resume=True)
    assert repeatable(whole.metrics) == repeatable(parts.metrics) == expected
    with contextlib.chdir(tmp_path / "whole"):
        samples = read_samples(whole.folder)
        assert main(["--dataset_name", "verses", "--run_report", "--output_dir", "out", "--db", DB_FILE]) == 0
    assert [sample.step for sample in samples] == [5, 10, 12]
    assert {len(sample.text) for sample in samples} == {30}
    assert len({sample.text for sample in samples}) > 1  # the weights differ
    with contextlib.chdir(tmp_path / "parts"):
        assert read_samples(parts.folder) == samples
    (report,) = (tmp_path / "whole" / "out").glob("*.html")
    page = report.read_text(encoding="utf-8")
    assert html.escape(samples[-1].text, quote=False) in page


def test_a_classifier_writes_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training_params\.sample_during_training: 'parity' is no running text"):
        run_in(tmp_path, small_config(training_params={"sample_during_training": 10}))

"""Everything that can arrive as one new file arrives so: nothing else is edited.

Six files in one temporary folder: a model, a generated task, a kind of data, a task kind with its own loss, score and
direction of selection, a choice mode of `goe_original`, and a dispatcher that logs. Each trains from JSON and appears
in the store, the report and the JSON Schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Ended, python, write_config

from research_eval.db_utils import Store

FILES = {
    "a_model": """
        from torch import nn
        from research_eval.annotations import Count
        from research_eval.models.base_model import EvaluableModel
        from research_eval.registry import MODELS_MAP

        @MODELS_MAP.register("last_word")
        class LastWord(EvaluableModel):
            def __init__(self, *, vocab_size: int, num_classes: int, width: Count = 4) -> None:
                super().__init__()
                self.embedding = nn.Embedding(vocab_size, width)
                self.output = nn.Linear(width, num_classes)

            def forward(self, input_ids, attention_mask=None):
                last = attention_mask.sum(1, keepdim=True) - 1
                return self.output(self.embedding(input_ids.gather(1, last).squeeze(1)))
    """,
    "a_generated_task": """
        from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
        from research_eval.registry import SYNTHETIC_DATASETS

        @SYNTHETIC_DATASETS.register("ends_high")
        class EndsHigh(SequenceBaseDataset):
            def __init__(self, *, num_samples: int = 80, seq_len: int = 5) -> None:
                super().__init__(num_samples, seq_len, vocab_size=6)

            def _generate_data(self) -> None:
                ids = self.rng.integers(1, 7, (self.num_samples, self.seq_len))
                self.samples = ArraySamples(ids, (ids[:, -1] > 3).astype(int))
                self.labels_list = [0, 1]
    """,
    "a_kind_of_data": """
        import numpy as np
        from research_eval.datasets.kinds import DATASET_KINDS, DatasetKind
        from research_eval.datasets.token_data import DataSplits, TokenData

        class Coins:
            def __init__(self, *, size: int = 40) -> None:
                self.size = size

        @DATASET_KINDS.register("dice_box")
        class DiceBox(DatasetKind):
            def names(self):
                return ["coins"]

            def constructor(self, dataset_name):
                return Coins

            def splits(self, dataset_name, dataset_params, seed):
                def draw(rng):
                    ids = rng.integers(1, 3, (Coins(**dataset_params).size, 4))
                    return TokenData.from_padded(ids, (ids[:, 0] > 1).astype(int))

                train, validation = (draw(rng) for rng in np.random.default_rng(seed).spawn(2))
                return DataSplits(train, validation, None, 3, 2, ["heads", "tails"], 4)
    """,
    "a_task_kind": '''
        from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
        from research_eval.registry import SYNTHETIC_DATASETS, TASKS
        from research_eval.tasks.base import Evaluation, Task, mean_loss

        @TASKS.register("share")
        class Share(Task):
            """A number between 0 and 1: squared error, selected by the smallest root of its mean."""

            name = "share"
            selected_by = "rmse"

            def num_outputs(self, data):
                return 1

            def loss_per_sample(self, outputs_BO, targets_B, label_smoothing=0.0):
                return (outputs_BO.squeeze(1) - targets_B).square()

            def evaluation(self, answers_N, targets_N, losses_N, rows_N, num_outputs):
                rmse = float((answers_N.squeeze(1) - targets_N).square().mean().sqrt())
                return Evaluation(mean_loss(losses_N), {"rmse": rmse}, rows_N=rows_N, losses_N=losses_N.numpy())

        @SYNTHETIC_DATASETS.register("share_of_ones")
        class ShareOfOnes(SequenceBaseDataset):
            task = "share"

            def __init__(self, *, num_samples: int = 100, seq_len: int = 7) -> None:
                super().__init__(num_samples, seq_len, vocab_size=3)

            def _generate_data(self) -> None:
                ids = self.rng.integers(1, 4, (self.num_samples, self.seq_len))
                self.samples = ArraySamples(ids, (ids == 1).mean(1))
    ''',
    "a_choice_mode": """
        from research_eval.layers.path.choice import Gate
        from research_eval.layers.path.walk import Choice
        from research_eval.registry import CHOICES

        @CHOICES.register("second_best")
        class SecondBest(Gate):
            def choose(self, view, bias_N, done, training, may_stop):
                probabilities_BN = view.logits_BA[:, :-1].softmax(-1)
                chosen_BK, actions_BK = probabilities_BN.topk(2, dim=-1)
                return Choice(actions_BK[:, 1], self.strength(chosen_BK[:, 1]), probabilities_BN)
    """,
    "a_dispatcher": """
        import logging
        from research_eval.layers.dispatch import Dispatcher
        from research_eval.registry import DISPATCHERS

        log = logging.getLogger("research_eval.extension")

        @DISPATCHERS.register("loud")
        class Loud(Dispatcher):
            def dispatch(self, rows, plan, samples=None):
                log.info("dispatched %d rows to %d experts", len(rows), len(plan.counts()))
                return super().dispatch(rows, plan, samples)
    """,
}
SMALL = {"embed_dim": 8, "num_heads": 2, "num_total_experts": 3, "max_path_len": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "a_model": {"model_type": "last_word", "dataset_name": "ends_high", "dataset_params": {}, "epochs": 8},
    "a_generated_task": {"dataset_name": "ends_high", "dataset_params": {"num_samples": 60}},
    "a_kind_of_data": {"dataset_type": "dice_box", "dataset_name": "coins", "dataset_params": {"size": 50}},
    "a_task_kind": {"dataset_name": "share_of_ones", "dataset_params": {}, "epochs": 6},
    "a_choice_mode": {"model_type": "goe_original", "model_params": {**SMALL, "router_mode": "second_best"}},
    "a_dispatcher": {"model_type": "moe", "training_params": {"dispatcher": "loud"}},
}
# A word of each file that the JSON Schema has to offer.
IN_THE_SCHEMA = {
    "a_model": "last_word",
    "a_generated_task": "ends_high",
    "a_kind_of_data": "dice_box",
    "a_task_kind": "share",
    "a_choice_mode": "second_best",
    "a_dispatcher": "loud",
}


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new_files")
    (folder / "new").mkdir()
    for name, text in FILES.items():
        lines = [line.removeprefix("        ") for line in text.splitlines()]
        (folder / "new" / f"{name}.py").write_text("\n".join(lines))
    return folder


def call(folder: Path, *arguments: str | Path) -> Ended:
    return python(*arguments, folder=folder, GOE_EXTENSIONS="new", GOE_DB="results.db")


@pytest.mark.parametrize("name", FILES)
def test_a_new_file_trains_from_json_and_appears_in_the_store_and_the_report(name: str, folder: Path) -> None:
    config = write_config(folder, experiment_name=name, **CONFIGS[name])
    ended = call(folder, ROOT / "research_eval" / "main.py", "--json_config_path", config)
    assert ended.code == 0, ended.err
    with Store(str(folder / "results.db"), read_only=True) as store:
        (row,) = [row for row in store.experiments() if row["experiment_name"] == name]
        metrics = store.metrics(row["experiment_id"])
        history = store.history(row["experiment_id"])
    assert row["status"] == "finished"
    stored = json.loads(row["full_config_json"])
    if name == "a_task_kind":  # its own loss and score; the smallest error selects the weights
        errors = [point.value for point in history if point.name == "val_rmse"]
        assert metrics["best_val_rmse_across_epochs"] == min(errors)
        assert metrics["final_val_rmse"] == errors[-1]
        assert metrics["final_val_loss"] == pytest.approx(errors[-1] ** 2, rel=1e-5)
        assert not [key for key in metrics if "f1" in key or "acc" in key]
    elif name == "a_choice_mode":
        assert stored["model_params"]["router_mode"] == "second_best"
        assert metrics["mean_path_length"] == 2
    elif name == "a_dispatcher":
        assert stored["training_params"]["dispatcher"] == "loud"
        assert "rows to 4 experts" in ended.err
    elif name == "a_model":
        assert metrics["final_val_f1"] > 0.6
    report = call(
        *(folder, ROOT / "research_eval" / "analyze_results.py", "--dataset_name", row["dataset_name"]),
        *("--run_report", "--run_summary_table", "--output_dir", f"analysis_{name}"),
    )
    assert report.code == 0, report.err
    (path,) = (folder / f"analysis_{name}").glob("*_report.html")
    page = path.read_text()
    assert row["model_type"] in page
    assert name in page


def test_the_json_schema_offers_what_the_new_files_bring(folder: Path) -> None:
    schema = json.loads(call(folder, "-m", "research_eval.schema").out)

    def words(part: Any) -> set[str]:
        """All values that the schema permits somewhere."""
        if isinstance(part, dict):
            own = {*part.get("enum", ()), *([part["const"]] if "const" in part else ())}
            return {word for word in own if isinstance(word, str)}.union(*map(words, part.values()))
        return set().union(*map(words, part)) if isinstance(part, list) else set()

    assert words(schema) >= set(IN_THE_SCHEMA.values())


def test_a_wrong_name_is_one_message_that_knows_the_new_ones(folder: Path) -> None:
    wrong = {
        "expected one of 'local', 'loud', got \"lout\". Did you mean 'loud'?": {
            "training_params": {"dispatcher": "lout"}
        },
        "'second_best', got \"second_rest\". Did you mean 'second_best'?": {
            "model_type": "goe_original",
            "model_params": {"router_mode": "second_rest"},
        },
        "got \"shore\". Did you mean 'share'?": {"task": "shore"},
    }
    for complaint, changes in wrong.items():
        config = write_config(folder, **changes)
        ended = call(folder, ROOT / "research_eval" / "main.py", "--json_config_path", config)
        assert (ended.code, ended.out) == (2, "")
        assert complaint in ended.err and len(ended.err.splitlines()) == 1

"""The developer guide followed by hand: entries in `main.py` and in `datasets/providers.py` are known to every command.

A copy of the package is edited as a user would, and each command is a new process of this copy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import ROOT, Ended, python, results, write_config

from research_eval.db_utils import Store

MODEL = '''
"""A model with the methods of the guide, and without a decorator."""

from torch import nn

from research_eval.models.base_model import EvaluableModel


class MyNewModelClass(EvaluableModel):
    def __init__(self, vocab_size: int, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.table, self.output = nn.Embedding(vocab_size, width), nn.Linear(width, num_classes)

    def forward(self, input_ids, attention_mask=None):
        return self.output(self.table(input_ids).mean(1))

    def get_parameter_count(self) -> int:
        from research_eval.main import get_trainable_parameter_count

        return get_trainable_parameter_count(self)

    def get_model_name(self) -> str:
        return "my_new_model"

    def get_model_specific_metrics(self):
        return {"my_custom_metric": 7.0}
'''
TASK = '''
"""Is the first token a 1?"""

from research_eval.datasets.base_dataset import SequenceBaseDataset


class MyTask(SequenceBaseDataset):
    def __init__(self, num_samples: int = 60, seq_len: int = 3, vocab_size: int = 4) -> None:
        super().__init__(num_samples, seq_len, vocab_size)

    def _generate_data(self) -> None:
        ids_NL = self.rng.integers(1, self.vocab_size + 1, (self.num_samples, self.seq_len)).tolist()
        self.samples = [{"input_ids": ids_L, "label": int(ids_L[0] == 1)} for ids_L in ids_NL]
        self.labels_list = [0, 1]
'''
# File -> what a user adds, each behind a line that is there.
EDITS = {
    "main.py": {
        "from research_eval.registry import MODELS_MAP as MODELS_MAP\n": (
            "from research_eval.models.my_new_model import MyNewModelClass\n"
        ),
        '# entered here: MODELS_MAP["my_new_model"] = MyNewModelClass\n': (
            'MODELS_MAP["my_new_model"] = MyNewModelClass\n'
        ),
    },
    "datasets/providers.py": {
        "from research_eval.registry import SYNTHETIC_DATASETS\n": (
            "from research_eval.datasets.my_synthetic_dataset import MyTask\n"
        ),
        "REAL_WORLD_DATASETS: list[str] = list(TEXT_FIELDS)\n": (
            'REAL_WORLD_DATASETS.append("my_reviews")\nSYNTHETIC_DATASETS["my_task"] = MyTask\n'
        ),
    },
}
GOE = "import sys; from research_eval.main import cli; sys.exit(cli(sys.argv[1:]))"
# A program that has no reason of its own to import `research_eval.main`.
PROGRAM = """
import sys
from research_eval.datasets.kinds import dataset_kind
from research_eval.registry import MODELS_MAP
from research_eval.runs.predict import predict
print([name for name in MODELS_MAP if name == "my_new_model"], MODELS_MAP["my_new_model"].__module__)
dataset_kind("synthetic").check_name("my_task", {})
dataset_kind("real_world").check_name("my_reviews", {})
print(predict(sys.argv[1], ["1 2 3"], device="cpu")[0].label)
"""


class Guide:
    """The edited copy, and a working directory with one finished run."""

    def __init__(self, folder: Path) -> None:
        self.package, self.work = folder / "copy" / "research_eval", folder / "work"
        self.work.mkdir()
        shutil.copytree(ROOT / "research_eval", self.package, ignore=shutil.ignore_patterns("__pycache__"))
        (self.package / "models" / "my_new_model.py").write_text(MODEL)
        (self.package / "datasets" / "my_synthetic_dataset.py").write_text(TASK)
        for name, additions in EDITS.items():
            text = (self.package / name).read_text()
            for line, addition in additions.items():
                assert line in text, f"{name} has no line {line!r} any more: where does the guide say to edit it?"
                text = text.replace(line, line + addition)
            (self.package / name).write_text(text)
        changes = {"model_type": "my_new_model", "dataset_name": "my_task", "dataset_params": {}, "epochs": 1}
        self.config = write_config(self.work, **changes, model_params={"width": 2})
        self.script("main.py", "--json_config_path", self.config, "--quiet")
        with results(self.work) as store:
            (row,) = store.experiments()
            assert row["status"] == "finished"
            assert store.metrics(row["experiment_id"])["my_custom_metric"] == 7
        self.run_id = str(row["experiment_id"])

    def script(self, name: str, *arguments: str | Path) -> Ended:
        """Run a script of the copy by its path."""
        return checked(python(self.package / name, *arguments, folder=self.work, PYTHONPATH=""))

    def program(self, text: str, *arguments: str | Path) -> Ended:
        """Run a program that finds the copy; a `multiprocessing` child knows nothing of such a program."""
        return checked(python("-c", text, *arguments, folder=self.work, PYTHONPATH=str(self.package.parent)))

    def finished(self, db: str) -> list[int]:
        """The seeds of the finished runs in a database, in order."""
        with Store(str(self.work / db), read_only=True) as store:
            return sorted(int(row["seed"]) for row in store.experiments() if row["status"] == "finished")


def checked(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(name="guide", scope="module")
def _guide(tmp_path_factory: pytest.TempPathFactory) -> Guide:
    return Guide(tmp_path_factory.mktemp("guide"))


def test_a_new_process_knows_the_entries_without_importing_main(guide: Guide) -> None:
    *names, label = guide.program(PROGRAM, guide.run_id).out.split()
    assert names == ["['my_new_model']", "research_eval.models.my_new_model"]
    assert label in ("0", "1")


def test_seeds_run_in_processes_of_their_own(guide: Guide) -> None:
    guide.program(GOE, "run", "--json_config_path", guide.config, "--seeds", "0-1", "--quiet", "--db", "seeds.db")
    guide.script("main.py", "--json_config_path", guide.config, "--seeds", "2-3", "--quiet", "--db", "seeds.db")
    assert guide.finished("seeds.db") == [0, 1, 2, 3]


def test_a_study_with_workers(guide: Guide) -> None:
    space = guide.work / "space.json"
    space.write_text(json.dumps({"dataset_params": {"num_samples": 40}}))
    flags = ("--dataset_name", "my_task", "--model_types", "my_new_model", "--n_trials", "2", "--n_jobs", "2")
    guide.script("main.py", *flags, "--epochs", "1", "--search_space", space, "--quiet", "--db", "study.db")
    assert len(guide.finished("study.db")) == 2


def test_results_are_analyzed_and_new_configs_suggested(guide: Guide) -> None:
    assert "my_new_model" in guide.script("analyze_results.py", "--dataset_name", "my_task").out
    few = ("--top_n", "1", "--num_variations_per_config", "1")
    words = ("--dataset_name", "my_task", "--model_type", "my_new_model", *few, "--quiet")
    (path,) = guide.script("suggest_configs.py", *words).out.split()
    assert json.loads((guide.work / path).read_text())["model_type"] == "my_new_model"


def test_a_run_is_predicted_from_and_run_again(guide: Guide) -> None:
    assert guide.program(GOE, "predict", "--run", guide.run_id, "--text", "1 2 3").out.startswith("1 2 3\n")
    guide.program(GOE, "replay", guide.run_id, "--tolerance", "0", "--quiet")

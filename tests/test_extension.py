"""Models and data sets of other people, written and entered as the developer guide says."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, Ended, command, history, python, results, run_in, small_config, write_config
from torch import nn

from research_eval.datasets import providers
from research_eval.datasets.base_dataset import SequenceBaseDataset
from research_eval.datasets.providers import SYNTHETIC_DATASETS, get_synthetic_data_loaders
from research_eval.db_utils import Store
from research_eval.errors import ConfigError
from research_eval.experiment import prepare
from research_eval.main import MODELS_MAP, _create_model_internal, get_trainable_parameter_count, main
from research_eval.models.base_model import EvaluableModel, adapt
from research_eval.registry import Registry
from research_eval.runs.predict import predict
from research_eval.schema import load_config
from research_eval.training.checkpoint import load_tensors
from research_eval.training.fit import MODEL_FILE

EXAMPLES = sorted((ROOT / "examples" / "configs").glob("*.json"))


class CountingModel(EvaluableModel):
    """Inherits; overrides the two optional methods. `pull` has no part in the logits."""

    def __init__(self, vocab_size, num_classes, padding_idx, width=4, pull_strength=0.25):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=padding_idx)
        self.output = nn.Linear(width, num_classes)
        self.pull = nn.Parameter(torch.full((3,), 2.0))
        self.pull_strength = pull_strength
        self.samples_seen = 0

    def forward(self, input_ids, attention_mask=None):
        self.samples_seen += len(input_ids)
        return self.output(self.embedding(input_ids).mean(1))

    def get_parameter_count(self) -> int:
        return get_trainable_parameter_count(self)

    def get_model_name(self) -> str:
        return "counting"

    def get_auxiliary_loss(self):
        return self.pull_strength * self.pull.square().sum()

    def get_model_specific_metrics(self):
        return {
            "pull_values": self.pull.detach(),
            "pull_norm": self.pull.norm().item(),
            "table": [[1, 2.5], []],
            "nothing": None,
        }


class ForeignModel(nn.Module):
    """The same documented methods without the base class, and with a further argument of `forward`."""

    def __init__(self, vocab_size, num_classes, hidden_units, **extra):
        super().__init__()
        self.extra = extra
        self.embedding = nn.Embedding(vocab_size, hidden_units)
        self.output = nn.Linear(hidden_units, num_classes)
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.pull = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, input_ids, attention_mask=None, return_states=False):
        assert attention_mask.dtype == torch.bool and attention_mask.shape == input_ids.shape
        states = self.embedding(input_ids).mean(1)
        return states if return_states else self.output(states)

    def get_parameter_count(self):
        return get_trainable_parameter_count(self)

    def get_model_name(self):
        return "foreign"

    def get_auxiliary_loss(self):
        return 0.25 * (self.pull**2).sum()

    def get_model_specific_metrics(self):
        return {"pull_norm": self.pull.norm().item(), "per_unit": self.embedding.weight.mean(0).tolist()}


class BareModel(nn.Module):
    """Nothing but `forward`."""

    def __init__(self, vocab_size, num_classes):
        super().__init__()
        self.table = nn.Embedding(vocab_size, num_classes)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids).mean(1)


class QuietModel(BareModel):
    """The optional methods are there and have nothing to say."""

    def get_auxiliary_loss(self):
        return 0.0

    def get_model_specific_metrics(self):
        return None


class FirstTokenDataset(SequenceBaseDataset):
    """Which token comes first? A list of dicts, labels of text, a parameter of its own, Python's own generator."""

    def __init__(self, num_samples, seq_len, vocab_size, letters=("a", "b", "c")):
        super().__init__(num_samples, seq_len, vocab_size)
        self.letters = letters

    def _generate_data(self):
        self.samples = []
        self.labels_list = list(self.letters)
        for _ in range(self.num_samples):
            first = random.randrange(len(self.letters))
            rest = [random.randint(1, self.vocab_size) for _ in range(random.randrange(self.seq_len))]
            self.samples.append({"input_ids": [first + 1, *rest], "label": self.letters[first]})


@pytest.fixture(autouse=True)
def _entered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, cls in {
        "counting": CountingModel,
        "foreign": ForeignModel,
        "bare": BareModel,
        "quiet": QuietModel,
    }.items():
        monkeypatch.setitem(MODELS_MAP, name, cls)
    monkeypatch.setitem(SYNTHETIC_DATASETS, "first_token", FirstTokenDataset)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOE_DB", raising=False)


def run_stored(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[tuple[int, str, float]], Path]:
    """Metrics and history from the database after the command has run the config, and the run's folder."""
    ended = command(main, "--json_config_path", write_config(folder, **changes), "--quiet")
    assert ended.code == 0, ended.err
    with results(folder) as store:
        row = store.experiments()[-1]
        metrics = store.metrics(row["experiment_id"])
    assert row["status"] == "finished"
    return metrics, history(folder, row["experiment_id"]), folder / "runs" / row["experiment_id"]


# ---------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("model_type", "params"),
    [("counting", {"width": 6}), ("foreign", {"hidden_units": 6, "anything": [1, {"a": 2}]})],
)
def test_an_auxiliary_loss_trains_the_weights_and_is_in_the_history(
    model_type: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """Gradient descent on 0.5 * 0.25 |pull|^2 alone shrinks `pull` by the same factor in each of the ten steps."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "grad_clip_norm": None}
    metrics, points, _ = run_stored(
        tmp_path, model_type=model_type, model_params=params, optimizer_params={**sgd, "aux_loss_coeff": 0.5}
    )
    squares = [3 * (2.0 * (1 - 0.1 * 0.5 * 0.25 * 2) ** step) ** 2 for step in range(11)]
    assert metrics["pull_norm"] == pytest.approx(squares[10] ** 0.5, rel=1e-5)
    series = {name: {step: value for step, other, value in points if other == name} for _, name, _ in points}
    raw, weighted = series["auxiliary_loss_raw"], series["auxiliary_loss_weighted"]
    assert raw[2] == pytest.approx(0.25 * (squares[0] + squares[1]) / 2, rel=1e-5)  # a mean over the steps since
    assert raw[10] == pytest.approx(0.25 * (squares[8] + squares[9]) / 2, rel=1e-5)  # the last report
    for step, value in raw.items():
        assert weighted[step] == pytest.approx(0.5 * value, rel=1e-6)
        assert series["train_loss"][step] == pytest.approx(series["train_task_loss"][step] + weighted[step], rel=1e-5)
    assert series["pull_norm"][10] == metrics["pull_norm"]


def test_metrics_of_all_kinds_are_in_the_database(tmp_path: Path) -> None:
    metrics, _, _ = run_stored(tmp_path, model_type="counting")
    assert metrics["pull_values"] == pytest.approx([metrics["pull_norm"] / 3**0.5] * 3)
    assert metrics["table"] == [[1, 2.5], []]
    assert metrics["nothing"] != metrics["nothing"]  # not measured
    assert metrics["param_count"] == metrics["active_param_count"] == 3 * 4 + 4 * 2 + 2 + 3
    foreign, _, _ = run_stored(tmp_path, model_type="foreign", model_params={"hidden_units": 6})
    assert len(foreign["per_unit"]) == 6
    assert foreign["param_count"] == 3 * 6 + 6 * 2 + 2 + 3  # `frozen` is not trained


@pytest.mark.parametrize("model_type", ["bare", "quiet"])
def test_forward_is_enough(model_type: str, tmp_path: Path) -> None:
    metrics, points, folder = run_stored(tmp_path, model_type=model_type)
    assert metrics["param_count"] == 6 and 0 < metrics["final_val_loss"] < 2
    assert not [name for _, name, _ in points if "auxiliary" in name]
    assert set(load_tensors(folder / MODEL_FILE)[0]) == {"model.table.weight"}


def test_extensions_can_do_what_our_models_can(tmp_path: Path) -> None:
    """Be averaged, accumulated, trained in bf16, tested, and predicted from."""
    options = {"ema_decay": 0.5, "gradient_accumulation_steps": 2, "precision": "bf16", "test": True}
    metrics, _, folder = run_stored(
        tmp_path, model_type="foreign", model_params={"hidden_units": 4}, training_params=options
    )
    assert {"test_f1", "inference_flops_per_sample"} <= metrics.keys()
    (prediction,) = predict(folder.name, ["1 2 1"], device="cpu")
    assert prediction.path is None and sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-2)


def test_the_parameters_in_the_config_are_those_of_the_constructor(tmp_path: Path) -> None:
    _, _, model = prepare(small_config(model_type="counting", model_params={"width": 9}))
    assert isinstance(model, CountingModel) and model.output.in_features == 9
    assert model.get_model_name() == "counting"
    _, _, adapted = prepare(small_config(model_type="foreign", model_params={"hidden_units": 7, "anything": 1}))
    assert adapted.model.extra == {"anything": 1, "padding_idx": 0}
    with pytest.raises(ConfigError, match="missing key 'hidden_units'"):
        small_config(model_type="foreign")
    with pytest.raises(ConfigError, match=r"unknown key 'widht'\. Did you mean 'width'\?"):
        small_config(model_type="counting", model_params={"widht": 9})


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'dict' is a dict, expected a torch\.nn\.Module"):
        adapt({}, "dict")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- data sets


def test_a_dataset_class_is_enough_for_a_synthetic_task(tmp_path: Path) -> None:
    params = {"num_samples": 300, "seq_len": 4, "vocab_size": 9, "letters": ["x", "y"]}
    changes = {"dataset_name": "first_token", "dataset_params": params, "epochs": 8, "model_params": {"pool": "first"}}
    metrics, _, folder = run_stored(tmp_path, optimizer_params={"lr": 0.02}, **changes)
    assert metrics["final_val_f1"] == 1.0  # it can be learned, so inputs and labels belong together
    description = json.loads((folder / "data.json").read_text())
    assert description["label_names"] == ["x", "y"] and description["vocab_size"] == 10
    train, validation, splits = get_synthetic_data_loaders("first_token", params, batch_size=50)
    assert (len(train), len(splits.train), len(splits.validation)) == (5, 240, 60)
    for batch in [*train, *validation]:
        torch.testing.assert_close(batch.labels, batch.input_ids[:, 0] - 1)


def test_a_name_in_the_list_is_enough_for_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"dataset_type": "real_world", "dataset_name": "my_reviews", "dataset_params": {}}
    with pytest.raises(ConfigError, match="unknown 'my_reviews'"):
        small_config(**changes)
    monkeypatch.setattr(providers, "REAL_WORLD_DATASETS", [*providers.REAL_WORLD_DATASETS])
    providers.REAL_WORLD_DATASETS.append("my_reviews")
    small_config(**changes)
    (tmp_path / "reviews").mkdir()
    lines = ["text,label", *(f"{word} film number {number},{word}" for number in range(40) for word in ("good", "bad"))]
    (tmp_path / "reviews" / "train.csv").write_text("\n".join(lines))
    changes["dataset_params"] = {"data_dir": "reviews", "max_length": 5}
    metrics, _, folder = run_stored(tmp_path, optimizer_params={"lr": 0.02}, epochs=4, **changes)
    assert metrics["final_val_f1"] == 1.0
    assert json.loads((folder / "data.json").read_text())["label_names"] == ["bad", "good"]


# ------------------------------------------------------------------------------------------------------- new files

NEW_MODEL = """
import torch
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP

@MODELS_MAP.register("dropped_in")
class DroppedIn(EvaluableModel):
    model_type = "dropped_in"

    def __init__(self, *, vocab_size: int, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.table = torch.nn.Embedding(vocab_size, num_classes)

    def forward(self, input_ids, attention_mask=None):
        return self.scale * self.table(input_ids).mean(1)

    def get_auxiliary_loss(self):
        return self.table.weight.square().mean()

    def get_model_specific_metrics(self):
        return {"rows": self.table.weight.tolist()}
"""

NEW_DATASET = """
from research_eval.datasets import providers
from research_eval.datasets.base_dataset import SequenceBaseDataset
from research_eval.registry import SYNTHETIC_DATASETS

@SYNTHETIC_DATASETS.register("dropped_in_too")
class DroppedInToo(SequenceBaseDataset):
    def __init__(self, num_samples: int = 50, seq_len: int = 3, vocab_size: int = 4) -> None:
        super().__init__(num_samples, seq_len, vocab_size)

    def _generate_data(self) -> None:
        ids = self.rng.integers(1, self.vocab_size + 1, (self.num_samples, self.seq_len))
        self.samples = [{"input_ids": row, "label": int(row[0] > 2)} for row in ids]
        self.labels_list = [0, 1]
"""


def test_new_files_are_found_without_an_entry(tmp_path: Path) -> None:
    copy, work = tmp_path / "copy", tmp_path / "work"
    work.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "research_eval", copy / "research_eval", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "research_eval" / "models" / "my_new_model.py").write_text(NEW_MODEL)
    (copy / "research_eval" / "datasets" / "my_synthetic_dataset.py").write_text(NEW_DATASET)
    changes = {"model_type": "dropped_in", "dataset_name": "dropped_in_too", "dataset_params": {}}
    path = write_config(work, **changes, model_params={"scale": 2}, epochs=1)
    ended = python(
        copy / "research_eval" / "main.py", "--json_config_path", path, "--quiet", folder=work, PYTHONPATH=""
    )
    assert ended.code == 0, ended.err
    with results(work) as store:
        (row,) = store.experiments()
        metrics = store.metrics(row["experiment_id"])
        assert store.history(row["experiment_id"], "auxiliary_loss_raw")
    assert len(metrics["rows"]) == 5
    assert json.loads(row["full_config_json"])["dataset_params"] == {"num_samples": 50, "seq_len": 3, "vocab_size": 4}


# ------------------------------------------------------------------------------------------- folders of extensions


@pytest.fixture
def extensions(tmp_path: Path) -> Path:
    """A folder with one model and one synthetic task."""
    folder = tmp_path / "extensions"
    folder.mkdir()
    (folder / "my_model.py").write_text(NEW_MODEL)
    (folder / "my_task.py").write_text(NEW_DATASET)
    return folder


def run_with(folders: list[Path], work: Path, *flags: str) -> Ended:
    """A run of the model and the task above in a new process."""
    work.mkdir(exist_ok=True)
    changes = {"model_type": "dropped_in", "dataset_name": "dropped_in_too", "dataset_params": {}}
    path = write_config(work, **changes, model_params={"scale": 2}, epochs=1)
    script, variable = ROOT / "research_eval" / "main.py", os.pathsep.join(map(str, folders))
    return python(script, "--json_config_path", path, "--quiet", *flags, folder=work, GOE_EXTENSIONS=variable)


def test_files_of_an_extension_folder_are_found(extensions: Path, tmp_path: Path) -> None:
    (extensions / "notes.txt").write_text("not Python")
    other = tmp_path / "empty"
    other.mkdir()
    ended = run_with([other, extensions], tmp_path / "work")
    assert ended.code == 0, ended.err
    with results(tmp_path / "work") as store:
        assert [row["status"] for row in store.experiments()] == ["finished"]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("x = 1\nraise RuntimeError('not today')", "broken.py:2: RuntimeError: not today"),
        ("import no_such_library", "broken.py:1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemExit(0)", "broken.py:1: SystemExit: 0"),
        ("def f(:", "broken.py: SyntaxError: invalid syntax (broken.py, line 1)"),
    ],
)
def test_a_file_that_fails_is_one_message(code: str, complaint: str, extensions: Path, tmp_path: Path) -> None:
    (extensions / "broken.py").write_text(code)
    ended = run_with([extensions], tmp_path / "work")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.strip() == f"GOE_EXTENSIONS: {extensions}/{complaint}"


def test_a_name_that_is_taken_is_refused(extensions: Path, tmp_path: Path) -> None:
    """Without the base class the file is executed before our own files: the name is refused all the same."""
    (extensions / "my_model.py").write_text(
        "from research_eval.registry import MODELS_MAP\n@MODELS_MAP.register('dense')\nclass Mine: ...\n"
    )
    ended = run_with([extensions], tmp_path / "work")
    assert ended.code == 2
    assert re.search(r"model_type: 'dense' is already \S+\.(Mine|DenseTransformerClassifier)$", ended.err.strip())


def test_a_folder_that_is_not_there_is_one_message(extensions: Path, tmp_path: Path) -> None:
    ended = run_with([extensions, tmp_path / "nowhere"], tmp_path / "work")
    assert (ended.code, ended.err.strip()) == (2, f"GOE_EXTENSIONS: there is no folder '{tmp_path / 'nowhere'}'")


NEW_KIND = """
from typing import Annotated

import numpy as np
from research_eval.annotations import Choice
from research_eval.datasets.kinds import (DATASET_KINDS, DatasetKind)
from research_eval.datasets.token_data import (DataSplits, TokenData)

class Halves:
    def __init__(self, *, size: int, length: Annotated[int, Choice(2, 3)] = 2) -> None:
        if size < 4:
            raise ValueError(f"size={size} is too small")
        self.size, self.length = size, length

    def draw(self, rng):
        ids = rng.integers(1, 5, (self.size, self.length))
        return TokenData.from_padded(ids, (ids[:, 0] > 2).astype(int))

@DATASET_KINDS.register("drawn")
class Drawn(DatasetKind):
    provided = frozenset()
    generated = True

    def names(self):
        return ["halves", "thirds"]

    def constructor(self, dataset_name):
        return Halves

    def splits(self, dataset_name, dataset_params, seed):
        rng = np.random.default_rng(seed)
        train, validation = (Halves(**dataset_params).draw(rng) for _ in range(2))
        return DataSplits(train, validation, None, 5, 2, ["low", "high"], 3)
"""


def test_a_kind_of_data_is_one_new_file(tmp_path: Path) -> None:
    """The config check, the JSON Schema, a run, a study with workers, the results and the report know it."""
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    (extensions / "kind.py").write_text(NEW_KIND)
    main_script = ROOT / "research_eval" / "main.py"

    def call(*arguments: str | Path) -> Ended:
        return python(*arguments, folder=tmp_path, GOE_EXTENSIONS="extensions", GOE_DB="results.db")

    def write(**changes: Any) -> Path:
        changes = {"dataset_type": "drawn", "dataset_name": "halves", "dataset_params": {"size": 40}} | changes
        return write_config(tmp_path, **changes, epochs=1)

    kinds = "'synthetic', 'real_world', 'drawn', 'language_modeling'"
    complaints = {
        f"dataset_type: expected one of {kinds}, got \"drawm\". Did you mean 'drawn'?": {"dataset_type": "drawm"},
        "dataset_name: unknown 'halfes'. Did you mean 'halves'?": {"dataset_name": "halfes"},
        "dataset_params: unknown key 'lenght'. Did you mean 'length'?": {"dataset_params": {"size": 4, "lenght": 3}},
        "dataset_params: missing key 'size'": {"dataset_params": {}},
        "dataset_params: size=3 is too small": {"dataset_params": {"size": 3}},
    }
    files = [write(**changes).rename(tmp_path / f"{number}.json") for number, changes in enumerate(complaints.values())]
    program = "import sys\nfrom research_eval.main import cli\nfor name in sys.argv[1:]:\n    " + (
        "print(cli(['run', '--json_config_path', name, '--dry_run']), flush=True)"
    )
    ended = call("-c", program, *files)
    assert ended.out.split() == ["2"] * len(complaints)
    for complaint, line in zip(complaints, ended.err.strip().splitlines(), strict=True):
        assert re.fullmatch(rf"\S+: {re.escape(complaint)}", line), ended.err

    schema = json.loads(call("-m", "research_eval.schema").out)
    assert schema["properties"]["dataset_type"]["enum"] == ["synthetic", "real_world", "drawn", "language_modeling"]
    names = {"then": {"properties": {"dataset_name": {"enum": ["halves", "thirds"]}}}}
    (rule,) = [rule for rule in schema["allOf"] if names.items() <= rule.items()]
    assert rule["if"]["properties"] == {"dataset_type": {"const": "drawn"}}
    conditions = {"dataset_type": {"const": "drawn"}, "dataset_name": {"const": "halves"}}
    (rule,) = [rule for rule in schema["allOf"] if rule["if"]["properties"] == conditions]
    assert rule["then"]["required"] == ["dataset_params"]

    assert call(main_script, "--json_config_path", write(), "--dry_run").code == 0
    assert call(main_script, "--json_config_path", write(), "--quiet").code == 0
    study = ("--dataset_type", "drawn", "--dataset_name", "halves", "--model_types", "dense", "--n_trials", "2")
    space = tmp_path / "space.json"
    space.write_text(json.dumps({"dataset_params": {"size": 40}, "model_params": {"embed_dim": 8, "num_heads": 2}}))
    ended = call(main_script, *study, "--n_jobs", "2", "--epochs", "1", "--search_space", space, "--quiet")
    assert ended.code == 0, ended.err
    with Store(str(tmp_path / "results.db")) as store:
        rows = store.experiments()
    assert [(row["dataset_type"], row["dataset_name"], row["status"]) for row in rows] == [
        ("drawn", "halves", "finished")
    ] * 3
    assert {json.loads(row["full_config_json"])["dataset_params"]["length"] for row in rows} <= {2, 3}
    ended = call(ROOT / "research_eval" / "analyze_results.py", "--dataset_name", "halves")
    assert ended.code == 0, ended.err
    unknown = call(main_script, "--dataset_type", "drawm", *study[2:])
    assert (unknown.code, unknown.err.strip()) == (
        2,
        "--dataset_type: expected 'synthetic' or 'real_world' or 'language_modeling' or 'drawn', got 'drawm'. "
        "Did you mean 'drawn'?",
    )


COUNTED = """
from pathlib import Path
from research_eval.registry import MODELS_MAP, SYNTHETIC_DATASETS

with (Path(__file__).parent / "executed.txt").open("a") as file:
    file.write(Path(__file__).stem)
assert "parity" in SYNTHETIC_DATASETS  # a file may read a registry
MODELS_MAP[Path(__file__).stem] = type(Path(__file__).stem, (), {})
"""


def test_each_file_is_executed_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.py").write_text(COUNTED)
    program = """
from research_eval.registry import (MODELS_MAP, SYNTHETIC_DATASETS, load_extensions)
print([name for name in MODELS_MAP if name in "ab"], len(SYNTHETIC_DATASETS) > 10)
load_extensions()
"""
    ended = python("-c", program, folder=tmp_path, GOE_EXTENSIONS=str(tmp_path))
    assert (ended.code, ended.out.strip()) == (0, "['a', 'b'] True"), ended.err
    assert (tmp_path / "executed.txt").read_text() == "ab"


def test_a_mended_file_is_executed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where the process lives on after the message."""
    monkeypatch.setenv("GOE_EXTENSIONS", str(tmp_path))
    file = tmp_path / "mended.py"
    file.write_text("nonsense")
    registry = Registry[Any]("model_type", "research_eval.models")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"mended\.py:1: NameError: name 'nonsense' is not defined"):
            list(registry)
    file.write_text("sense = 1  # another length than before, for the cache of bytecode")
    list(registry)


ENTRY = """
from torch import nn

class Entered(nn.Module):
    def __init__(self, vocab_size: int, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.table, self.output = nn.Embedding(vocab_size, width), nn.Linear(width, num_classes)

    def forward(self, input_ids, attention_mask=None):
        return self.output(self.table(input_ids).mean(1))

MODELS_MAP["entered"] = Entered
"""


def test_an_entry_below_the_comment_in_main_is_known_to_every_command(tmp_path: Path) -> None:
    copy, work = tmp_path / "copy", tmp_path / "work"
    work.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "research_eval", copy / "research_eval", ignore=ignored)
    script = copy / "research_eval" / "main.py"
    comment = 'entered here: MODELS_MAP["my_new_model"] = MyNewModelClass\n'
    before, found, after = script.read_text().partition(comment)
    assert found, "the comment is part of the documentation"
    script.write_text(before + found + ENTRY + after)
    path = write_config(work, model_type="entered", model_params={"width": 2}, epochs=1)
    ended = python(script, "--json_config_path", path, "--quiet", folder=work, PYTHONPATH="")
    assert ended.code == 0, ended.err
    with results(work) as store:
        (row,) = store.experiments()
    goe = "import sys; from research_eval.main import cli; sys.exit(cli(sys.argv[1:]))"
    words = ("predict", "--run", row["experiment_id"], "--text", "1 2 1 2 1 2")
    ended = python("-c", goe, *words, folder=work, PYTHONPATH=str(copy))
    assert ended.code == 0, ended.err


# ------------------------------------------------------------------------------- the names that stay, and examples


@pytest.mark.parametrize(
    ("model_type", "params", "attribute", "value"),
    [
        ("dense", {"num_layers": 3}, "layers", 3),
        ("moe", {"num_experts_per_layer": 5, "num_layers": 1}, "num_experts", 5),
        ("moe", {"num_experts": 5, "num_layers": 1}, "num_experts", 5),
        ("goe", {"num_total_experts_pool": 3, "num_goe_layers": 2}, "router", 2),
        ("goe_original", {"num_total_experts": 3, "max_visits_per_expert": 7}, "path.max_visits", 7),
        ("goe_original", {"max_visits": 7}, "path.max_visits", 7),
    ],
)
def test_models_are_made_from_their_parameters(
    model_type: str, params: dict[str, Any], attribute: str, value: int
) -> None:
    small = {"embed_dim": 8, "num_heads": 2}
    model = _create_model_internal(model_type, 11, 4, 0, {**small, **params}, "cpu")
    found = attrgetter(attribute)(model)
    assert (found if isinstance(found, int) else len(found)) == value
    assert isinstance(model, MODELS_MAP[model_type]) and model.get_model_name() == model_type
    assert model(torch.tensor([[1, 10, 0]])).shape == (1, 4)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert get_trainable_parameter_count(model) == model.get_parameter_count() == trainable


def test_models_of_others_are_made_as_well() -> None:
    model = _create_model_internal("foreign", 11, 4, 0, {"hidden_units": 3}, torch.device("cpu"))
    assert isinstance(model, ForeignModel) and model.embedding.num_embeddings == 11


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"num_expert": 3}, "unknown key 'num_expert'. Did you mean 'num_experts'?"),
        ({"num_experts": 3, "num_experts_per_layer": 3}, "two spellings of one key"),
        ({"num_experts": 1, "top_k_experts": 2}, "top_k_experts=2 is more than num_experts=1"),
    ],
)
def test_wrong_parameters_are_explained(params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _create_model_internal("moe", 11, 4, 0, params, "cpu")
    assert complaint in str(caught.value)


def test_an_unknown_model_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"unknown 'goe_orignal'\. Did you mean 'goe_original'\?"):
        _create_model_internal("goe_orignal", 11, 4, 0, {}, "cpu")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_accepted_and_the_synthetic_ones_run(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.experiment_name
    if config.dataset_type == "synthetic":
        few = {"epochs": 1, "dataset_params.num_samples": 100, "training_params.device": "cpu"}
        end = run_in(tmp_path, load_config(path, few))
        assert (end.status, end.metrics["epochs_completed"]) == ("finished", 1)


def test_there_are_examples() -> None:
    assert "quickstart" in [path.stem for path in EXAMPLES]

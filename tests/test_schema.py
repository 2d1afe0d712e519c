from __future__ import annotations

import copy
import enum
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import Field
from support import python
from torch import nn

import research_eval
from research_eval import schema
from research_eval.config.jsonc import JsonSource
from research_eval.errors import ConfigError
from research_eval.models.base_model import EvaluableModel
from research_eval.registry import MODELS_MAP, SYNTHETIC_DATASETS
from research_eval.schema import (
    MODEL_PROVIDED,
    Aka,
    Count,
    ExperimentConfig,
    OptimizerParams,
    Share,
    config_from_dict,
    context_arguments,
    load_config,
    parse_config,
    signature_model,
)

if TYPE_CHECKING:
    from decimal import Decimal

PACKAGE = Path(research_eval.__file__).parent


class Tiny(EvaluableModel):
    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        padding_idx: int = 0,
        embed_dim: Count = 64,
        num_heads: Count = 4,
        num_experts: Annotated[Count, Aka("num_experts_per_layer", "experts")] = 8,
        top_k_experts: Count = 2,
        dropout: Share = 0.1,
        widths: tuple[int, ...] = (1, 2),
        mixed: int | str = 1,
    ) -> None:
        super().__init__()
        if top_k_experts > num_experts:
            raise ConfigError(f"top_k_experts={top_k_experts} is more than num_experts={num_experts}")
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx)
        self.head = nn.Linear(embed_dim, num_classes)


class Task:
    def __init__(
        self, num_samples: Count, seq_len: Annotated[Count, Aka("length")] = 8, vocab_size: Count = 2, seed: int = 0
    ) -> None:
        if vocab_size > 10:
            raise ConfigError(f"vocab_size={vocab_size} is more than 10")


class Colour(enum.Enum):
    RED = "red"


class Loose:
    """As a user may write it: no annotations, values that JSON cannot hold, names that pydantic keeps to itself."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        width,
        *args,
        schema=3,
        _hidden=4,
        pair=(1, 2),
        activation=math.sqrt,
        limit=math.inf,
        dtype=torch.float32,
        size: int = None,  # type: ignore[assignment]  # noqa: RUF013
        colour: Colour = Colour.RED,
        **kwargs,
    ) -> None:
        self.pair = pair + (3,)  # noqa: RUF005 - fails for a list


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS_MAP, "tiny", Tiny)
    monkeypatch.setitem(MODELS_MAP, "loose", Loose)
    monkeypatch.setitem(SYNTHETIC_DATASETS, "task", Task)


VALID: dict[str, Any] = {
    "experiment_name": "demo",
    "model_type": "tiny",
    "dataset_type": "synthetic",
    "dataset_name": "task",
    "epochs": 2,
    "batch_size": 8,
    "seed": 3,
    "dataset_params": {"num_samples": 100},
    "model_params": {"embed_dim": 16, "experts": 4, "widths": [1, 2, 3]},
    "optimizer_params": {"name": "sgd", "lr": 1, "momentum": 0.5, "grad_clip_norm": None},
    "scheduler_params": {"name": "cosine_warmup"},
    "training_params": {"device": "cpu", "eval_batch_size": 4},
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(VALID)
    *sections, name = path.split(".")
    target = config
    for section in sections:
        target = target[section]
    target[name] = value
    return config


def complaints(build: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build()
    return str(caught.value).split("\n")


# ------------------------------------------------------------------------------------------------ what is accepted


def test_the_checked_config_holds_every_parameter_under_its_canonical_name() -> None:
    config = config_from_dict(VALID)
    assert config.dataset_params == {"num_samples": 100, "seq_len": 8, "vocab_size": 2}
    assert config.model_params == {
        "embed_dim": 16,
        "num_heads": 4,
        "num_experts": 4,
        "top_k_experts": 2,
        "dropout": 0.1,
        "widths": (1, 2, 3),
        "mixed": 1,
    }
    assert config.optimizer_params.lr == 1.0
    assert type(config.optimizer_params.lr) is float
    assert config.optimizer_params.grad_clip_norm is None
    assert (config.experiment_name, config.seed) == ("demo", 3)


def test_what_is_left_out_has_documented_defaults() -> None:
    needed = ("model_type", "dataset_type", "dataset_name", "epochs", "batch_size", "dataset_params")
    config = config_from_dict({key: VALID[key] for key in needed})
    assert config.experiment_name == "tiny_task"
    assert config.seed == 0
    assert config.optimizer_params == OptimizerParams(name="adamw", lr=1e-3, weight_decay=0.01, grad_clip_norm=1.0)
    assert config.scheduler_params.name == "none"
    assert config.training_params.device == "auto"
    assert config.training_params.log_every == 50


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("model_type", sorted({*MODELS_MAP, "tiny"}))
def test_the_complete_config_gives_itself(model_type: str, optimizer: str) -> None:
    short = {**VALID, "model_type": model_type, "model_params": {}, "optimizer_params": {"name": optimizer}}
    config = config_from_dict(short)
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert config_from_dict(stored) == config
    assert parse_config(json.dumps(stored), "stored").to_dict() == stored


def test_a_loosely_written_class_is_accepted_and_its_config_gives_itself() -> None:
    config = config_from_dict({**VALID, "model_type": "loose", "model_params": {"width": [1], "more": 5}})
    assert config.model_params == {
        "width": [1],
        "more": 5,
        "schema": 3,
        "_hidden": 4,
        "pair": (1, 2),
        "size": None,
        "colour": Colour.RED,
    }
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    Loose(**again.model_params)


def test_a_loosely_written_class_is_checked_where_it_says_something() -> None:
    wrong = {"schema": "x", "size": "big", "colour": "blue", "activation": "relu"}
    found = complaints(lambda: config_from_dict({**VALID, "model_type": "loose", "model_params": wrong}))
    assert found == [
        "config: model_params: missing key 'width'",
        'config: model_params.size: expected int, got "big".',
        "config: model_params.colour: expected one of 'red', got \"blue\".",
    ]


def test_types_under_type_checking_only_leave_the_parameters_unchecked() -> None:
    class Lazy:
        def __init__(self, price: Decimal, count: int = 1) -> None: ...

    model = signature_model(Lazy, frozenset())
    assert model.model_validate({"price": "x", "count": "y"}).model_dump() == {"price": "x", "count": "y"}


def test_a_type_that_json_cannot_hold_has_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Typed:
        def __init__(self, dtype: torch.dtype = torch.float32, act: Callable[[float], float] = math.sqrt) -> None: ...

    # Defined in a function, so its annotations are resolved by hand.
    Typed.__init__.__annotations__.update(dtype=torch.dtype, act=Callable[[float], float])
    monkeypatch.setitem(MODELS_MAP, "typed", Typed)
    assert config_from_dict({**VALID, "model_type": "typed", "model_params": {}}).model_params == {}
    wrong = {"dtype": "float32", "act": "gelu"}
    assert complaints(lambda: config_from_dict({**VALID, "model_type": "typed", "model_params": wrong})) == [
        'config: model_params.dtype: must be left out, JSON has no such values, got "float32".',
        'config: model_params.act: must be left out, JSON has no functions, got "gelu".',
    ]


def test_comments_trailing_commas_and_the_schema_key_are_accepted() -> None:
    text = json.dumps(VALID, indent=2).replace('"demo"', '"a // b /* c */ \\" // d"').replace("\n}", ",\n}")
    text = text.replace("{\n", '{ // open\n "$schema": "experiment.schema.json",\n', 1)
    text = text.replace('"epochs"', '/* how\n long "epochs" */ "epochs"').replace("3\n    ]", "3, // last\n    ]")
    config = parse_config("\ufeff" + text.replace("\n", "\r\n") + "// end", "a.json")
    assert config.experiment_name == 'a // b /* c */ " // d'
    assert config == config_from_dict({**VALID, "experiment_name": config.experiment_name})


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("epochs", 0, "epochs: must be >= 1, got 0."),
        ("epochs", 10**12, "epochs: must be <= 2147483647, got 1000000000000."),
        ("epochs", True, "epochs: expected int, got true."),
        ("epochs", 1.0, "epochs: expected int, got 1.0."),
        ("epochs", "3", 'epochs: expected int, got "3".'),
        ("epochs", None, "epochs: expected int, got null."),
        ("seed", -1, "seed: must be >= 0, got -1."),
        ("experiment_name", "", 'experiment_name: must not be empty, got "".'),
        ("model_params", [1], "model_params: expected an object, got [1]."),
        ("training_params", None, "training_params: expected an object, got null."),
        ("modle_type", 1, "unknown key 'modle_type'. Did you mean 'model_type'?"),
        (
            "dataset_type",
            "synthetik",
            "dataset_type: expected one of 'synthetic', 'real_world', 'language_modeling', got \"synthetik\". "
            "Did you mean 'synthetic'?",
        ),
        ("model_type", "tinny", "model_type: unknown 'tinny'. Did you mean 'tiny'?"),
        ("dataset_name", "taskk", "dataset_name: unknown 'taskk'. Did you mean 'task'?"),
        ("model_params.num_expert", 3, "model_params: unknown key 'num_expert'. Did you mean 'num_experts'?"),
        ("model_params.top_k_experts", True, "model_params.top_k_experts: expected int, got true."),
        ("model_params.experts", 0, "model_params.experts: must be >= 1, got 0."),
        ("model_params.dropout", 1, "model_params.dropout: must be < 1, got 1."),
        ("model_params.dropout", True, "model_params.dropout: expected float, got true."),
        ("model_params.mixed", 1.5, "model_params.mixed: expected int or expected str, got 1.5."),
        ("model_params.widths", [1, "x"], 'model_params.widths[1]: expected int, got "x".'),
        (
            "model_params.num_experts",
            3,
            "model_params: 'experts' and 'num_experts' are two spellings of one key: keep one",
        ),
        ("model_params.vocab_size", 3, "model_params: 'vocab_size' is set by the program: leave it out"),
        ("dataset_params.seed", 3, "dataset_params: 'seed' is set by the program: leave it out"),
        ("model_params.top_k_experts", 5, "model_params: top_k_experts=5 is more than num_experts=4"),
        ("dataset_params.vocab_size", 11, "dataset_params: vocab_size=11 is more than 10"),
        ("dataset_params", {}, "dataset_params: missing key 'num_samples'"),
        (
            "optimizer_params.name",
            "adamw",
            "optimizer_params.momentum: must be left out unless name is 'sgd', got 0.5.",
        ),
        ("optimizer_params.lr", 0, "optimizer_params.lr: must be > 0, got 0."),
        ("optimizer_params.lr", math.nan, "optimizer_params.lr: must be finite, got NaN."),
        ("optimizer_params.lr_mult", 1, "optimizer_params: unknown key 'lr_mult'."),
        ("scheduler_params.warmup_factor", 1.0, "scheduler_params.warmup_factor: must be < 1, got 1.0."),
        ("scheduler_params.min_lr_factor", 1.5, "scheduler_params.min_lr_factor: must be <= 1, got 1.5."),
        ("training_params.test", 1, "training_params.test: expected bool, got 1."),
        ("training_params.num_threads", 0, "training_params.num_threads: must be >= 1, got 0."),
        (
            "training_params.device",
            "cuda:x",
            'training_params.device: expected auto, cpu, cuda, cuda:N or mps, got "cuda:x".',
        ),
    ],
)
def test_a_mistake_is_named_with_its_place_and_value(path: str, value: Any, complaint: str) -> None:
    (found,) = complaints(lambda: config_from_dict(with_value(path, value)))
    assert found.startswith(f"config: {complaint}")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_every_device_is_accepted(device: str) -> None:
    assert config_from_dict(with_value("training_params.device", device)).training_params.device == device


def test_real_world_names_need_the_list_or_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from research_eval.datasets.providers import REAL_WORLD_DATASETS

    config = {**VALID, "dataset_type": "real_world", "dataset_name": "ag_new", "dataset_params": {"max_lenght": 5}}
    assert complaints(lambda: config_from_dict(config)) == [
        "config: dataset_name: unknown 'ag_new'. Did you mean 'ag_news'? A set of your own needs "
        "dataset_params.data_dir or sources.",
        "config: dataset_params: unknown key 'max_lenght'. Did you mean 'max_length'?",
    ]
    assert config_from_dict({**config, "dataset_params": {"data_dir": "x"}}).dataset_params["data_dir"] == "x"
    monkeypatch.setattr("research_eval.datasets.providers.REAL_WORLD_DATASETS", [*REAL_WORLD_DATASETS, "ag_new"])
    assert config_from_dict({**config, "dataset_params": {}}).dataset_name == "ag_new"


def test_all_mistakes_of_a_file_are_reported_at_once_in_its_order() -> None:
    text = """\
{
  // a comment
  "model_type": "tiny", "dataset_type": "synthetic", "dataset_name": "tusk",
  "epochs": 0,
  "model_params": {
\t"num_heads": 1, /* two
    lines */ "num_expert": 3,
    "top_k_experts": true,
    "widths": [1,
      "x",
    ],
  },
  "epochs": 2, "batch_size": 1.5,
  "optimizer_params": {"name": "adam"}, "scheduler_params": {"name": "none", "name": "none"},
  "training_params": 3,
}
"""
    assert complaints(lambda: parse_config(text, "runs/a.json")) == [
        "runs/a.json:3: dataset_name: unknown 'tusk'. Did you mean 'task'?",
        "runs/a.json:7: model_params: unknown key 'num_expert'. Did you mean 'num_experts'?",
        "runs/a.json:8: model_params.top_k_experts: expected int, got true.",
        'runs/a.json:10: model_params.widths[1]: expected int, got "x".',
        "runs/a.json:13: duplicate key 'epochs', first on line 4",
        "runs/a.json:13: batch_size: expected int, got 1.5.",
        "runs/a.json:14: scheduler_params: duplicate key 'name', first on line 14",
        "runs/a.json:14: optimizer_params.name: expected one of 'adamw', 'sgd', 'muon', got \"adam\". "
        "Did you mean 'adamw'?",
        "runs/a.json:15: training_params: expected an object, got 3.",
    ]


def test_a_repeated_section_is_one_duplicate_and_its_last_copy_is_checked() -> None:
    text = json.dumps({**VALID, "model_params": {"num_heads": 0}})[:-1] + ',\n"model_params": {\n"num_heads": "x"}}'
    assert complaints(lambda: parse_config(text, "a.json")) == [
        "a.json:2: duplicate key 'model_params', first on line 1",
        'a.json:3: model_params.num_heads: expected int, got "x".',
    ]


def test_mistakes_that_constructors_find_stand_beside_the_others() -> None:
    config = with_value("model_params.top_k_experts", 9)
    config["dataset_params"]["vocab_size"] = 12
    del config["epochs"]
    text = json.dumps(config)  # on one line
    assert sorted(complaints(lambda: parse_config(text, "a.json"))) == [
        "a.json:1: dataset_params: vocab_size=12 is more than 10",
        "a.json:1: missing key 'epochs'",
        "a.json:1: model_params: top_k_experts=9 is more than num_experts=4",
    ]


def test_the_trial_model_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tells(EvaluableModel):
        def __init__(self, vocab_size: int, device: torch.device, size: int = 10**9) -> None:
            super().__init__()
            raise ConfigError(f"{nn.Linear(size, vocab_size).weight.device} {device}")

    monkeypatch.setitem(MODELS_MAP, "tells", Tells)
    found = complaints(lambda: config_from_dict({**VALID, "model_type": "tells", "model_params": {}}))
    assert found == ["config: model_params: meta meta"]


def test_a_constructor_that_needs_real_numbers_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class StochasticDepth(EvaluableModel):
        def __init__(self, vocab_size: int, device: str, rate: float = 0.1) -> None:
            super().__init__()
            self.rates = [value.item() for value in torch.linspace(0, rate, 3)]  # impossible on the meta device

    monkeypatch.setitem(MODELS_MAP, "deep", StochasticDepth)
    assert config_from_dict({**VALID, "model_type": "deep", "model_params": {}}).model_params == {"rate": 0.1}


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides_replace_values_of_the_file() -> None:
    text = json.dumps({key: value for key, value in VALID.items() if key != "training_params"})
    changes = {"epochs": 7, "training_params.device": "cuda:1", "dataset_params.num_samples": 5}
    config = parse_config(text, "a.json", changes)
    assert (config.epochs, config.batch_size) == (7, 8)
    assert config.training_params.device == "cuda:1"
    assert config.dataset_params["num_samples"] == 5


def test_wrong_overrides_name_the_flag() -> None:
    changes = {"epochs": 0, "training_params.device": "tpu", "dataset_params.data_dir": Path("x")}
    text = json.dumps({**VALID, "batch_size": 0, "model_params": 1})
    assert complaints(lambda: parse_config(text, "a.json", {**changes, "model_params.num_heads": 2})) == [
        "--epochs: must be >= 1, got 0.",
        '--device: expected auto, cpu, cuda, cuda:N or mps, got "tpu".',
        "--data_dir: dataset_params: unknown key 'data_dir'. Known: length, num_samples, seq_len, vocab_size.",
        "a.json:1: batch_size: must be >= 1, got 0.",
        "a.json:1: model_params: expected an object, got 1.",
    ]


# ------------------------------------------------------------------------------------------------ reading text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "1:1: expected a value, found the end of the file"),
        ("// nothing\n", "2:1: expected a value, found the end of the file"),
        ('{"a": 1\n "b": 2}', "2:2: expected ',' or a closing bracket, found '\"b\"'"),
        ('{"a" 1}', "1:6: expected ':', found '1'"),
        ('{"a": }', "1:7: expected a value, found '}'"),
        ('{"a": tru}', "1:7: expected a value, found 'tru'"),
        ("{\n\ta: 1}", "2:2: expected a key in double quotes, found 'a'"),
        ("{'a': 1}", "1:2: expected a key in double quotes, found \"'a'\""),
        ('{"a": 1} x', "1:10: expected the end of the file, found 'x'"),
        ('{"a": 1', "1:8: expected ',' or a closing bracket, found the end of the file"),
        ('{"a": [1,,]}', "1:10: expected a value, found ','"),
        ('{"a": [,]}', "1:8: expected a value, found ','"),
        ("{,}", "1:2: expected a key in double quotes, found ','"),
        ('{"a": "x}', "1:7: this string is not closed"),
        ('{"a": "x\n"}', "1:9: a line break or control character inside a string: close the string, or write \\n"),
        ('{"a": "\\x"}', "1:8: unknown escape in a string: write \\\\ for a backslash"),
        ('{"a": "\\ud800"}', "1:7: this string holds half of a \\u pair"),
        ('{"a": 1} /* open', "1:10: this comment is not closed"),
        ('{"a": /*/ 1}', "1:7: this comment is not closed"),
        ('{"a": 1 / 2}', "1:9: expected ',' or a closing bracket, found '/'"),
        ('{"a": 01}', "1:8: expected ',' or a closing bracket, found '1'"),
        ('{"a": NaN}', "1:7: expected a value, found 'NaN'"),
        ('{"a": -Infinity}', "1:7: expected a value, found '-Infinity'"),
        ('{"a": 1e999}', "1:7: this number is too large"),
        ('{"a": ' + "9" * 5000 + "}", "1:7: this number is too large"),
        ('{"a":' + "[" * 60, "1:55: nested deeper than 50 levels"),
        ("[" * 100_000, "1:51: nested deeper than 50 levels"),
    ],
)
def test_broken_text_is_explained_with_line_and_column(text: str, complaint: str) -> None:
    assert complaints(lambda: parse_config(text, "a.json")) == [f"a.json:{complaint}"]


def test_hostile_text_is_read_in_linear_time() -> None:
    complaints(lambda: parse_config('{"a": "' + '\\"' * 400_000, "a.json"))


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null"])
def test_the_top_level_has_to_be_an_object(text: str) -> None:
    assert complaints(lambda: parse_config(text, "a")) == [f"a: expected an object {{...}}, got {text}"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-1e9, 1e9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


class Writer:
    """Writes JSON with random spaces, comments and trailing commas, and remembers where it wrote what."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.text = ""
        self.lines: dict[tuple[str | int, ...], int] = {}

    def put(self, piece: str) -> None:
        gaps = ["", "", " ", "\t", "\n", "\r\n", '/* "a": [\n*/', '// {"x":,\n', "/**/"]
        self.text += self.choose.choice(gaps) + piece

    def mark(self, path: tuple[str | int, ...], piece: str) -> None:
        self.put(piece)
        self.lines.setdefault(path, self.text.count("\n", 0, len(self.text) - len(piece)) + 1)

    def value(self, path: tuple[str | int, ...], value: Any) -> None:
        if not isinstance(value, dict | list):
            self.mark(path, json.dumps(value, ensure_ascii=self.choose.random() < 0.5))
            return
        self.mark(path, "{" if isinstance(value, dict) else "[")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for number, (key, item) in enumerate(items):
            if number:
                self.put(",")
            if isinstance(key, str):
                self.mark((*path, key), json.dumps(key, ensure_ascii=False))
                self.put(":")
            self.value((*path, key), item)
        if value and self.choose.random() < 0.5:
            self.put(",")
        self.put("}" if isinstance(value, dict) else "]")


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_values_and_lines_are_those_that_were_written(data: dict[str, Any], choose: random.Random) -> None:
    writer = Writer(choose)
    writer.value((), data)
    source = JsonSource(writer.text, "a.json")
    assert source.values() == data
    assert source.lines() == (writer.lines, [])


# ------------------------------------------------------------------------------------------------ files


def test_a_file_is_read_like_its_text(tmp_path: Path) -> None:
    path = tmp_path / "größe.json"
    path.write_text(json.dumps({**VALID, "experiment_name": "größe"}, ensure_ascii=False), encoding="utf-8")
    assert load_config(path).experiment_name == "größe"
    assert load_config(str(path), {"epochs": 9}).epochs == 9


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert complaints(lambda: load_config(path)) == [f"{path}: cannot be read: No such file or directory"]
    assert complaints(lambda: load_config(tmp_path)) == [f"{tmp_path}: cannot be read: Is a directory"]
    assert "null byte" in complaints(lambda: load_config("a\0b"))[0]
    path.write_bytes(json.dumps(VALID).encode("utf-16"))
    assert complaints(lambda: load_config(path)) == [f"{path}: not UTF-8 text (byte 0): save it as UTF-8"]
    path.write_text(" " * 1_000_001)
    assert complaints(lambda: load_config(path)) == [f"{path}: larger than 1000 kB: this is not a config file"]


# ------------------------------------------------------------------------------------------------ anything goes wrong


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


STRANGE: st.SearchStrategy[Any] = st.sampled_from(
    [-1, 0, 1, 2, 10**30, 0.5, -0.0, 1e300, True, None, "", "x", "task", "tiny", "loose", "sgd", "goe", [], {}, [[]]]
)


@given(st.sampled_from(places(VALID)[1:]), STRANGE | JSON, st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(("dataset_params", "num_samples"), {"num_samples": {}}, False)
def test_a_config_with_a_changed_value_is_valid_or_refused(path: tuple[Any, ...], value: Any, rename: bool) -> None:
    config = copy.deepcopy(VALID)
    target: Any = config
    for step in path[:-1]:
        target = target[step]
    if rename and isinstance(target, dict):
        target[str(value)] = target.pop(path[-1])
    else:
        target[path[-1]] = value
    accepted_or_refused(json.dumps(config))


TEXT = json.dumps(VALID, indent=1)


@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 12), st.text('{}[]",:/*\\\n 19-.eux\ud800é\0', max_size=3)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_with_changed_characters_is_valid_or_refused(edits: list[tuple[int, int, str]]) -> None:
    text = TEXT
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]
    accepted_or_refused(text)


def accepted_or_refused(text: str) -> None:
    try:
        config = parse_config(text, "a.json")
    except ConfigError as error:
        lines = str(error).split("\n")
    else:
        lines = []
        assert isinstance(config, ExperimentConfig)
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert all(line.startswith("a.json:") for line in lines)


# ------------------------------------------------------------------------------------------------ signatures


def test_context_arguments_are_those_that_the_constructor_takes() -> None:
    available = {"vocab_size": 5, "num_classes": 2, "padding_idx": 0, "max_length": 9, "device": "cpu"}
    assert context_arguments(Tiny, available) == {"vocab_size": 5, "num_classes": 2, "padding_idx": 0}
    assert context_arguments(Loose, available) == {"vocab_size": 5, "num_classes": 2, "padding_idx": 0}
    assert context_arguments(Task, available) == {"vocab_size": 5}

    class WithDevice:
        def __init__(self, device: str, **kwargs: Any) -> None: ...

    assert "device" in context_arguments(WithDevice, available)
    assert "max_length" not in context_arguments(WithDevice, available)


def test_what_the_program_provides_is_no_field() -> None:
    assert not MODEL_PROVIDED & set(signature_model(Tiny, MODEL_PROVIDED).model_fields)


def test_importing_the_schema_does_not_import_torch() -> None:
    code = "import sys, research_eval.schema; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


# ------------------------------------------------------------------------------------------------ JSON Schema


def test_the_json_schema_follows_the_constructors() -> None:
    document = schema.json_schema()
    parts = {json.dumps(rule["if"]["properties"]): rule["then"] for rule in document["allOf"]}
    tiny = document["$defs"]["Tiny"]
    model = '{"model_type": {"const": "tiny"}, "dataset_type": {"not": {"enum": ["language_modeling"]}}}'
    assert parts[model] == {"properties": {"model_params": {"$ref": "#/$defs/Tiny"}}}
    assert tiny["properties"]["num_experts"] == {"type": "integer", "minimum": 1, "maximum": 2**31 - 1, "default": 8}
    assert tiny["properties"]["experts"]["maximum"] == 2**31 - 1
    assert tiny["additionalProperties"] is False
    assert "vocab_size" not in tiny["properties"]
    task = parts['{"dataset_type": {"const": "synthetic"}, "dataset_name": {"const": "task"}}']
    assert task == {"properties": {"dataset_params": {"$ref": "#/$defs/Task"}}, "required": ["dataset_params"]}
    assert document["$defs"]["Task"]["required"] == ["num_samples"]
    assert document["$defs"]["Loose"]["additionalProperties"] is True
    assert "tiny" in document["properties"]["model_type"]["enum"]
    assert '{"dataset_type": {"const": "real_world"}}' in parts


def test_one_spelling_of_a_required_key_is_enough_in_the_json_schema() -> None:
    class Needs:
        def __init__(self, count: Annotated[int, Field(ge=1), Aka("number")]) -> None: ...

    Needs.__init__.__annotations__["count"] = Annotated[int, Field(ge=1), Aka("number")]
    document = signature_model(Needs, frozenset()).model_json_schema()
    assert document["required"] == []
    assert {"anyOf": [{"required": ["count"]}, {"required": ["number"]}]} in document["allOf"]


@pytest.mark.parametrize("section", ["ExperimentConfig", "OptimizerParams", "SchedulerParams", "TrainingParams"])
def test_every_key_of_the_file_is_described(section: str) -> None:
    for name, field in getattr(schema, section).model_fields.items():
        assert field.description or name.endswith("_params"), name


def test_the_shipped_json_schema_is_fresh() -> None:
    printed = python("-m", "research_eval.schema", folder=PACKAGE.parent).out
    shipped = (PACKAGE / "experiment.schema.json").read_text(encoding="utf-8")
    assert shipped == printed, "run: python -m research_eval.schema > research_eval/experiment.schema.json"

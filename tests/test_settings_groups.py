"""Settings groups: a constructor takes frozen dataclasses, everyone else sees flat options."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from research_eval.annotations import (
    REQUIRED,
    Aka,
    Choice,
    Count,
    Divides,
    Option,
    Range,
    Share,
    When,
    accept_flat_options,
    build,
    grouped_arguments,
    options_of,
    takes_any_option,
)
from research_eval.config.check import config_from_dict, parse_config
from research_eval.config.construction import model_arguments
from research_eval.config.signatures import MODEL_PROVIDED, context_arguments, signature_model
from research_eval.datasets.base_dataset import ArraySamples, SequenceBaseDataset
from research_eval.datasets.providers import get_synthetic_data_loaders
from research_eval.errors import ConfigError
from research_eval.layers.settings import EncoderSettings
from research_eval.models.base_model import EvaluableModel
from research_eval.models.dense import DenseTransformerClassifier
from research_eval.registry import MODELS_MAP, SYNTHETIC_DATASETS
from research_eval.runs.prepare import create_model
from research_eval.studies.distributions import random_pick
from research_eval.studies.space import build_space


@dataclass(frozen=True)
class Inner:
    depth: Annotated[Count, Range(1, 4, upto=("width",))] = 2
    names: tuple[str, ...] = field(default_factory=lambda: ("a",))


@dataclass(frozen=True)
class Outer:
    width: Annotated[Count, Aka("breadth"), Choice(4, 8)] = 8
    inner: Inner = Inner(depth=3)
    rate: Annotated[Share, Range(0.0, 0.5), When("heads", 2, 4)] = 0.1

    def __post_init__(self) -> None:
        if self.width < self.inner.depth:
            raise ConfigError(f"width={self.width} is less than depth={self.inner.depth}")


@dataclass(frozen=True)
class Needed:
    size: Count


NARROW = Outer(width=4, rate=0.25)


class Grouped(EvaluableModel):
    def __init__(
        self,
        *,
        vocab_size: int,
        heads: Annotated[Count, Choice(1, 2, 4), Divides("width")] = 1,
        outer: Outer,
        needed: Needed,
        last: int = 5,
    ) -> None:
        super().__init__()
        self.outer, self.needed, self.heads, self.last = outer, needed, heads, last
        self.table = nn.Embedding(vocab_size, outer.width)


class Ordered(EvaluableModel):
    OPTION_ORDER = ("last", "depth", "heads")

    def __init__(self, *, vocab_size: int, heads: int = 1, outer: Outer = NARROW, last: int = 5) -> None:
        super().__init__()
        self.outer, self.last = outer, last


class Foreign(nn.Module):
    """As in a repository that knows nothing of ours: no base class, and a group all the same."""

    def __init__(self, vocab_size: int, num_classes: int, outer: Outer, scale: float = 1.0) -> None:
        super().__init__()
        self.outer, self.scale = outer, scale


class Plain(nn.Module):
    def __init__(self, vocab_size, num_classes, hidden=16, **extra):
        super().__init__()
        self.hidden, self.extra = hidden, extra


class Ones(SequenceBaseDataset):
    def __init__(self, *, num_samples: Count = 200, needed: Needed, seed: int = 0) -> None:
        super().__init__(num_samples, seq_len=needed.size, vocab_size=2, seed=seed)

    def _generate_data(self) -> None:
        ids_NL = self.rng.integers(1, 3, (self.num_samples, self.seq_len))
        self.samples = ArraySamples(ids_NL, (ids_NL == 1).sum(1) % 2)
        self.labels_list = [0, 1]


@pytest.fixture(autouse=True)
def _entered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in {"grouped": Grouped, "ordered": Ordered, "elsewhere": Foreign, "plain": Plain}.items():
        monkeypatch.setitem(MODELS_MAP, name, cls)
    monkeypatch.setitem(SYNTHETIC_DATASETS, "ones", Ones)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "grouped",
        "dataset_type": "synthetic",
        "dataset_name": "ones",
        "epochs": 1,
        "batch_size": 8,
        "dataset_params": {"size": 6},
        "model_params": {"size": 3},
    } | changes


def complaints(construct: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        construct()
    return str(caught.value).split("\n")


# ------------------------------------------------------------------------------------------------- reading options


def test_the_fields_of_groups_are_options_in_the_place_of_the_group() -> None:
    options = options_of(Grouped)
    assert list(options) == ["vocab_size", "heads", "width", "depth", "names", "rate", "size", "last"]
    assert options["last"] == Option("last", int, 5)
    assert options["width"].annotation.__metadata__[1].names == ("breadth",)
    assert [options[name].default for name in options] == [REQUIRED, 1, 8, 3, ("a",), 0.1, REQUIRED, 5]
    assert [options[name].group for name in ("heads", "rate", "names")] == [(), ("outer",), ("outer", "inner")]


def test_the_default_of_a_group_gives_the_defaults_of_its_fields() -> None:
    options = options_of(Ordered)
    assert {name: options[name].default for name in ("width", "depth", "rate")} == {
        "width": 4,
        "depth": 3,
        "rate": 0.25,
    }
    assert Ordered(vocab_size=3, depth=1).outer == Outer(width=4, inner=Inner(depth=1), rate=0.25)


def test_listed_options_stand_first_and_the_others_in_their_order() -> None:
    assert list(options_of(Ordered)) == ["last", "depth", "heads", "vocab_size", "width", "names", "rate"]
    assert list(model_arguments("ordered", {})) == ["last", "depth", "heads", "width", "names", "rate"]


def test_a_subclass_with_a_constructor_of_its_own_has_an_order_of_its_own() -> None:
    class Less(Ordered):
        def __init__(self, *, vocab_size: int, size: int = 4) -> None:
            super().__init__(vocab_size=vocab_size, width=size)

    assert list(options_of(Less)) == ["vocab_size", "size"]
    assert Less(vocab_size=3, size=6).outer.width == 6

    class Same(Ordered):
        pass

    assert list(options_of(Same)) == list(options_of(Ordered))
    assert Same(vocab_size=3, width=7).outer.width == 7


def test_a_class_without_groups_is_as_it_was() -> None:
    assert list(options_of(Plain)) == ["vocab_size", "num_classes", "hidden"]
    assert options_of(Plain)["hidden"] == Option("hidden", Any, 16)
    assert takes_any_option(Plain)
    assert not takes_any_option(Grouped)
    assert grouped_arguments(Plain, {"hidden": 3, "other": 4}) == {"hidden": 3, "other": 4}
    before = Plain.__init__
    accept_flat_options(Plain)
    assert Plain.__init__ is before
    assert create_model("plain", {"more": 1}, {"vocab_size": 3, "num_classes": 2}, torch.device("cpu")).extra == {
        "more": 1
    }


def test_a_dataclass_that_may_change_is_no_group() -> None:
    @dataclass
    class Changing:
        size: int = 1

    def constructor(self: Any, changing: Any) -> None: ...

    constructor.__annotations__["changing"] = Changing
    assert list(options_of(type("Holder", (), {"__init__": constructor}))) == ["changing"]


# -------------------------------------------------------------------------------------------- errors at the definition


@dataclass(frozen=True)
class OtherWidth:
    width: int = 1


@dataclass(frozen=True)
class WidthInside:
    other: OtherWidth = OtherWidth()
    width: int = 2


def test_two_options_of_one_name_are_refused_when_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Twice: 'outer\.width' and 'other\.width' have one name"):

        class Twice(EvaluableModel):
            def __init__(self, *, outer: Outer, other: OtherWidth) -> None: ...

    with pytest.raises(TypeError, match=r"'width' and 'other\.width' have one name"):

        class Own(EvaluableModel):
            def __init__(self, *, width: int, other: OtherWidth) -> None: ...

    with pytest.raises(TypeError, match=r"'inside\.other\.width' and 'inside\.width' have one name"):

        class Within(EvaluableModel):
            def __init__(self, *, inside: WidthInside) -> None: ...

    with pytest.raises(TypeError, match="the group 'width' and an option have one name"):

        class Group(EvaluableModel):
            def __init__(self, *, width: OtherWidth) -> None: ...


def test_an_order_of_options_that_do_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.OPTION_ORDER: the constructor has no option widht"):

        class Wrong(EvaluableModel):
            OPTION_ORDER = ("widht",)

            def __init__(self, *, other: OtherWidth) -> None: ...


def test_a_group_that_is_positional_is_refused() -> None:
    with pytest.raises(TypeError, match="the group 'other' has to be keyword-only"):

        class Positional(EvaluableModel):
            def __init__(self, other: OtherWidth) -> None: ...


# ------------------------------------------------------------------------------------------------------- construction


def test_flat_keywords_and_groups_construct_the_same() -> None:
    outer = Outer(width=16, inner=Inner(depth=4))
    flat = Grouped(vocab_size=3, size=2, width=16, depth=4)
    grouped = Grouped(vocab_size=3, needed=Needed(2), outer=outer)
    assert (flat.outer, flat.needed) == (grouped.outer, grouped.needed) == (outer, Needed(2))
    changed = Grouped(vocab_size=3, size=2, outer=outer, rate=0.4)  # flat values change a group that is given
    assert changed.outer == Outer(width=16, inner=Inner(depth=4), rate=0.4)


def test_the_encoders_take_their_settings_flat_or_as_a_group() -> None:
    settings = {"embed_dim": 8, "num_heads": 2, "dropout": 0.0, "positional_encoding": "none"}
    torch.manual_seed(0)
    flat = DenseTransformerClassifier(vocab_size=8, num_classes=2, **settings)
    torch.manual_seed(0)
    grouped = DenseTransformerClassifier(vocab_size=8, num_classes=2, encoder=EncoderSettings(**settings))
    assert_close(flat.state_dict(), grouped.state_dict())


def test_the_constructor_stays_readable_for_tools() -> None:
    parameters = inspect.signature(DenseTransformerClassifier).parameters
    assert list(parameters) == ["vocab_size", "num_classes", "padding_idx", "num_layers", "encoder"]
    assert DenseTransformerClassifier.__init__.__qualname__ == "DenseTransformerClassifier.__init__"


@pytest.mark.parametrize("cls", [Ordered, Foreign])
def test_an_unknown_keyword_is_a_type_error(cls: type) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        build(cls, {"vocab_size": 3, "widht": 4})
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        cls(vocab_size=3, widht=4)


def test_a_value_that_is_missing_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'size'"):
        Grouped(vocab_size=3)


def test_no_constructor_of_an_encoder_has_more_than_twelve_parameters() -> None:
    for name in ("dense", "looped", "moe", "goe", "goe_scan", "lstm"):
        assert len(inspect.signature(MODELS_MAP[name]).parameters) <= 12, name


NAMES = st.sampled_from([f"option{number}" for number in range(30)])


def trees(names: list[str]) -> st.SearchStrategy[Any]:
    """A class with these options: each at random in the class itself, or in a group, or in a group of a group."""

    def arranged(places: list[tuple[str, ...]]) -> type:
        def made(here: tuple[str, ...]) -> Any:
            fields: list[Any] = [(name, int, number) for number, name in enumerate(names) if places[number] == here]
            for inside in sorted({place[: len(here) + 1] for place in places if place[: len(here)] == here != place}):
                fields.append((inside[-1], group := made(inside), field(default_factory=group)))
            return dataclasses.make_dataclass("Made", fields, frozen=bool(here), kw_only=True)

        cls: type = made(())
        return cls

    place = st.sampled_from([(), ("one",), ("two",), ("one", "three"), ("one", "four"), ("two", "five", "six")])
    return st.lists(place, min_size=len(names), max_size=len(names)).map(arranged)


@given(st.data(), st.lists(NAMES, unique=True, max_size=8))
def test_every_flat_value_arrives_at_its_field(data: st.DataObject, names: list[str]) -> None:
    cls = data.draw(trees(names))
    flat = data.draw(st.dictionaries(st.sampled_from(names), st.integers(100, 999))) if names else {}
    built = build(cls, flat)
    options = options_of(cls)
    assert set(options) == set(names)
    for number, name in enumerate(names):
        place = built
        for step in options[name].group:
            place = getattr(place, step)
        assert getattr(place, name) == flat.get(name, number)


# ------------------------------------------------------------------------------------------ configs, schema, messages


def test_a_config_holds_the_options_flat_and_the_model_gets_its_groups() -> None:
    checked = config_from_dict(config(model_params={"size": 3, "breadth": 16, "names": ["x", "y"]}))
    assert checked.model_params == {
        "heads": 1,
        "width": 16,
        "depth": 3,
        "names": ("x", "y"),
        "rate": 0.1,
        "size": 3,
        "last": 5,
    }
    model = create_model("grouped", checked.model_params, {"vocab_size": 7, "num_classes": 2}, torch.device("cpu"))
    assert model.outer == Outer(width=16, inner=Inner(3, ("x", "y")))
    assert model.needed == Needed(3)
    again = config_from_dict(json.loads(json.dumps(checked.to_dict())))
    assert again == checked


def test_a_class_from_elsewhere_gets_its_groups_too() -> None:
    checked = config_from_dict(config(model_type="elsewhere", model_params={"width": 16, "scale": 2.0}))
    model = create_model("elsewhere", checked.model_params, {"vocab_size": 7, "num_classes": 2}, torch.device("cpu"))
    assert (model.outer, model.scale) == (Outer(width=16), 2.0)


def test_a_synthetic_task_may_have_groups() -> None:
    checked = config_from_dict(config())
    assert checked.dataset_params == {"num_samples": 200, "size": 6}
    train, *_ = get_synthetic_data_loaders("ones", checked.dataset_params, batch_size=8)
    assert next(iter(train)).input_ids.shape[1] == 6


def test_context_arguments_are_found_in_groups_too() -> None:
    assert context_arguments(Grouped, {"width": 3, "size": 4, "more": 5}) == {"width": 3, "size": 4}


def test_mistakes_name_the_flat_option_and_its_line() -> None:
    wrong = {"size": 0, "widht": 4, "outer": {}, "depth": "x"}
    text = json.dumps(config(model_params=wrong)).replace('"depth"', '\n"depth"')
    known = "breadth, depth, heads, last, names, rate, size, width"
    assert complaints(lambda: parse_config(text, "a.json")) == [
        "a.json:1: model_params: unknown key 'widht'. Did you mean 'width'?",
        f"a.json:1: model_params: unknown key 'outer'. Known: {known}.",
        "a.json:1: model_params.size: must be >= 1, got 0.",
        'a.json:2: model_params.depth: expected int, got "x".',
    ]


def test_what_a_group_says_about_its_values_stands_beside_the_other_mistakes() -> None:
    wrong = config(model_params={"size": 1, "width": 2}, epochs=0)
    assert complaints(lambda: config_from_dict(wrong)) == [
        "config: epochs: must be >= 1, got 0.",
        "config: model_params: width=2 is less than depth=3",
    ]
    elsewhere = config(model_type="elsewhere", model_params={"width": 2})
    assert complaints(lambda: config_from_dict(elsewhere)) == ["config: model_params: width=2 is less than depth=3"]


def test_the_json_schema_shows_flat_options_in_order() -> None:
    schema = signature_model(Grouped, MODEL_PROVIDED).model_json_schema()
    assert list(schema["properties"]) == ["heads", "width", "depth", "names", "rate", "size", "last", "breadth"]
    assert schema["required"] == ["size"]
    assert schema["properties"]["depth"] == {
        "default": 3,
        "maximum": 2**31 - 1,
        "minimum": 1,
        "title": "Depth",
        "type": "integer",
    }
    assert "$defs" not in schema


def test_a_study_draws_the_options_of_groups_with_rules_across_groups() -> None:
    base = {"dataset_type": "synthetic", "dataset_name": "ones", "epochs": 1}
    space = build_space(["grouped"], base, {})
    own = [parameter for parameter in space.parameters["grouped"] if parameter.section == "model_params"]
    assert [str(parameter) for parameter in own] == [
        "one of 4, 8",
        "one of 1, 2, 4, divides width",
        "1 to 4, at most width",
        "0 to 0.5, if heads is 2 or 4",
    ]
    assert [parameter.name for parameter in own] == ["grouped.width", "grouped.heads", "grouped.depth", "grouped.rate"]
    pick = random_pick(np.random.default_rng(0))
    drawn = [space.sample(pick)["model_params"] for _ in range(50)]
    assert {("rate" in params) == (params["heads"] > 1) for params in drawn} == {True}


@pytest.mark.parametrize("name", MODELS_MAP)
def test_every_model_is_constructed_from_flat_values(name: str) -> None:
    context = context_arguments(MODELS_MAP[name], {"vocab_size": 8, "num_classes": 3, "padding_idx": 0})
    arguments = model_arguments(name, {})
    assert isinstance(build(MODELS_MAP[name], {**context, **arguments}), MODELS_MAP[name])

"""Kinds of data sets: what a `dataset_type` of a config stands for.

A kind says which names it has, whose constructor is the schema of `dataset_params`, and how its splits are made. A new
kind is one file in this package (or in a folder of GOE_EXTENSIONS) with a class that registers itself:

    @DATASET_KINDS.register("my_kind")
    class MyKind(DatasetKind): ...

The config check, the JSON Schema, studies and the results then know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from research_eval.annotations import build, options_of
from research_eval.errors import ConfigError
from research_eval.registry import CLASSIFICATION, SYNTHETIC_DATASETS, Registry
from research_eval.wording import did_you_mean, hint, largest_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from research_eval.datasets.token_data import DataSplits
    from research_eval.routing.automaton import Automaton

MAX_TASK_SIZE = 100_000  # of a task's own sizes: moduli, symbols, tables; its samples have their memory checked


class DatasetKind(ABC):
    """One value of `dataset_type`. It has no state: `dataset_kind` makes a new object for each use."""

    provided: frozenset[str] = frozenset()
    """Constructor parameters that the program fills in; a config must not have them."""
    any_name: bool = False
    """Whether data of a name outside `names` can exist. Then one constructor serves all names."""
    generated: bool = False
    """Whether the parameters alone determine the splits, without files or network, so that a suggested config can be
    tried out before a run."""
    config_defaults: Mapping[str, Mapping[str, Any]] = {}
    """Section of a config -> the values that it has for this kind where a config does not give them. If a section has a
    `name`, its values count only for the name that they hold. Of the options of models each model takes its own."""
    search_space: Mapping[str, Mapping[str, Any]] = {}
    """Section of a config -> what studies search for this kind, unless the user says otherwise: domains or values."""
    own_data: str = ""
    """A sentence for the message about an unknown name: how a user brings data of another name."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """The known values of `dataset_name`."""

    @abstractmethod
    def constructor(self, dataset_name: str) -> type:
        """The class whose constructor is the schema of `dataset_params`. Raises ConfigError for an unknown name."""

    @abstractmethod
    def splits(self, dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
        """Make or read the data. Raises ConfigError for unusable data."""

    def splits_with(
        self, dataset_name: str, dataset_params: dict[str, Any], seed: int, tokenizer: Tokenizer
    ) -> DataSplits:
        """As `splits`, with the tokenizer of an earlier run if the kind trains one. Raises ConfigError."""
        return self.splits(dataset_name, dataset_params, seed)

    def fit_baselines(self, dataset_name: str, dataset_params: dict[str, Any]) -> None:
        """Fit the baselines that take time and store their scores, so that `splits` has them in the fingerprint.

        Raises ConfigError for a kind that has none.
        """
        raise ConfigError(f"--baselines: TF-IDF is for text, and {dataset_name} is something else. Leave the flag out.")

    def accepts(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> bool:
        """Whether the name, together with these (unchecked) parameters, can be a data set of this kind."""
        return dataset_name in self.names()

    def check_name(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> None:
        """Raise a ConfigError that says which names exist, unless the name is accepted."""
        if not self.accepts(dataset_name, dataset_params):
            near = hint(dataset_name, self.names())
            raise ConfigError(f"dataset_name: unknown {dataset_name!r}.{near}{self.own_data}")

    def build(self, dataset_name: str, arguments: Mapping[str, Any]) -> object:
        """An object of the constructor with these checked arguments, before any data is made.

        The config check calls it to find parameters that do not fit each other: the constructor raises ConfigError.
        """
        return build(self.constructor(dataset_name), arguments)

    def too_large(self, dataset_name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Parameter -> complaint, for sizes with which even `build` takes too much time or memory."""
        return {}

    def task(self, dataset_name: str) -> str:
        """The name of the task that models are trained for on this data, as in `DataSplits.task`."""
        return CLASSIFICATION

    def automaton(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> Automaton | None:
        """The finite automaton that gives every answer, if there is one: trained scan models are compared with it."""
        return None


DATASET_KINDS: Registry[type[DatasetKind]] = Registry("dataset_type", "research_eval.datasets")


def dataset_kind(dataset_type: str, field: str = "dataset_type") -> DatasetKind:
    """The kind of this name. Raises ConfigError for an unknown one; `field` says where the name was given."""
    if dataset_type not in DATASET_KINDS:
        known = " or ".join(map(repr, DATASET_KINDS))
        raise ConfigError(
            f"{field}: expected {known}, got {dataset_type!r}.{did_you_mean(dataset_type, DATASET_KINDS)}"
        )
    return DATASET_KINDS[dataset_type]()


def task_name(config: Mapping[str, Any]) -> str:
    """The task of an unchecked config: its own, or that of its data; "classification" if neither is known."""
    dataset_type, dataset_name, task = (config.get(key) for key in ("dataset_type", "dataset_name", "task"))
    if isinstance(task, str):
        return task
    if not isinstance(dataset_type, str) or not isinstance(dataset_name, str) or dataset_type not in DATASET_KINDS:
        return CLASSIFICATION
    kind = DATASET_KINDS[dataset_type]()
    return kind.task(dataset_name) if kind.any_name or dataset_name in kind.names() else CLASSIFICATION


def dataset_type_of(dataset_name: str) -> str:
    """The `dataset_type` of a name alone: the first kind that knows it, else the first that takes any name."""
    kinds = {dataset_type: kind() for dataset_type, kind in DATASET_KINDS.items()}
    knowing = [dataset_type for dataset_type, kind in kinds.items() if dataset_name in kind.names()]
    return next(iter([*knowing, *(dataset_type for dataset_type, kind in kinds.items() if kind.any_name)]))


# --------------------------------------------------------------------------------------------- the two kinds of our own
# They stand here and not in files of their own so that they come first in lists, as in the JSON Schema.


@DATASET_KINDS.register("synthetic")
class Synthetic(DatasetKind):
    """Token sequences that a class in SYNTHETIC_DATASETS generates."""

    provided = frozenset({"seed"})
    generated = True

    def names(self) -> Iterable[str]:
        return SYNTHETIC_DATASETS

    def constructor(self, dataset_name: str) -> type:
        return SYNTHETIC_DATASETS.get_or_explain(dataset_name)

    def splits(self, dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
        from research_eval.datasets.synthetic import synthetic_splits

        try:
            return synthetic_splits(dataset_name, dataset_params, seed)
        except MemoryError as error:
            text = f"{dataset_name} with {largest_of(dataset_params)} needs more memory than there is"
            raise ConfigError(f"dataset_params: {text} ({error}). Lower one of them.") from error

    def build(self, dataset_name: str, arguments: Mapping[str, Any]) -> object:
        cls = self.constructor(dataset_name)
        seed = {"seed": 0} if "seed" in options_of(cls) else {}
        return build(cls, seed | dict(arguments))

    def too_large(self, dataset_name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Only for tasks of this project: a foreign class may call anything a size.

        `num_samples` and `seq_len` are not among them: `build` compares their product with the memory.
        """
        if not self.constructor(dataset_name).__module__.startswith("research_eval."):
            return {}
        sizes = {name: value for name, value in arguments.items() if isinstance(value, int) and "seed" not in name}
        large = {name for name, value in sizes.items() if value > MAX_TASK_SIZE} - {"num_samples", "seq_len"}
        return {name: f"expected at most {MAX_TASK_SIZE:,}, got {sizes[name]:,}" for name in sorted(large)}

    def task(self, dataset_name: str) -> str:
        from research_eval.datasets.base_dataset import SequenceBaseDataset

        cls = self.constructor(dataset_name)
        return cls.task if issubclass(cls, SequenceBaseDataset) else super().task(dataset_name)

    def automaton(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> Automaton | None:
        from research_eval.datasets.regular import task_automaton

        return task_automaton(dataset_name, dict(dataset_params))


@DATASET_KINDS.register("real_world")
class RealWorld(DatasetKind):
    """Text from files or from the hub: any name with files, else one of REAL_WORLD_DATASETS."""

    provided = frozenset({"dataset_name"})
    any_name = True
    config_defaults: Mapping[str, Mapping[str, Any]] = {"model_params": {"expert_sharing": 0.5}}
    own_data = " A set of your own needs dataset_params.data_dir or sources."

    def names(self) -> Iterable[str]:
        from research_eval.datasets.text import source

        return source.real_world_names()

    def constructor(self, dataset_name: str) -> type:
        from research_eval.datasets.text import TextDataset

        return TextDataset

    def splits(self, dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
        from research_eval.datasets.text import TextDataset

        return build(TextDataset, {"dataset_name": dataset_name, **dataset_params}).splits(seed)

    def splits_with(
        self, dataset_name: str, dataset_params: dict[str, Any], seed: int, tokenizer: Tokenizer
    ) -> DataSplits:
        from research_eval.datasets.text import TextDataset

        return build(TextDataset, {"dataset_name": dataset_name, **dataset_params}).splits(seed, tokenizer)

    def fit_baselines(self, dataset_name: str, dataset_params: dict[str, Any]) -> None:
        from research_eval.datasets.text import TextDataset

        build(TextDataset, {"dataset_name": dataset_name, **dataset_params}).fit_baselines()

    def accepts(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> bool:
        own_files = dataset_params.get("data_dir") or dataset_params.get("sources")
        return bool(own_files) or super().accepts(dataset_name, dataset_params)

    def build(self, dataset_name: str, arguments: Mapping[str, Any]) -> object:
        return build(self.constructor(dataset_name), {"dataset_name": dataset_name, **arguments})

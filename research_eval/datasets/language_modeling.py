"""The kind of data "language_modeling": running text, whose models predict the next token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from research_eval.annotations import Range, build
from research_eval.datasets.kinds import DATASET_KINDS, DatasetKind
from research_eval.errors import ConfigError
from research_eval.registry import NEXT_TOKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from research_eval.datasets.token_data import DataSplits


@DATASET_KINDS.register("language_modeling")
class LanguageModeling(DatasetKind):
    """Text from files or from the hub."""

    provided = frozenset({"dataset_name"})
    any_name = True
    own_data = " Text of your own needs dataset_params.data_dir, or the path of a file as dataset_name."
    config_defaults: Mapping[str, Mapping[str, Any]] = {
        "optimizer_params": {"name": "muon", "lr": 0.02, "adam_lr": 3e-3},
        "scheduler_params": {"name": "wsd", "warmup_factor": 0.05, "decay_factor": 1.0, "min_lr_factor": 0.05},
    }
    search_space: Mapping[str, Mapping[str, Any]] = {
        "optimizer_params": {"name": "muon", "lr": Range(5e-3, 0.1, log=True), "adam_lr": Range(5e-4, 1e-2, log=True)},
        "scheduler_params": {"name": "wsd"},
    }

    def names(self) -> Iterable[str]:
        from research_eval.datasets.language.dataset import SOURCES
        from research_eval.datasets.language.line_task import LINE_TASKS

        return [*SOURCES, *LINE_TASKS]

    def constructor(self, dataset_name: str) -> type:
        from research_eval.datasets.language.dataset import LanguageModelingDataset
        from research_eval.datasets.language.line_task import LINE_TASKS
        from research_eval.datasets.language.lines import GeneratedLines

        return GeneratedLines if dataset_name in LINE_TASKS else LanguageModelingDataset

    def splits(self, dataset_name: str, dataset_params: dict[str, Any], seed: int) -> DataSplits:
        return self._files(dataset_name, dataset_params).splits()

    def splits_with(
        self, dataset_name: str, dataset_params: dict[str, Any], seed: int, tokenizer: Tokenizer
    ) -> DataSplits:
        from research_eval.datasets.language.line_task import LINE_TASKS

        made = self._files(dataset_name, dataset_params)
        return made.splits() if dataset_name in LINE_TASKS else made.splits(tokenizer)

    def fit_baselines(self, dataset_name: str, dataset_params: dict[str, Any]) -> None:
        raise ConfigError("--baselines: TF-IDF is for classes. n-grams are counted without it. Leave the flag out.")

    def _files(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> Any:
        return build(self.constructor(dataset_name), {"dataset_name": dataset_name, **dataset_params})

    def accepts(self, dataset_name: str, dataset_params: Mapping[str, Any]) -> bool:
        from research_eval.datasets.language.dataset import is_file_name, is_hub_name

        is_own = bool(dataset_params.get("data_dir")) or is_file_name(dataset_name) or is_hub_name(dataset_name)
        return is_own or super().accepts(dataset_name, dataset_params)

    def build(self, dataset_name: str, arguments: Mapping[str, Any]) -> object:
        return build(self.constructor(dataset_name), {"dataset_name": dataset_name, **arguments})

    def task(self, dataset_name: str) -> str:
        return NEXT_TOKEN

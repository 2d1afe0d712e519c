"""Several trained models that answer together: the mean of their probabilities, or of the numbers that they predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from research_eval.errors import ConfigError
from research_eval.runs.inputs import Input
from research_eval.runs.predict import Prediction, TokenIds, TrainedModel


class Ensemble:
    """Runs of one task, such as the seeds of a config. It answers as a `TrainedModel` does.

    Every model reads a text with its own tokenizer. A mean has no path.
    """

    def __init__(self, folders: Sequence[Path], device: str = "auto") -> None:
        """Read the folders of the runs. Raises ConfigError for runs with other classes, and as `TrainedModel` does."""
        self.models = [TrainedModel(folder, device) for folder in folders]
        first = self.models[0]
        for model in self.models[1:]:
            if _answers_of(model) != _answers_of(first):
                raise ConfigError(
                    f"run {model.folder.name} answers with other classes than run {first.folder.name}: an ensemble "
                    "needs runs on the same classes"
                )
        self.label_names, self.num_outputs = first.label_names, first.num_outputs

    def predict(self, inputs: Sequence[str | TokenIds], *, batch_size: int | None = None) -> list[Prediction]:
        """One prediction per input, in their order (N), as `TrainedModel.predict`."""
        return list(_means([model.predict(inputs, batch_size=batch_size) for model in self.models]))

    def answers(self, inputs: Sequence[Input]) -> Iterator[Prediction]:
        """The predictions for what was read, in its order. All inputs are checked before the first prediction."""
        return _means([model.answers(inputs) for model in self.models])

    def read_inputs(self, paths: Sequence[str]) -> list[Input]:
        """The texts of files, as the first of the runs reads them."""
        return self.models[0].read_inputs(paths)


def _answers_of(model: TrainedModel) -> tuple[str, list[str], int]:
    """What the answers of a model are about."""
    return model.task.name, model.label_names, model.num_outputs


def _means(answers: Sequence[Iterable[Prediction]]) -> Iterator[Prediction]:
    """The mean over the models of each input's predictions."""
    for several in zip(*answers, strict=True):
        one = several[0]
        probabilities = np.mean([each.probabilities for each in several], 0).tolist()
        values = np.mean([each.values for each in several], 0).tolist()
        yield Prediction(one.text, one.label_names, probabilities, None, values)

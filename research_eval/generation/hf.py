"""Exported language models as models of the library transformers, with code of ours and no remote code.

    from research_eval.generation.hf import register
    register()
    model = AutoModelForCausalLM.from_pretrained("exported_model")

B batch  L tokens  V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from research_eval.annotations import build
from research_eval.config.check import stored_config
from research_eval.generation.trained import EXPORTED_TYPE
from research_eval.models.language.base import LanguageModel
from research_eval.registry import LANGUAGE_MODELS
from research_eval.runs.predict import EXPERIMENT


class GraphOfExpertsConfig(PretrainedConfig):  # type: ignore[misc]
    """`experiment` is the config of the run, `data` the sizes of its data."""

    model_type = EXPORTED_TYPE

    def __init__(
        self, experiment: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        super().__init__(**{"use_cache": False, **rest})  # decoding computes all tokens again
        self.experiment = experiment or {}
        self.data = data or {}


class GraphOfExpertsForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model of ours behind the interface of transformers. It computes all tokens at each step."""

    config_class = GraphOfExpertsConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: GraphOfExpertsConfig) -> None:
        super().__init__(config)
        experiment = stored_config(config.experiment, source=EXPERIMENT)
        sizes = {name: config.data[name] for name in ("vocab_size", "max_length")}
        cls = LANGUAGE_MODELS.get_or_explain(experiment.model_type)
        model = build(cls, {**sizes, **experiment.model_params})
        assert isinstance(model, LanguageModel)
        self.model = model
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits [B, L, V]; with `labels` [B, L] (-100: ignored) the mean loss of each next token.

        Padding has to stand on the right, where it changes no earlier token.
        """
        logits_BLV = self.model.pass_over(input_ids).outputs
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BLV)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """The last tokens that the model can see."""
        return {"input_ids": input_ids[:, -int(self.config.data["max_length"]) :]}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The caches of transformers hold one array per layer, which ours do not have."""
        return False

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Keep the weights of the constructor; `from_pretrained` replaces them."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *_: Any, **rest: Any) -> GraphOfExpertsForCausalLM:
        """Read an exported folder. Raises ConfigError for files that are missing or do not fit."""
        from research_eval.generation.trained import TrainedLanguageModel

        trained = TrainedLanguageModel(Path(path), "cpu")
        config = rest.get("config") or GraphOfExpertsConfig.from_pretrained(path)
        made = cls(config)
        made.model.load_state_dict(trained.model.state_dict())
        made.eval()
        return made


def register() -> None:
    """Let AutoConfig, AutoModelForCausalLM and AutoTokenizer of transformers know exported models."""
    AutoConfig.register(EXPORTED_TYPE, GraphOfExpertsConfig, exist_ok=True)
    AutoModelForCausalLM.register(GraphOfExpertsConfig, GraphOfExpertsForCausalLM, exist_ok=True)
    AutoTokenizer.register(GraphOfExpertsConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

"""A pretrained encoder of the library transformers in the place of the embedding.

B batch  L length  D width  V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from research_eval.datasets.text.pretrained import folder_tokenizer
from research_eval.errors import ConfigError
from research_eval.layers.stacked import Dropout
from research_eval.system.untrusted import user_path

OPTION = "model_params.pretrained_dir"


class PretrainedTrunk(nn.Module):
    """h_0 = Drop(LN(W Encoder[x])): the last states of a saved encoder, brought to the width of the model.

    The folder holds `config.json`, `model.safetensors` and the tokenizer, as `save_pretrained` writes them. Code from
    the folder is not run and pickled weights are not read. All weights learn. `learn` has to be called once before the
    training; later the ids come with the weights. Raises ConfigError for a folder that does not hold such an encoder.
    """

    ids_V: Tensor  # the encoder's own id of each token

    def __init__(self, folder: str, vocab_size: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.folder = user_path(folder, OPTION)
        self.encoder, width = _encoder(self.folder)
        self.project = nn.Linear(width, embed_dim) if width != embed_dim else nn.Identity()
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.register_buffer("ids_V", torch.zeros(vocab_size, dtype=torch.int64))

    def learn(self, tokenizer: Tokenizer | None, max_length: int) -> None:
        """Take the tokens' numbers. Raises ConfigError unless the data come from the folder's own tokenizer."""
        own, order_V = folder_tokenizer(self.folder)
        if tokenizer is None or tokenizer.to_str() != own.to_str():
            raise ConfigError(
                f"{OPTION}: the data need the tokenizer of this encoder. Set dataset_params.tokenizer_dir to "
                f"{str(self.folder)!r}, too."
            )
        longest = int(getattr(self.encoder.config, "max_position_embeddings", None) or max_length)
        if self.encoder.config.model_type in _POSITIONS_AFTER_PADDING:
            longest -= int(self.encoder.config.pad_token_id) + 1
        if max_length > longest:
            raise ConfigError(
                f"{OPTION}: this encoder reads {longest} tokens at most, and the longest text has {max_length}. Lower "
                "dataset_params.max_length."
            )
        self.ids_V.copy_(torch.from_numpy(order_V))

    def forward(self, ids_BL: Tensor, keep_BL: Tensor) -> Tensor:
        """Ids [B, L] int64 and mask [B, L] bool -> states [B, L, D]."""
        found = self.encoder(input_ids=self.ids_V[ids_BL], attention_mask=keep_BL.long())
        return self.dropout(self.norm(self.project(found.last_hidden_state)))


# Encoders whose positions begin behind the number of the padding token.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


def _encoder(folder: Path) -> tuple[Any, int]:
    """The encoder of a folder, and its width. On torch's "meta" device the weights are not read."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ConfigError(f"{OPTION}: needs the library transformers: pip install transformers") from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{OPTION}: {folder} holds no config.json: name the folder of a saved model of transformers")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    lost: list[str] = []
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        if torch.empty(0).device.type == "meta":
            model = AutoModel.from_config(config, trust_remote_code=False, **options)
        else:
            model, report = AutoModel.from_pretrained(
                folder, config=config, use_safetensors=True, output_loading_info=True, **local, **options
            )
            lost = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    except Exception as error:  # transformers and safetensors have many kinds of errors
        raise ConfigError(f"{OPTION}: {folder}: {error}") from error
    if config.is_encoder_decoder or lost:
        problem = f"lacks the weights {', '.join(lost[:3])}" if lost else "has a decoder"
        raise ConfigError(f"{OPTION}: the model in {folder} {problem}. Use a whole encoder, such as BERT.")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # the head has its own
    return model, int(config.hidden_size)

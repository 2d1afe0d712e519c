"""A pretrained encoder of transformers in the place of the embedding, with its own tokenizer; all of random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import results, run_in, small_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from research_eval.datasets.text import PAD, UNK, UNK_ID, TextDataset, encode_texts
from research_eval.datasets.text.pretrained import folder_tokenizer, has_known_steps
from research_eval.errors import ConfigError
from research_eval.layers.pretrained import PretrainedTrunk
from research_eval.runs.predict import TrainedModel
from research_eval.schema import ExperimentConfig

transformers = pytest.importorskip("transformers", reason="needs the extra `trace`")

TEXTS = ["good film , good actors", "a bad film and a bad end", "actors are good today", "the end is bad , sadly"]
FAMILIES = ["bert", "roberta", "xlm-roberta"]
WIDTH = 12


def tokenizer_of(family: str) -> Tokenizer:
    """A small tokenizer with the steps and special tokens of a family."""
    if family == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # As published: padding is 0, unknown words come later.
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=90, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"], show_progress=False
        )
    elif family == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    first, last = ("[CLS]", "[SEP]") if family == "bert" else ("<s>", "</s>")
    ids = [(name, tokenizer.token_to_id(name)) for name in (first, last)]
    tokenizer.post_processor = (
        processors.RobertaProcessing(ids[1], ids[0], add_prefix_space=False)
        if family == "roberta"
        else processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)
    )
    return tokenizer


def saved(family: str, folder: Path) -> Path:
    """The folder of a pretrained model of a family."""
    names = ("[PAD]", "[UNK]") if family == "bert" else ("<pad>", "<unk>")
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(family), pad_token=names[0], unk_token=names[1]
    )
    wrapped.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": len(wrapped),
        "max_position_embeddings": 40,
        "pad_token_id": wrapped.pad_token_id,
    }
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: saved(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_have_the_ids_that_the_encoder_knows(family: str, folders: dict[str, Path]) -> None:
    tokenizer, order_V = folder_tokenizer(folders[family])
    original = transformers.AutoTokenizer.from_pretrained(folders[family])
    assert (str(tokenizer.id_to_token(0)).strip(), tokenizer.token_to_id(UNK)) == (PAD, UNK_ID)
    assert (order_V[0], order_V[1]) == (original.pad_token_id, original.unk_token_id)
    assert sorted(order_V) == list(range(len(original)))

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.sampled_from(TEXTS), st.text(alphabet="abdefgilmnorst ,ä世", min_size=1, max_size=20)))
    def same(text: str) -> None:
        found = order_V[encode_texts(tokenizer, [text], 64).tokens].tolist()
        expected = original(text)["input_ids"]
        assert found == expected or not original(text, add_special_tokens=False)["input_ids"]

    same()
    read_back = Tokenizer.from_str(tokenizer.to_str())  # as from the folder of a run
    assert has_known_steps(json.loads(tokenizer.to_str()))
    assert read_back.encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_names_a_special_token_is_a_text(family: str, folders: dict[str, Path]) -> None:
    tokenizer, _ = folder_tokenizer(folders[family])
    tokens = encode_texts(tokenizer, ["good [PAD] <pad> [SEP] </s> film"], 60).tokens
    last = encode_texts(tokenizer, ["good"], 60).tokens[-1]
    assert [int((tokens == number).sum()) for number in (0, last)] == [0, 1]  # one stands at the end, as always


def test_cut_texts_keep_their_special_tokens(folders: dict[str, Path]) -> None:
    tokenizer, _ = folder_tokenizer(folders["bert"])
    whole = encode_texts(tokenizer, [TEXTS[1]], 60)
    inner = whole.tokens[1:-1]
    for truncation, kept in (("head", inner[:4]), ("head_tail", [*inner[:1], *inner[-3:]])):
        cut = encode_texts(tokenizer, [TEXTS[1]], 6, truncation)  # type: ignore[arg-type]
        assert cut.tokens.tolist() == [whole.tokens[0], *kept, whole.tokens[-1]]
        assert cut.full_lengths == len(whole.tokens)
    with pytest.raises(ConfigError, match="max_length=2: expected more than the 2 special tokens"):
        encode_texts(tokenizer, TEXTS, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_are_those_of_the_encoder(family: str, folders: dict[str, Path]) -> None:
    tokenizer, _ = folder_tokenizer(folders[family])
    trunk = PretrainedTrunk(str(folders[family]), tokenizer.get_vocab_size(), WIDTH, dropout=0.0).eval()
    trunk.learn(tokenizer, max_length=30)
    trunk.norm = torch.nn.Identity()  # type: ignore[assignment]
    rows = [encode_texts(tokenizer, [text], 30).tokens for text in TEXTS]
    longest = max(map(len, rows))
    ids_BL = torch.tensor(np.stack([np.pad(row, (0, longest - len(row))) for row in rows])).long()
    found_BLD = trunk(ids_BL, ids_BL > 0)
    original = transformers.AutoTokenizer.from_pretrained(folders[family])
    model = transformers.AutoModel.from_pretrained(folders[family]).eval()
    for row, text in enumerate(TEXTS):
        expected = model(**original(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(found_BLD[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def experiment(tmp_path: Path, folder: Path, **changes: Any) -> ExperimentConfig:
    """A config that trains on a CSV file with this encoder."""
    lines = [f"{TEXTS[row % 4].replace(',', '')} {row},{'good' if row % 2 == 0 else 'bad'}" for row in range(80)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]))
    data = {"data_dir": str(tmp_path / "reviews.csv"), "max_length": 16, "tokenizer_dir": str(folder)}
    return small_config(
        dataset_type="real_world",
        dataset_name="reviews",
        model_type=changes.get("model_type", "dense"),
        model_params={"embed_dim": 8, "num_heads": 2, "pretrained_dir": changes.get("encoder", str(folder))},
        dataset_params={**data, **changes.get("data", {})},
    )


@pytest.mark.parametrize("model_type", ["dense", "goe_original"])
def test_a_run_trains_the_encoder_and_is_read_back(
    model_type: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_in(tmp_path, experiment(tmp_path, folders["bert"], model_type=model_type))
    with results(tmp_path) as store:
        metrics = store.metrics(ended.experiment_id)
    assert metrics["inference_flops_per_sample"] > 0
    assert "active_flops_per_sample" not in metrics  # no formula knows a foreign encoder
    read = TrainedModel(tmp_path / "runs" / ended.experiment_id, device="cpu")
    trunk: Any = read.model.get_submodule("embedding")
    fresh = PretrainedTrunk(str(folders["bert"]), len(trunk.ids_V), 8, dropout=0.0)
    pairs = zip(trunk.encoder.parameters(), fresh.encoder.parameters(), strict=True)
    moved = [not torch.equal(after, before) for after, before in pairs]
    assert sum(moved) > 0.8 * len(moved)
    assert len(read.predict(["good actors today", "a bad end"])) == 2


def test_mistakes_are_said_before_a_run_begins(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            run_in(tmp_path, experiment(tmp_path, folders["bert"], **changes))
        return str(caught.value)

    assert "Set dataset_params.tokenizer_dir" in complaint(data={"tokenizer_dir": None})
    assert "Set dataset_params.tokenizer_dir" in complaint(data={"tokenizer_dir": str(folders["roberta"])})
    assert "leave out the options of training one" in complaint(data={"lowercase": False})
    assert "no config.json" in complaint(encoder=str(tmp_path))
    long = tmp_path / "long.csv"
    long.write_text("text,label\n" + "".join(f"{'good film ' * 30}{row},{row % 2}\n" for row in range(40)))
    assert "reads 40 tokens at most, and the longest text has 60" in complaint(
        data={"data_dir": str(long), "max_length": 60}
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in complaint()
    assert not (tmp_path / "runs").exists()


def test_pickled_weights_and_decoders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["bert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        PretrainedTrunk(str(tmp_path), 50, 8, dropout=0.0)
    transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Use a whole encoder"), torch.device("meta"):
        PretrainedTrunk(str(tmp_path), 50, 8, dropout=0.0)


def test_a_tokenizer_with_a_regular_expression_of_its_own_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bert")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="changes texts in a way that this program does not run"):
        folder_tokenizer(tmp_path)
    content = json.loads(folder_tokenizer(folders["xlm-roberta"])[0].to_str())
    assert has_known_steps(content)
    content["normalizer"]["normalizers"][1]["pattern"] = {"Regex": "(a+)+b"}
    assert not has_known_steps(content)


def test_a_dataset_has_the_tokenizer_of_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,label\n" + "".join(f'"{TEXTS[row % 4]}",{row % 2}\n' for row in range(40)))
    data = TextDataset(
        dataset_name="r",
        data_dir=str(tmp_path / "r.csv"),
        tokenizer_dir=str(folders["bert"]),
        cache_dir=str(tmp_path / "cache"),
    ).splits()
    assert data.tokenizer is not None
    first = data.tokenizer.token_to_id("[CLS]")
    assert (data.train.tokens[data.train.offsets[:-1]] == first).all()

"""`research_eval.trace`: what foreign models decide is recorded as executed, changes nothing, and is held to contracts.

All models are tiny, with random weights made from their configs.

B batch  n tokens  E experts  K experts per token
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import command
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import research_eval
from research_eval.cli.app import goe
from research_eval.errors import ConfigError
from research_eval.registry import LANGUAGE_MODELS, MODELS_MAP
from research_eval.tracing.contracts import FAILS, HOLDS, SKIPPED, Contract, agreement, contracts
from research_eval.tracing.decisions import matched_rows
from research_eval.tracing.find import find_layers
from research_eval.tracing.microscope import Trace

transformers = pytest.importorskip("transformers", reason="needs the extra `trace`")

E, K, VOCAB = 8, 2, 64
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E},
    "olmoe": {"num_experts": E},
    "qwen3_moe": {"num_experts": E, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": E, "sliding_window": 16},
    "deepseek_v3": {
        "n_routed_experts": E,
        "num_local_experts": E,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def made(family: str, **changes: Any) -> Any:
    """A model of a family whose gates are not near zero."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2 and len(parameter) == E:
            nn.init.normal_(parameter, std=0.5)
    return model


def batch_of(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Ids and mask [B, n] with padding at the right."""
    generator = torch.Generator().manual_seed(1)
    ids_Bn = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask_Bn = torch.ones_like(ids_Bn)
    for row in range(1, rows):
        mask_Bn[row, length - 4 * row :] = 0
    return {"input_ids": ids_Bn.masked_fill(mask_Bn == 0, 0), "attention_mask": mask_Bn}


def experts_of(record: Trace) -> np.ndarray:
    """All recorded experts, [R, L, K]."""
    parts = [np.asarray(table["experts"].combine_chunks().values) for table in record.parts()]
    return np.concatenate(parts).reshape(-1, len(record.layer_names), max(total.k for total in record.totals))


def column(record: Trace, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(table[name]) for table in record.parts()])


def by_name(found: list[Contract]) -> dict[str, Contract]:
    return {one.name: one for one in found}


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_RI: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x_RI)))


class HandMade(nn.Module):
    """What a user writes: a list of experts, a gate, and a loop. `leaks` gives every expert a part in every token."""

    def __init__(self, width: int = 16, leaks: bool = False, looks_ahead: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width) for _ in range(E))
        self.gate = nn.Linear(width, E)
        self.leaks, self.looks_ahead = leaks, looks_ahead

    def forward(self, x_BnI: Tensor) -> Tensor:
        flat_RI = x_BnI.flatten(0, 1)
        seen_RI = (x_BnI + 3 * x_BnI[:, -1:]).flatten(0, 1) if self.looks_ahead else flat_RI
        scores_RE = self.gate(seen_RI).softmax(-1)
        weights_RK, chosen_RK = scores_RE.topk(K, dim=-1)
        out_RI = torch.zeros_like(flat_RI)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen_RK == number).nonzero(as_tuple=True)
            if len(rows):
                out_RI = out_RI.index_add(0, rows, expert(flat_RI[rows]) * weights_RK[rows, places, None])
        if self.leaks:
            out_RI = out_RI + 0.01 * sum(expert.outer.weight.sum() for expert in self.experts)
        return out_RI.view_as(x_BnI)


class HandMadeModel(nn.Module):
    def __init__(self, checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(HandMade(**options) for _ in range(2))
        self.head = nn.Linear(16, VOCAB)
        self.checkpointed = checkpointed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h_BnI = self.embedding(input_ids)
        for block in self.blocks:
            h_BnI = h_BnI + (checkpoint(block, h_BnI, use_reentrant=False) if self.checkpointed else block(h_BnI))
        return self.head(h_BnI)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_traced_without_naming_anything(family: str) -> None:
    model, batch = made(family), batch_of()
    for training in (False, True):
        model.train(training)
        before = model(**batch)
        with research_eval.trace(model) as record:
            after = model(**batch)
        assert torch.equal(before.logits, after.logits), "tracing changes no bit"
        assert experts_of(record).shape == (36, 2, K)
    model.eval()
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in find_layers(model)[0].block.modules()
    )
    assert column(record, "token").tolist() == batch["input_ids"].flatten().tolist()
    assert column(record, "real").tolist() == (batch["attention_mask"].flatten() != 0).tolist()
    assert column(record, "position").tolist() == list(range(12)) * 3
    logits = model(**batch, output_router_logits=True).router_logits if family != "gpt_oss" else None
    if logits is not None and family != "deepseek_v3":  # its choice adds a bias, within groups
        for layer, logits_RE in enumerate(logits):
            chosen_RK = logits_RE.reshape(-1, E).topk(K, dim=-1).indices.sort(-1).values
            assert (np.sort(experts_of(record)[:, layer], axis=1) == chosen_RK.numpy()).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contracts_of_a_family_hold(family: str) -> None:
    model = made(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with research_eval.trace(model) as record:
        model(**batch_of())
    generator = torch.get_rng_state()
    found = by_name(contracts(record))
    for name in ("sparsity", "causality", "padding", "train/eval", "drops"):
        assert found[name].verdict == HOLDS, found[name]
    assert found["aux loss"].verdict in (HOLDS, SKIPPED)
    assert found["aux loss"].verdict == HOLDS or family == "deepseek_v3"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model.training


def test_a_list_of_experts_is_read_from_their_rows() -> None:
    model, batch = HandMadeModel().eval(), batch_of()
    gates: list[Tensor] = []
    handles = [block.gate.register_forward_hook(lambda _, __, out: gates.append(out)) for block in model.blocks]
    before = model(**batch)
    for handle in handles:
        handle.remove()
    with research_eval.trace(model) as record:
        after = model(**batch)
    assert torch.equal(before, after)
    for layer, logits_RE in enumerate(gates):
        chosen_RK = logits_RE.topk(K, dim=-1).indices.sort(-1).values
        assert (experts_of(record)[:, layer] == chosen_RK.numpy()).all()
    found = by_name(contracts(record))
    assert [found[name].verdict for name in ("sparsity", "causality", "padding")] == [HOLDS] * 3
    assert found["weights"].verdict == SKIPPED


def test_equal_rows_are_matched_in_order() -> None:
    states = torch.tensor([[1.0], [2.0], [1.0], [3.0]])
    rows = {0: torch.tensor([[1.0], [3.0]]), 2: torch.tensor([[1.0], [1.0]]), 1: torch.tensor([[2.0]])}
    assert matched_rows(states, rows).tolist() == [[0, 2], [1, -1], [2, -1], [0, -1]]


def test_rows_of_other_states_are_not_matched() -> None:
    states = torch.tensor([[1.0, 2.0]])
    for row in (torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0]]), torch.zeros(0, 2)):
        assert matched_rows(states, {0: row}) is None


class Changed(HandMade):
    """A layer whose experts read states that it has changed: those of its gate, or nobody's."""

    gate_too = True

    def forward(self, x_BnI: Tensor) -> Tensor:
        flat_RI = nn.functional.layer_norm(x_BnI.flatten(0, 1), x_BnI.shape[2:])
        scores_RE = self.gate(flat_RI if self.gate_too else x_BnI.flatten(0, 1)).softmax(-1)
        chosen_R = scores_RE.argmax(-1)
        self.chosen = chosen_R
        out_RI = torch.zeros_like(flat_RI)
        for number, expert in enumerate(self.experts):
            out_RI[chosen_R == number] = expert(x_RI=flat_RI[chosen_R == number])
        return out_RI.view_as(x_BnI)


class OwnMask(nn.Module):
    """Two layers of the same kind, called as `model(ids, mask)`; `times` calls each of them several times."""

    def __init__(self, kind: type[HandMade] = HandMade, times: int = 1, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, width)
        self.block, self.times = kind(width), times
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, fail: bool = False) -> Tensor:
        h_BnI = self.embedding(tokens)
        self.calls += 1
        for _ in range(self.times):
            h_BnI = h_BnI + self.block(h_BnI)
        if fail:
            raise RuntimeError("in the middle")
        return h_BnI


def test_layers_that_cannot_be_read_are_reported() -> None:
    batch = batch_of()
    for model, words in (
        (OwnMask(Changed), None),
        (OwnMask(type("Hidden", (Changed,), {"gate_too": False})), "neither the gate nor the layer was given"),
        (OwnMask(times=2), "several times"),
    ):
        with research_eval.trace(model.eval()) as record, torch.no_grad():
            model(batch["input_ids"], batch["attention_mask"])
        seen = by_name(contracts(record))["seen"]
        assert (seen.verdict == HOLDS) == (words is None), seen
        if words is None:
            assert experts_of(record)[:, 0, 0].tolist() == model.block.chosen.tolist()
        else:
            assert words in seen.figure
            assert words in str(record.facts()["unread"])


def test_arguments_by_place_and_failed_calls() -> None:
    model, batch = OwnMask().eval(), batch_of()
    with research_eval.trace(model) as record, torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"])
        with pytest.raises(RuntimeError, match="middle"):
            model(batch["input_ids"], fail=True)
        before = record.num_tokens, model.calls.item()
        report = record.report()
    assert (record.num_tokens, model.calls.item()) == before, "the report leaves the trace and the buffers alone"
    assert column(record, "real").tolist() == batch["attention_mask"].flatten().bool().tolist()
    assert before[0] == batch["input_ids"].numel()
    assert re.search("causality +holds", report), report
    with record, pytest.raises(ConfigError, match="entered already"):
        record.__enter__()
    embedded = made("mixtral")
    with research_eval.trace(embedded) as record:
        embedded(inputs_embeds=torch.randn(2, 5, 16), attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert column(record, "token").tolist() == [-1] * 10
    assert by_name(contracts(record))["causality"].figure == "the model was called without token ids"


def test_numbers_that_are_none_are_said_and_saved(tmp_path: Path) -> None:
    model = HandMadeModel().eval()
    nn.init.constant_(model.blocks[1].gate.bias, float("nan"))
    with research_eval.trace(model) as record:
        model(**batch_of())
    assert by_name(contracts(record, checks=False))["entropy"].verdict == FAILS
    facts = json.loads((record.save(tmp_path) / "trace.json").read_text())
    assert facts["entropy"][0] > 0
    assert facts["entropy"][1] is None


def test_probabilities_of_a_gate_are_taken_as_they_are() -> None:
    model = HandMadeModel().eval()
    with research_eval.trace(model) as record:
        model(**batch_of())
    for block in model.blocks:
        block.gate = nn.Sequential(block.gate, nn.Softmax(-1))
    with research_eval.trace(model) as again:
        model(**batch_of())
    assert again.totals[0].mean_entropy() == pytest.approx(record.totals[0].mean_entropy(), rel=1e-5)


def test_traces_of_one_model_can_be_nested() -> None:
    torch.manual_seed(0)
    model = MODELS_MAP["goe"](vocab_size=VOCAB, num_classes=3, embed_dim=16, num_heads=2).eval()
    batch = {"input_ids": batch_of()["input_ids"]}
    with research_eval.trace(model) as outer:
        with research_eval.trace(model) as inner:
            model(**batch)
        model(**batch)
    assert (outer.num_tokens, inner.num_tokens) == (6, 3)
    assert "push" not in vars(model.recorder())


def test_broken_copies_fail_their_contract() -> None:
    for options, name in (({"leaks": True}, "sparsity"), ({"looks_ahead": True}, "causality")):
        model = HandMadeModel(**options).eval()
        with research_eval.trace(model) as record:
            model(**batch_of())
        found = by_name(contracts(record))
        assert found[name].verdict == FAILS, found[name]
        others = {"sparsity", "causality"} - {name}
        assert all(found[other].verdict == HOLDS for other in others)
    # A last token that every gate reads is padding, if there is any.
    assert found["padding"].verdict == FAILS
    model = made("mixtral")
    inner = model.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if output.aux_loss is not None:
            output.aux_loss = 2 * output.aux_loss
        return output

    model.forward = wrong
    with research_eval.trace(model) as record:
        model(**batch_of())
    assert by_name(contracts(record))["aux loss"].verdict == FAILS


def test_padding_is_not_counted() -> None:
    model, batch = made("mixtral"), batch_of()
    with research_eval.trace(model) as record:
        model(**batch)
    real_R = batch["attention_mask"].flatten().numpy() != 0
    counts = np.bincount(experts_of(record)[real_R, 0].ravel(), minlength=E)
    assert record.totals[0].counts_E.tolist() == counts.tolist()
    assert record.totals[0].tokens == int(real_R.sum())
    output = model(**batch, output_router_logits=True)
    probabilities = output.router_logits[0].detach().softmax(-1).reshape(-1, E)[torch.from_numpy(real_R)].mean(0)
    formula = E * float((torch.from_numpy(counts) / real_R.sum() * probabilities).sum())
    assert record.totals[0].balance_loss() == pytest.approx(formula, rel=1e-6)


def test_generation_with_a_cache_autocast_and_checkpointing() -> None:
    model = made("mixtral")
    prompt = batch_of(1, 5)["input_ids"]
    with research_eval.trace(model) as record, torch.no_grad():
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert column(record, "token").tolist() == text[0, :-1].tolist(), "the last token is never read"
    assert column(record, "position").tolist() == list(range(8))
    with torch.autocast("cpu", torch.bfloat16), research_eval.trace(model) as record:
        model(**batch_of())
    assert (experts_of(record) >= 0).all()
    plain, again = HandMadeModel(), HandMadeModel(checkpointed=True)
    gradients = []
    for one in (plain, again):
        with research_eval.trace(one) as record:
            one(**batch_of()).square().sum().backward()
        assert record.num_tokens == 36, "the second forward of a checkpoint is not recorded"
        gradients.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_memory_is_bounded_and_sums_are_exact() -> None:
    model = made("olmoe")
    with research_eval.trace(model) as whole:
        for _ in range(5):
            model(**batch_of())
    with research_eval.trace(model, every=7, buffered=10) as some:
        for _ in range(5):
            model(**batch_of())
    assert len(some._parts) > 1
    assert some._in_memory < 10
    assert column(some, "token").tolist() == column(whole, "token")[::7].tolist()
    assert (experts_of(some) == experts_of(whole)[::7]).all()
    assert some.totals[1].counts_E.tolist() == whole.totals[1].counts_E.tolist()
    assert some.num_tokens == 180
    with pytest.raises(ConfigError, match="every=0"):
        Trace(model, every=0)


@pytest.mark.parametrize("model_type", ["moe", "goe", "goe_original"])
def test_our_models_are_traced_through_the_same_recorder(model_type: str) -> None:
    torch.manual_seed(0)
    model = MODELS_MAP[model_type](vocab_size=VOCAB, num_classes=3, embed_dim=16, num_heads=2).eval()
    batch = batch_of()
    batch["attention_mask"] = batch["attention_mask"].bool()
    expected = model(**batch)
    recorder = model.recorder()
    assert recorder is not None
    with research_eval.trace(model) as record:
        found = model(**batch)
    assert torch.equal(found, expected)
    assert "push" not in vars(recorder)
    real = int(batch["attention_mask"].sum())
    assert record.num_tokens == (real if model_type == "moe" else 3)
    if model_type == "moe":
        assert column(record, "token").tolist() == batch["input_ids"][batch["attention_mask"]].tolist()
    else:
        assert (experts_of(record)[:, :, 0] == model.recorded_paths()[-3:]).all()
    assert "load" in record.report()
    language = LANGUAGE_MODELS["goe"](vocab_size=VOCAB, max_length=12, embed_dim=16, num_heads=2).eval()
    with research_eval.trace(language) as record:
        language(batch["input_ids"], batch["attention_mask"])
    assert record.num_tokens == real
    dense = MODELS_MAP["dense"](vocab_size=VOCAB, num_classes=3, embed_dim=16, num_heads=2)
    with pytest.raises(ConfigError, match="has no routed layer"):
        research_eval.trace(dense)


def test_layers_can_be_named_and_mistakes_are_said() -> None:
    model = made("mixtral")
    name = find_layers(model)[1].name
    with research_eval.trace(model, names=[name]) as record:
        model(**batch_of())
    assert record.layer_names == [name]
    with pytest.raises(ConfigError, match=rf"is no routed layer.*{re.escape(name)}"):
        research_eval.trace(model, names=[name[:-1]])
    with pytest.raises(ConfigError, match="has no routed layer"):
        research_eval.trace(nn.Linear(2, 2))
    with research_eval.trace(model) as record:
        pass
    with pytest.raises(ConfigError, match="nothing was recorded"):
        record.save("nowhere")


def test_two_seeds_agree_by_chance_and_a_copy_with_itself() -> None:
    batch, records = batch_of(8, 40), []
    for seed in (0, 0, 1):
        model = made("mixtral")
        if seed:
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
        with research_eval.trace(model) as record:
            model(**batch)
        records.append(record)
    assert all(share == 1 for _, share, _ in agreement(records[0], records[1]))
    for _, share, chance in agreement(records[0], records[2]):
        assert share < 0.8
        assert chance < share + 0.1
    with research_eval.trace(made("mixtral")) as other:
        made("olmoe")
        other.model(**batch_of())
    with pytest.raises(ValueError, match="not of the same tokens"):
        agreement(records[0], other)


# ------------------------------------------------------------ discrepancies of the pinned release of transformers


def test_a_cached_step_reports_a_wrong_balance_loss() -> None:
    """transformers 5.23: the mask of all positions is laid over the one row of a cached step."""
    model, ids = made("mixtral"), batch_of(1, 7)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        with research_eval.trace(model) as record:
            step = model(
                input_ids=ids[:, 6:],
                past_key_values=cache,
                attention_mask=torch.ones(1, 7, dtype=torch.long),
                output_router_logits=True,
            )
    pooled = np.mean([total.balance_loss() for total in record.totals])
    reported = step.aux_loss.item()
    if reported == pytest.approx(pooled, rel=0.3):
        pytest.skip(f"transformers {transformers.__version__} has mended this")
    assert reported < K, "no balance loss can be below the number of experts per token"


def test_pooled_layers_hide_a_collapse() -> None:
    """transformers 5.23: layers that each use one pair of experts look balanced together."""
    model = made("mixtral", num_hidden_layers=4)
    for number, layer in enumerate(find_layers(model)):
        gate: Any = layer.gate
        with torch.no_grad():
            gate.weight.zero_()
            gate.weight[2 * number : 2 * number + 2] = 5.0
    for module in model.modules():
        if "Norm" in type(module).__name__:
            nn.init.constant_(module.weight, 1.0)
    batch = batch_of(4, 12)
    with research_eval.trace(model) as record:
        output = model(**batch, output_router_logits=True)
    per_layer = [total.balance_loss() for total in record.totals]
    used = [int((total.counts_E > 0).sum()) for total in record.totals]
    assert output.aux_loss.item() < np.mean(per_layer) - 0.3, (per_layer, used)


# ---------------------------------------------------------------------------------------------------- files and pages


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model with a tokenizer, and texts beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = ["The king has 3 roses .", "A rose is a rose .", "Who has the king ?"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[EOS]"]))
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    made("mixtral").save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("\n".join(texts * 3))
    return tmp_path


def test_a_saved_model_is_traced_by_one_command(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / "roses.txt").write_text("A rose\n" * 3)
    words = ["trace", "--model", "model", "--data", "texts.txt", "roses.txt", "--out", "traces/m", "--agree", "model"]
    ended = command(goe, *words, "--batch_size", "2")
    assert ended.code == 0, ended.err
    for name in ("load", "sparsity", "causality", "padding", "aux loss"):
        assert re.search(rf"^{name} +{HOLDS}|^{name} +look", ended.out, re.MULTILINE), (name, ended.out)
    assert ended.out.count("agreement") == 2
    assert "1.000 (by chance" in ended.out
    facts = json.loads((saved / "traces/m/trace.json").read_text())
    table = pq.read_table(saved / "traces/m/tokens.parquet")
    assert table.num_rows == facts["tokens"]
    assert facts["k"] == [K, K]
    assert "king" in facts["names"].values()
    out = saved / "atlas.html"
    ended = command(goe, "atlas", "--trace", "traces/m", "--out", str(out))
    assert ended.code == 0, ended.err
    data = json.loads(re.search(r'id="goe-data">(.*?)</script>', out.read_text(), re.DOTALL)[1])  # type: ignore[index]
    epoch = data["answers"]["/api/run/trace/atlas/1"]
    assert (epoch["experts"], epoch["steps"], epoch["samples"]) == (E, 2, int(np.asarray(table["real"]).sum()))
    group_R = np.frombuffer(base64.b64decode(epoch["columns"]["group"]["data"]), np.int16)
    assert np.bincount(group_R).tolist()[1] == 6, "three texts of two words"
    assert data["answers"]["/api/run/trace/samples"]["names"]["groups"] == ["texts", "roses"]


def test_a_damaged_trace_is_one_message(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    with research_eval.trace(made("mixtral")) as record:
        record.model(**batch_of())
    record.save("t")
    facts, tokens = Path("t/trace.json"), Path("t/tokens.parquet")
    good = facts.read_text(), tokens.read_bytes()
    for text, content in (
        ("[]", good[1]),
        (good[0].replace('"layers"', '"other"'), good[1]),
        (good[0].replace('"num_experts": [8, 8]', '"num_experts": "many"'), good[1]),
        (good[0], good[1][:100]),
    ):
        facts.write_text(text)
        tokens.write_bytes(content)
        ended = command(goe, "atlas", "--trace", "t", "--out", "a.html")
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert not Path("a.html").exists()


def test_what_the_commands_refuse(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    good = ["trace", "--model", "model", "--data", "texts.txt", "--out", "t"]
    (saved / "empty.txt").write_text("\n\n")
    (saved / "t2").mkdir()
    for words, text in (
        ([*good[:2], "nothing", *good[3:]], "holds no config.json"),
        ([*good[:4], "none.txt", *good[5:]], "none.txt"),
        ([*good[:4], "empty.txt", *good[5:]], "has no text"),
        ([*good, "--every", "0"], "--every: expected at least 1"),
        (["atlas", "--trace", "t2"], "trace.json"),
        (["atlas"], "give --run"),
    ):
        ended = command(goe, *words)
        assert (ended.code, text in ended.err) == (2, True), (words, ended.err)
    (saved / "model" / "model.safetensors").rename(saved / "model" / "pytorch_model.bin")
    assert command(goe, *good).code == 2

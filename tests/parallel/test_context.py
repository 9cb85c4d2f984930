"""A transformers model over cp ranks gives what it gives in one process: loss, logits, gradients."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_helpers import Ranks
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from kenotron.parallel.context import KINDS, ContextKind, ContextParallel

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import tiny

BATCH, LENGTH = 2, 24


class Holder(nn.Module):
    """What stands for a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _axis(group: ProcessGroup, kind: ContextKind) -> ContextParallel:
    return ContextParallel(group=group, rank=group.rank(), size=group.size(), kind=kind)


def _pair(group: ProcessGroup, kind: ContextKind, architecture: str, **settings: Any) -> tuple[Any, Any]:
    """Return a model as it is, and the same one over the ranks."""
    torch.manual_seed(0)
    plain = tiny.build(architecture, layers=2, **settings)
    for name, param in plain.named_parameters():
        if "sinks" in name or "bias" in name:
            nn.init.normal_(param)
    cut = Holder(copy.deepcopy(plain))
    _axis(group, kind).apply(cut)
    return plain, cut.model


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(1, tiny.VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _same_gradients(group: ProcessGroup, plain: nn.Module, cut: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, expected), param in zip(plain.named_parameters(), cut.parameters(), strict=True):
        if expected.grad is None:
            assert param.grad is None, name
            continue
        mean = torch.zeros_like(expected.grad) if param.grad is None else param.grad.clone()
        dist.all_reduce(mean, group=group)
        mean /= group.size()
        bar = tolerance * max(1e-2, float(expected.grad.abs().max()))
        assert float((mean - expected.grad).abs().max()) <= bar, name


def inputs_of(what: str) -> dict[str, Tensor]:
    ids = _ids()
    if what == "packed":
        lengths = [7, 5, 12]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(BATCH, LENGTH)
        return {"input_ids": ids, "position_ids": positions}
    if what == "flattened":  # as DataCollatorWithFlattening: one row, and where documents begin
        starts = torch.tensor([0, 7, 12, 24], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in (7, 5, 12)])[None]
        return {"input_ids": ids[:1], "position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    if what == "padding":
        mask = torch.ones_like(ids)
        mask[0, 17:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if what == "all ones":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if what == "embeddings":
        return {"inputs_embeds": torch.randn(BATCH, LENGTH, 64, generator=torch.Generator().manual_seed(2))}
    return {"input_ids": _ids(21) if what == "odd length" else ids}


def labels_give_the_same_loss(group: ProcessGroup, kind: ContextKind, architecture: str, what: str) -> None:
    plain, cut = _pair(group, kind, architecture)
    inputs = inputs_of(what)
    like = next(iter(inputs.values()))
    labels = _ids(like.shape[1])[: like.shape[0]].clone()
    labels[:, 3:6] = -100  # and unevenly over the ranks
    if "attention_mask" in inputs:
        labels[inputs["attention_mask"] == 0] = -100
    given = {name: value for name, value in inputs.items() if not name.startswith("cu_")}  # what SDPA does not know
    given["use_cache"] = False  # with a cache transformers does not look for documents
    expected = plain(**given, labels=labels)
    expected.loss.backward()
    found = cut(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    _same_gradients(group, plain, cut)
    with pytest.raises(ValueError, match="without labels"):
        found.logits.argmax(-1)
    with pytest.raises(ValueError, match="without labels"):
        F.softmax(found.logits, -1)
    with torch.no_grad():
        torch.testing.assert_close(cut(**inputs, labels=labels).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)


def own_loss_from_logits(group: ProcessGroup, kind: ContextKind, architecture: str) -> None:
    """A user who shifts labels by hand, weights tokens, and uses hidden states too."""
    plain, cut = _pair(group, kind, architecture)
    ids, weight = _ids(21), torch.rand(BATCH, 20, generator=torch.Generator().manual_seed(3))
    losses = []
    for model in (plain, cut):
        out = model(ids, output_hidden_states=True)
        assert out.logits.shape == (BATCH, 21, tiny.VOCABULARY)
        each = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(BATCH, 20)
        loss = (each * weight).sum() / weight.sum() + 0.1 * out.hidden_states[-1].square().mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    _same_gradients(group, plain, cut)


def masked_labels(group: ProcessGroup, kind: ContextKind) -> None:
    config = AutoConfig.for_model(
        "eurobert", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        pad_token_id=0, mask_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForMaskedLM.from_config(config)
    cut = Holder(copy.deepcopy(plain))
    _axis(group, kind).apply(cut)
    ids = _ids(21) % 96
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    labels = ids.masked_fill(hidden | (mask == 0), -100)
    expected = plain(input_ids=ids, attention_mask=mask, labels=labels).loss
    found = cut.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    _same_gradients(group, plain, cut.model)


def backbone(group: ProcessGroup) -> None:
    torch.manual_seed(0)
    plain = AutoModel.from_config(tiny.build("llama", layers=1).config)
    cut = Holder(copy.deepcopy(plain))
    _axis(group, "ulysses").apply(cut)
    expected, found = plain(_ids(21))[0], cut.model(_ids(21))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cut.model(_ids(21), return_dict=False)[0].shape == expected.shape


def halves_are_close(group: ProcessGroup, kind: ContextKind) -> None:
    plain, cut = _pair(group, kind, "llama")
    plain, cut = plain.bfloat16(), cut.bfloat16()
    expected, found = plain(_ids(), labels=_ids()).loss, cut(_ids(), labels=_ids()).loss
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def refusals(group: ProcessGroup) -> None:
    def refused(model: nn.Module, kind: ContextKind, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            _axis(group, kind).apply(Holder(model))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.MultiheadAttention(8, 2)

    refused(Own(), "ring", r"no transformers model.*\(model.mixer\)")
    odd = AutoConfig.for_model("llama", hidden_size=48, num_attention_heads=3, num_hidden_layers=1, vocab_size=96)
    refused(AutoModelForCausalLM.from_config(odd), "ulysses", "splits 3 attention heads")
    config = tiny.build("llama", layers=1).config
    config.pad_token_id = 0
    refused(AutoModelForSequenceClassification.from_config(config), "ring", "is no language model")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused(tiny.build("llama", layers=1, rope_parameters=rope), "ring", "rope_type='dynamic'")
    _, cut = _pair(group, "ring", "llama")
    with pytest.raises(ValueError, match=r"attention_mask is of shape \(2, 1, 24, 24\)"):
        cut(_ids(), attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match="without input_ids"):
        cut(labels=_ids())
    _, dropping = _pair(group, "ring", "llama", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1"):
        dropping.train()(_ids())


CASES = [
    ("llama", "plain"), ("llama", "packed"), ("llama", "padding"), ("llama", "embeddings"), ("llama", "odd length"),
    ("mixtral", "all ones"), ("gpt_oss", "plain"), ("gemma2", "packed"), ("deepseek_v3", "odd length"), ("phi3", "padding"),
]  # fmt: skip
MORE = [
    ("llama", "flattened"), ("qwen3", "packed"), ("gemma3_text", "plain"), ("starcoder2", "packed"), ("gpt_neox", "plain"),
    ("olmo2", "plain"), ("qwen3_moe", "padding"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "what"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_give_the_same_loss(ranks: Ranks, kind: ContextKind, architecture: str, what: str) -> None:
    ranks(labels_give_the_same_loss, kind, architecture, what, size=2)


@pytest.mark.parametrize("what", ["packed", "odd length"])
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks(ranks: Ranks, kind: ContextKind, what: str) -> None:
    ranks(labels_give_the_same_loss, kind, "llama", what, size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_the_caller_computes_what_it_wants(ranks: Ranks, kind: ContextKind) -> None:
    ranks(own_loss_from_logits, kind, "llama", size=2)


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_models_with_masked_labels(ranks: Ranks, kind: ContextKind) -> None:
    ranks(masked_labels, kind, size=2)


def test_a_backbone_without_a_head(ranks: Ranks) -> None:
    ranks(backbone, size=2)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(ranks: Ranks, kind: ContextKind) -> None:
    ranks(halves_are_close, kind, size=2)


def test_what_cannot_be_cut_is_refused(ranks: Ranks) -> None:
    ranks(refusals, size=2)

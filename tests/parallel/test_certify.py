"""What models make of whole sequences, before and beside attention, is found before they are cut: then right, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_helpers import Ranks
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.masking_utils import create_causal_mask

from kenotron.parallel.certify import Tape, Verdict, check_mask
from kenotron.parallel.context import KINDS, ContextKind, ContextParallel, look
from kenotron.parallel.init import deferring

PAD, WORDS = 1, 60


def _config(kind: str, **settings: Any) -> Any:
    common = {
        "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 48, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**common, **settings})


SETTINGS: dict[str, dict[str, Any]] = {
    "roberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "llama": {"num_key_value_heads": 2},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "doge": {"num_key_value_heads": 2, "keep_window_size": 4},
}


def _model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_config(kind, **SETTINGS[kind], **settings))


def _masked_model() -> Any:
    torch.manual_seed(0)
    settings = {**SETTINGS["roberta"], "is_decoder": False}
    return AutoModelForMaskedLM.from_config(_config("roberta", **settings))


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _verdict(model: nn.Module, kind: ContextKind = "ring") -> Verdict:
    look(Holder(model), 2, kind)
    found = next(value for value in model.__dict__.values() if isinstance(value, Verdict))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "expected"), [("llama", "alike"), ("gemma3_text", "alike"), ("roberta", "entered"), ("opt", "entered")]
)
def test_models_that_make_positions_of_whole_sequences_are_found(name: str, expected: str, kind: ContextKind) -> None:
    assert _verdict(_model(name), kind) == Verdict(expected)  # type: ignore[arg-type]


def test_models_without_data_are_tried_as_well_and_stay_what_they_are() -> None:
    with deferring():
        model = _model("roberta")
    assert _verdict(model).kind == "entered"
    assert all(param.is_meta for param in model.parameters()) and model.config._attn_implementation != "kenotron_context"


class Shift(nn.Module):
    """An MLP that looks at the token before."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x + 0.5 * F.pad(x, (0, 0, 1, 0))[:, :-1])
        return out


def test_what_mixes_tokens_outside_of_attention_is_refused() -> None:
    model = _model("llama")
    model.model.layers[0].mlp = Shift(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM computes with neighbouring tokens.*Set cp=1"):
        look(Holder(model), 2, "ring")


def test_masks_of_the_models_own_are_refused() -> None:
    with pytest.raises(ValueError, match="DogeAttention hands a mask of its own to attention"):
        look(Holder(_model("doge")), 2, "ring")
    model = _model("llama")
    model.config._attn_implementation = "eager"
    rules: list[Any] = []

    def note(rule: Any) -> None:
        rules.append(rule)
        check_mask(rule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_masks(), "eager", lambda **given: note(given["mask_function"]))
        make = {"config": model.config, "inputs_embeds": torch.zeros(1, 8, 32), "attention_mask": None, "past_key_values": None}
        create_causal_mask(**make)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"masks by a rule of its own \(.*or_mask"):
            create_causal_mask(**make, or_mask_function=lambda b, h, q, k: q == k)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"masks by a rule of its own \(.*or_mask"):
            create_causal_mask(**make, block_sequence_ids=torch.zeros(1, 8))  # type: ignore[arg-type]
    assert len(rules) == 3


def _masks() -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


def test_a_window_that_the_mask_alone_knows_is_refused() -> None:
    q = torch.zeros(1, 2, 3, 4)
    tape = Tape(masks={(True, 4)})
    assert tape.note(nn.Identity(), q, q[:, :1], q[:, :1], True, 4).shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"Identity has causal=True, window=None, but.* of causal=True, window=4"):
        tape.note(nn.Identity(), q, q, q, True, None)


# ---- On ranks ----------------------------------------------------------------------------------------------------------


def _own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def counted_positions(group: ProcessGroup, kind: ContextKind, what: str) -> None:
    plain = _masked_model() if what == "masked roberta" else _model(what)
    cut = Holder(copy.deepcopy(plain))
    ContextParallel(group=group, rank=group.rank(), size=group.size(), kind=kind).apply(cut)
    ids = torch.randint(4, WORDS, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 17:] = 0, 0  # the first sequence is padded on the left
    ids[mask == 0] = PAD
    ids[1, 3] = PAD
    labels = ids.masked_fill(mask == 0, -100)
    if what == "masked roberta":  # whose own loss does not go through its loss_function
        expected, found = (_own_loss(model(input_ids=ids, attention_mask=mask).logits, labels) for model in (plain, cut.model))
    else:
        expected = plain(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        found = cut.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    for (name, one), other in zip(plain.named_parameters(), cut.model.parameters(), strict=True):
        if one.grad is None:
            continue
        mean = torch.zeros_like(one) if other.grad is None else other.grad.clone()
        dist.all_reduce(mean, group=group)
        bar = 1e-5 * max(1e-2, float(one.grad.abs().max()))
        assert float((mean / group.size() - one.grad).abs().max()) <= bar, name
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask}
        logits, own = plain(**given).logits, cut.model(**given, output_hidden_states=True)
        torch.testing.assert_close(own.logits[mask == 1], logits[mask == 1], rtol=1e-4, atol=1e-5)
        assert all(hidden.shape[:2] == ids.shape for hidden in own.hidden_states)


@pytest.mark.parametrize("what", ["roberta", "masked roberta", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_that_the_model_makes_itself(ranks: Ranks, kind: ContextKind, what: str) -> None:
    ranks(counted_positions, kind, what, size=2)


def untold_positions(group: ProcessGroup) -> None:
    cut = Holder(_model("roberta"))
    axis = ContextParallel(group=group, rank=group.rank(), size=group.size(), kind="ring", pp=2)
    axis.apply(cut)
    ids = torch.arange(4, 28)[None]
    with pytest.raises(ValueError, match=r"with pp > 1. Call it with position_ids"):
        cut.model(input_ids=ids)
    plain = _model("roberta")
    positions = torch.arange(24)[None] + PAD + 1
    found, expected = (model(input_ids=ids, position_ids=positions).logits for model in (cut.model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_where_a_model_can_not_be_entered_positions_are_asked_for(ranks: Ranks) -> None:
    ranks(untold_positions, size=2)

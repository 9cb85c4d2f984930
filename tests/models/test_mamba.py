"""Mamba and Mamba-2 against transformers' own models with the same weights: logits, gradients, states, generation."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn.functional import silu, softplus
from transformers import AutoConfig, AutoModelForCausalLM

from kenotron.models import Mamba, kernels, scan

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
FAMILIES = {
    "mamba": ("mamba", {}),
    "mamba, untied, biases": (
        "mamba",
        {
            "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "residual_in_fp32": False, "expand": 3,
            "time_step_rank": 5, "conv_kernel": 3, "hidden_act": "gelu",
        },
    ),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "mamba2, one group": ("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "tie_word_embeddings": True}),
    "mamba2, limits, biases": (
        "mamba2",
        {
            "num_heads": 8, "head_dim": 8, "n_groups": 4, "use_bias": True, "use_conv_bias": False,
            "time_step_limit": (0.01, 0.05),
        },
    ),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_seed_and_one_thread")


def pair(family: str, **settings):
    """Return transformers' model and ours with the same weights, none of which is zero or one."""
    model_type, own = FAMILIES[family]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **own, **settings}))
    for param in theirs.parameters():
        if param.ndim < 2:
            param.data.add_(torch.randn_like(param), alpha=0.1)
    ours = Mamba(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family):
    theirs, ours = pair(family)
    ids = tokens(2, 37)
    assert (theirs(ids, use_cache=False).logits - ours(ids).logits).abs().max() <= 1e-5
    loss, mine = theirs(ids, labels=ids).loss, ours(ids, labels=ids)
    torch.testing.assert_close(mine.loss, loss, rtol=1e-6, atol=1e-6)
    assert mine.logits is None
    expected, found = gradients(theirs, loss), gradients(ours, mine.loss)
    exact = gradients(ours.double(), ours(ids, labels=ids).loss)
    for name, true in exact.items():
        assert (found[name] - true).norm() <= 1e-5 * true.norm(), name
        lost = (expected[name] - true).norm()  # digits, by theirs
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm() + lost, name


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_seen_as_by_transformers_and_documents_start_anew(family):
    theirs, ours = pair(family)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    expected, found = theirs(ids, attention_mask=mask, use_cache=False).logits, ours(ids, attention_mask=mask).logits
    assert (expected - found)[mask.bool()].abs().max() <= 1e-5
    positions = torch.cat([torch.arange(7), torch.arange(1), torch.arange(12)])[None]
    alone = torch.cat([ours(part).logits for part in ids.split([7, 1, 12], 1)], 1)
    assert (ours(ids, position_ids=positions).logits - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_that_of_transformers(family, use_cache):
    theirs, ours = (model.eval() for model in pair(family))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    how = {"max_new_tokens": 8, "use_cache": use_cache, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    for beams in (1, 3):
        expected = theirs.generate(ids, attention_mask=mask, num_beams=beams, **how)
        assert torch.equal(ours.generate(ids, attention_mask=mask, num_beams=beams, **how), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_that_are_given_are_gone_on_with(family):
    _, ours = pair(family)
    ids = tokens(2, 15)
    first = ours.eval()(ids[:, :6])
    second = ours(ids[:, 6:7], cache_params=first.cache_params)
    third = ours(ids[:, 7:], cache_params=second.cache_params)
    assert third.cache_params.get_seq_length() == 15
    joined = torch.cat([step.logits for step in (first, second, third)], 1)
    assert (joined - ours(ids).logits).abs().max() <= 1e-5


def test_recomputed_blocks_give_the_same_gradients():
    _, ours = pair("mamba2")
    ids = tokens(2, 12)
    expected = torch.autograd.grad(ours(ids, labels=ids).loss, list(ours.parameters()))
    ours.gradient_checkpointing_enable()
    found = torch.autograd.grad(ours.train()(ids, labels=ids).loss, list(ours.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_initial_weights_are_spread_as_transformers_spreads_them(family):
    model_type, settings = FAMILIES[family]
    settings = {**SIZES, **settings, "hidden_size": 64, "rescale_prenorm_residual": True}
    settings |= {"head_dim": 16} if family == "mamba2" else {}
    config = AutoConfig.for_model(model_type, **settings)
    theirs, ours = dict(AutoModelForCausalLM.from_config(config).named_parameters()), dict(Mamba(config).named_parameters())
    assert theirs.keys() == ours.keys()
    for name, param in ours.items():
        expected, found = (torch.stack([p.mean(), p.std()]) for p in (theirs[name], param))
        torch.testing.assert_close(found, expected, rtol=0.35, atol=0.08 * expected[1].item() + 1e-6, msg=name)
    bias = next(param for name, param in ours.items() if name.endswith(("dt_proj.bias", "dt_bias")))
    steps = softplus(bias)
    assert config.time_step_min * 0.99 <= steps.min() < steps.max() <= config.time_step_max * 1.01


# ---- mamba-ssm ------------------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install modules with the names, signatures and layouts of mamba-ssm and causal-conv1d; return what is called."""
    calls: list[str] = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        assert x.stride(1) == 1  # channels side by side, which documents need
        assert weight.ndim == 2
        assert activation == "silu"
        assert seq_idx is None or seq_idx.dtype == torch.int32
        calls.append("causal_conv1d_fn")
        starts = None if seq_idx is None else torch.nn.functional.pad(seq_idx.diff(dim=1) != 0, (1, 0))
        return silu(scan.causal_conv(x.transpose(1, 2), weight.unsqueeze(1), bias, starts_BS=starts)).transpose(1, 2)

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        calls.append("selective_scan_fn")
        y, state = scan.selective_scan(*(t.transpose(1, 2) for t in (u, delta)), A, *(t.transpose(1, 2) for t in (B, C)))
        return y.transpose(1, 2), state

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                                  dt_softplus=False, return_final_states=False):  # fmt: skip
        calls.append("mamba_chunk_scan_combined")
        starts = None if seq_idx is None else torch.nn.functional.pad(seq_idx.diff(dim=1) != 0, (1, 0))
        return scan.chunk_scan(x, dt, A, B, C, initial_BHPN=initial_states, starts_BS=starts)

    def module(name: str, **functions: object) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(functions)
        made.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, made)

    module("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module(name)
    module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    return calls


@pytest.mark.parametrize(
    ("family", "expected"),
    [("mamba", {"selective_scan_fn", "causal_conv1d_fn"}), ("mamba2", {"mamba_chunk_scan_combined", "causal_conv1d_fn"})],
)
def test_installed_kernels_are_called_as_they_want_it(monkeypatch, family, expected):
    _, ours = pair(family)
    ids, positions = tokens(2, 20), torch.cat([torch.arange(7), torch.arange(13)])[None]
    plain = ours(ids).logits, ours(ids, position_ids=positions).logits
    calls = stand_in(monkeypatch)
    assert kernels.choose_scan(torch.device("cuda")) == "mamba_ssm"
    assert kernels.choose_scan(torch.device("cpu")) == "torch"
    fused = Mamba(ours.config, scan="mamba_ssm")
    fused.load_state_dict(ours.state_dict())
    assert (fused(ids).logits - plain[0]).abs().max() <= 1e-6
    assert set(calls) == expected
    assert (fused(ids, position_ids=positions).logits - plain[1]).abs().max() <= 1e-6


def test_bad_input_is_told():
    config = AutoConfig.for_model("mamba", **SIZES)
    with pytest.raises(ValueError, match=r"scan='cuda' is unknown\. Set scan to one of 'auto', 'mamba_ssm', 'torch'"):
        Mamba(config, scan="cuda")
    with pytest.raises(ValueError, match="needs the packages mamba-ssm and causal-conv1d"):
        Mamba(config, scan="mamba_ssm")
    with pytest.raises(ValueError, match="model_type='llama' is not covered by Mamba, which knows mamba, mamba2"):
        Mamba(AutoConfig.for_model("llama"))
    with pytest.raises(ValueError, match=r"n_groups=3: set the second to a divisor"):
        Mamba(AutoConfig.for_model("mamba2", **SIZES, num_heads=8, head_dim=8, n_groups=3))
    with pytest.raises(ValueError, match="z_loss=-1"):
        Mamba(config, z_loss=-1)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        Mamba(config)()

"""FLOPs, against torch's own counter on plain models, and counted once where they are computed several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

from kenotron.flops import FlopCounter, Flops, Product, distinct, total
from kenotron.models.decoder import Decoder

LENGTH, LAYERS, HIDDEN, BATCH = 24, 2, 32, 2
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
#: Products of queries and keys, and of weights and values: each once forward and twice backward.
ATTENTION = 3 * 2 * 2 * BATCH * LENGTH**2 * HIDDEN * LAYERS


def config(kind: str, attention: str = "eager", experts: str = "eager") -> Any:
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=96, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
            attn_implementation=attention,
        )  # fmt: skip
    if kind == "moe":
        return Qwen3MoeConfig(**SIZES, **EXPERTS, attn_implementation=attention, experts_implementation=experts)
    return LlamaConfig(**SIZES, attn_implementation=attention)


def step(model: Any) -> None:
    ids = torch.randint(0, 96, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def counted(model: Any) -> Flops:
    with FlopCounter({LENGTH, LENGTH - 1}) as counter:
        step(model)
    assert not counter.unknown
    return total(counter.products())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "moe"])
def test_plain_models_have_the_flops_that_torch_counts(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(config(kind))
    with FlopCounterMode(display=False) as expected:
        step(model)
    flops = counted(model)
    assert flops.full == expected.get_total_flops()
    assert flops.attention == ATTENTION
    assert flops.causal == flops.full - ATTENTION / 2


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_kernels_and_fused_layers_change_nothing(kind: str) -> None:
    plain = counted(AutoModelForCausalLM.from_config(config(kind)))
    assert counted(AutoModelForCausalLM.from_config(config(kind, "sdpa", "grouped_mm"))) == plain
    assert counted(Decoder(config(kind))) == plain


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_does_not_count(reentrant: bool) -> None:
    model = AutoModelForCausalLM.from_config(config("llama"))
    plain = counted(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert counted(model.train()) == plain


def test_functions_of_a_user_count_and_a_gradient_of_a_gradient_too() -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight)

    def again(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, x, use_reentrant=False)
        return out

    x = torch.randn(4, 8, requires_grad=True)
    product = 2 * 4 * 8 * 8
    for function in (layer, again):
        with FlopCounter() as counter:
            function(x).sum().backward()
        assert total(counter.products()).full == 3 * product
    with FlopCounter() as counter, FlopCounterMode(display=False) as expected:
        (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert total(counter.products()).full == expected.get_total_flops()


def test_frozen_weights_have_no_gradient_to_count() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    with FlopCounter() as counter:
        model(torch.randn(4, 8)).sum().backward()
    assert total(counter.products()).full == 3 * 2 * 4 * 8 * 8  # two forward, one weight's gradient


def test_products_of_the_same_numbers_count_once() -> None:
    router = Product("mm 4x8,8x2", 128.0, False, (1.5, 2.5))
    of_rank = [Product("mm 4x8,8x4", 256.0, False, (1.5, float(rank + 1))) for rank in range(2)]
    zero = Product("mm 4x8,8x1", 64.0, False, (0.0, 3.0))  # zeros prove nothing
    found = distinct([[router, of_rank[0], zero, router], [router, of_rank[1], zero]])
    assert sorted(found) == sorted([router, router, *of_rank, zero, zero])

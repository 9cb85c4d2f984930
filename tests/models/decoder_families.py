"""Small configurations of every family that Decoder covers, with each switch of theirs on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kenotron.hf.names import decoder_pieces
from kenotron.models import Decoder

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # so that every part matters
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

#: name -> model_type and what differs from the common settings
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, multi-query, padding": ("llama", {"num_key_value_heads": 1, "pad_token_id": 0}),
    "llama, head size": ("llama", {"head_dim": 12}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2, some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, biases, some windows": (
        "qwen3",
        {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3, windows": (
        "smollm3",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm3, windows by layer": (
        "smollm3",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5},
    ),
    "starcoder2": ("starcoder2", {}),
    "starcoder2, window, no biases, untied": (
        "starcoder2",
        {"sliding_window": 5, "use_bias": False, "tie_word_embeddings": False},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}),
    "qwen3_moe, some dense, renormalised": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
}

#: kind of rotary scaling -> its settings
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
    },
}


def configuration(family: str, **settings: Any) -> Any:
    model_type, differences = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**COMMON, **differences, **settings})


def pair(config: Any, seed: int = 0, **settings: Any) -> tuple[Any, Decoder]:
    """Return transformers' model and a Decoder with the same weights, none of them zero or one."""
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for param in theirs.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)
        padding = theirs.get_input_embeddings().padding_idx
        if padding is not None:
            theirs.get_input_embeddings().weight[padding] = 0.0
    ours = Decoder(config, **settings)
    fill(ours, on_disk(theirs))
    return theirs, ours


def on_disk(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors as `save_pretrained` writes them, without copies of tied ones."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors


@torch.no_grad()
def fill(ours: Decoder, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of a directory into a Decoder; every one is used, and every parameter filled."""
    parameters, left = dict(ours.named_parameters()), dict(tensors)
    for name, pieces in decoder_pieces(ours.config).items():
        covered = 0
        for piece in pieces:
            place = parameters[name][tuple(slice(*span) for span in piece.box)]
            place.copy_(left.pop(piece.name).view(place.shape))
            covered += place.numel()
        assert covered == parameters.pop(name).numel(), name
    assert not left, sorted(left)
    assert not parameters, sorted(parameters)


def gradients_on_disk(ours: Decoder) -> dict[str, torch.Tensor]:
    """Return a Decoder's gradients by the names of a directory's tensors."""
    parameters = dict(ours.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for name, pieces in decoder_pieces(ours.config).items():
        grad = parameters[name].grad
        assert grad is not None, name
        for piece in pieces:
            found[piece.name] = grad[tuple(slice(*span) for span in piece.box)]
    return found

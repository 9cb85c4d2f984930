"""Nanotron's model configurations as those of transformers."""

from __future__ import annotations

from typing import Any

from kenotron.cli.nanotron_keys import Keys

_CONFIG = "model.model_config"

#: Marks of families in their configurations -> model types of transformers.
_FAMILIES = {
    "is_llama_config": "llama",
    "is_qwen2_config": "qwen2",
    "is_starcoder2_config": "starcoder2",
    "is_mamba_config": "mamba",
    "is_llamoe_config": "mixtral",
}

#: Names that are the same in both.
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_bias",
)  # fmt: skip

_STARCODER2 = {
    "layer_norm_epsilon": "norm_epsilon",
    "num_kv_heads": "num_key_value_heads",
    "sliding_window_size": "sliding_window",
    "attn_pdrop": "attention_dropout",
    "embd_pdrop": "embedding_dropout",
    "resid_pdrop": "residual_dropout",
}

#: Defaults of Nanotron's where transformers has others.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
    },
    "starcoder2": {
        "vocab_size": 49280, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": None,
    },
}  # fmt: skip
_DEFAULTS["qwen2"] = _DEFAULTS["mixtral"] = _DEFAULTS["llama"]
_DEFAULTS["mamba"] = {"vocab_size": 50277, "hidden_size": 2560, "num_hidden_layers": 64, "layer_norm_epsilon": 1e-5}

_MAMBA = {"d_model": "hidden_size", "rms_norm_eps": "layer_norm_epsilon", "residual_in_fp32": "residual_in_fp32"}
#: Of ``ssm_cfg``.
_SSM = {
    "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "bias": "use_bias", "conv_bias": "use_conv_bias",
    "dt_rank": "time_step_rank", "dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor",
    "dt_scale": "time_step_scale", "dt_init": "time_step_init_scheme",
}  # fmt: skip


def model_of(keys: Keys, tp: int) -> dict[str, Any]:
    """Return the configuration of transformers, with ``settings`` of CausalLM where there are any.

    Raises:
        ValueError: the model's family is not told, or unknown.
    """
    family = _family(keys)
    found: dict[str, Any] = {"model_type": family, **_DEFAULTS[family]}
    found |= {name: value for name in _SAME if (value := keys.take(f"{_CONFIG}.{name}", None)) is not None}
    std = keys.take("model.init_method.std", None)
    width = keys.take(f"{_CONFIG}.initializer_range", None)
    if std is not None or width is not None:
        found["initializer_range"] = float(width if std is None else std)
    if family == "starcoder2":
        found |= _starcoder2(keys)
    if family == "qwen2":
        found |= _qwen2(keys)
    if family == "mamba":
        found |= _mamba(keys)
    if family == "mixtral":
        found["num_local_experts"] = keys.number(f"{_CONFIG}.moe_num_experts", 8)
        found["num_experts_per_tok"] = keys.number(f"{_CONFIG}.num_experts_per_tok", 1)
        if found["num_experts_per_tok"] > 1:
            keys.miss(f"{_CONFIG}.num_experts_per_tok", "weights of the experts of a token sum to 1 here")
    multiple = keys.take("model.make_vocab_size_divisible_by", 1) or 1
    if multiple > 1:
        found["vocab_size"] = -(-found["vocab_size"] // (multiple * tp)) * multiple * tp
    settings = _settings(keys)
    return found | ({"settings": settings} if settings else {})


def _family(keys: Keys) -> str:
    marks = [mark for mark in (keys.peek(_CONFIG) or {}) if str(mark).startswith("is_") and str(mark).endswith("_config")]
    for mark in marks:
        if mark not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise ValueError(
                f"{_CONFIG}.{mark}: this family is not known. Known are {known}; for others write model.model yourself."
            )
        if keys.take(f"{_CONFIG}.{mark}"):
            return _FAMILIES[mark]
    if keys.peek(_CONFIG) is None:
        raise ValueError(f"{_CONFIG} is missing.")
    return "llama"  # what the first configurations did not say


def _mamba(keys: Keys) -> dict[str, Any]:
    found = {ours: value for theirs, ours in _MAMBA.items() if (value := keys.take(f"{_CONFIG}.{theirs}", None)) is not None}
    inner = {
        ours: value for theirs, ours in _SSM.items() if (value := keys.take(f"{_CONFIG}.ssm_cfg.{theirs}", None)) is not None
    }
    width = keys.take("model.init_method.initializer_range", None)
    found |= inner | ({} if width is None else {"initializer_range": float(width)})
    rescale = keys.take("model.init_method.rescale_prenorm_residual", None)
    found |= {} if rescale is None else {"rescale_prenorm_residual": bool(rescale)}
    multiple = int(keys.take(f"{_CONFIG}.pad_vocab_size_multiple", 1) or 1)
    vocab_size = int(keys.take(f"{_CONFIG}.vocab_size", _DEFAULTS["mamba"]["vocab_size"]))
    return found | {"vocab_size": -(-vocab_size // multiple) * multiple}


def _starcoder2(keys: Keys) -> dict[str, Any]:
    found = {
        ours: value for theirs, ours in _STARCODER2.items() if (value := keys.take(f"{_CONFIG}.{theirs}", None)) is not None
    }
    grouped, single = keys.take(f"{_CONFIG}.grouped_query", False), keys.take(f"{_CONFIG}.multi_query", False)
    if single or not grouped:  # neither is: then it is multi-query
        found["num_key_value_heads"] = 1
    return found


def _qwen2(keys: Keys) -> dict[str, Any]:
    found: dict[str, Any] = {}
    window = keys.take(f"{_CONFIG}.sliding_window_size", None)
    if window is not None:
        found |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    factor = keys.take(f"{_CONFIG}.rope_seq_len_interpolation_factor", None)
    if factor is not None:
        found["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    every = keys.take(f"{_CONFIG}.no_rope_layer", None)
    if every is not None:
        found |= {"model_type": "smollm3", "no_rope_layer_interval": every}
    if keys.peek(f"{_CONFIG}.moe_config") is not None:
        found |= _experts(keys)
    return found


def _experts(keys: Keys) -> dict[str, Any]:
    where = f"{_CONFIG}.moe_config"
    has_shared = bool(keys.take(f"{where}.enable_shared_expert", False))
    found: dict[str, Any] = {
        "model_type": "qwen2_moe" if has_shared else "qwen3_moe",
        "num_experts": keys.number(f"{where}.num_experts", 8),
        "num_experts_per_tok": keys.number(f"{where}.top_k", 2),
        "moe_intermediate_size": keys.number(f"{where}.moe_intermediate_size", 1408),
        "norm_topk_prob": False,
    }
    if has_shared:
        found["shared_expert_intermediate_size"] = keys.number(f"{where}.shared_expert_intermediate_size", 5632)
    layers = keys.take(f"{where}.layers", [-1])
    if layers != [-1]:
        count = keys.number(f"{_CONFIG}.num_hidden_layers", 32)
        found["mlp_only_layers"] = [index for index in range(count) if index not in layers]
    return found


def _settings(keys: Keys) -> dict[str, Any]:
    """Return what CausalLM hands to Kénotron's model."""
    found: dict[str, Any] = {}
    coefficient = keys.take(f"{_CONFIG}.z_loss_coefficient", 1e-4)
    if keys.take(f"{_CONFIG}.z_loss_enabled", False):
        found["z_loss"] = float(coefficient)
    attention = keys.take(f"{_CONFIG}._attn_implementation", None)
    if attention in ("sdpa", "flex_attention"):
        found["attention"] = attention
    return found

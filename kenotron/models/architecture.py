"""What a decoder is made of, read from the configuration of a transformers model.

One dataclass says everything that tells the families apart. Each family is a function from its configuration to what differs
from Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from kenotron.models.experts import check_activation
from kenotron.models.moe import MoESettings


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The parts of a :class:`~kenotron.models.Decoder`, in the order in which a token meets them.

    Args:
        vocabulary, hidden, intermediate, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: of attention; KV heads divide the heads.
        eps: of all norms.
        norm: ``"rms"``, or ``"layer"``, which has a bias.
        norm_output: norm what attention and MLP return, instead of what they get (OLMo 2).
        qkv_bias, output_bias, mlp_bias: of the linear layers.
        qk_norm: of queries and keys, over each head or over all heads together.
        rotary: for each layer, whether it knows positions.
        windows: for each layer, how many positions back it sees, with its own; ``None``: all.
        is_gated, activation: of the MLP.
        experts: for each layer, its mixture of experts; ``None``: a dense MLP.
        attention_dropout, residual_dropout, embedding_dropout: probabilities.
        tied: head and embedding are one matrix.
        padding: row of the embedding that stays zero.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    rotary: tuple[bool, ...]
    windows: tuple[int | None, ...]
    experts: tuple[MoESettings | None, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_output: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    is_gated: bool = True
    activation: str = "silu"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    tied: bool = False
    padding: int | None = None

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} with num_key_value_heads={self.num_kv_heads}: set the second to a "
                "divisor of the first."
            )

    @staticmethod
    def of(config: Any) -> Architecture:
        """Return the architecture that a transformers configuration describes.

        Raises:
            ValueError: a family or a setting that is not covered.
        """
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ValueError(
                f"model_type={config.model_type!r} is not covered by Decoder, which knows {', '.join(FAMILIES)}, nor "
                "by Mamba, which knows mamba, mamba2. The transformers model itself can be trained unmodified: "
                "AutoModelForCausalLM.from_config(config)."
            )
        rotary_part = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if rotary_part != 1.0:
            raise ValueError(
                f"partial_rotary_factor={rotary_part} is not covered by Decoder, which turns whole heads. Leave it out."
            )
        layers = config.num_hidden_layers
        common: dict[str, Any] = {
            "vocabulary": config.vocab_size,
            "hidden": config.hidden_size,
            "intermediate": config.intermediate_size,
            "num_layers": layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "activation": config.hidden_act,
            "attention_dropout": config.attention_dropout,
            "tied": bool(config.tie_word_embeddings),
            "padding": config.pad_token_id,
            "rotary": (True,) * layers,
            "windows": (None,) * layers,
            "experts": (None,) * layers,
        }
        differences = family(config)
        if "eps" not in differences:
            differences["eps"] = config.rms_norm_eps
        return Architecture(**{**common, **differences})


# ---- Families -------------------------------------------------------------------------------------------------------


def _llama(config: Any) -> dict[str, Any]:
    biases = bool(config.attention_bias)
    return {"qkv_bias": biases, "output_bias": biases, "mlp_bias": bool(config.mlp_bias)}


def _mistral(config: Any) -> dict[str, Any]:
    return {"windows": _everywhere(config, config.sliding_window)}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _by_layer(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    biases = bool(config.attention_bias)
    return {"qkv_bias": biases, "output_bias": biases, "qk_norm": "head", "windows": _by_layer(config)}


def _smollm3(config: Any) -> dict[str, Any]:
    rotary = tuple(map(bool, config.no_rope_layers[: config.num_hidden_layers]))
    return {**_llama(config), "rotary": rotary, "windows": _by_layer(config)}


def _starcoder2(config: Any) -> dict[str, Any]:
    return {
        "eps": config.norm_epsilon,
        "norm": "layer",
        "qkv_bias": config.use_bias,
        "output_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "is_gated": False,
        "windows": _everywhere(config, config.sliding_window),
        "residual_dropout": config.residual_dropout,
        "embedding_dropout": config.embedding_dropout,
    }


def _olmo2(config: Any) -> dict[str, Any]:
    biases = bool(config.attention_bias)
    return {"qkv_bias": biases, "output_bias": biases, "qk_norm": "all", "norm_output": True}


def _mixtral(config: Any) -> dict[str, Any]:
    if config.router_jitter_noise:
        raise ValueError(
            f"router_jitter_noise={config.router_jitter_noise} is not covered by Decoder; set it to 0.0, or train the "
            "transformers model itself."
        )
    is_sparse = [True] * config.num_hidden_layers
    experts = _experts(config, config.intermediate_size, config.num_local_experts, is_sparse, renormalise=True)
    return {"windows": _everywhere(config, config.sliding_window), "experts": experts}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    biases, renormalise = bool(config.attention_bias), bool(config.norm_topk_prob)
    is_sparse = [
        layer not in config.mlp_only_layers and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]
    return {
        "qkv_bias": biases,
        "output_bias": biases,
        "qk_norm": "head",
        "windows": _everywhere(config, config.sliding_window),
        "experts": _experts(config, config.moe_intermediate_size, config.num_experts, is_sparse, renormalise=renormalise),
    }


def _everywhere(config: Any, window: int | None) -> tuple[int | None, ...]:
    return (window,) * config.num_hidden_layers


def _by_layer(config: Any) -> tuple[int | None, ...]:
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


def _experts(
    config: Any, intermediate: int, num_experts: int, is_sparse: list[bool], *, renormalise: bool
) -> tuple[MoESettings | None, ...]:
    if not any(is_sparse):
        return (None,) * len(is_sparse)
    # transformers counts pairs per token, where ours are shares, and balances the mean over layers, where ours balance each.
    coefficient = config.router_aux_loss_coef * config.num_experts_per_tok / sum(is_sparse)
    experts = MoESettings(
        hidden=config.hidden_size,
        intermediate=intermediate,
        num_experts=num_experts,
        top_k=config.num_experts_per_tok,
        activation=config.hidden_act,
        renormalise=renormalise,
        balance_coefficient=coefficient if config.output_router_logits else 0.0,
    )
    return tuple(experts if sparse else None for sparse in is_sparse)


#: ``model_type`` -> what differs from Llama
FAMILIES: Mapping[str, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {
        "llama": _llama,
        "mistral": _mistral,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "smollm3": _smollm3,
        "starcoder2": _starcoder2,
        "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe,
        "olmo2": _olmo2,
    }
)

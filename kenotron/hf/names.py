"""Which tensors of a Hugging Face directory make up which parameters of a model, and where in them they lie.

A fused parameter is put together from several tensors. Nothing is computed on the way: every tensor is a box of a parameter,
bit for bit, so one map serves reading and writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from kenotron.models.architecture import Architecture

#: Names that embeddings have in Kénotron's models.
EMBEDDINGS = ("model.embed_tokens.weight", "backbone.embeddings.weight")

Box = tuple[tuple[int, int], ...]  #: (start, stop) in each dimension


class Piece(NamedTuple):
    """One tensor of a directory, and where it lies in a parameter.

    ``box`` has the parameter's dimensions. Where the tensor has fewer, those at the front are one long in the box (an expert):
    ``front`` says how many.
    """

    name: str
    box: Box
    front: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the directory."""
        return tuple(stop - start for start, stop in self.box[self.front :])


@dataclass(frozen=True, kw_only=True)
class _Names:
    """How a family calls the parts of a layer."""

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    moe: str = "mlp"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"


_FAMILIES: Mapping[str, _Names] = MappingProxyType(
    {
        "starcoder2": _Names(up="c_fc", down="c_proj"),
        "mixtral": _Names(moe="block_sparse_moe", expert_gate="w1", expert_up="w3", expert_down="w2"),
        "olmo2": _Names(attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"),
    }
)


def decoder_pieces(config: Any) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of each parameter of a :class:`~kenotron.models.Decoder`, by the parameter's name.

    A tied head is no parameter of its own, and has no entry.

    Raises:
        ValueError: a family or a setting that is not covered.
    """
    a, names = Architecture.of(config), _FAMILIES.get(config.model_type, _Names())
    pieces = {
        "model.embed_tokens.weight": whole("model.embed_tokens.weight", a.vocabulary, a.hidden),
        **_norm("model.norm", "model.norm", a),
    }
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}"
        pieces |= _norm(f"{prefix}.attention_norm", f"{prefix}.{names.attention_norm}", a)
        pieces |= _norm(f"{prefix}.mlp_norm", f"{prefix}.{names.mlp_norm}", a)
        pieces |= _attention(f"{prefix}.self_attn", a)
        if a.experts[layer] is None:
            pieces |= _mlp(f"{prefix}.mlp", f"{prefix}.{names.mlp}", a, names)
        else:
            pieces |= _experts(f"{prefix}.mlp", f"{prefix}.{names.moe}", a, layer, names)
    if not a.tied:
        pieces["lm_head.weight"] = whole("lm_head.weight", a.vocabulary, a.hidden)
    return pieces


def model_pieces(config: Any) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of each parameter of Kénotron's model for a configuration, :class:`Decoder` or :class:`Mamba`.

    Raises:
        ValueError: a family or a setting that is not covered.
    """
    from kenotron.models.mamba import MIXERS, mamba_shapes

    if config.model_type not in MIXERS:
        return decoder_pieces(config)
    return {name: whole(name, *shape) for name, shape in mamba_shapes(config).items()}


def whole(name: str, *shape: int) -> tuple[Piece, ...]:
    """Return the pieces of a parameter that is one tensor."""
    return (Piece(name, tuple((0, size) for size in shape)),)


def _norm(ours: str, theirs: str, a: Architecture) -> dict[str, tuple[Piece, ...]]:
    keys = ("weight", "bias") if a.norm == "layer" else ("weight",)
    return {f"{ours}.{key}": whole(f"{theirs}.{key}", a.hidden) for key in keys}


def _attention(prefix: str, a: Architecture) -> dict[str, tuple[Piece, ...]]:
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    pieces = _fused(f"{prefix}.qkv_proj", prefix, parts, a.hidden, a.qkv_bias)
    pieces |= _linear(f"{prefix}.o_proj", f"{prefix}.o_proj", a.hidden, queries, a.output_bias)
    if a.qk_norm:
        sizes = (queries, keys) if a.qk_norm == "all" else (a.head_dim, a.head_dim)
        for key, size in zip(("q_norm", "k_norm"), sizes, strict=True):
            pieces[f"{prefix}.{key}.weight"] = whole(f"{prefix}.{key}.weight", size)
    return pieces


def _mlp(ours: str, theirs: str, a: Architecture, names: _Names) -> dict[str, tuple[Piece, ...]]:
    if a.is_gated:
        parts = {names.gate: a.intermediate, names.up: a.intermediate}
        pieces = _fused(f"{ours}.gate_up_proj", theirs, parts, a.hidden, a.mlp_bias)
    else:
        pieces = _linear(f"{ours}.up_proj", f"{theirs}.{names.up}", a.intermediate, a.hidden, a.mlp_bias)
    return pieces | _linear(f"{ours}.down_proj", f"{theirs}.{names.down}", a.hidden, a.intermediate, a.mlp_bias)


def _experts(ours: str, theirs: str, a: Architecture, layer: int, names: _Names) -> dict[str, tuple[Piece, ...]]:
    settings = a.experts[layer]
    assert settings is not None
    inner, hidden = settings.intermediate, (0, a.hidden)

    def each(key: str, *box: tuple[int, int]) -> Iterator[Piece]:
        for expert in range(settings.num_experts):
            yield Piece(f"{theirs}.experts.{expert}.{key}.weight", ((expert, expert + 1), *box), front=1)

    gates, ups = each(names.expert_gate, (0, inner), hidden), each(names.expert_up, (inner, 2 * inner), hidden)
    return {
        f"{ours}.router.weight": whole(f"{theirs}.gate.weight", settings.num_experts, a.hidden),
        f"{ours}.experts.gate_up_proj": (*gates, *ups),
        f"{ours}.experts.down_proj": tuple(each(names.expert_down, hidden, (0, inner))),
    }


def _linear(ours: str, theirs: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[Piece, ...]]:
    pieces = {f"{ours}.weight": whole(f"{theirs}.weight", rows, columns)}
    return pieces | ({f"{ours}.bias": whole(f"{theirs}.bias", rows)} if bias else {})


def _fused(ours: str, theirs: str, parts: dict[str, int], columns: int, bias: bool) -> dict[str, tuple[Piece, ...]]:
    """Layers whose rows lie one below the other."""
    weights: list[Piece] = []
    biases: list[Piece] = []
    start = 0
    for name, rows in parts.items():
        span = (start, start + rows)
        weights.append(Piece(f"{theirs}.{name}.weight", (span, (0, columns))))
        biases.append(Piece(f"{theirs}.{name}.bias", (span,)))
        start += rows
    return {f"{ours}.weight": tuple(weights)} | ({f"{ours}.bias": tuple(biases)} if bias else {})

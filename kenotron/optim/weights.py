"""What each weight of a module is: by the module that it is in, never by this rank's part of it.

So all ranks of any layout find the same weights, under the same names, of the same kinds, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from kenotron.models.head import Head
from kenotron.models.layers import FusedLinear
from kenotron.parallel.cut import AbsentParameter
from kenotron.parallel.plan import transformers_models
from kenotron.parallel.shards import canonical

if TYPE_CHECKING:
    from kenotron.parallel.apply import Parallelized

#: ``experts``: a stack of matrices ``[experts, out, in]``. ``other``: vectors, scalars, convolutions, a state space's own.
Kind = Literal["embedding", "norm", "bias", "head", "matrix", "experts", "other"]

#: The last part of a head's name, where nothing else tells.
_HEADS = ("lm_head", "head", "embed_out")
#: What state space models keep beside their matrices (Mamba's decays and skips): never decayed, in their papers as well.
_STATE_SPACE = ("A_log", "D", "dt_bias")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of a module, once, also where several modules share it.

    Args:
        name: canonical, the first one of a tied weight. param: what this rank has of it.
        kind: what it is. A tied embedding is an embedding.
        shape: of the whole, as far as the module's record or the parameter tells.
        parts: outputs of each layer in a matrix that is several (queries, keys and values); empty: it is one.
        transposed: the inputs come before the outputs.
        uses: the modules that have it, with its key in each.
        lr_scale: by which `parametrise` multiplies its learning rate.
    """

    name: str
    param: nn.Parameter
    kind: Kind
    shape: tuple[int, ...]
    parts: tuple[int, ...] = ()
    transposed: bool = False
    uses: tuple[tuple[nn.Module, str], ...] = ()
    lr_scale: float = 1.0


#: Where `parametrise` notes on a module the factors of its parameters' learning rates, by key.
LR_SCALES = "_kenotron_lr_scales"


def find_weights(root: nn.Module) -> list[Weight]:
    """Return the weights of ``root`` in the order of the module.

    Raises:
        ValueError: ``root`` is a part of a module that is split into pipeline stages.
    """
    done: Parallelized | None = root.__dict__.get("_kenotron")
    aliases = done.aliases if done is not None else {}
    heads = _transformers_heads(root)
    found: dict[str, Weight] = {}
    first_name: dict[int, str] = {}
    for prefix, module in root.named_modules():
        for key, param in module._parameters.items():
            if param is None:
                continue
            name = canonical(f"{prefix}.{key}" if prefix else key)
            name = first_name.setdefault(id(param), aliases.get(name, name)) if param.numel() else aliases.get(name, name)
            shape = _whole_shape(done, name, param)
            weight = Weight(
                name=name, param=param, kind=_kind(prefix, module, key, param, heads),
                shape=shape, parts=_parts(root, prefix, module, key, shape),
                transposed=_is_transposed(module, param), uses=((module, key),),
                lr_scale=module.__dict__.get(LR_SCALES, {}).get(key, 1.0),
            )  # fmt: skip
            found[name] = _merged(found[name], weight) if name in found else weight
    if done is None and any(isinstance(weight.param, AbsentParameter) for weight in found.values()):
        raise ValueError(
            f"{type(root).__name__} is a part of a module that is split into pipeline stages, where names of tied weights are "
            "not known. Pass the LightningModule itself: parameter_groups(self, ...)."
        )
    return list(found.values())


def _merged(one: Weight, other: Weight) -> Weight:
    """Return one weight for two uses of it: on this stage one of them may be empty."""
    kind = next((k for k in ("embedding", "norm", "bias", "head") if k in (one.kind, other.kind)), one.kind)
    param = other.param if one.param.numel() == 0 and other.param.numel() else one.param
    return replace(one, param=param, kind=kind, uses=(*one.uses, *other.uses))


def _transformers_heads(root: nn.Module) -> set[nn.Module]:
    heads = (model.get_output_embeddings() for _, model in transformers_models(root))
    return {head for head in heads if isinstance(head, nn.Module)}


def _kind(name: str, module: nn.Module, key: str, param: nn.Parameter, heads: set[nn.Module]) -> Kind:
    cls = type(module).__name__
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "Embedding" in cls:
        return "embedding"
    if "Norm" in cls:
        return "norm"
    if key == "bias" or key.endswith("_bias"):
        return "bias"
    if key in _STATE_SPACE or param.ndim < 2:
        return "other"
    if param.ndim == 2:
        is_head = isinstance(module, Head) or module in heads or canonical(name).rpartition(".")[2] in _HEADS
        return "head" if is_head else "matrix"
    return "experts" if param.ndim == 3 and _num_experts(module) else "other"


def _num_experts(module: nn.Module) -> int:
    count = getattr(module, "num_experts", 0)
    return count if isinstance(count, int) else 0


def _whole_shape(done: Parallelized | None, name: str, param: nn.Parameter) -> tuple[int, ...]:
    if done is None:
        return tuple(param.shape)
    return done.shards.absent.get(name) or done.shards.of(name, param).global_shape


def _is_transposed(module: nn.Module, param: nn.Parameter) -> bool:
    if param.ndim == 2:
        return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)  # transformers' GPT-2
    return param.ndim == 3 and bool(getattr(module, "is_transposed", False))


# ---- Several layers in one matrix -----------------------------------------------------------------------------------


def _parts(root: nn.Module, name: str, module: nn.Module, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the outputs of each layer in a fused matrix. transformers' are known by their names."""
    if len(shape) < 2 or key.endswith("bias"):
        return ()
    if isinstance(module, FusedLinear):
        return tuple(module.parts)
    if len(shape) == 3:
        if key != "gate_up_proj" or not _num_experts(module) or getattr(module, "is_transposed", False):
            return ()  # transposed ones (GPT-OSS) alternate between gate and up
        return (shape[1] // 2, shape[1] // 2)
    last = canonical(name).rpartition(".")[2]
    if last == "gate_up_proj" and isinstance(module, nn.Linear):
        return (module.out_features // 2,) * 2
    if last == "qkv_proj" and isinstance(module, nn.Linear):
        return _heads(getattr(root.get_submodule(name.rpartition(".")[0]), "config", None), module.out_features)
    return ()


def _heads(config: Any, rows: int) -> tuple[int, ...]:
    """Return the rows of queries, keys and values."""
    heads, kv = getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", 0)
    if not heads or not kv or rows % (heads + 2 * kv):
        return ()
    size = rows // (heads + 2 * kv)
    return (heads * size, kv * size, kv * size)

"""Initial weights by the protocol of ``reset_parameters``, for modules that were built on the meta device by hand.

What `configure_model` builds is recorded (``deferred``) and needs none of this. A module that the user built under
``torch.device("meta")`` has no record: its own initialiser runs on full-size parameters of this one module, with a seed made of
the run's seed and the module's name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kenotron.parallel.plan import transformers_models
from kenotron.parallel.shards import TensorShard, canonical

#: Where `init.set_initialiser` keeps what has the last word.
INITIALISER = "_kenotron_initialiser"


def initial_values(
    name: str,
    module: nn.Module,
    shards: dict[str, TensorShard],
    others: Mapping[str, tuple[int, ...] | None],
    initialise: Any,
    seed: int,
) -> dict[str, Tensor]:
    """Run the initialiser of one module on full-size parameters in host memory.

    Args:
        shards: of the parameters that it is to fill. others: the shapes of those that are only to be there.
    """
    model = object.__new__(type(module))  # not copy.copy: FSDP2's classes call __init__ when they are made
    model.__dict__ = {**module.__dict__, "_parameters": {}}
    for key, param in module._parameters.items():
        shape = others.get(key)
        if param is None or key not in shards:
            model._parameters[key] = (
                param if param is None or shape is None else nn.Parameter(param.new_empty(shape, device="meta"))
            )
            continue
        whole = torch.full(shards[key].global_shape, torch.nan, dtype=param.dtype)
        model._parameters[key] = nn.Parameter(whole, param.requires_grad)
    late = {key: b for key, b in module._buffers.items() if b is not None and b.is_meta}
    model._buffers = {**module._buffers, **{key: _blank(b) for key, b in late.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + zlib.crc32(canonical(name).encode())) % 2**63)
        if initialise is not None:
            initialise(model)
        reset = getattr(model, "reset_parameters", None) or getattr(model, "_reset_parameters", None)
        # Where an initialiser from outside does not know a module, it leaves it to itself.
        if callable(reset) and all(torch.isnan(model._parameters[key].view(-1)[0]) for key in shards):  # type: ignore[union-attr]
            reset()
        if INITIALISER in module.__dict__:
            module.__dict__[INITIALISER](model)
    values: dict[str, Tensor] = {k: v for k, v in {**model._parameters, **model._buffers}.items() if v is not None}
    for key in [*shards, *late]:
        if _is_blank(values[key]):
            raise ValueError(
                f"{name}.{key} was built on the meta device and {type(module).__name__} has no initialiser for it. Give the "
                "module a method reset_parameters() that fills it, or build it in __init__ instead of configure_model."
            )
    return values


def _blank(like: Tensor) -> Tensor:
    """Return values that nobody would set."""
    value: Any = torch.nan if like.is_floating_point() or like.is_complex() else torch.iinfo(torch.uint8).max
    if not (like.is_floating_point() or like.is_complex() or like.dtype is torch.bool):
        value = torch.iinfo(like.dtype).min + 7
    return torch.full(like.shape, value, dtype=like.dtype)


def _is_blank(value: Tensor) -> bool:
    if not value.numel() or value.dtype is torch.bool:
        return False
    return bool(torch.equal(value, _blank(value)) or (value != value).any())


def initialisers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(module name, initialiser)`` for modules inside of transformers models, which initialise from outside."""
    for prefix, model in transformers_models(root):
        for name, _ in model.named_modules(prefix=prefix):
            ancestors = (
                root.get_submodule(name[:i]) for i in range(len(name), -1, -1) if i in (0, len(name)) or name[i] == "."
            )
            nearest = next((a for a in ancestors if hasattr(a, "_init_weights")), model)
            yield name, nearest._init_weights

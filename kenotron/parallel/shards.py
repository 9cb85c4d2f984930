"""What this rank holds of each parameter: the one record that init, gradient norm and checkpoints read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True)
class TensorShard:
    """The part of a global tensor that one rank of the tp and ep axes holds: some experts, segments of one dimension in order.

    Args:
        global_shape: shape of the whole tensor.
        dim: the dimension that tensor parallelism cuts; ``None`` if every tp rank holds all of it.
        segments: ``(start, length)`` along ``dim`` of what lies here; several for fused matrices (gate and up).
        replicas: the tp ranks that hold the same segments (all of them for ``dim=None``; those of a shared KV head).
        shared: the tp ranks that hold each segment, where these differ (fused queries, keys and values); ``dim`` is 0 then.
        experts: ``(start, count)`` along dimension 0 where expert parallelism cuts that one, which ``dim`` then is not.
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[tuple[int, int], ...] = ()
    replicas: tuple[int, ...] = (0,)
    experts: tuple[int, int] | None = None
    shared: tuple[tuple[int, ...], ...] = ()

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The tp ranks that hold each segment."""
        return self.shared or (self.replicas,) * len(self.segments)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the local part."""
        local = list(self.global_shape)
        if self.experts is not None:
            local[0] = self.experts[1]
        if self.dim is not None:
            local[self.dim] = sum(length for _, length in self.segments)
        return tuple(local)

    def take(self, whole: Tensor) -> Tensor:
        """Return the local part of ``whole`` (its own memory unless nothing is cut)."""
        if self.experts is not None:
            whole = whole.narrow(0, *self.experts)
        if self.dim is None:
            return whole
        dim = self.dim
        return torch.cat([whole.narrow(dim, start, length) for start, length in self.segments], dim)


@dataclass(kw_only=True)
class Shards:
    """What this rank holds of every parameter of a module.

    Args:
        tp: size of the tensor-parallel axis.
        by_name: parameters that tensor or expert parallelism cuts; all others are whole on each of their ranks.
        partial: parameters whose gradient is only this rank's share and is summed over tp before the step.
        shared_kv: parameters with segments that several ranks hold (a KV head), over which their gradients are summed.
        absent: parameters that belong to other pipeline stages, with their shapes; here they are empty.
        holders: pipeline ranks that hold a parameter which several stages use (tied embeddings, loose parameters).
    """

    tp: int = 1
    by_name: dict[str, TensorShard] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    shared_kv: set[str] = field(default_factory=set)
    absent: dict[str, tuple[int, ...]] = field(default_factory=dict)
    holders: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, name: str, param: Tensor) -> TensorShard:
        """Return the tp shard of a parameter; ``param`` gives the shape of those which are whole."""
        if name in self.by_name:
            return self.by_name[name]
        return TensorShard(global_shape=tuple(param.shape), replicas=tuple(range(self.tp)))

    def use_canonical_names(self, aliases: dict[str, str]) -> None:
        """Name every record as the whole module does: without wrappers, and a tied weight by its first name."""

        def name_of(name: str) -> str:
            name = canonical(name)
            return aliases.get(name, name)

        self.by_name = {name_of(name): shard for name, shard in self.by_name.items()}
        self.partial = {name_of(name) for name in self.partial}
        self.shared_kv = {name_of(name) for name in self.shared_kv}


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(name: str) -> str:
    """Return a dotted name without the wrappers that compile and recompute put around modules."""
    if "._" not in name and not name.startswith("_"):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


# --------------------------------------------------------------------------------------------- identity of parameters

_REPLACED_BY = "_kenotron_replaced_by"


@torch.no_grad()
def set_part(param: nn.Parameter, part: Tensor) -> None:
    """Let a parameter hold ``part``, of the same dtype, in place of its data: the object stays, with attributes and hooks.

    So whoever holds it (an optimizer made in ``__init__``, a list of parameters) has what is trained.
    """
    param.grad = None
    # An accumulator that somebody keeps alive remembers the old shape. One for another dtype is made anew.
    param.data = torch.empty(0, dtype=torch.float64 if param.dtype != torch.float64 else torch.float32, device=param.device)
    param.data = part.to(param.device)


def take_over(old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    """Give ``new`` the attributes and gradient hooks of the parameter that it replaces, and return it.

    For where `set_part` can't keep the object itself (a DTensor, a parameter that was on the meta device). ``old`` knows its
    successor, see `successor`; to compute with it is an error.
    """
    if new is old:
        return new
    new.__dict__.update(attributes(old))
    hand_on_hooks(old, new)
    if old._post_accumulate_grad_hooks:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    shape = tuple(old.shape)
    if type(old) is nn.Parameter:
        old.__class__ = ReplacedParameter
        old.grad = None
        if not old.is_meta:  # its memory
            old.data = torch.empty(0, dtype=old.dtype, device=old.device)
    old.__dict__[_REPLACED_BY] = new
    old.__dict__["_kenotron_shape"] = shape
    return new


def attributes(param: Tensor) -> dict[str, Any]:
    """Return what user code has set on a parameter."""
    return {key: value for key, value in param.__dict__.items() if not key.startswith("_kenotron_")}


def hand_on_hooks(old: Tensor, new: Tensor) -> None:
    """Let the hooks on one parameter's gradient see that of another one; a handle removes a hook from both."""
    if old._backward_hooks:
        trained = new.requires_grad
        new.requires_grad_(True)  # torch takes no hooks of frozen ones, which may be unfrozen
        new._backward_hooks = old._backward_hooks
        new.requires_grad_(trained)


def successor(param: Tensor) -> Tensor:
    """Return what stands in a parameter's place now: the parameter itself, if it was not replaced."""
    while _REPLACED_BY in param.__dict__:
        param = param.__dict__[_REPLACED_BY]
    return param


class ReplacedParameter(nn.Parameter):
    """A parameter from before the module was sharded, which is no longer the module's: to compute with it is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func.__name__ in ("__get__", "__set__", "detach", "__deepcopy__", "__reduce_ex__")
        try:
            out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        except (RuntimeError, IndexError):  # of its shape
            if looks:
                raise
        else:
            if looks or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
                return out
        param = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise ValueError(
            f"a parameter of shape {param.__dict__.get('_kenotron_shape')} is used that was taken from the module before the "
            "strategy sharded it, and is none of its parameters any more. Keep no parameters in lists, tuples or closures: "
            "take them from the module where they are used (self.layer.weight, self.parameters())."
        ) from None

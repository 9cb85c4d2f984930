"""What this rank holds of each parameter: the one record that init, gradient norm and checkpoints read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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


def take_over(old: Tensor, new: Tensor) -> None:
    """Give a parameter that takes another one's place what the user hung on that: attributes and hooks of gradients."""
    new.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks, None):
            setattr(new, hooks, getattr(old, hooks))


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(name: str) -> str:
    """Return a dotted name without the wrappers that compile and recompute put around modules."""
    if "._" not in name and not name.startswith("_"):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

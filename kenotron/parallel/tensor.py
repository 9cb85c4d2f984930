"""Tensor parallelism of a module that knows nothing of it: plain local shards, collectives in hooks.

Parameters become this rank's rows or columns; the module's own ``forward`` runs on them. Hooks at the entry and exit of each
sharded linear do what is missing:

=======================  ======================================  =============================================
style                    before                                  after
=======================  ======================================  =============================================
colwise                  share the input (backward: sum)         nothing: the output stays split
rowwise                  nothing: the input is split             sum, then add the bias once
colwise_gather_output    share the input                         gather the output
rowwise_split_input      cut the input                           sum, then add the bias once
vocab_embedding          look up own rows                        zero what is not ours, sum (``vocab``)
vocab_head               share the input                         logits that know they are split (``logits``)
moe_tp_experts           share hidden states and routing weights sum
split_norm               sum the squares of what is split        nothing: the output stays split
split_rows               nothing: the input is split, or shared  nothing: the output stays split
rowwise_to_split         nothing: the input is split             sum (backward: sum)
=======================  ======================================  =============================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kenotron.layout import divisors
from kenotron.models.head import Head
from kenotron.models.layers import FusedLinear, RMSNorm
from kenotron.models.mixer import CausalConv, GatedNorm
from kenotron.parallel.collectives import copy_tail_to, copy_to, gather_from, reduce_from, reduce_scatter_to, scatter_to
from kenotron.parallel.logits import VocabParallelLogits
from kenotron.parallel.plain import (
    check_embedding,
    check_linear,
    check_norm,
    check_rows,
    class_name,
    enclosing,
    watch_hooks,
)
from kenotron.parallel.random import OwnStream, draws_masks
from kenotron.parallel.region import SEQUENCE_DIM, Region
from kenotron.parallel.shards import Shards, TensorShard, canonical, set_part
from kenotron.parallel.vocab_modules import spread_embedding
from kenotron.parallel.vocab_weight import show_part

#: Where a row-wise linear with a bias keeps what multiplies by its weight: float8 puts another product there.
PRODUCT = "_kenotron_product"


@dataclass(kw_only=True)
class TensorParallel:
    """One rank's view of the tp axis while a module is being cut.

    Args:
        group: the tp group. rank, size: of this process in it.
        shards: filled with what this rank holds of each parameter.
        device: of this rank; dropout on split activations draws from a stream of the rank's own there.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    shards: Shards
    device: torch.device
    random: OwnStream = field(init=False)
    region: Region = field(init=False, default_factory=Region)  # of split linears, that is being run
    _shared: _SharedInput = field(init=False)
    _masked: set[str] = field(init=False, default_factory=set)  # modules with dropout between split linears

    def __post_init__(self) -> None:
        self._shared = _SharedInput(self.group)
        self.random = OwnStream(self.rank, self.device)

    def apply(self, root: nn.Module, styles: dict[str, str], sequence_regions: Iterable[str] = ()) -> None:
        """Cut every module of ``root`` that ``styles`` names (see ``plan.STYLES``).

        Args:
            sequence_regions: modules whose linears gather and reduce-scatter along the sequence by themselves.

        Raises:
            ValueError: a size that tp does not divide, a style that does not fit its module.
        """
        regions = tuple(region + "." for region in sequence_regions)
        ends = {enclosing(name) for name, style in styles.items() if style in ("rowwise", "packed_rowwise")}
        ends = {name for name in ends if not f"{name}.".startswith(regions)}
        self._masked = {name for name in ends if draws_masks(root.get_submodule(name))}
        for name, style in styles.items():
            owner_name, _, last = name.rpartition(".")
            owner = root.get_submodule(owner_name)
            target = getattr(owner, last)
            if isinstance(target, nn.Parameter) and style == "split_rows":
                segments = self._even(target.shape[0], 1, f"{name}.shape[0]")
                self._cut_parameter(root, owner, last, owner_name, 0, segments, (self.rank,))
            elif isinstance(target, nn.Parameter):
                self._cut_expert_parameter(root, owner, last, name, style)
            else:
                parent = root.get_submodule(enclosing(name))
                self._cut_module(root, target, name, style, parent, in_sequence_region=name.startswith(regions))

    # ------------------------------------------------------------------------------------------------------ by style

    def _cut_module(
        self, root: nn.Module, module: nn.Module, name: str, style: str, parent: nn.Module, *, in_sequence_region: bool
    ) -> None:
        if style == "replicated_with_grad_allreduce":
            self.shards.partial.update(f"{name}.{p}" for p, _ in module.named_parameters())
        elif style == "moe_tp_experts":
            self._enter_experts(module)
        elif style == "mla_kv_a_proj":
            self._share_rotary_part(root, module, name)
        elif style == "vocab_embedding":
            self._cut_embedding(root, module, name)
        elif style == "split_norm":
            self._cut_norm(root, module, name)
        elif style == "split_rows":
            check_rows(module, name)
            self._cut_rows(root, module, name, parent)
        else:
            self._cut_linear(root, module, name, style, parent, in_sequence_region)

    def _cut_linear(
        self, root: nn.Module, module: nn.Module, name: str, style: str, parent: nn.Module, in_sequence_region: bool
    ) -> None:
        check_linear(module, name, style)
        assert isinstance(module, nn.Linear)
        by_rows = style in ("colwise", "colwise_gather_output", "packed_colwise", "vocab_head")
        if by_rows:
            self._cut_rows(root, module, name, parent, style)
            if style == "vocab_head":
                self._split_logits(module)
            elif not in_sequence_region:
                _change_input(module, self._shared.share)
                if enclosing(name) in self._masked:
                    module.register_forward_pre_hook(lambda m, args: self._enter_random(m))
            if style == "colwise_gather_output":
                gather = functools.partial(gather_from, dim=-1, group=self.group, grad="slice")
                module.register_forward_hook(lambda m, args, out: gather(out), prepend=True)
            elif style != "vocab_head":
                watch_hooks(module._forward_hooks, name, "the output")
        else:
            packs = 2 if style == "packed_rowwise" else 1
            segments = self._even(module.in_features, packs, f"{name}.in_features")
            self._cut_parameter(root, module, "weight", name, 1, segments, (self.rank,))
            if style == "rowwise_to_split":
                self._sum_both_ways(module, name)
                return
            if style == "rowwise_split_input":
                _change_input(module, lambda x: scatter_to(x, -1, self.group))
            else:
                watch_hooks(module._forward_pre_hooks, name, "the input")
            self._sum_output(module, name, in_sequence_region)

    def _split_logits(self, head: nn.Linear) -> None:
        """Let a head return its slice of the logits; one that computes losses itself is told with whom."""
        if isinstance(head, Head):
            head.group = self.group

        is_plain = type(head).forward is nn.Linear.forward

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            is_loss = not is_plain and len(args) + len(kwargs) > 1
            return out if is_loss else VocabParallelLogits.from_local(out, self.group)

        def enter(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not is_plain and len(args) + len(kwargs) > 1:  # linear_cross_entropy shares by itself
                return None
            return _with_input(args, kwargs, self._shared.share)

        show_part(head, self.rank * head.weight.shape[0], self.group)
        head.register_forward_pre_hook(enter, with_kwargs=True)
        head.register_forward_hook(leave, with_kwargs=True, prepend=True)

    def _enter_random(self, module: nn.Module) -> None:
        if module.training:
            self.random.enter()

    def _sum_output(self, module: nn.Linear, name: str, in_sequence_region: bool) -> None:
        """Sum a row-wise linear's output over tp; its bias is added once, after the sum."""

        def total(x: Tensor) -> Tensor:
            self._shared.forget()
            if enclosing(name) in self._masked:
                self.random.leave()
            if in_sequence_region:
                return self.region.leave(x, lambda y: reduce_scatter_to(y, SEQUENCE_DIM, self.group))
            return reduce_from(x, self.group)

        if module._parameters["bias"] is None:
            module.register_forward_hook(lambda m, args, out: total(out), prepend=True)
            return
        if in_sequence_region:  # added to slices of the sequence
            self.shards.partial.add(f"{name}.bias")

        def forward(input: Tensor) -> Tensor:
            out = total(module.__dict__[PRODUCT](input))
            return out + module.bias.to(out.dtype)

        module.__dict__[PRODUCT] = lambda x: F.linear(x, module.weight)
        module.forward = forward  # type: ignore[method-assign]

    def _sum_both_ways(self, module: nn.Linear, name: str) -> None:
        """Sum a row-wise linear's output over tp, for split channels to use: each finds a share of its gradient."""
        if module._parameters["bias"] is not None:
            raise ValueError(f"plan[{name!r}] = 'rowwise_to_split' applies to an nn.Linear without a bias.")
        module.register_forward_hook(lambda m, args, out: copy_to(reduce_from(out, self.group), self.group), prepend=True)

    def _cut_rows(self, root: nn.Module, module: nn.Module, name: str, parent: nn.Module, style: str = "colwise") -> None:
        """Keep this rank's rows of all parameters of a module."""
        segments, holders = self._rows(module, name, style, parent)
        for key, param in list(module.named_parameters(recurse=False)):
            assert param.ndim
            self._cut_parameter(root, module, key, name, 0, segments, holders)

    def _rows(
        self, module: nn.Module, name: str, style: str, parent: nn.Module
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | tuple[tuple[int, ...], ...]]:
        """Return the rows of a column-wise module that lie here, and the tp ranks which hold the same ones (or each part)."""
        if isinstance(module, (FusedLinear, CausalConv)):
            return self._parts(module, name, parent)
        if isinstance(module, nn.Linear):
            head_dim, size = getattr(parent, "head_dim", None), module.out_features  # its weight may be cut, where it is tied
            if style == "colwise" and isinstance(head_dim, int) and size % head_dim == 0:
                return self._heads(module, name, parent, head_dim)
        else:
            size = next(param.shape[0] for param in module.parameters(recurse=False))
        packs = 2 if style == "packed_colwise" else 1
        what = "vocabulary" if style == "vocab_head" else f"{name}.out_features"
        return self._even(size, packs, what), (self.rank,)

    def _heads(
        self, module: nn.Linear, name: str, attention: nn.Module, head_dim: int
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """Split a projection at the borders of its heads; fewer KV heads than ranks are shared by neighbours."""
        heads = module.out_features // head_dim
        is_kv = hasattr(attention, "num_key_value_groups") and name.rpartition(".")[2] in ("k_proj", "v_proj")
        if heads % self.size == 0:
            return self._even(module.out_features, 1, name), (self.rank,)
        if not is_kv:
            raise ValueError(
                f"{name} has {heads} heads, which tp={self.size} does not divide. Set tp to one of {divisors(heads, limit=64)}."
            )
        if self.size % heads:
            raise ValueError(
                f"{name} has {heads} KV heads: tp={self.size} neither divides them nor is a multiple of them, so they can't be "
                f"shared evenly. Set tp to one of {divisors(heads, limit=64)}, or to a multiple of {heads} that divides "
                "the query heads."
            )
        if name.endswith("k_proj"):  # once for the pair
            self._one_kv_head(attention, heads)
        self.shards.shared_kv.update(f"{name}.{key}" for key, _ in module.named_parameters())
        head, sharers = self._shared_unit(heads)
        return ((head * head_dim, head_dim),), sharers

    def _shared_unit(self, units: int) -> tuple[int, tuple[int, ...]]:
        """Return which of fewer units than ranks (heads) lies here, and the tp ranks that hold it."""
        sharing = self.size // units
        unit = self.rank // sharing
        return unit, tuple(range(unit * sharing, (unit + 1) * sharing))

    def _one_kv_head(self, attention: nn.Module, heads: int) -> None:
        """Tell an attention that each rank has one of its KV heads for all of its query heads."""
        queries = int(attention.__dict__["num_key_value_groups"]) * heads
        attention.__dict__["num_key_value_groups"] = queries // self.size

    def _parts(
        self, module: FusedLinear | CausalConv, name: str, parent: nn.Module
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | tuple[tuple[int, ...], ...]]:
        """Take an even share of each layer of several in one, at the borders of its units; neighbours may share a unit."""
        segments: list[tuple[int, int]] = []
        holders: list[tuple[int, ...]] = []
        start = 0
        for rows, size, may_share in zip(module.parts, module.units, module.shared, strict=True):
            units = rows // size
            if units % self.size == 0:
                segments.append((start + self.rank * (rows // self.size), rows // self.size))
                holders.append((self.rank,))
            elif may_share and self.size % units == 0:
                unit, sharers = self._shared_unit(units)
                segments.append((start + unit * size, size))
                holders.append(sharers)
            else:
                self._refuse_parts(module, name, units, size)
            start += rows
        if all(ranks == (self.rank,) for ranks in holders):
            return tuple(segments), (self.rank,)
        if getattr(parent, "norms_all", False):
            raise ValueError(
                f"{name} has {module.parts[1] // module.units[1]} KV heads, which one norm takes together, so that "
                f"tp={self.size} can't share them. Set tp to one of "
                f"{divisors(math.gcd(*module.parts) // module.units[1], limit=64)}."
            )
        if "num_key_value_groups" in parent.__dict__:
            self._one_kv_head(parent, module.parts[1] // module.units[1])
        self.shards.shared_kv.update(f"{name}.{key}" for key, _ in module.named_parameters())
        return tuple(segments), tuple(holders)

    def _refuse_parts(self, module: FusedLinear | CausalConv, name: str, units: int, size: int) -> None:
        layers = list(zip(module.parts, module.units, module.shared, strict=True))
        fixed = math.gcd(*(rows // size for rows, size, may_share in layers if not may_share))
        counts = [rows // size for rows, size, may_share in layers if may_share]
        allowed = [tp for tp in divisors(fixed, limit=64) if all(n % tp == 0 or tp % n == 0 for n in counts)]
        raise ValueError(
            f"{name} is several layers in one, of which one has {units} {'rows' if size == 1 else f'heads of {size} rows'}: "
            f"tp={self.size} does not divide them. Set tp to one of {allowed}."
        )

    def _cut_expert_parameter(self, root: nn.Module, experts: nn.Module, key: str, name: str, style: str) -> None:
        """Cut the 3-D weight of an experts module, ``[experts, out, in]`` (or transposed, as the module says), and its bias."""
        param, prefix, bias = experts.get_parameter(key), name.rpartition(".")[0], f"{key}_bias"
        transposed = bool(getattr(experts, "is_transposed", False))
        out_dim, in_dim = (2, 1) if transposed else (1, 2)
        by_rows = style in ("colwise", "packed_colwise")
        if ("down" in key and by_rows) or ("up" in key and not by_rows):
            if not transposed:
                raise ValueError(
                    f"plan[{name!r}] = {style!r} would split the hidden size of {class_name(experts)}, which all its experts "
                    "read. Plan 'packed_colwise' (or 'colwise') for gate_up_proj and 'rowwise' for down_proj."
                )
            by_rows = not by_rows  # transformers' plan names dimensions as they lie, as Aria's does
        dim = out_dim if by_rows else in_dim
        packs = 2 if style.startswith("packed") else 1
        segments = self._even(param.shape[dim], packs, f"{name}.shape[{dim}]")
        self._cut_parameter(root, experts, key, prefix, dim, segments, (self.rank,))
        if experts._parameters.get(bias) is None:
            return
        if by_rows:
            self._cut_parameter(root, experts, bias, prefix, 1, segments, (self.rank,))
        else:
            self._share_bias(experts, bias, prefix)

    def _share_bias(self, experts: nn.Module, key: str, name: str) -> None:
        """Let each rank add an equal share of a bias to outputs that are summed afterwards."""

        def lend(module: nn.Module, args: Any) -> None:  # what `self.<key>` finds before the parameter
            module.__dict__[key] = module.get_parameter(key) / self.size

        def take_back(module: nn.Module, args: Any, out: Any) -> None:
            module.__dict__.pop(key, None)

        experts.register_forward_pre_hook(lend)
        experts.register_forward_hook(take_back, always_call=True)
        self.shards.partial.add(f"{name}.{key}")

    def _enter_experts(self, experts: nn.Module) -> None:
        def share(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # transformers' experts: (hidden_states, top_k_index, top_k_weights); each rank sees part of every expert.
            def enter(x: Any) -> Any:
                return copy_to(x, self.group) if isinstance(x, Tensor) and x.is_floating_point() else x

            return tuple(enter(x) for x in args), {key: enter(x) for key, x in kwargs.items()}

        experts.register_forward_pre_hook(share, with_kwargs=True)
        experts.register_forward_hook(lambda m, args, out: reduce_from(out, self.group))

    def _share_rotary_part(self, root: nn.Module, module: nn.Module, name: str) -> None:
        """MLA: the rotary part of the compressed key goes straight to the split heads, so its gradient is a share."""
        configs = (getattr(root.get_submodule(name[:i]), "config", None) for i in range(len(name)) if i == 0 or name[i] == ".")
        rope_dim = next((getattr(c, "qk_rope_head_dim") for c in configs if hasattr(c, "qk_rope_head_dim")), None)  # noqa: B009
        if rope_dim is None:
            raise ValueError(f"plan[{name!r}] = 'mla_kv_a_proj' needs a model config with qk_rope_head_dim.")

        module.register_forward_hook(lambda m, args, out: copy_tail_to(out, rope_dim, self.group), prepend=True)

    def _cut_embedding(self, root: nn.Module, module: nn.Module, name: str) -> None:
        check_embedding(module, name)
        assert isinstance(module, nn.Embedding)
        segments = self._even(module.num_embeddings, 1, "vocabulary")
        self._cut_parameter(root, module, "weight", name, 0, segments, (self.rank,))
        spread_embedding(module, segments[0][0], self.group)
        show_part(module, segments[0][0], self.group)

    def _cut_norm(self, root: nn.Module, module: nn.Module, name: str) -> None:
        check_norm(module, name)
        assert isinstance(module, (RMSNorm, GatedNorm))
        size = module.weight.shape[0]
        self._cut_parameter(root, module, "weight", name, 0, self._even(size, 1, f"{name}.weight"), (self.rank,))
        if isinstance(module, GatedNorm):
            self._share_groups(module, size // module.group)
            return

        def forward(x: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            # Every rank divides its slice by the sum, and finds its share of the sum's gradient.
            total = copy_to(reduce_from(wide.square().sum(-1, keepdim=True), self.group), self.group)
            return module.weight * (wide * torch.rsqrt(total / size + module.eps)).to(x.dtype)

        module.forward = forward  # type: ignore[method-assign]

    def _share_groups(self, norm: GatedNorm, groups: int) -> None:
        """Let ranks that have parts of one group of a norm add up its squares."""
        if groups % self.size == 0:
            return
        mine, _ = self._shared_unit(groups)

        def total(squares: Tensor) -> Tensor:
            every = F.pad(squares, (mine, groups - 1 - mine))
            return copy_to(reduce_from(every, self.group), self.group)[..., mine : mine + 1]

        norm.total = total

    # ------------------------------------------------------------------------------------------------------- helpers

    def _even(self, size: int, packs: int, what: str) -> tuple[tuple[int, int], ...]:
        """Return this rank's even share of ``size``, taken from each of ``packs`` equal parts."""
        part = size // packs
        if part % self.size:
            raise ValueError(
                f"{what} is {size}{f' ({packs} × {part})' if packs > 1 else ''}, which tp={self.size} does not divide. "
                f"Set tp to one of {divisors(part, limit=64)}, or pad it to a multiple of {self.size * packs}."
            )
        length = part // self.size
        return tuple((pack * part + self.rank * length, length) for pack in range(packs))

    def _cut_parameter(
        self,
        root: nn.Module,
        module: nn.Module,
        key: str,
        name: str,
        dim: int,
        segments: tuple[tuple[int, int], ...],
        holders: tuple[int, ...] | tuple[tuple[int, ...], ...],
    ) -> None:
        """Let ``module.key`` hold its local part, in every module that shares it (tied weights stay tied).

        Args:
            holders: the tp ranks that hold the same segments, or those of each segment.
        """
        param = module._parameters.get(key)
        if param is None:
            return
        full_name = f"{name}.{key}"
        spread = self.shards.by_name.get(canonical(full_name))  # cut by expert parallelism before
        if spread is not None and spread.experts is None:
            spread = None
        if spread is None and full_name in self.shards.by_name:  # tied, and cut through its other name
            if self.shards.by_name[full_name].segments != segments:
                raise ValueError(f"{full_name} is tied to a weight that the plan cuts in another way. Give both the same cut.")
            return
        replicas = tuple(rank for rank in holders if isinstance(rank, int)) or (self.rank,)
        shared = tuple(ranks for ranks in holders if isinstance(ranks, tuple))
        shard = TensorShard(global_shape=tuple(param.shape), dim=dim, segments=segments, replicas=replicas, shared=shared)
        set_part(param, shard.take(param.detach()).clone())
        if spread is not None:
            shard = replace(shard, global_shape=spread.global_shape, experts=spread.experts)
        for alias in _names(root, param):
            self.shards.by_name[alias] = shard


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a linear (whose input is its first one) with another input."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    (name, value), *others = kwargs.items()
    return (), {name: change(value), **dict(others)}


def _change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_pre_hook(lambda m, args, kwargs: _with_input(args, kwargs, change), with_kwargs=True)


class _SharedInput:
    """Let linears that read the same tensor (q, k and v) share one entry, so that backward sums it once.

    Holds one activation at most: the next row-wise linear lets it go.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._source: Tensor | None = None
        self._shared: Tensor | None = None

    def share(self, x: Tensor) -> Tensor:
        if x is not self._source or self._shared is None:
            self._source, self._shared = x, copy_to(x, self._group)
        return self._shared

    def forget(self) -> None:
        self._source = self._shared = None


def _names(root: nn.Module, param: nn.Parameter) -> list[str]:
    """Return the full name of every place that holds ``param``."""
    return [
        f"{name}.{key}" if name else key
        for name, module in root.named_modules()
        for key, held in module._parameters.items()
        if held is param
    ]

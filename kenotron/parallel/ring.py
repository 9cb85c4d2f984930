"""Attention over a sequence of which each rank of a group holds a part: context parallelism, in two ways.

``ring_attention``: queries stay, keys and values go round (arXiv:2310.01889). In n steps the queries of each rank meet the keys
of all n, and the results are merged. While some keys are in use they already travel on. Any number of heads will do. Forward
sends n - 1 times the local K and V, backward the same again, and n times their gradients in fp32.

``ulysses_attention``: an all-to-all turns a part of the sequence with all heads into the whole sequence with a part of the
heads, and another one turns the result back (arXiv:2309.14509). It sends less, and needs query heads that the ranks divide.

Either keeps for backward what belongs to this rank: q, k, v, the output, and a number for each query and head. Which ranks send
what to whom, and when, never depends on masks.

Under a causal mask, parts in order would leave the first ranks of a ring idle. There the sequence is cut into 2·n chunks, and
rank r holds chunks r and 2n-1-r (``zigzag_indices``). Below are the queries of rank 1 of 4 and the keys of each rank, # for a
diagonal and o for a chunk that is seen whole: two diagonals and a chunk in a rank's own step, two chunks in every other step.
Both of its own see the first chunk of an earlier rank; of a later rank the second of its own sees both.

    keys of chunk   1 6   0 7   3 4   2 5
    queries of 1    #     o
    queries of 6    o #   o     o o   o o

Ulysses takes parts in order (``contiguous_indices``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from kenotron.flops import as_attention
from kenotron.models.autocast import compute_dtype
from kenotron.parallel.attention import Mask, accumulation_dtype, attend, attend_backward, empty_result
from kenotron.parallel.collectives import Group, all_to_all, group_rank, group_size

Block = tuple[slice, slice, Mask]


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: Group, documents: Tensor | None = None, causal: bool = True,
    window: int | None = None, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the attention of this rank's queries over the keys of all ranks, which travel round the ring.

    Args:
        q: [batch, heads, local sequence, dim], the positions that ``zigzag_indices`` gives this rank. fp32, bf16, fp16 or fp64.
        k: [batch, KV heads, local sequence, dim], likewise; KV heads divide the heads.
        v: [batch, KV heads, local sequence, dim of values].
        group: ranks that hold the sequence; ``None``: this process alone.
        documents: int [batch, whole sequence] in natural order, the same on all ranks: tokens see those of their own document.
            Keys of a negative one are padding that nobody sees. -1 sees nothing itself; -2 - d sees what document d shows.
        causal: a query sees keys up to its own position in the whole sequence.
        window: and of those only the last so many, its own included.
        scale: of the scores; ``None``: 1 / sqrt(dim).
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: [heads], a logit that each head's softmax counts without a value (gpt-oss).

    Returns:
        [batch, heads, local sequence, dim of values], of q's dtype; 0 for a query that sees nothing.

        A gradient of q, k or v is whole. That of ``sinks`` is this rank's share, of which the sum over the ranks is meant, as
        with all parameters of a model whose sequence is split.

    Raises:
        ValueError: shapes or settings do not go together.
    """
    q, k, v = _autocast(q, k, v)
    setting = _setting(q, k, v, group, documents, causal, window, scale, softcap, sinks)
    if group_size(group) > 1 and q.shape[2] % 2:
        raise ValueError(
            f"ring_attention got {q.shape[2]} positions on this rank, which cannot be two equal chunks; pad the whole sequence"
            f" to a multiple of 2 × {group_size(group)} ranks, or use ulysses_attention."
        )
    attention = _attention if group_size(group) == 1 else _attention_untraced
    return attention(q, k, v, sinks, documents, setting)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: Group, documents: Tensor | None = None, causal: bool = True,
    window: int | None = None, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the attention of this rank's queries over the keys of all ranks, each of which attends with a part of the heads.

    Args:
        q, k, v: as for ``ring_attention``, but of the positions that ``contiguous_indices`` gives this rank. Ranks divide the
            heads; ranks and KV heads divide one another, one way or the other.
        others: as for ``ring_attention``.

    Returns:
        As ``ring_attention``. The gradient of ``sinks`` is zero but for the heads that this rank attended with.

    Raises:
        ValueError: shapes or settings do not go together.
    """
    q, k, v = _autocast(q, k, v)
    setting = _setting(q, k, v, group, documents, causal, window, scale, softcap, sinks)
    if group is None or group.size() == 1:
        return _attention(q, k, v, sinks, documents, setting)
    ranks, heads, kv_heads = group.size(), q.shape[1], k.shape[1]
    if heads % ranks:
        allowed = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ValueError(
            f"ulysses_attention got {heads} query heads for {ranks} ranks; {heads} heads can be shared by {allowed} ranks."
            " Choose one of these, or use ring_attention."
        )
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"ulysses_attention got {kv_heads} KV heads for {ranks} ranks; the ranks must be a divisor or a multiple of"
            f" {kv_heads}. Choose such a number, or use ring_attention."
        )
    if kv_heads < ranks:  # each rank gets the one that its query heads share
        k, v = (x.repeat_interleave(ranks // kv_heads, 1) for x in (k, v))
    q, k, v = _to_heads((q, k, v), group)
    if sinks is not None:
        sinks = sinks.tensor_split(ranks)[group.rank()]
    return _to_sequence(_attention(q, k, v, sinks, documents, replace(setting, group=None)), group)


def zigzag_indices(length: int, num_ranks: int, rank: int) -> Tensor:
    """Return the positions (int64, in order) that lie on a rank for ``ring_attention``.

    Raises:
        ValueError: ``length`` cannot be cut into two equal chunks for each rank.
    """
    if num_ranks > 1 and length % (2 * num_ranks):
        raise ValueError(
            f"{length} positions cannot be cut into {2 * num_ranks} equal chunks, two for each of {num_ranks} ranks;"
            f" pad them to {-(-length // (2 * num_ranks)) * 2 * num_ranks}."
        )
    starts = _chunks(num_ranks, rank, length // num_ranks)
    size = length // num_ranks // len(starts)
    return torch.cat([torch.arange(start, start + size) for start in starts])


def contiguous_indices(length: int, num_ranks: int, rank: int) -> Tensor:
    """Return the positions (int64, in order) that lie on a rank for ``ulysses_attention``.

    Raises:
        ValueError: ``length`` cannot be cut into equal parts.
    """
    if length % num_ranks:
        raise ValueError(
            f"{length} positions cannot be cut into equal parts for {num_ranks} ranks;"
            f" pad them to {-(-length // num_ranks) * num_ranks}."
        )
    return torch.arange(length).view(num_ranks, -1)[rank]


# ---- What is set ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Setting:
    group: Group
    causal: bool
    window: int | None
    scale: float
    softcap: float | None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch.nn.functional.scaled_dot_product_attention does under autocast."""
    return tuple(x.to(compute_dtype(x)) for x in tensors)


def _setting(
    q: Tensor, k: Tensor, v: Tensor, group: Group, documents: Tensor | None, causal: bool, window: int | None,
    scale: float | None, softcap: float | None, sinks: Tensor | None,
) -> _Setting:  # fmt: skip
    """Check what a caller gave."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and q.shape[::2] == k.shape[::2]):
        raise ValueError(
            f"got {shapes}; allowed are [batch, heads, local sequence, dim] that differ in heads and v's dim only."
        )
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"got {shapes}; q and k must have one dim, and q's heads must be a multiple of the KV heads.")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"got q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating-point dtype.")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window={window} with causal={causal}; a window is at least 1 and needs causal=True.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}; a cap is positive. Leave it None for no cap.")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks of shape {list(sinks.shape)} for {q.shape[1]} query heads; give one logit for each head.")
    whole = [q.shape[0], q.shape[2] * group_size(group)]
    if documents is not None and (
        list(documents.shape) != whole or documents.is_floating_point() or documents.device != q.device
    ):
        raise ValueError(
            f"documents: {documents.dtype} of shape {list(documents.shape)} on {documents.device}; give integers of shape"
            f" {whole} on {q.device}: [batch, whole sequence] in natural order, the same on every rank."
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _Setting(group=group, causal=causal, window=window, scale=scale, softcap=softcap)


def _chunks(num_ranks: int, rank: int, length: int) -> list[int]:
    """Return the positions at which the chunks of a rank start, which holds ``length`` positions in all."""
    return [0] if num_ranks == 1 else [rank * length // 2, (2 * num_ranks - 1 - rank) * length // 2]


def _blocks(setting: _Setting, documents: Tensor | None, length: int, owner: int) -> list[Block]:
    """Return which of this rank's queries meet which keys of rank ``owner``, and what they see of them."""
    ranks, rank = group_size(setting.group), group_rank(setting.group)
    mine, others = _chunks(ranks, rank, length), _chunks(ranks, owner, length)
    size = length // len(mine)
    blocks: list[Block] = []
    asking = None if documents is None else torch.where(documents < -1, -2 - documents, documents)
    for (i, start), (j, other) in itertools.product(enumerate(mine), enumerate(others)):
        of_both = None
        if documents is not None and asking is not None:
            of_both = asking[:, start : start + size], documents[:, other : other + size]
        mask = Mask(offset=start - other, causal=setting.causal, window=setting.window, documents=of_both)
        sight = mask.sight(slice(0, size), slice(0, size))
        if sight != "nothing":
            rows, cols = (slice(n * size, n * size + size) for n in (i, j))
            blocks.append((rows, cols, Mask() if sight == "everything" else mask))
    return _joined(_joined(blocks))  # chunks side by side, then one above the other


def _joined(blocks: list[Block]) -> list[Block]:
    """Make one of neighbours that are seen whole: two chunks of keys for one of queries, or the other way round."""
    joined: list[Block] = []
    for rows, cols, mask in blocks:
        if joined and _open(mask) and _open(joined[-1][2]):
            before_rows, before_cols, _ = joined[-1]
            if before_rows == rows and before_cols.stop == cols.start:
                joined[-1] = rows, slice(before_cols.start, cols.stop), mask
                continue
            if before_cols == cols and before_rows.stop == rows.start:
                joined[-1] = slice(before_rows.start, rows.stop), cols, mask
                continue
        joined.append((rows, cols, mask))
    return joined


def _open(mask: Mask) -> bool:
    return not mask.causal and mask.documents is None


# ---- The ring -------------------------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, documents: Tensor | None, setting: _Setting) -> Tensor:
    return _apply(_Attention, q, k, v, sinks, documents, setting)


# torch.compile does not trace point-to-point transfers, and would make many graphs of what lies between them.
_disable: Any = torch.compiler.disable
_attention_untraced: Callable[..., Tensor] = _disable(_attention)


def _apply(function: type[Function], *args: Any) -> Tensor:
    apply: Any = function.apply
    return cast(Tensor, apply(*args))


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, documents: Tensor | None, setting: _Setting
    ) -> Tensor:
        out, lse = empty_result(q, v)
        if sinks is not None:  # as a key would be whose value is zero
            lse.copy_(sinks.unsqueeze(-1).expand_as(lse))
        with as_attention(q, k, v, k.shape[2] * group_size(setting.group)):
            for owner, (k_block, v_block) in _travel(k, v, setting.group):
                for rows, cols, mask in _blocks(setting, documents, q.shape[2], owner):
                    attend(
                        q[:, :, rows], k_block[:, :, cols], v_block[:, :, cols], mask=mask, scale=setting.scale,
                        softcap=setting.softcap, into=(out[:, :, rows], lse[:, :, rows]),
                    )  # fmt: skip
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, documents, out, lse)
        ctx.setting = setting
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = saved = ctx.saved_tensors  # once: a checkpoint gives them once
        with as_attention(q, k, v, k.shape[2] * group_size(ctx.setting.group), backward=True):
            return _backward(dout, saved, ctx.setting)


def _backward(dout: Tensor, saved: tuple[Any, ...], setting: _Setting) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, documents, out, lse = saved
    dq = torch.zeros_like(q, dtype=accumulation_dtype(q))
    transfer = None
    for owner, (k_block, v_block) in _travel(k, v, setting.group):
        here = k.new_zeros(k.numel() + v.numel(), dtype=dq.dtype)  # this rank's share in the owner's gradients
        dk, dv = _apart(here, k, v)
        for rows, cols, mask in _blocks(setting, documents, q.shape[2], owner):
            attend_backward(
                dout[:, :, rows], q[:, :, rows], k_block[:, :, cols], v_block[:, :, cols], out[:, :, rows], lse[:, :, rows],
                mask=mask, scale=setting.scale, softcap=setting.softcap,
                into=(dq[:, :, rows], dk[:, :, cols], dv[:, :, cols]),
            )  # fmt: skip
        if transfer is not None:
            here += transfer.wait()  # those of all ranks before
        transfer = _pass_on(here, setting.group, tag=1)  # it arrives while the next block is computed
    assert transfer is not None
    dk, dv = _apart(transfer.wait(), k, v)  # home
    dsinks = None
    if sinks is not None:
        delta = (dout.to(lse.dtype) * out).sum(-1)
        share = torch.exp(sinks.unsqueeze(-1) - lse)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None


def _travel(k: Tensor, v: Tensor, group: Group) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Yield whose they are and each rank's keys and values, one's own first; in the meantime they go on to the next rank."""
    ranks, rank = group_size(group), group_rank(group)
    held = torch.cat((k.flatten(), v.flatten())) if ranks > 1 else k.new_empty(0)
    for step in range(ranks):
        transfer = _pass_on(held, group, tag=0) if step < ranks - 1 else None
        yield (rank - step) % ranks, (k, v) if step == 0 else _apart(held, k, v)
        if transfer is not None:
            held = transfer.wait()


def _apart(both: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return both[: k.numel()].view(k.shape), both[k.numel() :].view(v.shape)


class _Transfer(NamedTuple):
    """What is under way; it keeps what leaves alive until it has left."""

    works: list[dist.Work]
    leaving: Tensor
    coming: Tensor

    def wait(self) -> Tensor:
        """Return what has come."""
        for work in self.works:
            work.wait()
        return self.coming


def _pass_on(leaving: Tensor, group: Group, tag: int) -> _Transfer:
    """Begin to send a tensor to the next rank and to receive its like from the one before; alone, that is oneself."""
    if group is None or group.size() == 1:
        return _Transfer([], leaving, leaving)
    ranks, rank, coming = group.size(), group.rank(), torch.empty_like(leaving)
    send = dist.P2POp(dist.isend, leaving, group=group, group_peer=(rank + 1) % ranks, tag=tag)
    receive = dist.P2POp(dist.irecv, coming, group=group, group_peer=(rank - 1) % ranks, tag=tag)
    return _Transfer(dist.batch_isend_irecv([send, receive]), leaving, coming)


# ---- Ulysses --------------------------------------------------------------------------------------------------------


def _to_heads(tensors: tuple[Tensor, ...], group: ProcessGroup) -> tuple[Tensor, ...]:
    """[batch, heads, local sequence, dim] each → [batch, heads of this rank, whole sequence, dim], in one exchange."""
    ranks = group.size()
    shapes = [(ranks, x.shape[0], x.shape[1] // ranks, *x.shape[2:]) for x in tensors]
    leaving = [x.reshape(x.shape[0], ranks, -1, *x.shape[2:]).movedim(1, 0).flatten(1) for x in tensors]
    coming = torch.split_with_sizes(all_to_all(torch.cat(leaving, 1), group), [x.shape[1] for x in leaving], 1)
    return tuple(x.view(shape).movedim(0, 2).flatten(2, 3) for x, shape in zip(coming, shapes, strict=True))


def _to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[batch, heads of this rank, whole sequence, dim] → [batch, heads, local sequence, dim]."""
    batch, heads, length, dim = x.shape
    ranks = group.size()
    leaving = x.transpose(1, 2).reshape(batch, ranks, length // ranks, heads, dim).movedim(1, 0)
    return all_to_all(leaving, group).movedim(0, 2).flatten(2, 3).transpose(1, 2)

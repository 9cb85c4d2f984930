"""Attention of a block of queries with a block of keys, for whoever puts several blocks together.

    out, lse = attend(q, k, v, mask=mask, scale=scale)
    dq, dk, dv = attend_backward(dout, q, k, v, out, lse, mask=mask, scale=scale)

A softmax over all keys can be made from softmaxes over parts of them. Each part gives its output and its ``lse``, the
logarithm of the sum of its exponentials, and ``merge`` weighs the outputs by them. In the backward pass the ``out`` and ``lse``
over *all* keys go in with one block, and the blocks' gradients then add up to the whole (FlashAttention-2, arXiv:2307.08691,
section 3.1).

1. A ``Mask`` tells from positions, which the host knows, what the queries of a rectangle see of its keys: nothing,
   everything, what lies below a diagonal, or something else.
2. A block is halved until each rectangle is skipped, or taken by a fused kernel as it is, or small enough for a mask or for
   scores in memory: a tile.
3. Each tile runs in the kernel that ``choose_backend`` names. Results are put together in fp32, those of fp64 in fp64.

The kernels are private ops of torch and of the package flash-attn, where that is installed. Nothing else in Kénotron names
them; ``tests/parallel/test_attention.py`` fails when torch's move.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.functional import pad

Backend = Literal["flash_cpu", "flash_attn", "flash_cuda", "efficient_cuda", "math"]
Sight = Literal["nothing", "everything", "causal", "something"]

MAX_SCORES = 2**23
"""Elements of the largest mask, or in ``"math"`` of the largest scores, in memory at a time: 32 MB in fp32."""

FINE = 2**18
"""Elements of the largest tile under a mask on a CPU, where what a mask hides takes its time too. 8192 positions with a window
of 1024 took 1.0 s in tiles of 512 × 512, 2.8 s in tiles of 2048 × 2048, and 2.4 s without the window (4 heads of 64, one core).
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Which keys of a block its queries see: all of them where nothing is set.

    Args:
        offset: position of the first query minus position of the first key.
        causal: a query sees keys at its own position and before it.
        window: and of those the ones less than this many positions before.
        documents: of the queries [batch, queries] and of the keys [batch, keys]. A query sees keys of its own document;
            nobody sees a key of a negative one.
    """

    offset: int = 0
    causal: bool = False
    window: int | None = None
    documents: tuple[Tensor, Tensor] | None = None

    def sight(self, rows: slice, cols: slice) -> Sight:
        """Return what the queries ``rows`` see of the keys ``cols``."""
        nearest = self.offset + rows.start - (cols.stop - 1)  # the least of query position minus key position
        farthest = self.offset + (rows.stop - 1) - cols.start
        if (self.causal and farthest < 0) or (self.window is not None and nearest >= self.window):
            return "nothing"
        inside = self.window is None or farthest < self.window
        if self.documents is not None:
            if self.documents[0].device.type != "cpu":
                return "something"  # the host would wait for a GPU to look
            sight = _sight_of_documents(self.documents[0][:, rows], self.documents[1][:, cols])
            if sight != "everything":
                return sight
        if inside and (not self.causal or nearest >= 0):
            return "everything"
        diagonal = self.offset + rows.start == cols.start and self.offset + rows.stop == cols.stop
        return "causal" if inside and diagonal else "something"

    def seen(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """Return bool [batch or 1, 1, queries, keys], true where one of the queries ``rows`` sees one of the keys ``cols``."""
        i = torch.arange(self.offset + rows.start, self.offset + rows.stop, device=device).unsqueeze(1)
        distance = i - torch.arange(cols.start, cols.stop, device=device)
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen &= distance < self.window
        seen = seen[None, None]
        if self.documents is not None:
            mine, others = self.documents[0][:, None, rows, None], self.documents[1][:, None, None, cols]
            seen = seen & (mine == others) & (others >= 0)
        return seen


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float, softcap: float | None = None,
    into: tuple[Tensor, Tensor] | None = None, backend: Backend | None = None, max_scores: int = MAX_SCORES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(out, lse)`` of the queries over these keys.

    Args:
        q: [batch, heads, queries, dim]. k: [batch, KV heads, keys, dim]; KV heads divide the heads.
        v: [batch, KV heads, keys, dim of values].
        scale: what the products of queries and keys are multiplied by.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        into: the result over other keys, into which this one is merged in place.
        backend: ``None``: what ``choose_backend`` says for each tile.
        max_scores: elements of the largest mask or scores that may be in memory at a time.

    Returns:
        ``out`` [batch, heads, queries, dim of values], 0 where a query sees nothing, and ``lse`` [batch, heads, queries], there
        -inf; both in fp32, of fp64 in fp64. In memory ``out`` is [batch, queries, heads, dim of values].
    """
    out, lse = into or empty_result(q, v)
    for rows, _, name, tile in _tiles(q, k, v, mask, scale, softcap, backend, max_scores):
        with torch.autocast(q.device.type, enabled=False):  # fp32 is meant
            tile_out, tile_lse = _KERNELS[name][0](tile)
        if tile.seen is not None:  # of a query that sees nothing every kernel says something else; flash_cpu: lse = 0
            blind = ~tile.seen.any(-1)
            tile_out = tile_out.masked_fill(blind.unsqueeze(-1), 0.0)
            tile_lse = tile_lse.masked_fill(blind, -torch.inf)
        merge(out[:, :, rows], lse[:, :, rows], tile_out, tile_lse)
    return out, lse


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, mask: Mask, scale: float,
    softcap: float | None = None, into: tuple[Tensor, Tensor, Tensor] | None = None, backend: Backend | None = None,
    max_scores: int = MAX_SCORES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return this block's share of the gradients of q, k and v, in fp32, of fp64 in fp64.

    Args:
        out, lse: over *all* keys that the queries see, whichever blocks these are in.
        into: gradients to which these are added in place.
        dout, others: as in ``attend``.
    """
    dq, dk, dv = into or (torch.zeros_like(x, dtype=accumulation_dtype(x)) for x in (q, k, v))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # where nothing is seen, exp(-inf - lse) must not be nan
    for rows, cols, name, tile in _tiles(q, k, v, mask, scale, softcap, backend, max_scores):
        with torch.autocast(q.device.type, enabled=False):
            gradients = _KERNELS[name][1](tile, dout[:, :, rows], out[:, :, rows], lse[:, :, rows])
        for total, part, where in zip((dq, dk, dv), gradients, (rows, cols, cols), strict=True):
            total[:, :, where] += part
    return dq, dk, dv


def empty_result(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of the queries over no keys at all, to merge into."""
    batch, heads, length, _ = q.shape
    # In memory the heads of a position lie together, as models join them next: one copy less to keep until backward.
    out = q.new_zeros((batch, length, heads, v.shape[-1]), dtype=accumulation_dtype(q)).transpose(1, 2)
    return out, out.new_full((batch, heads, length), -torch.inf)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge the result over other keys into ``out`` and ``lse``, in place."""
    share = torch.sigmoid(other_lse - lse).nan_to_num_(0.0)  # nan: neither has seen a key
    out.lerp_(other_out.to(out.dtype), share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, other_lse))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which results over several blocks of ``x`` are put together."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def choose_backend(q: Tensor, k: Tensor, v: Tensor, *, masked: bool = False, softcap: float | None = None) -> Backend:
    """Return the fastest kernel for these tensors; ``masked``: under another mask than a causal diagonal."""
    if not masked and flash_attn_serves(q, v):
        return "flash_attn"
    if softcap is not None:
        return "math"
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return "flash_cpu"
    if q.device.type == "cuda" and torch.version.hip is None and q.shape[-1] % 8 == v.shape[-1] % 8 == 0:
        # Not every GPU has flash's backward above a head dimension of 192.
        grouped = cuda.SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])
        if not masked and q.shape[-1] == v.shape[-1] <= 192 and cuda.can_use_flash_attention(grouped):
            return "flash_cuda"
        expanded = cuda.SDPAParams(q, *_expand(q, k[:, :, :1], v[:, :, :1]), None, 0.0, False, False)
        if cuda.can_use_efficient_attention(expanded):
            return "efficient_cuda"
    return "math"


def flash_attn_serves(q: Tensor, v: Tensor) -> bool:
    """Return whether the package flash-attn is here and takes such tensors."""
    if q.device.type != "cuda" or torch.version.hip is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    dim, capability = q.shape[-1], torch.cuda.get_device_capability(q.device)
    return dim == v.shape[-1] <= 256 and dim % 8 == 0 and capability >= (8, 0) and _flash_ops() is not None


@functools.cache
def _flash_ops() -> Any:
    """Return the ops of flash-attn 2.7 or later; ``None`` without it."""
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None
    ops = torch.ops.flashattn
    return ops if {"_flash_attn_forward", "_flash_attn_backward"} <= set(dir(ops)) else None


# ---- Tiles ----------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """What a kernel computes at once. ``seen``: the mask, if there is one besides ``causal``, which is the diagonal's."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None
    causal: bool
    scale: float
    softcap: float | None


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None, backend: Backend | None, max_scores: int
) -> Iterator[tuple[slice, slice, Backend, _Tile]]:
    """Yield queries, keys, kernel and input of each tile in which something is seen."""
    if softcap is not None and backend not in (None, "math", "flash_attn"):
        raise ValueError(
            f"backend={backend!r} with softcap={softcap}: only 'math' and 'flash_attn' cap scores; leave backend=None."
        )
    plain = backend or choose_backend(q, k, v, softcap=softcap)
    masked = backend or choose_backend(q, k, v, masked=True, softcap=softcap)
    # Kernels take any strides but those of the rows' elements, and of rows that share memory.
    q, k, v = (x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous() for x in (q, k, v))
    planes = q.shape[0] * (q.shape[1] if "math" in (plain, masked) else 1)  # scores are per head, masks for all heads
    most = max(1, max_scores // planes)
    fine = min(most, FINE) if q.device.type == "cpu" else most
    for rows, cols, sight in _halve(mask, slice(0, q.shape[2]), slice(0, k.shape[2]), most, fine, plain != "math"):
        name = masked if sight == "something" else plain
        causal = sight == "causal" and name != "math"
        seen = None if causal or sight == "everything" else mask.seen(rows, cols, q.device)
        yield rows, cols, name, _Tile(q[:, :, rows], k[:, :, cols], v[:, :, cols], seen, causal, scale, softcap)


def _halve(mask: Mask, rows: slice, cols: slice, most: int, fine: int, whole: bool) -> Iterator[tuple[slice, slice, Sight]]:
    """Yield rectangles of up to ``most`` elements, under a mask of up to ``fine``; where ``whole``, of any size without one."""
    sight = mask.sight(rows, cols)
    if sight == "nothing":
        return
    height, width = rows.stop - rows.start, cols.stop - cols.start
    if height * width <= (fine if sight == "something" else most) or (whole and sight != "something"):
        yield rows, cols, sight
        return
    for some_rows in _halves(rows) if 2 * height > width else [rows]:
        for some_cols in _halves(cols) if 2 * width > height else [cols]:
            yield from _halve(mask, some_rows, some_cols, most, fine, whole)


def _halves(span: slice) -> list[slice]:
    length = span.stop - span.start
    middle = span.start + (length // 128 * 64 or length // 2)  # kernels like multiples of 64
    return [slice(span.start, middle), slice(middle, span.stop)]


def _sight_of_documents(mine: Tensor, others: Tensor) -> Sight:
    (low, high), (others_low, others_high) = mine.aminmax(dim=1), others.aminmax(dim=1)
    if bool(((others_low > high) | (others_high < low) | (others_high < 0)).all()):
        return "nothing"
    one = (low == high) & (others_low == low) & (others_high == low) & (low >= 0)
    return "everything" if bool(one.all()) else "something"


# ---- Kernels: tile → out, lse; and tile, dout, out, lse → dq, dk, dv -------------------------------------------------


def _flash_cpu(tile: _Tile) -> Any:
    # In fp32, whatever comes in: in bf16 the backward takes 8 times as long (torch 2.13, AVX2, 4 heads of 2048 × 64).
    q, k, v = _upcast(tile.q, *_expand(tile.q, tile.k, tile.v))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(q, k, v, 0.0, tile.causal, attn_mask=_bias(tile.seen, q.dtype), scale=tile.scale)


def _flash_cpu_backward(tile: _Tile, dout: Tensor, out: Tensor, lse: Tensor) -> Any:
    # Expanded here although the op knows groups: with one KV head on two threads it took 3.3 s, this 0.1 s (torch 2.13).
    q, k, v, dout, out = _upcast(tile.q, *_expand(tile.q, tile.k, tile.v), dout, out)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    bias = _bias(tile.seen, q.dtype)
    dq, dk, dv = op(dout, q, k, v, out, lse, 0.0, tile.causal, attn_mask=bias, scale=tile.scale)
    return dq, _sum_groups(dk, tile.k), _sum_groups(dv, tile.v)


def _flash_cuda(tile: _Tile) -> Any:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    return op(tile.q, tile.k, tile.v, 0.0, tile.causal, False, scale=tile.scale)[:2]


def _flash_cuda_backward(tile: _Tile, dout: Tensor, out: Tensor, lse: Tensor) -> Any:
    q, k, v = tile[:3]
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward
    unused = q.new_empty((), dtype=torch.int64)  # the state of dropout
    lengths = None, None, q.shape[2], k.shape[2]  # of variable lengths there are none
    return op(dout, q, k, v, out, lse.contiguous(), *lengths, 0.0, tile.causal, unused, unused, scale=tile.scale)


def _flash_attn(tile: _Tile) -> Any:
    q, k, v = (x.transpose(1, 2) for x in tile[:3])
    out, lse, *_ = _flash_ops()._flash_attn_forward(
        q, k, v, 0.0, tile.scale, tile.causal, -1, -1, tile.softcap or 0.0, None, False
    )  # no dropout, window or slopes
    return out.transpose(1, 2), lse


def _flash_attn_backward(tile: _Tile, dout: Tensor, out: Tensor, lse: Tensor) -> Any:
    q, k, v, dout, out = (x.to(tile.q.dtype).transpose(1, 2) for x in (*tile[:3], dout, out))
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    _flash_ops()._flash_attn_backward(
        dout, q, k, v, out, lse.contiguous(), *gradients, 0.0, tile.scale, tile.causal, -1, -1, tile.softcap or 0.0, None, False
    )
    return [x.transpose(1, 2) for x in gradients]


def _efficient_cuda(tile: _Tile) -> Any:
    k, v = _expand(tile.q, tile.k, tile.v)
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = op(tile.q, k, v, _aligned_bias(tile), True, 0.0, tile.causal, scale=tile.scale)
    return out, lse[:, :, : tile.q.shape[2]]  # its rows are padded


def _efficient_cuda_backward(tile: _Tile, dout: Tensor, out: Tensor, lse: Tensor) -> Any:
    q, (k, v) = tile.q, _expand(tile.q, tile.k, tile.v)
    dout, out = (x.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (dout, out))  # it assumes these strides
    lse = pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # and reads rows in blocks of 32
    op = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    unused, wanted = q.new_empty((), dtype=torch.int64), [True, True, True, False]
    bias = _aligned_bias(tile)
    dq, dk, dv, _ = op(dout, q, k, v, bias, out, lse, unused, unused, 0.0, wanted, tile.causal, scale=tile.scale)
    return dq, _sum_groups(dk, tile.k), _sum_groups(dv, tile.v)


def _math(tile: _Tile) -> Any:
    scores, _ = _scores(tile)
    (v,) = _upcast(tile.v)
    top = scores.amax(-1, keepdim=True)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out, lse = (p @ v).div_(total), total.log_().add_(top).squeeze(-1)
    return _unfold(out, tile.q), lse.reshape(tile.q.shape[:3])


def _math_backward(tile: _Tile, dout: Tensor, out: Tensor, lse: Tensor) -> Any:
    q, k, v, dout, out = _upcast(tile.q, tile.k, tile.v, dout, out)
    q, dout, out, lse = (_fold(x, tile.k) for x in (q, dout, out, lse.unsqueeze(-1)))
    scores, slope = _scores(tile)
    p = scores.sub_(lse).exp_()
    dv = p.mT @ dout
    ds = (dout @ v.mT).sub_((dout * out).sum(-1, keepdim=True)).mul_(p)
    if slope is not None:
        ds *= slope
    ds *= tile.scale
    return _unfold(ds @ k, tile.q), ds.mT @ q, dv


_Kernels = tuple[Callable[[_Tile], Any], Callable[[_Tile, Tensor, Tensor, Tensor], Any]]
_KERNELS: dict[Backend, _Kernels] = {
    "flash_cpu": (_flash_cpu, _flash_cpu_backward),
    "flash_attn": (_flash_attn, _flash_attn_backward),
    "flash_cuda": (_flash_cuda, _flash_cuda_backward),
    "efficient_cuda": (_efficient_cuda, _efficient_cuda_backward),
    "math": (_math, _math_backward),
}


def _scores(tile: _Tile) -> tuple[Tensor, Tensor | None]:
    """Return scores [batch, KV heads, queries of its heads, keys], and what a cap multiplies their gradients by."""
    q, k = _upcast(tile.q, tile.k)
    scores = (_fold(q, k) @ k.mT).mul_(tile.scale)
    slope = None
    if tile.softcap is not None:
        scores.div_(tile.softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(tile.softcap)
    if tile.seen is not None:
        by_head = scores.view(scores.shape[0], -1, *tile.seen.shape[2:])
        by_head.masked_fill_(~tile.seen, -torch.inf)
    return scores, slope


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """[batch, heads, queries, n] → [batch, KV heads, queries of its heads, n]: heads that share keys and values."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    return x.reshape(*q.shape[:3], x.shape[-1])


def _expand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _sum_groups(grad: Tensor, x: Tensor) -> Tensor:
    return grad if grad.shape == x.shape else grad.reshape(*x.shape[:2], -1, *x.shape[2:]).sum(2)


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(accumulation_dtype(x)) for x in tensors)


def _bias(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if seen is None else torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _aligned_bias(tile: _Tile) -> Tensor | None:
    """Return the mask for every head, its rows 16 elements apart or a multiple: the kernel loads them by vectors."""
    bias = _bias(tile.seen, tile.q.dtype)
    if bias is None:
        return None
    keys = bias.shape[-1]
    return pad(bias, (0, -keys % 16))[..., :keys].expand(*tile.q.shape[:3], keys)

"""Scans of state space models, in plain torch: they run anywhere, and every other kernel is measured against them.

A state ``h`` decays, takes in what comes, and is read::

    h_t = exp(dt_t · A) · h_{t-1} + dt_t · x_t ⊗ B_t          y_t = C_t · h_t

Mamba (Gu and Dao, arXiv 2312.00752) has a decay for each channel and each of its states, so that time has to be walked through;
Mamba-2 (Dao and Gu, arXiv 2405.21060) has one for each head, so that within a chunk all is matrix products. Where a document
starts, the state before it is forgotten.

Shapes: B sequences, S positions, I channels, N states, H heads of P channels, G groups of heads that share B and C, K taps.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 2**22  # of states at a time: what stays in a core's cache


def causal_conv(
    x_BSI: Tensor, weight_I1K: Tensor, bias_I: Tensor | None, before_BKI: Tensor | None = None, starts_BS: Tensor | None = None
) -> Tensor:
    """Return ``[B, S, I]``: each channel's last K positions, weighted.

    Args:
        before_BKI: ``[B, K - 1, I]``, the positions before the first; ``None``: zeros.
        starts_BS: True where a document starts, before which nothing is seen.
    """
    taps = weight_I1K.shape[-1]
    if before_BKI is None:
        before_BKI = x_BSI.new_zeros(x_BSI.shape[0], taps - 1, x_BSI.shape[2])
    padded = torch.cat([before_BKI.to(x_BSI.dtype), x_BSI], 1)
    documents = None if starts_BS is None else F.pad(starts_BS.cumsum(1), (taps - 1, 0))
    length, weight = x_BSI.shape[1], weight_I1K[:, 0]
    out = x_BSI * weight[:, -1]
    for tap in range(taps - 1):
        seen = padded[:, tap : tap + length]
        if documents is not None:
            seen = seen * (documents[:, tap : tap + length] == documents[:, taps - 1 :]).unsqueeze(-1)
        out = torch.addcmul(out, seen, weight[:, tap])
    return out if bias_I is None else out + bias_I


# ---- Mamba ----------------------------------------------------------------------------------------------------------


def selective_scan(
    x_BSI: Tensor,
    dt_BSI: Tensor,
    A_IN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    *,
    initial_BIN: Tensor | None = None,
    starts_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what is read ``[B, S, I]`` and the last state ``[B, I, N]``, both float32 (float64 of float64).

    Args:
        dt_BSI: above 0. A_IN: below 0. initial_BIN: the state before; ``None``: zeros. starts_BS: True where a document starts.
    """
    wide = torch.promote_types(x_BSI.dtype, torch.float32)
    if initial_BIN is None:
        initial_BIN = x_BSI.new_zeros(x_BSI.shape[0], *A_IN.shape, dtype=wide)
    tensors = (t.to(wide) for t in (x_BSI, dt_BSI, A_IN, B_BSN, C_BSN, initial_BIN))
    return cast(tuple[Tensor, Tensor], _SelectiveScan.apply(*tensors, starts_BS))


class _SelectiveScan(Function):
    """Walks through time, some positions in the cache at once. Keeps a state for each of these, and computes the rest anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, dt, B, C = (t.transpose(0, 1).contiguous() for t in (x, dt, B, C))  # time first: a step lies in one place
        starts = None if starts is None else starts.T.contiguous()
        chunk = max(1, _CHUNK_BYTES // max(1, initial.numel() * initial.element_size()))
        y, state, before = torch.empty_like(x), initial, []
        for begin in range(0, x.shape[0], chunk):
            part = slice(begin, begin + chunk)
            before.append(state)
            _, states = _walk(x[part], dt[part], A, B[part], state, None if starts is None else starts[part])
            torch.matmul(states, C[part].unsqueeze(-1), out=y[part].unsqueeze(-1))
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, starts, *before)
        ctx.chunk = chunk
        return y.transpose(0, 1), state.clone() if state is initial else state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, starts, *before = ctx.saved_tensors
        grad_y, carried = grad_y.transpose(0, 1).contiguous(), grad_state
        grad_x, grad_dt, grad_A = torch.empty_like(x), torch.empty_like(dt), torch.zeros_like(A)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        for number in reversed(range(len(before))):
            part = slice(number * ctx.chunk, (number + 1) * ctx.chunk)
            x_, dt_, B_, C_, dy = x[part], dt[part], B[part], C[part], grad_y[part]
            decay, states = _walk(x_, dt_, A, B_, before[number], None if starts is None else starts[part])
            torch.matmul(dy.unsqueeze(-2), states, out=grad_C[part].unsqueeze(-2))
            grads = dy.unsqueeze(-1) * C_.unsqueeze(-2)
            grads[-1] += carried
            for t in range(len(grads) - 2, -1, -1):
                grads[t].addcmul_(decay[t + 1], grads[t + 1])
            carried = decay[0] * grads[0]
            taken = torch.matmul(grads, B_.unsqueeze(-1)).squeeze(-1)
            torch.mul(taken, dt_, out=grad_x[part])
            torch.matmul((dt_ * x_).unsqueeze(-2), grads, out=grad_B[part].unsqueeze(-2))
            grads[1:].mul_(states[:-1])
            grads[0].mul_(before[number])
            grads.mul_(decay)  # now of dt · A
            torch.mul(taken, x_, out=grad_dt[part]).add_((grads * A).sum(-1))
            grad_A += (grads * dt_.unsqueeze(-1)).sum((0, 1))
        back = (t.transpose(0, 1) for t in (grad_x, grad_dt))
        return *back, grad_A, grad_B.transpose(0, 1), grad_C.transpose(0, 1), carried, None


def _walk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the decays and states of some positions, both ``[S, B, I, N]``."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    if starts is not None:
        decay.masked_fill_(starts[..., None, None], 0.0)
    states = (dt * x).unsqueeze(-1) * B.unsqueeze(-2)
    for t in range(len(states)):
        states[t].addcmul_(decay[t], state)
        state = states[t]
    return decay, states


# ---- Mamba-2 --------------------------------------------------------------------------------------------------------


def chunk_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    *,
    initial_BHPN: Tensor | None = None,
    starts_BS: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return what is read ``[B, S, H, P]`` and the last state ``[B, H, P, N]``, both float32 (float64 of float64).

    Args:
        dt_BSH: 0 or more. A_H: below 0. initial_BHPN, starts_BS: as for :func:`selective_scan`.
        chunk: positions that are matrix products; the result is the same for any.
    """
    wide = torch.promote_types(x_BSHP.dtype, torch.float32)
    x, dt, A, B, C = (t.to(wide) for t in (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN))
    (batch, length, heads, size), (groups, num_states) = x.shape, B.shape[2:]
    chunk = min(chunk, length)
    missing = -length % chunk
    if missing:  # where dt is 0, nothing is taken in and nothing decays
        x, dt, B, C = (F.pad(t, (*(0, 0) * (t.ndim - 2), 0, missing)) for t in (x, dt, B, C))
    # c chunks of l positions (s: those that are looked at), g groups of r heads
    x = (x * dt.unsqueeze(-1)).view(batch, -1, chunk, groups, heads // groups, size)
    B, C = (t.view(batch, -1, chunk, groups, num_states) for t in (B, C))
    steps = (dt * A).view(batch, -1, chunk, groups, heads // groups).permute(0, 1, 3, 4, 2)
    starts = None if starts_BS is None else F.pad(starts_BS, (0, missing)).view(batch, -1, 1, 1, chunk)
    # 1. Within a chunk: attention whose weights decay.
    decay_bcgrls = _decays(steps, starts)
    scores_bcgls = torch.einsum("bclgn,bcsgn->bcgls", C, B)
    y = torch.einsum("bcgrls,bcsgrp->bclgrp", scores_bcgls.unsqueeze(3) * decay_bcgrls, x)
    # 2. What a chunk adds to the state, and how much it leaves of the one before.
    added_bcgrpn = torch.einsum("bcgrs,bcsgn,bcsgrp->bcgrpn", decay_bcgrls[..., -1, :], B, x)
    since_bcgrl = torch.exp(steps.cumsum(-1))
    if starts is not None:
        since_bcgrl = since_bcgrl * (starts.cumsum(-1) == 0)
    # 3. From chunk to chunk.
    if initial_BHPN is None:
        state = x.new_zeros(batch, groups, heads // groups, size, num_states)
    else:
        state = initial_BHPN.to(wide).view(batch, groups, heads // groups, size, num_states)
    before = []
    for number in range(added_bcgrpn.shape[1]):
        before.append(state)
        state = torch.addcmul(added_bcgrpn[:, number], since_bcgrl[:, number, ..., -1, None, None], state)
    # 4. What a chunk reads of the state before it.
    read = torch.einsum("bclgn,bcgrpn->bclgrp", C, torch.stack(before, 1))
    y = y + read * since_bcgrl.permute(0, 1, 4, 2, 3).unsqueeze(-1)
    return y.reshape(batch, -1, heads, size)[:, :length], state.reshape(batch, heads, size, num_states)


def _decays(steps: Tensor, starts: Tensor | None) -> Tensor:
    """Return how much of position s is left at position l, ``[..., l, s]``, of logarithms ``[..., l]``.

    Sums of the steps between the two, and not differences of sums from the first step, which would cancel.
    """
    size = steps.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=steps.device).tril()
    sums = steps.unsqueeze(-1).expand(*steps.shape, size).masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    if starts is not None:
        documents = starts.cumsum(-1)
        lower = lower & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
    return sums.masked_fill(~lower, float("-inf")).exp()

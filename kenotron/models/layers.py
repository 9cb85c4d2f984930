"""What a transformer block is made of. Each does in one pass what eager code does in several, and keeps less for the backward.

Under ``torch.compile`` plain operations stand in, which the compiler fuses by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kenotron.models.experts import ACTIVATIONS

# ---- Linear ---------------------------------------------------------------------------------------------------------


class FusedLinear(nn.Linear):
    """Several linear layers of one input as one: the rows of the first, then of the second, and so on.

    Args:
        in_features, bias: as for ``nn.Linear``.
        parts: rows of each layer.
        unit: rows that belong together, of each part or of all; tensor parallelism never cuts inside of one (a head).
        shared: for each part, whether neighbouring ranks may hold the same unit where there are fewer than ranks (KV heads).

    Attributes:
        parts, units, shared: for each part. They describe the whole layer, also where a rank holds some of its rows.
    """

    def __init__(
        self,
        in_features: int,
        parts: tuple[int, ...],
        *,
        bias: bool = False,
        unit: int | tuple[int, ...] = 1,
        shared: tuple[bool, ...] | None = None,
    ) -> None:
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = parts
        self.units = (unit,) * len(parts) if isinstance(unit, int) else unit
        self.shared = (False,) * len(parts) if shared is None else shared

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={self.parts}"


# ---- Norm -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divide by the root of the mean square over the last dimension, in float32, and multiply by ``weight [N]``.

    Zhang and Sennrich, arXiv 1910.07467. Rounds where transformers' Llama does: to the input's type before the weight.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` for ``[..., N]``."""
        if torch.compiler.is_compiling():
            wide = x.to(_wide(x))
            normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * normal.to(x.dtype)
        return _rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _RMSNorm(Function):
    """Keeps its input and one number for each row. 2.2 × as fast as the operations above, both ways (CPU, 2048 × 512)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        normal = (wide * scale).to(x.dtype)
        return normal.mul_(weight) if normal.dtype == torch.promote_types(x.dtype, weight.dtype) else normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normal, grad = x * scale, grad.to(scale.dtype)
        grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = grad * weight
        along = torch.linalg.vecdot(grad_x, normal).div_(x.shape[-1]).unsqueeze(-1)
        return grad_x.sub_(normal.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


_rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _RMSNorm.apply


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---- Rotary positions -----------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` with each pair ``(x[i], x[i + D/2])`` turned by its angle.

    Su et al., RoFormer, arXiv 2104.09864, with the halves paired as in transformers' Llama.

    Args:
        x: ``[B, S, heads, D]``.
        cos, sin: ``[B or 1, S, D]``, the second half the same as the first.
    """
    half = x.shape[-1] // 2
    cos, sin = (y[..., :half].unsqueeze(2).to(x.dtype) for y in (cos, sin))
    if torch.compiler.is_compiling():
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    return _rotate(x, cos, sin)


class _Rotate(Function):
    """Turning back is turning the other way, so only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


_rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotate.apply


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    out = torch.empty_like(x)
    (left, right), (out_left, out_right) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-way)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin, value=way)
    return out


# ---- Gated activation -----------------------------------------------------------------------------------------------


def gated(x: Tensor, activation: str) -> Tensor:
    """Return ``act(gate) · up`` ``[..., I]`` of ``[..., 2·I]``, the gate first."""
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[activation].forward(gate) * up
    return _gate(x, activation)


class _Gate(Function):
    """Keeps its input alone, and computes the activation once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[activation].forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        (gate, up), (grad_gate, grad_up) = x.chunk(2, -1), grad_x.chunk(2, -1)
        act = ACTIVATIONS[ctx.activation]
        torch.mul(grad, act.forward(gate), out=grad_up)
        act.backward(grad * up, gate, grad_gate)
        return grad_x, None


_gate: Callable[[Tensor, str], Tensor] = _Gate.apply


class MLP(nn.Module):
    """``down(act(gate(x)) · up(x))`` with gate and up in one matrix, or ``down(act(up(x)))``."""

    def __init__(self, hidden: int, intermediate: int, *, activation: str, is_gated: bool, bias: bool, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout, self.is_gated = activation, dropout, is_gated
        if is_gated:
            self.gate_up_proj = FusedLinear(hidden, (intermediate, intermediate), bias=bias)
        else:
            self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., H]`` for ``[..., H]``."""
        if self.is_gated:
            inner = gated(self.gate_up_proj(x), self.activation)
        else:
            inner = ACTIVATIONS[self.activation].forward(self.up_proj(x))
        return F.dropout(cast(Tensor, self.down_proj(inner)), self.dropout, self.training)

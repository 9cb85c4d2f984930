"""The matrices of all experts of one layer, run as one grouped matrix product.

A pair is a token and one of the experts chosen for it. The forward pass

1. sorts the pairs by expert and finds where each expert's rows end, both on the device;
2. copies each token to the rows of its pairs;
3. multiplies each expert's rows by its gate and up matrices;
4. applies the activation, and the router's weight in float32. The down projection is linear, so the weight may come before it:
   thus the router's gradient needs none of the ``[S, H]`` results, and they aren't kept;
5. multiplies each expert's rows by its down matrix;
6. sums the rows of each token. Steps 2 and 6 are each other's transpose: no sum over duplicate indices, forward or backward,
   so results don't depend on the order in which threads arrive.

Shapes: T tokens, K experts per token, S = T·K pairs, E experts, H hidden, I intermediate; P = 2·I with a gate, I without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kenotron.models.autocast import compute_dtype, is_autocasting

Implementation = Literal["auto", "grouped", "loop"]


class Activation(NamedTuple):
    """A function of one tensor, and ``backward(grad, input, out)``, which writes the gradient of its input to ``out``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
    )


#: by the names that transformers' configurations use
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": Activation(F.silu, lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)),
        "gelu": _gelu("none"),
        "gelu_pytorch_tanh": _gelu("tanh"),
        "relu": Activation(F.relu, lambda grad, x, out: torch.mul(grad, x > 0, out=out)),
        "relu2": Activation(lambda x: F.relu(x).square(), lambda grad, x, out: torch.mul(grad, 2 * F.relu(x), out=out)),
    }
)


def check_activation(name: str) -> None:
    """Raise ``ValueError`` if there is no activation called ``name``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not known. Set one of {', '.join(map(repr, ACTIVATIONS))}.")


class Experts(nn.Module):
    """Hold the weights of all experts of a layer and run each token through those chosen for it.

    Parameters have the expert as their first dimension: ``gate_up_proj [E, 2·I, H]`` (rows of the gate, then of up; without
    a gate ``up_proj [E, I, H]``), ``down_proj [E, H, I]`` and, with ``bias``, ``gate_up_proj_bias``/``up_proj_bias [E, P]`` and
    ``down_proj_bias [E, H]``. The names, the layout and the signature of ``forward`` are those of transformers' experts.

    Args:
        hidden, intermediate, num_experts: H, I, E.
        activation: one of :data:`ACTIVATIONS`.
        gated: ``down(act(gate(x)) * up(x))``, otherwise ``down(act(up(x)))``.
        implementation: ``"grouped"`` for torch's grouped product, ``"loop"`` for one product per expert, ``"auto"`` for the
            first wherever :func:`grouped_mm_serves`.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        if implementation not in ("auto", "grouped", "loop"):
            raise ValueError(f'implementation={implementation!r}: set "auto", "grouped" or "loop".')
        self.num_experts, self.gated, self.implementation = num_experts, gated, implementation
        self.activation = activation
        self._up_name = "gate_up_proj" if gated else "up_proj"
        width = (2 if gated else 1) * intermediate

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.register_parameter(self._up_name, parameter(width, hidden))
        self.register_parameter(f"{self._up_name}_bias", parameter(width) if bias else None)
        self.down_proj = parameter(hidden, intermediate)
        self.register_parameter("down_proj_bias", parameter(hidden) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise each expert's matrices and biases as ``nn.Linear`` does: uniform within ± 1/√(inputs)."""
        for name in (self._up_name, "down_proj"):
            weight = self.get_parameter(name)
            bound = weight.shape[-1] ** -0.5
            weight.uniform_(-bound, bound)
            bias = self._parameters[f"{name}_bias"]
            if bias is not None:
                bias.uniform_(-bound, bound)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of what each token's experts make of it.

        Args:
            hidden_states: ``[T, H]``, T may be 0.
            top_k_index: ``[T, K]``, integers in [0, ``num_experts``).
            top_k_weights: ``[T, K]``, in any floating-point type.

        Returns:
            ``[T, H]`` in the type of ``hidden_states``. Under autocast the products run in autocast's type.
        """
        dtype = compute_dtype(hidden_states)
        order = sort_pairs(top_k_index, self.num_experts)
        weight_S = top_k_weights.reshape(-1).index_select(0, order.pair)
        x_SH = _copy_rows(hidden_states.to(dtype), order.token, order.row)
        x_SP = self._product(x_SH, self._up_name, order)
        x_SI = weighted_activation(x_SP, weight_S, self.activation, self.gated)
        x_SH = self._product(x_SI, "down_proj", order, weight_S)
        return _sum_rows(x_SH, order.token, order.row).to(hidden_states.dtype)

    def _product(self, x: Tensor, name: str, order: Order, scale_S: Tensor | None = None) -> Tensor:
        """Return each row times its expert's matrix, plus its bias (times ``scale_S``)."""
        weight, bias = self._parameters[name], self._parameters[f"{name}_bias"]
        assert weight is not None
        y = grouped_linear(x, weight.to(x.dtype) if is_autocasting(x) else weight, order.ends, self.implementation)
        if bias is None:
            return y
        # A product with one-hot rows picks each row's bias exactly, and its backward sums in float32 in a fixed order.
        chosen_SE = (order.expert.unsqueeze(-1) == torch.arange(self.num_experts, device=x.device)).to(x.dtype)
        if scale_S is not None:
            chosen_SE = chosen_SE * scale_S.to(x.dtype).unsqueeze(-1)
        return torch.addmm(y, chosen_SE, bias.to(y.dtype))

    def extra_repr(self) -> str:
        hidden, intermediate = self.down_proj.shape[1:]
        return f"{hidden}, {intermediate}, num_experts={self.num_experts}, activation={self.activation!r}, gated={self.gated}"


# ---- Order of the pairs ---------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """The pairs sorted by expert, those of one expert in the order of their tokens."""

    pair: Tensor  #: [S] which pair, counted through [T, K], is in each row
    token: Tensor  #: [S] whose token that is
    expert: Tensor  #: [S] and its expert, ascending
    row: Tensor  #: [T, K] the row of each pair
    ends: Tensor  #: [E] int32, the row after each expert's last


def sort_pairs(index: Tensor, num_experts: int) -> Order:
    """Sort the pairs of ``index [T, K]`` by expert, without the host reading anything."""
    expert, pair = index.flatten().sort(stable=True)
    row = torch.empty_like(pair).scatter_(0, pair, torch.arange(pair.numel(), device=pair.device))
    # Not bincount, for whose size the host waits on CUDA.
    experts = torch.arange(num_experts, device=pair.device, dtype=expert.dtype)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
    return Order(pair, pair // index.shape[1], expert, row.view(index.shape), ends)


class _CopyRows(Function):
    """``[S, N]`` of ``[T, N]``: in each row its token's values."""

    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, token_S: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TN.index_select(0, token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _add_up(grad_SN, row_TK), None, None


class _SumRows(Function):
    """``[T, N]`` of ``[S, N]``: the sum over each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_SN: Tensor, token_S: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        return _add_up(x_SN, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, None, None]:
        (token_S,) = ctx.saved_tensors
        return grad_TN.index_select(0, token_S), None, None


def _add_up(x_SN: Tensor, row_TK: Tensor) -> Tensor:
    """Sum the rows of each token; in float32 inside."""
    if row_TK.shape[1] == 1:
        return x_SN.index_select(0, row_TK.flatten())
    # Gathers and sums in one pass: a third of the time of index_select and sum (CPU, 8192 rows of 256).
    return F.embedding_bag(row_TK, x_SN, mode="sum")


_copy_rows: Callable[[Tensor, Tensor, Tensor], Tensor] = _CopyRows.apply
_sum_rows: Callable[[Tensor, Tensor, Tensor], Tensor] = _SumRows.apply

# ---- Grouped product ------------------------------------------------------------------------------------------------


def grouped_linear(x_SN: Tensor, weight_EMN: Tensor, ends_E: Tensor, implementation: Implementation = "auto") -> Tensor:
    """Return ``[S, M]``: rows ``ends[e-1]:ends[e]`` of ``x`` times the transpose of ``weight[e]``.

    Args:
        ends_E: int32, ascending; the last must be S.
        implementation: see :class:`Experts`.
    """
    if implementation == "grouped" or (implementation == "auto" and grouped_mm_serves(x_SN, weight_EMN)):
        return F.grouped_mm(x_SN, weight_EMN.transpose(-2, -1), offs=ends_E)
    return _loop_linear(x_SN, weight_EMN, ends_E)


def grouped_mm_serves(x_SN: Tensor, weight_EMN: Tensor) -> bool:
    """Return whether torch's grouped product takes these operands. (On a CPU it is as fast as the loop, or faster.)

    It wants rows of a multiple of 16 bytes, at least one of them, in float32, float16 or bfloat16 (in bfloat16, where only
    shapes are traced), and on CUDA compute capability 8.0. For bfloat16 from capability 9.0 on the counts stay on the GPU;
    otherwise torch reads them on the host, as the loop does.
    """
    only_shapes = torch.compiler.is_compiling() or x_SN.is_meta
    dtypes = [torch.bfloat16] if only_shapes else [torch.bfloat16, torch.float16, torch.float32]
    if x_SN.shape[0] == 0 or x_SN.dtype not in dtypes or x_SN.dtype != weight_EMN.dtype:
        return False
    if any(width * x_SN.element_size() % 16 for width in weight_EMN.shape[1:]):
        return False
    return not x_SN.is_cuda or torch.cuda.get_device_capability(x_SN.device) >= (8, 0)


class _LoopLinear(Function):
    """One product per expert. The host reads the counts, once per forward."""

    @staticmethod
    def forward(ctx: Any, x_SN: Tensor, weight_EMN: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SN, weight_EMN)
        ctx.ends = [0] * weight_EMN.shape[0] if x_SN.is_meta or x_SN.shape[0] == 0 else ends_E.tolist()
        y_SM = x_SN.new_empty(x_SN.shape[0], weight_EMN.shape[1])
        for expert, rows in _rows(ctx.ends):
            torch.mm(x_SN[rows], weight_EMN[expert].t(), out=y_SM[rows])
        return y_SM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SM: Tensor) -> tuple[Tensor | None, ...]:
        x_SN, weight_EMN = ctx.saved_tensors
        grad_x = torch.empty_like(x_SN) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EMN) if ctx.needs_input_grad[1] else None
        for expert, rows in _rows(ctx.ends):
            if grad_x is not None:
                torch.mm(grad_SM[rows], weight_EMN[expert], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad_SM[rows].t(), x_SN[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


_loop_linear: Callable[[Tensor, Tensor, Tensor], Tensor] = _LoopLinear.apply


def _rows(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert with its rows. Where it has none, a product over none writes the zeros of its gradient."""
    return ((e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)))


# ---- Activation -----------------------------------------------------------------------------------------------------


def weighted_activation(x_SP: Tensor, weight_S: Tensor, activation: str, gated: bool) -> Tensor:
    """Return ``act(gate) · up · weight`` of rows ``[S, 2·I]``, or ``act(x) · weight`` of ``[S, I]``: ``[S, I]``."""
    if not torch.compiler.is_compiling():
        return _activate(x_SP, weight_S, activation, gated)
    # A compiler fuses this, and decides by itself what to keep for the backward pass.
    gate, *up = x_SP.chunk(2, -1) if gated else (x_SP,)
    out = ACTIVATIONS[activation].forward(gate)
    return ((out * up[0] if up else out) * weight_S.unsqueeze(-1)).to(x_SP.dtype)


class _Activate(Function):
    """The same; keeps its inputs alone, and computes the activation once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_SP: Tensor, weight_S: Tensor, activation: str, gated: bool) -> Tensor:
        ctx.save_for_backward(x_SP, weight_S)
        ctx.activation, ctx.gated = activation, gated
        gate, *up = x_SP.chunk(2, -1) if gated else (x_SP,)
        out = ACTIVATIONS[activation].forward(gate)
        if up:
            out.mul_(*up)
        return out.mul_(weight_S.unsqueeze(-1))  # computed in the wider of the two types, and rounded then

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SI: Tensor) -> tuple[Tensor | None, ...]:
        x_SP, weight_S = ctx.saved_tensors
        grad_x = torch.empty_like(x_SP)
        out = ACTIVATIONS[ctx.activation].forward(x_SP.chunk(2, -1)[0] if ctx.gated else x_SP)
        grad_out = torch.mul(grad_SI, weight_S.unsqueeze(-1), out=torch.empty_like(grad_SI))
        if ctx.gated:
            (gate, up), (grad_gate, grad_up) = x_SP.chunk(2, -1), grad_x.chunk(2, -1)
            torch.mul(grad_out, out, out=grad_up)
            grad_out.mul_(up)
            out.mul_(up)
        else:
            gate, grad_gate = x_SP, grad_x
        ACTIVATIONS[ctx.activation].backward(grad_out, gate, grad_gate)
        return grad_x, out.mul_(grad_SI).sum(-1, dtype=weight_S.dtype), None, None


_activate: Callable[[Tensor, Tensor, str, bool], Tensor] = _Activate.apply

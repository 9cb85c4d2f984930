"""A mixture of experts: a router, experts, and what keeps their load even.

Each forward pass

1. scores all experts for each token, and chooses ``top_k`` by score plus a bias per expert;
2. runs the chosen experts, and the shared ones that every token passes through;
3. in training, notes how many tokens each expert got, and attaches the auxiliary losses to the output. They reach the gradient
   in the backward pass by themselves: no loss is handed through the model, and a pipeline stage need not see one.

A trainer has two things to call: :func:`set_loss_weight`, where it runs another loss backward than the model's mean loss, and
:func:`update_expert_bias` after each optimizer step.

Shapes: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from kenotron.models.experts import ACTIVATIONS, Experts, check_activation

#: Beside a sum of scores it changes nothing, and it spares a division of zero by zero.
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class MoESettings:
    """Settings of :class:`MoE`.

    Args:
        hidden, intermediate: sizes of the model and of one expert.
        num_experts, top_k: how many there are, and how many each token goes to.
        activation, gated, bias: of the experts, see :class:`~kenotron.models.experts.Experts`.
        router_bias: the router has a learnt bias on its logits.
        score: of all experts together (``"softmax"``) or of each by itself (``"sigmoid"``).
        renormalise: divide the scores of the chosen by their sum to get their weights.
        scale: multiply the weights by this.
        num_groups, top_k_groups: choose only among the experts of the best groups (DeepSeek-V3); 1 group: among all.
        shared_intermediate: size of the dense expert that every token passes through; 0: none.
        shared_gate: multiply its output by a sigmoid gate (Qwen2).
        balance_coefficient, z_coefficient: weights of :func:`balance_loss` and :func:`z_loss` beside the model's loss.
        bias_rate: step of the bias by which :func:`update_expert_bias` evens out the load; 0: the bias stays as it is.

    Raises:
        ValueError: settings that are out of range, or don't go together.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    router_bias: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    shared_intermediate: int = 0
    shared_gate: bool = False
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts", "top_k", "num_groups", "top_k_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: set it to 1 or more.")
        for name in ("shared_intermediate", "balance_coefficient", "z_coefficient", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: set it to 0, which turns it off, or more.")
        check_activation(self.activation)
        check_routing(self.num_experts, self.top_k, self.score, self.num_groups, self.top_k_groups)
        if self.shared_gate and not self.shared_intermediate:
            raise ValueError(
                "shared_gate=True, but there is no shared expert to gate. Set shared_intermediate to its size, or leave "
                "shared_gate out."
            )


def check_routing(num_experts: int, top_k: int, score: str, num_groups: int, top_k_groups: int) -> None:
    """Raise ``ValueError`` for a choice of experts that can't be made."""
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f'score={score!r} is not known. Set "softmax" or "sigmoid".')
    if num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide num_experts={num_experts}. Set it to a number that does.")
    if top_k_groups > num_groups:
        raise ValueError(f"top_k_groups={top_k_groups} of num_groups={num_groups}. Set top_k_groups to {num_groups} or less.")
    if top_k > (choice := num_experts // num_groups * top_k_groups):
        raise ValueError(
            f"top_k={top_k}, but there are {choice} experts to choose from ({num_experts} in {num_groups} groups, of which "
            f"{top_k_groups} stay). Set top_k to {choice} or less."
        )


# ---- Routing --------------------------------------------------------------------------------------------------------


class Float32Buffers(nn.Module):
    """A module whose buffers stay float32 when the model is cast: in bfloat16 counts and small steps would be rounded away."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        apply: Callable[..., Any] = super()._apply
        apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


@dataclass(frozen=True)
class Routing:
    """What a router decided, per token."""

    index: Tensor  #: [T, K] int64, the chosen experts
    weights: Tensor  #: [T, K] float32, by which their outputs are multiplied
    logits: Tensor  #: [T, E] float32
    scores: Tensor  #: [T, E] float32, softmax or sigmoid of the logits


class Router(Float32Buffers):
    """Choose experts for each token. Everything is computed in float32, also under autocast.

    The buffer ``expert_bias [E]`` is added to the scores for choosing, and left out of the weights (Wang et al., arXiv
    2408.15664). It starts as zeros; :func:`update_expert_bias` changes it.

    Args:
        hidden, num_experts, top_k: H, E, K. bias: add a learnt one to the logits. The others: see :class:`MoESettings`.
    """

    bias: nn.Parameter | None
    expert_bias: Tensor

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalise: bool = True,
        scale: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_routing(num_experts, top_k, score, num_groups, top_k_groups)
        self.top_k, self.score, self.renormalise, self.scale = top_k, score, renormalise, scale
        self.num_groups, self.top_k_groups = num_groups, top_k_groups
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None)
        self.register_buffer("expert_bias", torch.empty(num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise weight and bias as ``nn.Linear`` does, uniform within ± 1/√H, and the bias for choosing to zeros."""
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        self.expert_bias.zero_()

    def forward(self, hidden_states: Tensor) -> Routing:
        """Route tokens ``[T, H]``."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        with _without_autocast(hidden_states.device.type):
            bias = None if self.bias is None else self.bias.to(wide)
            logits_TE = F.linear(hidden_states.to(wide), self.weight.to(wide), bias)
            scores_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
            index_TK = self._choose(scores_TE.detach() + self.expert_bias)
            weights_TK = scores_TE.gather(1, index_TK)
            if self.renormalise:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
            return Routing(index_TK, weights_TK * self.scale, logits_TE, scores_TE)

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """Return the ``top_k`` best experts, among the groups whose two best score highest together.

        DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, as its published code does it.
        """
        if self.num_groups > self.top_k_groups:
            grouped = scores_TE.view(-1, self.num_groups, scores_TE.shape[1] // self.num_groups)
            value = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = value.topk(self.top_k_groups, dim=-1, sorted=False).indices
            left_out = torch.ones_like(value, dtype=torch.bool).scatter_(-1, best, False)
            scores_TE = grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores_TE.topk(self.top_k, dim=-1, sorted=False).indices

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"{hidden}, {experts}, top_k={self.top_k}, score={self.score!r}"


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device_type)  # not on the meta device
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


# ---- Auxiliary losses -----------------------------------------------------------------------------------------------


def count_tokens(index: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert occurs in ``index``: ``[E]``, float32."""
    # Not bincount, for whose size the host waits on CUDA. Sums of ones are exact in any order up to 2^24.
    pairs = index.flatten()
    counts = torch.zeros(num_experts, device=index.device, dtype=torch.float32)
    return counts.scatter_add_(0, pairs, counts.new_ones(()).expand_as(pairs))


def balance_loss(scores: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """Return E · Σₑ fₑ · Pₑ, a 0-dim tensor that falls as tokens spread over the experts.

    f is each expert's share of the token-expert pairs, P the mean over tokens of its score after each token's scores are
    divided by their sum. 1 where either is uniform; E where each token puts all its score and its one pair on the same expert.
    The gradient goes through P alone. Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6, there for K = 1;
    transformers' ``load_balancing_loss_func`` counts f per token and is K times this.

    Args:
        scores: ``[T, E]``, not negative. index: ``[T, K]``, the chosen experts.
    """
    return _balance(scores, count_tokens(index, num_experts) / max(index.numel(), 1))


def _balance(scores_TE: Tensor, share_E: Tensor) -> Tensor:
    normalised_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)
    mean_E = normalised_TE.sum(0) / max(scores_TE.shape[0], 1)
    return share_E.numel() * (share_E * mean_E).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)², which keeps a router's logits small.

    Zoph et al., ST-MoE, arXiv 2202.08906, the router z-loss.

    Args:
        logits: ``[T, E]``.
    """
    return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)


def attach_loss(output: Tensor, loss: Tensor, weight: float | Tensor) -> Tensor:
    """Return ``output``, whose backward pass also runs ``loss`` backward, with ``weight`` for its gradient.

    As if ``weight * loss`` were added to the loss that ``output`` will end in. Each forward pass counts once, also where
    ``torch.utils.checkpoint`` runs it again. Without a gradient to compute it does nothing.

    Args:
        weight: read now; a 0-dim tensor may change afterwards.
    """
    return _attach(output, loss, weight) if output.requires_grad else output


class _AttachLoss(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, weight: float | Tensor) -> Tensor:
        # Not a saved tensor: checkpoint would fill that in from its second forward pass, when the weight may be another's.
        ctx.grad = torch.ones_like(loss).mul_(weight)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, ctx.grad, None


_attach: Callable[[Tensor, Tensor, float | Tensor], Tensor] = _AttachLoss.apply


# ---- Layer ----------------------------------------------------------------------------------------------------------


class SharedExperts(nn.Module):
    """The dense part of a mixture, which all tokens pass: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``."""

    def __init__(self, hidden: int, intermediate: int, *, activation: str = "silu", gated: bool = True, **factory: Any) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, **factory) if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, **factory)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation].forward
        inner = act(self.up_proj(x)) if self.gate_proj is None else act(self.gate_proj(x)) * self.up_proj(x)
        return cast(Tensor, self.down_proj(inner))


class MoE(Float32Buffers):
    """A layer of experts, in the place of a transformer's dense one.

    Attributes:
        loss_weight, loss_is_sum: see :func:`set_loss_weight`.
        tokens_per_expert: ``[E]`` float32, the pairs of all forward passes in training mode since the last
            :func:`update_expert_bias`. A buffer that is not saved.
        balance, z: values of the two losses in the last forward pass in training mode, 0-dim and detached; None before it.
    """

    tokens_per_expert: Tensor

    def __init__(
        self, settings: MoESettings, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        s = settings
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.settings = settings
        self.router = Router(
            s.hidden, s.num_experts, s.top_k, score=s.score, renormalise=s.renormalise, scale=s.scale, num_groups=s.num_groups,
            top_k_groups=s.top_k_groups, bias=s.router_bias, **factory,
        )  # fmt: skip
        inner: dict[str, Any] = {"activation": s.activation, "gated": s.gated, **factory}
        self.experts = Experts(s.hidden, s.intermediate, s.num_experts, bias=s.bias, **inner)
        self.shared_experts = SharedExperts(s.hidden, s.shared_intermediate, **inner) if s.shared_intermediate else None
        self.shared_gate = nn.Linear(s.hidden, 1, bias=False, **factory) if s.shared_gate else None
        self.register_buffer(
            "tokens_per_expert", torch.empty(s.num_experts, device=device, dtype=torch.float32), persistent=False
        )
        self.loss_weight: float | Tensor = 1.0
        self.loss_is_sum = False
        self.balance: Tensor | None = None
        self.z: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the counts to zero; the parts initialise themselves."""
        self.tokens_per_expert.zero_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``[..., H]`` for ``[..., H]``."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.router(x_TH)
        out_TH = self.experts(x_TH, routing.index, routing.weights)
        if self.shared_experts is not None:
            shared_TH = self.shared_experts(x_TH)
            out_TH = out_TH + (shared_TH if self.shared_gate is None else self.shared_gate(x_TH).sigmoid() * shared_TH)
        if self.training:
            out_TH = self._attach_losses(out_TH, routing)
        return cast(Tensor, out_TH.view(hidden_states.shape))

    def _attach_losses(self, out_TH: Tensor, routing: Routing) -> Tensor:
        s, num_tokens = self.settings, out_TH.shape[0]
        counts = count_tokens(routing.index, s.num_experts)
        balance, z = _balance(routing.scores, counts / max(num_tokens * s.top_k, 1)), z_loss(routing.logits)
        self.balance, self.z = balance.detach(), z.detach()
        if not _in_backward():
            self.tokens_per_expert += counts
        if not s.balance_coefficient and not s.z_coefficient:
            return out_TH
        weight = self.loss_weight * num_tokens if self.loss_is_sum else self.loss_weight
        return attach_loss(out_TH, s.balance_coefficient * balance + s.z_coefficient * z, weight)


def _in_backward() -> bool:
    """Return whether this runs inside of a backward pass, as a checkpointed block does the second time."""
    return torch._C._current_graph_task_id() != -1


# ---- For trainers ---------------------------------------------------------------------------------------------------


def set_loss_weight(root: nn.Module, weight: float | Tensor, *, is_sum: bool = False) -> None:
    """Say how the loss that will run backward relates to the model's mean loss, for all :class:`MoE` layers of ``root``.

    Holds for the forward passes from now on. A trainer that accumulates n microbatches sets 1 / n; one that scales
    its loss for float16 sets that scale.

    Args:
        weight: the factor before the mean loss; a float, or a 0-dim tensor on the device.
        is_sum: the loss is a sum over tokens: each layer multiplies ``weight`` by the number of tokens that it sees.
    """
    for module in root.modules():
        if isinstance(module, MoE):
            module.loss_weight, module.loss_is_sum = weight, is_sum


@torch.no_grad()
def update_expert_bias(root: nn.Module, reduce: Callable[[Tensor], Any] | None = None) -> None:
    """Move the bias of each expert by ``bias_rate``, up where it got less than the mean of its layer; then count anew.

    To be called after each optimizer step. Wang et al., arXiv 2408.15664, algorithm 1.

    Args:
        reduce: sums its argument in place over the ranks that see other tokens; called once with the counts of all
            layers that have a ``bias_rate``, 1-dim, and not at all where none has.
    """
    layers = [module for module in root.modules() if isinstance(module, MoE)]
    biased = [layer for layer in layers if layer.settings.bias_rate]
    if biased:
        counts = torch.cat([layer.tokens_per_expert for layer in biased])
        if reduce is not None:
            reduce(counts)
        for layer, count in zip(biased, torch.split(counts, [layer.settings.num_experts for layer in biased]), strict=True):
            layer.router.expert_bias.add_((count.mean() - count).sign(), alpha=layer.settings.bias_rate)
    for layer in layers:
        layer.tokens_per_expert.zero_()

"""The mixers of Mamba and Mamba-2: a projection, a short convolution, a scan, a gate, a projection.

Sizes are read from the parameters, so that a mixer runs as it is on a part of its channels or heads.

Shapes: B sequences, S positions, D hidden, I channels, N states, H heads of P channels, G groups of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kenotron.models import kernels
from kenotron.models.experts import ACTIVATIONS
from kenotron.models.layers import FusedLinear
from kenotron.models.scan import causal_conv


class Neighbours(Protocol):
    """The other ranks that hold parts of the same sequences, each after the one before."""

    def before(self, x_BSI: Tensor, count: int) -> Tensor:
        """Return the last ``count`` positions of the rank before, ``[B, count, I]``; zeros on the first."""
        ...

    def state_before(self, state: Tensor, left: Tensor) -> Tensor:
        """Return the state with which this rank's part begins.

        Args:
            state: at the end of the part, had it begun with zeros. left: how much is left then of the one it begins with.
        """
        ...


@dataclass(frozen=True)
class Place:
    """Where in its sequences a mixer's input lies.

    Args:
        mask_BS: 0 for padding; ``None``: there is none. starts_BS: True where a document starts; ``None``: one for all.
        neighbours: where the sequences go on on other ranks.
        states: by layer, what the positions before left, and what these leave; ``None``: nothing is kept.
    """

    mask_BS: Tensor | None = None
    starts_BS: Tensor | None = None
    neighbours: Neighbours | None = None
    states: MutableMapping[int, tuple[Tensor, Tensor]] | None = None

    def mask(self, x_BSI: Tensor) -> Tensor:
        """Return ``x_BSI`` with zeros for padding."""
        return x_BSI if self.mask_BS is None else x_BSI * self.mask_BS.unsqueeze(-1).to(x_BSI.dtype)


class CausalConv(nn.Module):
    """A convolution of each channel by itself over the last positions, followed by an activation.

    Args:
        parts, units, shared: groups of channels, as :class:`~kenotron.models.layers.FusedLinear` has rows.
    """

    def __init__(
        self,
        parts: tuple[int, ...],
        taps: int,
        *,
        bias: bool,
        activation: str,
        units: tuple[int, ...] = (1,),
        shared: tuple[bool, ...] = (False,),
    ) -> None:
        super().__init__()
        self.parts, self.units, self.shared, self.activation, self.taps = parts, units, shared, activation, taps
        self.weight = nn.Parameter(torch.empty(sum(parts), 1, taps))
        self.bias = nn.Parameter(torch.empty(sum(parts))) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the weight as ``nn.Conv1d`` does, the bias with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x_BSI: Tensor, before_BKI: Tensor | None, starts_BS: Tensor | None, kernel: str) -> Tensor:
        """Return ``[B, S, I]``; for the arguments see :func:`~kenotron.models.scan.causal_conv`."""
        if kernel == "mamba_ssm" and before_BKI is None and self.activation in ("silu", "swish"):
            return kernels.causal_conv(x_BSI, self.weight, self.bias, starts_BS)
        return ACTIVATIONS[self.activation].forward(causal_conv(x_BSI, self.weight, self.bias, before_BKI, starts_BS))


class GatedNorm(nn.Module):
    """``RMSNorm(x · silu(gate))`` over each group of channels, in float32.

    Args:
        size: channels. group: of one norm.

    Attributes:
        total: sums ``[..., groups here]`` over the ranks that share a group; tensor parallelism sets it.
    """

    total: Callable[[Tensor], Tensor] | None = None

    def __init__(self, size: int, group: int, eps: float) -> None:
        super().__init__()
        self.group, self.eps = group, eps
        self.weight = nn.Parameter(torch.ones(size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        self.weight.fill_(1.0)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return ``[..., I]`` of two ``[..., I]``, in the type of the gate."""
        wide = x * F.silu(gate.to(x.dtype))
        groups = wide.unflatten(-1, (-1, min(self.group, wide.shape[-1])))
        squares = groups.square().sum(-1)
        if self.total is not None:
            squares = self.total(squares)
        normal = groups * torch.rsqrt(squares / self.group + self.eps).unsqueeze(-1)
        return self.weight * normal.flatten(-2).to(gate.dtype)


class TimeStep(nn.Linear):
    """The time step of each channel; its bias goes through a softplus.

    Args:
        rank: of the input. channels: of the output. config: of transformers' Mamba; the initial steps are in it.
    """

    def __init__(self, rank: int, channels: int, config: Any) -> None:
        self.settings = config
        super().__init__(rank, channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the weight as the configuration says, and the bias so that steps lie between its bounds."""
        config, std = self.settings, self.in_features**-0.5 * self.settings.time_step_scale
        if config.time_step_init_scheme == "constant":
            self.weight.fill_(std)
        else:
            self.weight.uniform_(-std, std)
        self.bias.copy_(initial_steps(self.bias, config))


def initial_steps(like: Tensor, config: Any) -> Tensor:
    """Return values whose softplus is spread evenly, by its logarithm, between the bounds of a configuration."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    steps = torch.exp(torch.rand_like(like, dtype=torch.float32) * (high - low) + low).clamp(min=config.time_step_floor)
    return steps + torch.log(-torch.expm1(-steps))


class OutProjection(nn.Linear):
    """The linear layer that writes to the residual stream.

    Args:
        scale: of the initial weights: one over the root of the number of layers, or 1.
    """

    def __init__(self, channels: int, hidden: int, *, bias: bool, scale: float) -> None:
        self.scale = scale
        super().__init__(channels, hidden, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the weight as ``nn.Linear`` does, scaled, and the bias with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.weight.mul_(self.scale)
        if self.bias is not None:
            self.bias.zero_()


class _Mixer(nn.Module):
    """What both have in common. Subclasses say how the convolution's output is scanned."""

    in_proj: FusedLinear
    conv1d: CausalConv
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.out_scale = config.num_hidden_layers**-0.5 if config.rescale_prenorm_residual else 1.0

    def forward(self, x_BSD: Tensor, place: Place, kernel: str) -> Tensor:
        """Return ``[B, S, D]``.

        Args:
            kernel: ``"torch"`` or ``"mamba_ssm"``.
        """
        gate_BSI, taken, steps = self._project(place.mask(x_BSD))
        before, state = place.states.get(self.layer, (None, None)) if place.states is not None else (None, None)
        if place.neighbours is not None:
            before = place.neighbours.before(taken, self.conv1d.taps - 1)
        mixed = place.mask(self.conv1d(taken, before, place.starts_BS, kernel))
        y, state = self._scan(mixed, gate_BSI, steps, state, place, kernel)
        if place.states is not None:
            place.states[self.layer] = (_last(taken, before, self.conv1d.taps - 1), state)
        return cast(Tensor, self.out_proj(y.to(x_BSD.dtype)))

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gate, what goes through the convolution, and the time steps where they come from the input."""
        raise NotImplementedError

    def _scan(
        self, mixed: Tensor, gate: Tensor, steps: Tensor | None, state: Tensor | None, place: Place, kernel: str
    ) -> tuple[Tensor, Tensor]:
        """Return what is projected out, and the last state."""
        raise NotImplementedError


def _last(x_BSI: Tensor, before_BKI: Tensor | None, count: int) -> Tensor:
    """Return the last ``count`` positions of what has been seen, zeros before the first."""
    if before_BKI is None:
        before_BKI = x_BSI.new_zeros(x_BSI.shape[0], count, x_BSI.shape[2])
    whole = torch.cat([before_BKI, x_BSI], 1)
    return whole[:, whole.shape[1] - count :].detach()


class Mamba1Mixer(_Mixer):
    """Time step, B and C follow from the channels after the convolution (arXiv 2312.00752, section 3)."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        channels, states, rank = config.intermediate_size, config.state_size, int(config.time_step_rank)
        self.sizes = (rank, states, states)
        self.in_proj = FusedLinear(config.hidden_size, (channels, channels), bias=config.use_bias)
        self.conv1d = CausalConv((channels,), config.conv_kernel, bias=config.use_conv_bias, activation=config.hidden_act)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = TimeStep(rank, channels, config)
        self.A_log = nn.Parameter(torch.empty(channels, states))
        self.D = nn.Parameter(torch.empty(channels))
        self.out_proj = OutProjection(channels, config.hidden_size, bias=config.use_bias, scale=self.out_scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the states of a channel decay at rates 1 to N, and pass each channel through."""
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        taken, gate = self.in_proj(x_BSD).chunk(2, -1)
        return gate, taken, None

    def _scan(
        self, mixed: Tensor, gate: Tensor, steps: Tensor | None, state: Tensor | None, place: Place, kernel: str
    ) -> tuple[Tensor, Tensor]:
        steps, B_BSN, C_BSN = self.x_proj(mixed).split(self.sizes, -1)
        wide = torch.promote_types(mixed.dtype, torch.float32)
        dt_BSI = F.softplus(F.linear(cast(Tensor, steps), self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        A_IN = -torch.exp(self.A_log.to(wide))

        def scan(state: Tensor | None) -> tuple[Tensor, Tensor]:
            return kernels.selective_scan(mixed, dt_BSI, A_IN, B_BSN, C_BSN, state, place.starts_BS, kernel)

        if place.neighbours is not None:
            kernel = "torch"  # mamba-ssm's has no gradient of the last state
        y, after = scan(state)
        if place.neighbours is not None:
            left = torch.exp(dt_BSI.sum(1).unsqueeze(-1) * A_IN)
            y, after = scan(place.neighbours.state_before(after, _forget(left, place)))
        y = y + mixed.to(wide) * self.D.to(wide)
        return y * F.silu(gate.to(wide)), after


class Mamba2Mixer(_Mixer):
    """One decay for each head; time step, B and C come from the input (arXiv 2405.21060, section 7)."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        channels, heads, size = config.num_heads * config.head_dim, config.num_heads, config.head_dim
        self.head_dim, self.num_states, self.chunk = size, config.state_size, config.chunk_size
        self.config, self.limits = config, (float(config.time_step_limit[0]), float(config.time_step_limit[1]))
        grouped = config.n_groups * config.state_size
        # B and C of a group serve all of its heads: where those lie on several ranks, so does the group.
        self.in_proj = FusedLinear(
            config.hidden_size,
            (channels, channels, grouped, grouped, heads),
            bias=config.use_bias,
            unit=(size, size, config.state_size, config.state_size, 1),
            shared=(False, False, True, True, False),
        )
        self.conv1d = CausalConv(
            (channels, grouped, grouped), config.conv_kernel, bias=config.use_conv_bias, activation=config.hidden_act,
            units=(size, config.state_size, config.state_size), shared=(False, True, True),
        )  # fmt: skip
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedNorm(channels, channels // config.n_groups, config.layer_norm_epsilon)
        self.out_proj = OutProjection(channels, config.hidden_size, bias=config.use_bias, scale=self.out_scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the heads decay at rates 1 to H, pass each through, and spread the time steps."""
        self.A_log.copy_(torch.arange(1, self.A_log.shape[0] + 1, device=self.A_log.device).log())
        self.D.fill_(1.0)
        self.dt_bias.copy_(initial_steps(self.dt_bias, self.config))

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        heads = self.A_log.shape[0]
        both = self.in_proj(x_BSD)
        channels = heads * self.head_dim
        gate, taken, steps = both.split([channels, both.shape[-1] - channels - heads, heads], -1)
        return gate, taken, steps

    def _scan(
        self, mixed: Tensor, gate: Tensor, steps: Tensor | None, state: Tensor | None, place: Place, kernel: str
    ) -> tuple[Tensor, Tensor]:
        channels = self.A_log.shape[0] * self.head_dim
        grouped = (mixed.shape[-1] - channels) // 2
        x, B, C = mixed.split([channels, grouped, grouped], -1)
        x_BSHP = x.unflatten(-1, (-1, self.head_dim))
        B_BSGN, C_BSGN = (t.unflatten(-1, (-1, self.num_states)) for t in (B, C))
        wide = torch.promote_types(mixed.dtype, torch.float32)
        dt_BSH = F.softplus(cast(Tensor, steps).to(wide) + self.dt_bias.to(wide)).clamp(*self.limits)
        A_H = -torch.exp(self.A_log.to(wide))

        def scan(state: Tensor | None) -> tuple[Tensor, Tensor]:
            return kernels.chunk_scan(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, state, place.starts_BS, kernel, self.chunk)

        y, after = scan(state)
        if place.neighbours is not None:
            left = torch.exp(dt_BSH.sum(1) * A_H)[..., None, None]
            y, after = scan(place.neighbours.state_before(after, _forget(left, place)))
        y = y + x_BSHP.to(wide) * self.D.to(wide).unsqueeze(-1)
        return self.norm(y.flatten(-2), gate), after


def _forget(left: Tensor, place: Place) -> Tensor:
    """Return how much is left of a state at the end: nothing where a document has started since."""
    if place.starts_BS is None:
        return left
    keeps = ~place.starts_BS.any(1)
    return left * keeps.view(-1, *[1] * (left.ndim - 1))

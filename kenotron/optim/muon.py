"""Muon on any layout: momentum of matrices is orthogonalised as a whole, wherever its parts lie; AdamW for everything else.

Jordan et al., https://kellerjordan.github.io/posts/muon/. On one process it does what ``torch.optim.Muon`` does, bit for bit;
that one would orthogonalise each rank's part by itself. Two things it adds: layers that share one matrix (queries, keys and
values; gate and up) are orthogonalised one by one, and so is each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from kenotron.optim.exchange import Block, Boxes, Exchange, Slices, blocks_of
from kenotron.optim.placement import Placement, ShardAware, local_parameter
from kenotron.parallel.grads import local
from kenotron.parallel.pieces import local_pieces
from kenotron.parallel.shards import Shards

Adjust = Literal["original", "match_rms_adamw", "spectral"]

#: Factor of the rate of a matrix ``[A outputs, B inputs]``.
ADJUSTMENTS: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {
        "original": lambda a, b: max(1.0, a / b) ** 0.5,  # Jordan
        "match_rms_adamw": lambda a, b: 0.2 * max(a, b) ** 0.5,  # Moonshot, arXiv 2502.16982
        "spectral": lambda a, b: (a / b) ** 0.5,  # arXiv 2310.17813, condition 1: rates hold at any width
    }
)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "parts": (), "transposed": False},
    "adamw": {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "foreach": None},
}


class Muon(ShardAware):
    """Muon for matrices, AdamW for the rest, in one optimizer.

    Args:
        params: groups as `muon_groups` makes them. Each has ``algorithm``, ``"muon"`` (the default) or ``"adamw"``.
            Parameters of ``"muon"`` are matrices ``[out, in]`` or stacks ``[experts, out, in]``; the group may have ``lr``,
            ``weight_decay``, ``momentum``, ``nesterov``, ``parts`` (outputs of each layer in a fused matrix) and
            ``transposed`` (inputs come before outputs). Of ``"adamw"``: ``lr``, ``weight_decay``, ``betas``, ``eps``.
        lr, weight_decay, momentum, nesterov: of ``"muon"`` groups that do not say it themselves.
        adjust: by what the rate of a matrix is multiplied, see ``ADJUSTMENTS``.
        ns_steps, ns_coefficients, eps: of the Newton-Schulz iteration.
        ns_dtype: in which it runs, and in which matrices travel. float32 costs more and agrees to more digits over layouts.

    Raises:
        ValueError: a parameter or a setting that does not fit.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        adjust: Adjust = "original",
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if adjust not in ADJUSTMENTS:
            raise ValueError(f"adjust={adjust!r}: set one of {', '.join(map(repr, ADJUSTMENTS))}.")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps={ns_steps}: set a number of iterations from 1 to 99; 5 is usual.")
        if not ns_dtype.is_floating_point:
            raise ValueError(f"ns_dtype={ns_dtype}: set a floating-point type such as torch.bfloat16.")
        self._adjust, self._ns_dtype = adjust, ns_dtype
        self._newton_schulz = (tuple(ns_coefficients), ns_steps, eps)
        self._unbind()
        own = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        groups: list[Any] = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        super().__init__([_complete(group, own) for group in groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; checked as in the constructor. Once it is bound, all ranks call it."""
        super().add_param_group(_complete(param_group, {}))
        for param in self.param_groups[-1]["params"]:
            _check(param, self.param_groups[-1])
        if self._is_alone:
            self._unbind()
        elif self._placement is not None:
            self.bind(self._placement)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: where parts lie is for each process to learn."""
        own = {name: self.__dict__[name] for name in ("_adjust", "_ns_dtype", "_newton_schulz")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._unbind()
        super().__setstate__(state)

    # ---------------------------------------------------------------------------------------------------- where it runs

    def _unbind(self) -> None:
        self._placement: Placement | None = None
        self._is_alone = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._held: dict[str, list[Boxes]] = {}
        self._exchanges: dict[tuple[str, ...], Exchange] = {}

    def bind(self, placement: Placement) -> None:
        """Learn where the parts of matrices lie. All ranks of ``placement.group`` call it.

        Raises:
            ValueError: a parameter that is none of the module's, or parts that do not make up their matrix.
        """
        self._placement, self._exchanges = placement, {}
        own: dict[str, tuple[tuple[int, ...], Boxes]] = {}
        for group in self._groups("muon"):
            for param in group["params"]:
                if param.numel():  # else another stage's
                    name = local_parameter(param, placement)
                    own[name] = _boxes(placement, name, param)
                    _check_parts(group, name, own[name][0])
        everyone: list[Any] = [own]
        if placement.group is not None and placement.group.size() > 1:
            everyone = [None] * placement.group.size()
            dist.all_gather_object(everyone, own, group=placement.group)
        self._shapes = {name: shape for name, (shape, _) in own.items()}
        self._held = {name: [rank[name][1] for rank in everyone] for name in own}

    def _bind_alone(self) -> None:
        """Where no strategy does: all parameters are whole, and have numbers for names."""
        params = [param for group in self.param_groups for param in group["params"]]
        if any(isinstance(param, DTensor) for param in params):
            raise ValueError(
                "Muon has sharded parameters (DTensor) and nobody told it where their parts lie. Train with KenotronStrategy, "
                "or call optimizer.bind(placement) with a kenotron.optim.Placement."
            )
        self.bind(Placement(shards=Shards(), names={id(param): str(index) for index, param in enumerate(params)}))
        self._is_alone = True

    def _exchange(self, names: tuple[str, ...], groups: Mapping[str, dict[str, Any]]) -> Exchange:
        """Return the plan for the parameters that have gradients, which is nearly always the same."""
        assert self._placement is not None
        if names not in self._exchanges:
            blocks: list[Block] = []
            for name in names:
                shape, group = self._shapes[name], groups[name]
                blocks += blocks_of(name, shape, _out_dim(shape, group), group["parts"], self._held[name])
            held = {name: self._held[name] for name in names}
            self._exchanges[names] = Exchange(blocks, held, self._placement.group)
        return self._exchanges[names]

    def _groups(self, algorithm: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    # ----------------------------------------------------------------------------------------------------------- updates

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients. All ranks call it, with gradients for the same parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._placement is None:
            self._bind_alone()
        self._step_muon()
        for group in self._groups("adamw"):
            self._step_adamw(group)
        return loss

    def _step_muon(self) -> None:
        assert self._placement is not None
        params: dict[str, Tensor] = {}
        momenta: dict[str, Tensor] = {}
        group_of: dict[str, dict[str, Any]] = {}
        for group in self._groups("muon"):
            for param in group["params"]:
                if param.grad is None:
                    continue
                name = local_parameter(param, self._placement)
                params[name], group_of[name] = local(param), group
                momenta[name] = self._momentum(param, group).to(self._ns_dtype)
                params[name].mul_(1 - float(group["lr"]) * group["weight_decay"])
        if not params:
            return

        def work(block: Block, x: Tensor) -> Tensor:
            return orthogonalise(x, *self._newton_schulz)

        def give(block: Block, where: Slices, update: Tensor) -> None:
            group = group_of[block.name]
            outputs, inputs = block.shape[-2:] if not group["transposed"] else block.shape[-2:][::-1]
            params[block.name][where].add_(update, alpha=-float(group["lr"]) * ADJUSTMENTS[self._adjust](outputs, inputs))

        self._exchange(tuple(params), group_of).run(momenta, work, give)

    def _momentum(self, param: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Take the gradient in and return what is to be orthogonalised, this rank's part of it."""
        assert param.grad is not None
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param.grad, memory_format=torch.preserve_format)
        grad, buffer = local(param.grad), local(state["momentum_buffer"])
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer

    def _step_adamw(self, group: Mapping[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if not params:
            return
        adamw(
            [local(param.detach()) for param in params],  # parts are as good as wholes, and mix in one kernel
            [local(param.grad) for param in params],
            [local(self.state[param]["exp_avg"]) for param in params],
            [local(self.state[param]["exp_avg_sq"]) for param in params],
            [],
            [self.state[param]["step"] for param in params],
            foreach=group["foreach"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(x: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns, by ``steps`` of a quintic Newton-Schulz iteration.

    Singular values end between 0.7 and 1.2, not at 1, which is what the coefficients are chosen for.

    Args:
        x: ``[..., M, N]`` in the type to compute in; left as it is. coefficients: a, b, c of a·x + b·(xxᵀ)x + c·(xxᵀ)²x.
        eps: the least norm that a matrix is divided by.
    """
    a, b, c = coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    norm = x.norm() if x.ndim == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _complete(group: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with all settings of its algorithm."""
    algorithm = group.get("algorithm", "muon")
    if algorithm not in _DEFAULTS:
        raise ValueError(f"algorithm={algorithm!r} of a parameter group: set 'muon' or 'adamw'.")
    given = dict(own) if algorithm == "muon" else {}
    done = {"algorithm": algorithm, **_DEFAULTS[algorithm], **given, **group}
    unknown = done.keys() - _DEFAULTS[algorithm].keys() - {"params", "algorithm", "initial_lr", "foreach", "param_names"}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))} in a parameter group with algorithm={algorithm!r}, which has "
            f"{', '.join(_DEFAULTS[algorithm])}. Leave it out."
        )
    for name in ("lr", "weight_decay"):
        if isinstance(done[name], Tensor) or not done[name] >= 0:
            raise ValueError(f"{name}={done[name]!r}: set a number of 0 or more.")
    if algorithm == "muon" and not 0 <= done["momentum"] < 1:
        raise ValueError(f"momentum={done['momentum']!r}: set a number from 0 to below 1; 0.95 is usual.")
    if algorithm == "adamw" and not all(0 <= beta < 1 for beta in done["betas"]):
        raise ValueError(f"betas={done['betas']!r}: set two numbers from 0 to below 1.")
    return done


def _check(param: nn.Parameter, group: Mapping[str, Any]) -> None:
    if group["algorithm"] == "muon" and param.ndim not in (2, 3):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} in a Muon group, which takes matrices and stacks of experts' matrices. "
            "Put it into a group with algorithm='adamw', or take kenotron.optim.muon_groups(module)."
        )
    if torch.is_complex(param):
        raise ValueError(f"a complex parameter of shape {tuple(param.shape)}: Muon takes real ones.")


def _check_parts(group: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> None:
    outputs = shape[_out_dim(shape, group)]
    if group["parts"] and sum(group["parts"]) != outputs:
        raise ValueError(
            f"{name} has {outputs} outputs, and parts={tuple(group['parts'])} have {sum(group['parts'])}. Give the whole "
            "module to muon_groups (self, in configure_optimizers): parts of a module do not tell how they are cut."
        )


def _out_dim(shape: Sequence[int], group: Mapping[str, Any]) -> int:
    return len(shape) - (1 if group["transposed"] else 2)


def _boxes(placement: Placement, name: str, param: nn.Parameter) -> tuple[tuple[int, ...], Boxes]:
    """Return the whole shape of a parameter and what this rank has of it during an update."""
    shard = placement.shards.of(name, param)
    pieces = local_pieces(shard, param, placement.rows(param))
    return shard.global_shape, tuple((piece.local, piece.offset, piece.shape) for piece in pieces)

"""Learning rates as a pure function of the step: warm-up, hold, decay.

Steps are optimizer updates, counted from 1. Update ``s`` of ``N`` runs at ``base rate × factor(s)``:

====================  ==================================================================
updates               factor
====================  ==================================================================
1 … W                 s / W: the first is at 1 / W, never at 0; the W-th at 1
W + 1 … W + H         1
W + H + 1 … N         m + (1 − m) · shape(t), t = (s − W − H) / (N − W − H) ∈ (0, 1]
from N on             m exactly
====================  ==================================================================

with shape(t) = 1 − t (``"linear"``), (1 + cos πt) / 2 (``"cosine"``) or 1 − √t (``"1-sqrt"``, Hägele et al., arXiv 2405.18392).
Nothing depends on the rate before, so resuming needs the number of the update alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Shape = Literal["linear", "cosine", "1-sqrt"]
OnChange = Literal["error", "new", "saved"]

#: How a decay goes from 1 (at t = 0) to exactly 0 (at t = 1).
SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda t: 1.0 - t,
        "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
        "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    }
)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """By what the base rate is multiplied in each update.

    Args:
        total_steps: updates in all, N.
        warmup_steps: W. hold_steps: H, updates at the full rate; what is left decays.
        decay_steps: instead of ``hold_steps``, how many updates at the end decay (WSD: warm-up, stable, decay).
        decay: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        minimum: m, the factor of the last update and of all after it, in [0, 1]; 1: no decay.

    Raises:
        ValueError: numbers that do not fit together.
    """

    total_steps: int
    warmup_steps: int = 0
    hold_steps: int | None = None
    decay_steps: int | None = None
    decay: Shape = "cosine"
    minimum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("total_steps", "warmup_steps", "hold_steps", "decay_steps"):
            _check_steps(name, getattr(self, name), least=1 if name == "total_steps" else 0)
        if self.decay not in SHAPES:
            raise ValueError(f"decay={self.decay!r} is no shape. Set decay to one of {', '.join(map(repr, SHAPES))}.")
        if not _is_number(self.minimum) or not 0.0 <= self.minimum <= 1.0:
            raise ValueError(
                f"minimum={self.minimum!r}: it is a share of the full rate. Set it between 0 and 1; to end at a rate of 3e-5 "
                "from one of 3e-4 it is 0.1."
            )
        if self.hold_steps is not None and self.decay_steps is not None:
            raise ValueError(
                f"hold_steps={self.hold_steps} and decay_steps={self.decay_steps}: with total_steps one follows from the "
                "other. Set one of them."
            )
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than total_steps={self.total_steps}. Set it to "
                f"{self.total_steps - 1} or less."
            )
        self._check_what_is_left()

    def _check_what_is_left(self) -> None:
        left = self.total_steps - self.warmup_steps
        for name in ("hold_steps", "decay_steps"):
            steps = getattr(self, name)
            if steps is not None and steps > left:
                raise ValueError(
                    f"{name}={steps}, but of total_steps={self.total_steps} a warm-up of {self.warmup_steps} leaves {left}. "
                    f"Set {name} to {left} or less."
                )
        if self._decaying == 0 and self.minimum < 1.0:
            raise ValueError(
                f"total_steps={self.total_steps} leaves no update to decay to minimum={self.minimum} after warmup_steps="
                f"{self.warmup_steps}{'' if self.hold_steps is None else f' and hold_steps={self.hold_steps}'}"
                f"{'' if self.decay_steps is None else f' with decay_steps={self.decay_steps}'}. Leave at least one, or set "
                "minimum=1.0 for no decay."
            )

    @property
    def _decaying(self) -> int:
        if self.decay_steps is not None:
            return self.decay_steps
        return self.total_steps - self.warmup_steps - (self.hold_steps or 0)

    def __call__(self, step: int) -> float:
        """Return the factor of update ``step``, counted from 1. In [0, 1]."""
        if step < 1:
            raise ValueError(f"step={step}: updates are counted from 1.")
        if step >= self.total_steps and self._decaying:
            return self.minimum
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        decayed = step - (self.total_steps - self._decaying)
        if decayed <= 0 or not self._decaying:
            return 1.0
        return self.minimum + (1.0 - self.minimum) * SHAPES[self.decay](decayed / self._decaying)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_steps(name: str, value: object, least: int) -> None:
    if value is None and name not in ("total_steps", "warmup_steps"):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is no number of updates. Set it to an integer of {least} or more.")


class ScheduleLR(LRScheduler):
    """Gives each group of an optimizer its own base rate times the schedule's factor. Made for ``interval="step"``.

    Args:
        optimizer: the ``lr`` of its groups are the base rates.
        schedule: what they are multiplied with.
        on_change: what `load_state_dict` does where the saved schedule or base rates are others than these: ``"error"``
            raises, ``"new"`` goes on at the saved update on these, ``"saved"`` goes on as before.

    Raises:
        ValueError: an unknown ``on_change``.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, *, on_change: OnChange = "error") -> None:
        if on_change not in ("error", "new", "saved"):
            raise ValueError(f"on_change={on_change!r}: set 'error', 'new' or 'saved'.")
        self.schedule, self.on_change = schedule, on_change
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group in the update that comes next."""
        factor = self.schedule(self.last_epoch + 1)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: updates done, base rates, the schedule."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": [float(base) for base in self.base_lrs],
            "schedule": asdict(self.schedule),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the saved update; sets the rates of the optimizer's groups.

        Raises:
            ValueError: another number of groups than was saved; another schedule, with ``on_change="error"``.
        """
        saved, bases = Schedule(**state_dict["schedule"]), [float(base) for base in state_dict["base_lrs"]]
        if len(bases) != len(self.base_lrs):
            raise ValueError(
                f"the optimizer has {len(self.base_lrs)} parameter groups and the saved schedule has rates for {len(bases)}. "
                "Make the same groups."
            )
        if self.on_change == "error":
            self._refuse_changes(saved, bases)
        if self.on_change != "new":
            self.schedule = saved
            self.base_lrs = list(bases)
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1  # which torch counts to tell whether the optimizer stepped first
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr(), strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _refuse_changes(self, saved: Schedule, bases: list[float]) -> None:
        now, before = asdict(self.schedule), asdict(saved)
        changes = [f"{name} was {before[name]!r} and is {now[name]!r}" for name in now if now[name] != before[name]]
        own = [float(base) for base in self.base_lrs]
        if own != bases:
            changes.append(f"base rates were {bases} and are {own}")
        if changes:
            raise ValueError(
                f"the checkpoint was made with another schedule: {'; '.join(changes)}. Set on_change='new' to go on with the "
                "new one from here, or on_change='saved' to keep the old one."
            )


def scheduler_config(optimizer: Optimizer, schedule: Schedule, *, on_change: OnChange = "error") -> dict[str, Any]:
    """Return what ``configure_optimizers`` gives Lightning as ``"lr_scheduler"``: a `ScheduleLR` that moves every update."""
    return {"scheduler": ScheduleLR(optimizer, schedule, on_change=on_change), "interval": "step"}

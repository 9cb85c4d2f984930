"""Steps that would do harm are skipped: on all ranks together, counted, and not without end.

Before each update the norm of the whole gradient and the mean loss over all ranks are judged. They are the same on every
rank, and so is the verdict. The host never waits for it: on a CPU it is there; on CUDA it goes to the fused optimizer as the
tensor by which such optimizers skip a step, and is read when a later step begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from kenotron.devices import to_host


class TooManySkippedStepsError(RuntimeError):
    """Training stopped: one step after the other had to be skipped."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Which steps are skipped: those whose loss or gradient norm is not finite, or jumps.

    Args:
        norm_spike: a norm of more than so many times its running mean; ``None``: any finite one is fine.
        loss_spike: the same for the loss, for losses above zero.
        warmup_steps: the first steps, in which nothing counts as a spike.
        decay: of the running means, which skipped steps do not enter.
        max_in_row: so many skipped steps in a row, and training stops.

    Raises:
        ValueError: numbers out of range.
    """

    norm_spike: float | None = None
    loss_spike: float | None = None
    warmup_steps: int = 100
    decay: float = 0.98
    max_in_row: int = 10

    def __post_init__(self) -> None:
        for name in ("norm_spike", "loss_spike"):
            factor = getattr(self, name)
            if factor is not None and factor <= 1:
                raise ValueError(f"guard {name}={factor}: set a factor above 1, such as 5.0, or None.")
        if self.warmup_steps < 1 or self.max_in_row < 1:
            raise ValueError(
                f"guard warmup_steps={self.warmup_steps}, max_in_row={self.max_in_row}: both are 1 or more. For no limit set a "
                "large max_in_row."
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"guard decay={self.decay}: set it to 0 or more and below 1.")


class StepGuard:
    """Judges the steps of one optimizer.

    Args:
        settings: what is skipped. optimizer: whose steps. device: of the gradients.

    Attributes:
        num_skipped: 0-dim int64, on the device.

    Raises:
        ValueError: an optimizer on CUDA that can't skip a step without the host's knowing.
    """

    def __init__(self, settings: Guard, optimizer: Optimizer, device: torch.device) -> None:
        if device.type == "cuda" and not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"guard: {type(optimizer).__name__} can't skip a step unless the host waits for the verdict. Set fused=True, "
                "which Adam, AdamW, SGD and Adagrad have, or guard=None."
            )
        self._settings, self._optimizer, self._device = settings, optimizer, device
        factors = [settings.norm_spike, settings.loss_spike]
        self._factors = torch.tensor([float("inf") if f is None else f for f in factors], device=device)
        self._means = torch.zeros(2, device=device)
        self._num_good = torch.zeros((), dtype=torch.int64, device=device)
        self._in_row = torch.zeros_like(self._num_good)
        self.num_skipped = torch.zeros_like(self._num_good)
        self._told: tuple[Tensor, torch.cuda.Event | None] | None = None

    @torch.no_grad()
    def judge(self, norm: Tensor, loss: Tensor | None) -> Tensor:
        """Return whether this step is to be skipped (0-dim bool).

        Args:
            norm: of the whole gradient, 0-dim float32. loss: the mean over all ranks; ``None`` where there is none.
        """
        loss = self._means[1] if loss is None else loss.float()
        found = torch.stack([norm.float().reshape(()), loss.reshape(())])
        judges = (self._num_good >= self._settings.warmup_steps) & (self._means > 0)
        limits = torch.where(judges, self._factors * self._means, torch.inf)
        skipped = ~(found.isfinite().all() & (found <= limits).all())
        decay = torch.where(self._num_good == 0, 0.0, self._settings.decay)
        self._means = torch.where(skipped, self._means, self._means * decay + found * (1 - decay))
        self._num_good += ~skipped
        self._in_row = torch.where(skipped, self._in_row + 1, 0)
        self.num_skipped += skipped
        self._tell(found)
        return skipped

    def apply(self, skipped: Tensor) -> None:
        """Let the optimizer's next step do nothing where it is to be skipped."""
        if self._device.type == "cuda":
            self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        elif bool(skipped):
            for group in self._optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    def _tell(self, found: Tensor) -> None:
        """Start to bring the verdict to the host."""
        told = torch.cat([found.double(), self._in_row[None].double(), self.num_skipped[None].double()])
        self._told = to_host(told)

    def report(self) -> str | None:
        """Return what is to be said of the last step that was judged, if it was skipped and the host knows.

        Raises:
            TooManySkippedStepsError: so many in a row.
        """
        if self._told is None or (self._told[1] is not None and not self._told[1].query()):
            return None
        norm, loss, in_row, skipped = self._told[0].tolist()
        self._told = None
        if not in_row:
            return None
        text = f"step skipped: gradient norm {norm:.4g}, loss {loss:.4g} ({skipped:.0f} skipped in all, {in_row:.0f} in a row)"
        if in_row >= self._settings.max_in_row:
            raise TooManySkippedStepsError(
                f"{text}. That is max_in_row={self._settings.max_in_row}: training has diverged, or its data is broken. Resume "
                "from an earlier checkpoint with a smaller learning rate, or look at the batches since."
            )
        return text

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run goes on with."""
        state = {"means": self._means, "num_good": self._num_good, "in_row": self._in_row, "num_skipped": self.num_skipped}
        return {name: value.clone() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what ``state_dict`` returned."""
        self._means, self._num_good = state["means"].to(self._device), state["num_good"].to(self._device)
        self._in_row, self.num_skipped = state["in_row"].to(self._device), state["num_skipped"].to(self._device)


def mean_over_ranks(loss: Any) -> Tensor | None:
    """Return the mean of a step's loss over all ranks, detached; all ranks call it with one, or none does."""
    if not isinstance(loss, Tensor):
        return None
    value = loss.detach().float().reshape(()).clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def check_precision_of_guard(precision: str) -> None:
    """Raise ``ValueError`` where a gradient scaler skips steps already."""
    if precision == "16-mixed":
        raise ValueError("guard with precision='16-mixed': its gradient scaler skips steps that overflow. Set guard=None.")

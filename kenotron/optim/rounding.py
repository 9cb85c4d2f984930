"""AdamW for weights that are kept in bfloat16 alone: computed in float32, rounded up or down by chance.

A bfloat16 has 8 bits: a weight near 1 moves by 0.004 or not at all, and most updates are smaller. Rounded to the nearest number
they are lost; rounded by chance, up as often as the value lies near the upper neighbour, they are right in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kenotron.parallel.grads import local

#: What bfloat16 cuts off a float32.
_LOWER_BITS = 16


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return float32 values as bfloat16: one of the two neighbours, the nearer one more often, so that the mean is ``x``.

    What bfloat16 can represent, infinities and NaN among it, stays as it is.
    """
    noise = torch.randint(0, 1 << _LOWER_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # Carried into the bits that remain as often as the lower ones are large; for a negative number that is away from zero, too.
    bits = (x.view(torch.int32) + noise) & (-1 << _LOWER_BITS)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


class StochasticAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) whose bfloat16 parameters are rounded stochastically; others are as in ``torch.optim.AdamW``.

    For ``Trainer(precision="bf16-true")``. The arithmetic is in float32. Chance is a function of seed, step and the parameter's
    place in the optimizer: replicas stay equal, and a resumed run repeats it.

    Args:
        params: parameters or groups. lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        moment_dtype: of the two moments: float32 takes 8 bytes for each parameter, bfloat16 4; the moments are then rounded
            stochastically as well.
        seed: of the rounding.

    Raises:
        ValueError: a number out of range, or a type that moments can't have.
    """

    #: Each element by itself, so it works on any part of a tensor.
    is_elementwise = True

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: set it to 0 or more.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: set both to 0 or more, and below 1.")
        if moment_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moment_dtype={moment_dtype}: set torch.float32 or torch.bfloat16.")
        self._moment_dtype, self._seed = moment_dtype, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for param in group["params"]:
                place += 1
                if param.grad is not None:
                    self._update(param, group, place)
        return loss

    def _update(self, param: nn.Parameter, group: dict[str, Any], place: int) -> None:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the host: it is read below
            state["exp_avg"] = torch.zeros_like(param, dtype=self._dtype_of_moments(param))
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=self._dtype_of_moments(param))
        state["step"] += 1
        step, (beta1, beta2), rate = state["step"].item(), group["betas"], group["lr"]
        weight, grad = local(param.detach()), local(param.grad)
        if not weight.numel():
            return
        mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        wide = torch.promote_types(weight.dtype, torch.float32)
        new_weight, grad = weight.to(wide), grad.to(wide)
        new_mean = mean.to(wide).lerp(grad, 1 - beta1)
        new_square = (square.to(wide) * beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (new_square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        new_weight = (new_weight * (1 - rate * group["weight_decay"])).addcdiv_(
            new_mean, denominator, value=-rate / (1 - beta1**step)
        )
        chance = torch.Generator(weight.device)
        # Neighbouring seeds are strangers to both of torch's generators.
        chance.manual_seed((self._seed * 1_000_003 + int(step)) * 1_000_003 + place & (1 << 63) - 1)
        for old, new in ((weight, new_weight), (mean, new_mean), (square, new_square)):
            old.copy_(stochastic_round(new, chance) if old.dtype == torch.bfloat16 else new)

    def _dtype_of_moments(self, param: Tensor) -> torch.dtype:
        return self._moment_dtype if param.dtype == torch.bfloat16 else param.dtype

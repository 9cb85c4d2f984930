"""The loss contract: a mean over its microbatch, or a sum with the number of tokens that it runs over.

In the second form gradients are those of (sum over the global batch) / (tokens in the global batch), whatever the layout:
backward runs on plain sums, the tokens of all microbatches, accumulated batches and data-parallel ranks are counted, and
gradients are scaled once before the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kenotron.parallel.grads import scale_gradients


@dataclass(frozen=True)
class StepLoss:
    """What one call of ``training_step`` returned: ``loss`` to differentiate, and the tokens it sums over, if it is a sum."""

    loss: Tensor
    num_tokens: Tensor | None = None

    @staticmethod
    def of(output: Any, *, of_microbatch: bool = False) -> StepLoss:
        """Return the loss in a step's output.

        Args:
            of_microbatch: a loss of one element is no scalar then: it may be that of a microbatch of one sample.

        Raises:
            ValueError: there is none, or it is not a scalar.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"training_step returned {type(output).__name__} without a loss tensor. Return a scalar tensor, "
                "{'loss': mean, ...}, or {'loss': sum, 'num_tokens': count}. With pp > 1 a step can't be skipped with None."
            )
        if loss.ndim if of_microbatch else loss.numel() != 1:
            raise ValueError(
                f"training_step returned a loss of shape {tuple(loss.shape)}; it must be a scalar. Return loss.mean(), or "
                "{'loss': loss.sum(), 'num_tokens': loss.numel()}."
            )
        tokens = output.get("num_tokens") if isinstance(output, Mapping) else None
        if tokens is None:
            return StepLoss(loss.reshape(()))
        counted = torch.as_tensor(tokens, device=loss.device, dtype=torch.float32).detach().reshape(())
        return StepLoss(loss.reshape(()), counted)


class TokenCount:
    """Counts the tokens of one update.

    Args:
        replicas: ranks per data-parallel rank that count the same tokens (tp). data_parallel: dp × cp ranks.
        distributed: whether there is more than one rank.
    """

    def __init__(self, *, replicas: int, data_parallel: int, distributed: bool, device: torch.device) -> None:
        self._replicas = replicas
        self._data_parallel = data_parallel
        self._distributed = distributed
        self._device = device
        self._tokens: Tensor | None = None
        self.uses_sums: bool | None = None

    def to_differentiate(self, loss: StepLoss, weight: float) -> Tensor:
        """Return what backward runs on for one microbatch that is ``weight`` of the update's batch.

        Raises:
            ValueError: ``training_step`` changed from one form of loss to the other.
        """
        if self.uses_sums is None:
            self.uses_sums = loss.num_tokens is not None
        if self.uses_sums != (loss.num_tokens is not None):
            raise ValueError("training_step returned num_tokens on some batches and not on others. Return it always, or never.")
        if loss.num_tokens is None:
            return loss.loss * weight
        self._tokens = loss.num_tokens if self._tokens is None else self._tokens + loss.num_tokens
        return loss.loss

    def mean(self, losses: Sequence[StepLoss], weights: Sequence[float]) -> Tensor:
        """Return the mean loss over microbatches, detached."""
        values = torch.stack([loss.loss.detach().float() for loss in losses])
        if losses[0].num_tokens is not None:
            return values.sum() / torch.stack([_tokens_of(loss) for loss in losses]).sum().clamp(min=1)
        return (values * torch.tensor(weights, device=values.device)).sum()

    def normalise(self, params: Iterable[nn.Parameter]) -> None:
        """Before an update: divide gradients by the tokens of the global batch, if losses are sums.

        Gradients were averaged over data-parallel ranks, which is taken back here.
        """
        if not self.uses_sums:
            return
        # Stages that do not reach the loss have counted nothing.
        tokens = torch.zeros((), device=self._device) if self._tokens is None else self._tokens
        self._tokens = None
        if self._distributed:
            tokens = tokens.clone()
            dist.all_reduce(tokens)
        total = tokens / self._replicas
        scale_gradients(params, self._data_parallel / total.clamp(min=1))


def _tokens_of(loss: StepLoss) -> Tensor:
    assert loss.num_tokens is not None
    return loss.num_tokens

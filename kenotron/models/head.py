"""The head of a language model, which turns hidden states into logits, or straight into a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kenotron.models.cross_entropy import linear_cross_entropy


class Head(nn.Linear):
    """A linear layer over the vocabulary, without a bias.

    Attributes:
        group: the ranks over which the vocabulary is split; tensor parallelism sets it.
    """

    group: Any = None

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__(hidden, vocabulary, bias=False)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, z_loss: float = 0.0, num_items: int | Tensor | None = None
    ) -> Tensor:
        """Return logits ``[..., V]`` of ``[..., H]``, or with ``labels [...]`` their loss, 0-dim.

        Args:
            labels: int64, -100 for none. z_loss: coefficient of logsumexp². num_items: what the sum of losses is divided by;
                ``None``: the number of labels.
        """
        if labels is None:
            return F.linear(x, self.weight)
        result = linear_cross_entropy(x, self.weight, labels, group=self.group, z_loss=z_loss)
        count = result.num_tokens.clamp(min=1) if num_items is None else torch.as_tensor(num_items, device=x.device)
        return result.loss_sum / count


def shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """Return labels of the next position, ``[..., S]``: those that are so already, or else ``labels`` moved by one."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return F.pad(labels[..., 1:], (0, 1), value=-100)

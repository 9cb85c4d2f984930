"""State space models under context parallelism: each cp rank has a stretch of every sequence, and states are passed on.

The state at the end of a stretch is linear in the one at its beginning. So every rank scans from zeros first, all learn all
ends, each puts together with what state its own stretch begins, and scans again from there: two scans, and a small exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kenotron.parallel.collectives import gather_from


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """The stretches of the ranks of one axis, as :class:`kenotron.models.mixer.Neighbours`.

    Args:
        group: the ranks, in the order of the sequence. rank: of this process.
        documents: [batch, length of all], a number for each token; ``None``: one document.
    """

    group: ProcessGroup
    rank: int
    documents: Tensor | None

    def before(self, x_BSI: Tensor, count: int) -> Tensor:
        """Return the last ``count`` positions before this rank's, ``[B, count, I]``; zeros where another document is."""
        begin = self.rank * x_BSI.shape[1]
        tail = x_BSI[:, -count:] if count else x_BSI[:, :0]
        tails = gather_from(tail, 1, self.group, grad="reduce_scatter")
        end = self.rank * tail.shape[1]
        seen = tails[:, max(0, end - count) : end]
        if self.documents is not None and begin:
            places = self.documents[:, max(0, begin - count) : begin]
            seen = seen * (places == self.documents[:, begin - 1 : begin]).unsqueeze(-1)
        return F.pad(seen, (0, 0, count - seen.shape[1], 0))

    def state_before(self, state: Tensor, left: Tensor) -> Tensor:
        """Return the state with which this rank's stretch begins.

        Args:
            state: at its end, from zeros, ``[B, …]``. left: the part of the first that is left at the end, broadcast to it.
        """
        ends = torch.cat([state.flatten(1), left.flatten(1)], 1)
        every = gather_from(ends.unsqueeze(0), 0, self.group, grad="reduce_scatter")
        states = every[..., : state[0].numel()].unflatten(-1, state.shape[1:])
        lefts = every[..., state[0].numel() :].unflatten(-1, left.shape[1:])
        begins = [torch.zeros_like(state)]
        for end, remains in zip(states[:-1], lefts[:-1], strict=True):
            begins.append(torch.addcmul(end, remains, begins[-1]))
        # All of them, though one is wanted: every rank's backward takes part in the exchange.
        return torch.stack(begins)[self.rank]

"""``{"loss": sum, "num_tokens": n}``: the gradient of (sum over the global batch) / (its tokens), on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_helpers import DP2_PP2, PP2, SLOW, TP2_PP2, Classifier, Task, close, fit

from kenotron.testing import RankPool


class MaskedSum(Classifier):
    """Only some rows count, more of them in some microbatches than in others."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        counts = x[:, 0] > 0.2
        losses = torch.nn.functional.cross_entropy(self(x), y, reduction="none")
        total, tokens = losses[counts].sum(), counts.sum()
        self.log("total", total.detach(), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": total, "num_tokens": tokens}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class MaskedMeanByHand(MaskedSum):
    """The same in plain Lightning with manual optimization: all rows of an update at once."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.rows: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch)
        if len(self.rows) < self.accumulate and not self.trainer.is_last_batch:
            return
        x, y = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        self.rows.clear()
        output = super().training_step((x, y), batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(output["loss"] / output["num_tokens"])
        optimizer.step()  # type: ignore[union-attr]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=SLOW), 2])
@pytest.mark.parametrize(
    "layout",
    [(1, {}), (2, {}), (2, {"zero_stage": 0}), (2, {"zero_stage": 2}), (2, {"tp": 2}), PP2, TP2_PP2, DP2_PP2],
    ids=["one", "dp2", "dp2-zero0", "dp2-zero2", "tp2", "pp2", "tp2-pp2", "dp2-pp2"],
)
def test_sums_with_token_counts(pool: RankPool, layout: Any, accumulate: int, tmp_path: Path) -> None:
    ranks, strategy = layout
    by_hand = pool.run(fit, 1, Task(MaskedMeanByHand, None, settings={"accumulate": accumulate}, val_rows=0))[0]
    task = Task(MaskedSum, strategy, trainer={"accumulate_grad_batches": accumulate}, val_rows=0, folder=str(tmp_path))
    for rank, found in enumerate(pool.run(fit, ranks, task)):
        close(found["weights"], by_hand["weights"], 1e-5, f"rank {rank}")
        close([e["total"] for e in found["epochs"]], [e["total"] for e in by_hand["epochs"]], where=f"rank {rank}")

"""``validate``, ``test`` and ``predict`` on their own, over a pipeline, against plain Lightning in one process."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from strategy_helpers import PP2, TP2_PP2, Classifier, Rows, close, data_rank, floats, loader, make_trainer
from torch import Tensor

from kenotron.testing import RankPool

LAYOUTS = pytest.mark.parametrize(
    "layout", [PP2, TP2_PP2, (4, {"pp": 2, "zero_stage": 3})], ids=["pp2", "tp2-pp2", "dp2-pp2-zero3"]
)


class Evaluated(Classifier):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = self.loss(batch)
        self.log("test_loss", loss, sync_dist=True)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits = self(batch[0])
        return {"logits": logits, "best": logits.argmax(dim=-1), "batch": batch_idx}


class Writer(BasePredictionWriter):
    """Keeps what it is handed after each batch."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.shapes: list[Any] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *args: Any) -> None:
        self.shapes.append(tuple(prediction["logits"].shape))


def evaluate(strategy: Any) -> dict[str, Any]:
    """Evaluate, train, and evaluate again, with one trainer each and one module."""
    L.seed_everything(1, verbose=False)
    module, writer = Evaluated(), Writer()
    trainer = make_trainer(strategy, [writer], max_epochs=1)
    rank, size = data_rank(trainer)
    data = loader(Rows(12, seed=4), 8, rank, size)  # 8 and 4 rows
    found: dict[str, Any] = {"validate": trainer.validate(module, data, verbose=False)}
    found["test"] = trainer.test(module, [data, data], verbose=False)
    found["before"] = trainer.predict(module, data)
    trainer.fit(module, loader(Rows(16), 8, rank, size))
    found["callback_metrics"] = floats(trainer.callback_metrics)
    found["validate again"] = trainer.validate(module, data, verbose=False)
    found["after"] = trainer.predict(module, data)
    found["written"] = writer.shapes
    return found


@LAYOUTS
def test_evaluation_around_a_fit(pool: RankPool, layout: Any) -> None:
    expected = pool.run(evaluate, 1, None)[0]
    ranks, strategy = layout
    data_parallel = ranks // (strategy["pp"] * strategy.get("tp", 1))
    assert expected["validate"] != expected["validate again"]
    for rank, found in enumerate(pool.run(evaluate, ranks, strategy)):
        for key in ("validate", "test", "callback_metrics", "validate again"):
            close(found[key], expected[key], where=f"rank {rank} {key}")
        for key in ("before", "after"):
            dp_rank = 0 if data_parallel == 1 else rank % 2
            for batch, whole in zip(found[key], expected[key], strict=True):
                count = len(whole["logits"]) // data_parallel
                rows = slice(count * dp_rank, count * (dp_rank + 1))
                close(batch["logits"], whole["logits"][rows], where=f"rank {rank} {key}")
                assert torch.equal(batch["best"], whole["best"][rows])
                assert batch["batch"] == whole["batch"]
        assert len(found["written"]) == 4


class TwoLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch) * (1 + dataloader_idx))


def validate_two(strategy: Any) -> Any:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(strategy)
    return trainer.validate(TwoLoaders(), [loader(Rows(8, seed=s), 4) for s in (1, 2)], verbose=False)


def test_several_validation_loaders(pool: RankPool) -> None:
    expected = pool.run(validate_two, 1, None)[0]
    assert [list(part) for part in expected] == [["val_loss/dataloader_idx_0"], ["val_loss/dataloader_idx_1"]]
    for found in pool.run(validate_two, 2, PP2[1]):
        close(found, expected)

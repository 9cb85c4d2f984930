"""What users log under a pipeline is what one process logs, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from strategy_helpers import DP2_PP2, PP2, Classifier, Task, close, fit_like_one_process, loaders, make_trainer

from kenotron.testing import RankPool

LAYOUTS = pytest.mark.parametrize("layout", [PP2, DP2_PP2], ids=["pp2", "dp2-pp2"])


class Logs(Classifier):
    """Logs in every way that ``self.log`` knows. With ``sync_dist`` sums and extrema are those of the global batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("step_only", loss.detach(), on_step=True, on_epoch=False, sync_dist=True)
        self.log("epoch_only", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
        self.log("items", float(len(x)), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        self.log("largest", x.max(), reduce_fx="max", on_step=False, on_epoch=True, sync_dist=True)
        self.log("smallest", x.min(), reduce_fx=torch.min, on_step=False, on_epoch=True)
        self.log_dict({"a/y": y.float().mean(), "b/x": x.mean()}, on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("val_items", float(len(x)), reduce_fx="sum", sync_dist=True)
        self.log("val_largest", x.max(), reduce_fx="max", sync_dist=True)

    def on_train_epoch_start(self) -> None:
        self.log("epoch_number", float(self.current_epoch))


@LAYOUTS
def test_every_way_to_log(pool: RankPool, layout: Any, tmp_path: Path) -> None:
    # "smallest" without sync_dist is that of one data-parallel rank: the first row of the last batch decides it for neither.
    ranks, strategy = layout
    module = Logs if strategy["pp"] == ranks else SyncedLogs
    expected, *_ = fit_like_one_process(pool, module, layout, tmp_path, rows=24)
    assert expected["metrics"]["items"] == 24
    assert expected["metrics"]["val_items"] == 12
    assert {"train_loss_step", "train_loss_epoch", "a/y", "epoch_number"} <= expected["metrics"].keys()


class SyncedLogs(Logs):
    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        super().log(name, value, *args, **options) if name != "smallest" else None


class Metrics(Classifier):
    """Metric objects: counts, lists of values, running values; in training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.train_accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="macro")
        self.area = torchmetrics.classification.BinaryAUROC()
        self.mean = torchmetrics.MeanMetric()
        self.more = torchmetrics.MetricCollection({"f1": torchmetrics.classification.MulticlassF1Score(3)})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.train_accuracy(logits, y)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.area.update(logits[:, 0], (y == 0).int())
        self.mean.update(logits.square().mean())
        self.more.update(logits, y)
        self.log("accuracy", self.accuracy)
        self.log("area", self.area, on_step=False, on_epoch=True)
        self.log("mean", self.mean)
        self.log_dict(self.more)


@LAYOUTS
def test_torchmetrics_objects(pool: RankPool, layout: Any, tmp_path: Path) -> None:
    expected, *_ = fit_like_one_process(pool, Metrics, layout, tmp_path, trainer={"max_epochs": 3})
    assert {"accuracy", "area", "mean", "f1", "train_accuracy"} <= expected["metrics"].keys()
    assert 0 < expected["metrics"]["area"] <= 1


class ComputesAtTheEnd(Classifier):
    """Collects outputs, and computes metrics by hand, in the hooks at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.outputs: list[Any] = []
        self.losses: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append((loss.detach(), len(batch[0])))
        return loss

    def on_train_epoch_end(self) -> None:
        total = sum(loss * count for loss, count in self.losses)
        self.log("mean_train_loss", total / sum(count for _, count in self.losses))
        self.losses.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy.update(logits, y)
        self.outputs.append((logits, y))

    def on_validation_epoch_end(self) -> None:
        logits = torch.cat([logits for logits, _ in self.outputs])
        y = torch.cat([y for _, y in self.outputs])
        self.log("val_loss", torch.nn.functional.cross_entropy(logits, y), prog_bar=True)
        self.log("accuracy", self.accuracy.compute())
        self.accuracy.reset()
        self.outputs.clear()


def test_results_collected_over_an_epoch(pool: RankPool, tmp_path: Path) -> None:
    expected, *_ = fit_like_one_process(pool, ComputesAtTheEnd, PP2, tmp_path)
    assert {"val_loss", "accuracy", "mean_train_loss"} <= expected["metrics"].keys()


def write_csv(strategy: Any, folder: str) -> str:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, logger=CSVLogger(folder, name="", version=""), log_every_n_steps=1)
    trainer.fit(Logs(), *loaders(trainer, Task(Logs, strategy)))
    return (Path(folder) / "metrics.csv").read_text() if trainer.is_global_zero else ""


def test_the_logger_of_rank_0_gets_what_one_process_logs(pool: RankPool, tmp_path: Path) -> None:
    def table(text: str) -> dict[str, list[float]]:
        names, *rows = (line.split(",") for line in text.splitlines())
        columns = zip(*rows, strict=True)
        return {name: [float(cell) for cell in cells if cell] for name, cells in zip(names, columns, strict=True)}

    expected = table(pool.run(write_csv, 1, None, str(tmp_path / "one"))[0])
    found = table(pool.run(write_csv, 2, PP2[1], str(tmp_path / "two"))[0])
    assert len(expected["train_loss_step"]) == 6
    close(found, expected)

"""What users log under a pipeline is what one process logs, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from strategy_helpers import DP2_PP2, PP2, Classifier, Task, close, fit_like_one_process, floats, loaders, make_trainer

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


# ----------------------------------------------------------------------------------------------------- callbacks, loggers


class Measured(Classifier):
    """Collects in steps what callbacks log; its step returns more than the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss, "logits": logits, "largest": loss.detach() * 2, "name": "train"}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.update(self.loss(batch))
        return {"rows": len(batch[0])}


class Report(L.Callback):
    """Logs what only the last stage has, and on rank 0 what is logged there alone."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        assert outputs is not None and "loss" in outputs
        if trainer.is_global_zero:
            pl_module.log("own", 7.0, rank_zero_only=True)
        pl_module.log("logits", outputs["logits"].square().mean())
        pl_module.log("rows", float(len(outputs["logits"])))
        pl_module.log("largest", outputs["largest"])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        pl_module.log("val_rows", float(outputs["rows"]), on_epoch=True)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("val_mean", pl_module.mean.compute())
        pl_module.mean.reset()


def report(strategy: Any) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    callback = Report()
    trainer = make_trainer(strategy, [callback], num_sanity_val_steps=0)
    trainer.fit(Measured(), *loaders(trainer, Task(Measured, strategy)))
    assert not any(name.startswith("on_") for name in callback.__dict__)
    return floats(trainer.callback_metrics)


def test_callbacks_log_what_the_last_stage_collected(pool: RankPool) -> None:
    expected = pool.run(report, 1, None)[0]
    assert {"logits", "rows", "largest", "own", "val_rows", "val_mean"} <= expected.keys()
    first, second = pool.run(report, 2, PP2[1])
    close(first, expected)
    close(second, {name: value for name, value in expected.items() if name != "own"})


class Shown(Classifier):
    """Everything on the progress bar."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, rows = self.loss(batch), float(len(batch[0]))
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        self.log("own", loss, prog_bar=True)
        self.log("sum", rows, prog_bar=True, reduce_fx="sum", on_epoch=True, on_step=False)
        self.log("max", batch[0].max(), prog_bar=True, reduce_fx="max", on_epoch=True, on_step=False)
        return loss


def show(strategy: Any) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(strategy)
    trainer.fit(Shown(), *loaders(trainer, Task(Shown, strategy)))
    return floats(trainer.callback_metrics)


def test_what_the_progress_bar_shows_is_as_under_ddp(pool: RankPool) -> None:
    expected = pool.run(show, 2, "ddp")
    assert expected[0]["own"] != expected[1]["own"] and expected[0]["sum"] == 11
    close(pool.run(show, 2, {}), expected)
    close(pool.run(show, 4, {"pp": 2, "microbatches": 2}), [expected[i] for i in (0, 1, 0, 1)])


class WithExample(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 8)


def summarise(strategy: Any) -> bool:
    module = WithExample()
    trainer = make_trainer(strategy, enable_model_summary=True, max_steps=1)
    trainer.fit(module, *loaders(trainer, Task(WithExample, strategy)))
    return module.example_input_array is not None


def test_a_summary_leaves_the_example_input_out(pool: RankPool) -> None:
    assert pool.run(summarise, 2, PP2[1]) == [True, True]

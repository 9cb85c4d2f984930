"""Saving and resuming through the Trainer, on the same layout and on others."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import (
    DP2,
    DP2_PP2,
    PP2,
    SLOW,
    TP2_PP2,
    Classifier,
    Keep,
    Task,
    close,
    fit,
    floats,
    loaders,
    make_trainer,
    whole_weights,
)

import kenotron
from kenotron import checkpoint as checkpoints
from kenotron.testing import RankPool, RanksFailedError

ONE = (1, {})
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": ONE, "dp2": (2, {}), "dp2-zero0": (2, {"zero_stage": 0}), "dp2-zero3": (2, {"zero_stage": 3}),
    "tp2": (2, {"tp": 2}), "pp2": PP2, "tp2-pp2": TP2_PP2, "dp2-pp2": DP2_PP2,
}  # fmt: skip


class Trained(Classifier):
    def __init__(self, optimizer: str = "adamw", dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-6)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}]


def save_each_epoch(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def resumed(
    pool: RankPool, first: tuple[int, Any], second: tuple[int, Any], folder: Path, **settings: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train three epochs on ``first``; resume on ``second`` from the end of the first epoch."""
    task = functools.partial(Task, Trained, settings=settings, folder=str(folder))
    whole = pool.run(
        fit, first[0], task(first[1], trainer={"max_epochs": 3}, callbacks=[functools.partial(save_each_epoch, str(folder))])
    )
    rest = pool.run(fit, second[0], task(second[1], trainer={"max_epochs": 3}, fit={"ckpt_path": str(folder / "epoch=0.ckpt")}))
    return whole, rest


@pytest.mark.parametrize(
    "name", ["one", "dp2", pytest.param("dp2-zero3", marks=SLOW), "tp2", "pp2", pytest.param("dp2-pp2", marks=SLOW)]
)
def test_resume_on_the_same_layout_is_bit_for_bit(pool: RankPool, name: str, tmp_path: Path) -> None:
    whole, rest = resumed(pool, LAYOUTS[name], LAYOUTS[name], tmp_path, dropout=0.3)
    for full, part in zip(whole, rest, strict=True):
        assert len(part["losses"]) == 6
        assert part["losses"] == full["losses"][3:]
        assert part["rates"] == full["rates"][3:]
        assert part["step"] == full["step"]
        assert part["epochs"] == full["epochs"][1:]
    for key, value in whole[0]["weights"].items():
        assert (rest[0]["weights"][key] == value).all(), key


@pytest.mark.parametrize("name", ["one", "dp2", pytest.param("dp2-zero3", marks=SLOW), "tp2-pp2"])
def test_a_run_of_lightnings_own_strategy_goes_on_with_its_optimizer(pool: RankPool, name: str, tmp_path: Path) -> None:
    whole, rest = resumed(pool, (1, None), LAYOUTS[name], tmp_path)
    for part in rest:
        assert len(part["losses"]) == 6
        close(part["losses"], whole[0]["losses"][3:], where="losses")
        close(part["weights"], whole[0]["weights"], 1e-4, where="weights")


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=SLOW)])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("dp2", "pp2"),
        ("tp2", "dp2-zero3"),
        ("tp2-pp2", "one"),
        ("one", "dp2-pp2"),
        ("pp2", "dp2-zero0"),
        ("dp2-zero3", "tp2-pp2"),
        ("dp2-pp2", "tp2"),
        ("dp2-zero0", "dp2-zero3"),
        ("tp2", "pp2"),
        ("tp2-pp2", "dp2-pp2"),
        ("pp2", "dp2"),
        ("dp2-pp2", "one"),
    ],
)
def test_resume_on_another_layout_continues_the_same_losses(
    pool: RankPool, first: str, second: str, optimizer: str, tmp_path: Path
) -> None:
    whole, rest = resumed(pool, LAYOUTS[first], LAYOUTS[second], tmp_path, optimizer=optimizer)
    for part in rest:
        assert len(part["losses"]) == 6
        close(part["losses"], whole[0]["losses"][3:], where="losses")
        close(part["rates"], whole[0]["rates"][3:], where="rates")
        close(part["metrics"], whole[0]["metrics"], where="metrics")
        close(part["weights"], whole[0]["weights"], 1e-4, "weights")


def test_another_optimizer_is_refused(pool: RankPool, tmp_path: Path) -> None:
    task = functools.partial(Task, Trained, DP2[1], folder=str(tmp_path), val_rows=0)
    pool.run(fit, 2, task(trainer={"max_epochs": 1}, callbacks=[functools.partial(save_each_epoch, str(tmp_path))]))
    resume = {"ckpt_path": str(tmp_path / "epoch=0.ckpt")}
    with pytest.raises(RanksFailedError, match=r"made SGD, and .*epoch=0\.ckpt has the state of AdamW"):
        pool.run(fit, 2, task(settings={"optimizer": "sgd"}, trainer={"max_epochs": 2}, fit=resume), timeout_s=60)


def last_and_best(strategy: Any, folder: str) -> dict[str, Any]:
    """Keep the two best checkpoints and the last one; test the best; go on from the last."""
    L.seed_everything(1, verbose=False)
    keep = ModelCheckpoint(folder, filename="{epoch}", monitor="val_loss", mode="max", save_top_k=2, save_last=True)
    trainer = make_trainer(strategy, [keep], max_epochs=4)
    task = Task(Trained, strategy)
    train, val = loaders(trainer, task)
    trainer.fit(Trained(), train, val)
    found: dict[str, Any] = {"scores": sorted(float(score) for score in keep.best_k_models.values())}
    trainer.strategy.barrier()
    found["files"] = sorted(path.name for path in Path(folder).iterdir())
    found["best"] = Path(keep.best_model_path).name
    found["best score"] = float(keep.best_model_score)  # type: ignore[arg-type]
    found["best again"] = trainer.validate(trainer.lightning_module, val, ckpt_path="best", verbose=False)
    # A new job, as after a kill.
    keep, losses = ModelCheckpoint(folder, filename="{epoch}", save_last=True), Keep()
    trainer = make_trainer(strategy, [keep, losses], max_epochs=5)
    L.seed_everything(2, verbose=False)
    trainer.fit(Trained(), *loaders(trainer, task), ckpt_path="last")
    return {**found, "losses": losses.losses, "step": trainer.global_step}


@pytest.mark.parametrize("name", ["dp2", "pp2"])
def test_best_and_last_and_pruning(pool: RankPool, name: str, tmp_path: Path) -> None:
    expected = pool.run(last_and_best, 1, None, str(tmp_path / "plain"))[0]
    ranks, strategy = LAYOUTS[name]
    assert len(expected["files"]) == 3
    assert len(expected["losses"]) == 3
    for found in pool.run(last_and_best, ranks, strategy, str(tmp_path / "sharded")):
        close(found["best again"][0]["val_loss"], found["best score"])
        close(found, expected)


# ------------------------------------------------------------------------------------------- files of plain Lightning


def from_plain_file(strategy: Any, file: str, folder: str) -> dict[str, Any]:
    L.seed_everything(5, verbose=False)
    keep = Keep()
    trainer = make_trainer(strategy, [keep], max_epochs=2)
    module = PlainSgd()
    train, val = loaders(trainer, Task(Classifier, strategy))
    before = trainer.validate(module, val, ckpt_path=file, verbose=False)
    trainer.fit(module, train, val, ckpt_path=file, weights_only=False)
    return {"before": before, "losses": keep.losses, "weights": whole_weights(trainer, folder)}


class PlainSgd(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write_plain_file(file: str) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    keep = Keep()
    trainer = make_trainer(None, [keep], max_epochs=1)
    train, val = loaders(trainer, Task(Classifier, None))
    trainer.fit(PlainSgd(), train, val)
    trainer.save_checkpoint(file)
    metrics = floats(trainer.callback_metrics)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, train, val)
    return {"val_loss": metrics["val_loss"], "losses": keep.losses[3:], "weights": whole_weights(trainer, "")}


@pytest.mark.parametrize("name", ["one", "dp2-zero3", "tp2-pp2"])
def test_a_checkpoint_file_of_plain_lightning_is_loaded(pool: RankPool, name: str, tmp_path: Path) -> None:
    file = str(tmp_path / "plain.ckpt")
    expected = pool.run(write_plain_file, 1, file)[0]
    ranks, strategy = LAYOUTS[name]
    for found in pool.run(from_plain_file, ranks, strategy, file, str(tmp_path)):
        close(found["before"], [{"val_loss": expected["val_loss"]}])
        close(found["losses"], expected["losses"])
        close(found["weights"], expected["weights"], 1e-4)


# ------------------------------------------------------------------------------------------------- what users add


class EditsCheckpoint(Classifier):
    """Saves no frozen weights and some words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("statistics", torch.zeros(3))
        self.register_buffer("forgotten", torch.zeros(2), persistent=False)
        self.layers[0].requires_grad_(False)
        self.loaded: Any = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.statistics += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("layers.0.")]:
            del checkpoint["state_dict"][name]
        checkpoint["words"] = {"seen": 3, "names": ["a", "b"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["words"]


def save_edited(strategy: Mapping[str, Any], path: str) -> None:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, max_epochs=1)
    trainer.fit(EditsCheckpoint(), *loaders(trainer, Task(Classifier, strategy)))
    trainer.save_checkpoint(path)


def load_edited(strategy: Mapping[str, Any], path: str, strict: bool, folder: str) -> dict[str, Any]:
    L.seed_everything(9, verbose=False)
    module = EditsCheckpoint()
    module.strict_loading = strict
    before = module.state_dict()["layers.0.up.weight"].clone().numpy()
    trainer = make_trainer(strategy, max_epochs=1)
    _, val = loaders(trainer, Task(Classifier, strategy))
    trainer.validate(module, val, ckpt_path=path, verbose=False)
    return {"before": before, "loaded": module.loaded, "statistics": module.statistics.tolist(), "module": module.hparams["lr"]}


@pytest.mark.parametrize(("first", "second"), [("pp2", "dp2"), ("dp2", "pp2")])
def test_hooks_may_delete_and_add_what_is_saved(pool: RankPool, first: str, second: str, tmp_path: Path) -> None:
    path = str(tmp_path / "edited.ckpt")
    pool.run(save_edited, LAYOUTS[first][0], LAYOUTS[first][1], path)
    saved = kenotron.load_state_dict(path)
    assert not [name for name in saved if name.startswith("layers.0.")]
    assert "layers.1.up.weight" in saved
    assert saved["statistics"].tolist() == [3, 3, 3]
    assert "forgotten" not in saved
    kept = checkpoints.load_state(checkpoints.read_manifest(path))["lightning"]
    assert kept["words"] == {"seen": 3, "names": ["a", "b"]}
    assert kept["hyper_parameters"] == {"depth": 4, "dropout": 0.0, "lr": 0.02}
    for found in pool.run(load_edited, LAYOUTS[second][0], LAYOUTS[second][1], path, False, str(tmp_path)):
        assert found["loaded"] == {"seen": 3, "names": ["a", "b"]}
        assert found["statistics"] == [3, 3, 3]


def test_missing_weights_are_refused_where_loading_is_strict(pool: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "edited.ckpt")
    pool.run(save_edited, 2, LAYOUTS["dp2"][1], path)
    with pytest.raises(Exception, match=r"layers\.0\."):
        pool.run(load_edited, 2, LAYOUTS["dp2"][1], path, True, str(tmp_path), timeout_s=60)

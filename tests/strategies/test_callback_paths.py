"""Rank 0's path of a checkpoint is everyone's; paths that a file names are not believed."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import Classifier, Task, loaders, make_trainer

from kenotron.checkpoint import LocalTensor, is_checkpoint, save
from kenotron.strategies import CheckpointSettings
from kenotron.strategies.callback_paths import forget_foreign_paths
from kenotron.testing import RankPool


class OwnLoss(Classifier):
    """Logs a value of each rank's own, as users of DDP do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 100.0 * self.global_rank - self.global_step)  # each epoch is the best so far


class SaveUnderOwnName(L.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(f"{self.folder}/failed-on-{trainer.global_rank}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            raise KeyError("on every rank")


def name_by_rank(folder: str, strategy: dict[str, Any]) -> dict[str, Any]:
    keep = ModelCheckpoint(folder, filename="{step}-{val_loss:.3f}", monitor="val_loss", save_top_k=2, save_last=True)
    settings = CheckpointSettings(timeout_s=30)
    trainer = make_trainer({**strategy, "checkpoint": settings}, [keep], max_epochs=3)
    module = OwnLoss()
    trainer.fit(module, *loaders(trainer, Task(OwnLoss, strategy)))
    trainer.validate(module, loaders(trainer, Task(OwnLoss, strategy))[1], ckpt_path="best", verbose=False)
    caught = ""
    try:
        trainer = make_trainer({**strategy, "checkpoint": settings}, [SaveUnderOwnName(folder)], max_epochs=3)
        trainer.fit(OwnLoss(), loaders(trainer, Task(OwnLoss, strategy))[0])
    except KeyError as error:
        caught = str(error)
    return {
        "paths": [keep.best_model_path, keep.last_model_path, keep.kth_best_model_path, *keep.best_k_models], "caught": caught,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", [{}, {"tp": 2}], ids=["dp2", "tp2"])
def test_all_ranks_save_to_the_path_of_rank_0_and_know_it(pool: RankPool, strategy: dict[str, Any], tmp_path: Path) -> None:
    first, second = pool.run(name_by_rank, 2, str(tmp_path), strategy, timeout_s=300)
    assert first == second
    assert first["caught"] == "'on every rank'"
    assert [path for path in first["paths"] if not is_checkpoint(path)] == [], os.listdir(tmp_path)
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 4, names
    assert names[0] == "failed-on-0"
    assert names[1] == "last.ckpt"


def test_what_a_file_says_of_other_files_is_not_believed(tmp_path: Path) -> None:
    own, given = tmp_path / "own", tmp_path / "given"
    for path in (own / "a", given / "b", tmp_path / "elsewhere" / "c"):
        save(path, [LocalTensor.whole("w", torch.ones(1))], {}, rank=0, world_size=1, save_id="x")
    (tmp_path / "thesis").mkdir()
    good = {"best_k_models": {f"{own}/a": 1.0, f"{own}/gone": 2.0}, "best_model_path": f"{given}/b", "kth_value": 2.0}
    states = {"good": dict(good), "other": {"wait_count": 3}, "odd": None}
    assert forget_foreign_paths(states, [own, given]) == []
    assert states["good"] == good
    for path in (f"{own}/../thesis", f"{tmp_path}/thesis", f"{tmp_path}/elsewhere/c", "https://x.org/a.ckpt", 7, f"{own}"):
        state: dict[str, Any] = {"best_k_models": {f"{own}/a": 1.0, path: 9.0}, "kth_value": 9.0, "last_model_path": path}
        assert forget_foreign_paths({"keep": state}, [own]) == [str(path)]
        assert state == {"best_k_models": {f"{own}/a": 1.0}, "kth_best_model_path": "", "last_model_path": ""}


def test_names_are_taken_when_a_save_begins(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Hold(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.strategy.checkpointer._hand_over(go_on.wait)  # nothing is published while there are steps

        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            go_on.set()

        def on_exception(self, *args: Any) -> None:
            go_on.set()

    class Scored(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("score", float(batch_idx))
            return super().training_step(batch, batch_idx)

    keep = ModelCheckpoint(tmp_path, "model", monitor="score", mode="max", save_top_k=2, every_n_train_steps=1)
    trainer = make_trainer({}, [keep, Hold()], max_epochs=1)
    trainer.fit(Scored(), *loaders(trainer, Task(Scored, {}, rows=32)))
    assert sorted(os.listdir(tmp_path)) == ["model-v1.ckpt", "model.ckpt"]
    steps = {name: torch.load(tmp_path / name)["global_step"] for name in os.listdir(tmp_path)}
    assert sorted(steps.values()) == [3, 4]
    assert {Path(path).name: int(score) + 1 for path, score in keep.best_k_models.items()} == steps
    copy.deepcopy(keep)

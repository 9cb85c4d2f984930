"""Retention follows publication: the best checkpoint stays when a better one could not be saved, and its callback knows it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import make_trainer

from kenotron.checkpoint import SaveFailedError
from kenotron.checkpoint.pending import PendingSave
from kenotron.strategies import CheckpointSettings


class Module(L.LightningModule):
    def __init__(self, scores: Mapping[int, float]) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 8)
        self._scores = scores

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("score", self._scores[self.trainer.global_step + 1])
        loss: torch.Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Look(L.Callback):
    """Waits before each batch, and notes which checkpoints are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.there: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.strategy.checkpointer._drain()  # type: ignore[attr-defined]
        self.there[trainer.global_step] = sorted(path.name for path in self.folder.iterdir())


def fit(folder: Path, scores: list[float], failing: set[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Train a step for each score and save after each; saves of these names fail."""
    write = PendingSave.write

    def write_or_fail(self: PendingSave, file: Path) -> Any:
        if self.path.name in failing:
            raise OSError(28, "No space left on device")
        return write(self, file)

    monkeypatch.setattr(PendingSave, "write", write_or_fail)
    folder.mkdir(exist_ok=True)
    on_error = options.pop("on_error", "warn")
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, **{"monitor": "score", **options})
    look = Look(folder)
    strategy = {"checkpoint": CheckpointSettings(on_error=on_error)}
    trainer = make_trainer(strategy, [keep, look], max_steps=len(scores), max_epochs=-1)
    loader = torch.utils.data.DataLoader(torch.randn(4 * len(scores), 8), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(dict(enumerate(scores, 1))), loader)
    return keep, look.there


def test_the_best_stays_until_a_better_one_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Step 3 would be the best and fails; step 4 is better than step 1 alone, and is the best one from then on.
    keep, there = fit(tmp_path, [1.0, 2.0, 0.3, 0.5, 2.0], {"step=3.ckpt"}, monkeypatch, save_top_k=1)
    assert there[3] == ["step=1.ckpt"]
    assert there[4] == ["step=4.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["step=4.ckpt"]
    assert Path(keep.best_model_path).name == "step=4.ckpt"
    assert float(keep.best_model_score) == 0.5
    assert [Path(path).name for path in keep.best_k_models] == ["step=4.ckpt"]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_failure_at_the_end_leaves_the_best_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    found: list[ModelCheckpoint] = []
    make = ModelCheckpoint.__init__

    def remember(self: ModelCheckpoint, *args: Any, **options: Any) -> None:
        found.append(self)
        make(self, *args, **options)

    monkeypatch.setattr(ModelCheckpoint, "__init__", remember)
    failing = {"step=3.ckpt", "step=4.ckpt"}
    try:
        fit(tmp_path, [2.0, 1.0, 0.5, 0.3], failing, monkeypatch, save_top_k=2, save_last=True, on_error=on_error)
    except SaveFailedError:
        assert on_error == "raise"
    (keep,) = found
    assert {path.name for path in tmp_path.iterdir()} >= {"step=1.ckpt", "step=2.ckpt"}
    assert Path(keep.best_model_path).name == "step=2.ckpt"
    assert {Path(path).name: float(score) for path, score in keep.best_k_models.items()} == {
        "step=1.ckpt": 2.0,
        "step=2.ckpt": 1.0,
    }


def test_without_a_monitor_the_former_one_stays_until_the_next_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, there = fit(tmp_path, [0.0] * 4, {"step=2.ckpt", "step=4.ckpt"}, monkeypatch, monitor=None)
    assert there[2] == ["step=1.ckpt"]
    assert there[3] == ["step=3.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]
    assert Path(keep.best_model_path).name == "step=3.ckpt"

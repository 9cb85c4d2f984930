"""Ranks that the trainer's call starts by itself, by fork or spawn, give results and weights back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import Classifier, Rows, loader, make_trainer

import kenotron
from kenotron.strategies import ProcessGroupSettings


def data() -> Any:
    return loader(Rows(8), 4)


@pytest.mark.parametrize(("method", "zero_stage"), [("fork", 1), ("fork", 3), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_results_and_whole_weights_come_back(method: str, zero_stage: int, tmp_path: Path) -> None:
    group = ProcessGroupSettings(start_method=method)  # type: ignore[arg-type]
    strategy = kenotron.KenotronStrategy(zero_stage=zero_stage, process_group=group)  # type: ignore[arg-type]
    kept = ModelCheckpoint(tmp_path, save_last=True)
    L.seed_everything(1, verbose=False)
    module = Classifier(depth=1)
    trainer = make_trainer(strategy, [kept], devices=2, max_epochs=1)
    trainer.fit(module, data(), data())
    saved = kenotron.load_state_dict(kept.best_model_path)
    assert saved.keys() == module.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())
    metrics = trainer.callback_metrics
    assert {"train_loss", "val_loss"} <= metrics.keys()
    (found,) = trainer.validate(module, data(), verbose=False)
    assert found["val_loss"] == pytest.approx(float(metrics["val_loss"]), abs=1e-5)


def test_an_unknown_way_to_start_is_refused() -> None:
    with pytest.raises(ValueError, match="start_method='threads' must be 'popen', 'spawn', 'fork' or 'forkserver'"):
        ProcessGroupSettings(start_method="threads")  # type: ignore[arg-type]


def test_strategies_are_found_by_name() -> None:
    trainer = L.Trainer(strategy="kenotron_notebook", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert trainer.strategy.launcher is not None
    assert trainer.strategy.launcher.is_interactive_compatible

"""Saving while training goes on, under the strategy: every checkpoint equals the one that a synchronous save makes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import PP2, SLOW, TP2_PP2, Classifier, Task, loaders, make_trainer

from kenotron.checkpoint import EngineSettings, is_checkpoint, load_state, load_state_dict, read_manifest
from kenotron.strategies import CheckpointSettings, fences
from kenotron.testing import RankPool

#: So slow that a save is still in flight when the next optimizer step wants to begin.
CRAWLING = EngineSettings(pool_bytes=1 << 14, slot_bytes=1 << 12, max_bytes_per_s=3e5, checked_share=1.0)


class SaveEachStep(L.Callback):
    """Saves after every step, and notes what was still in flight."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.in_flight: list[bool] = []
        self.saves: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}")
        self.saves.append(trainer.strategy.checkpointer.last)  # type: ignore[attr-defined]
        self.in_flight.append(not self.saves[-1].done())


def save_each_step(strategy: Mapping[str, Any], folder: str, asynchronous: bool) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    settings = CheckpointSettings(asynchronous=asynchronous, engine=CRAWLING)
    callback = SaveEachStep(folder)
    trainer = make_trainer({**strategy, "checkpoint": settings}, [callback], max_epochs=2)
    train, _ = loaders(trainer, Task(Classifier, strategy))
    trusted = fences._TRUSTED
    fences._TRUSTED = (*trusted, __name__)  # so that calls return before the copy, as those of `ModelCheckpoint` do
    try:
        trainer.fit(Classifier(), train)
    finally:
        fences._TRUSTED = trusted
    return {
        "in flight": callback.in_flight,
        "waited": [save.stats.get("fence_s", 0.0) > 0 for save in callback.saves],
        "errors": [save.error for save in callback.saves],
    }


@pytest.mark.parametrize(
    "layout",
    [(1, {}), (2, {"zero_stage": 3}), (2, {"tp": 2}), PP2, pytest.param(TP2_PP2, marks=SLOW)],
    ids=["one", "dp2-zero3", "tp2", "pp2", "tp2-pp2"],
)
def test_every_checkpoint_is_that_of_a_synchronous_save(pool: RankPool, layout: tuple[int, Any], tmp_path: Path) -> None:
    ranks, strategy = layout
    for found in pool.run(save_each_step, ranks, strategy, str(tmp_path / "sync"), False):
        assert found["in flight"] == [False] * 6
    for found in pool.run(save_each_step, ranks, strategy, str(tmp_path / "async"), True):
        assert all(found["in flight"])
        assert found["waited"][2:] == [True] * 4  # in the first steps all is copied in the call
        assert found["errors"] == [None] * 6
    for step in range(1, 7):
        one, other = tmp_path / "sync" / f"step-{step}", tmp_path / "async" / f"step-{step}"
        expected, found = load_state_dict(one, ""), load_state_dict(other, "")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        state, expected_state = load_state(other), load_state(one)
        assert state["lightning"]["loops"] == expected_state["lightning"]["loops"]
        assert state["optimizers"] == expected_state["optimizers"]


def keep_last(save_last: Any, folder: str) -> list[str]:
    L.seed_everything(1, verbose=False)
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=2, save_top_k=1, monitor="step", mode="max", save_last=save_last
    )
    trainer = make_trainer({"checkpoint": CheckpointSettings(engine=CRAWLING)}, [keep], max_epochs=2)
    train, _ = loaders(trainer, Task(Classifier, None))
    trainer.fit(Classifier(), train)
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_checkpoint_under_its_second_name(pool: RankPool, save_last: Any, tmp_path: Path) -> None:
    assert pool.run(keep_last, 1, save_last, str(tmp_path))[0] == ["last.ckpt", "step=6.ckpt"]
    assert is_checkpoint(tmp_path / "last.ckpt")
    shards = [next((tmp_path / name).glob("shard-*")) for name in ("last.ckpt", "step=6.ckpt")]
    assert shards[0].samefile(shards[1])
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")


def fit_beside_leftovers(folder: str) -> list[str]:
    keep = ModelCheckpoint(folder, filename="{epoch}")
    trainer = make_trainer({}, [keep], max_epochs=1)
    train, _ = loaders(trainer, Task(Classifier, None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(), train)
    return [str(warning.message) for warning in caught]


def test_what_a_crash_left_is_removed_with_a_message(pool: RankPool, tmp_path: Path) -> None:
    leftover = tmp_path / ".epoch=7.ckpt.abc.partial"
    (leftover / "control").mkdir(parents=True)
    (leftover / "control" / "lock").touch()
    (leftover / "shard-00001-of-00001.safetensors").write_bytes(b"half")
    messages = pool.run(fit_beside_leftovers, 1, str(tmp_path))[0]
    assert any(f"Removed {leftover}" in message for message in messages)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def resume_with_dropout(strategy: Mapping[str, Any], folder: str, path: str) -> list[str]:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, max_epochs=2)
    train, _ = loaders(trainer, Task(Classifier, strategy))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(dropout=0.1), train, ckpt_path=path)
    return [str(warning.message) for warning in caught]


def test_random_states_are_restored_on_the_same_layout_only(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_each_step, 2, {"zero_stage": 1}, str(tmp_path), True)
    path = str(tmp_path / "step-3")
    assert read_manifest(path).world_size == 2
    text = "restored without the states of its random generators"
    assert not any(text in message for message in pool.run(resume_with_dropout, 2, {}, str(tmp_path), path)[0])
    assert any(text in message for message in pool.run(resume_with_dropout, 2, {"tp": 2}, str(tmp_path), path)[0])

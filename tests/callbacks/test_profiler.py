"""Profiles of chosen steps on chosen ranks, as files that tools read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from operations_helpers import Net, data, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kenotron.callbacks import Profiler
from kenotron.testing import RankPool


class Marks(L.Callback):
    """Leaves a mark in the trace for each step."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        with torch.profiler.record_function(f"step {trainer.global_step}"):
            pass


def events(path: Path) -> set[str]:
    with gzip.open(path) as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def fit(folder: str, strategy: Any, **settings: Any) -> None:
    make_trainer(strategy, Profiler(**settings), Marks(), max_steps=6, default_root_dir=folder).fit(Net(), data())


def test_it_profiles_the_steps_and_ranks_that_were_asked_for(tmp_path: Path) -> None:
    with RankPool(2) as pool:
        pool.run(fit, 2, str(tmp_path / "two"), "ddp", start_step=2, num_steps=2, ranks="all", memory=True)
        pool.run(fit, 2, str(tmp_path / "second"), {"tp": 2}, start_step=0, num_steps=1, ranks=(1,))
    names = [f"profile-step=2-rank={rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for rank in (0, 1):
        found = events(tmp_path / "two" / f"profile-step=2-rank={rank}.json.gz")
        assert {name for name in found if name.startswith("step ")} >= {"step 2", "step 3"}
        assert not found & {"step 0", "step 4", "step 5"}
        assert "aten::addmm" in found
    table = (tmp_path / "two" / "profile-step=2-rank=1.txt").read_text()
    assert "aten::addmm" in table
    assert "CPU Mem" in table
    assert sorted(path.name for path in (tmp_path / "second").glob("*.gz")) == ["profile-step=0-rank=1.json.gz"]
    assert "CPU Mem" not in (tmp_path / "second" / "profile-step=0-rank=1.txt").read_text()


def test_a_window_that_training_leaves_early_and_the_logger_gets_the_table(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    make_trainer({}, Profiler(start_step=3, num_steps=50), max_steps=5, logger=logger).fit(Net(), data())
    assert (Path(logger.log_dir) / "profile-step=3-rank=0.json.gz").exists()
    read = EventAccumulator(logger.log_dir)
    read.Reload()
    (tag,) = read.Tags()["tensors"]
    assert "aten::addmm" in read.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def test_bad_input_is_told() -> None:
    for settings, text in [
        ({"num_steps": 0}, "num_steps=0"),
        ({"ranks": "some"}, "ranks='some'"),
        ({"ranks": ()}, r"ranks=\(\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            Profiler(**settings)
    with pytest.raises(ValueError, match=r"ranks=\[0, 3\].*ranks 0 to 0 alone"):
        make_trainer("auto", Profiler(ranks=(0, 3))).fit(Net(), data())

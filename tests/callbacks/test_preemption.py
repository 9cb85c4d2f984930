"""A signal to one rank: all ranks stop after the same step, with a checkpoint from which training goes on as if nothing was."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from operations_helpers import KeepLogger, KeepLosses, Net, ResumableData, data, make_trainer

from kenotron.callbacks import AsyncCheckpointIO, Preempted, Preemption
from kenotron.checkpoint import is_checkpoint
from kenotron.testing import RankPool

STEPS = 60


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as processes:
        yield processes


def fit(
    folder: str,
    strategy: dict[str, Any] | str,
    kill: tuple[int, int] | None = None,
    resume: str | None = None,
    preemption: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train slowly. ``kill``: the rank, and the step at which it sends itself a signal."""

    def on_step(module: L.LightningModule) -> None:
        time.sleep(0.03)
        if kill == (module.global_rank, module.global_step):
            os.kill(os.getpid(), signal.SIGTERM)

    L.seed_everything(1, verbose=False)
    module, logger, kept = Net(on_step=on_step), KeepLogger(), KeepLosses()
    before = signal.getsignal(signal.SIGTERM)
    callbacks = [kept, Preemption(folder, **(preemption or {})), ModelCheckpoint(folder, save_top_k=0)]
    trainer = make_trainer(
        strategy, *callbacks, **{"max_steps": STEPS, "enable_checkpointing": True, "logger": logger, **settings}
    )
    found: dict[str, Any] = {"path": None}
    try:
        trainer.fit(module, ResumableData(), ckpt_path=resume)
    except Preempted as preempted:
        found = {"path": str(preempted.path), "code": preempted.code}
        assert logger.values("preemption/save_seconds") or trainer.global_rank > 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "kenotron-ranks"]
    return found | {"losses": kept.losses, "step": trainer.global_step}


@pytest.mark.parametrize(
    "strategy",
    [{"zero_stage": 1}, pytest.param({"pp": 2, "microbatches": 2}, marks=pytest.mark.slow), "ddp"],
    ids=["dp2", "pp2", "ddp"],
)
def test_one_rank_gets_the_signal_and_resume_continues_the_same_losses(pool: RankPool, tmp_path: Path, strategy: Any) -> None:
    whole = pool.run(fit, 2, str(tmp_path / "whole"), strategy)
    stopped = pool.run(fit, 2, str(tmp_path / "cut"), strategy, kill=(1, 3))
    resumed = pool.run(fit, 2, str(tmp_path / "cut"), strategy, resume="last")
    assert [each["path"] for each in whole + resumed] == [None] * 4
    step = stopped[0]["step"]
    assert 3 < step < STEPS
    for each in stopped:
        assert each["step"] == step
        assert each["code"] == 0
        assert each["path"] == str(tmp_path / "cut" / f"last-preempted-step={step}.ckpt")
    if strategy != "ddp":
        assert is_checkpoint(stopped[0]["path"])
    for rank in range(2):
        assert stopped[rank]["losses"] + resumed[rank]["losses"] == whole[rank]["losses"]


def one_process(folder: Path, monkeypatch: pytest.MonkeyPatch, signum: int, answer: int = 0, **settings: Any) -> str:
    """Train in this process under a SLURM that notes what it is told; return that."""
    asked = folder / "asked"
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\necho no such job >&2\nexit {answer}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    slurm = {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "x"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def on_step(module: L.LightningModule) -> None:
        if module.global_step == 2 and module.trainer.fit_loop.epoch_loop.batch_idx % 2 == 0:
            os.kill(os.getpid(), signum)

    preemption = Preemption(folder, requeue=settings.pop("requeue", "auto"), exit_code=85)
    settings = {"plugins": [SLURMEnvironment()], "default_root_dir": folder, "accumulate_grad_batches": 2} | settings
    trainer = make_trainer({} if "plugins" in settings else "auto", preemption, **settings)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(Net(on_step=on_step), data())
    assert stopped.value.code == 85
    assert trainer.global_step == 3  # what was accumulated when the signal came is in the checkpoint
    assert stopped.value.path.exists()
    assert not list(folder.glob("hpc*"))  # Lightning's own handler has not saved as well
    return asked.read_text() if asked.exists() else ""


def test_it_requeues_where_lightning_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_process(tmp_path, monkeypatch, signal.SIGUSR1) == "requeue 17\n"


def test_scancel_ends_a_job_for_good_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_process(tmp_path, monkeypatch, signal.SIGTERM) == ""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.warns(UserWarning, match=r"requeue 40_2 failed: no such job"):
        assert one_process(tmp_path, monkeypatch, signal.SIGTERM, answer=1, requeue=True) == "requeue 40_2\n"


def test_background_writing_under_another_strategy_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(
        "auto", Preemption(tmp_path, ["SIGUSR2"]), plugins=[AsyncCheckpointIO()], max_steps=50, enable_checkpointing=False
    )
    at_two = Net(on_step=lambda module: os.kill(os.getpid(), signal.SIGUSR2) if module.global_step == 2 else None)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(at_two, data())
    assert is_checkpoint(stopped.value.path)


def test_bad_input_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for settings, text in [
        ({"signals": ["SIGNOT"]}, "'SIGNOT' is no signal.*SIGUSR1"),
        ({"signals": [9]}, "no process can catch SIGKILL"),
        ({"signals": []}, "signals is empty"),
        ({"exit_code": 256}, "exit_code=256"),
        ({"requeue": "yes"}, "requeue='yes'"),
    ]:
        with pytest.raises(ValueError, match=text):
            Preemption(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"no SLURM job.*requeue='auto'"):
        make_trainer({}, Preemption(tmp_path, requeue=True)).fit(Net(), data())

"""One rank of one run: ``python -m kenotron.compare.worker JOB STRATEGY FOLDER``, with the environment of ``torchrun``.

1. Train, and write what was measured to ``FOLDER/rank-N.json``.
2. Build everything anew in the same processes, load the checkpoint, and add how long that took.
What fails is written there as well: ``error`` in the first part, ``load_error`` in the second.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden

from kenotron.compare.adapt import start_from, strategy_for
from kenotron.compare.batches import share
from kenotron.compare.job import Job
from kenotron.compare.measure import LoadTimer, Memory, Meter

#: In the place of a strategy: write the initial weights, where strategies might make them differently.
PREPARE = "prepare"


def main(job_path: str, strategy: str, folder: str) -> int:
    """Run, write what came of it, and return the exit code."""
    sys.path.insert(0, os.getcwd())
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    out = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
    job = Job.read(job_path)
    found: dict[str, Any] = {}
    stage = "error"
    try:
        if strategy == PREPARE:
            found["problem"] = prepare(job)
        else:
            checkpoint = Path(folder) / "checkpoint.ckpt"
            found = train(job, strategy, checkpoint)
            out.write_text(json.dumps(found))
            stage = "load_error"
            found["load_s"] = load(job, strategy, checkpoint)
    except BaseException as error:
        traceback.print_exc()
        found |= {stage: f"{type(error).__name__}: {error}", "failed_at": time.time()}
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(out)
    return 1 if "error" in found or "load_error" in found else 0


def _die_with_parent(parent: int) -> None:
    """Let nothing run on when the comparison was stopped."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def prepare(job: Job) -> str | None:
    """Write initial weights where the module is built in ``configure_model``. Returns why that can't be, if it can't."""
    module, _ = job.build()
    if not is_overridden("configure_model", module):
        return None
    try:
        module.configure_model()
    except Exception as error:  # it may want a trainer, or the mesh of a strategy
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    torch.save(module.state_dict(), job.weights)
    return None


def train(job: Job, strategy: str, checkpoint: Path) -> dict[str, Any]:
    """Train, and return this rank's figures."""
    memory = Memory(_device(job))
    module, data = _build(job)
    meter = Meter(job, checkpoint, memory)
    trainer = _trainer(job, strategy_for(strategy, module, _device(job)), job.steps, [meter])
    _give_batches(job, trainer, module, data)
    trainer.fit(module, datamodule=data)
    return meter.results(trainer)


def load(job: Job, strategy: str, checkpoint: Path) -> float:
    """Restore the checkpoint in new objects, and return the seconds of the strategy's part in it."""
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
    module, data = _build(job)
    made = strategy_for(strategy, module, _device(job))
    timer = LoadTimer(made)
    trainer = _trainer(job, made, job.steps, [])  # schedules end where they did
    _give_batches(job, trainer, module, data)
    trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint))
    return timer.seconds


def _build(job: Job) -> tuple[Any, Any]:
    """Return module and data; weights are in place before a strategy's part of ``configure_model``."""
    module, data = job.build()
    if job.weights.exists():
        start_from(module, job.weights)
    return module, data


def _device(job: Job) -> torch.device:
    on_cpu = job.trainer.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _trainer(job: Job, strategy: Any, steps: int, callbacks: list[Any]) -> L.Trainer:
    return L.Trainer(
        strategy=strategy,
        devices=job.devices,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # `share` does it, alike for all
        default_root_dir=job.folder,
        callbacks=callbacks,
        **job.trainer,
    )


def _give_batches(job: Job, trainer: L.Trainer, module: Any, data: Any) -> None:
    """Let the training data give this rank its share of each step's samples."""
    source = module if data is None else data
    train_dataloader = source.train_dataloader

    def shared() -> Any:
        given = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        limit = job.steps * trainer.accumulate_grad_batches
        return share(
            train_dataloader(),
            devices=job.devices,
            rank=given["rank"],
            num_ranks=given["num_replicas"],
            seed=job.seed,
            limit=limit,
        )

    source.train_dataloader = shared


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a rank whose peers are gone would wait for them in its process group's destructor

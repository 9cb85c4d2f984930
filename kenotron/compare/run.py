"""Run a training under each strategy in fresh processes, and put what they measured side by side.

1. One process builds the module, tells what is wrong with it, and writes its initial weights where strategies make their own.
2. Repeat by repeat, all strategies in turn, each in new processes: what the machine does meanwhile falls on all of them alike.
3. A strategy's row has the medians of its repeats; a strategy that can't run here has a row that says why.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kenotron.compare.job import Job

#: After a rank has failed, the others have so long to tell what they know.
_GRACE_S = 15.0
#: What the medians of repeats are taken of.
FIGURES = (
    "tokens_per_second", "samples_per_second", "step_s", "peak_memory_bytes", "checkpoint_stall_s", "checkpoint_bytes",
    "load_s",
)  # fmt: skip


class PrepareError(ValueError):
    """The module or its data can't be built, whatever the strategy."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training under one strategy: its figures, or why there are none."""

    strategy: str
    reason: str | None = None
    figures: dict[str, Any]


def compare(
    job: Job,
    strategies: Sequence[str],
    *,
    repeats: int = 2,
    timeout_s: float = 1800.0,
    on_run: Callable[[int, Run], None] = lambda repeat, run: None,
) -> list[dict[str, Any]]:
    """Return a row for each strategy; losses are compared with those of the first one that runs.

    Args:
        job: what is trained; its folder is there. strategies: names with settings.
        repeats: of each. timeout_s: of one run. on_run: called after each.

    Raises:
        PrepareError: nothing can be trained.
    """
    if repeats < 1 or not strategies:
        raise ValueError(f"{repeats} repeats of {len(strategies)} strategies: give one or more of both.")
    path = job.write()
    prepared = launch(path, "prepare", Path(job.folder) / "prepare", 1, timeout_s)
    if prepared.reason is not None:
        raise PrepareError(prepared.reason)
    if prepared.figures["problem"] is not None:
        warnings.warn(
            "configure_model does not run without a trainer, so strategies begin with weights of their own, and losses may "
            f"differ: {prepared.figures['problem']}",
            stacklevel=2,
        )
    runs: dict[str, list[Run]] = {strategy: [] for strategy in strategies}
    for repeat in range(repeats):
        for index, strategy in enumerate(runs):
            if any(run.reason is not None for run in runs[strategy]):
                continue  # it would fail again
            folder = Path(job.folder) / f"{repeat}-{index}"
            runs[strategy].append(launch(path, strategy, folder, job.devices, timeout_s))
            shutil.rmtree(folder, ignore_errors=True)  # of which the checkpoint may be large
            on_run(repeat, runs[strategy][-1])
    return _rows(runs)


def launch(job: Path, strategy: str, folder: Path, num_ranks: int, timeout_s: float) -> Run:
    """Run one strategy on ``num_ranks`` new processes and return what they measured."""
    folder.mkdir(parents=True)
    port = _free_port()
    command = [sys.executable, "-m", "kenotron.compare.worker", str(job), strategy, str(folder)]
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(num_ranks):
        with open(folder / f"rank-{rank}.log", "wb") as log:
            environment = _environment(rank, num_ranks, port)
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    codes = _wait(ranks, timeout_s)
    found = [_read(folder / f"rank-{rank}.json") for rank in range(num_ranks)]
    failed = [one for one in found if "error" in one]
    crashed = [rank for rank, code in enumerate(codes) if code is not None and not found[rank]]
    if crashed:  # what the others tell then is that it is gone
        return Run(strategy=strategy, reason=_last_words(folder, crashed[0], codes[crashed[0]]), figures={})
    if failed:
        return Run(strategy=strategy, reason=_first(failed, "error"), figures={})
    if not all(found):
        return Run(strategy=strategy, reason=f"it did not finish in {timeout_s:.0f} s", figures={})
    figures = found[0] if strategy == "prepare" else _figures(found)
    checkpoint = folder / "checkpoint.ckpt"
    if checkpoint.exists():
        files = [checkpoint] if checkpoint.is_file() else [file for file in checkpoint.rglob("*") if file.is_file()]
        figures["checkpoint_bytes"] = sum(file.stat().st_size for file in files)
    return Run(strategy=strategy, figures=figures)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    threads = max((os.cpu_count() or 1) // num_ranks, 1)
    given = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kenotron-compare",
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {"OMP_NUM_THREADS": str(threads), **inherited, **{name: str(value) for name, value in given.items()}}


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Wait until all ranks have ended, and return their exit codes, ``None`` for those that had to be killed."""
    deadline = time.monotonic() + timeout_s
    has_failed = False
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if not has_failed and any(rank.poll() for rank in ranks):
            has_failed, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.05)
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    return codes


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _figures(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all ranks: the mean of losses and speeds, the worst of memory and times."""
    figures: dict[str, Any] = {
        "losses": [statistics.fmean(step) for step in zip(*(one["losses"] for one in found), strict=True)]
    }
    for name in ("samples_per_second", "tokens_per_second"):
        figures[name] = statistics.fmean(one[name] for one in found)
    for name in ("step_s", "peak_memory_bytes", "checkpoint_stall_s"):
        figures[name] = max(one[name] for one in found)
    failed = [one for one in found if "load_error" in one]
    if failed:
        figures["load_error"] = _first(failed, "load_error")
    elif all("load_s" in one for one in found):
        figures["load_s"] = max(one["load_s"] for one in found)
    return figures


def _first(failed: Sequence[dict[str, Any]], key: str) -> str:
    """Return what the rank says that failed first: the others may only tell that it is gone."""
    text: str = min(failed, key=lambda one: one["failed_at"])[key]
    return " ".join(text.split())[:600]


def _last_words(folder: Path, rank: int, code: int | None) -> str:
    lines = (folder / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"rank {rank} died {how}{f': {lines[-1]}' if lines else ''}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _rows(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    reference: list[float] | None = None
    rows = []
    for strategy, repeats in runs.items():
        failed = next((run.reason for run in repeats if run.reason is not None), None)
        row: dict[str, Any] = {"strategy": strategy, "reason": failed, "loss": None, "loss_difference": None}
        row |= {"max_loss_difference": None} | dict.fromkeys(FIGURES) | {"load_error": None, "losses": [], "repeats": []}
        if failed is None:
            losses = repeats[0].figures["losses"]
            reference = reference or losses
            apart = [abs(loss - other) for run in repeats for loss, other in zip(run.figures["losses"], reference, strict=True)]
            last = max((run.figures["losses"][-1] - reference[-1] for run in repeats), key=abs)
            row |= {"loss": losses[-1], "loss_difference": last, "max_loss_difference": max(apart), "losses": losses}
            for name in FIGURES:
                values = [run.figures[name] for run in repeats if name in run.figures]
                row[name] = statistics.median(values) if values else None
            row["load_error"] = next((run.figures["load_error"] for run in repeats if "load_error" in run.figures), None)
            row["repeats"] = [{name: run.figures.get(name) for name in FIGURES} for run in repeats]
        rows.append(row)
    return rows

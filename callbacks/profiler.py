"""torch's profiler over some steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class Profiler(L.Callback):
    """Profile some optimizer steps: a trace for each rank, and a table of the operators that cost most.

    In ``dirpath`` appear ``profile-step=N-rank=R.json.gz``, which ui.perfetto.dev opens, and ``profile-step=N-rank=R.txt`` with
    the table; rank 0 prints its own, and a TensorBoard logger gets it. One step more than asked runs under the profiler
    before, to warm it up, unless the first step is asked for. Any strategy.

    Args:
        dirpath: for the files; ``None``: the logger's folder, or ``default_root_dir``.
        start_step: the first optimizer step to profile, counted from 0. num_steps: how many.
        ranks: whom to profile, ``"all"`` or some of them.
        memory: also note what operators allocate, with a second table by that.
        shapes: note the shapes of what operators get. stack: where they are called from, which is slow.
        num_rows: of the tables.

    Raises:
        ValueError: numbers out of range, or a rank that the job does not have.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        start_step: int = 10,
        num_steps: int = 3,
        ranks: Sequence[int] | Literal["all"] = (0,),
        *,
        memory: bool = False,
        shapes: bool = False,
        stack: bool = False,
        num_rows: int = 20,
    ) -> None:
        if start_step < 0 or num_steps < 1 or num_rows < 1:
            raise ValueError(
                f"start_step={start_step}, num_steps={num_steps}, num_rows={num_rows}: steps count from 0, and of steps and "
                "rows one is the least. Set start_step=10, num_steps=3."
            )
        given: Any = ranks
        if given != "all" and (isinstance(given, str) or not given):
            raise ValueError(f"ranks={ranks!r}: set 'all', or some ranks such as (0, 1).")
        self._dirpath = None if dirpath is None else Path(dirpath)
        self._start, self._stop, self._ranks, self._num_rows = start_step, start_step + num_steps, ranks, num_rows
        self._settings: dict[str, Any] = {"profile_memory": memory, "record_shapes": shapes or stack, "with_stack": stack}
        self._profile: torch.profiler.profile | None = None
        self._first = self._last_step = -1
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse ranks that are not there."""
        if stage != "fit":
            return
        missing = [rank for rank in (() if self._ranks == "all" else self._ranks) if not 0 <= rank < trainer.world_size]
        if missing:
            raise ValueError(f"Profiler(ranks={list(self._ranks)}): there are ranks 0 to {trainer.world_size - 1} alone.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, which all ranks must ask for."""
        self._folder = self._dirpath or Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step early, to warm up."""
        step = trainer.global_step
        is_wanted = self._ranks == "all" or trainer.global_rank in self._ranks
        if self._profile is not None or not is_wanted or not self._start - 1 <= step < self._stop:
            return
        warmup = int(step < self._start)
        self._first, self._last_step = step + warmup, step
        activities = [torch.profiler.ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=warmup, active=self._stop - self._first, repeat=1)
        self._profile = torch.profiler.profile(activities=activities, schedule=schedule, **self._settings)
        self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """End after the last step."""
        if self._profile is None or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.global_step < self._stop:
            self._profile.step()
        else:
            self._finish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End where training ends first."""
        if self._profile is not None:
            self._finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go: another profiler may begin."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _finish(self, trainer: L.Trainer) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"profile-step={self._first}-rank={trainer.global_rank}.json.gz"
        profile.export_chrome_trace(str(path))
        device = "device" if trainer.strategy.root_device.type == "cuda" else "cpu"
        table = self._table(profile, f"self_{device}_time_total")
        if self._settings["profile_memory"]:
            table += "\n" + self._table(profile, f"self_{device}_memory_usage")
        path.with_name(path.name.removesuffix(".json.gz") + ".txt").write_text(table)
        rank_zero_info(f"{table}\n{path} (ui.perfetto.dev opens it)")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("profile", f"```\n{table}\n```", trainer.global_step)

    def _table(self, profile: torch.profiler.profile, by: str) -> str:
        return str(profile.key_averages().table(sort_by=by, row_limit=self._num_rows, max_name_column_width=48))

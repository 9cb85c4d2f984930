"""What each pipeline stage did when, as a trace and as a picture."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from kenotron.callbacks.pipeline_picture import draw, require_matplotlib
from kenotron.parallel.pipeline import Pipeline
from kenotron.parallel.timeline import OPTIMIZER, Span, bubble, chrome_trace, ideal_bubble, runs_of
from kenotron.strategies.training import Training

#: How often ranks meet to compare their clocks. They leave a barrier within some 50 µs of each other; the median is better.
_NUM_MEETINGS = 7


class PipelineTrace(L.Callback):
    """Trace pipeline stages over some steps: ``pipeline-step=N.json`` for Perfetto, and a PNG with the measured bubble.

    The bubble is the part of all ranks' time, between the first and the last action of a batch, in which no stage worked. In
    theory it is that of the same order of actions on equal stages that wait for nothing but each other. Both go to the
    loggers, in percent. Outside of the traced steps it costs nothing; in them two looks at the clock for each action, or
    two CUDA events, which are read at the end.

    Args:
        dirpath: for the files; ``None``: the logger's folder, or ``default_root_dir``.
        start_step: the first optimizer step to trace, counted from 0. num_steps: how many.
        picture: draw one, which takes matplotlib.

    Raises:
        ValueError: steps out of range, or at set-up a strategy without pipeline stages.
        ImportError: there is no matplotlib.
    """

    def __init__(
        self, dirpath: str | Path | None = None, start_step: int = 5, num_steps: int = 1, *, picture: bool = True
    ) -> None:
        if start_step < 0 or num_steps < 1:
            raise ValueError(
                f"start_step={start_step}, num_steps={num_steps}: steps count from 0, and one is the least. Set start_step=5, "
                "num_steps=1."
            )
        if picture:
            require_matplotlib()
        self._dirpath = None if dirpath is None else Path(dirpath)
        self._start, self._stop, self._picture = start_step, start_step + num_steps, picture
        self._recorder: _Recorder | None = None
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what has no pipeline."""
        strategy = trainer.strategy
        if stage == "fit" and (not isinstance(strategy, Training) or strategy.layout.pp == 1):
            what = "pp=1" if isinstance(strategy, Training) else type(strategy).__name__
            raise ValueError(
                f"PipelineTrace traces pipeline stages, and the strategy has none ({what}). Set "
                "KenotronStrategy(pp=2) or more, or use Profiler."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, which all ranks must ask for."""
        self._folder = self._dirpath or Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin with the first step."""
        step = trainer.global_step
        if self._recorder is None and self._start <= step < self._stop:
            pipeline = _pipeline_of(trainer)
            self._recorder = pipeline.observer = _Recorder(pipeline.device, trainer.optimizers)
        if self._recorder is not None:
            self._recorder.next_run(step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note when the update begins; when it ends the optimizer's own hook notes."""
        if self._recorder is not None:
            self._recorder.begin_update()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """End after the last step."""
        if self._recorder is not None and trainer.global_step >= self._stop:
            self._finish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End where training ends first."""
        if self._recorder is not None:
            self._finish(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go."""
        self._recorder = None

    def _finish(self, trainer: L.Trainer) -> None:
        recorder, pipeline = self._recorder, _pipeline_of(trainer)
        self._recorder = pipeline.observer = None
        assert recorder is not None and isinstance(trainer.strategy, Training)
        recorder.close()
        where = trainer.strategy.layout.coordinates(trainer.global_rank)
        first = trainer.strategy.layout.rank_of(replace(where, pp=0))
        gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
        dist.gather_object((first, where.pp, recorder.spans(where.pp)), gathered)
        if gathered is not None:
            self._write(trainer, pipeline, gathered)

    def _write(self, trainer: L.Trainer, pipeline: Pipeline, gathered: list[tuple[int, int, list[Span]]]) -> None:
        """Write what rank 0 got: by pipeline, each called after its first rank."""
        pipelines = []
        for first in sorted({first for first, _, _ in gathered}):
            members = sorted((pp, rank, spans) for rank, (of, pp, spans) in enumerate(gathered) if of == first)
            spans = [span for _, _, own in members for span in own]
            pipelines.append((f"pipeline of rank {first}", [f"rank {rank}" for _, rank, _ in members], spans))
        runs = [run for _, _, spans in pipelines for run in runs_of(spans)]
        measured, theory = mean(map(bubble, runs)), mean(map(ideal_bubble, runs))
        last = max(span.step for span in pipelines[0][2])
        path = self._folder / f"pipeline-step={last}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(chrome_trace(pipelines)))
        if self._picture:
            name, ranks, spans = pipelines[0]
            num_microbatches = 1 + max(span.microbatch for span in spans)
            title = f"{_NAMES[pipeline.schedule]}: bubble {measured:.1%} measured, {theory:.1%} in theory"
            subtitle = (
                f"step {last}, {name}: {pipeline.cut.num_stages} stages on {pipeline.pp} ranks, {num_microbatches} microbatches"
                f"{'; from light to dark: the stages of a rank' if pipeline.cut.num_stages > pipeline.pp else ''}"
            )
            shown = [span for span in spans if span.step == last]
            draw(path.with_suffix(".png"), shown, ranks, title, subtitle)
        values = {"pipeline/bubble_percent": 100 * measured, "pipeline/bubble_in_theory_percent": 100 * theory}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        rank_zero_info(f"pipeline bubble {measured:.1%} measured, {theory:.1%} in theory: {path} (ui.perfetto.dev opens it)")


#: As the field calls them.
_NAMES = {
    "afab": "All forward, all backward",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved 1F1B",
    "interleaved_zero_bubble": "Interleaved zero bubble",
    "zbv": "ZBV zero bubble",
}


def _pipeline_of(trainer: L.Trainer) -> Pipeline:
    assert isinstance(trainer.strategy, Training)
    pipeline = trainer.strategy.pipeline
    assert pipeline is not None
    return pipeline


class _Recorder:
    """Notes when what begins and ends on this rank, and waits for nothing. All ranks make theirs at once.

    Args:
        device: whose time counts. optimizers: their updates are noted, too.
    """

    def __init__(self, device: torch.device, optimizers: list[Optimizer]) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[int, int, int, str, int, Any, Any]] = []
        self._run, self._step = -1, 0
        self._update_began: Any = None
        self._hooks = [optimizer.register_step_post_hook(lambda *_: self._end_update()) for optimizer in optimizers]
        self._offset = _clock_offset()
        if self._is_cuda:  # events know their distances alone: this one tells when they were
            torch.cuda.synchronize(device)
            self._anchor, self._anchored_at = self._now(), time.perf_counter()

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def next_run(self, step: int) -> None:
        """Another batch begins."""
        self._run, self._step = self._run + 1, step

    @contextlib.contextmanager
    def __call__(self, stage: int, action: str, microbatch: int) -> Iterator[None]:
        began = self._now()
        yield
        self._marks.append((self._run, self._step, stage, action, microbatch, began, self._now()))

    def begin_update(self) -> None:
        self._update_began = self._now()

    def _end_update(self) -> None:
        if self._update_began is not None:
            self._marks.append((self._run, self._step, -1, OPTIMIZER, -1, self._update_began, self._now()))
            self._update_began = None

    def close(self) -> None:
        """Note no more."""
        for hook in self._hooks:
            hook.remove()

    def spans(self, rank: int) -> list[Span]:
        """Return what was noted, by the clock of rank 0. Waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        return [
            Span(run, step, rank, stage, action, microbatch, self._seconds(began), self._seconds(ended))
            for run, step, stage, action, microbatch, began, ended in self._marks
        ]

    def _seconds(self, mark: Any) -> float:
        if self._is_cuda:
            mark = self._anchored_at + self._anchor.elapsed_time(mark) / 1e3
        return float(mark) - self._offset


def _clock_offset() -> float:
    """Return by how much this rank's clock is ahead of rank 0's; all ranks call it."""
    own = []
    for _ in range(_NUM_MEETINGS):
        dist.barrier()
        own.append(time.perf_counter())
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return median(mine - first for mine, first in zip(own, everybody[0], strict=True))

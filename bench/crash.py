"""Crashes: training is killed at random moments, again and again, and loses nothing that was published.

For each layout a reference trains to the end, saving synchronously. Then come chains: training is started, which saves in the
background, and killed (SIGKILL: one rank or all; while it starts, trains, saves or publishes); started again, from the newest
checkpoint or by ``ckpt_path="last"``, and killed again; after some kills it is left to end. It is checked

  after each kill    that every published checkpoint loads and is the reference's of that step, bit for bit: weights, optimizer,
                     random generators; that nothing else passes for a checkpoint; that the newest is no older than before
  after each start   that it goes on from that checkpoint, and that what the dead have left is removed, with a message
  of each step       that its loss is the reference's, bit for bit

Ranks that outlive another end by themselves (where training had begun: else we end them, as a launcher does). Each rank is a
fork of a process that has imported everything. ``seed`` makes what is killed and when, up to the speed of the machine.

    python bench/crash.py [--kills 500] [--quick] [--json FILE] [--only PATTERN] [--seed 1] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import fnmatch
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kenotron.checkpoint import (
    EngineSettings,
    is_checkpoint,
    load_rank_state,
    load_state,
    load_state_dict,
    read_manifest,
)
from kenotron.testing import RankPool

STEPS, SAVE_EVERY = 18, 3
FEATURES, WIDTH, BATCH = 16, 96, 8
#: A save takes a tenth of a second, so that many kills meet one.
ENGINE = EngineSettings(pool_bytes=1 << 19, slot_bytes=1 << 16, max_bytes_per_s=2e7)
#: How long survivors may take to end, or a run to get to its end.
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Layout:
    """One row: how many ranks, and what the strategy is told."""

    name: str
    ranks: int
    strategy: dict[str, Any]
    quick: bool = False


LAYOUTS = [
    Layout("one process", 1, {}, quick=True),
    Layout("dp 2, zero 1", 2, {}, quick=True),
    Layout("dp 2, zero 3", 2, {"zero_stage": 3}),
    Layout("tp 2", 2, {"tp": 2}, quick=True),
    Layout("pp 2", 2, {"pp": 2, "microbatches": 4}, quick=True),
]


# ------------------------------------------------------------------------------------------------------ one rank trains


@dataclass(frozen=True)
class Job:
    """What a rank is to do.

    Args:
        layout: as it is cut. folder: of the checkpoints. notes: where it writes what it does.
        ckpt_path: what it goes on from. asynchronous: whether it saves in the background.
    """

    layout: Layout
    folder: Path
    notes: Path
    ckpt_path: str | None = None
    asynchronous: bool = True


def in_fork(job: Job) -> int:
    """Train in a fork of this process; returns how it ended, as ``waitpid`` tells it."""
    rank = os.environ["RANK"]
    process = os.fork()
    if process == 0:
        status = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left behind
            log = os.open(job.notes / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(0.75 * DEADLINE_S)  # where one hangs that outlives another
            train(job)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    file = job.notes / f"process-{rank}"
    file.with_suffix(".tmp").write_text(str(process))
    file.with_suffix(".tmp").rename(file)
    return os.waitpid(process, 0)[1]


def train(job: Job) -> None:
    """Train to the end, noting each step's loss and each warning as it comes."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    import kenotron
    from kenotron.strategies.settings import CheckpointSettings

    rank = os.environ["RANK"]
    notes = os.open(job.notes / f"notes-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(kind: str, content: object) -> None:
        os.write(notes, (json.dumps([kind, content]) + "\n").encode())

    class Notes(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            note("started", [trainer.global_step, sorted(os.listdir(job.folder)) if job.folder.exists() else []])

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            note("loss", [trainer.global_step, float(trainer.callback_metrics["train_loss"]).hex()])

    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *args, **kwargs: note("warning", str(message))
    settings = CheckpointSettings(asynchronous=job.asynchronous, engine=ENGINE, exception_timeout_s=1.0, timeout_s=60.0)
    strategy = kenotron.KenotronStrategy(**job.layout.strategy, checkpoint=settings)
    keep = ModelCheckpoint(
        job.folder, filename="{step}", every_n_train_steps=SAVE_EVERY, save_last=True, save_top_k=1 if job.asynchronous else -1
    )
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=job.layout.ranks,
        strategy=strategy,
        max_steps=STEPS,
        callbacks=[keep, Notes()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    layout = strategy.layout
    data = Batches(layout.dp_rank(int(rank)), layout.dp_size)
    trainer.fit(make_module(L), data, ckpt_path=job.ckpt_path)
    note("ended", trainer.global_step)


class Batches:
    """A loader that remembers where it is; each data-parallel rank has its rows of the global batch."""

    def __init__(self, rank: int, size: int) -> None:
        self._rows = slice(BATCH * rank // size, BATCH * (rank + 1) // size)
        self._position = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Tensor]:
        while self._position < STEPS:
            self._position += 1
            yield torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(self._position))[self._rows]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        return hidden


def make_module(lightning: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        """Blocks with dropout, a buffer that each step changes, and a schedule of the learning rate."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(FEATURES, WIDTH)
            self.layers = nn.ModuleList(Block() for _ in range(4))
            self.head = nn.Linear(WIDTH, 1)
            self.register_buffer("num_steps", torch.zeros(()))

        def parallel_plan(self) -> dict[str, str]:
            return {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            self.num_steps += 1

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            x = self.embed(batch)
            for layer in self.layers:
                x = layer(x)
            loss: Tensor = (self.head(x) - batch.sum(dim=1, keepdim=True)).square().mean()
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9), "interval": "step"}]

    return Module()


def import_everything() -> None:
    """Once in each process of the pool: forks have it then."""
    import lightning.pytorch.callbacks  # noqa: F401

    import kenotron.strategies  # noqa: F401


# ------------------------------------------------------------------------------------------------------ a run and its end


class Run(threading.Thread):
    """A job on all its ranks, watched from here."""

    def __init__(self, pool: RankPool, job: Job) -> None:
        super().__init__()
        self.job, self._pool = job, pool
        self.statuses: list[int] = []
        self.error: BaseException | None = None
        self._seen: set[str] = set()
        self._num_saves = 0
        job.notes.mkdir(parents=True)
        self.start()

    def run(self) -> None:
        try:
            self.statuses = self._pool.run(in_fork, self.job.layout.ranks, self.job, timeout_s=DEADLINE_S)
        except BaseException as error:  # told to who waits
            self.error = error

    def finish(self) -> None:
        self.join()
        if self.error is not None:
            raise self.error

    def notes(self, rank: int = 0) -> list[Any]:
        """Return what a rank has noted so far."""
        try:
            lines = (self.job.notes / f"notes-{rank}").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def noted(self, kind: str, rank: int = 0) -> list[Any]:
        return [content for each, content in self.notes(rank) if each == kind]

    def num_saves(self) -> int:
        """Return how many saves have been seen to begin."""
        with contextlib.suppress(FileNotFoundError):
            partial = {name for name in os.listdir(self.job.folder) if name.endswith(".partial")}
            self._num_saves += len(partial - self._seen)
            self._seen |= partial
        return self._num_saves

    def is_publishing(self) -> bool:
        """Tell whether a manifest is written and the rename is all that is left."""
        with contextlib.suppress(FileNotFoundError):  # it has just been published
            return any(self.job.folder.glob(".*.partial/manifest.json*"))
        return False

    def wait_until(self, is_so: Callable[[], bool]) -> bool:
        """Wait for ``is_so``; False where the run ends first."""
        while self.is_alive():
            if is_so():
                return True
            time.sleep(0.0005)
        return False

    def kill(self, ranks: list[int]) -> list[int]:
        """Kill ranks at once; return those that were there to be killed."""
        killed, handles = [], {}
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                handles[rank] = os.pidfd_open(int((self.job.notes / f"process-{rank}").read_text()))
        for rank, handle in handles.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                killed.append(rank)
            os.close(handle)
        return killed


@dataclass
class Reference:
    """What training does that nobody kills: the loss of each step, the state at each checkpoint; and how long it takes."""

    losses: dict[int, str]
    states: dict[int, dict[str, Any]]
    starting_s: float
    training_s: float


def state_of(path: Path) -> dict[str, Any]:
    """Load all of a checkpoint that does not depend on where it stands."""
    manifest = read_manifest(path)
    shared = load_state(manifest)
    lightning = shared["lightning"]
    return {
        "step": lightning["global_step"],
        "schedules": lightning["lr_schedulers"],
        "groups": shared["optimizers"],
        "data": lightning["loops"]["fit_loop"]["state_dict"]["combined_loader"],
        "tensors": load_state_dict(manifest, ""),
        "random": [load_rank_state(manifest, rank) for rank in range(manifest.world_size)],
    }


def first_difference(found: Any, expected: Any, where: str = "") -> str | None:
    """Return where two nested values differ in any bit, None where they do not."""
    if type(found) is not type(expected):
        return where
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"{where}: {sorted(map(str, found.keys() ^ expected.keys()))}"
        return next(filter(None, (first_difference(found[key], expected[key], f"{where}/{key}") for key in expected)), None)
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return where
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (first_difference(one, other, f"{where}/{i}") for i, (one, other) in pairs)), None)
    if isinstance(expected, Tensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape
        return None if same and found.numpy().tobytes() == expected.numpy().tobytes() else where
    same = found.tobytes() == expected.tobytes() if hasattr(expected, "tobytes") else found == expected
    return None if same else where


def train_reference(pool: RankPool, layout: Layout, folder: Path) -> Reference:
    began = time.monotonic()
    run = Run(pool, Job(layout, folder / "checkpoints", folder / "notes", asynchronous=False))
    run.wait_until(lambda: bool(run.noted("started")))
    started = time.monotonic()
    run.finish()
    losses = [dict(map(tuple, run.noted("loss", rank))) for rank in range(layout.ranks)]
    if not all(each == losses[0] and len(each) == STEPS for each in losses):
        raise RuntimeError(f"{layout.name}: the reference did not train\n{(folder / 'notes' / 'log-0').read_text()}")
    states = {found["step"]: found for found in map(state_of, (folder / "checkpoints").iterdir())}
    return Reference(losses[0], states, started - began, time.monotonic() - started)


# ------------------------------------------------------------------------------------------------------------- chains


@dataclass
class Tally:
    """What a layout went through."""

    kills: int = 0
    of_all: int = 0
    in_save: int = 0
    starts: int = 0
    ends: int = 0
    verified: int = 0
    steps: int = 0
    removed: int = 0
    lost_steps: list[int] = field(default_factory=list)
    cycle_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Chain:
    """Starts, kills and checks one training until it has come to its end."""

    def __init__(self, pool: RankPool, layout: Layout, reference: Reference, folder: Path, seed: int, tally: Tally) -> None:
        self._pool, self._layout, self._reference, self._root = pool, layout, reference, folder
        self._seed, self._random, self._tally = seed, random.Random(seed), tally
        self._folder = folder / "checkpoints"
        self._folder.mkdir(parents=True)
        self._newest = 0
        self._num_runs = 0
        self._has_failed = False

    def run(self, kills: int) -> None:
        """Kill ``kills`` times, less where training comes to its end before, or fails; then let it end."""
        for _ in range(kills):
            began = time.monotonic()
            if not self._start(to_be_killed=True) or self._has_failed:
                return
            self._tally.cycle_s.append(time.monotonic() - began)
        self._start(to_be_killed=False)

    def _fail(self, problem: str) -> None:
        self._has_failed = True
        self._tally.failures.append(f"{self._layout.name}, seed {self._seed}, run {self._num_runs}: {problem}")

    def _start(self, *, to_be_killed: bool) -> bool:
        """Start once, and check all; True where it was killed."""
        self._num_runs += 1
        path, step = self._where_to_go_on()
        left = {name for name in os.listdir(self._folder) if name.startswith(".")}
        run = Run(self._pool, Job(self._layout, self._folder, self._root / f"run-{self._num_runs}", path))
        self._tally.starts += 1
        killed = self._kill(run) if to_be_killed else []
        run.finish()
        self._check_run(run, killed, step, left)
        newest = self._check_checkpoints()
        if killed:
            steps_made = max([step, *(at for at, _ in run.noted("loss"))])
            self._tally.lost_steps.append(steps_made - newest)
        return bool(killed)

    def _where_to_go_on(self) -> tuple[str | None, int]:
        """Return what to pass as ``ckpt_path``, and the step that this must lead to."""
        published = {path: load_state(path)["lightning"]["global_step"] for path in self._published()}
        lasts = [path for path in published if path.name.startswith("last")]
        if lasts and self._random.random() < 0.5:
            return "last", published[max(lasts, key=lambda path: path.stat().st_mtime)]
        if published:
            newest = max(published, key=lambda path: published[path])
            return str(newest), published[newest]
        return None, 0

    def _published(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if not path.name.startswith(".")]

    def _kill(self, run: Run) -> list[int]:
        everyone = list(range(self._layout.ranks))
        whom = everyone if self._random.random() < 0.5 else [self._random.choice(everyone)]
        moment = self._random.choices(["starting", "training", "saving", "publishing"], [1, 3, 4, 4])[0]
        is_there = run.wait_until(lambda: all((run.job.notes / f"process-{rank}").exists() for rank in everyone))
        if moment == "starting":
            time.sleep(self._random.random() * self._reference.starting_s)
        elif moment == "training":
            is_there = run.wait_until(lambda: bool(run.noted("started")))
            time.sleep(self._random.random() * self._reference.training_s)
        elif moment == "saving":
            which = self._random.randint(1, 5)
            is_there = run.wait_until(lambda: run.num_saves() >= which)
            time.sleep(self._random.random() * 0.1)
        else:
            which = self._random.randint(1, 5)
            is_there = run.wait_until(lambda: run.num_saves() >= which and run.is_publishing())
            time.sleep(self._random.random() * 0.01)
        had_met = all(run.noted("started", rank) for rank in everyone)
        killed = run.kill(whom) if is_there else []
        if killed:
            self._tally.kills += 1
            self._tally.of_all += killed == everyone
            if not had_met:  # they would wait for the dead as long as the process group's timeout says; launchers end that
                time.sleep(0.2)
                killed += run.kill([rank for rank in everyone if rank not in killed])
        return killed

    def _check_run(self, run: Run, killed: list[int], step: int, left: set[str]) -> None:
        for rank, status in enumerate(run.statuses):
            if rank not in killed and not killed and status != 0:
                self._fail(f"rank {rank} ended with {status}, and nobody was killed\n{self._log_of(run, rank)}")
            if rank not in killed and killed and os.WIFSIGNALED(status):
                self._fail(f"rank {rank} died of signal {os.WTERMSIG(status)}, which was not killed\n{self._log_of(run, rank)}")
        for rank in range(self._layout.ranks):
            for at, loss in run.noted("loss", rank):
                self._tally.steps += 1
                if loss != self._reference.losses[at]:
                    self._fail(f"rank {rank} has the loss {loss} at step {at}, the reference {self._reference.losses[at]}")
            for started_at, _ in run.noted("started", rank):
                if started_at != step:
                    self._fail(f"rank {rank} went on from step {started_at}, not from {step} ({run.job.ckpt_path})")
        if run.noted("started"):
            ((_, there),) = run.noted("started")
            told = " ".join(run.noted("warning"))
            self._tally.removed += len(left)
            for name in left:
                if name in there or f"Removed {self._folder / name}" not in told:
                    self._fail(f"{name} was left by a run that died, and was not removed with a message")
        if not killed:
            self._tally.ends += 1
            if [run.noted("ended", rank) for rank in range(self._layout.ranks)] != [[STEPS]] * self._layout.ranks:
                self._fail("it came to its end before its time")

    def _log_of(self, run: Run, rank: int) -> str:
        return (run.job.notes / f"log-{rank}").read_text()[-3000:]

    def _check_checkpoints(self) -> int:
        """Verify all that is published; return the newest step."""
        newest = 0
        for path in self._published():
            try:
                found = state_of(path)
            except Exception as error:  # whatever it is, it must not be
                self._fail(f"{path.name} does not load: {type(error).__name__}: {error}")
                continue
            self._tally.verified += 1
            newest = max(newest, found["step"])
            difference = first_difference(found, self._reference.states[found["step"]])
            if difference is not None:
                self._fail(f"{path.name}, of step {found['step']}, differs from the reference: {difference}")
        unpublished = [path for path in self._folder.iterdir() if path.name.startswith(".")]
        self._tally.in_save += any(path.suffix == ".partial" for path in unpublished)
        for path in unpublished:
            if is_checkpoint(path):
                self._fail(f"{path.name} passes for a checkpoint")
        if newest < self._newest:
            self._fail(f"the newest checkpoint was of step {self._newest} and is now of step {newest}")
        self._newest = newest
        return newest


def crash(pool: RankPool, layout: Layout, folder: Path, kills: int, seed: int) -> Tally:
    """Kill training on a layout so often, in chains of one to eight kills, and check it."""
    reference = train_reference(pool, layout, folder / "reference")
    tally = Tally()
    generator = random.Random(seed)
    while tally.kills < kills and len(tally.failures) < 10:
        chain_seed = generator.randrange(1 << 30)
        chain = Chain(pool, layout, reference, folder / f"chain-{chain_seed}", chain_seed, tally)
        chain.run(min(kills - tally.kills, generator.randint(1, 8)))
        if not tally.failures:
            shutil.rmtree(folder / f"chain-{chain_seed}")
    return tally


# -------------------------------------------------------------------------------------------------------------- table

HEAD = f"{'layout':14s} {'kills':>5s} {'of all':>6s} {'in save':>7s} {'verified':>8s} {'steps':>6s} {'swept':>5s} " \
       f"{'lost, median (most)':>19s} {'ends':>4s} {'s each':>6s}  failures"  # fmt: skip


def row(layout: Layout, tally: Tally) -> str:
    lost = f"{statistics.median(tally.lost_steps):g} ({max(tally.lost_steps)}) steps" if tally.lost_steps else "-"
    each = statistics.median(tally.cycle_s) if tally.cycle_s else 0.0
    return (
        f"{layout.name:14s} {tally.kills:5d} {tally.of_all:6d} {tally.in_save:7d} {tally.verified:8d} {tally.steps:6d} "
        f"{tally.removed:5d} {lost:>19s} {tally.ends:4d} {each:6.1f}  {len(tally.failures) or 'none'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="in all, shared among the layouts")
    parser.add_argument("--quick", action="store_true", help="some dozens, on fewer layouts; within three minutes")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--only", default="*", help="layouts whose names match")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; kept where a check fails")
    arguments = parser.parse_args()
    layouts = [each for each in LAYOUTS if fnmatch.fnmatch(each.name, arguments.only) and (each.quick or not arguments.quick)]
    kills = min(arguments.kills, 40) if arguments.quick else arguments.kills
    root = Path(tempfile.mkdtemp(prefix="crash-", dir=arguments.folder))
    print(f"{kills} kills, seed {arguments.seed}, in {root}; {STEPS} steps, a checkpoint each {SAVE_EVERY}\n\n{HEAD}")
    results, failures = [], []
    with RankPool(max(each.ranks for each in layouts)) as pool:
        pool.run(import_everything, max(each.ranks for each in layouts))
        for index, layout in enumerate(layouts):
            share = kills * (index + 1) // len(layouts) - kills * index // len(layouts)
            tally = crash(pool, layout, root / str(index), share, arguments.seed + index)
            print(row(layout, tally), flush=True)
            results.append({"layout": layout.name, "seed": arguments.seed + index, **vars(tally)})
            failures += tally.failures
    if arguments.json:
        arguments.json.write_text(json.dumps({"kills": kills, "seed": arguments.seed, "rows": results}, indent=1) + "\n")
    for failure in failures:
        print(f"\n{failure}")
    if failures:
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()

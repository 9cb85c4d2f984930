"""What the processes of ``checkpoint.py`` do: one of them is one rank of one contestant, which saves, trains and loads."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint_machine import MOST_OTHERS, Meter, Row, memory_of, now, others_seconds, own_family, processes
from checkpoint_peers import CONTESTANTS, GPU_CONTESTANTS, Contestant, Saver, State


class Ranks:
    """The processes of a contestant, in step; a group of their own, because peers use the default one in threads."""

    def __init__(self, group: bool = False) -> None:
        import torch.distributed as dist

        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if group or self.world > 1:
            dist.init_process_group("gloo")
        self._group = dist.new_group(backend="gloo") if self.world > 1 else None

    def agree(self, flag: bool = True) -> bool:
        """Return whether all say so, when all have said."""
        import torch
        import torch.distributed as dist

        if self._group is None:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self._group)
        return bool(said)

    def wait_for_quiet(self, patience_s: float) -> None:
        """Wait until others use little of the machine, for so long at most."""
        deadline = now() + patience_s
        quiet = False
        while self.rank == 0 and not quiet and now() < deadline:
            before, start = others_seconds(), now()
            time.sleep(0.3)
            quiet = (others_seconds() - before) / (now() - start) < 0.7 * MOST_OTHERS
        self.agree()


class Save(threading.Thread):
    """One save: begun here, followed in a thread until it is durable."""

    def __init__(self, saver: Saver, contestant: Contestant, path: Path) -> None:
        super().__init__(daemon=True)
        self._contestant, self._path, self._rank = contestant, path, saver.state.rank
        self.path, self.step, self.durable_s = path, saver.state.step, math.nan
        self._saved, self.error = threading.Event(), ""
        self.start_time = now()
        self._pending = saver.save(path)
        self.return_s = now() - self.start_time
        self.start()

    def run(self) -> None:
        try:
            self._pending.done()
            self._saved.set()
            if not self._contestant.durable and (self._rank == 0 or self._contestant.alone):
                fsync_all(self._path, f"rank-{self._rank}" if self._contestant.alone else "*")
            self.durable_s = now() - self.start_time
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
        self._saved.set()

    def fence(self) -> None:
        """Return when tensors may change."""
        if self._pending.fence_is_done:
            self._saved.wait()
        self._pending.fence()

    def finish(self) -> None:
        self.join()
        if self.error:
            raise RuntimeError(self.error)


def fsync_all(path: Path, pattern: str) -> None:
    """Make files and the directories that name them durable."""
    files = [file for file in path.rglob(pattern) if file.is_file()] if path.is_dir() else []
    folders = {path.parent, *(folder for file in files for folder in file.parents if path in (folder, *folder.parents))}
    for each in (*files, *folders):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Rank:
    """One process of a contestant, and what it found."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        contestant = next(each for each in (*CONTESTANTS, *GPU_CONTESTANTS) if each.name == spec["name"])
        self.spec, self.contestant, self.folder = spec, contestant, Path(spec["folder"])
        for module in contestant.modules:
            importlib.import_module(module)
        self.ranks = Ranks(contestant.group)
        self.state = State(spec["mb"], self.ranks.rank, self.ranks.world, device=spec["device"])
        self.settle: Callable[[], None] = torch.cuda.synchronize if spec["device"] == "cuda" else lambda: None
        self.settle()
        self._memory = memory_of(own_family(processes()))
        self.saver = contestant.make(self.state, spec)
        self._count = 0

    def run(self) -> dict[str, Any]:
        found: dict[str, Any] = {"bytes": self.state.num_bytes}
        gc.collect()
        gc.freeze()
        found["idle"] = [self._idle() for _ in range(self.spec["saves"])]
        found["memory"] = [self._idle(memory=True) for _ in range(2)]
        found["training"] = list(self._training()) if self.spec["windows"] else []
        found["load"] = self._loads() if self.contestant.make is not Saver else []
        self.saver.close()
        return found

    def _begin(self) -> Save:
        self._count += 1
        return Save(self.saver, self.contestant, self.folder / f"save-{self._count}")

    def _idle(self, *, memory: bool = False) -> Row:
        gc.collect()
        self.ranks.wait_for_quiet(self.spec["patience"])
        with Meter(memory=memory) as meter:
            self.ranks.agree()
            save = self._begin()
            save.fence()
            snapshot_s = now() - save.start_time
            if self.spec["check"]:
                self.state.advance()  # as soon as it may
            save.finish()
        self._end(save)
        row = {
            "return": save.return_s,
            "snapshot": snapshot_s,
            "durable": save.durable_s,
            "cpu": meter.cpu,
            "others": meter.others,
        }
        return row | ({"memory": meter.peak - self._memory} if memory else {})

    def _training(self) -> Iterator[Row]:
        compute = computation(self.spec, self.ranks.world)

        def step(fence: Callable[[], None] = lambda: None) -> float:
            compute(self.spec["units"])
            start = now()
            fence()
            stalled = now() - start
            self.state.advance()
            self.settle()
            return stalled

        def plain(steps: int) -> float:
            start = now()
            for _ in range(steps):
                step()
                self.ranks.agree()
            return (now() - start) / steps

        plain(1)
        for _ in range(self.spec["windows"]):
            self.ranks.wait_for_quiet(self.spec["patience"])
            with Meter() as meter:
                before = plain(2)
                start = now()
                save = self._begin()
                steps, stall, durable = 0, save.return_s, False
                while steps < 2 or not durable:
                    stall += step(save.fence)
                    steps += 1
                    durable = self.ranks.agree(not save.is_alive())
                took = now() - start
                after = plain(2)
            self._end(save)
            yield {
                "return": save.return_s, "stall": stall, "added": took - steps * (before + after) / 2,
                "durable": save.durable_s, "others": meter.others,
            }  # fmt: skip

    def _end(self, save: Save) -> None:
        """Check a save if asked to, and remove the one before it."""
        save.finish()
        self.ranks.agree()
        if self.spec["check"] and self.contestant.make is not Saver:
            self._load(save)
        self._last = save
        if self.ranks.rank == 0 and self._count > 1:
            shutil.rmtree(self.folder / f"save-{self._count - 1}", ignore_errors=True)
        self.ranks.agree()

    def _loads(self) -> list[Row]:
        rows = []
        for _ in range(2):
            self.ranks.wait_for_quiet(self.spec["patience"])
            with Meter() as meter:
                took = self._load(self._last)
            rows.append({"load": took, "others": meter.others})
        return rows

    def _load(self, save: Save) -> float:
        """Load what was saved over a state that is spoilt first; training goes on from there."""
        took = timed_load(self.saver, save.path, self.ranks, save.step)
        self.state.step = save.step
        return took


def make_cold(path: Path, ranks: Ranks) -> None:
    """Put a checkpoint out of the page cache, and begin together."""
    for file in path.rglob("*") if ranks.rank == 0 else ():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # dirty pages would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    ranks.agree()


def timed_load(saver: Saver, path: Path, ranks: Ranks, step: int) -> float:
    """Load a checkpoint from the disk; return the seconds. A wrong value raises."""
    saver.state.spoil()
    make_cold(path, ranks)
    start = now()
    saver.load(path)
    took = now() - start
    wrong = saver.state.wrong(step)
    if wrong:
        raise RuntimeError(f"{len(wrong)} tensors do not hold what they held when they were saved: {', '.join(wrong[:3])} …")
    return took


def computation(spec: dict[str, Any], world: int) -> Callable[[int], None]:
    """Return what stands for a forward and backward pass: so many matrix products, on all cores or on the GPU."""
    import torch

    gpu = spec["device"] == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b, out = (torch.ones(size, size, dtype=dtype, device=spec["device"]) for _ in range(3))

    def compute(units: int) -> None:
        for _ in range(units):
            torch.mm(a, b, out=out)
        if gpu:
            torch.cuda.synchronize()

    return compute


def calibrate(spec: dict[str, Any]) -> float:
    """Return the seconds of one unit of compute while all ranks compute."""
    ranks = Ranks()
    compute = computation(spec, ranks.world)
    times = []
    for _ in range(9):
        ranks.agree()
        start = now()
        compute(8)
        times.append((now() - start) / 8)
    return statistics.median(times[2:])


def other_layout(spec: dict[str, Any]) -> dict[str, list[Row]]:
    """Save rows on all ranks; load columns on all of them, and the whole on the first while the others wait."""
    rank = Rank(spec)
    ranks, path = rank.ranks, rank.folder / "rows"
    Save(rank.saver, rank.contestant, path).finish()
    ranks.agree()
    found: dict[str, list[Row]] = {}
    for layout in ("columns", "whole"):
        takes_part = layout == "columns" or ranks.rank == 0
        if takes_part:
            cut = (ranks.rank, ranks.world) if layout == "columns" else (0, 1)
            saver = rank.contestant.make(State(spec["mb"], *cut, columns=True), spec)
        found[layout] = []
        for _ in range(2):
            ranks.wait_for_quiet(spec["patience"])
            took = 0.0
            with Meter() as meter:
                if takes_part:
                    took = timed_load(saver, path, ranks, 0)
                else:
                    make_cold(path, ranks)
            ranks.agree()
            found[layout].append({"load": took, "others": meter.others})
    return found


def pcie(spec: dict[str, Any]) -> float:
    """Return the bytes per second from the GPU into pinned memory."""
    import torch

    source, target = torch.ones(1 << 30, dtype=torch.uint8, device="cuda"), torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = now()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(now() - start)
    return (1 << 30) / min(times)


TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "contestant": lambda spec: Rank(spec).run(),
    "calibrate": calibrate,
    "other layout": other_layout,
    "pcie": pcie,
}


def work(text: str) -> None:
    """Be one rank: do what the specification says, write what was found, and end whatever else was started here."""
    import torch

    def die_with_parent(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    warnings.filterwarnings("ignore")
    threading.Thread(target=die_with_parent, args=(os.getppid(),), daemon=True).start()
    spec = json.loads(text)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    try:
        found = TASKS[spec["task"]](spec)
        Path(f"{spec['result']}-{os.environ['RANK']}").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # not by the interpreter: some contestants leave threads that it would wait for

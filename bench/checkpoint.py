"""Checkpoints: what a save costs the training that goes on, and how soon it is durable, against every peer that PyPI has.

1 GB in 300 tensors (parameters and Adam moments). A contestant runs in fresh processes, in each round after all the others:
  1. idle: saves one after the other, nothing else to do: durable, CPU seconds; the first save is told apart. Then memory, in
     saves of its own, because to look at it takes time.
  2. training: steps of one second of compute on all cores, the fence, an update in place of the whole state. Steps with a
     save under way, until it is durable, against as many steps before and after it: return, stall, added.
  3. load: files put out of the page cache, into the tensors of the training; the values are checked.
Durable means that files and directories are fsynced; where a contestant does not, we do it behind it, and count it. CPU is
that of all threads and child processes; memory is anonymous and shared, beyond the state. Python's garbage collector looks at
nothing that was there before the first save, as is usual in pretraining. Rows during which other programs used more than half
a CPU are dropped when enough remain. What the disk can do (O_DIRECT, 2 threads, 16 MiB) is measured in between.

    python bench/checkpoint.py [--quick] [--json FILE] [--only PATTERN ...] [--check] [--mb MB] [--ranks 1 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from checkpoint_machine import MOST_OTHERS, Row, disk_rates, now
from checkpoint_peers import CONTESTANTS, GPU_CONTESTANTS, Contestant, shapes
from checkpoint_ranks import work

ENOUGH = 3  # rows that must remain for those to be dropped that others disturbed
COMPUTE_S = 1.0
GROWTH_MB = (250, 1000, 2000, 4000, 8000)


def launch(task: str, ranks: int, timeout_s: float, **spec: Any) -> list[Any]:
    """Run a task in fresh processes and return what each of them found; `RuntimeError` tells what went wrong."""
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        text = json.dumps(spec | {"task": task, "result": f"{scratch}/found", "run": uuid.uuid4().hex})
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                with open(f"{scratch}/log-{rank}", "w") as log:
                    command, variables = [sys.executable, __file__, "--work", text], os.environ | address | place
                    # A session of its own, which ends with all that was started in it.
                    children.append(
                        subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                    )
            deadline = now() + timeout_s
            while now() < deadline and None in (codes := [child.poll() for child in children]) and not any(codes):
                time.sleep(0.05)
        finally:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        for rank, code in enumerate(codes):
            if code:
                raise RuntimeError(last_error(Path(f"{scratch}/log-{rank}"), code))
        if None in codes:
            raise RuntimeError(f"not done in {timeout_s:.0f} s")
        return [json.loads(Path(f"{scratch}/found-{rank}").read_text()) for rank in range(ranks)]


def last_error(log: Path, code: int) -> str:
    """Return the line of a log that names the error, or the exit status."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [f"a process ended with {code}"])[-1][:300]


def combined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of several ranks as one: the slowest counts; CPU and memory are those of all."""
    rows: dict[str, Any] = {"bytes": sum(each["bytes"] for each in found)}
    for phase in ("idle", "memory", "training", "load"):
        rows[phase] = [
            {key: (sum if key in ("cpu", "memory") else max)(row[key] for row in same) for key in same[0]}
            for same in zip(*(each[phase] for each in found), strict=True)
        ]
    return rows


@dataclass(frozen=True)
class Spread:
    """A figure's median and range; ``quiet`` of ``total`` rows were undisturbed, and alone count where they are enough."""

    median: float
    low: float
    high: float
    quiet: int
    total: int

    def text(self, scale: float) -> str:
        digits = 0 if scale * self.median >= 10 else 1 if scale == 1e3 else 2
        return f"{scale * self.median:.{digits}f} [{scale * self.low:.{digits}f}..{scale * self.high:.{digits}f}]"


def spread(rows: Sequence[Row], key: str) -> Spread | None:
    """Return a figure of the rows that others did not disturb, of all where too few of these remain."""
    quiet = [row[key] for row in rows if row["others"] <= MOST_OTHERS]
    values = quiet if len(quiet) >= min(ENOUGH, len(rows)) else [row[key] for row in rows]
    return Spread(statistics.median(values), min(values), max(values), len(quiet), len(rows)) if values else None


#: figure -> its phase, head, and the factor to its unit
COLUMNS = {
    "return": ("", "return ms", 1e3),
    "stall": ("training", "stall ms", 1e3),
    "added": ("training", "added ms", 1e3),
    "snapshot": ("idle", "fence at once ms", 1e3),
    "cpu": ("idle", "CPU s", 1.0),
    "durable": ("idle", "durable s", 1.0),
    "durable in training": ("training", "in training s", 1.0),
    "memory": ("memory", "memory MB", 1e-6),
    "load": ("load", "load s", 1.0),
}
TABLES = list(COLUMNS)[:5], list(COLUMNS)[5:]


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, Spread]:
    """Return the figures of a contestant from its runs; the first save of each process is left out."""
    idle = [row for run in runs for row in run["idle"][1:]]
    memory, training, loads = ([row for run in runs for row in run[phase]] for phase in ("memory", "training", "load"))
    found = {key: spread({"idle": idle, "memory": memory, "training": training, "load": loads}[phase], key.split()[0])
             for key, (phase, _, _) in COLUMNS.items() if phase}  # fmt: skip
    found["return"] = spread(idle + training, "return")
    return {key: each for key, each in found.items() if each is not None}


def print_tables(title: str, runs: dict[str, list[dict[str, Any]]], errors: dict[str, str]) -> None:
    """Print a line for each contestant: what training sees, then what goes on behind it."""
    for table in TABLES:
        heads = "".join(f"{COLUMNS[key][1]:>20}" for key in table)
        print(f"\n{title}\n{'contestant':<50}{heads}{'first: s / CPU s' if table is TABLES[1] else '':>20}{'quiet rows':>12}")
        for name, found in runs.items():
            spreads = figures(found)
            cells = "".join(f"{spreads[key].text(COLUMNS[key][2]) if key in spreads else '':>20}" for key in table)
            first = [f"{statistics.median(run['idle'][0][key] for run in found):.2f}" for key in ("durable", "cpu")]
            quiet, total = (sum(getattr(spreads[key], of) for key in table if key in spreads) for of in ("quiet", "total"))
            print(f"{name:<50}{cells}{' / '.join(first) if table is TABLES[1] else '':>20}{f'{quiet} of {total}':>12}")
    for name, error in errors.items():
        print(f"{name:<50} failed: {error}")
    for contestant in CONTESTANTS:
        if contestant.note and contestant.name in runs:
            print(f"{contestant.name}: {contestant.note}")
    sys.stdout.flush()


def contest(
    options: argparse.Namespace, folder: Path, contestants: Sequence[Contestant], ranks: int, **more: Any
) -> dict[str, list[dict[str, Any]]]:
    """Let the contestants run in turns and print their table."""
    spec = {"mb": options.mb, "saves": 4, "windows": 1 if options.quick else 2, "device": "cpu", **more}
    spec |= {"patience": options.patience, "check": options.check, "pool_bytes": options.pool_mb * 2**20 // ranks}
    units = max(1, round(COMPUTE_S / max(launch("calibrate", ranks, 120, **spec))))
    runs: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    errors: dict[str, str] = {}
    for turn in range(options.rounds):
        for contestant in (*contestants[turn:], *contestants[:turn]):
            if contestant.name in errors:
                continue
            print(f"round {turn + 1} of {options.rounds}: {contestant.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                try:
                    found = launch("contestant", ranks, 600, **spec, name=contestant.name, folder=own, units=units)
                    runs[contestant.name].append(combined(found))
                except RuntimeError as error:
                    errors[contestant.name] = str(error)
        options.disk.append(disk_rates(folder, 2**30))
    many = f"{ranks} process{'es' if ranks > 1 else ''}"
    print_tables(f"{many}, {spec['mb']} MB, {spec['device']}: medians [ranges]", runs, errors)
    return dict(runs)


# ------------------------------------------------------------------------------------------------------------ bars


@dataclass(frozen=True)
class Bar:
    """What a figure may be at most, and what that was taken from. ``disk_s``: what the disk alone takes, idle."""

    figure: str
    found: Spread
    most: float
    source: str
    unit: str = "s"
    disk_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.found.median <= self.most

    def line(self) -> str:
        scale = {"s": 1.0, "ms": 1e3, "MB": 1e-6}[self.unit]
        unsure = ", too noisy to tell" if self.found.low <= self.most <= self.found.high else ""
        if self.most < self.disk_s and not self.ok:
            unsure = f", the disk alone: {self.disk_s:.2f} s"
        bar = f"{scale * self.most:.{2 if self.unit == 's' else 0}f} {self.unit}"
        verdict = ("ok" if self.ok else "MISSED") + unsure
        return f"{self.figure:<42}{self.found.text(scale):>22} {self.unit:<2}  bar {bar:>9}   {verdict:<30} {self.source}"


def bars_of(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace, ranks: int) -> list[Bar]:
    """Hold our figures against the bars and the best peers'."""
    ours, num_bytes = figures(runs["kenotron"]), runs["kenotron"][0]["bytes"]
    kinds = {each.name: each.kind for each in CONTESTANTS}
    peers = {name: figures(found) for name, found in runs.items() if kinds[name] in ("sync", "async")}
    write, read = (statistics.median(rates) for rates in zip(*options.disk, strict=True))

    asynchronous = [name for name in peers if kinds[name] == "async"]
    dcp = [name for name in peers if name.startswith("dcp.")]

    def best(
        figure: str, text: str, key: str, share: float, among: Iterable[str] = peers, unit: str = "s", disk: float = math.inf
    ) -> list[Bar]:
        found = {name: peers[name][key].median for name in among if key in peers[name]}
        name = min(found, key=lambda name: found[name], default="")
        if not name:
            return []
        source = f"{share} × {text}: {found[name] * (1e3 if unit == 'ms' else 1):.3g} {unit}, {name}"
        return [Bar(figure, ours[key], share * found[name], source, unit, num_bytes / disk)]

    pool = options.pool_mb * 2**20 + ranks * 20e6
    bars = [
        Bar("time until save returns", ours["return"], 0.010, "", "ms"),
        Bar("stall of training", ours["stall"], 0.020, "return and fence, 1 s of compute between", "ms"),
        *best("training time added", "best peer's", "added", 0.25, unit="ms"),
        *best("time until durable", "best peer's", "durable", 0.6, disk=write),
        *best("time until durable", "best asynchronous peer's", "durable", 0.35, asynchronous, disk=write),
        Bar("time until durable", ours["durable"], num_bytes / write / 0.75, f"75 % of the disk's {write / 1e9:.2f} GB/s"),
        *best("CPU seconds", "best asynchronous peer's", "cpu", 0.25, asynchronous),
        Bar("memory beyond the state", ours["memory"], pool, "pool + 20 MB a rank", "MB"),
        *best("load, same layout", "best dcp.load", "load", 0.5, dcp, disk=read),
        Bar("load, same layout", ours["load"], num_bytes / read / 0.7, f"70 % of the disk's {read / 1e9:.2f} GB/s"),
    ]
    return bars


def other_layout_bars(options: argparse.Namespace, folder: Path) -> list[Bar]:
    """Load what 4 processes saved by rows: whole on one, by columns on 4. Ours against DCP."""
    names = ("kenotron, synchronous save", "dcp.save, t2")
    rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
    spec = {"mb": options.mb, "patience": options.patience, "device": "cpu", "pool_bytes": 0}
    for turn in range(options.rounds):
        for name in names:
            print(f"round {turn + 1} of {options.rounds}: other layouts, {name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                found = launch("other layout", 4, 600, **spec, name=name, folder=own)
            for layout in found[0]:
                for same in zip(*(each[layout] for each in found), strict=True):
                    rows[name, layout].append({key: max(row[key] for row in same) for key in same[0]})
        options.disk.append(disk_rates(folder, 2**30))
    read = statistics.median(rate for _, rate in options.disk)
    num_bytes = sum(4 * math.prod(shape) for shape in shapes(options.mb).values())
    bars = []
    for layout, figure in (("whole", "load, rows of 4 → whole on 1"), ("columns", "load, rows of 4 → columns on 4")):
        ours, theirs = (spread(rows[name, layout], "load") for name in names)
        assert ours is not None and theirs is not None
        source = f"0.5 × dcp.load's {theirs.text(1.0)}"
        bars.append(Bar(figure, ours, theirs.median / 2, source, disk_s=num_bytes / read))
        bars.append(Bar(figure, ours, num_bytes / read / 0.7, f"70 % of the disk's {read / 1e9:.2f} GB/s"))
    return bars


def growth(options: argparse.Namespace, folder: Path) -> dict[int, Any]:
    """Print how our figures grow from 0.25 to 8 GB, as far as memory and disk suffice."""
    found: dict[int, dict[str, Spread]] = {}
    for size in GROWTH_MB:
        memory = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) / 1e3
        room = shutil.disk_usage(folder).free / 1e6
        if memory < 1.3 * size + 2000 or room < 2.5 * size:
            print(f"{size} MB skipped: {memory:.0f} MB of memory and {room:.0f} MB of disk are free")
            continue
        own = argparse.Namespace(**{**vars(options), "mb": size, "rounds": 1})
        runs = contest(own, folder, [CONTESTANTS[0]], 1)
        if "kenotron" not in runs:
            break
        found[size] = figures(runs["kenotron"])
    if len(found) > 1:
        low, high = min(found), max(found)
        grown = []
        for key, (_, head, scale) in COLUMNS.items():
            small, large = scale * found[low][key].median, scale * found[high][key].median
            grown.append(f"{head} {small:.3g} → {large:.3g} ({large / small:.1f} ×)")
        print(f"\nfrom {low} to {high} MB ({high / low:.0f} ×): {', '.join(grown)}", flush=True)
    return {size: {key: each.median for key, each in line.items()} for size, line in found.items()}


def gpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Print the table for 10 GB on a GPU, against DCP's pinned memory and what PCIe carries. The pool holds all of it."""
    import torch

    if not torch.cuda.is_available():
        print("\nno GPU here: the rows with tensors on a device are skipped")
        return {}
    size = 1000 if options.quick else 10000
    rate = launch("pcie", 1, 120, device="cuda")[0]
    own = argparse.Namespace(**{**vars(options), "mb": size, "pool_mb": size})
    runs = contest(own, folder, GPU_CONTESTANTS, 1, device="cuda")
    for name, found in runs.items():
        snapshot = figures(found)["snapshot"].median
        print(f"{name}: snapshot at {found[0]['bytes'] / snapshot / rate:.0%} of PCIe's {rate / 1e9:.1f} GB/s")
    return {"pcie": rate, "runs": runs}


# ------------------------------------------------------------------------------------------------------------ main


def chosen(options: argparse.Namespace) -> list[Contestant]:
    """Return the contestants that were asked for and are installed; say how to install the others."""
    found = []
    for each in CONTESTANTS:
        wanted = any(fnmatch.fnmatch(each.name, pattern) for pattern in options.only) if options.only else True
        if not wanted or (options.quick and not options.only and not each.quick):
            continue
        if each.pip and importlib.util.find_spec(each.modules[0].split(".")[0]) is None:
            print(f"{each.name}: not installed; pip install {each.pip}")
            continue
        found.append(each)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the strongest peers, one round, one process")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--only", nargs="+", default=[], help="contestants whose name matches one of these patterns")
    parser.add_argument(
        "--check", action="store_true", help="load and compare after every save, with an update behind each fence"
    )
    parser.add_argument("--mb", type=int, default=1000, help="size of the state")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="a table for each number of processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-mb", type=int, default=256, help="our staging pool, of all ranks together")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds to wait for a quiet machine before a row")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write: on the disk that is to be measured")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
    if options.quick:
        options.rounds, options.ranks, options.patience = 1, [1], 1.0
    contestants, ok = chosen(options), True
    everything: dict[str, Any] = {}
    options.disk = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder.resolve(), prefix=".checkpoint-") as text:
        folder = Path(text)
        options.disk.append(disk_rates(folder, 2**30))
        for ranks in options.ranks:
            runs = everything[f"{ranks} ranks"] = contest(options, folder, contestants, ranks)
            if "kenotron" in runs:
                bars = bars_of(runs, options, ranks)
                print("", *(bar.line() for bar in bars), sep="\n", flush=True)
                ok &= all(bar.ok for bar in bars)
            elif "kenotron" in (each.name for each in contestants):
                print("the engine did not run: no bar can be judged")
                ok = False
        if not options.quick and not options.only:
            try:
                bars = other_layout_bars(options, folder)
                print("", *(bar.line() for bar in bars), sep="\n", flush=True)
                ok &= all(bar.ok for bar in bars)
            except RuntimeError as error:
                print(f"loads on other layouts failed: {error}")
                ok = False
            everything["growth"] = growth(options, folder)
        if not options.only:
            everything["gpu"] = gpu(options, folder)
    write, read = zip(*options.disk, strict=True)
    for name, rates in (("writes", write), ("reads", read)):
        print(f"the disk {name} {statistics.median(rates) / 1e9:.2f} GB/s [{min(rates) / 1e9:.2f}-{max(rates) / 1e9:.2f}]")
    if options.json:
        options.json.write_text(json.dumps(everything | {"disk": options.disk}, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

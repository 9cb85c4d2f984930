"""``kenotron compare``: one training under several strategies, as a table, a picture and rows of JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kenotron.compare.job import KEPT, Job
from kenotron.compare.run import PrepareError, Run, compare
from kenotron.compare.strategies import check_spec

#: Exit codes: all strategies ran; some did not; nothing could be compared.
DONE, SOME_FAILED, NOTHING = 0, 1, 2


def run(options: argparse.Namespace) -> int:
    """Compare, print the table, write what was asked for, and return the exit code."""
    with _folder(options.scratch) as folder:
        try:
            strategies = list(dict.fromkeys(options.strategies))
            for strategy in strategies:
                check_spec(strategy)
            job = job_of(options, folder)
            total = options.repeats * len(strategies)
            done = iter(range(1, total + 1))
            rows = compare(
                job,
                strategies,
                repeats=options.repeats,
                timeout_s=options.timeout,
                on_run=lambda repeat, one: _tell(next(done), total, one),
            )
        except (PrepareError, ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return NOTHING
        except SystemExit as end:  # jsonargparse has told what is wrong with the configuration
            return int(end.code or 0)
    _print(rows, job)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot is not None:
        _draw(rows, options.plot, job)
    ran = [row for row in rows if row["reason"] is None]
    return DONE if len(ran) == len(rows) else SOME_FAILED if ran else NOTHING


@contextlib.contextmanager
def _folder(scratch: str | None) -> Iterator[Path]:
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kenotron-compare-", dir=scratch) as made:
        yield Path(made)


# ---- What is trained ------------------------------------------------------------------------------------------------


def job_of(options: argparse.Namespace, folder: Path) -> Job:
    """Return what the options say should be trained.

    Raises:
        ValueError: they contradict each other, or the configuration is none.
    """
    common: dict[str, Any] = {"folder": str(folder), "steps": options.steps}
    if options.config is None:
        trainer = {} if options.accelerator is None else {"accelerator": options.accelerator}
        seed = 1 if options.seed is None else options.seed
        devices = options.devices or 1
        return Job(**common, model=options.model, data=options.data, devices=devices, seed=seed, trainer=trainer)
    if options.model is not None or options.data is not None:
        raise ValueError("--config says what is trained, and --model and --data say it too. Give one of both.")
    config = yaml.safe_load(Path(options.config).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{options.config} is no configuration: a mapping with model, data and trainer.")
    trainer = {name: value for name, value in (config.get("trainer") or {}).items() if name in KEPT and value is not None}
    if options.accelerator is not None:
        trainer["accelerator"] = options.accelerator
    devices = options.devices or (config.get("trainer") or {}).get("devices") or 1
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"the trainer's devices are {devices!r}. Say by --devices how many processes there should be.")
    seed = options.seed if options.seed is not None else config.get("seed_everything", 1)
    seed = 1 if isinstance(seed, bool) or not isinstance(seed, int) else seed
    _check_keys(options.config)
    path = folder / "config.yaml"
    sections = {name: config[name] for name in ("model", "data", "optimizer", "lr_scheduler") if config.get(name) is not None}
    path.write_text(yaml.safe_dump({"seed_everything": seed, **sections}, sort_keys=False))
    return Job(**common, config=str(path), devices=devices, seed=seed, trainer=trainer)


def _check_keys(config: str) -> None:
    """End with exit code 2 where the configuration has keys that nobody knows."""
    from kenotron.cli.fit import check_config, import_from_here

    import_from_here()
    check_config(config)


# ---- What came of it ------------------------------------------------------------------------------------------------


def _tell(number: int, total: int, one: Run) -> None:
    found = f"{one.figures['losses'][-1]:.6f}" if one.reason is None else f"can't run: {one.reason[:120]}"
    print(f"[{number}/{total}] {one.strategy}: {'loss ' if one.reason is None else ''}{found}", file=sys.stderr, flush=True)


def _print(rows: Sequence[Mapping[str, Any]], job: Job) -> None:
    per = "tokens/s" if has_tokens(rows) else "samples/s"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("strategy", overflow="fold")
    for name in ("loss", "difference", per, "peak memory", "checkpoint stall", "checkpoint", "load"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(escape(row["strategy"]), *(escape(text) for text in cells(row)))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
    for row in rows:
        if row["reason"] is not None:
            print(f"{row['strategy']} can't run here: {row['reason']}")
        elif row["load_error"] is not None:
            print(f"{row['strategy']} can't load its checkpoint: {row['load_error']}")
    print(f"{job.steps} steps on {job.devices} processes, seed {job.seed}; {_repeats(rows)}")


def _repeats(rows: Sequence[Mapping[str, Any]]) -> str:
    most = max((len(row["repeats"]) for row in rows), default=0)
    return "one run each" if most == 1 else f"medians of {most} runs each"


def has_tokens(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether samples are sequences of tokens."""
    return any(row["tokens_per_second"] != row["samples_per_second"] for row in rows)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row's figures as texts, with dashes where there are none."""
    if row["reason"] is not None:
        return ["–"] * 7
    return [
        f"{row['loss']:.6f}",
        "0" if row["loss_difference"] == 0 else f"{row['loss_difference']:+.1e}",
        f"{row['tokens_per_second']:,.0f}",
        _size(row["peak_memory_bytes"]),
        _seconds(row["checkpoint_stall_s"]),
        _size(row["checkpoint_bytes"]),
        _seconds(row["load_s"]),
    ]


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}" if unit == "GB" else f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _draw(rows: Sequence[Mapping[str, Any]], path: str, job: Job) -> None:
    try:
        from kenotron.compare.picture import draw
    except ImportError as error:
        print(f"no picture: {error}. Install it by: pip install 'kenotron[plots]'", file=sys.stderr)
        return
    if any(row["reason"] is None for row in rows):
        draw(rows, Path(path), title=f"{job.steps} steps on {job.devices} processes")

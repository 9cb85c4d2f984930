"""``kenotron plan``: the layouts of a model on so many devices, their memory and speed, before a job is queued."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kenotron import devices
from kenotron.planning import report
from kenotron.planning.layouts import Job
from kenotron.planning.memory import all_ranks, shortage, table
from kenotron.planning.model import ModelSpec
from kenotron.planning.planner import Plan, Tracer, explain, nearest, plan

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}

#: Between two lines of progress in a log.
_TOLD_EVERY_S = 5.0


def run(options: argparse.Namespace) -> int:
    """Plan, print, and write what was asked for. Returns the exit code: 0 something fits, 1 nothing does, 2 bad input."""
    try:
        found = _plan(options)
        print(report.text(found))
        if not found.best:
            print(_shortage(found), file=sys.stderr)
        _write(found, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if found.best else 1


def _plan(options: argparse.Namespace) -> Plan:
    model = ModelSpec.load(options.model)
    job = Job(
        devices=options.devices,
        device=devices.find(options.device),
        seq=options.seq,
        batch=batch_samples(options.batch_tokens, options.seq),
        precision=options.precision,
        memory=None if options.memory_gb is None else options.memory_gb * 1e9,
        compile=options.compile,
        optimizer_states=options.optimizer_states,
        fixed=_fixed(options),
    )
    with _progress() as tell:
        return plan(model, job, top=options.top, traces=Tracer(model, job, tell))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield what tells on stderr how far the search is: over and over on one line of a terminal, in a log now and then."""
    began, shown = time.perf_counter(), sys.stderr.isatty()
    last = began

    def tell(text: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if shown:
            print(f"\r{now - began:4.0f} s: {text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now - last >= _TOLD_EVERY_S:
            print(f"{now - began:4.0f} s: {text}", file=sys.stderr, flush=True)
            last = now

    yield tell
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def batch_samples(text: str, seq: int) -> int:
    """Return the samples of a batch of ``text`` tokens (``4M``, ``4194304``), the nearest number that more divides.

    A power of two near by is taken, since what is a round number of tokens is seldom a whole number of samples.

    Raises:
        ValueError: it is no number of tokens, or less than one sample.
    """
    match = re.fullmatch(r"([0-9][0-9_.,]*)\s*([KMGB]?)", text.strip().upper())
    if match is None:
        raise ValueError(f"--batch-tokens {text!r}: write a number of tokens, such as 4194304, 4M or 512K.")
    tokens = float(match.group(1).replace("_", "").replace(",", "")) * _UNITS[match.group(2)]
    samples = tokens / seq
    if samples < 1:
        raise ValueError(
            f"--batch-tokens {text} is less than one sample of --seq {seq} tokens. Set more tokens, or a shorter --seq."
        )
    if samples == int(samples):
        return int(samples)
    return int(2 ** round(_log2(samples))) if abs(2 ** round(_log2(samples)) / samples - 1) < 0.06 else round(samples)


def _log2(value: float) -> float:
    import math

    return math.log2(value)


def _fixed(options: argparse.Namespace) -> dict[str, Any]:
    wanted = {
        "tp": options.tp, "pp": options.pp, "cp": options.cp, "ep": options.ep, "dp_replicate": options.dp_replicate,
        "zero_stage": options.zero, "schedule": options.schedule, "virtual_stages": options.virtual_stages,
        "microbatch": options.microbatch, "recompute": options.recompute,
    }  # fmt: skip
    fixed = {name: value for name, value in wanted.items() if value is not None}
    if options.sequence_parallel is not None:
        fixed["sequence_parallel"] = options.sequence_parallel == "on"
    return fixed


def _shortage(found: Plan) -> str:
    """Say which rank lacks how much, and what would fit."""
    if found.nearest_miss is None:
        return "No choice could be looked at: the settings that were given do not go together (see above)."
    miss = found.nearest_miss
    assert found.traces is not None
    ranks = [m for m in all_ranks(found.model, found.traces(miss.choice), miss.choice, found.job) if shortage(m, found.job) > 0]
    instead = nearest(found.model, found.job, miss.choice, found.traces) if found.job.fixed else None
    return explain(miss, found.job, instead) + "\n" + table(ranks[:8])


def _write(found: Plan, options: argparse.Namespace) -> None:
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(found), indent=1) + "\n")
        print(f"{options.json}: the plan as JSON")
    if options.yaml and found.best:
        Path(options.yaml).write_text(report.yaml(found.best[0], found.job))
        print(f"{options.yaml}: the first one, for LightningCLI")
    if options.picture and found.best:
        from kenotron.planning.picture import draw

        draw(found, options.picture)
        print(f"{options.picture}: a picture")

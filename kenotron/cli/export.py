"""``kenotron export``, ``kenotron convert`` and ``kenotron checkpoint consolidate``: models from one form into another."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from kenotron.checkpoint import CheckpointError
from kenotron.hf import consolidate as consolidate_checkpoint
from kenotron.hf import export, hf_to_kenotron, kenotron_to_nanotron, nanotron_to_kenotron


def run(options: argparse.Namespace) -> int:
    """Export, say what was written, and return the exit code."""
    started = time.monotonic()
    try:
        out = export(
            options.checkpoint,
            options.out,
            model=options.model,
            config=options.config,
            tokenizer=options.tokenizer,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            max_shard_bytes=int(options.max_shard_gb * 1e9),
        )
    except (ValueError, CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return _tell(out, started)


def convert(options: argparse.Namespace) -> int:
    """Convert, say what was written, and return the exit code."""
    started = time.monotonic()
    try:
        if options.tp < 1:
            raise ValueError(f"--tp {options.tp}: set it to 1 or more.")
        if options.kind == "hf-to-kenotron":
            out = hf_to_kenotron(options.path, options.out, name=options.name)
        elif options.kind == "kenotron-to-hf":
            out = export(options.path, options.out)
        elif options.kind == "nanotron-to-kenotron":
            out = nanotron_to_kenotron(options.path, options.out, name=options.name)
        else:
            out = kenotron_to_nanotron(options.path, options.out, tp=options.tp, rope_interleaved=options.rope_interleaved)
    except (ValueError, CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return _tell(out, started)


def consolidate(options: argparse.Namespace) -> int:
    """Write one file, say how large it is, and return the exit code."""
    started = time.monotonic()
    try:
        out = consolidate_checkpoint(options.checkpoint, options.out, optimizer=options.optimizer)
    except (ValueError, CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size / 1e9:.3g} GB in {time.monotonic() - started:.1f} s")
    return 0


def _tell(out: Path, started: float) -> int:
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e9:.3g} GB in {time.monotonic() - started:.1f} s: {', '.join(file.name for file in files)}")
    return 0

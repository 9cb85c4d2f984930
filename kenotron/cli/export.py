"""``kenotron export``: the model of a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from kenotron.checkpoint import CheckpointError
from kenotron.hf import export


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
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {size / 1e9:.3g} GB in {time.monotonic() - started:.1f} s: {', '.join(file.name for file in files)}")
    return 0

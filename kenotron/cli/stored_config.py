"""The configuration that every checkpoint of ``kenotron fit`` keeps: the whole YAML, as text."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kenotron.checkpoint import CheckpointError, check_torch_file, is_checkpoint, load_state, read_manifest

#: In Lightning's dictionary, beside the loops and the callbacks.
CONFIG_KEY = "kenotron_config"


def run(options: argparse.Namespace) -> int:
    """Print the configuration in a checkpoint, or write it to a file; return the exit code."""
    try:
        text = stored_config(options.path)
        if options.output is not None:
            Path(options.output).write_text(text)
    except (CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.output is None:
        print(text, end="")
    return 0


def stored_config(path: str | os.PathLike[str]) -> str:
    """Return the configuration in a checkpoint: of Kénotron's format, or a file of Lightning's.

    Raises:
        ValueError: it has none.
        CheckpointError: it is damaged, or no checkpoint.
    """
    if Path(path).is_file():
        import torch

        check_torch_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = saved.get(CONFIG_KEY) if isinstance(saved, dict) else None
    else:
        if not is_checkpoint(path) and (Path(path) / "meta.pt").is_file():  # Lightning's sharded ones keep the rest there
            return stored_config(Path(path) / "meta.pt")
        found = load_state(read_manifest(path), allow_pickle=False).get("lightning", {}).get(CONFIG_KEY)
    if not isinstance(found, str):
        raise ValueError(f"{path} holds no configuration: it was not written by kenotron fit. Give its YAML by --config.")
    return found

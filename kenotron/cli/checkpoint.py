"""``kenotron checkpoint``: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kenotron.checkpoint import CheckpointError, FileReport, Manifest, NotACheckpointError, is_checkpoint, read_manifest
from kenotron.checkpoint import merge as merge_parts
from kenotron.checkpoint import verify as verify_checkpoint
from kenotron.checkpoint.format import MANIFEST, unpublished_name
from kenotron.checkpoint.remote import RemoteFolder

#: Exit codes.
WHOLE, DAMAGED, NO_CHECKPOINT = 0, 1, 2


# ---- verify ---------------------------------------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> int:
    """Print what is in each file of a checkpoint and how fast it was read; return the exit code."""
    path: str = options.path
    try:
        report = verify_checkpoint(path, on_file=_print_file)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return NO_CHECKPOINT
    num_bytes = sum(file.num_bytes for file in report.files)
    seconds = sum(file.seconds for file in report.files)
    if report.is_whole:
        print(f"{path} is whole: {len(report.files)} files, {_size(num_bytes)} in {seconds:.1f} s")
        return WHOLE
    print(f"{path} is damaged: {_count(len(report.damages), 'damage')}; load another checkpoint")
    return DAMAGED


def _print_file(file: FileReport) -> None:
    # Of less than a megabyte it would tell of anything but the disk.
    speed = f"{file.num_bytes / file.seconds / 1e9:.2f} GB/s" if file.num_bytes > 1e6 else ""
    verdict = _count(len(file.damages), "damage") if file.damages else "ok"
    print(f"{file.name:<40} {_size(file.num_bytes):>10} {speed:>11}  {verdict}", flush=True)
    for damage in file.damages:
        print(f"    {damage}", flush=True)


# ---- merge ----------------------------------------------------------------------------------------------------------


def merge(options: argparse.Namespace) -> int:
    """Make one checkpoint of the parts of all nodes and print what it holds; return the exit code."""
    parts, path = options.parts, options.path
    try:
        merged = merge_parts(parts, path)
    except (CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return NO_CHECKPOINT
    print(f"{path} holds {_count(len(merged.tensors), 'tensor')} in {_count(len(merged.files), 'file')} of {len(parts)} nodes")
    return WHOLE


# ---- fetch ----------------------------------------------------------------------------------------------------------


def fetch(options: argparse.Namespace) -> int:
    """Bring a checkpoint from a URL and print what has come; return the exit code."""
    try:
        manifest = read_manifest(RemoteFolder(options.url).fetch(options.path, options.name))
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return NO_CHECKPOINT
    print(f"{manifest.path} holds {_count(len(manifest.tensors), 'tensor')}, {_size(sum(manifest.files.values()))}")
    return WHOLE


# ---- ls -------------------------------------------------------------------------------------------------------------


def ls(options: argparse.Namespace) -> int:
    """Print the tensors of a checkpoint, or the checkpoints of a folder; return the exit code."""
    folder = Path(options.path)
    try:
        if is_checkpoint(folder) or not folder.is_dir() or unpublished_name(folder.resolve().name):
            found, show = _describe(read_manifest(folder)), _show
        else:
            found, show = _describe_folder(folder), _show_folder
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return DAMAGED if is_checkpoint(folder) else NO_CHECKPOINT
    except OSError as error:
        print(error, file=sys.stderr)
        return NO_CHECKPOINT
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return WHOLE


def _describe(manifest: Manifest) -> dict[str, Any]:
    tensors = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "num_pieces": len(tensor.pieces),
            "num_bytes": sum(piece.end - piece.begin for piece in tensor.pieces),
        }
        for name, tensor in manifest.tensors.items()
    }
    return _summary(manifest) | {"files": dict(manifest.files), "tensors": tensors, "aliases": dict(manifest.aliases)}


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "path": str(manifest.path),
        "save_id": manifest.save_id,
        "step": _step_of(manifest),
        "world_size": manifest.world_size,
        "node": None if manifest.node is None else manifest.node.to_json(),
        "num_bytes": sum(manifest.files.values()),
        "saved_at": (manifest.path / MANIFEST).stat().st_mtime,
    }


def _step_of(manifest: Manifest) -> int | None:
    """Return the step that the strategy has stored, None where something else has saved."""
    node = manifest.state
    for key in ("lightning", "global_step"):
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, int) else None


def _describe_folder(folder: Path) -> dict[str, Any]:
    """Describe what stands in a folder, the published by their steps; ``NotACheckpointError`` where nothing does."""
    published, unpublished = [], []
    for entry in sorted(folder.iterdir()):
        name = unpublished_name(entry.name)
        if name is not None and entry.is_dir():
            num_bytes = sum(file.stat().st_size for file in entry.iterdir() if file.is_file())
            of = {"checkpoint": name, "num_bytes": num_bytes, "changed_at": entry.stat().st_mtime}
            unpublished.append({"path": str(entry)} | of)
        elif is_checkpoint(entry):
            try:
                published.append(_summary(read_manifest(entry)) | {"problem": None})
            except CheckpointError as error:
                published.append({"path": str(entry), "problem": str(error)})
    if not published and not unpublished:
        raise NotACheckpointError(f"{folder} is no checkpoint and holds none")
    published.sort(key=lambda summary: summary.get("step") or 0)
    return {"path": str(folder), "checkpoints": published, "unpublished": unpublished}


def _show(found: dict[str, Any]) -> None:
    table = _table("tensor", "dtype", "shape", ">pieces", ">size")
    for name, tensor in found["tensors"].items():
        shape = " × ".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(escape(name), tensor["dtype"], shape, str(tensor["num_pieces"]), _size(tensor["num_bytes"]))
    for name, stored in found["aliases"].items():
        table.add_row(escape(name), escape(f"is {stored}"))
    _print(table)
    tensors = found["tensors"].values()
    num_bytes, num_pieces = sum(tensor["num_bytes"] for tensor in tensors), sum(tensor["num_pieces"] for tensor in tensors)
    step = "no step" if found["step"] is None else f"step {found['step']}"
    print(
        f"{_count(len(tensors), 'tensor')} in {_count(num_pieces, 'piece')}, {_size(num_bytes)}; "
        f"{_count(len(found['files']), 'file')}, {_size(found['num_bytes'])}\n"
        f"{_part(found['node'])}{step}, saved by {_count(found['world_size'], 'rank')} {_age(found['saved_at'])} ago, "
        f"save id {found['save_id']}"
    )


def _part(node: dict[str, Any] | None) -> str:
    return "" if node is None else f"the part of node {node['index']} of {node['count']}; "


def _show_folder(found: dict[str, Any]) -> None:
    table = _table("checkpoint", ">step", ">size", ">ranks", ">age")
    for summary in found["checkpoints"]:
        name = escape(Path(summary["path"]).name)
        if summary["problem"] is not None:
            table.add_row(f"{name}\n  {escape(summary['problem'])}", "damaged")
            continue
        step = "" if summary["step"] is None else str(summary["step"])
        age = _age(summary["saved_at"])
        table.add_row(name, step, _size(summary["num_bytes"]), str(summary["world_size"]), age)
    for leftover in found["unpublished"]:
        age = _age(leftover["changed_at"])
        table.add_row(escape(Path(leftover["path"]).name), "unpublished", _size(leftover["num_bytes"]), "", age)
    _print(table)
    if found["unpublished"]:
        print("What is unpublished belongs to a save that is under way, or to one that died; it is never loaded.")


# ---- Words ----------------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """Return a table; ``>`` before a column's name puts it to the right. No name is ever shortened."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if column != name else "left", overflow="fold")
    return table


def _print(table: Table) -> None:
    # In a pipe a line may be as long as it is; rich would wrap it at 80.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(num_bytes: int) -> str:
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size = num_bytes / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 999.95:  # which would be shown as 1000.0
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _age(since: float) -> str:
    age = max(time.time() - since, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= 2 * length:
            return f"{age / length:.0f} {unit}"
    return f"{age:.0f} s"

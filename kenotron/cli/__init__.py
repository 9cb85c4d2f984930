"""The command line: ``kenotron checkpoint ls PATH``, ``... verify PATH``, ``... merge OUT PART...``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code of the process.

    Args:
        arguments: those of the command line, without the program's name; None takes them from there.
    """
    options = _parser().parse_args(arguments)
    from kenotron.cli import checkpoint  # imports torch, which takes seconds that no --help should

    if options.action == "ls":
        return checkpoint.ls(options.path, as_json=options.json)
    if options.action == "merge":
        return checkpoint.merge(options.parts, options.path)
    return checkpoint.verify(options.path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kenotron", description="Pretraining of large transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checkpoint = commands.add_parser("checkpoint", help="look into checkpoints", description="Look into checkpoints.")
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser(
        "ls",
        help="list what a checkpoint holds, or the checkpoints of a folder",
        description="List what a checkpoint holds, or the checkpoints of a folder. Reads manifests only.",
    )
    ls.add_argument("path", metavar="PATH", help="a checkpoint, or a folder of checkpoints")
    ls.add_argument("--json", action="store_true", help="print it as JSON")
    verify = actions.add_parser(
        "verify",
        help="read all of a checkpoint and tell what is damaged",
        description="Read all of a checkpoint and tell what is damaged. Exit code: 0 if nothing is, 1 if something is, "
        "2 if it is no checkpoint.",
    )
    verify.add_argument("path", metavar="PATH", help="a checkpoint")
    merge = actions.add_parser(
        "merge",
        help="make one checkpoint of the parts of nodes that share no file system",
        description="Make one checkpoint, for any layout to load, of the parts that nodes without a common file system hold.",
    )
    merge.add_argument("path", metavar="OUT", help="the checkpoint to make")
    merge.add_argument("parts", metavar="PART", nargs="+", help="the directory of each node, all of them, in any order")
    return parser

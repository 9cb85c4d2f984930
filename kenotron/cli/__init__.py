"""The command line: ``kenotron --help`` lists the commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from kenotron.cli.parsers import TRAINER_COMMANDS, parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code of the process.

    Args:
        arguments: those of the command line, without the program's name; None takes them from there.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in TRAINER_COMMANDS:  # whose options are those of classes that the configuration names
        found: int = importlib.import_module("kenotron.cli.fit").run(given)
        return found
    options = parser().parse_args(given)
    module, function = options.run.split(":")
    code: int = getattr(importlib.import_module(f"kenotron.cli.{module}"), function)(options)
    return code

"""Run Lightning's own tests with Kénotron, from a checkout that whoever runs this gives, and compare with what is expected.

    python tests/conformance/compare.py <pytorch-lightning>            # all that are listed
    python tests/conformance/compare.py <pytorch-lightning> loops      # of files whose path holds the word

``one_process.txt`` and ``two_processes.txt`` hold the ids that pass, by file; ``differs.txt`` those that do not, with reasons.
Nothing of Lightning's code is here. What is not listed is not compared: it needs GPUs, downloads or a strategy of Lightning's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
#: By list: with how many processes of ours a test must have run (one that makes no Trainer has none).
LISTS = {"one_process.txt": 0, "two_processes.txt": 2}


def listed(path: Path) -> Iterator[str]:
    """Yield the ids in a list: a line for each file, and indented below it one for each of its tests."""
    file = ""
    for line in path.read_text().splitlines():
        if line.startswith("  "):
            yield f"{file}::{line[2:]}"
        elif line and not line.startswith("#"):
            file = line


def differing(path: Path) -> dict[str, str]:
    """Return the reason for each id, or beginning of ids, that does not pass: ``id  reason``."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {line.split("  ", 1)[0]: line.split("  ", 1)[1].strip() for line in lines}


def run(checkout: Path, files: list[str]) -> dict[str, tuple[str, int]]:
    """Return the outcome of each test in some files, and how many processes of ours it had."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes")
        outcomes.touch()
        path = os.pathsep.join((".", str(HERE.parent)))
        environ = {**os.environ, "KENOTRON_OUTCOMES": str(outcomes), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "lightning_conformance", "-p", "no:cacheprovider", "-q", "--tb=short"]
        subprocess.run([*command, *files], cwd=checkout / "tests", env=environ, check=False)
        lines = (line.split(" ", 2) for line in outcomes.read_text().splitlines())
        return {test: (outcome, int(count)) for outcome, count, test in lines}


def problems(expected: Mapping[str, int], reasons: Mapping[str, str], found: Mapping[str, tuple[str, int]]) -> list[str]:
    """Return a line for each test whose outcome is not the expected one."""
    told = []
    for test, count in expected.items():
        outcome, used = found.get(test, ("not run", count))
        if outcome != "passed":
            told.append(f"{test}: {outcome}, expected to pass")
        elif used < count:
            told.append(f"{test}: passed without {count} processes of Kénotron")
    for test, reason in reasons.items():
        outcomes = [outcome for name, (outcome, _) in found.items() if name.startswith(test) and name not in expected]
        if outcomes and all(outcome == "passed" for outcome in outcomes):
            told.append(f"{test}: passed, but is listed as different ({reason})")
    return told


def main(checkout: str, *words: str) -> int:
    expected = {test: count for name, count in LISTS.items() for test in listed(HERE / name)}
    expected = {test: count for test, count in expected.items() if not words or any(word in test for word in words)}
    reasons = {test: why for test, why in differing(HERE / "differs.txt").items() if not words or any(w in test for w in words)}
    files = sorted({test.split("::")[0] for test in [*expected, *reasons]})
    told = problems(expected, reasons, run(Path(checkout), files))
    print("\n".join([*told, f"{len(expected) - len(told)} of {len(expected)} tests are as expected; {len(reasons)} differ."]))
    return bool(told)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

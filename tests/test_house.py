"""Rules of the house that code can hold: who imports whom, the order of application, a light import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from kenotron.parallel import apply

ROOT = Path(__file__).parents[1]

#: floor -> what it may not import
FORBIDDEN = {
    "callbacks_native": ("torch", "lightning", "pytorch_lightning", "kenotron.strategies", "kenotron.callbacks"),
    "kenotron": ("lightning", "pytorch_lightning", "kenotron.strategies", "kenotron.callbacks"),
    "strategies": ("kenotron.callbacks", "kenotron.tasks", "kenotron.cli"),
    "callbacks": ("kenotron.tasks", "kenotron.cli"),
}
#: The face names everything; tasks and the command line stand above.
EXEMPT = (
    "kenotron/__init__.py",
    "kenotron/tasks",
    "kenotron/cli",
    "kenotron/compare",
    "kenotron/strategies",
    "kenotron/callbacks",
)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_dependencies_point_down(floor: str) -> None:
    for path in sorted((ROOT / floor).rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        if floor == "kenotron" and relative.startswith(EXEMPT):
            continue
        climbing = {
            name
            for name in imports_of(path)
            for forbidden in FORBIDDEN[floor]
            if (name == forbidden or name.startswith(forbidden + ".")) and not name.startswith("kenotron.callbacks_native")
        }
        assert not climbing, f"{relative} imports {climbing}"


def test_parallelism_is_applied_in_one_order() -> None:
    source = inspect.getsource(apply.parallelize)
    steps = [
        "_cut(", "_expert_parallel(", "_tensor_parallel(", "_context_parallel(", "_float8(",
        "_recompute_and_compile(", "_data_parallel(", "init.materialize(", "_average_gradients(",
    ]  # fmt: skip
    assert [source.index(step) for step in steps] == sorted(source.index(step) for step in steps)


def run(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_nothing_heavy() -> None:
    heavy = run("import sys, kenotron; print([m for m in ('torch', 'lightning', 'transformers', 'numpy') if m in sys.modules])")
    assert heavy == "[]"


def test_public_names_are_there() -> None:
    assert run("import kenotron; print(all(hasattr(kenotron, name) for name in kenotron.__all__))") == "True"

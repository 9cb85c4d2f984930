"""The lists of Lightning's own tests, and how outcomes are compared with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "conformance"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("compare", FOLDER / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_test_is_listed_twice_or_both_as_passing_and_as_different() -> None:
    compare = load()
    ids = [test for name in compare.LISTS for test in compare.listed(FOLDER / name)]
    reasons = compare.differing(FOLDER / "differs.txt")
    assert len(ids) == len(set(ids))
    assert all("::" in test and test.startswith("tests_pytorch/") for test in ids)
    assert not [test for test in ids if test in reasons]


def test_each_difference_has_a_reason() -> None:
    reasons = load().differing(FOLDER / "differs.txt")
    assert all(len(reason) > 20 for reason in reasons.values())


def test_what_is_not_as_expected_is_told() -> None:
    told = load().problems(
        {"a": 1, "b": 1, "c": 2, "d": 1},
        {"e": "why"},
        {"a": ("passed", 1), "b": ("failed", 1), "c": ("passed", 0), "e[1]": ("passed", 1)},
    )
    assert [line.split(":")[0] for line in told] == ["b", "c", "d", "e"]

"""Every layout of ``bench/parity.py`` trains like one process: those of up to four ranks here, larger ones marked slow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import parity

CASES = [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow or c.ranks > 4 else []) for c in parity.CASES]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def large_pool() -> Iterator[RankPool]:
    with RankPool(16) as processes:
        yield processes


@pytest.mark.parametrize("case", CASES)
def test_layout_trains_like_one_process(
    case: parity.Case,
    pool: RankPool,
    large_pool: RankPool,
    references: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("parity")
    found = parity.run_case(pool if case.ranks <= 4 else large_pool, case, folder, references)
    assert found["loss"] <= parity.LOSS_BAR
    assert found["norm"] <= parity.LOSS_BAR
    assert found["weight"] <= parity.WEIGHT_BAR

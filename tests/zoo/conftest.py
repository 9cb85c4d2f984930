"""``pool``: two processes that stay, in which the specimens train."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kenotron.testing import RankPool

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "strategies")]


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as processes:
        yield processes

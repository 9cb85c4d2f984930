"""Small models for the planner, and processes to train them in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kenotron.testing import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as processes:
        yield processes

"""``pool``: four processes that stay, in which the tests of this folder train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kenotron.testing import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as processes:
        yield processes

"""Training that is killed at random moments: the short form of ``bench/crash.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import crash

pytestmark = pytest.mark.slow  # a minute or two each

LAYOUTS = {layout.name: layout for layout in crash.LAYOUTS}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as processes:
        processes.run(crash.import_everything, 2)
        yield processes


@pytest.mark.parametrize("name", ["one process", "dp 2, zero 1", "pp 2"])
def test_training_that_is_killed_goes_on_from_what_was_published(pool: RankPool, name: str, tmp_path: Path) -> None:
    tally = crash.crash(pool, LAYOUTS[name], tmp_path, kills=4, seed=1)
    assert tally.failures == []
    assert tally.kills == 4
    assert tally.verified > 0
    assert tally.steps > crash.STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp 2, zero 3", "tp 2"])
def test_training_on_further_layouts_that_is_killed_goes_on(pool: RankPool, name: str, tmp_path: Path) -> None:
    tally = crash.crash(pool, LAYOUTS[name], tmp_path, kills=8, seed=2)
    assert tally.failures == []
    assert tally.kills == 8

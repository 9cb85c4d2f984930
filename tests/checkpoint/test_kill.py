"""Training that is killed at random moments: the short form of ``bench/crash.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import crash

LAYOUTS = {layout.name: layout for layout in crash.LAYOUTS}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as processes:
        processes.run(crash.import_everything, 2)
        yield processes


#: The seeds kill one rank of two in a save, and then, in the run that goes on from there, both; from there on it is chance.
@pytest.mark.parametrize(
    ("name", "kills", "seed"),
    [
        ("dp 2, zero 1", 2, 5937),
        *[
            pytest.param(name, kills, seed, marks=pytest.mark.slow)
            for name, kills, seed in (
                ("one process", 4, 1),
                ("dp 2, zero 1", 4, 7263),
                ("pp 2", 4, 8271),
                ("dp 2, zero 3", 8, 12274),
                ("tp 2", 8, 19801),
            )
        ],
    ],
)
def test_training_that_is_killed_goes_on_from_what_was_published(
    pool: RankPool, name: str, kills: int, seed: int, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    tally = crash.crash(pool, layout, tmp_path, kills, seed)
    assert tally.failures == []
    assert tally.kills == kills
    assert layout.ranks == 1 or 0 < tally.of_all < kills
    assert tally.ends > 0
    assert tally.verified > 0
    assert tally.steps > crash.STEPS

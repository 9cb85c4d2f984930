from __future__ import annotations

import pytest

from kenotron import ParallelLayout


def test_auto_takes_what_the_other_axes_leave() -> None:
    layout = ParallelLayout(tp=2, pp=2).resolve(8)
    assert (layout.dp_size, layout.dp_shard, layout.world_size) == (2, 2, 8)


def test_tp_ranks_are_neighbours_and_pp_is_outermost() -> None:
    layout = ParallelLayout(tp=2, pp=2, dp_replicate=2).resolve(16)
    assert layout.coordinates(1).tp == 1
    assert layout.coordinates(8).pp == 1
    assert [layout.dp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_coordinates_and_ranks_are_inverse() -> None:
    layout = ParallelLayout(tp=2, pp=3, dp_replicate=2).resolve(24)
    assert [layout.rank_of(layout.coordinates(rank)) for rank in range(24)] == list(range(24))


def test_the_table_says_who_does_what() -> None:
    lines = str(ParallelLayout(tp=2, pp=2).resolve(4)).splitlines()
    assert lines[0].startswith("pp 2 × tp 2")
    assert len(lines) == 6
    assert "one process" in str(ParallelLayout().resolve(1))


@pytest.mark.parametrize("world", [1, 3, 6])
def test_a_world_that_does_not_fit_is_refused(world: int) -> None:
    with pytest.raises(ValueError, match="does not divide the world"):
        ParallelLayout(tp=2, pp=2).resolve(world)


def test_experts_borrow_ranks() -> None:
    assert ParallelLayout(ep=2).resolve(4).world_size == 4
    with pytest.raises(ValueError, match="does not divide dp_shard"):
        ParallelLayout(ep=3).resolve(4)

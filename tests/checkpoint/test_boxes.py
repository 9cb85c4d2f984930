from __future__ import annotations

import itertools
import random

import pytest
from checkpoint_helpers import tiles

from kenotron.checkpoint.boxes import MAX_CUT_DIMS, Box, find_flaw, intersect, is_inside


def times_held(boxes: list[Box], shape: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    return {
        index: sum(
            all(start <= at < start + extent for at, start, extent in zip(index, box.offset, box.shape, strict=True))
            for box in boxes
        )
        for index in itertools.product(*map(range, shape))
    }


@pytest.mark.parametrize("seed", range(60))
def test_find_flaw_agrees_with_counting_every_index(seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randrange(1, 6) for _ in range(generator.randrange(4)))
    boxes = tiles(shape, generator.randrange(1, 9), generator)
    if seed % 3 == 1:
        boxes.remove(generator.choice(boxes))
    elif seed % 3 == 2:
        boxes.append(generator.choice(boxes))
    generator.shuffle(boxes)
    wrong = {index: times for index, times in times_held(boxes, shape).items() if times != 1}
    flaw = find_flaw(boxes, shape)
    if not wrong:
        assert flaw is None
    else:
        assert flaw is not None
        assert wrong[flaw[0]] == flaw[1]


def test_find_flaw_sees_a_hole_and_an_overlap_of_equal_volume() -> None:
    assert find_flaw([Box((0,), (2,)), Box((1,), (2,))], (4,)) == ((1,), 2)


def test_find_flaw_ignores_empty_boxes() -> None:
    assert find_flaw([Box((0, 0), (2, 3)), Box((1, 1), (0, 2))], (2, 3)) is None
    assert find_flaw([Box((0, 0), (0, 3))], (0, 3)) is None
    assert find_flaw([], (0, 3)) is None
    assert find_flaw([], ()) == ((), 0)


def test_find_flaw_refuses_cuts_along_more_dimensions_than_the_format_allows() -> None:
    dims = MAX_CUT_DIMS + 1
    with pytest.raises(ValueError, match=f"cut along {dims} dimensions"):
        find_flaw([Box((0,) * dims, (1,) * dims)], (2,) * dims)


@pytest.mark.parametrize("seed", range(30))
def test_intersect_holds_the_indices_that_both_boxes_hold(seed: int) -> None:
    generator = random.Random(seed)
    shape = (5, 4, 3)
    a, b = (generator.choice(tiles(shape, 4, generator)) for _ in range(2))
    both = {index for index, times in times_held([a, b], shape).items() if times == 2}
    common = intersect(a, b)
    assert both == {index for index, times in times_held([common] if common else [], shape).items() if times}


def test_is_inside_compares_dimensions_and_bounds() -> None:
    assert is_inside(Box((1, 0), (1, 3)), (2, 3))
    assert not is_inside(Box((2, 0), (1, 3)), (2, 3))
    assert not is_inside(Box((-1, 0), (1, 3)), (2, 3))
    assert not is_inside(Box((0,), (1,)), (2, 3))

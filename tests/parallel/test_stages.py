from __future__ import annotations

import itertools

import pytest
from torch import nn

from kenotron.parallel.stages import Units, balance, find_blocks, find_units, stages_from_user


class Net(nn.Module):
    def __init__(self, blocks: int = 4, vocabulary: int = 100) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(blocks))
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, vocabulary)


def units(costs: list[float], first: int = 1, last: int = 1) -> Units:
    names = tuple(f"u{i}" for i in range(len(costs)))
    return Units(names=names, blocks="b", first_block=first, num_blocks=len(costs) - first - last, costs=tuple(costs))


def test_the_one_list_of_like_layers_is_found() -> None:
    assert find_blocks(Net()) == "body.layers"
    assert find_blocks(Net(), "layers") == "body.layers"


def test_units_are_children_with_parameters_in_order() -> None:
    found = find_units(Net(), "body.layers")
    assert found.names == ("embed", *(f"body.layers.{i}" for i in range(4)), "head")
    assert (found.first_block, found.num_blocks) == (1, 4)


def test_look_ups_cost_nothing_and_the_head_counts() -> None:
    found = find_units(Net(), "body.layers")
    assert found.costs[0] == 0
    assert found.costs[-1] > 800


def test_equal_blocks_are_split_evenly() -> None:
    assert balance(units([0, 1, 1, 1, 1, 0]), 2) == (0, 0, 0, 1, 1, 1)


def test_a_costly_head_gets_fewer_blocks_beside_it() -> None:
    stages = balance(units([0, 1, 1, 1, 1, 1, 1, 3]), 2)
    assert stages.count(1) < stages.count(0)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_costliest_stage_is_as_cheap_as_any_split_can_make_it(num_stages: int) -> None:
    costs = [0.5, 3, 1, 4, 1, 5, 2, 2.5]
    stages = balance(units(costs), num_stages)
    loads = [sum(c for c, s in zip(costs, stages, strict=True) if s == stage) for stage in range(num_stages)]
    best = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))
        for cuts in itertools.combinations(range(2, len(costs) - 1), num_stages - 1)
    )
    assert max(loads) == pytest.approx(best)


def test_blocks_that_stages_do_not_divide_still_fill_every_stage() -> None:
    stages = balance(units([0, 1, 1, 1, 1, 1, 0]), 3)
    assert sorted(set(stages)) == [0, 1, 2]


def test_two_rival_lists_are_not_guessed() -> None:
    net = Net()
    net.other = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4))
    with pytest.raises(ValueError, match="several block lists found"):
        find_blocks(net)


def test_a_user_names_the_units_of_each_stage() -> None:
    found = find_units(Net(), "body.layers")
    names, stages = stages_from_user(found, [["embed", "body.layers.0"], ["body.layers.[1-3]", "head"]])
    assert dict(zip(names, stages, strict=True))["body.layers.0"] == 0
    assert stages.count(1) == 4
    with pytest.raises(ValueError, match="leaves out head"):
        stages_from_user(found, [["embed", "body.layers.0"], ["body.layers.[1-3]"]])
    with pytest.raises(ValueError, match="holds no block"):
        stages_from_user(found, [["embed"], ["body.layers.*", "head"]])

"""Which samples a rank gets: the same ones in each step on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from kenotron.compare.batches import share


def steps(loader: Any, num_ranks: int, *, devices: int = 4, epochs: int = 2, seed: int = 1) -> list[list[set[int]]]:
    """Return for each epoch the samples of each step, over all ranks, after asserting that no rank shares one with another."""
    shared = [
        share(loader, devices=devices, rank=rank, num_ranks=num_ranks, seed=seed, limit=100) for rank in range(num_ranks)
    ]  # fmt: skip
    found = []
    for _ in range(epochs):
        batches = list(zip(*shared, strict=True))
        assert len(batches) == len(shared[0])
        for step in batches:
            assert len({len(batch) for batch in step}) == 1
            assert len({int(row) for batch in step for row in batch}) == sum(map(len, step))
        found.append([{int(row) for batch in step for row in batch} for step in batches])
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_step_has_the_same_samples_on_every_layout(shuffle: bool) -> None:
    loader = DataLoader(torch.arange(53), batch_size=3, shuffle=shuffle)  # type: ignore[arg-type]
    expected = steps(loader, 4)
    for num_ranks in (1, 2):
        torch.manual_seed(num_ranks)  # what else has been drawn does not matter
        assert steps(loader, num_ranks) == expected
    assert [len(step) for step in expected[0]] == [12] * 4
    assert (expected[0] != expected[1]) == shuffle
    assert (steps(loader, 4, seed=2) != expected) == shuffle


def test_a_batch_sampler_of_ones_own_is_kept() -> None:
    batches = [[0, 2], [4, 6], [1, 3], [5, 7]]
    loader = DataLoader(torch.arange(8), batch_sampler=batches)  # type: ignore[arg-type]
    (found,) = steps(loader, 1, devices=2, epochs=1)
    assert found == [{0, 2, 4, 6}, {1, 3, 5, 7}]


def test_a_distributed_sampler_of_ones_own_is_split_anew() -> None:
    data = torch.arange(48)

    def loader(rank: int) -> Any:
        sampler: Any = DistributedSampler(data, num_replicas=4, rank=rank, seed=5)  # type: ignore[arg-type]
        return DataLoader(data, batch_size=3, sampler=sampler)  # type: ignore[arg-type]

    each = [list(share(loader(rank), devices=4, rank=rank, num_ranks=4, seed=1, limit=9)) for rank in range(4)]
    whole = list(share(loader(2), devices=4, rank=0, num_ranks=1, seed=1, limit=9))
    for step, batch in enumerate(whole):
        assert sorted(batch.tolist()) == sorted(row for rank in each for row in rank[step].tolist())


def test_collections_of_loaders_and_other_settings_are_kept() -> None:
    loader = DataLoader(torch.arange(8), batch_size=2, collate_fn=sum)  # type: ignore[arg-type]
    found = share({"a": loader, "b": [loader]}, devices=1, rank=0, num_ranks=1, seed=1, limit=9)
    assert [int(batch) for batch in found["a"]] == [int(batch) for batch in found["b"][0]] == [1, 5, 9, 13]


def test_what_splits_by_itself_is_left() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(4))

    for loader in (DataLoader(Stream()), [1, 2, 3], range(3)):
        given = loader if isinstance(loader, DataLoader | range) else None
        if given is not None:
            assert share(given, devices=2, rank=0, num_ranks=2, seed=1, limit=9) is given


def test_too_little_data_and_uneven_shares_are_told() -> None:
    loader = DataLoader(torch.arange(8), batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fewer than the 3 full batches .* smaller batch size"):
        share(loader, devices=3, rank=0, num_ranks=3, seed=1, limit=9)
    with pytest.raises(ValueError, match="2 data-parallel ranks can't share 3 batches evenly"):
        share(loader, devices=3, rank=0, num_ranks=2, seed=1, limit=9)

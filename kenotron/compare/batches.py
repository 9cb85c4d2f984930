"""The same samples in each step, however few of the ranks are data-parallel.

With ``ddp`` on N processes a step takes N batches of the loader, one each. They are what a step takes on every layout: its D
data-parallel ranks get N/D of them each, put together to one batch. Which samples they are is drawn from the seed alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler


class SharedBatches(Sampler[list[int]]):
    """One data-parallel rank's share of batches that are drawn alike on all ranks.

    Args:
        batches: what the loader would draw in a process of its own.
        num_batches: of a step. rank, num_ranks: which share; the number of ranks divides that of batches.
        seed: of what is drawn. limit: steps that are ever asked for.

    Raises:
        ValueError: not enough batches for a step.
    """

    def __init__(self, batches: Any, *, num_batches: int, rank: int, num_ranks: int, seed: int, limit: int) -> None:
        if num_batches % num_ranks:
            raise ValueError(
                f"{num_ranks} data-parallel ranks can't share {num_batches} batches evenly. Give a number of devices that the "
                "layout's data-parallel size divides."
            )
        self._batches, self._num_batches, self._seed, self._limit = batches, num_batches, seed, limit
        self._own = slice(rank * num_batches // num_ranks, (rank + 1) * num_batches // num_ranks)
        self._epoch = 0
        self._num_steps = len(self._steps(0))
        if not self._num_steps:
            raise ValueError(
                f"the data has fewer than the {num_batches} full batches of a step on {num_batches} devices. Give more "
                "samples, a smaller batch size, or fewer devices."
            )

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._steps(self._epoch)
        self._epoch += 1
        return (list(itertools.chain.from_iterable(step[self._own])) for step in steps)

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        """Return the batches of each step of an epoch; a last step that is not full is dropped."""
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self._seed + epoch)
            random.seed(self._seed + epoch)
            np.random.seed((self._seed + epoch) % 2**32)
            drawn = list(itertools.islice(iter(self._batches), self._limit * self._num_batches))
        random.setstate(states[0])
        np.random.set_state(states[1])
        steps = [drawn[i : i + self._num_batches] for i in range(0, len(drawn), self._num_batches)]
        if steps and (len(steps[-1]) < self._num_batches or len({len(batch) for batch in steps[-1]}) > 1):
            steps.pop()
        return steps


def share(loaders: Any, *, devices: int, rank: int, num_ranks: int, seed: int, limit: int) -> Any:
    """Return loaders that give this rank its share of each step's samples.

    Loaders that split by themselves are left as they are: streams, and whatever is no ``DataLoader``.
    """
    further: dict[str, Any] = {"devices": devices, "rank": rank, "num_ranks": num_ranks, "seed": seed, "limit": limit}
    if isinstance(loaders, dict):
        return {name: share(loader, **further) for name, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(share(loader, **further) for loader in loaders)
    if not isinstance(loaders, DataLoader) or isinstance(loaders.dataset, IterableDataset) or loaders.batch_sampler is None:
        return loaders
    if isinstance(loaders.sampler, DistributedSampler):
        return loaders if num_ranks == devices else _redistributed(loaders, devices, rank, num_ranks)
    batches = SharedBatches(
        loaders.batch_sampler, num_batches=devices, rank=rank, num_ranks=num_ranks, seed=seed, limit=limit
    )  # fmt: skip
    return _like(loaders, batch_sampler=batches)


def _redistributed(loader: DataLoader[Any], devices: int, rank: int, num_ranks: int) -> DataLoader[Any]:
    """Return a loader whose own sampler, which splits over processes, splits over data-parallel ranks instead."""
    old: Any = loader.sampler
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, num_replicas=num_ranks, rank=rank, shuffle=old.shuffle, seed=old.seed, drop_last=old.drop_last
    )
    size = (loader.batch_size or 1) * devices // num_ranks
    return _like(loader, sampler=sampler, batch_size=size, drop_last=loader.drop_last)


def _like(loader: DataLoader[Any], **how: Any) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **how,
    )

"""Processes that run as ranks: they stay from run to run, until they fail, carry too much along, or are told to end."""

from __future__ import annotations

import os
import threading

import pytest

from kenotron import testing
from kenotron.testing import RankPool, RanksFailedError, close_pools


def process_id(num_threads: int = 0) -> int:
    for _ in range(num_threads):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def fail_on(rank: int) -> str:
    if os.environ["RANK"] == str(rank):
        raise RuntimeError("something broke")
    return os.environ["WORLD_SIZE"]


def test_processes_stay_and_are_replaced() -> None:
    with RankPool(2) as pool:
        first = pool.run(process_id, 2)
        assert pool.run(process_id, 2) == first
        assert len(set(first)) == 2
        assert pool.run(process_id, 1, testing._MOST_THREADS) == first[:1]
        second = pool.run(process_id, 2)
        assert not set(second) & set(first)
        close_pools()
        assert not set(pool.run(process_id, 2)) & {*first, *second}


def test_a_failure_names_the_rank_and_the_pool_goes_on() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RanksFailedError, match=r"(?s)fail_on failed on ranks \[1\].*something broke"):
            pool.run(fail_on, 2, 1)
        assert pool.run(fail_on, 2, 5) == ["2", "2"]
        with pytest.raises(ValueError, match="num_ranks=3, but this pool has 2 processes"):
            pool.run(fail_on, 3, 5)

"""The thread behind saves: in the order of the calls, and no longer there than its jobs."""

from __future__ import annotations

import threading

import pytest

from kenotron.checkpoint.worker import Worker


def living() -> int:
    return sum(thread.name == "kenotron-checkpoint" for thread in threading.enumerate())


def test_jobs_run_in_order_and_the_thread_ends_with_the_last() -> None:
    worker, seen, before = Worker(), list[int](), living()
    for _ in range(2):
        for number in range(50):
            worker.run(lambda number=number: seen.append(number))  # type: ignore[misc]
        worker.wait()
        assert living() == before
    assert seen == [*range(50), *range(50)]


def test_a_thread_waits_for_the_job_that_was_announced() -> None:
    worker, begun, before = Worker(), threading.Event(), living()
    with worker.announced():
        assert living() == before + 1
        worker.run(begun.set)
        assert begun.wait(10)
        assert living() == before + 1
    worker.wait()
    assert living() == before


def test_an_announced_job_that_never_comes_holds_nobody() -> None:
    worker = Worker()
    with pytest.raises(KeyError), worker.announced():
        raise KeyError
    worker.wait(10)
    assert not worker._is_running


def test_waiting_has_a_limit() -> None:
    worker, release = Worker(), threading.Event()
    worker.run(lambda: release.wait(10))  # type: ignore[arg-type,return-value]
    worker.wait(0.01)
    assert worker._is_running
    release.set()
    worker.wait()

"""That a process has ended is known at once; that one has failed, or leaves, is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from kenotron import ranks
from kenotron.ranks import RankMonitor


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def until(is_so: Callable[[], object], within_s: float = 20.0) -> float:
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < within_s
        time.sleep(0.01)
    return time.monotonic() - began


def start_rank_1(port: int, then: Callable[[RankMonitor], None]) -> int:
    """Fork a process that is rank 1 and does ``then``."""
    child = os.fork()
    if child == 0:
        try:
            then(RankMonitor(dist.TCPStore("127.0.0.1", port, is_master=False), 1, 2))
        finally:
            os._exit(0)
    return child


def live_on(monitor: RankMonitor) -> None:
    time.sleep(60)


def leave(monitor: RankMonitor) -> None:
    until(lambda: monitor._peers._ranks)
    monitor.close()


def test_a_process_that_is_killed_is_known_to_be_gone(store: dist.TCPStore) -> None:
    monitor = RankMonitor(store, 0, 2)
    child = start_rank_1(store.port, live_on)
    until(lambda: monitor._peers._ranks)
    assert monitor.failure is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert until(lambda: monitor.failure) < 5
    assert monitor.ended() == {1}
    with pytest.raises(RuntimeError, match="rank 1 is gone: its process has ended"):
        monitor.raise_failure()
    assert b"ProcessEnded" in dist.PrefixStore("kenotron/0", store).get("failure")  # for the others
    monitor.close()


def test_a_process_that_leaves_in_order_has_not_failed_and_takes_part_in_nothing(store: dist.TCPStore) -> None:
    monitor = RankMonitor(store, 0, 2)
    child = start_rank_1(store.port, leave)
    os.waitpid(child, 0)
    until(lambda: monitor.ended() == {1})
    time.sleep(1.5 * ranks._PERIOD_S)
    assert monitor.failure is None
    monitor.close()
    assert monitor.ended() == {1}  # also once nobody watches any more


def test_a_process_that_waits_for_a_dead_one_without_end_is_ended(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE_S", dict.fromkeys(ranks._PATIENCE_S, 0.1))
    monitor = RankMonitor(store, 0, 2)
    child = start_rank_1(store.port, live_on)
    until(lambda: monitor._peers._ranks)
    monitor.report_failure(KeyError("no such sample"))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert "rank 1 ends, still waiting (in" in (told := capfd.readouterr().err)
    assert "rank 0 failed: KeyError: 'no such sample'" in told
    monitor.close()


def test_who_handles_an_error_is_given_all_the_time_that_it_takes(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE_S", dict.fromkeys(ranks._PATIENCE_S, 0.0))
    monitor = RankMonitor(store, 0, 2)
    monitor.begin_end()
    dist.PrefixStore("kenotron/0", store).set("failure", "1\nKeyError\n'x'")
    until(lambda: monitor.failure)
    time.sleep(1.5 * ranks._PERIOD_S)  # this process is still here
    assert monitor.report_failure(ValueError("mine")) == ranks.Failure(1, "KeyError", "'x'")
    monitor.close()

"""One store for each start of a job, and an error at once where the port is another program's."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from kenotron import rendezvous
from kenotron.rendezvous import open_store, wait_for_all

SOON = timedelta(seconds=20)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which something listens that answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_is_an_error_on_all_ranks(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.5)
    with pytest.raises(ValueError, match=f"MASTER_PORT={taken}: rank 0 cannot serve there"):
        open_store("127.0.0.1", taken, rank=0, timeout=SOON)
    with pytest.raises(ValueError, match="what answers there is not rank 0 of this run"):
        open_store("127.0.0.1", taken, rank=1, timeout=SOON)


def test_two_runs_at_one_port_are_told() -> None:
    port = free_port()
    store = open_store("127.0.0.1", port, rank=0, timeout=SOON)
    store.set("kenotron/place/1", "elsewhere, process 7")
    with pytest.raises(ValueError, match=r"another process is rank 1 .elsewhere, process 7"):
        open_store("127.0.0.1", port, rank=1, timeout=SOON)


def test_nobody_serves() -> None:
    with pytest.raises(TimeoutError, match=r"nobody serves at MASTER_ADDR=127\.0\.0\.1"):
        open_store("127.0.0.1", free_port(), rank=1, timeout=timedelta(seconds=0.3))


def test_ranks_that_do_not_come_are_named() -> None:
    store = open_store("127.0.0.1", free_port(), rank=0, timeout=SOON)
    with pytest.raises(TimeoutError, match="ranks 1, 2 have not come"):
        wait_for_all(store, 3, 0.1, lambda: None, print)


def test_a_restart_does_not_meet_the_dead_in_the_store_of_the_agent() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent.set("kenotron/offer", json.dumps(["mark of the dead", "127.0.0.1", free_port()]))
    found: list[dist.Store] = []
    options = {"timeout": SOON, "is_agents": True}
    other = threading.Thread(target=lambda: found.append(open_store("127.0.0.1", agent.port, rank=1, **options)))
    other.start()
    own = open_store("127.0.0.1", agent.port, rank=0, **options)
    other.join(20)
    own.set("here", "yes")
    assert found[0].get("here") == b"yes"
    assert not agent.check(["here"])

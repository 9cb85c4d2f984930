"""How the processes of a job find each other: one key-value store, which rank 0 serves, and that belongs to this start alone.

- Where a launcher names an address and a port (Lightning, SLURM, MPI), rank 0 serves there. A port that is taken ends all ranks
  at once: rank 0 cannot serve, and the others find there what is no store, or one in which another process has their place.
- ``torchrun`` serves a store of its own, which outlives its restarts and keeps the addresses of processes that are dead. So
  rank 0 serves another one at a free port, and tells the others through torchrun's where. An offer of an earlier start leads
  nowhere, since its process is dead, and is read again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

_OFFER = "kenotron/offer"
_PLACE = "kenotron/place/{}"
_PAUSE_S = 0.1
#: A server that accepts a connection and says nothing for so long is none of torch's.
_ANSWER_S = 20.0
#: After so long it is told who is waited for.
_TELL_AFTER_S = 60.0
_LOG = logging.getLogger(__name__)


def open_store(address: str, port: int, *, rank: int, timeout: timedelta, is_agents: bool = False) -> dist.Store:
    """Return the store of this job, connected; all ranks call it.

    Args:
        address, port: where rank 0 is to serve. is_agents: torchrun's agent serves a store there already.
        rank: of this process.
        timeout: how long a request to the store may wait.

    Raises:
        ValueError: the port is taken by another program, or serves another run.
        TimeoutError: nobody serves there.
    """
    if is_agents:
        store = _open_own(address, port, rank, timeout)
    elif rank == 0:
        store = _serve(address, port, timeout)
    else:
        store = _join(address, port, timeout)
    _take_place(store, rank, f"{address}:{port}")
    return store


def wait_for_all(
    store: dist.Store, world_size: int, within_s: float, check: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Return when all ranks have opened the store.

    Args:
        within_s: how long that may take. check: called in between; raises where waiting is in vain. say: tells the user.

    Raises:
        TimeoutError: ranks that have not come, by number.
    """
    absent, began, has_told = list(range(world_size)), time.monotonic(), False
    while absent := [rank for rank in absent if not store.check([_PLACE.format(rank)])]:
        check()
        waited_s = time.monotonic() - began
        if waited_s > within_s:
            raise TimeoutError(
                f"ranks {_some(absent)} have not come within {within_s:.0f} s. Were {world_size} processes started?"
            )
        if waited_s > _TELL_AFTER_S and not has_told:
            say(f"Waiting for ranks {_some(absent)} of {world_size} processes, for {waited_s:.0f} s by now.")
            has_told = True
        time.sleep(min(_PAUSE_S, 0.002 + waited_s / 10))


def address_towards(address: str, port: int) -> str:
    """Return under which address others reach this machine: that of the interface by which it reaches ``address``."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket sends nothing by that
            own = str(probe.getsockname()[0])
    except OSError:
        return address
    return address if own.startswith("127.") or own == "::1" else own


def _some(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


def _serve(address: str, port: int, timeout: timedelta) -> dist.Store:
    try:
        return dist.TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(
            f"MASTER_PORT={port}: rank 0 cannot serve there: another program has the port, or it may not be used "
            f"({_line(error)}). Set MASTER_PORT to a free one (torchrun: --master-port), or stop the other run."
        ) from None


def _join(address: str, port: int, timeout: timedelta) -> dist.Store:
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody serves at MASTER_ADDR={address}, MASTER_PORT={port}: {error}") from None
            time.sleep(_PAUSE_S)
            continue
        store = _connected(address, port, timeout)
        if store is not None:
            return store
        raise ValueError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: what answers there is not rank 0 of this run. Another program has the "
            "port: set MASTER_PORT to a free one."
        )


def _connected(address: str, port: int, timeout: timedelta) -> dist.Store | None:
    """Connect to a store; ``None`` where what answers is none. torch waits without a limit for an answer: so a thread does."""
    found: list[dist.Store] = []

    def connect() -> None:
        try:
            found.append(dist.TCPStore(address, port, is_master=False, timeout=timeout))
        except (dist.DistError, RuntimeError) as error:
            _LOG.debug("no store at %s:%s: %s", address, port, error)

    thread = threading.Thread(target=connect, name="kenotron-rendezvous", daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    return found[0] if found else None


def _open_own(address: str, port: int, rank: int, timeout: timedelta) -> dist.Store:
    """Serve, or find, the store of this start through the one of torchrun's agent."""
    agent = _join(address, port, timeout)
    if rank == 0:
        own = dist.TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
        mark = uuid.uuid4().hex
        own.set(_OFFER, mark)
        agent.set(_OFFER, json.dumps([mark, address_towards(address, port), own.port]))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if agent.check([_OFFER]):
            mark, host, own_port = json.loads(agent.get(_OFFER))
            store = _offered(mark, host, own_port, timeout)
            if store is not None:
                return store
        time.sleep(_PAUSE_S)
    raise TimeoutError(f"rank 0 has not told within {timeout.total_seconds():.0f} s where it serves the store of this run")


def _offered(mark: str, host: str, port: int, timeout: timedelta) -> dist.Store | None:
    """Return the store of an offer; ``None`` where it was a dead process's."""
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return None
    store = _connected(host, port, timeout)
    if store is None or not store.check([_OFFER]) or store.get(_OFFER).decode() != mark:
        return None
    return store


def _take_place(store: dist.Store, rank: int, where: str) -> None:
    own = f"{socket.gethostname()}, process {os.getpid()}"
    holder = store.compare_set(_PLACE.format(rank), "", own).decode()
    if holder != own:
        raise ValueError(
            f"at {where} another process is rank {rank} ({holder}; this is {own}). Two runs share the "
            "port: set MASTER_PORT to a free one for each."
        )


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]

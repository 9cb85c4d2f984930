"""Whether the other processes of a job live: one connection of each to rank 0, which the kernel closes when a process ends.

However busy a process is, or stopped, its connections stay; whatever kills it, they end. So nothing is sent at intervals, and
no slow rank is taken for a dead one. A machine that is gone is found by TCP's own probes.

- rank 0 listens; the others connect, with a mark that the job's store holds, and their number.
- who leaves in an orderly way says so first.
- rank 0 sees who has ended. Others see whether rank 0 has, and are told of the rest through the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import uuid
import weakref

import torch.distributed as dist

_KEY = "peers"
_LOG = logging.getLogger(__name__)
_LEAVES = b"leaves\n"
_CONNECT_S = 10.0
#: A machine without an answer for 10 + 3 × 5 s is gone.
_PROBES = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Peers:
    """One rank's connections.

    Args:
        store: the job's. rank: of this process. host: under which others reach this machine; of rank 0.
    """

    def __init__(self, store: dist.Store, rank: int, host: str) -> None:
        self._store, self._rank = store, rank
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, "wake")
        self._said: dict[socket.socket, bytes] = {}  # of each connection what has come that is no whole line yet
        self._ranks: dict[socket.socket, int] = {}
        self._ended: dict[int, bool] = {}  # rank -> whether it had said that it leaves
        self._leaving: set[int] = set()
        self._server: socket.socket | None = None
        self._mark = uuid.uuid4().hex
        self._is_connected = False
        if rank == 0:
            is_dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if is_dual else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual, backlog=1024)
            self._server.setblocking(False)
            self._selector.register(self._server, selectors.EVENT_READ, "server")
            store.set(_KEY, json.dumps([self._mark, host, self._server.getsockname()[1]]))
            self._is_connected = True
        _open.add(self)

    def wait(self, seconds: float) -> None:
        """Look who has ended, for so long, or until ``wake``."""
        if not self._is_connected and self._store.check([_KEY]):
            self._connect()
        for key, _ in self._selector.select(seconds):
            with self._lock:
                self._read(key)

    def wake(self) -> None:
        """Let ``wait`` return; from any thread."""
        self._wake.send(b"x")

    def leave(self) -> None:
        """Say that this rank goes: that its process ends is no accident any more."""
        for connection in [*self._ranks]:
            try:
                connection.send(_LEAVES)
            except OSError:  # it has ended itself
                continue

    def ended(self) -> dict[int, bool]:
        """Return the ranks whose processes have ended, as far as this rank sees it -> whether they had said so."""
        with self._lock:
            for key, _ in self._selector.select(0):
                if key.data != "wake":
                    self._read(key)
            return dict(self._ended)

    def close(self) -> None:
        """Close all connections."""
        for connection in (self._wake, self._woken, *self._said, *([self._server] if self._server else [])):
            connection.close()
        self._selector.close()

    def __del__(self) -> None:
        self.close()

    def _connect(self) -> None:
        self._is_connected = True
        mark, host, port = json.loads(self._store.get(_KEY))
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_S)
            connection.sendall(f"{mark} {self._rank}\n".encode())
        except OSError as error:
            _LOG.warning("No connection to rank 0 at %s:%s (%s): that a rank was killed is noticed late.", host, port, error)
            return
        self._ranks[connection] = 0
        self._watch(connection)

    def _watch(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._said[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ, "peer")

    def _read(self, key: selectors.SelectorKey) -> None:
        connection = key.fileobj
        assert isinstance(connection, socket.socket)
        if key.data == "wake":
            connection.recv(64)
        elif key.data == "server":
            with contextlib.suppress(OSError):  # another thread has accepted it, or it has gone already
                self._watch(connection.accept()[0])
        elif connection in self._said:
            self._hear(connection)

    def _hear(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(256)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said = self._said[connection] + data
        *lines, self._said[connection] = said.split(b"\n")
        for line in lines:
            if connection in self._ranks:
                self._leaving.add(self._ranks[connection])
            elif line.startswith(self._mark.encode() + b" "):
                self._ranks[connection] = int(line.split()[1])
        if not data or len(self._said[connection]) > 256:
            self._selector.unregister(connection)
            connection.close()
            del self._said[connection]
            rank = self._ranks.pop(connection, None)
            if rank is not None:
                self._ended[rank] = rank in self._leaving


_open: weakref.WeakSet[Peers] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process, such as a loader's worker, must not keep the connections of the one that it comes from."""
    for peers in list(_open):
        peers.close()


os.register_at_fork(after_in_child=_close_in_child)

"""Processes that ``mpirun`` starts: who is who comes from its variables, and takes no mpi4py.

Without that each of them would take itself for rank 0 of a run of its own, and all would write into one folder.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping
from typing import NamedTuple

#: rank, size, local rank, local size, and what is the same for all processes of one job: Open MPI; MPICH's Hydra and Intel MPI.
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid", "PMI_PORT", "HYDRA_CONTROL_FD")
_FIRST_PORT, _NUM_PORTS = 20000, 20000


class _Place(NamedTuple):
    rank: int
    size: int
    local_rank: int
    local_size: int


def find_mpi(environ: Mapping[str, str] = os.environ) -> MPIProcesses | None:
    """Return how ``mpirun`` has started this process; ``None`` where it has not, or started it alone.

    Other launchers inside of it, such as torchrun, have the last word.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return None
    for names in (_OPEN_MPI, _HYDRA):
        if all(name in environ for name in names):
            place = _Place(*(int(environ[name]) for name in names))
            return MPIProcesses(place, environ) if place.size > 1 else None
    return None


class MPIProcesses:
    """A cluster environment of Lightning's kind.

    Raises:
        ValueError: ranks are not dealt out node by node, or there are several nodes and no address.
    """

    creates_processes_externally = True

    def __init__(self, place: _Place, environ: Mapping[str, str]) -> None:
        self._place = place
        if place.rank % place.local_size != place.local_rank:
            raise ValueError(
                f"mpirun made rank {place.rank} number {place.local_rank} of {place.local_size} on its node: neighbouring "
                "ranks must share a node. Start with mpirun --map-by slot (Hydra: without -rr), as many processes on each."
            )
        address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
        if place.size > place.local_size and not (address and port):
            raise ValueError(
                f"mpirun started {place.size} processes, {place.local_size} on each node, and MASTER_ADDR={address}, "
                f"MASTER_PORT={port}. Say where rank 0 is: mpirun -x MASTER_ADDR=node0 -x MASTER_PORT=29500 ..."
            )
        job = "/".join([socket.gethostname(), *(environ.get(name, "") for name in _JOB), str(os.getppid())])
        self.main_address = address or "127.0.0.1"
        self.main_port = int(port) if port else _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS

    @staticmethod
    def detect() -> bool:
        return find_mpi() is not None

    def world_size(self) -> int:
        return self._place.size

    def set_world_size(self, size: int) -> None:
        """Nothing: mpirun has."""

    def global_rank(self) -> int:
        return self._place.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: mpirun has."""

    def local_rank(self) -> int:
        return self._place.local_rank

    def node_rank(self) -> int:
        return self._place.rank // self._place.local_size

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise ``ValueError`` unless as many processes were started as the trainer wants."""
        if num_devices * num_nodes != self._place.size:
            raise ValueError(
                f"devices={num_devices}, num_nodes={num_nodes}, and mpirun started {self._place.size} processes, "
                f"{self._place.local_size} on this node. Set devices={self._place.local_size}, "
                f"num_nodes={self._place.size // self._place.local_size}, or start with mpirun -np {num_devices * num_nodes}."
            )

    def teardown(self) -> None:
        """Nothing."""

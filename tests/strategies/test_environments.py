"""Processes of mpirun are ranks of one job."""

from __future__ import annotations

import lightning as L
import pytest

import kenotron
from kenotron.strategies.environments import find_mpi

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_ranks_come_from_the_variables_of_mpirun() -> None:
    found = find_mpi(OPEN_MPI)
    assert found is not None
    assert (found.global_rank(), found.world_size(), found.local_rank(), found.node_rank()) == (3, 4, 1, 1)
    assert (found.main_address, found.main_port) == ("node0", 29500)
    found.validate_settings(num_devices=2, num_nodes=2)
    with pytest.raises(ValueError, match="Set devices=2, num_nodes=2, or start with mpirun -np 1"):
        found.validate_settings(num_devices=1, num_nodes=1)


def test_all_processes_of_a_node_find_the_same_port() -> None:
    one, other = find_mpi(HYDRA), find_mpi({**HYDRA, "PMI_RANK": "0", "MPI_LOCALRANKID": "0"})
    assert one is not None and other is not None
    assert (one.main_address, one.main_port) == (other.main_address, other.main_port)


def test_what_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR"):
        find_mpi({name: value for name, value in OPEN_MPI.items() if name != "MASTER_ADDR"})
    with pytest.raises(ValueError, match="--map-by slot"):
        find_mpi({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0"})


def test_other_launchers_have_the_last_word() -> None:
    assert find_mpi({}) is None
    assert find_mpi({**HYDRA, "PMI_SIZE": "1", "PMI_RANK": "0"}) is None
    assert find_mpi({**HYDRA, "TORCHELASTIC_RUN_ID": "x"}) is None


def test_a_trainer_under_mpirun_knows_its_rank_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HYDRA.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=kenotron.KenotronStrategy(), logger=False)
    assert (trainer.global_rank, trainer.world_size) == (1, 2)
    with pytest.raises(ValueError, match="mpirun started 2 processes"):
        L.Trainer(accelerator="cpu", devices=1, strategy="kenotron", logger=False)

"""``torch.distributed.checkpoint`` through our storage: any state dict, any layout, synchronous and not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from kenotron.checkpoint import (
    ChecksumError,
    EngineSettings,
    LocalTensor,
    is_checkpoint,
    load_state_dict,
    read_manifest,
    remove_leftovers,
    save,
)
from kenotron.checkpoint.dcp import KenotronStorageReader, KenotronStorageWriter
from kenotron.testing import RankPool, RanksFailedError

SMALL = EngineSettings(pool_bytes=1 << 16, slot_bytes=1 << 14)


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"w": torch.randn(40, 30, generator=generator), "half": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 3)},
        "columns": torch.randn(20, 30, generator=generator).T,
        "scalar": torch.tensor(3.5),
        "step": 17,
        "words": ["a", {"b": 2}],
    }


def zeroed(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return torch.zeros_like(node)
    if isinstance(node, dict):
        return {key: zeroed(value) for key, value in node.items()}
    return [zeroed(value) for value in node] if isinstance(node, list) else None


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_dict_comes_back_in_one_process(asynchronous: bool, tmp_path: Path) -> None:
    path, saved = tmp_path / "a", state()
    writer = KenotronStorageWriter(path, engine=SMALL)
    if asynchronous:
        dcp.async_save(saved, storage_writer=writer, no_dist=True).result()  # type: ignore[union-attr]
    else:
        dcp.save(saved, storage_writer=writer, no_dist=True)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a"]
    assert sorted(child.name for child in path.iterdir()) == ["README.txt", "manifest.json", "shard-00001-of-00001.safetensors"]
    loaded = zeroed(saved)
    dcp.load(loaded, storage_reader=KenotronStorageReader(path), no_dist=True)
    assert equal(loaded, saved)
    assert torch.equal(load_state_dict(path, "")["model.w"], saved["model"]["w"])


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    writer = KenotronStorageWriter(engine=SMALL)
    for value in (1.0, 2.0):
        dcp.save({"w": torch.full((5,), value)}, checkpoint_id=tmp_path / "a", storage_writer=writer, no_dist=True)
    loaded = {"w": torch.zeros(5)}
    dcp.load(loaded, checkpoint_id=tmp_path / "a", storage_reader=KenotronStorageReader(), no_dist=True)
    assert torch.equal(loaded["w"], torch.full((5,), 2.0))
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("")
    with pytest.raises(dcp.api.CheckpointException, match="is not a checkpoint"):
        dcp.save({"w": torch.zeros(1)}, storage_writer=KenotronStorageWriter(tmp_path), no_dist=True)
    assert (tmp_path / "precious.txt").exists()


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dcp.save({"w": torch.ones(100)}, storage_writer=KenotronStorageWriter(path), no_dist=True)
    shard = path / "shard-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(dcp.api.CheckpointException, match="tensor w"):
        dcp.load({"w": torch.zeros(100)}, storage_reader=KenotronStorageReader(path), no_dist=True)
    with pytest.raises(ChecksumError):
        load_state_dict(path, "")


def test_weights_of_a_training_are_read_by_their_prefix(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    tensors = [LocalTensor.whole("model/w", weight)]
    save(tmp_path / "a", tensors, {"lightning": {}}, rank=0, world_size=1, save_id="s1", aliases={"model/tied": "model/w"})
    loaded = {"w": torch.zeros(4, 3), "tied": torch.zeros(4, 3)}
    dcp.load(loaded, storage_reader=KenotronStorageReader(tmp_path / "a", prefix="model/"), no_dist=True)
    assert torch.equal(loaded["w"], weight)
    assert torch.equal(loaded["tied"], weight)


# ------------------------------------------------------------------------------------------------------------ many ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as workers:
        yield workers


def matrix() -> torch.Tensor:
    return torch.arange(15 * 8, dtype=torch.float32).reshape(15, 8)


def sharded(placements: list[Placement], shape: tuple[int, ...], value: torch.Tensor) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", shape)
    return {"w": distribute_tensor(value, mesh, placements), "same": torch.arange(5.0), "step": 3}


def save_sharded(path: str, placements: list[Placement], shape: tuple[int, ...]) -> None:
    dist.init_process_group("gloo")
    dcp.save(sharded(placements, shape, matrix()), storage_writer=KenotronStorageWriter(path, engine=SMALL))
    dist.destroy_process_group()


def load_sharded(path: str, placements: list[Placement], shape: tuple[int, ...]) -> list[bool]:
    dist.init_process_group("gloo")
    loaded = sharded(placements, shape, torch.zeros(15, 8))
    dcp.load(loaded, storage_reader=KenotronStorageReader(path))
    found = [torch.equal(loaded["w"].full_tensor(), matrix()), bool(loaded["step"] == 3)]
    dist.destroy_process_group()
    return found


def test_sharded_tensors_load_on_other_layouts(pool: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    pool.run(save_sharded, 4, path, [Shard(0), Shard(1)], (2, 2))
    assert len(read_manifest(path).tensors["w"].pieces) == 4
    assert len(read_manifest(path).tensors["same"].pieces) == 1
    for ranks, placements, shape in [(3, [Shard(1)], (3,)), (2, [Replicate()], (2,)), (4, [Shard(0)], (4,))]:
        assert pool.run(load_sharded, ranks, path, placements, shape) == [[True, True]] * ranks


def train_with_fsdp(path: str) -> list[float]:
    """Save in the middle of a training with FSDP2; load into a new one; return by how much they differ."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(torch.ones(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    steps(model, optimizer, 2)
    whole = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(whole, storage_writer=KenotronStorageWriter(path, engine=SMALL))
    steps(model, optimizer, 2)

    again, other = make()
    steps(again, other, 1)
    loaded = {"model": again.state_dict(), "optim": get_optimizer_state_dict(again, other)}
    dcp.load(loaded, storage_reader=KenotronStorageReader(path))
    again.load_state_dict(loaded["model"])
    set_optimizer_state_dict(again, other, loaded["optim"])
    steps(again, other, 2)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    differences = [float((a.full_tensor() - b.full_tensor()).abs().max()) for a, b in pairs]  # type: ignore[attr-defined]
    dist.destroy_process_group()
    return differences


def test_a_training_with_fsdp_goes_on_from_it(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(train_with_fsdp, 2, str(tmp_path / "a")) == [[0.0] * 4] * 2


def save_where_one_rank_fails(path: str) -> None:
    dist.init_process_group("gloo")
    writer = KenotronStorageWriter(path, engine=SMALL)
    if dist.get_rank() == 1:
        writer._write_shard = fail  # type: ignore[method-assign]
    dcp.save(sharded([Shard(0)], (2,), matrix()), storage_writer=writer)


def fail(*args: Any) -> Any:
    raise OSError("the disk of rank 1 is full")


def test_when_a_rank_fails_nothing_is_published(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(RanksFailedError, match="the disk of rank 1 is full"):
        pool.run(save_where_one_rank_fails, 2, str(path))
    assert not is_checkpoint(path)
    assert [leftover.suffix for leftover in remove_leftovers(tmp_path)] == [".partial"]
    assert list(tmp_path.iterdir()) == []

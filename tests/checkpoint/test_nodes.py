from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import forge, leftovers

import kenotron.checkpoint.nodes as nodes_module
from kenotron.checkpoint import (
    Checkpointer,
    CoverageError,
    EngineSettings,
    LocalTensor,
    ManifestDamagedError,
    MismatchError,
    Nodes,
    NotACheckpointError,
    OnOtherNodeError,
    Piece,
    RanksMissingError,
    SaveFailedError,
    SyncShardWriter,
    check_sharing,
    common_path,
    load_into,
    load_rank_state,
    load_state,
    load_state_dict,
    merge,
    read_manifest,
    recover,
    remove_leftovers,
    save,
    verify,
)
from kenotron.checkpoint.nodes import Council, InDoubtError
from kenotron.cli import main

RANKS_OF = ((0, 1), (2, 3))
NODE_OF = (0, 0, 1, 1)


def on_all(work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(rank)`` on four threads; return what each returned or raised."""
    found: list[Any] = [None] * 4

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class Exchange:
    """An all-gather among four threads."""

    def __init__(self) -> None:
        self._slots: list[Any] = [None] * 4
        self._barrier = threading.Barrier(4, timeout=20)

    def of(self, rank: int) -> Callable[[Any], Sequence[Any]]:
        def exchange(own: Any) -> list[Any]:
            self._slots[rank] = own
            self._barrier.wait()
            found = list(self._slots)
            self._barrier.wait()
            return found

        return exchange


def held(rank: int, value: float) -> list[LocalTensor]:
    """Rows of their own on all ranks; halves that a node shares and the other repeats; a replica on all."""
    own = LocalTensor(
        name="model/rows",
        tensor=torch.full((2, 3), value + rank),
        global_shape=(8, 3),
        pieces=(Piece(local=(0, 0), offset=(2 * rank, 0), shape=(2, 3)),),
        owners=(rank,),
    )
    half = LocalTensor(
        name="model/halves",
        tensor=torch.full((5,), value + rank % 2),
        global_shape=(10,),
        pieces=(Piece(local=(0,), offset=(5 * (rank % 2),), shape=(5,)),),
        owners=(rank % 2, 2 + rank % 2),
    )
    return [own, half, LocalTensor.whole("model/all", torch.full((4,), value), (0, 1, 2, 3))]


class Job:
    """Four ranks on two nodes, each of which sees one folder alone."""

    def __init__(self, root: Path) -> None:
        self.folders = [root / "node-0", root / "node-1"]
        for folder in self.folders:
            folder.mkdir()
        self.store = dist.HashStore()

    def path(self, rank: int, name: str = "a") -> Path:
        return self.folders[NODE_OF[rank]] / name

    def nodes(self, rank: int) -> Nodes:
        return Nodes(store=self.store, index=NODE_OF[rank], count=2, ranks=RANKS_OF[NODE_OF[rank]])

    def save(self, value: float, save_id: str, name: str = "a", **options: Any) -> list[Any]:
        per_rank: dict[int, dict[str, Any]] = options.pop("per_rank", {})
        absent = options.pop("absent", ())

        def work(rank: int) -> None:
            if rank in absent:
                return
            save(
                self.path(rank, name),
                held(rank, value),
                {"value": value, "buffer": torch.full((2,), value)},
                rank=rank,
                world_size=4,
                save_id=save_id,
                rank_state={"rank": rank},
                nodes=self.nodes(rank),
                **options | per_rank.get(rank, {}),
            )

        return on_all(work)

    def values(self, name: str = "a") -> list[float]:
        """What each rank loads from its own node."""

        def work(rank: int) -> float:
            wanted = held(rank, -1.0)
            load_into(self.path(rank, name), wanted)
            state, own = load_state(self.path(rank, name)), load_rank_state(self.path(rank, name), rank)
            value: float = state["value"]
            for tensor, right in zip(wanted, held(rank, value), strict=True):
                assert torch.equal(tensor.tensor, right.tensor)
            assert torch.equal(state["buffer"], torch.full((2,), value))
            assert own == {"rank": rank}
            return value

        return on_all(work)

    def leftovers(self) -> list[str]:
        return [name for folder in self.folders for name in leftovers(folder / "a")]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_each_node_holds_what_its_ranks_load(job: Job) -> None:
    assert job.save(1.0, "s1") == [None] * 4
    assert job.save(2.0, "s2") == [None] * 4
    assert job.values() == [2.0] * 4
    assert job.leftovers() == []
    for node, folder in enumerate(job.folders):
        manifest = read_manifest(folder / "a")
        assert manifest.node is not None and (manifest.node.index, manifest.node.ranks) == (node, RANKS_OF[node])
        assert len(manifest.tensors["model/all"].pieces) == 1
        assert [piece.offset for piece in manifest.tensors["model/rows"].pieces] == [(4 * node, 0), (4 * node + 2, 0)]
        assert verify(folder / "a").is_whole


def test_what_lies_on_another_node_is_named_and_merging_brings_it_together(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.save(1.0, "s1")
    with pytest.raises(OnOtherNodeError, match=r"part of node 1 of 2 \(ranks 2, 3\) .* model/rows.*checkpoint merge"):
        load_state_dict(job.path(2))
    with pytest.raises(OnOtherNodeError, match="state of rank 0 is elsewhere"):
        load_rank_state(job.path(2), 0)
    parts = [str(job.path(2)), str(job.path(0))]
    assert main(["checkpoint", "merge", str(tmp_path / "merged"), *parts]) == 0
    assert "5 tensors" not in capsys.readouterr().err
    found = load_state_dict(tmp_path / "merged")
    assert torch.equal(found["rows"], torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4])[:, None].expand(8, 3))
    assert torch.equal(found["halves"], torch.tensor([1.0] * 5 + [2.0] * 5))
    assert [load_rank_state(tmp_path / "merged", rank) for rank in range(4)] == [{"rank": rank} for rank in range(4)]
    assert load_state(tmp_path / "merged")["value"] == 1.0
    assert verify(tmp_path / "merged").is_whole
    assert read_manifest(tmp_path / "merged").node is None


def test_parts_that_do_not_belong_together_are_not_merged(job: Job, tmp_path: Path) -> None:
    job.save(1.0, "s1")
    job.save(2.0, "s2", "b")
    with pytest.raises(MismatchError, match=r"saved as s2 and .* as s1"):
        merge([job.path(0), job.path(2, "b")], tmp_path / "merged")
    with pytest.raises(MismatchError, match=r"nodes \[1\] of 2"):
        merge([job.path(2)], tmp_path / "merged")
    assert main(["checkpoint", "merge", str(tmp_path / "merged"), str(tmp_path / "none")]) == 2
    assert not (tmp_path / "merged").exists()


class Failing(SyncShardWriter):
    def write(self, path: Path, *_: Any, **__: Any) -> list[list[int]]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_fails_fails_all_nodes_with_its_text(job: Job, rank: int) -> None:
    job.save(1.0, "s1")
    raised = job.save(2.0, "s2", per_rank={rank: {"writer": Failing()}})
    assert {type(error) for error in raised} == {SaveFailedError}
    (text,) = {str(error) for error in raised}
    assert f"failed on rank {rank}: OSError: [Errno 28]" in text
    assert job.values() == [1.0] * 4
    assert job.leftovers() == []


def test_holes_over_all_nodes_are_found_before_anything_is_published(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    full = held
    monkeypatch.setitem(globals(), "held", lambda rank, value: full(rank, value)[(rank == 3) :])
    raised = job.save(1.0, "s1")
    assert {type(error) for error in raised} == {CoverageError}
    assert all("model/rows" in str(error) and "(6, 0)" in str(error) for error in raised)
    assert [list(folder.iterdir()) for folder in job.folders] == [[], []]


def test_a_node_that_never_begins_is_named(job: Job) -> None:
    job.save(1.0, "s1")
    raised = job.save(2.0, "s2", absent=(2, 3), start_timeout_s=0.5)
    assert [type(error) for error in raised[:2]] == [RanksMissingError] * 2
    assert all("nodes [1] never began" in str(error) for error in raised[:2])
    assert job.values() == [1.0] * 4


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("name", ["a", "b"], ids=["replacing", "beside"])
def test_a_rename_that_fails_on_one_node_is_taken_back_on_the_other(
    job: Job, monkeypatch: pytest.MonkeyPatch, node: int, name: str
) -> None:
    job.save(1.0, "s1")
    save_module = sys.modules["kenotron.checkpoint.save"]  # as an attribute of the package it is the function
    rename = save_module.put_in_place

    def failing(new: Path, path: Path, aside: Path) -> Path | None:
        if path.parent == job.folders[node] and "s2" in new.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(new, path, aside)

    monkeypatch.setattr(save_module, "put_in_place", failing)
    raised = job.save(2.0, "s2", name)
    for leader in (0, 2):
        assert isinstance(raised[leader], SaveFailedError)
        assert "Input/output error" in str(raised[leader])
    assert job.values() == [1.0] * 4
    assert [sorted(path.name for path in folder.rglob("*")) for folder in job.folders if leftovers(folder / name)] == [], raised


def broken_between(job: Job, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let node 1 lose the store just before it would read the verdict: node 0 publishes, node 1 does not."""
    told = Council._verdict

    def verdict(council: Council) -> dict[str, str] | None:
        if council._nodes.index == 1 and council._has_told:
            raise InDoubtError("the store is gone")
        return told(council)

    with monkeypatch.context() as patched:
        patched.setattr(nodes_module.Council, "_verdict", verdict)
        patched.setattr(nodes_module.Council, "tell", lambda *_: None)
        raised = job.save(2.0, "s2", name, timeout_s=2.0)
    assert isinstance(raised[0], RanksMissingError) and "nodes [1] are silent" in str(raised[0])
    assert isinstance(raised[2], InDoubtError)


@pytest.mark.parametrize("name", ["a", "b"], ids=["replacing", "beside"])
def test_what_a_crash_left_half_published_is_published_everywhere(job: Job, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    job.save(1.0, "s1")
    broken_between(job, monkeypatch, name)
    exchange = Exchange()
    moved = on_all(lambda rank: recover(job.folders[NODE_OF[rank]], exchange.of(rank), leads=rank in (0, 2)))
    assert moved == [[], [], [job.path(2, name)], []]
    for folder in job.folders:
        remove_leftovers(folder)
    assert job.values(name) == [2.0] * 4
    assert all(path.name in ("a", "b") for folder in job.folders for path in folder.iterdir())


def test_what_another_node_has_lost_gives_way_to_what_it_replaced(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.save(1.0, "s1")
    broken_between(job, monkeypatch, "a")
    shutil.rmtree(job.folders[1] / ".a.s2.partial")
    exchange = Exchange()
    moved = on_all(lambda rank: recover(job.folders[NODE_OF[rank]], exchange.of(rank), leads=rank in (0, 2)))
    assert moved == [[job.path(0)], [], [], []]
    assert job.values() == [1.0] * 4


def test_recovery_moves_nothing_of_a_save_that_nobody_published(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.save(1.0, "s1")
    broken_between(job, monkeypatch, "b")
    shutil.rmtree(job.path(0, "b"))
    exchange = Exchange()
    moved = on_all(lambda rank: recover(job.folders[NODE_OF[rank]], exchange.of(rank), leads=rank in (0, 2)))
    assert moved == [[]] * 4
    assert job.values() == [1.0] * 4


def test_ranks_that_find_different_last_ones_load_the_newest_that_all_have(job: Job) -> None:
    job.save(1.0, "s1")
    job.save(2.0, "s2", "b")
    shutil.rmtree(job.path(2, "b"))
    wanted = [job.folders[0] / "b", job.folders[0] / "b", job.folders[1] / "a", job.folders[1] / "a"]
    exchange = Exchange()

    def work(rank: int) -> Path:
        # On real nodes the paths are the same: here each rank sees its own folder in their place.
        own = job.folders[NODE_OF[rank]]
        with_names = exchange.of(rank)

        def translated(told: Any) -> Sequence[Any]:
            if isinstance(told, str):
                return [str(own / Path(each).name) for each in with_names(told)]
            found = with_names({Path(path).name: identity for path, identity in told.items()})
            return [{str(own / name): identity for name, identity in each.items()} for each in found]

        return common_path(wanted[rank], translated)

    assert on_all(work) == [job.path(rank, "a") for rank in range(4)]
    shutil.rmtree(job.path(2, "a"))
    raised = on_all(work)
    assert {type(error) for error in raised} == {NotACheckpointError}
    assert "rank 0" in str(raised[0]) and "save id s2" in str(raised[0])


@pytest.mark.parametrize("node_local", [True, False])
@pytest.mark.parametrize("is_shared", [True, False])
def test_whether_nodes_share_a_folder_is_found_out(job: Job, node_local: bool, is_shared: bool) -> None:
    exchange = Exchange()

    def work(rank: int) -> None:
        folder = job.folders[0 if is_shared else NODE_OF[rank]]
        leader = RANKS_OF[NODE_OF[rank]][0]
        check_sharing(folder, exchange.of(rank), leader=leader, rank=rank, node_local=node_local, patience_s=0.2)

    raised = on_all(work)
    assert [list(folder.iterdir()) for folder in job.folders] == [[], []]
    if is_shared != node_local:
        assert raised == [None] * 4
        return
    assert {type(error) for error in raised} == {ValueError}
    text = r"ranks \[0, 2\]" if is_shared else r"ranks \[0, 1, 2, 3\] do not see .*set CheckpointSettings\(node_local=True\)"
    assert all(re.search(text, str(error)) for error in raised)


def test_the_engine_saves_and_removes_on_each_node(job: Job) -> None:
    def work(rank: int) -> None:
        checkpointer = Checkpointer(EngineSettings(pool_bytes=1 << 20, slot_bytes=1 << 16))
        for step in (1, 2, 3):
            state = {"value": float(step), "buffer": torch.full((2,), float(step))}
            checkpointer.save(
                job.path(rank, f"step-{step}"), held(rank, float(step)), state, rank=rank, world_size=4, save_id=f"s{step}",
                rank_state={"rank": rank}, nodes=job.nodes(rank), timeout_s=60,
            )  # fmt: skip
            if step > 1 and rank in (0, 2):
                checkpointer.remove(job.path(rank, f"step-{step - 1}"))
        checkpointer.close()

    assert on_all(work) == [None] * 4
    assert [sorted(path.name for path in folder.iterdir()) for folder in job.folders] == [["step-3"]] * 2
    assert job.values("step-3") == [3.0] * 4


def test_a_forged_part_allocates_nothing(job: Job) -> None:
    job.save(1.0, "s1")

    def grow(node: dict[str, Any]) -> None:
        node["tensors"]["model/all"]["shape"] = [1 << 50]

    forge(job.path(0), grow)
    with pytest.raises(OnOtherNodeError, match="model/all"):
        load_state_dict(job.path(0), "model/all")

    def repeat(node: dict[str, Any]) -> None:
        node["tensors"]["model/all"]["shape"] = [4]
        first, second = node["tensors"]["model/rows"]["pieces"]
        second["offset"] = first["offset"]

    forge(job.path(0), repeat)
    with pytest.raises(ManifestDamagedError, match="model/rows is stored 2 times"):
        load_into(job.path(0), held(0, 0.0)[:1])


@pytest.mark.parametrize("node", [{"index": 2, "count": 2, "ranks": [0]}, {"index": 0, "count": 2, "ranks": [4]}, {"index": 0}])
def test_a_forged_node_is_refused(job: Job, node: dict[str, Any]) -> None:
    job.save(1.0, "s1")
    forge(job.path(0), lambda manifest: manifest.update(node=node))
    with pytest.raises(ManifestDamagedError):
        read_manifest(job.path(0))


@pytest.mark.parametrize(
    ("index", "ranks", "text"), [(2, (0, 1), "index=2"), (0, (1, 0), "ascending"), (0, (), "at least one")]
)
def test_bad_nodes_are_refused(index: int, ranks: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Nodes(store=dist.HashStore(), index=index, count=2, ranks=ranks)


def test_a_rank_that_is_not_of_its_node_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank=3 is not one of its node's ranks \(0, 1\)"):
        save(tmp_path / "x", held(3, 0.0), {}, rank=3, world_size=4, save_id="s", nodes=job.nodes(0))

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import SaveOnRanks, assert_holds, rows, save_value, whole

from kenotron.checkpoint import (
    CheckpointError,
    CoverageError,
    LocalTensor,
    Piece,
    SaveFailedError,
    load_rank_state,
    load_state,
    load_state_dict,
    read_manifest,
    save,
)

FULL = torch.arange(40.0).reshape(10, 4)


# ---- What is saved --------------------------------------------------------------------------------------------------


def test_four_ranks_save_what_one_process_loads(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    shared = LocalTensor.whole("model/shared", torch.ones(3), owners=(0, 1, 2, 3))
    tensors = [[held, shared] for held in rows("model/w", FULL, 4)]
    state = {"step": 7, "seen": torch.tensor([3])}
    per_rank = {rank: {"rank_state": {"rng": torch.tensor([rank])}} for rank in range(3)}
    assert save_on_ranks(tmp_path / "a", tensors, state, per_rank=per_rank) == [None] * 4
    found = load_state_dict(tmp_path / "a")
    assert torch.equal(found["w"], FULL)
    assert torch.equal(found["shared"], torch.ones(3))
    assert load_state(tmp_path / "a")["step"] == 7
    assert load_rank_state(tmp_path / "a", 2) == {"rng": torch.tensor([2])}
    assert load_rank_state(tmp_path / "a", 3) is None


def test_a_published_checkpoint_holds_its_files_and_nothing_else(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    path = tmp_path / "new" / "folders" / "a"
    assert save_on_ranks(path, [[held] for held in rows("model/w", FULL, 2)]) == [None] * 2
    shards = ["shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors"]
    assert sorted(os.listdir(path)) == ["README.txt", "manifest.json", *shards]
    assert os.listdir(path.parent) == ["a"]
    assert sorted(read_manifest(path).files) == shards


def test_each_replica_is_written_once_and_the_writers_take_turns(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    shared = [LocalTensor.whole(f"model/{i}", torch.ones(3), owners=(0, 1)) for i in range(40)]
    backwards = [LocalTensor.whole(f"model/{i}", torch.ones(3), owners=(1, 0)) for i in range(40)]
    assert save_on_ranks(tmp_path / "a", [shared, backwards]) == [None] * 2
    pieces = [tensor.pieces for tensor in read_manifest(tmp_path / "a").tensors.values()]
    assert {len(several) for several in pieces} == {1}
    counts = [sum(several[0].file.startswith(f"shard-0000{n}") for several in pieces) for n in (1, 2)]
    assert min(counts) >= 10


def test_pickles_need_to_be_allowed_and_are_kept_apart(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    state = {"callbacks": {"Mine": {"foo": pytest.mark.slow}}}
    with pytest.raises(ValueError, match="callbacks → Mine → foo"):
        save(tmp_path / "a", [], state, rank=0, world_size=1, save_id="x")
    assert os.listdir(tmp_path) == []
    own = {1: {"rank_state": {"mark": pytest.mark.slow}}}
    assert save_on_ranks(tmp_path / "a", [[], []], state, per_rank=own, allow_pickle=True) == [None] * 2
    assert {"pickle-0.bin", "pickle-1-0.bin"} < set(read_manifest(tmp_path / "a").files)
    assert load_state(tmp_path / "a", allow_pickle=True) == state
    assert load_rank_state(tmp_path / "a", 1, allow_pickle=True) == {"mark": pytest.mark.slow}
    with pytest.raises(CheckpointError, match=r"pickle-0\.bin.*allow_pickle=True"):
        load_state(tmp_path / "a")


RANKS_SCRIPT = """
import multiprocessing, sys, torch
from checkpoint_helpers import rows
from kenotron.checkpoint import save

def work(rank, world_size):
    for step in range(2):  # the second replaces the first
        full = torch.arange(40.0).reshape(10, 4) + step
        save(sys.argv[1], [rows("model/w", full, world_size)[rank]], {"step": step}, rank=rank, world_size=world_size,
             save_id=f"s{step}", rank_state={"me": rank}, timeout_s=120)

start = multiprocessing.get_context("fork").Process  # so that torch is imported once
ranks = [start(target=work, args=(rank, 4)) for rank in range(4)]
[rank.start() for rank in ranks]
[rank.join() for rank in ranks]
sys.exit(sum(rank.exitcode != 0 for rank in ranks))
"""


def test_processes_save_together_and_replace_what_they_saved(tmp_path: Path) -> None:
    helpers = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", RANKS_SCRIPT, str(tmp_path / "a")]
    ended = subprocess.run(command, env=os.environ | helpers, stderr=subprocess.PIPE, text=True)
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert torch.equal(load_state_dict(tmp_path / "a")["w"], FULL + 1)
    assert load_state(tmp_path / "a") == {"step": 1}
    assert [load_rank_state(tmp_path / "a", rank) for rank in range(4)] == [{"me": rank} for rank in range(4)]
    assert os.listdir(tmp_path) == ["a"]


# ---- Replacing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_exchange", [True, False])
def test_saving_to_the_same_path_replaces_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("kenotron.durable._exchange", lambda a, b: False)
    for value in (1.0, 2.0, 3.0):
        save_value(tmp_path / "a", f"s{value:g}", value)
        assert_holds(tmp_path / "a", value)
        assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    save_value(tmp_path / "step", "s1", 1.0)
    (tmp_path / "last").symlink_to("step")
    save_value(tmp_path / "last", "s2", 2.0)
    assert_holds(tmp_path / "step", 1.0)
    assert_holds(tmp_path / "last", 2.0)
    assert not (tmp_path / "last").is_symlink()


def test_what_is_not_a_checkpoint_is_never_replaced(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    (tmp_path / "file.ckpt").write_text("1")
    for name in ("thesis", "file.ckpt"):
        mistake, failure = save_on_ranks(tmp_path / name, [[], []])
        assert isinstance(mistake, ValueError)
        assert isinstance(failure, SaveFailedError)
        assert f"{tmp_path / name} exists and is not a checkpoint" in str(mistake)
        assert str(mistake) in str(failure)
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["file.ckpt", "thesis"]
    (tmp_path / "empty").mkdir()
    save_value(tmp_path / "empty", "s1", 1.0)
    assert_holds(tmp_path / "empty", 1.0)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_former_checkpoint_survives_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_on_ranks: SaveOnRanks, can_exchange: bool
) -> None:
    save_value(tmp_path / "a", "s1", 1.0)

    def refuse(a: Path, b: Path) -> bool:
        if can_exchange:
            raise OSError(errno.EIO, "the device is gone")
        return False

    rename = os.rename

    def rename_unless_new(a: Path, b: Path) -> None:
        if str(a).endswith(".partial"):
            raise OSError(errno.EIO, "the device is gone")
        rename(a, b)

    monkeypatch.setattr("kenotron.durable._exchange", refuse)
    monkeypatch.setattr("kenotron.durable.os.rename", rename_unless_new)
    raised = save_on_ranks(tmp_path / "a", [[], []])
    assert [type(error) for error in raised] == [SaveFailedError] * 2
    assert str(raised[0]) == str(raised[1])
    assert "the device is gone" in str(raised[0])
    assert_holds(tmp_path / "a", 1.0)
    assert os.listdir(tmp_path) == ["a"]


# ---- What the ranks must agree on -----------------------------------------------------------------------------------


def box(start: int, extent: int, rank: int, shape: tuple[int, ...] = (8,)) -> LocalTensor:
    piece = Piece(local=(0,), offset=(start,), shape=(extent,))
    return LocalTensor(name="model/w", tensor=torch.zeros(extent), global_shape=shape, pieces=(piece,), owners=(rank,))


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ([box(0, 4, 0), box(5, 3, 1)], r"model/w: of the shape \(8,\) the element \(4,\) is stored by no rank"),
        ([box(0, 4, 0), box(3, 5, 1)], r"model/w: .* element \(3,\) is stored by the ranks \[0, 1\]"),
        ([box(0, 4, 0), box(4, 4, 1, (9,))], r"model/w: rank 0 has F32 \[8\] and rank 1 F32 \[9\]"),
    ],
)
def test_holes_overlaps_and_contradictions_are_told_on_all_ranks(
    tmp_path: Path, save_on_ranks: SaveOnRanks, held: list[LocalTensor], problem: str
) -> None:
    raised = save_on_ranks(tmp_path / "a", [[tensor] for tensor in held])
    for error in raised:
        with pytest.raises(CoverageError, match=problem):
            raise error or AssertionError("it was saved")
    assert str(raised[0]) == str(raised[1])
    assert os.listdir(tmp_path) == []


def test_a_replica_that_its_writer_does_not_pass_is_told(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    names = [f"model/{i}" for i in range(10)]  # so that rank 1 is to write some of them
    raised = save_on_ranks(tmp_path / "a", [[LocalTensor.whole(n, torch.ones(1), owners=(0, 1)) for n in names], []])
    assert [type(error) for error in raised] == [CoverageError] * 2
    assert "by no rank; do its owners all pass it?" in str(raised[0])


def test_arguments_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    good: dict[str, Any] = {"rank": 0, "world_size": 1, "save_id": "x"}
    tensor = whole("model/w", torch.ones(1))
    for tensors, options, problem in [
        ([], {"rank": 1}, "rank=1 must lie between 0 and world_size=1"),
        ([], {"save_id": "a/b"}, "save_id='a/b' must be 1 to 64 letters"),
        ([tensor, tensor], {}, "two tensors are named 'model/w'"),
        ([whole("state/0", torch.ones(1))], {}, "names may not begin with state/"),
        ([LocalTensor.whole("model/w", torch.ones(1), (1,))], {}, r"rank 0 passes it but is none of its owners \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=problem):
            save(tmp_path / "a", tensors, {}, **(good | options))
    assert os.listdir(tmp_path) == []


def test_a_save_id_is_used_once(tmp_path: Path) -> None:
    save_value(tmp_path / "a", "s1", 1.0)
    with pytest.raises(ValueError, match="save_id='s1' is published as"):
        save_value(tmp_path / "a", "s1", 2.0)
    assert_holds(tmp_path / "a", 1.0)


def test_the_manifest_lists_what_the_specification_says(tmp_path: Path) -> None:
    save_value(tmp_path / "a", "s1", 1.0)
    node = json.loads((tmp_path / "a" / "manifest.json").read_text())
    keys = ["format", "version", "save_id", "world_size", "files", "tensors", "state", "rank_states", "aliases", "crc32c"]
    assert list(node) == keys
    assert list(node["tensors"]["model/w"]) == ["dtype", "shape", "pieces"]
    assert list(node["tensors"]["model/w"]["pieces"][0]) == ["file", "bytes", "offset", "shape", "crc32c"]

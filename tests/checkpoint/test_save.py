from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import leftovers, rows, whole
from conftest import SaveOnRanks

from kenotron.checkpoint import (
    CheckpointError,
    CoverageError,
    LocalTensor,
    NotPublishedError,
    Piece,
    RanksMissingError,
    SaveFailedError,
    SyncShardWriter,
    is_checkpoint,
    load_rank_state,
    load_state,
    load_state_dict,
    read_manifest,
    save,
)
from kenotron.checkpoint.format import unpublished

FULL = torch.arange(40.0).reshape(10, 4)


def save_alone(path: Path, save_id: str, value: float = 0.0, **options: Any) -> None:
    """One rank saves a tensor and a state that both hold ``value``."""
    tensors = [whole("model/w", torch.full((4,), value))]
    save(path, tensors, {"value": value}, rank=0, world_size=1, save_id=save_id, **options)


def assert_holds(path: Path, value: float) -> None:
    assert load_state(path) == {"value": value}
    assert torch.equal(load_state_dict(path)["w"], torch.full((4,), value))


def run(script: str, *args: object) -> subprocess.Popen[str]:
    """Start a Python process with this directory's helpers at hand."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


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
    assert sorted(os.listdir(path)) == ["manifest.json", *shards]
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


RANK_SCRIPT = """
import sys, torch
from checkpoint_helpers import rows
from kenotron.checkpoint import save
path, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for step in range(2):  # the second replaces the first
    full = torch.arange(40.0).reshape(10, 4) + step
    save(path, [rows("model/w", full, world_size)[rank]], {"step": step}, rank=rank, world_size=world_size,
         save_id=f"s{step}", rank_state={"me": rank}, timeout_s=60)
"""


def test_processes_save_together_and_replace_what_they_saved(tmp_path: Path) -> None:
    processes = [run(RANK_SCRIPT, tmp_path / "a", rank, 3) for rank in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 3
    assert torch.equal(load_state_dict(tmp_path / "a")["w"], FULL + 1)
    assert load_state(tmp_path / "a") == {"step": 1}
    assert [load_rank_state(tmp_path / "a", rank) for rank in range(3)] == [{"me": rank} for rank in range(3)]
    assert os.listdir(tmp_path) == ["a"]


# ---- Replacing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_exchange", [True, False])
def test_saving_to_the_same_path_replaces_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("kenotron.checkpoint.durable._exchange", lambda a, b: False)
    for value in (1.0, 2.0, 3.0):
        save_alone(tmp_path / "a", f"s{value:g}", value)
        assert_holds(tmp_path / "a", value)
        assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    save_alone(tmp_path / "step", "s1", 1.0)
    (tmp_path / "last").symlink_to("step")
    save_alone(tmp_path / "last", "s2", 2.0)
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
    save_alone(tmp_path / "empty", "s1", 1.0)
    assert_holds(tmp_path / "empty", 1.0)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_former_checkpoint_survives_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_on_ranks: SaveOnRanks, can_exchange: bool
) -> None:
    save_alone(tmp_path / "a", "s1", 1.0)

    def refuse(a: Path, b: Path) -> bool:
        if can_exchange:
            raise OSError(errno.EIO, "the device is gone")
        return False

    rename = os.rename

    def rename_unless_new(a: Path, b: Path) -> None:
        if str(a).endswith(".partial"):
            raise OSError(errno.EIO, "the device is gone")
        rename(a, b)

    monkeypatch.setattr("kenotron.checkpoint.durable._exchange", refuse)
    monkeypatch.setattr("kenotron.checkpoint.durable.os.rename", rename_unless_new)
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
    save_alone(tmp_path / "a", "s1", 1.0)
    with pytest.raises(ValueError, match="save_id='s1' is published as"):
        save_alone(tmp_path / "a", "s1", 2.0)
    assert_holds(tmp_path / "a", 1.0)


# ---- Failures -------------------------------------------------------------------------------------------------------


class FailingWriter:
    """Fails half-way, as a full disk does on a file system that cannot reserve."""

    def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], *, num_bytes: int) -> list[list[int]]:
        path.write_bytes(header)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_on_one_rank_fails_all_with_one_text(
    tmp_path: Path, save_on_ranks: SaveOnRanks, rank: int
) -> None:
    save_alone(tmp_path / "a", "s1", 1.0)
    start = time.monotonic()
    held = [[tensor] for tensor in rows("model/w", FULL, 3)]
    raised = save_on_ranks(tmp_path / "a", held, per_rank={rank: {"writer": FailingWriter()}})
    assert [type(error) for error in raised] == [SaveFailedError] * 3
    assert len({str(error) for error in raised}) == 1
    assert f"failed on rank {rank}: OSError: [Errno 28] No space left on device" in str(raised[0])
    assert time.monotonic() - start < 5
    assert_holds(tmp_path / "a", 1.0)
    assert leftovers(tmp_path / "a") == []


def test_a_file_that_is_too_large_is_found_before_it_is_written(tmp_path: Path) -> None:
    asked: list[int] = []

    class Watched(SyncShardWriter):
        def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], **size: int) -> list[list[int]]:
            return super().write(path, header, (asked.append(1) or buffer for buffer in buffers), **size)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(SaveFailedError, match=r"failed on rank 0: OSError: \[Errno 27\] File too large: .*shard-00001"):
            save(
                tmp_path / "a",
                [whole("w", torch.zeros(1 << 19))],
                {},
                rank=0,
                world_size=1,
                save_id="x",
                writer=Watched(),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert asked == []
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailedError, match="failed on rank 0: .*file"):
        save_alone(tmp_path / "file" / "a", "s1")


KILLED_SCRIPT = """
import os, signal, sys, torch
from checkpoint_helpers import rows
from kenotron.checkpoint import save

class Killed:
    def write(self, path, header, buffers, *, num_bytes):
        path.write_bytes(header)
        os.kill(os.getpid(), signal.SIGKILL)

save(sys.argv[1], [rows("model/w", torch.zeros(10, 4), 3)[1]], {}, rank=1, world_size=3, save_id="s2", writer=Killed())
"""


def test_when_a_rank_is_killed_the_others_give_up_and_the_former_checkpoint_stays(
    tmp_path: Path, save_on_ranks: SaveOnRanks
) -> None:
    path = tmp_path / "a"
    save_alone(path, "s1", 1.0)
    process = run(KILLED_SCRIPT, path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    held = rows("model/w", FULL, 3)
    raised: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            save(path, [held[rank]], {}, rank=rank, world_size=3, save_id="s2", timeout_s=1.0)
        except CheckpointError as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in raised] == [RanksMissingError] * 2
    assert str(raised[0]) == str(raised[1])
    assert "given up after 1 s: ranks [1] began and did not finish" in str(raised[0])
    assert_holds(path, 1.0)
    # The dead rank's mark keeps the directory, without data; the next save sweeps it.
    left = unpublished(path, "s2")
    assert [file for _, _, files in os.walk(left) for file in files if "safetensors" in file] == []
    save_alone(path, "s3", 3.0)
    assert leftovers(path) == []


CRASH_SCRIPT = """
import importlib, os, signal, sys, torch
from checkpoint_helpers import whole
from kenotron.checkpoint import save
module = importlib.import_module("kenotron.checkpoint.save")
place = module.put_in_place
def crash(*args):
    if sys.argv[2] == "after":
        place(*args)
    os.kill(os.getpid(), signal.SIGKILL)
module.put_in_place = crash
tensors = [whole("model/w", torch.full((4,), 2.0))]
save(sys.argv[1], tensors, {"value": 2.0}, rank=0, world_size=1, save_id="s2")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_around_the_rename_leaves_the_former_or_the_new_checkpoint(tmp_path: Path, when: str) -> None:
    path = tmp_path / "a"
    save_alone(path, "s1", 1.0)
    process = run(CRASH_SCRIPT, path, when)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_holds(path, 1.0 if when == "before" else 2.0)
    other = unpublished(path, "s2")
    assert other.is_dir()
    assert not is_checkpoint(other)
    with pytest.raises(NotPublishedError, match="a save left that never came to its end"):
        load_state(other)
    save_alone(path, "s3", 3.0)
    assert_holds(path, 3.0)
    assert leftovers(path) == []


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_alone(path, "s1", 1.0)
    os.rename(path, unpublished(path, "s2", "replaced"))
    with pytest.raises(NotPublishedError, match=r"\.a\.s2\.replaced"):
        load_state(path)
    with pytest.raises(ValueError, match="cannot store x"):  # whatever the next save does, it puts it back first
        save(path, [], {"x": object()}, rank=0, world_size=1, save_id="s3")
    assert_holds(path, 1.0)


def test_saves_of_other_checkpoints_are_not_swept(tmp_path: Path) -> None:
    others = [unpublished(tmp_path / "a.b", "s1"), unpublished(tmp_path / "b", "s1"), tmp_path / ".a.hidden"]
    for other in others:
        other.mkdir()
    save_alone(tmp_path / "a", "s1")
    assert all(other.is_dir() for other in others)


def test_when_rank_0_is_missing_the_others_say_so(tmp_path: Path) -> None:
    with pytest.raises(RanksMissingError, match=r"given up after 0\.3 s: ranks \[0\] never began"):
        save(tmp_path / "a", [], {}, rank=1, world_size=2, save_id="x", timeout_s=0.3)
    assert os.listdir(tmp_path) == []


def test_a_save_that_is_swept_away_fails_at_once(tmp_path: Path) -> None:
    raised: list[BaseException] = []

    def wait_for_rank_0() -> None:
        try:
            save(tmp_path / "a", [], {}, rank=1, world_size=2, save_id="x", timeout_s=60)
        except CheckpointError as error:
            raised.append(error)

    thread = threading.Thread(target=wait_for_rank_0)
    thread.start()
    report = unpublished(tmp_path / "a", "x") / "control" / "report-00001.json"
    while not report.exists():
        time.sleep(0.01)
    save_alone(tmp_path / "a", "y", 1.0)
    thread.join(10)
    assert isinstance(raised[0], SaveFailedError)
    assert "another save to the same path has begun" in str(raised[0])
    assert_holds(tmp_path / "a", 1.0)


# ---- Where other ranks may be dead ----------------------------------------------------------------------------------


def test_start_timeout_names_the_missing_ranks_before_anything_is_written(
    tmp_path: Path, save_on_ranks: SaveOnRanks
) -> None:
    save_alone(tmp_path / "a", "s1", 1.0)
    start = time.monotonic()
    raised: list[BaseException] = []

    def work(rank: int) -> None:
        options: dict[str, Any] = {"save_id": "s2", "start_timeout_s": 0.3, "writer": FailingWriter()}
        try:
            save(tmp_path / "a", [], {}, rank=rank, world_size=4, **options)
        except CheckpointError as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 5
    assert [type(error) for error in raised] == [RanksMissingError] * 2
    assert "given up after 0.3 s: ranks [1, 3] never began" in str(raised[0])
    assert str(raised[0]) == str(raised[1])
    assert_holds(tmp_path / "a", 1.0)
    assert os.listdir(tmp_path) == ["a"]


def test_start_timeout_is_no_hindrance_when_all_are_there(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    held = [[tensor] for tensor in rows("model/w", FULL, 3)]
    assert save_on_ranks(tmp_path / "a", held, start_timeout_s=10) == [None] * 3


def test_an_interrupt_is_told_to_the_others_and_passes_through(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    class Interrupted:
        def write(self, path: Path, *args: object, **options: object) -> list[list[int]]:
            raise KeyboardInterrupt

    raised = save_on_ranks(tmp_path / "a", [[], []], per_rank={1: {"writer": Interrupted()}})
    assert [type(error) for error in raised] == [SaveFailedError, KeyboardInterrupt]
    assert "failed on rank 1: KeyboardInterrupt" in str(raised[0])
    assert os.listdir(tmp_path) == []


def test_a_rank_that_gives_up_while_rank_0_publishes_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_on_ranks: SaveOnRanks
) -> None:
    module = importlib.import_module("kenotron.checkpoint.save")
    place = module.put_in_place

    def place_late(*args: Path) -> Path | None:
        time.sleep(0.5)
        return place(*args)

    monkeypatch.setattr(module, "put_in_place", place_late)
    held = [[tensor] for tensor in rows("model/w", FULL, 2)]
    raised = save_on_ranks(tmp_path / "a", held, per_rank={1: {"timeout_s": 0.1}})
    assert raised[0] is None
    assert isinstance(raised[1], RanksMissingError)
    assert torch.equal(load_state_dict(tmp_path / "a")["w"], FULL)


def test_the_manifest_lists_what_the_specification_says(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", "s1", 1.0)
    node = json.loads((tmp_path / "a" / "manifest.json").read_text())
    keys = ["format", "version", "save_id", "world_size", "files", "tensors", "state", "rank_states", "crc32c"]
    assert list(node) == keys
    assert list(node["tensors"]["model/w"]) == ["dtype", "shape", "pieces"]
    assert list(node["tensors"]["model/w"]["pieces"][0]) == ["file", "bytes", "offset", "shape", "crc32c"]

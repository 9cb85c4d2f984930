from __future__ import annotations

import errno
import importlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import SaveOnRanks, assert_holds, leftovers, rows, save_value, whole

from kenotron.checkpoint import (
    Checkpointer,
    CheckpointError,
    NotPublishedError,
    RanksMissingError,
    SaveFailedError,
    SyncShardWriter,
    is_checkpoint,
    load_state,
    load_state_dict,
    meeting,
    save,
)
from kenotron.checkpoint.format import unpublished
from kenotron.checkpoint.meeting import Meeting

FULL = torch.arange(40.0).reshape(10, 4)


class FailingWriter:
    """Fails half-way, as a full disk does on a file system that cannot reserve."""

    def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], *, num_bytes: int) -> list[list[int]]:
        path.write_bytes(header)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_on_one_rank_fails_all_with_one_text(tmp_path: Path, save_on_ranks: SaveOnRanks, rank: int) -> None:
    save_value(tmp_path / "a", "s1", 1.0)
    start = time.monotonic()
    held = [[tensor] for tensor in rows("model/w", FULL, 3)]
    raised = save_on_ranks(tmp_path / "a", held, per_rank={rank: {"writer": FailingWriter()}})
    assert [type(error) for error in raised] == [SaveFailedError] * 3
    assert len({str(error) for error in raised}) == 1
    assert f"failed on rank {rank}: OSError: [Errno 28] No space left on device" in str(raised[0])
    assert time.monotonic() - start < 30  # not the ten minutes of timeout_s
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
    with pytest.raises(SaveFailedError, match=r"failed on rank 0: .*file"):
        save_value(tmp_path / "file" / "a", "s1")


def run_and_be_killed(work: Callable[[], object]) -> None:
    """Run ``work`` in a process of its own, which must end by SIGKILL."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledWriter:
    """Is killed half-way."""

    def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], *, num_bytes: int) -> list[list[int]]:
        path.write_bytes(header)
        kill_this_process()
        return []


def test_when_a_rank_is_killed_the_others_give_up_and_the_former_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_value(path, "s1", 1.0)
    run_and_be_killed(lambda: save(path, [], {}, rank=1, world_size=3, save_id="s2", writer=KilledWriter()))
    held = rows("model/w", FULL, 3)
    raised: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            save(path, [held[rank]], {}, rank=rank, world_size=3, save_id="s2", timeout_s=2.0)
        except CheckpointError as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in raised] == [RanksMissingError] * 2
    assert str(raised[0]) == str(raised[1])
    assert "given up after 2 s: ranks [1] began and did not finish" in str(raised[0])
    assert_holds(path, 1.0)
    # The dead rank's mark keeps the directory, without data; the next save sweeps it.
    left = unpublished(path, "s2")
    assert [file for _, _, files in os.walk(left) for file in files if "safetensors" in file] == []
    save_value(path, "s3", 3.0)
    assert leftovers(path) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_around_the_rename_leaves_the_former_or_the_new_checkpoint(tmp_path: Path, when: str) -> None:
    path = tmp_path / "a"
    save_value(path, "s1", 1.0)
    module = importlib.import_module("kenotron.checkpoint.save")
    place = module.put_in_place

    def place_and_crash(*args: Path) -> None:
        if when == "after":
            place(*args)
        kill_this_process()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "put_in_place", place_and_crash)
        run_and_be_killed(lambda: save_value(path, "s2", 2.0))
    assert_holds(path, 1.0 if when == "before" else 2.0)
    other = unpublished(path, "s2")
    assert other.is_dir()
    assert not is_checkpoint(other)
    with pytest.raises(NotPublishedError, match="a save left that never came to its end"):
        load_state(other)
    save_value(path, "s3", 3.0)
    assert_holds(path, 3.0)
    assert leftovers(path) == []


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_value(path, "s1", 1.0)
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
    save_value(tmp_path / "a", "s1")
    assert all(other.is_dir() for other in others)


def test_when_rank_0_is_missing_the_others_say_so_and_it_fails_at_once_when_it_comes(tmp_path: Path) -> None:
    path, held = tmp_path / "a", rows("model/w", FULL, 2)
    with pytest.raises(RanksMissingError, match=r"given up after 0\.3 s: ranks \[0\] never began") as first:
        save(path, [held[1]], {}, rank=1, world_size=2, save_id="x", timeout_s=0.3)
    assert os.listdir(unpublished(path, "x")) == ["control"]
    with pytest.raises(RanksMissingError) as second:
        save(path, [held[0]], {}, rank=0, world_size=2, save_id="x", timeout_s=60)
    assert str(first.value) == str(second.value)
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
    save_value(tmp_path / "a", "y", 1.0)
    thread.join(30)
    assert isinstance(raised[0], SaveFailedError)
    assert "another save to the same path has begun" in str(raised[0])
    assert_holds(tmp_path / "a", 1.0)


# ---- Where other ranks may be dead ----------------------------------------------------------------------------------


def test_start_timeout_names_the_missing_ranks_before_anything_is_written(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    save_value(tmp_path / "a", "s1", 1.0)
    start = time.monotonic()
    raised: list[BaseException] = []

    def work(rank: int) -> None:
        options: dict[str, Any] = {"save_id": "s2", "start_timeout_s": 1.0, "writer": FailingWriter()}
        try:
            save(tmp_path / "a", [], {}, rank=rank, world_size=4, **options)
        except CheckpointError as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 30  # not the ten minutes of timeout_s
    assert [type(error) for error in raised] == [RanksMissingError] * 2
    assert "given up after 1 s: ranks [1, 3] never began" in str(raised[0])
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
    is_decided, has_given_up = threading.Event(), threading.Event()

    def place_late(*args: Path) -> Path | None:
        is_decided.set()
        assert has_given_up.wait(30)
        return place(*args)

    def give_up(meeting: Meeting) -> None:
        assert is_decided.wait(30)
        raise RanksMissingError("too late")

    withdraw = Meeting.withdraw

    def withdraw_and_tell(meeting: Meeting, *args: Any, **options: Any) -> SaveFailedError:
        try:
            return withdraw(meeting, *args, **options)
        finally:
            has_given_up.set()

    monkeypatch.setattr(module, "put_in_place", place_late)
    monkeypatch.setattr(Meeting, "wait_for_publication", give_up)
    monkeypatch.setattr(Meeting, "withdraw", withdraw_and_tell)
    raised = save_on_ranks(tmp_path / "a", [[held] for held in rows("model/w", FULL, 2)])
    assert [str(error) for error in raised] == ["None", "too late"]
    assert torch.equal(load_state_dict(tmp_path / "a")["w"], FULL)


def test_a_rank_whose_process_has_ended_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_GRACE_S", 0.05)
    start = time.monotonic()
    for rank, other in ((0, 1), (1, 0)):
        options: dict[str, Any] = {"rank": rank, "world_size": 2, "save_id": f"s{rank}", "ended": lambda other=other: {other}}
        with pytest.raises(RanksMissingError, match=rf"the processes of the ranks \[{other}\] have ended"):
            save(tmp_path / "a", [], {}, timeout_s=100, **options)
    assert time.monotonic() - start < 30
    assert not is_checkpoint(tmp_path / "a")


def test_what_a_rank_has_reported_before_its_process_ended_is_published(
    tmp_path: Path, save_on_ranks: SaveOnRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_GRACE_S", 0.05)
    held = [[tensor] for tensor in rows("model/w", FULL, 3)]

    def ended() -> set[int]:
        (folder,) = tmp_path.glob(".a.*.partial")
        time.sleep(0.2)
        return {1} if (folder / "control" / "report-00001.json").exists() else set()

    assert save_on_ranks(tmp_path / "a", held, per_rank={0: {"ended": ended}}) == [None] * 3
    assert torch.equal(load_state_dict(tmp_path / "a")["w"], FULL)


def test_no_worker_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows no more threads."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    checkpointer = Checkpointer()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            checkpointer.save(tmp_path / "a", [whole("w", FULL)], {}, rank=0, world_size=1, save_id="s")
        checkpointer.close()
    checkpointer.save(tmp_path / "a", [whole("w", FULL)], {}, rank=0, world_size=1, save_id="t")
    checkpointer.close()
    assert is_checkpoint(tmp_path / "a")

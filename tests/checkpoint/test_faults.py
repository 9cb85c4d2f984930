"""Each system call of a save fails, is cut short or is the last one: nothing is lost, and nothing wrong is published.

Saves are made in forks of a process into which ``faults/shim.c`` is preloaded; a fork takes no imports.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import leftovers, whole

from kenotron.checkpoint import (
    Checkpointer,
    CheckpointError,
    EngineSettings,
    LocalTensor,
    Piece,
    is_checkpoint,
    load_state,
    load_state_dict,
    remove_leftovers,
    save,
)
from kenotron.checkpoint.asynchronous import PendingSave
from kenotron.testing import RankPool

#: How the checkpoint that stands there and the next one are named.
NAMES = [pytest.param("a", id="replacing"), pytest.param("b", id="beside", marks=pytest.mark.slow)]
SETTINGS = EngineSettings(pool_bytes=1 << 16, slot_bytes=1 << 14, num_writers=1)  # one writer: the same order each time
DEADLINE_S = 60
#: The calls that a full disk refuses.
THAT_NEED_ROOM = " open mkdir link write pwrite fallocate "


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """A process with the shim in it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc), which tests/checkpoint/faults/shim.c is built with")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "faults" / "shim.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    with RankPool(1) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(library))
            pool.run(os.getpid, 1)
        yield pool


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: hundreds of saves wait for no disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="faults-") as folder:
        yield Path(folder)


# ------------------------------------------------------------------------------------------------------- in the server


@dataclass(frozen=True)
class Outcome:
    """What became of a fork.

    Args:
        signal: that killed it; 0 for none.
        told: what it returned.
        holds: the value of each checkpoint that is left when the leftovers have been swept. swept: their names.
    """

    signal: int
    told: dict[str, Any]
    holds: dict[str, float] = field(default_factory=dict)
    swept: list[str] = field(default_factory=list)


def fork(work: Callable[..., Any], *args: Any) -> Callable[[], Outcome]:
    """Begin to run ``work`` in a fork of this process; the function that is returned waits for it."""
    answer = tempfile.TemporaryFile()  # noqa: SIM115
    process = os.fork()
    if process == 0:
        try:
            signal.alarm(DEADLINE_S)
            told = work(*args)
        except BaseException as error:
            told = {"broke": f"{type(error).__name__}: {error}"}
        answer.write(json.dumps(told).encode())
        answer.flush()
        os._exit(0)

    def wait() -> Outcome:
        _, status = os.waitpid(process, 0)
        with answer:
            answer.seek(0)
            return Outcome(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(answer.read() or b"{}"))

    return wait


def after_each(faults: Sequence[dict[str, str]], folder: Path, work: Callable[..., Any], *args: Any) -> list[Outcome]:
    """Run ``work(folder, fault, *args)`` in a fork for each fault, in an empty folder; then sweep it and look what is there."""
    outcomes = []
    for fault in faults:
        folder.mkdir()
        outcome = fork(work, folder, fault, *args)()
        swept = [path.name for path in remove_leftovers(folder)]
        outcomes.append(Outcome(outcome.signal, outcome.told, {path.name: value_of(path) for path in folder.iterdir()}, swept))
        shutil.rmtree(folder)
    return outcomes


def arm(folder: Path, fault: dict[str, str]) -> None:
    os.environ |= {"FAULT_FOLDER": str(folder), **fault}


def disarm() -> None:
    del os.environ["FAULT_FOLDER"]


def tensors(value: float) -> list[LocalTensor]:
    """Some slots, what does not fill a page, and what is copied in the call."""
    lazy = [torch.full((20_000,), value), torch.full((33,), value).bfloat16()]
    named = [LocalTensor.whole(f"model/{i}", tensor, lazy=True) for i, tensor in enumerate(lazy)]
    return [*named, whole("model/eager", torch.full((7, 3), value))]


def value_of(path: Path) -> float:
    """Return the one value that all of a checkpoint holds."""
    value = float(load_state(path)["value"])
    found = load_state_dict(path)
    for expected in tensors(value):
        assert torch.equal(found[expected.name.removeprefix("model/")], expected.tensor), f"{path} is torn"
    return value


def save_now(path: Path, value: float) -> None:
    save(path, tensors(value), {"value": value}, rank=0, world_size=1, save_id=f"s{value:g}")


def begin(checkpointer: Checkpointer, path: Path, value: float) -> None:
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "save_id": f"s{value:g}", "timeout_s": 30.0}
    checkpointer.save(path, tensors(value), {"value": value}, **options)


def failure_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def three_saves(folder: Path, fault: dict[str, str], name: str) -> dict[str, Any]:
    """Save 1 as ``a``; under the fault save 2 as ``name`` and remove ``a``, if it is not that; then save 3 as ``name``."""
    told: dict[str, Any] = {}
    save_now(folder / "a", 1.0)
    checkpointer = Checkpointer(SETTINGS)
    arm(folder, fault)
    begin(checkpointer, folder / name, 2.0)
    told["error"] = failure_of(checkpointer.wait)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name != "a":
            checkpointer.remove(folder / "a")
            checkpointer.wait()
    told["warnings"] = [str(warning.message) for warning in caught]
    disarm()
    told["then"] = {path.name: value_of(path) for path in folder.iterdir() if is_checkpoint(path)}
    begin(checkpointer, folder / name, 3.0)
    checkpointer.close()
    told["leftovers"] = leftovers(folder / name)
    return told


def calls_of(server: RankPool, folder: Path, work: Callable[..., Any], *args: Any, calls: str | None = None) -> list[str]:
    """Return the system calls of ``work`` in their order, each with its path."""
    log = folder.with_name("calls.log")
    log.unlink(missing_ok=True)
    fault = {"FAULT_LOG": str(log)} | ({"FAULT_CALLS": calls} if calls else {})
    (outcome,) = server.run(after_each, 1, [fault], folder, work, *args)[0]
    assert "broke" not in outcome.told
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()]


def strike(server: RankPool, folder: Path, name: str, **fault: str) -> list[tuple[str, bool, Outcome]]:
    """Strike each call in turn; return it, whether it comes after the publication, and what became of the three saves."""
    calls = calls_of(server, folder, three_saves, name, calls=fault.get("FAULT_CALLS"))
    (publication,) = [i for i, call in enumerate(calls) if call == f"rename {folder}/.{name}.s2.partial"] or [len(calls)]
    faults = [{"FAULT_AT": str(i + 1), **fault} for i in range(len(calls))]
    outcomes = server.run(after_each, 1, faults, folder, three_saves, name)[0]
    return [(call, i > publication, outcome) for i, (call, outcome) in enumerate(zip(calls, outcomes, strict=True))]


# --------------------------------------------------------------------------------------------------- calls that fail


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_fails_costs_no_checkpoint_and_is_told(server: RankPool, memory: Path, name: str) -> None:
    struck = strike(server, memory / "f", name, FAULT_ACTION="fail", FAULT_ERRNO=str(errno.EIO))
    assert len(struck) > 40
    for call, is_published, outcome in struck:
        told = outcome.told
        assert "broke" not in told, (call, told)
        assert outcome.holds[name] == 3.0, call  # the next save works,
        assert told["leftovers"] == [], call  # and removes what is left
        if told["error"] is None and not is_published:  # the call itself looks what stands there; so does the worker
            assert call == f"close {memory}/f/a/manifest.json"
            assert told["then"] == {"a": 2.0}, call
        elif not is_published:
            assert f"saving {memory}/f/{name} failed on rank 0: OSError: [Errno 5]" in told["error"], call
            assert os.strerror(errno.EIO) in told["error"], call
            assert told["then"] == {"a": 1.0}, call
        elif told["error"]:  # it stands there, and may not have outlived a crash of the machine
            assert call in (f"fsync {memory}/f", f"close {memory}/f")
            assert told["then"][name] == 2.0, call
        elif call.startswith(f"rename {memory}/f/a"):
            assert told["then"] == {"a": 1.0, name: 2.0}, call
            assert any(f"{memory}/f/a" in text and "not removed" in text for text in told["warnings"])
        else:
            assert told["then"] == {name: 2.0}, call


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_stays_full_costs_no_checkpoint(server: RankPool, memory: Path, name: str) -> None:
    full = {"FAULT_ERRNO": str(errno.ENOSPC), "FAULT_TIMES": "1000000", "FAULT_CALLS": THAT_NEED_ROOM}
    struck = strike(server, memory / "f", name, FAULT_ACTION="fail", **full)
    assert {call.split()[0] for call, _, _ in struck} == set(THAT_NEED_ROOM.split())
    for call, _, outcome in struck:
        assert "No space left on device" in outcome.told["error"], call
        assert f"saving {memory}/f/{name} failed" in outcome.told["error"], call
        assert outcome.told["then"] == {"a": 1.0}, call
        assert outcome.holds[name] == 3.0, call
        assert outcome.told["leftovers"] == [], call


def test_writes_that_are_cut_short_are_carried_on(server: RankPool, memory: Path) -> None:
    for calls in (" pwrite ", " write "):
        for times in ("1", "1000000"):
            struck = strike(server, memory / "f", "a", FAULT_ACTION="short", FAULT_CALLS=calls, FAULT_TIMES=times)
            assert len(struck) >= 3
            for call, _, outcome in struck:
                assert outcome.told["error"] is None, call
                assert outcome.told["then"] == {"a": 2.0}, call


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_or_exchange_will_do(server: RankPool, memory: Path, code: int) -> None:
    options = {"FAULT_ACTION": "fail", "FAULT_ERRNO": str(code), "FAULT_TIMES": "1000000"}
    fault = {"FAULT_AT": "1", "FAULT_CALLS": " fallocate ", **options}
    (outcome,) = server.run(after_each, 1, [fault], memory / "f", three_saves, "a")[0]
    assert outcome.told["error"] is None
    assert outcome.told["then"] == {"a": 2.0}
    # The exchange fails once; two renames take its place.
    renames = calls_of(server, memory / "f", three_saves, "a", calls=" rename ")
    at = renames.index(f"rename {memory}/f/.a.s2.partial") + 1
    fault = {"FAULT_AT": str(at), "FAULT_CALLS": " rename ", **options, "FAULT_TIMES": "1"}
    (outcome,) = server.run(after_each, 1, [fault], memory / "f", three_saves, "a")[0]
    assert outcome.told["error"] is None
    assert outcome.told["then"] == {"a": 2.0}


def save_under_two_names(folder: Path, fault: dict[str, str]) -> dict[str, Any]:
    """Save 1 as ``a`` and, while nothing changes, as ``last``: a link, if the fault does not prevent it."""
    checkpointer = Checkpointer(SETTINGS)
    options: dict[str, Any] = {"rank": 0, "world_size": 1}
    arm(folder, {"FAULT_CALLS": " link ", "FAULT_FOLDER": f"{folder}/.last.s2.partial/shard", **fault})
    held = tensors(1.0)[:2]  # what is not lazy is copied anew, and may differ
    for name, save_id in (("a", "s1"), ("last", "s2")):
        checkpointer.save(folder / name, held, {"value": 1.0}, save_id=save_id, **options)
    error = failure_of(checkpointer.close)
    shards = [path / "shard-00001-of-00001.safetensors" for path in folder.iterdir() if is_checkpoint(path)]
    same = [load_state_dict(shard.parent).keys() == {"0", "1"} for shard in shards]
    return {"error": error, "inodes": len({shard.stat().st_ino for shard in shards}), "names": len(shards), "load": all(same)}


def test_a_link_that_cannot_be_made_is_a_copy_and_one_that_fails_costs_one_checkpoint(server: RankPool, tmp_path: Path) -> None:
    for code, expected in (
        (0, {"error": None, "inodes": 1, "names": 2, "load": True}),
        *[(code, {"error": None, "inodes": 2, "names": 2, "load": True}) for code in (errno.EPERM, errno.EXDEV, errno.EMLINK)],
        (errno.EIO, {"inodes": 1, "names": 1, "load": True}),
    ):
        (tmp_path / str(code)).mkdir()
        fault = {"FAULT_ACTION": "fail", "FAULT_ERRNO": str(code)} | ({"FAULT_AT": "1"} if code else {})
        told = told_by(server, save_under_two_names, tmp_path / str(code), fault)
        assert {name: told[name] for name in expected} == expected, os.strerror(code)
        if code == errno.EIO:
            assert f"saving {tmp_path}/{code}/last failed on rank 0" in told["error"]
            assert "Input/output error" in told["error"]


# ------------------------------------------------------------------------------------------------- calls that are the last


@pytest.mark.parametrize("name", NAMES)
def test_a_save_that_is_killed_at_any_call_leaves_the_former_or_the_new_checkpoint(
    server: RankPool, memory: Path, name: str
) -> None:
    before = strike(server, memory / "f", name, FAULT_ACTION="kill-before")
    after = strike(server, memory / "f", name, FAULT_ACTION="kill-after", FAULT_CALLS=" rename link ")
    for call, is_published, outcome in before:
        assert outcome.signal == signal.SIGKILL, call
        if not is_published:
            assert outcome.holds == {"a": 1.0}, call
        else:
            assert outcome.holds[name] == 2.0, call
            assert outcome.holds.keys() <= {"a", name}
    for call, is_published, outcome in after:
        is_publication = call.endswith(f".{name}.s2.partial")
        assert outcome.holds.get(name) == (2.0 if is_published or is_publication else 1.0 if name == "a" else None), call
    assert any(outcome.swept for _, _, outcome in before)


# ---------------------------------------------------------------------------------------------------- two ranks


def rows(rank: int, value: float) -> list[LocalTensor]:
    piece = Piece(local=(0,), offset=(10_000 * rank,), shape=(10_000,))
    half = LocalTensor(
        name="model/0", tensor=torch.full((10_000,), value), global_shape=(20_000,), pieces=(piece,), owners=(rank,), lazy=True
    )
    others = [LocalTensor.whole(each.name, each.tensor, owners=(0, 1)) for each in tensors(value)[1:]]
    return [half, *others]


def rank_of_two(folder: Path, fault: dict[str, str], rank: int, value: float, timeout_s: float) -> dict[str, Any]:
    checkpointer = Checkpointer(SETTINGS)
    if fault:
        arm(folder, fault)
    checkpointer.save(
        folder / "a",
        rows(rank, value),
        {"value": value},
        rank=rank,
        world_size=2,
        save_id=f"s{value:g}",
        rank_state={"rank": rank},
        timeout_s=timeout_s,
    )
    return {"error": failure_of(checkpointer.close)}


def two_ranks(folder: Path, fault: dict[str, str], struck: int) -> list[Any]:
    """Save 1; two ranks save 2, of which one meets the fault, and then 3. Return the errors, or signals, of each."""
    save_now(folder / "a", 1.0)
    told: list[Any] = []
    for value in (2.0, 3.0):
        faults = [fault if rank == struck and value == 2.0 else {} for rank in range(2)]
        timeout_s = 3.0 if value == 2.0 and "kill" in fault["FAULT_ACTION"] else 60.0
        forks = [fork(rank_of_two, folder, faults[rank], rank, value, timeout_s) for rank in range(2)]
        outcomes = [wait() for wait in forks]
        told.append([outcome.signal or outcome.told.get("broke") or outcome.told["error"] for outcome in outcomes])
        told.append(value_of(folder / "a"))
    told.append(leftovers(folder / "a"))
    return told


#: What one of two ranks meets: the beginning of the file's name, the call, and how it ends.
FOR_TWO = [
    *[("control/begun", "open", "fail"), ("shard", "fallocate", "fail"), ("shard", "pwrite", "fail")],
    *[("shard", "fsync", "fail"), ("shard", "close", "fail"), ("control/report", "rename", "fail")],
    *[("shard", "pwrite", "kill-before"), ("control/report", "rename", "kill-before")],
]


@pytest.mark.parametrize("struck", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_fault_on_one_of_two_ranks_is_told_on_both(server: RankPool, memory: Path, struck: int) -> None:
    folder = memory / "f"
    faults = [
        {"FAULT_FOLDER": f"{folder}/.a.s2.partial/{name}", "FAULT_CALLS": f" {call} ", "FAULT_AT": "1", "FAULT_ACTION": action}
        for name, call, action in FOR_TWO
    ]
    outcomes = server.run(after_each, 1, faults, folder, two_ranks, struck)[0]
    for case, outcome in zip(FOR_TWO, outcomes, strict=True):
        (errors, then, errors_of_the_next, at_last, beside_it) = outcome.told
        assert (then, errors_of_the_next, at_last, beside_it) == (1.0, [None, None], 3.0, []), case
        if case[2] == "fail":
            assert f"saving {folder}/a failed on rank {struck}: OSError: [Errno 5]" in errors[struck], case
            assert errors[0] == errors[1], case
        else:
            assert errors[struck] == signal.SIGKILL
            assert f"saving {folder}/a was given up after 3 s" in errors[1 - struck], case


# ------------------------------------------------------------------------------------------------- real file systems

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 16384, 1 << 18


def mount(folder: Path, num_bytes: int, flags: int = 0) -> None:
    """Mount a file system in memory for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not flags and libc.unshare(_CLONE_NEWNS if os.getuid() == 0 else _CLONE_NEWNS | _CLONE_NEWUSER) == 0:
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    options = f"size={num_bytes},nr_inodes=100".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) != 0:
        raise PermissionError(ctypes.get_errno(), "no file system can be mounted here")


def fill_a_disk(folder: Path) -> list[Any]:
    """Save on file systems of all sizes at which something else is the first that has no room."""
    told = []
    for pages in range(28, 64, 2):
        mount(folder, pages * 4096)
        save_now(folder / "a", 1.0)
        checkpointer = Checkpointer(SETTINGS)
        begin(checkpointer, folder / "a", 2.0)
        error = failure_of(checkpointer.close)
        remove_leftovers(folder)
        told.append((error, value_of(folder / "a"), leftovers(folder / "a")))
    return told


def save_read_only(folder: Path) -> dict[str, Any]:
    mount(folder, 1 << 20)
    save_now(folder / "a", 1.0)
    (folder / ".b.s9.partial" / "control").mkdir(parents=True)
    (folder / ".b.s9.partial" / "control" / "lock").touch()
    checkpointer = Checkpointer(SETTINGS)
    mount(folder, 1 << 20, _MS_REMOUNT | _MS_RDONLY)
    begin(checkpointer, folder / "a", 2.0)
    told: dict[str, Any] = {"error": failure_of(checkpointer.wait), "then": value_of(folder / "a")}
    told["swept"] = [path.name for path in remove_leftovers(folder)]
    mount(folder, 1 << 20, _MS_REMOUNT)
    begin(checkpointer, folder / "a", 3.0)
    checkpointer.close()
    told["swept at last"] = [path.name for path in remove_leftovers(folder)]
    return told | {"at last": value_of(folder / "a"), "beside it": leftovers(folder / "a")}


def told_by(server: RankPool, work: Callable[..., Any], *args: Any) -> Any:
    outcome = server.run(in_fork, 1, work, *args)[0]
    if "mounted here" in str(outcome.told):
        pytest.skip(outcome.told["broke"])
    assert "broke" not in outcome.told, outcome.told
    return outcome.told


def in_fork(work: Callable[..., Any], *args: Any) -> Outcome:
    return fork(work, *args)()


def test_a_disk_that_is_really_full_costs_no_checkpoint(server: RankPool, tmp_path: Path) -> None:
    told = told_by(server, fill_a_disk, tmp_path)
    assert len({error is None for error, _, _ in told}) == 2  # there was room for some and not for others
    for error, value, beside_it in told:
        assert value == (2.0 if error is None else 1.0)
        assert beside_it == []
        assert error is None or (f"saving {tmp_path}/a failed" in error and "No space left on device" in error)


def test_a_read_only_file_system_is_told_and_what_stands_there_loads(server: RankPool, tmp_path: Path) -> None:
    told = told_by(server, save_read_only, tmp_path)
    assert f"Read-only file system: '{tmp_path}/.a.s2.partial'" in told["error"]
    assert told["then"] == 1.0
    assert told["swept"] == []
    assert told["swept at last"] == [".b.s9.partial"]
    assert (told["at last"], told["beside it"]) == (3.0, [])


@pytest.mark.skipif(os.getuid() == 0, reason="permissions do not bind root; a read-only file system does: see above")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    save_now(tmp_path / "a", 1.0)
    tmp_path.chmod(0o500)
    try:
        checkpointer = Checkpointer(SETTINGS)
        begin(checkpointer, tmp_path / "a", 2.0)
        assert "Permission denied" in (failure_of(checkpointer.close) or "")
        assert value_of(tmp_path / "a") == 1.0
    finally:
        tmp_path.chmod(0o700)


def save_beyond_a_limit(folder: Path, fault: dict[str, str]) -> dict[str, Any]:
    save_now(folder / "a", 1.0)
    arm(folder, fault)
    checkpointer = Checkpointer(SETTINGS)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    begin(checkpointer, folder / "a", 2.0)
    told = {"error": failure_of(checkpointer.wait)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    begin(checkpointer, folder / "a", 3.0)
    checkpointer.close()
    return told | {"beside it": leftovers(folder / "a")}


def test_a_limit_of_file_sizes_is_told_when_a_file_is_reserved_or_written(server: RankPool, tmp_path: Path) -> None:
    cannot_reserve = {"FAULT_AT": "1", "FAULT_TIMES": "9", "FAULT_CALLS": " fallocate "}
    cannot_reserve |= {"FAULT_ACTION": "fail", "FAULT_ERRNO": str(errno.EOPNOTSUPP)}
    outcomes = server.run(after_each, 1, [{}, cannot_reserve], tmp_path / "f", save_beyond_a_limit)[0]
    for call, outcome in zip(("fallocate", "pwrite"), outcomes, strict=True):
        assert f"{call}: File too large: '{tmp_path}/f/.a.s2.partial/shard-00001-of-00001" in outcome.told["error"]
        assert outcome.holds == {"a": 3.0}
        assert outcome.told["beside it"] == []


@pytest.mark.parametrize("what", ["the unpublished directory", "the folder"])
def test_a_directory_that_vanishes_in_mid_save_is_told(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "f"
    save_now(folder / "a", 1.0)
    checkpointer = Checkpointer(SETTINGS)
    is_begun, has_vanished, settle = threading.Event(), threading.Event(), PendingSave.settle

    def settle_later(self: PendingSave) -> None:
        if threading.current_thread() is not threading.main_thread():  # the worker, between the writing and the file's end
            is_begun.set()
            has_vanished.wait(DEADLINE_S)
        settle(self)

    with monkeypatch.context() as patch:
        patch.setattr(PendingSave, "settle", settle_later)
        begin(checkpointer, folder / "a", 2.0)
        assert is_begun.wait(DEADLINE_S)
    assert (folder / ".a.s2.partial" / "shard-00001-of-00001.safetensors").exists()
    shutil.rmtree(folder if what == "the folder" else folder / ".a.s2.partial")
    has_vanished.set()
    error = failure_of(checkpointer.wait) or ""
    assert f"saving {folder}/a failed on rank 0: FileNotFoundError" in error
    assert f"{folder}/.a.s2.partial" in error
    if what != "the folder":
        assert value_of(folder / "a") == 1.0
    begin(checkpointer, folder / "a", 3.0)
    checkpointer.close()
    assert value_of(folder / "a") == 3.0
    assert [path.name for path in folder.iterdir()] == ["a"]


# -------------------------------------------------------------------------------------------------------- training


def train(folder: Path, fault: dict[str, str], on_error: Any, io: str) -> dict[str, Any]:
    """Train six steps and save after each second one."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    import kenotron
    from kenotron.callbacks import AsyncCheckpointIO
    from kenotron.strategies.settings import CheckpointSettings

    losses: list[float] = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch).square().mean()
            losses.append(float(loss.detach()))
            return loss

        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            while batch_idx == 5 and not checkpointer().last.done():  # so that the next save knows of the failure
                time.sleep(0.001)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def checkpointer() -> Any:
        return trainer.strategy.checkpointer if io == "strategy" else how["plugins"][0].checkpointer

    arm(folder, fault)
    L.seed_everything(1, verbose=False)
    if io == "strategy":
        how: dict[str, Any] = {"strategy": kenotron.KenotronStrategy(checkpoint=CheckpointSettings(on_error=on_error))}
    else:
        how = {"plugins": [AsyncCheckpointIO(on_error=on_error)]}
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=6, callbacks=[keep], **quiet, **how)
    data = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = failure_of(lambda: trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4)))
    told = [str(warning.message) for warning in caught if "was not saved" in str(warning.message)]
    return {"losses": losses, "error": error, "warnings": told, "step": trainer.global_step}


def import_lightning() -> None:
    import lightning  # noqa: F401


@pytest.mark.parametrize("io", ["strategy", pytest.param("plugin", marks=pytest.mark.slow)])
def test_training_goes_on_or_stops_as_asked_when_a_checkpoint_fails(server: RankPool, tmp_path: Path, io: str) -> None:
    server.run(import_lightning, 1)
    second_is_full = {"FAULT_CALLS": " fallocate ", "FAULT_AT": "2"}
    second_is_full |= {"FAULT_ACTION": "fail", "FAULT_ERRNO": str(errno.ENOSPC)}
    told = {}
    for name, fault, on_error in (("good", {}, "raise"), ("warn", second_is_full, "warn"), ("raise", second_is_full, "raise")):
        (tmp_path / name).mkdir()
        told[name] = told_by(server, train, tmp_path / name, fault, on_error, io)
    assert len(told["good"]["losses"]) == 6
    assert told["good"]["error"] is None
    assert told["warn"]["losses"] == told["good"]["losses"]
    assert told["warn"]["error"] is None
    (warning,) = told["warn"]["warnings"]
    assert f"training goes on: saving {tmp_path}/warn/step=4.ckpt failed" in warning
    assert "No space left on device" in warning
    assert f"saving {tmp_path}/raise/step=4.ckpt failed" in told["raise"]["error"]
    assert "No space left on device" in told["raise"]["error"]
    assert told["raise"]["step"] == 6
    expected = {name: ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"] for name in told}
    expected |= {"warn": ["step=2.ckpt", "step=6.ckpt"], "raise": ["step=2.ckpt"]}
    for name, checkpoints in expected.items():
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == checkpoints
        for path in checkpoints:
            good, found = (load_state_dict(tmp_path / one / path, "") for one in ("good", name))
            assert good.keys() == found.keys()
            assert all(torch.equal(good[key], found[key]) for key in good)

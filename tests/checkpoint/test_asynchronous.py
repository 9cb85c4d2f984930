"""Saving in the background: what the call copies, what the fence waits for, the order of things, and errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kenotron.checkpoint import (
    Checkpointer,
    EngineSettings,
    LocalTensor,
    Piece,
    RanksMissingError,
    SaveFailedError,
    is_checkpoint,
    load_state,
    load_state_dict,
    read_manifest,
    remove_leftovers,
    save,
    verify,
)

#: So little that a save of a megabyte lasts a second.
SLOW = EngineSettings(pool_bytes=1 << 16, slot_bytes=1 << 14, max_bytes_per_s=1e6)
SMALL = EngineSettings(pool_bytes=1 << 18, slot_bytes=1 << 14)


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[Checkpointer] = []

    def one(settings: EngineSettings = SMALL, **options: Any) -> Checkpointer:
        made.append(Checkpointer(settings, **options))
        return made[-1]

    yield one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for checkpointer in made:
            checkpointer.on_error = "warn"
            checkpointer.close()


def begin(
    checkpointer: Checkpointer, path: Path, tensors: dict[str, torch.Tensor], *, lazy: bool = True, **options: Any
) -> Any:
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "save_id": uuid.uuid4().hex, **options}
    locals_ = [LocalTensor.whole(name, tensor, lazy=lazy) for name, tensor in tensors.items()]
    return checkpointer.save(path, locals_, {"step": 1}, **settings)


def value_at(path: Path) -> float:
    return float(load_state_dict(path, "")["w"][0])


# ---------------------------------------------------------------------------------------------------- one save


def test_the_call_returns_before_and_the_checkpoint_appears_when_it_is_complete(make: Any, tmp_path: Path) -> None:
    checkpointer = make(SLOW)
    pending = begin(checkpointer, tmp_path / "a", {"w": torch.ones(1 << 18)})
    assert not pending.done()
    assert not (tmp_path / "a").exists()
    checkpointer.wait()
    assert pending.done()
    assert value_at(tmp_path / "a") == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert pending.stats["call_s"] < pending.stats["staged_s"] <= pending.stats["written_s"] <= pending.stats["durable_s"]
    assert pending.stats["waited_for_room_s"] > 0


def test_after_the_fence_the_state_may_change(make: Any, tmp_path: Path) -> None:
    checkpointer, weight = make(SLOW), torch.ones(1 << 18)
    pending = begin(checkpointer, tmp_path / "a", {"w": weight})
    assert checkpointer.fence() > 0
    weight.fill_(2.0)
    assert not pending.done()
    checkpointer.wait()
    assert torch.equal(load_state_dict(tmp_path / "a", "")["w"], torch.ones(1 << 18))
    assert checkpointer.fence() == 0.0


@pytest.mark.parametrize("megabytes", [1, 9, 20])
def test_what_is_not_lazy_is_copied_in_the_call(make: Any, megabytes: int, tmp_path: Path) -> None:
    checkpointer = make(EngineSettings(pool_bytes=1 << 20, slot_bytes=1 << 18))
    buffers = {f"b{i}": torch.full((megabytes << 16,), float(i)) for i in range(4)}
    buffers["columns"] = torch.arange(12.0).reshape(3, 4).T
    lazy = LocalTensor.whole("w", torch.ones(1 << 16), lazy=True)
    eager = [LocalTensor.whole(name, tensor) for name, tensor in buffers.items()]
    checkpointer.save(tmp_path / "a", [lazy, *eager], {}, rank=0, world_size=1, save_id="s1")
    expected = {name: tensor.clone() for name, tensor in buffers.items()}
    for tensor in buffers.values():
        tensor.zero_()
    checkpointer.wait()
    loaded = load_state_dict(tmp_path / "a", "")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_the_files_are_those_of_a_synchronous_save(make: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(33, 50, generator=generator)
    box = Piece(local=(1, 2), offset=(0, 0), shape=(32, 48))
    tensors = [
        LocalTensor(name="a", tensor=whole[1:33, 2:50].T.contiguous().T, global_shape=(32, 48), owners=(0,), lazy=True,
                    pieces=(Piece(local=(0, 0), offset=(0, 0), shape=(32, 48)),)),
        LocalTensor.whole("bits", torch.randn(5000, generator=generator) > 0, lazy=True),
        LocalTensor.whole("b", torch.randn(7, 3, generator=generator).bfloat16(), lazy=True),
        LocalTensor.whole("every second", torch.randn(100, 6, generator=generator)[::2, ::3], lazy=True),
        LocalTensor.whole("conjugate", torch.randn(4, dtype=torch.complex64, generator=generator).conj(), lazy=True),
        LocalTensor.whole("expanded", torch.randn(3, 1, generator=generator).expand(3, 9), lazy=True),
        LocalTensor.whole("scalar", torch.tensor(5), lazy=True),
        LocalTensor.whole("empty", torch.zeros(0, 4), lazy=True),
    ]  # fmt: skip
    assert box.shape == (32, 48)
    state = {"generator": torch.get_rng_state(), "n": 3}
    save(tmp_path / "sync", tensors, state, rank=0, world_size=1, save_id="same", rank_state={"r": torch.ones(2)})
    checkpointer = make()
    checkpointer.save(tmp_path / "async", tensors, state, rank=0, world_size=1, save_id="same", rank_state={"r": torch.ones(2)})
    checkpointer.wait()
    names = sorted(path.name for path in (tmp_path / "sync").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "async").iterdir())
    for name in names:
        assert (tmp_path / "sync" / name).read_bytes() == (tmp_path / "async" / name).read_bytes(), name


def test_a_state_larger_than_the_pool_streams_through_it(make: Any, tmp_path: Path) -> None:
    checkpointer, weight = make(EngineSettings(pool_bytes=1 << 16, slot_bytes=1 << 14)), torch.randn(1 << 20)
    begin(checkpointer, tmp_path / "a", {"w": weight})
    checkpointer.wait()
    assert torch.equal(load_state_dict(tmp_path / "a", "")["w"], weight)


# --------------------------------------------------------------------------------------- what changes after the call


def count(weight: torch.Tensor) -> None:
    weight[5] = 2.0


def do_not_count(weight: torch.Tensor) -> None:
    weight.numpy()[:] = 2.0


@pytest.mark.parametrize(("change", "checked_share"), [(count, 0.0), (do_not_count, 1 / 64), (do_not_count, 1.0)])
def test_what_changes_before_it_is_copied_is_not_published_and_the_error_names_it(
    make: Any, change: Any, checked_share: float, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SLOW, checked_share=checked_share)
    checkpointer, weight = make(settings), torch.ones(1 << 18)
    begin(checkpointer, tmp_path / "a", {"w": weight, "other": torch.ones(3)})
    version = weight._version
    change(weight)
    assert (weight._version != version) == (change is count)
    with pytest.raises(SaveFailedError, match=r"saving .*/a: w changed between the call and the copy"):
        checkpointer.wait()
    assert list(tmp_path.iterdir()) == []
    begin(checkpointer, tmp_path / "a", {"w": weight})
    checkpointer.wait()
    assert torch.equal(load_state_dict(tmp_path / "a", "")["w"], weight)


def test_other_memory_for_a_tensor_leaves_what_was_there_at_the_call(make: Any, tmp_path: Path) -> None:
    checkpointer, weight = make(SLOW), torch.ones(1 << 18)
    begin(checkpointer, tmp_path / "a", {"w": weight})
    weight.data = torch.zeros(1 << 18)
    checkpointer.wait()
    assert torch.equal(load_state_dict(tmp_path / "a", "")["w"], torch.ones(1 << 18))


# -------------------------------------------------------------------------------------------------- many saves


def test_saves_are_published_and_removed_in_the_order_of_the_calls(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    for step in range(6):
        begin(checkpointer, tmp_path / f"step-{step}", {"w": torch.full((1000,), float(step))})
        if step >= 2:
            checkpointer.remove(tmp_path / f"step-{step - 2}")
        begin(checkpointer, tmp_path / "last", {"w": torch.full((1000,), float(step))})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-4", "step-5"]
    assert value_at(tmp_path / "last") == 5.0


def test_the_same_state_under_a_second_name_is_linked(make: Any, tmp_path: Path) -> None:
    checkpointer, weight, buffer = make(), torch.ones(1000), torch.zeros(3)
    tensors = [LocalTensor.whole("w", weight, lazy=True), LocalTensor.whole("b", buffer)]
    for index, name in enumerate(["a", "same", "buffer", "weight"]):
        if name == "buffer":
            buffer += 1
        elif name == "weight":
            checkpointer.fence()
            weight += 1
        checkpointer.save(tmp_path / name, tensors, {"name": name}, rank=0, world_size=1, save_id=f"s{index}")
    checkpointer.wait()
    shards = {name: next((tmp_path / name).glob("shard-*")) for name in ("a", "same", "buffer", "weight")}
    assert shards["a"].samefile(shards["same"])
    assert verify(tmp_path / "same").is_whole
    assert read_manifest(tmp_path / "same").origins == {shards["a"].name: "s0"}
    assert len({shard.stat().st_ino for shard in shards.values()}) == 3
    checkpointer.remove(tmp_path / "a")
    checkpointer.wait()
    assert load_state(tmp_path / "same") == {"name": "same"}
    assert value_at(tmp_path / "same") == 1.0
    assert value_at(tmp_path / "weight") == 2.0
    assert load_state_dict(tmp_path / "buffer", "")["b"].tolist() == [1.0] * 3


def test_after_a_fence_nothing_is_linked_whatever_torch_knows_of_changes(make: Any, tmp_path: Path) -> None:
    checkpointer, weight = make(), torch.ones(1000)
    for step in range(2):
        begin(checkpointer, tmp_path / f"step-{step}", {"w": weight})
        checkpointer.fence()
        weight.numpy()[:] = 2.0
    checkpointer.wait()
    assert [value_at(tmp_path / f"step-{step}") for step in range(2)] == [1.0, 2.0]


def test_what_would_be_linked_to_a_save_that_failed_fails_as_well(make: Any, tmp_path: Path) -> None:
    checkpointer = make(on_error="warn")
    (tmp_path / "file").write_text("")
    tensors, go_on = {"w": torch.ones(3)}, threading.Event()
    checkpointer._hand_over(go_on.wait)  # the first has not failed yet when the second begins
    begin(checkpointer, tmp_path / "file" / "a", tensors)
    second = begin(checkpointer, tmp_path / "b", tensors)
    second._snapshot.cancel()  # as where the first fails before it was copied
    go_on.set()
    with pytest.warns(UserWarning, match="holds the same as .*which was not saved"):
        checkpointer.wait()
    begin(checkpointer, tmp_path / "c", tensors)  # nothing is linked to what is known to have failed
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "file"]


def test_the_last_published_checkpoint_is_not_removed_before_there_is_another(make: Any, tmp_path: Path) -> None:
    checkpointer = make(on_error="warn")
    begin(checkpointer, tmp_path / "a", {"w": torch.ones(3)})
    (tmp_path / "file").write_text("")
    begin(checkpointer, tmp_path / "file" / "b", {"w": torch.ones(3)})
    checkpointer.remove(tmp_path / "a")
    with pytest.warns(UserWarning, match="training goes on: saving .*file"):
        checkpointer.wait()
    assert value_at(tmp_path / "a") == 1.0
    begin(checkpointer, tmp_path / "b", {"w": torch.zeros(3)})
    checkpointer.wait()
    assert value_at(tmp_path / "a") == 1.0  # what was to take its place is not there
    checkpointer.remove(tmp_path / "file" / "b")  # which gives up both
    checkpointer.wait()
    assert not (tmp_path / "a").exists()


def test_what_is_saved_again_is_wanted_again(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    begin(checkpointer, tmp_path / "a", {"w": torch.ones(3)})
    checkpointer.remove(tmp_path / "a")
    begin(checkpointer, tmp_path / "a", {"w": torch.zeros(3)})
    begin(checkpointer, tmp_path / "b", {"w": torch.zeros(3)})
    checkpointer.wait()
    assert is_checkpoint(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------- errors


def test_a_failure_is_raised_once_and_the_next_save_works(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    (tmp_path / "file").write_text("")
    begin(checkpointer, tmp_path / "file" / "a", {"w": torch.ones(3)})
    with pytest.raises(SaveFailedError, match=r"saving .*file.a failed on rank 0"):
        checkpointer.wait()
    begin(checkpointer, tmp_path / "b", {"w": torch.ones(3)})
    checkpointer.wait()
    assert value_at(tmp_path / "b") == 1.0


def test_what_is_no_checkpoint_is_not_replaced(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    (tmp_path / "a").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not a checkpoint"):
        begin(checkpointer, tmp_path / "a", {"w": torch.ones(3)})
    checkpointer.wait()
    assert (tmp_path / "a").read_text() == "precious"


def test_a_value_that_cannot_be_stored_is_refused_in_the_call(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    with pytest.raises(ValueError, match="pickle"):
        checkpointer.save(tmp_path / "a", [], {"bad": object()}, rank=0, world_size=1, save_id="s1")
    checkpointer.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "num_threads", "on_gpu", "started"),
    [(None, 1, False, 1), (None, 8, False, 2), (None, 1, True, 2), (1, 8, False, 1), (3, 1, False, 3)],
)
def test_two_threads_copy_where_one_would_hold_up_several(
    asked: int | None, num_threads: int, on_gpu: bool, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    found: dict[str, Any] = {}
    monkeypatch.setattr("kenotron.checkpoint.engine.Engine", lambda **fields: found.update(fields))
    EngineSettings(num_copiers=asked).start()
    assert found["num_copiers"] == started


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"slot_bytes": 1000}, "multiple of 4096"),
        ({"pool_bytes": 1 << 20, "slot_bytes": 1 << 21}, "at least slot_bytes"),
        ({"num_writers": 0}, "num_writers=0"),
        ({"num_copiers": 0}, "num_copiers=0"),
        ({"niceness": 20}, "niceness=20"),
        ({"checked_share": 2.0}, "checked_share"),
        ({"max_bytes_per_s": 0.0}, "max_bytes_per_s"),
        ({"cpus": (100_000,)}, "cpus"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EngineSettings(**settings)
    with pytest.raises(ValueError, match="on_error='ignore'"):
        Checkpointer(on_error="ignore")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- many ranks


def on_ranks(count: int, work: Any) -> list[BaseException | None]:
    """Run ``work(rank, checkpointer)`` on as many threads as there are ranks, and wait; return what each raised."""
    raised: list[BaseException | None] = [None] * count

    def run(rank: int) -> None:
        checkpointer = Checkpointer(SMALL)
        try:
            work(rank, checkpointer)
            checkpointer.wait()
        except BaseException as error:
            raised[rank] = error
        checkpointer.on_error = "warn"
        checkpointer.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def rows(rank: int, count: int) -> LocalTensor:
    piece = Piece(local=(0, 0), offset=(2 * rank, 0), shape=(2, 5))
    tensor = torch.full((2, 5), float(rank))
    return LocalTensor(name="w", tensor=tensor, global_shape=(2 * count, 5), pieces=(piece,), owners=(rank,), lazy=True)


def test_ranks_save_together_without_a_process_group(tmp_path: Path) -> None:
    def work(rank: int, checkpointer: Checkpointer) -> None:
        for step in range(3):
            options: dict[str, Any] = {"rank": rank, "world_size": 3, "save_id": f"s{step}"}
            checkpointer.save(tmp_path / f"step-{step}", [rows(rank, 3)], {"step": step}, **options)

    assert on_ranks(3, work) == [None] * 3
    for step in range(3):
        assert load_state(tmp_path / f"step-{step}") == {"step": step}
        assert load_state_dict(tmp_path / f"step-{step}", "")["w"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_rank_that_refuses_its_part_tells_the_others(tmp_path: Path) -> None:
    def work(rank: int, checkpointer: Checkpointer) -> None:
        state = {"bad": object()} if rank == 1 else {}
        options: dict[str, Any] = {"rank": rank, "world_size": 2, "save_id": "s", "rank_state": state}
        checkpointer.save(tmp_path / "a", [rows(rank, 2)], {}, **options)

    first, second = on_ranks(2, work)
    assert isinstance(second, ValueError)
    assert isinstance(first, SaveFailedError)
    assert "failed on rank 1" in str(first)
    assert list(tmp_path.iterdir()) == []


def test_closing_in_a_hurry_does_not_wait_for_ranks_that_are_gone(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    checkpointer.save(tmp_path / "a", [rows(0, 2)], {}, rank=0, world_size=2, save_id="s", timeout_s=600.0)
    with pytest.raises(RanksMissingError, match=r"ranks \[1\]"):
        checkpointer.close(others_timeout_s=0.3)


def test_closing_in_a_hurry_does_not_wait_for_a_rank_0_that_died_while_it_published(make: Any, tmp_path: Path) -> None:
    checkpointer = make()
    pending = checkpointer.save(tmp_path / "a", [rows(1, 2)], {}, rank=1, world_size=2, save_id="s", timeout_s=600.0)
    control = tmp_path / ".a.s.partial" / "control"
    while not (control / "report-00001.json").exists():
        assert not pending.done()
    draft = control / "draft"
    draft.write_text('{"publish": "yes"}')
    draft.rename(control / "verdict.json")  # never seen half written, as rank 0 does it
    with pytest.raises(RanksMissingError, match=r"rank 0 had all reports|ranks \[0\]"):
        checkpointer.close(others_timeout_s=0.3)


# --------------------------------------------------------------------------------------------------- leftovers

DIES_WHILE_SAVING = """
import sys, torch
from kenotron.checkpoint import Checkpointer, EngineSettings, LocalTensor
checkpointer = Checkpointer(EngineSettings(pool_bytes=1 << 16, slot_bytes=1 << 14, max_bytes_per_s=1e5))
tensors = [LocalTensor.whole("w", torch.ones(1 << 20), lazy=True)]
checkpointer.save(sys.argv[1], tensors, {}, rank=0, world_size=1, save_id="s")
while True:
    pass
"""


def test_leftovers_of_the_dead_are_removed_and_what_lives_stays(make: Any, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", DIES_WHILE_SAVING, str(tmp_path / "a")])
    try:
        while not list(tmp_path.glob(".a.*.partial/shard-*")):
            assert process.poll() is None
        assert remove_leftovers(tmp_path) == []
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in remove_leftovers(tmp_path)] == [".a.s.partial"]
    assert list(tmp_path.iterdir()) == []
    assert remove_leftovers(tmp_path / "missing") == []


INTERRUPTED_AT_THE_FENCE = """
import os, signal, threading
try:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    checkpointer.fence()
except KeyboardInterrupt:
    os._exit(3)
"""


def test_a_fence_that_waits_for_a_disk_can_be_interrupted(tmp_path: Path) -> None:
    script = DIES_WHILE_SAVING.replace("while True:\n    pass\n", INTERRUPTED_AT_THE_FENCE).replace("1e5", "1e4")
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], timeout=120).returncode == 3


def test_an_interpreter_that_ends_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    script = DIES_WHILE_SAVING.replace("while True:\n    pass\n", "").replace("1e5", "4e6")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True, timeout=120)
    assert is_checkpoint(tmp_path / "a")

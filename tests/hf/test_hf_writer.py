from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import all_kinds, bits, cut, peak_growth, same_bits, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kenotron.hf import HFDirectory, HFWriter, ModelIncompleteError

INDEX = "model.safetensors.index.json"
PAIR = (torch.float32, (2,))


def planned(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write(out: Path, plan: dict[str, Any], *writes: tuple[Any, ...], max_shard_bytes: int = 10**9) -> None:
    with HFWriter(out, max_shard_bytes=max_shard_bytes) as writer:
        writer.plan(plan)
        for each in writes:
            writer.write(*each)


def write_all(out: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> None:
    write(out, planned(tensors), *tensors.items(), max_shard_bytes=max_shard_bytes)


def tiles(shape: tuple[int, ...], count: int, generator: random.Random) -> list[tuple[tuple[int, int], ...]]:
    """Cut a shape at random into boxes."""
    boxes = [tuple((0, size) for size in shape)]
    for _ in range(count):
        box = boxes.pop(generator.randrange(len(boxes)))
        dim = generator.randrange(len(shape))
        at = generator.randint(*box[dim])
        boxes += [(*box[:dim], part, *box[dim + 1 :]) for part in ((box[dim][0], at), (at, box[dim][1]))]
    generator.shuffle(boxes)
    return boxes


# ---- What is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 1), (200, None)])
def test_every_dtype_and_shape_is_written_bit_for_bit(tmp_path: Path, max_shard_bytes: int, num_files: int | None) -> None:
    tensors, out = all_kinds(), tmp_path / "out"
    write_all(out, tensors, max_shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert (out / INDEX).exists() == (num_files is None)
    assert len(files) == num_files if num_files else len(files) > 3
    plain = {name: tensor for file in files for name, tensor in load_file(file).items()}
    found = HFDirectory(out)
    assert found.tensors.keys() == plain.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(plain[name], tensor), name
        assert same_bits(found.read(name), tensor), name


@pytest.mark.parametrize("shape", [(37,), (9, 11), (4, 3, 5), (2, 1, 3, 4)])
def test_boxes_may_come_in_any_order_and_with_any_strides(tmp_path: Path, shape: tuple[int, ...]) -> None:
    generator = random.Random(len(shape))
    tensors = {str(dtype): bits(shape, dtype) for dtype in (torch.bool, torch.bfloat16, torch.float32, torch.int64)}
    parts = [(name, box) for name in tensors for box in tiles(shape, 9, generator)]
    generator.shuffle(parts)
    with HFWriter(tmp_path / "out", max_shard_bytes=200) as writer:
        writer.plan(planned(tensors))
        for name, box in parts:
            wide = torch.empty([2 * stop - 2 * start for start, stop in box], dtype=tensors[name].dtype)
            strided = wide[tuple(slice(None, None, 2) for _ in shape)]
            writer.write(name, strided.copy_(cut(tensors[name], box)), box)
    found = HFDirectory(tmp_path / "out")
    assert all(same_bits(found.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("max_shard_bytes", "is_sharded"), [(5 * 10**9, False), (20_000, True), (1, True)])
def test_files_and_index_are_those_of_save_pretrained_and_from_pretrained_loads_them(
    tmp_path: Path, max_shard_bytes: int, is_sharded: bool
) -> None:
    model, theirs, ours = tiny_llama(), tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size=max_shard_bytes)
    with HFWriter(ours, max_shard_bytes=max_shard_bytes) as writer:
        writer.plan(planned(model.state_dict()))
        model.config.save_pretrained(writer.path)
        model.generation_config.save_pretrained(writer.path)
        for name, tensor in model.state_dict().items():
            writer.write(name, tensor)
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    assert (theirs / INDEX).exists() == is_sharded
    if is_sharded:
        assert (ours / INDEX).read_text() == (theirs / INDEX).read_text()
    loaded, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == torch.bfloat16
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_metadata_and_what_stands_beside_are_published(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty directory is nothing
    with HFWriter(tmp_path / "out", metadata={"format": "pt", "step": "7"}) as writer:
        writer.plan({"w": PAIR})
        (writer.path / "tokenizer").mkdir()
        (writer.path / "tokenizer" / "vocab.txt").write_text("a")
        writer.write("w", torch.ones(2))
        assert os.listdir(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "tokenizer"]
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_an_empty_directory_keeps_pointing_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    write_all(tmp_path / "out", {"w": torch.ones(2)})
    assert (tmp_path / "out").is_symlink()
    assert HFDirectory(tmp_path / "out").read("w").tolist() == [1, 1]


def test_all_is_on_the_disk_before_the_directory_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(f"{Path(a).name} -> {Path(b).name}"), rename(a, b))[1])
    with HFWriter(tmp_path / "parent" / "out", max_shard_bytes=8) as writer:
        (writer.path / "config.json").write_text("{}")
        writer.plan(dict.fromkeys("ab", PAIR))
        writer.write("b", torch.ones(2))
        assert done[-1] == "model-00002-of-00002.safetensors"  # as soon as it is complete
        writer.write("a", torch.ones(2))
    publication = done.index(f"{writer.path.name} -> out")
    files = {"config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", writer.path.name}
    assert files <= set(done[:publication])
    assert done[publication + 1 :] == ["parent"]


def test_memory_is_bounded_by_the_slices(tmp_path: Path) -> None:
    piece, num_rows = torch.ones(512, 256), 128 * 512  # 64 MiB, in slices of half a MiB
    writes = [("w", piece, ((row, row + 512), (0, 256))) for row in range(0, num_rows, 512)]
    assert peak_growth(lambda: write(tmp_path / "out", {"w": (torch.float32, (num_rows, 256))}, *writes)) < 8 << 20


# ---- What is wrong --------------------------------------------------------------------------------------------------


def nothing_is_left(folder: Path) -> bool:
    return os.listdir(folder) == []


def test_what_was_not_written_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    plan = dict.fromkeys("abcd", (torch.float32, (3, 4))) | {"empty": (torch.float32, (0, 4))}
    whole, rows, again = (
        ("a", torch.ones(3, 4)),
        ("b", torch.ones(2, 4), ((0, 2), (0, 4))),
        ("c", torch.ones(1, 4), ((1, 2), (0, 4))),
    )
    with pytest.raises(ModelIncompleteError) as caught:
        write(tmp_path / "out", plan, whole, rows, again, again, max_shard_bytes=40)
    assert caught.value.problems == (
        "b: of the shape [3, 4] the element [2, 0] was written 0 times",
        "c: of the shape [3, 4] the element [0, 0] was written 0 times",
        "d: nothing of it was written",
    )
    assert nothing_is_left(tmp_path)


def test_a_box_that_came_twice_in_place_of_another_is_found(tmp_path: Path) -> None:
    half = ("w", torch.ones(2), ((0, 2),))
    with pytest.raises(ModelIncompleteError, match=r"w: of the shape \[4\] the element \[0\] was written 2 times"):
        write(tmp_path / "out", {"w": (torch.float32, (4,))}, half, half)
    assert nothing_is_left(tmp_path)


def test_more_than_a_tensor_has_is_refused(tmp_path: Path) -> None:
    nothing, all_of_it = ("empty", torch.ones(0)), ("w", torch.ones(2))
    with pytest.raises(ValueError, match="w: with box=None more would be written"):
        write(tmp_path / "out", {"w": PAIR, "empty": (torch.float32, (0,))}, nothing, nothing, all_of_it, nothing, all_of_it)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("each", "problem"),
    [
        (("v", torch.ones(2, 3)), "v is not planned"),
        (("w", torch.ones(2, 3).bfloat16()), r"float32 of the shape \[2, 3\] is planned, not torch.bfloat16"),
        (("w", torch.ones(3, 2)), r"not torch.float32 of \[3, 2\]"),
        (("w", torch.ones(2, 3), ((0, 1), (0, 3))), r"of the shape \[1, 3\] is planned"),
        (("w", torch.ones(2, 4), ((0, 2), (0, 4))), "does not lie in the shape"),
        (("w", torch.ones(2, 3, device="meta")), "on the meta device"),
    ],
)
def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path, each: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        write(tmp_path / "out", {"w": (torch.float32, (2, 3))}, each)
    assert nothing_is_left(tmp_path)


def test_a_plan_comes_once_and_holds_what_can_be_stored(tmp_path: Path) -> None:
    with HFWriter(tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="at least one"):
            writer.plan({})
        with pytest.raises(ValueError, match=r"w: safetensors has no dtype for torch\.complex128"):
            writer.plan({"w": (torch.complex128, (2,))})
        writer.plan({"w": PAIR})
        with pytest.raises(ValueError, match="in one call"):
            writer.plan({"v": PAIR})
        writer.write("w", torch.ones(2))
    assert os.listdir(tmp_path) == ["out"]


def test_a_block_without_a_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelIncompleteError, match=r"plan\(\) was not called"), HFWriter(tmp_path / "out"):
        pass
    assert nothing_is_left(tmp_path)


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        HFWriter(tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ValueError, match="must map text to text"):
        HFWriter(tmp_path / "out", metadata={"step": 7})  # type: ignore[dict-item]


def overtaken(out: Path) -> None:
    with HFWriter(out) as writer:
        writer.plan({"w": PAIR})
        writer.write("w", torch.ones(2))
        out.mkdir()
        (out / "theirs").write_text("somebody was faster")


def test_what_stands_at_the_path_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(ValueError, match="out exists and is not an empty directory; choose another path, or remove it first"):
        HFWriter(out)
    out.unlink()
    with pytest.raises(ValueError, match="out exists"):
        overtaken(out)
    assert (os.listdir(tmp_path), os.listdir(out)) == (["out"], ["theirs"])
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="is a mount point"):
        HFWriter(tmp_path / "other")


def interrupted(out: Path) -> None:
    with HFWriter(out, max_shard_bytes=8) as writer:
        writer.plan(dict.fromkeys("abc", PAIR))
        writer.write("a", torch.ones(2))
        raise KeyboardInterrupt


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert nothing_is_left(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == num_open


@pytest.mark.parametrize("is_early", [True, False])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_early: bool
) -> None:
    pwrite, second, full = os.pwrite, "model-00002-of-00002.safetensors", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def claim(descriptor: int, num_bytes: int, path: Path) -> None:
        if is_early and path.name == second:
            raise OSError(full.errno, full.strerror, str(path))

    def write_some(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 4096 and os.readlink(f"/proc/self/fd/{descriptor}").endswith(second):
            raise full
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr("kenotron.hf.writer.reserve", claim)
    monkeypatch.setattr(os, "pwrite", write_some)
    with pytest.raises(OSError, match=f"No space left on device.*{second}"):
        write_all(tmp_path / "out", {"a": torch.ones(2), "b": torch.ones(2)}, max_shard_bytes=8)
    assert nothing_is_left(tmp_path)


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, tensor = os.pwrite, bits((9, 9), torch.float32)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    write_all(tmp_path / "out", {"w": tensor})
    assert same_bits(HFDirectory(tmp_path / "out").read("w"), tensor)


def test_an_index_counts_bytes_and_elements(tmp_path: Path) -> None:
    write_all(tmp_path / "out", {"a": torch.ones(3), "b": torch.ones(5, dtype=torch.bfloat16)}, max_shard_bytes=8)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 8, "total_size": 22}

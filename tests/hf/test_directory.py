from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import all_kinds, bits, cut, peak_growth, same_bits, some_box, tiny_llama
from safetensors.torch import load_file, save_file

import kenotron.hf.directory as directory_module
import kenotron.hf.ranges as ranges_module
from kenotron.checkpoint.boxes import find_flaw
from kenotron.hf import (
    HFDirectory,
    HFDirectoryError,
    HFTensor,
    NotAModelDirectoryError,
    ShardMalformedError,
    ShardMissingError,
    ShardTruncatedError,
    WeightIndexError,
)
from kenotron.hf.ranges import parts_of

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small tensors take every path: gaps read through and skipped, buffers filled several times."""
    monkeypatch.setattr(ranges_module, "GAP_BYTES", 24)
    monkeypatch.setattr(ranges_module, "STAGING_BYTES", 96)
    monkeypatch.setattr(directory_module, "STAGING_BYTES", 96)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files and their index: a and b in the first one, c and d in the second."""
    path = tmp_path / "model"
    path.mkdir()
    for file, names in zip(FILES, ("ab", "cd"), strict=True):
        save_file({name: bits((4, 4), torch.float32, ord(name)) for name in names}, path / file, {"format": "pt"})
    write_index(path, {"a": FILES[0], "b": FILES[0], "c": FILES[1], "d": FILES[1]})
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 256}, "weight_map": weight_map}))


def single(path: Path, tensors: dict[str, torch.Tensor]) -> HFDirectory:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return HFDirectory(path)


def forged(path: Path, header: object, data: bytes = b"") -> Path:
    """Make a directory of one file with any header at all."""
    path.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def sparse(path: Path, dtype: str, shape: tuple[int, ...], num_bytes: int) -> HFDirectory:
    forged(path, {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}})
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size + num_bytes)
    return HFDirectory(path)


# ---- What is right --------------------------------------------------------------------------------------------------


def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = all_kinds()
    found = single(tmp_path, tensors)
    assert sorted(found.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name] == (tensor.dtype, tuple(tensor.shape), "model.safetensors")
        assert same_bits(found.read(name), tensor)


@pytest.mark.parametrize("shape", [(37,), (9, 11), (4, 3, 5), (3, 2, 4, 3), (2, 1, 3, 1, 4), (1, 40)])
def test_random_boxes_are_what_slicing_gives(tmp_path: Path, shape: tuple[int, ...], small_buffers: None) -> None:
    generator = random.Random(len(shape))
    dtypes = (torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.float64)  # of every size, and odd ones
    tensors = {str(dtype): bits(shape, dtype, seed) for seed, dtype in enumerate(dtypes)}
    found = single(tmp_path, tensors)
    for _ in range(15):
        for name, tensor in tensors.items():
            box = some_box(shape, generator)
            wanted = cut(tensor, box)
            assert same_bits(found.read(name, box), wanted), (name, box)
            out = torch.zeros([2 * size for size in wanted.shape], dtype=tensor.dtype)[
                tuple(slice(None, None, 2) for _ in shape)
            ]
            assert found.read(name, box, out) is out
            assert same_bits(out, wanted), (name, box)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_out_of_another_dtype_converts_as_copy_does(tmp_path: Path, stored: torch.dtype, small_buffers: None) -> None:
    tensor = torch.linspace(-3, 3, 60).reshape(6, 10).to(stored)
    found, box = single(tmp_path, {"w": tensor}), ((1, 6), (2, 9))
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        for out in (torch.empty(5, 7, dtype=dtype), torch.empty(7, 5, dtype=dtype).T):
            torch.testing.assert_close(found.read("w", box, out), cut(tensor, box).to(dtype), rtol=0, atol=0)


def test_a_parameter_is_filled_in_place(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    single(tmp_path, {"w": torch.arange(12.0).reshape(3, 4)}).read("w", out=parameter)
    assert parameter.tolist() == torch.arange(12.0).reshape(3, 4).tolist()


@pytest.mark.parametrize(
    ("shape", "max_items"), [((7, 5), 35), ((7, 5), 12), ((7, 5), 3), ((2, 3, 7), 2), ((), 1), ((3, 0), 1)]
)
def test_parts_tile_a_shape_and_are_small(shape: tuple[int, ...], max_items: int) -> None:
    parts = list(parts_of(shape, max_items))
    assert find_flaw(parts, shape) is None
    assert all(part.volume <= max_items for part in parts)


def test_no_more_is_read_than_a_box_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls, preadv = sparse(tmp_path, "F32", (1000, 100_000), 400_000_000), [], os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr("kenotron.hf.directory.os.preadv", count)
    found.read("w", ((5, 7), (0, 100_000)))
    assert calls == [800_000]  # rows lie together
    calls.clear()
    found.read("w", ((5, 8), (10, 20)))
    assert calls == [40, 40, 40]  # the gaps are longer than what a seek costs
    calls.clear()
    found.read("w", ((5, 8), (0, 90_000)))
    assert calls == [(2 * 100_000 + 90_000) * 4]  # and here they are not
    calls.clear()
    found.read("w", ((5, 5), (0, 90_000)))
    assert calls == []


def test_short_reads_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, preadv = bits((9, 9), torch.float32), os.preadv
    found = single(tmp_path, {"w": tensor})
    monkeypatch.setattr("kenotron.hf.directory.os.preadv", lambda fd, data, at: preadv(fd, [data[0][:7]], at))
    assert same_bits(found.read("w"), tensor)


def test_memory_grows_by_the_rows_that_are_read(tmp_path: Path) -> None:
    found, rows = sparse(tmp_path, "F32", (50, 1_000_000), 200_000_000), ((10, 13), (0, 1_000_000))
    few, small = torch.empty(50_000, 8, dtype=torch.bfloat16), 4 << 20
    assert peak_growth(lambda: found.read("w", rows)) < 12_000_000 + small
    assert (
        peak_growth(lambda: found.read("w", rows, torch.empty(3, 1_000_000, dtype=torch.float64)))
        < 24_000_000 + (8 << 20) + small
    )
    narrow = sparse(tmp_path, "F32", (50_000, 1000), 200_000_000)
    assert peak_growth(lambda: narrow.read("w", ((0, 50_000), (3, 11)), few)) < (18 << 20) + small


def test_what_save_pretrained_wrote_is_read_back(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    model.save_pretrained(tmp_path / "single")
    for path in (tmp_path / "sharded", tmp_path / "single"):
        found, state = HFDirectory(path), model.state_dict()
        assert sorted(found.names()) == sorted(state)
        assert all(same_bits(found.read(name), tensor) for name, tensor in state.items())
        assert found.config()["num_hidden_layers"] == 3
    assert len({tensor.file for tensor in HFDirectory(tmp_path / "sharded").tensors.values()}) > 2


def test_shards_are_found_by_their_index_and_other_files_do_not_count(sharded: Path) -> None:
    save_file({"a": torch.ones(3)}, sharded / "consolidated.safetensors")
    found = HFDirectory(sharded)
    assert found.tensors["c"] == HFTensor(torch.float32, (4, 4), FILES[1])
    assert same_bits(found.read("c"), load_file(sharded / FILES[1])["c"])
    assert [found.tensors[name].file for name in found.names()] == [FILES[0], FILES[0], FILES[1], FILES[1]]


def test_a_single_file_may_have_any_name_and_be_a_link(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "blob")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").symlink_to(tmp_path / "blob")
    assert HFDirectory(tmp_path / "model").read("w").tolist() == [1, 1, 1]


# ---- What is asked wrongly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [((0, 1),), ((0, 1), (0, 6)), ((-1, 1), (0, 5)), ((3, 2), (0, 5)), ((0, 1), (0, 5), (0, 1))])
def test_a_box_outside_of_the_tensor_is_refused(tmp_path: Path, box: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"w: box=.* does not lie in the shape \[7, 5\]"):
        single(tmp_path, {"w": torch.ones(7, 5)}).read("w", box)


def test_an_unknown_name_is_told_with_those_like_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tensor 'model.norm.bias'; it has model.norm.weight"):
        single(tmp_path, {"model.norm.weight": torch.ones(7)}).read("model.norm.bias")


@pytest.mark.parametrize("out", [torch.ones(5, 7), torch.ones(7, 5, device="meta"), torch.eye(5).to_sparse()])
def test_an_out_that_does_not_fit_is_refused(tmp_path: Path, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="w: "):
        single(tmp_path, {"w": torch.ones(7, 5)}).read("w", out=out)


# ---- What is wrong with a directory ---------------------------------------------------------------------------------


def test_a_path_that_is_no_directory_says_that_models_are_not_downloaded() -> None:
    with pytest.raises(
        NotAModelDirectoryError, match=r"meta-llama/Llama-3\.1-8B is not a directory\. Models are not downloaded"
    ):
        HFDirectory("meta-llama/Llama-3.1-8B")


def test_pickles_alone_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    with pytest.raises(NotAModelDirectoryError, match="holds no safetensors files"):
        HFDirectory(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(NotAModelDirectoryError, match=r"pickles alone \(pytorch_model.bin\).*from_pretrained.*save_pretrained"):
        HFDirectory(tmp_path)


def test_several_files_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(NotAModelDirectoryError, match=f"several safetensors files .* and no {INDEX}"):
        HFDirectory(sharded)


def test_a_single_file_beside_an_index_of_others_is_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(3)}, sharded / "model.safetensors")
    with pytest.raises(NotAModelDirectoryError, match="which is the model"):
        HFDirectory(sharded)
    write_index(sharded, {"a": "model.safetensors"})
    assert HFDirectory(sharded).names() == ["a"]


@pytest.mark.parametrize("content", [None, "[]", "{", b"\xff"])
def test_a_config_that_cannot_be_read_is_told(sharded: Path, content: str | bytes | None) -> None:
    if content is not None:
        (sharded / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NotAModelDirectoryError, match=r"config.json"):
        HFDirectory(sharded).config()


def test_a_truncated_file_tells_both_lengths_and_the_first_tensor_that_is_cut_off(sharded: Path) -> None:
    file = sharded / FILES[1]
    size = file.stat().st_size
    os.truncate(file, size - 65)  # d takes the last 64 bytes, c those before
    with pytest.raises(ShardTruncatedError, match=f"{file} is cut off: it has {size - 65} bytes .* needs {size}.* whole is c"):
        HFDirectory(sharded)
    os.truncate(file, size - 1)
    with pytest.raises(ShardTruncatedError, match="whole is d"):
        HFDirectory(sharded)


@pytest.mark.parametrize("length", [0, 5, 8, 50])
def test_a_file_that_ends_within_its_header_is_told(sharded: Path, length: int) -> None:
    os.truncate(sharded / FILES[1], length)
    with pytest.raises(ShardTruncatedError, match=f"it has {length} bytes and its header alone takes"):
        HFDirectory(sharded)


def test_a_file_that_is_cut_after_it_was_opened_is_told(sharded: Path) -> None:
    found = HFDirectory(sharded)
    os.truncate(sharded / FILES[1], 200)
    with pytest.raises(ShardTruncatedError, match="has only 200 bytes left; it has been cut since"):
        found.read("d")


def entry(begin: int = 0, end: int = 8, **others: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]} | others


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"{", "malformed header"),
        (b"[1]", "no JSON object"),
        (b"\xff\xfe", "malformed header"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        ({"w": 3}, "w does not have dtype"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "w does not have dtype"),
        ({"w": entry(dtype="F4")}, "w has the dtype 'F4', which is none of BOOL"),
        ({"w": entry(dtype=[1])}, "w has the dtype"),
        ({"w": entry(shape=[-1])}, "no lists of sizes"),
        ({"w": entry(shape=[True, 2])}, "no lists of sizes"),
        ({"w": entry(shape=[2] * 2000)}, "no lists of sizes"),
        ({"w": entry(shape=2)}, "no lists of sizes"),
        ({"w": entry(shape=[3])}, r"data_offsets \[0, 8\] and takes 12 bytes"),
        ({"w": entry(8, 0)}, "takes 8 bytes"),
        ({"w": entry(data_offsets=[0])}, "takes 8 bytes"),
        ({"v": entry(), "w": entry(4, 12)}, "w begins at byte"),
        ({"w": entry(4, 12)}, "w begins at byte"),
        ({"w": entry()}, "bytes, of which its header describes"),
    ],
)
def test_a_malformed_file_says_what_is_wrong(tmp_path: Path, header: object, problem: str) -> None:
    with pytest.raises(ShardMalformedError, match=problem):
        HFDirectory(forged(tmp_path, header, b"x" * 12))


def test_every_flaw_of_a_header_is_told(tmp_path: Path) -> None:
    with pytest.raises(ShardMalformedError, match=r"(?s)v has the dtype.*w has a shape"):
        HFDirectory(forged(tmp_path, {"v": entry(dtype="?"), "w": entry(shape=None)}))


def test_what_is_no_safetensors_file_at_all_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ShardMalformedError, match="git lfs pull"):
        HFDirectory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ShardMalformedError, match="no safetensors file"):
        HFDirectory(tmp_path)


def swap(path: Path) -> None:
    write_index(path, {"a": FILES[0], "b": FILES[1], "c": FILES[1], "d": FILES[1], "e": FILES[1]})


def double(path: Path) -> None:
    save_file({name: torch.ones(1) for name in "bcd"}, path / FILES[1])


@pytest.mark.parametrize(
    ("damage", "kind", "problem"),
    [
        (lambda path: (path / FILES[0]).unlink(), ShardMissingError, f"{FILES[0]} is missing"),
        (swap, WeightIndexError, rf"says that {FILES[1]} holds b \(which {FILES[0]} has\), e; it does not"),
        (double, WeightIndexError, f"b is in {FILES[0]} and in {FILES[1]}"),
        (lambda path: (path / INDEX).write_text("{"), WeightIndexError, "is malformed"),
        (
            lambda path: (path / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
            WeightIndexError,
            "'a' is there twice",
        ),
        (lambda path: write_index(path, None), WeightIndexError, "no weight_map"),
        (lambda path: write_index(path, {"a": 1}), WeightIndexError, "no weight_map"),
        (lambda path: write_index(path, {}), WeightIndexError, "weight_map is empty"),
        (lambda path: write_index(path, {"a": "../x", "b": ".."}), WeightIndexError, r"not directly .*'\.\.', '\.\./x'"),
    ],
)
def test_an_index_that_contradicts_the_files_is_told(
    sharded: Path, damage: Callable[[Path], object], kind: type[HFDirectoryError], problem: str
) -> None:
    damage(sharded)
    with pytest.raises(kind, match=problem):
        HFDirectory(sharded)


def test_all_problems_are_told_at_once(sharded: Path) -> None:
    write_index(sharded, {"a": FILES[0], "c": FILES[1], "x": FILES[0], "y": "gone.safetensors", "z": "other.safetensors"})
    os.truncate(sharded / FILES[1], (sharded / FILES[1]).stat().st_size - 1)
    shutil.copy(sharded / FILES[0], sharded / "other.safetensors")
    with open(sharded / "other.safetensors", "r+b") as file:
        file.write((10**9).to_bytes(8, "little"))
    with pytest.raises(HFDirectoryError) as caught:
        HFDirectory(sharded)
    assert type(caught.value) is HFDirectoryError
    told = ["gone.safetensors is missing", f"{FILES[1]} is cut off", "other.safetensors is no safe", f"{FILES[0]} holds x;"]
    assert len(caught.value.problems) == len(told)
    for text in told:
        assert sum(text in problem for problem in caught.value.problems) == 1, text
        assert text in str(caught.value)

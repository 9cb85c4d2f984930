from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import SaveOnRanks, flip_bit, forge, rows, save_value, whole

from kenotron.checkpoint import (
    Damage,
    FileReport,
    NotACheckpointError,
    NotPublishedError,
    VersionTooNewError,
    read_manifest,
    verify,
)
from kenotron.checkpoint.format import unpublished
from kenotron.checkpoint.values import pickles_in

FULL = torch.arange(240.0).reshape(60, 4)
FIRST, SECOND = "shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors"


def explode() -> None:
    pytest.fail("a pickle was loaded")


class Odd:
    """What only a pickle can hold, and what must not be loaded."""

    def __reduce__(self) -> Any:
        return explode, ()


@pytest.fixture
def path(tmp_path: Path, save_on_ranks: SaveOnRanks, small_chunks: int) -> Path:
    """A checkpoint of two ranks: a tensor of 960 bytes that is cut in two, small ones, and a pickle."""
    full, small = rows("model/w", FULL, 2), [whole(f"model/{i}", torch.arange(9.0) + i) for i in range(3)]
    state = {"odd": [Odd(), {"t": torch.ones(3)}]}
    raised = save_on_ranks(tmp_path / "a", [[full[0], *small], [full[1]]], state, allow_pickle=True, save_id="one")
    assert raised == [None, None]
    return tmp_path / "a"


def test_a_whole_checkpoint_has_no_damage_and_all_of_it_was_read(path: Path) -> None:
    seen: list[FileReport] = []
    report = verify(path, on_file=seen.append)
    assert report.is_whole
    assert report.damages == ()
    assert tuple(seen) == report.files
    assert [file.name for file in report.files] == ["manifest.json", FIRST, "pickle-0.bin", SECOND]
    data = sum(piece.end - piece.begin for t in read_manifest(path).tensors.values() for piece in t.pieces)
    others = sum((path / name).stat().st_size for name in ("manifest.json", "pickle-0.bin"))
    assert sum(file.num_bytes for file in report.files) == data + others


def test_every_flipped_bit_of_every_file_is_found_in_its_file(path: Path) -> None:
    generator = random.Random(0)
    for name in (FIRST, SECOND, "pickle-0.bin"):
        file = path / name
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little") if name.endswith("safetensors") else 0
        used = len(good[:header].rstrip()) + 2  # of the padding that follows, two spaces will do
        for position in [*range(used), *range(header, len(good))]:
            flip_bit(file, position, generator.randrange(8))
            damages = verify(path).damages
            assert {damage.file for damage in damages} == {name}, (position, damages)
            file.write_bytes(good)
    assert verify(path).is_whole


def test_all_damages_are_told_with_tensor_file_and_bytes(path: Path) -> None:
    pieces = {name: tensor.pieces for name, tensor in read_manifest(path).tensors.items()}
    (left, right), (small,) = pieces["model/w"], pieces["model/1"]
    flip_bit(path / FIRST, left.begin + 3)
    flip_bit(path / FIRST, left.begin + 64)
    flip_bit(path / FIRST, left.begin + 200)
    flip_bit(path / FIRST, small.begin)
    flip_bit(path / SECOND, right.end - 1)
    flip_bit(path / "pickle-0.bin", 5)
    wrong = "the data does not have its checksum"

    def damage(file: str, tensor: str, begin: int, end: int) -> Damage:
        return Damage(file=file, problem=wrong, tensor=tensor, begin=begin, end=end)

    num_bytes = (path / "pickle-0.bin").stat().st_size
    odd = f"this pickle of a {Odd.__module__}.Odd does not have its checksum"
    assert set(verify(path).damages) == {
        damage(FIRST, "model/w", left.begin, left.begin + 128),  # two chunks that follow one another
        damage(FIRST, "model/w", left.begin + 192, left.begin + 256),
        damage(FIRST, "model/1", small.begin, small.end),
        damage(SECOND, "model/w", right.begin + 448, right.end),
        Damage(file="pickle-0.bin", problem=odd, begin=0, end=num_bytes),
    }
    assert str(damage(FIRST, "model/w", 7, 9)) == f"{FIRST}, tensor model/w, bytes 7 to 9: {wrong}"


def test_of_a_file_that_was_cut_the_lost_tensors_are_named(path: Path) -> None:
    (left, _) = read_manifest(path).tensors["model/w"].pieces
    os.truncate(path / FIRST, left.begin + 100)
    size, *lost = verify(path).damages
    assert "bytes and should have" in size.problem
    assert lost[0] == Damage(
        file=FIRST, problem="the file has ended before", tensor="model/w", begin=left.begin + 100, end=left.end
    )
    assert [damage.tensor for damage in lost] == ["model/w", "model/0", "model/1", "model/2", "state/0"]
    assert {damage.file for damage in lost} == {FIRST}


def test_a_missing_file_is_a_damage_and_the_others_are_read(path: Path) -> None:
    for name in (FIRST, "pickle-0.bin"):
        (path / name).unlink()
    report = verify(path)
    assert [damage.file for damage in report.damages] == [FIRST, "pickle-0.bin"]
    assert all("is missing" in damage.problem for damage in report.damages)
    assert report.files[-1].num_bytes > 0


def rewrite_header(file: Path, change: Any) -> None:
    """Change a safetensors header and keep its length."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def test_a_header_must_say_what_the_manifest_says(path: Path) -> None:
    shard = path / SECOND
    good = shard.read_bytes()
    key = "model/w@30,0"

    for change, problem in [
        (lambda header: header[key].update(dtype="I32"), f"its header says of {key}: "),
        (lambda header: header[key].update(shape=[4, 30]), f"its header says of {key}: "),
        (lambda header: header.update(other=header.pop(key)), f"its header says of {key}: None"),
        (lambda header: header.update(other=header.pop(key)), "entries that the manifest does not know: other"),
        (lambda header: header["__metadata__"].update(save_id="two"), "should have those of the save 'one'"),
        (lambda header: header.pop("__metadata__"), "should have those of the save 'one'"),
        (lambda header: header.pop(key), "the safetensors library does not open it: "),  # bytes that belong to no tensor
        (lambda header: header[key].update(shape=[5]), "the safetensors library does not open it: "),
    ]:
        rewrite_header(shard, change)
        found = verify(path).damages
        assert any(problem in damage.problem for damage in found), found
        assert {damage.file for damage in found} == {SECOND}
        shard.write_bytes(good)
    for data in (b"", good[:7], b"\xff" * 8 + good[8:], (100_000).to_bytes(8, "little") + b"[" * 100_000):
        shard.write_bytes(data)
        assert any("its header cannot be read: " in damage.problem for damage in verify(path).damages)


def test_a_shard_of_another_save_is_found_by_its_header(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_value(tmp_path / name, f"save-{name}", 1.0)
    shard = "shard-00001-of-00001.safetensors"
    (tmp_path / "a" / shard).write_bytes((tmp_path / "b" / shard).read_bytes())
    (damage,) = verify(tmp_path / "a").damages
    assert "'save_id': 'save-b'" in damage.problem


def test_a_damaged_manifest_is_the_only_damage_that_is_told(path: Path) -> None:
    flip_bit(path / "manifest.json", 200)
    (damage,) = verify(path).damages
    assert damage.file == "manifest.json"
    assert "its checksum does not match" in damage.problem


@pytest.mark.parametrize("node", [{"$pickle": {}}, {"$pickle": 1}, [{"$tuple": [{"$pickle": []}]}]])
def test_a_forged_state_is_a_damage_of_the_manifest(path: Path, node: Any) -> None:
    forge(path, lambda manifest: manifest.update(state=node))
    (damage,) = verify(path).damages
    assert damage.file == "manifest.json"
    assert "the state is not one that was encoded" in damage.problem


def test_a_pickle_that_is_not_listed_is_a_damage_of_the_manifest(path: Path) -> None:
    forge(path, lambda manifest: manifest["files"].pop("pickle-0.bin"))
    (damage,) = verify(path).damages
    assert damage.file == "manifest.json"
    assert "pickle-0.bin, which holds a" in damage.problem


def test_pickles_are_found_at_any_depth() -> None:
    content = {"file": "a", "type": "x", "crc32c": 1}
    nested = {"a": [{"$dict": [[1, {"$pickle": content}]]}], "b": {"$pickle": content | {"file": "b"}}}
    assert sorted(pickles_in(nested)) == [("a", "x", 1), ("b", "x", 1)]


def test_what_is_no_published_checkpoint_is_not_verified(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        verify(tmp_path / "nothing")
    forge(path, lambda manifest: manifest.update(version=2))
    with pytest.raises(VersionTooNewError):
        verify(path)
    partial = unpublished(path, "x")
    path.rename(partial)
    with pytest.raises(NotPublishedError):
        verify(partial)

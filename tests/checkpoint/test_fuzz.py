"""Checkpoints that somebody has forged or that a disk has damaged: typed errors alone, no allocation from a forged size,
nothing opened outside of the directory, and no bit of a tensor that changes unseen.

A forger can seal a manifest anew; the cases here do. Each follows from its seed and number, which failures name.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import random
import re
import resource
import shutil
import sys
import time
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import SaveOnRanks, flip_bit, forge, rows

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint import (
    CheckpointError,
    ChecksumError,
    FileMissingError,
    FileSizeError,
    LocalTensor,
    ManifestDamagedError,
    NotACheckpointError,
    load_into,
    load_rank_state,
    load_state,
    load_state_dict,
    read_manifest,
)
from kenotron.checkpoint.readme import README
from kenotron.checkpoint.verify import verify
from kenotron.testing import RankPool

FULL = torch.arange(6000.0).reshape(60, 100)
NAMES = ["model/w", "model/b", "model/tied", "optimizer.0/w/exp_avg"]
#: What the loader may take beyond what it has: the whole checkpoint is 60 kB.
SPARE_BYTES = 256 << 20
#: How long one case may take. Most take a millisecond.
PATIENCE_S = 5.0


@pytest.fixture(scope="module")
def apart() -> Iterator[RankPool]:
    """A process of its own: what it may allocate is limited, and what it opens is watched."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture
def checkpoint(tmp_path: Path, save_on_ranks: SaveOnRanks) -> Path:
    """Two ranks' checkpoint with something of all that there is."""
    held = [
        [
            row,
            LocalTensor.whole("model/b", torch.arange(50).bfloat16(), owners=(0, 1)),
            LocalTensor.whole("optimizer.0/w/exp_avg", torch.arange(33, dtype=torch.int16), owners=(rank,))
            if rank == 1
            else LocalTensor.whole("empty", torch.zeros(0, 4), owners=(0,)),
        ]
        for rank, row in enumerate(rows("model/w", FULL, 2))
    ]
    state = {
        "step": 7, "lr": [1e-3, float("nan")], "text": "é", "tuple": (1, 2**70), "numpy": np.float32(3), "array": np.arange(3),
        "many": [np.array(["a", "bc"]), {1, 2}, deque([1], 3), range(3), slice(1, 2), Path("a"), Namespace(a=1)],
        "more": [torch.Size([2]), Counter("aab"), OrderedDict(a=1), defaultdict(list, {"a": [1]}), {1: 2}, b"bytes", 1j],
        "torch": [torch.device("cpu"), torch.float16], "seen": torch.arange(9), "mark": pytest.mark.slow,
    }  # fmt: skip
    per_rank = {rank: {"rank_state": {"rng": torch.arange(5) + rank}} for rank in range(2)}
    options = {"aliases": {"model/tied": "model/b"}, "allow_pickle": True, "per_rank": per_rank}
    path = tmp_path / "inside" / "a"
    assert save_on_ranks(path, held, state, **options) == [None] * 2
    return path


def load_all(path: Path, *, allow_pickle: bool = False) -> list[Any]:
    """Load all there is in every way; return what each call did: the manifest first, if it raises that alone."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [error]
    calls: list[Callable[[], Any]] = [
        lambda: load_state_dict(manifest, ""),
        lambda: load_state(manifest, allow_pickle=allow_pickle),
        lambda: load_into(manifest, [LocalTensor.whole("model/w", torch.zeros(60, 100))], strict=False),
        *[functools.partial(load_rank_state, manifest, rank) for rank in range(2)],
    ]
    found: list[Any] = [manifest]
    for call in calls:
        try:
            found.append(call())
        except CheckpointError as error:
            found.append(error)
    return found


def errors_in(found: list[Any]) -> list[CheckpointError]:
    return [each for each in found if isinstance(each, CheckpointError)]


# ------------------------------------------------------------------------------------------------------------ forgeries

_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 4096, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**4000,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "..", "../secret", "../../secret", "/etc/passwd", "a/b", "a\\b",
    "a\0b", ".", "manifest.json", "control", "é", "\ud800", "x" * 300, "1" * 5000, "F32", "F4", "BOOL", "F64", "C64", "cuda:0",
    [], {}, [[]], [{}], [0], [-1], [2**62, 2**62], [0, 2**63 - 1, 2**63 - 1], [1] * 70, [2] * 40, [10**9, 10**9], _DEEP,
    {"$tensor": "model/w"}, {"$tensor": "state/0"}, {"$ndarray": "model/b"}, {"$tuple": [[1]]}, {"$int": "f" * 9999},
    {"$pickle": {"file": "../secret", "type": "x", "crc32c": 0}}, {"$bytes": "A" * 999}, {"$Size": [2**70]}, {"$set": [{}]},
    {"$range": [0, 2**70, 1]}, {"$a": 1, "$b": 2}, {"$deque": {"items": [1], "maxlen": 2**70}}, {"$dict": [[[], 1]]},
    *[{"$dtype": name} for name in ("_inductor", "nn", "load", "float32", "onnx")],
    *[
        {"$numpy": {"dtype": dtype, "shape": shape, "scalar": False, "data": "AAAAAAAAAAA="}}
        for dtype in ("<f4", "(,,f4", "|O8", "|V8", "<U999999999", "<M8[x]", "f4,f4", {"names": ["a"], "formats": ["O"]}, None)
        for shape in ([2], [2**40], [-1], [0, 2**62])
    ],
]  # fmt: skip


def places_in(node: Any) -> list[tuple[Any, Any]]:
    """Return each place in a nested structure: what holds it, and its key there."""
    places, waiting = [], [node]
    while waiting:
        inner = waiting.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        places += [(inner, key) for key in keys]
        waiting += [inner[key] for key in keys]
    return places


def mutate(node: dict[str, Any], generator: random.Random) -> None:
    """Change one thing."""
    places = places_in(node)
    holder, key = generator.choice(places)
    other, other_key = generator.choice(places)
    match generator.randrange(8):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(generator.choice(HOSTILE))
        case 3:
            holder[key] = copy.deepcopy(other[other_key])
        case 4:
            del holder[key]
        case 5 if isinstance(holder, dict):
            name = generator.choice([*NAMES, "../secret", "", "$tuple", "$tensor", "a" * 300, "state/0", "manifest.json", "é"])
            holder[name] = holder.pop(key)
        case 6 if isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * generator.choice([1, 2, 100])
        case _:
            value = holder[key]
            if type(value) is int:
                holder[key] = generator.choice(
                    [value + 1, value - 1, -value, value * 2**32, value ^ 1 << generator.randrange(40)]
                )
            else:
                holder[key] = [value] if generator.random() < 0.5 else {"$tuple": [value]}


def text_of(node: dict[str, Any], generator: random.Random) -> bytes:
    """Return the JSON, in some cases with what ``json.dumps`` does not make: keys twice, bytes that are none of its own."""
    text = json.dumps(node, separators=(",", ":")).encode()[:-1]
    match generator.randrange(10):
        case 0:
            key = generator.choice(list(node) or ["tensors"])
            text += b',"' + key.encode("utf-8", "replace") + b'":' + json.dumps(generator.choice(HOSTILE)).encode()
        case 1:
            data = bytearray(text)
            for _ in range(generator.randrange(1, 4)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            text = bytes(data)
        case 2:
            text += b',"x":' + generator.choice(
                [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"NaN", b"-Infinity", b'"\\ud800"']
            )
    return text


def forgery(good: bytes, seed: int, number: int) -> bytes:
    generator = random.Random(seed * 1_000_003 + number)
    node = json.loads(good)
    del node["crc32c"]
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        mutate(node, generator)
    text = text_of(node, generator)
    return text + b',"crc32c":"%08x"}\n' % crc32c(text)


class Watch:
    """Tells which files were opened outside of a folder. It cannot be taken away, only put to sleep."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._is_awake, self.opened = str(folder), False, list[str]()
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self._is_awake and event in ("open", "os.listdir", "os.scandir", "import"):
            if not isinstance(args[0], int) and not str(args[0]).startswith(self._folder):  # a descriptor was opened before
                self.opened.append(f"{event} {args[0]}")

    def __enter__(self) -> Watch:
        self._is_awake = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_awake = False


def load_forgeries(path: Path, seed: int, count: int) -> dict[str, Any]:
    """Load ``count`` forgeries with little memory; return what went wrong, and how often which error was raised."""
    file = path / "manifest.json"
    good = file.read_bytes()
    load_all(path, allow_pickle=True)  # so that what is imported late is there
    importlib.import_module("torch._subclasses.schema_check_mode")  # by some of torch's errors
    watch = Watch(path)
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE_BYTES, limits[1]))
    try:
        for number in range(count):
            file.unlink()  # a new file: what replaces another's content is flushed, as ext4 has it
            file.write_bytes(forgery(good, seed, number))
            began = time.monotonic()
            try:
                with watch:
                    found = load_all(path)
                outcomes[type(found[0]).__name__] += 1
            except Exception as error:
                problems.append(f"case {number}: {type(error).__name__}: {error!s:.200}")
            took = time.monotonic() - began
            if took > PATIENCE_S:
                problems.append(f"case {number}: took {took:.1f} s")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        file.write_bytes(good)
    return {"problems": problems, "outcomes": dict(outcomes), "opened": watch.opened}


@pytest.mark.parametrize(("seed", "count"), [(1, 1000), pytest.param(2, 12_500, marks=pytest.mark.slow)])
def test_forged_manifests_end_in_typed_errors_within_bounds(apart: RankPool, checkpoint: Path, seed: int, count: int) -> None:
    outside = checkpoint.parents[1] / "secret"  # as long as a shard, and with its bytes: it would load
    shutil.copy(checkpoint / "shard-00001-of-00002.safetensors", outside)
    (told,) = apart.run(load_forgeries, 1, checkpoint, seed, count, timeout_s=170.0)
    assert told["problems"] == []
    assert told["opened"] == []
    assert told["outcomes"]["ManifestDamagedError"] > count / 3
    assert told["outcomes"]["Manifest"] > count / 50  # some change nothing that matters
    assert sum(told["outcomes"].values()) == count


def load_slow_ones(path: Path, forgeries: list[bytes]) -> list[tuple[str, float]]:
    """Return for each manifest how it ended, and the seconds that it took."""
    told = []
    for content in forgeries:
        (path / "manifest.json").write_bytes(content + b',"crc32c":"%08x"}\n' % crc32c(content))
        began = time.monotonic()
        ended = type(load_all(path)[0]).__name__
        told.append((ended, time.monotonic() - began))
    return told


def test_a_manifest_cannot_ask_for_time_that_grows_faster_than_itself(apart: RankPool, checkpoint: Path) -> None:
    node = json.loads((checkpoint / "manifest.json").read_bytes())
    del node["crc32c"]

    def with_shape(shape: list[int]) -> bytes:
        forged = copy.deepcopy(node)
        stored = forged["tensors"]["model/w"]
        stored["shape"] = stored["pieces"][0]["shape"] = shape
        stored["pieces"][0]["offset"] = [0] * len(shape)
        return json.dumps(forged, separators=(",", ":")).encode()[:-1]

    shapes = [[int("9" * 4000)] * 1000, [2**62] * 100_000, [1] * 300_000, [0] + [2**62] * 100_000, [2**31] * 2]
    (told,) = apart.run(load_slow_ones, 1, checkpoint, [with_shape(shape) for shape in shapes])
    assert all(ended == "ManifestDamagedError" and took < PATIENCE_S for ended, took in told), told


def test_aliases_that_go_in_circles_are_refused(checkpoint: Path) -> None:
    for aliases in ({"x": "y", "y": "x"}, {"x": "x"}, {"x": "model/tied", "model/tied": "model/b"}, {"model/w": "model/b"}):
        forge(checkpoint, lambda node, aliases=aliases: node.update(aliases=aliases))
        with pytest.raises(ManifestDamagedError, match="is an alias of"):
            read_manifest(checkpoint)


def test_what_is_listed_as_a_file_and_is_none_is_refused(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("pickle-*.bin")
    for make in (os.mkdir, os.mkfifo):
        file.unlink()
        make(file)
        forge(checkpoint, lambda node: node["files"].update({file.name: file.stat().st_size}))
        (error,) = load_all(checkpoint, allow_pickle=True)
        assert isinstance(error, FileMissingError)
        assert f"{file} is no file" in str(error)
        (shutil.rmtree if file.is_dir() else os.unlink)(file)
        file.touch()


# --------------------------------------------------------------------------------------------------------------- damage


def tensor_at(path: Path, name: str, position: int) -> str | None:
    """Return the tensor that a byte of a shard belongs to."""
    for tensor, stored in read_manifest(path).tensors.items():
        for piece in stored.pieces:
            if piece.file == name and piece.begin <= position < piece.end:
                return tensor
    return None


def test_a_flipped_bit_of_any_byte_of_a_tensor_is_found_and_tensor_and_file_are_named(checkpoint: Path) -> None:
    generator = random.Random(1)
    hit = set()
    for _ in range(300):
        shard = checkpoint / f"shard-0000{generator.randrange(1, 3)}-of-00002.safetensors"
        position, bit = generator.randrange(4096, shard.stat().st_size), generator.randrange(8)
        tensor = tensor_at(checkpoint, shard.name, position)
        assert tensor is not None
        flip_bit(shard, position, bit)
        errors = errors_in(load_all(checkpoint, allow_pickle=True))
        (damage,) = verify(checkpoint).damages
        flip_bit(shard, position, bit)
        assert errors, f"byte {position}, bit {bit} of {shard.name}"
        for error in errors:
            assert isinstance(error, ChecksumError)
            assert f"{shard} is damaged: of the tensor {tensor} the bytes from" in str(error)
        assert (damage.file, damage.tensor) == (shard.name, tensor)
        hit.add(tensor)
    assert {"model/w", "model/b", "optimizer.0/w/exp_avg"} < hit


def test_a_flipped_bit_of_a_pickle_is_found_and_the_file_is_named(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("pickle-*.bin")
    for position in range(file.stat().st_size):
        flip_bit(file, position, position % 8)
        with pytest.raises(ChecksumError, match=re.escape(file.name)):
            load_state(checkpoint, allow_pickle=True)
        flip_bit(file, position, position % 8)


def test_damage_to_a_header_changes_nothing_that_is_loaded_and_verify_finds_it(checkpoint: Path) -> None:
    """The manifest says all; the header is there for other readers of safetensors."""
    generator = random.Random(1)
    expected = load_state_dict(checkpoint, "")
    for shard in sorted(checkpoint.glob("shard-*")):
        good = shard.read_bytes()
        for _ in range(60):
            data = bytearray(good)
            for _ in range(generator.choice([1, 1, 2, 50, 4096])):
                data[generator.randrange(4096)] ^= 1 << generator.randrange(8)
            shard.write_bytes(data)
            found = load_state_dict(checkpoint, "")
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            assert data == good or {damage.file for damage in verify(checkpoint).damages} == {shard.name}
        shard.write_bytes(good)


def test_every_truncation_is_found_and_the_file_is_named(checkpoint: Path) -> None:
    generator = random.Random(1)
    for file in sorted(path for path in checkpoint.iterdir() if path.name != README):
        good = file.read_bytes()
        for length in (0, 1, len(good) - 1, *(generator.randrange(len(good)) for _ in range(40))):
            file.write_bytes(good[:length])
            (error,) = load_all(checkpoint, allow_pickle=True)
            is_manifest = file.name == "manifest.json"
            assert isinstance(error, (ManifestDamagedError, NotACheckpointError) if is_manifest else FileSizeError)
            assert str(checkpoint) in str(error)
            assert file.name in str(error)
        file.write_bytes(good)
    assert errors_in(load_all(checkpoint, allow_pickle=True)) == []

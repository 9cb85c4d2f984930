from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import SaveOnRanks, flip_bit, forge, holding, rows, tiles, whole

from kenotron.callbacks_native import PieceToRead, crc32c
from kenotron.checkpoint import (
    CheckpointError,
    ChecksumError,
    DtypeMismatchError,
    FileMissingError,
    FileSizeError,
    LocalTensor,
    ManifestDamagedError,
    MismatchError,
    NotACheckpointError,
    NotPublishedError,
    Piece,
    RankStateMissingError,
    ShapeMismatchError,
    TensorMissingError,
    UnsafeFileNameError,
    VersionTooNewError,
    is_checkpoint,
    load_into,
    load_rank_state,
    load_state,
    load_state_dict,
    read_manifest,
    save,
)
from kenotron.checkpoint.boxes import Box
from kenotron.checkpoint.format import DTYPES, bytes_of, unpublished
from kenotron.checkpoint.load import piece_to_read

FULL = torch.arange(40.0).reshape(10, 4)
SHARD = "shard-00001-of-00001.safetensors"


def save_alone(path: Path, *tensors: LocalTensor, state: dict[str, Any] | None = None) -> Path:
    save(path, tensors, state or {}, rank=0, world_size=1, save_id="alone")
    return path


def blank(held: LocalTensor) -> LocalTensor:
    return LocalTensor(
        name=held.name,
        tensor=torch.zeros_like(held.tensor),
        global_shape=held.global_shape,
        pieces=held.pieces,
        owners=held.owners,
    )


# ---- Any layout to any layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_any_partition_loads_into_any_other(tmp_path: Path, save_on_ranks: SaveOnRanks, small_chunks: int, seed: int) -> None:
    generator = random.Random(seed)
    world_size = generator.randrange(1, 4)
    full: dict[str, torch.Tensor] = {}
    held: list[list[LocalTensor]] = [[] for _ in range(world_size)]
    for i in range(4):
        shape = tuple(generator.randrange(1, 14) for _ in range(generator.randrange(4)))
        dtype = generator.choice([dtype for dtype in DTYPES.values() if dtype != torch.bool])
        raw = torch.randint(0, 100, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensor = full[f"model/{i}"] = raw.view(dtype).reshape(shape)
        outer = tiles(shape, world_size, generator)
        for rank, box in enumerate(outer):
            inner = tiles(box.shape, generator.randrange(1, 4), generator)
            held[rank].append(holding(f"model/{i}", tensor, box, inner, (rank,)))
    assert save_on_ranks(tmp_path / "a", held) == [None] * world_size
    for name, tensor in full.items():
        for box in tiles(tuple(tensor.shape), generator.randrange(1, 6), generator):
            wanted = holding(name, tensor, box, tiles(box.shape, generator.randrange(1, 4), generator), (0,))
            given = blank(wanted)
            assert load_into(tmp_path / "a", [given]) == []
            assert bytes_of(given.tensor) == bytes_of(wanted.tensor)


@pytest.mark.parametrize(("before", "after"), [(4, 3), (3, 4), (1, 4), (12, 1)])
def test_rows_load_on_more_and_on_fewer_ranks(tmp_path: Path, save_on_ranks: SaveOnRanks, before: int, after: int) -> None:
    assert save_on_ranks(tmp_path / "a", [[held] for held in rows("w", FULL, before)]) == [None] * before
    for wanted in rows("w", FULL, after):
        given = blank(wanted)
        load_into(tmp_path / "a", [given])
        assert torch.equal(given.tensor, wanted.tensor)


def test_a_rank_may_hold_blocks_that_lie_apart(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    full = torch.arange(32.0).reshape(8, 4)

    def zigzag(rank: int) -> LocalTensor:  # of four blocks of rows the ranks have 0 and 3, 1 and 2
        starts = (2 * rank, 6 - 2 * rank)
        pieces = tuple(Piece(local=(2 * i, 0), offset=(at, 0), shape=(2, 4)) for i, at in enumerate(starts))
        local = torch.cat([full[at : at + 2] for at in starts])
        return LocalTensor(name="model/w", tensor=local, global_shape=(8, 4), pieces=pieces, owners=(rank,))

    assert save_on_ranks(tmp_path / "a", [[zigzag(0)], [zigzag(1)]]) == [None] * 2
    assert torch.equal(load_state_dict(tmp_path / "a")["w"], full)
    given = blank(zigzag(1))
    load_into(tmp_path / "a", [given])
    assert torch.equal(given.tensor, zigzag(1).tensor)


def test_loading_fills_tensors_of_any_strides_in_place(tmp_path: Path, small_chunks: int) -> None:
    save_alone(tmp_path / "a", whole("w", FULL), whole("s", torch.tensor(3.0)), whole("e", torch.zeros(0, 2)))
    transposed = torch.zeros(4, 10).t()
    parameter = torch.nn.Parameter(torch.zeros(10, 4))
    scalar, empty = torch.tensor(0.0), torch.zeros(0, 2)
    load_into(tmp_path / "a", [whole("w", transposed), whole("s", scalar), whole("e", empty)])
    load_into(tmp_path / "a", [whole("w", parameter)])
    assert torch.equal(transposed, FULL)
    assert torch.equal(parameter.detach(), FULL)
    assert scalar == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_saved_and_filled(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", whole("w", FULL.cuda()), whole("v", FULL.cuda().t()))
    given, stepped = torch.zeros(10, 4, device="cuda"), torch.zeros(4, 20, device="cuda")[:, ::2]
    load_into(tmp_path / "a", [whole("w", given), whole("v", stepped)])
    assert torch.equal(given.cpu(), FULL)
    assert torch.equal(stepped.cpu(), FULL.t())


def strided(shape: tuple[int, ...], dtype: torch.dtype, generator: random.Random) -> torch.Tensor:
    """Zeros whose dimensions lie in memory in any order, with gaps between their elements or without."""
    order = list(range(len(shape)))
    generator.shuffle(order)
    steps = [generator.choice((1, 1, 2, 3)) for _ in shape]
    memory = torch.zeros([shape[dim] * steps[dim] for dim in order], dtype=torch.uint8).to(dtype)
    view = memory.permute([order.index(dim) for dim in range(len(shape))])
    return view[tuple(slice(None, None, step) for step in steps)]


@pytest.mark.parametrize("seed", range(40))
def test_any_box_loads_into_memory_of_any_strides_as_numpy_cuts_it(tmp_path: Path, small_chunks: int, seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randrange(1, 10) for _ in range(generator.randrange(1, 5)))
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(generator.choice(["u1", "i2", "f4", "f8", "c8"]))
    save_alone(tmp_path / "a", *pieces_of("w", torch.from_numpy(array), tiles(shape, 5, generator)))
    given = []
    for _ in range(5):
        offset = tuple(generator.randrange(size) for size in shape)
        box = Box(offset, tuple(generator.randrange(size - at + 1) for size, at in zip(shape, offset, strict=True)))
        target = strided(box.shape, torch.from_numpy(array).dtype, generator)
        piece = Piece(local=(0,) * len(shape), offset=box.offset, shape=box.shape)
        given.append(LocalTensor(name="w", tensor=target, global_shape=shape, pieces=(piece,), owners=(0,)))
    load_into(tmp_path / "a", given)
    for held in given:
        (piece,) = held.pieces
        cut = tuple(slice(at, at + extent) for at, extent in zip(piece.offset, piece.shape, strict=True))
        np.testing.assert_array_equal(held.tensor.numpy(), array[cut])


def pieces_of(name: str, full: torch.Tensor, boxes: list[Box]) -> list[LocalTensor]:
    """One tensor that is stored in the pieces ``boxes``."""
    zeros = Box((0,) * full.ndim, tuple(full.shape))
    return [holding(name, full, zeros, boxes, (0,))]


def test_shards_of_columns_load_on_more_and_on_fewer_ranks(tmp_path: Path, save_on_ranks: SaveOnRanks) -> None:
    full = torch.arange(300 * 4096, dtype=torch.float32).reshape(300, 4096)  # 4.9 MB: more than a chunk

    def columns(count: int) -> list[LocalTensor]:
        width = 4096 // count
        boxes = [Box((0, start), (300, width)) for start in range(0, 4096, width)]
        return [holding("w", full, box, [Box((0, 0), box.shape)], (rank,)) for rank, box in enumerate(boxes)]

    assert save_on_ranks(tmp_path / "a", [[held] for held in columns(2)]) == [None] * 2
    for count in (1, 4):
        for wanted in columns(count):
            given = blank(wanted)
            load_into(tmp_path / "a", [given])
            assert torch.equal(given.tensor, wanted.tensor)


@pytest.mark.parametrize(
    ("box", "owners", "is_shared"),
    [
        (Box((0, 0), (10, 4)), (0,), False),
        (Box((0, 0), (10, 4)), (0, 1), True),  # replicas
        (Box((3, 0), (4, 4)), (0,), False),  # rows
        (Box((0, 1), (10, 1)), (0,), True),  # a column: its chunks are those of all others
        (Box((0, 0), (10, 2)), (0,), True),
        (Box((5, 1), (1, 2)), (0,), False),  # part of a single row
    ],
)  # fmt: skip
def test_what_other_ranks_read_too_is_read_by_way_of_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box: Box, owners: tuple[int, ...], is_shared: bool
) -> None:
    save_alone(tmp_path / "a", whole("w", FULL))
    found: list[bool] = []

    def spy(*args: Any, shared: bool) -> PieceToRead:
        found.append(shared)
        return piece_to_read(*args, shared=shared)

    monkeypatch.setattr("kenotron.checkpoint.load.piece_to_read", spy)
    piece = Piece(local=(0, 0), offset=box.offset, shape=box.shape)
    given = LocalTensor(name="w", tensor=torch.zeros(box.shape), global_shape=(10, 4), pieces=(piece,), owners=owners)
    load_into(tmp_path / "a", [given])
    assert found == [is_shared]
    rows, columns = (slice(at, at + extent) for at, extent in zip(box.offset, box.shape, strict=True))
    assert torch.equal(given.tensor, FULL[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_loads_into_place_into_strides_and_by_way_of_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    full = torch.randint(0, 2, (6, 5), dtype=torch.uint8).to(dtype)
    save_alone(tmp_path / "a", whole("w", full))
    assert bytes_of(load_state_dict(tmp_path / "a", "")["w"]) == bytes_of(full)
    transposed = torch.zeros(5, 6, dtype=torch.uint8).to(dtype).t()
    load_into(tmp_path / "a", [whole("w", transposed)])
    assert bytes_of(transposed) == bytes_of(full)
    other = torch.zeros(6, 5, dtype=torch.complex64 if dtype.is_complex else torch.float64)
    load_into(tmp_path / "a", [whole("w", other)], cast=True)
    assert torch.equal(other, full.to(other.dtype))


def test_thousands_of_tiny_tensors_load(tmp_path: Path) -> None:
    full = {f"model/{i}": torch.full((1 + i % 5,), i, dtype=torch.int32) for i in range(3000)}
    save_alone(tmp_path / "a", *(whole(name, tensor) for name, tensor in full.items()))
    found = load_state_dict(tmp_path / "a", "")
    assert all(torch.equal(found[name], tensor) for name, tensor in full.items())


def test_views_that_conjugate_or_negate_are_filled_through_a_staging_buffer(tmp_path: Path, small_chunks: int) -> None:
    full = torch.randn(9, 20, dtype=torch.complex64)  # more than the buffer of 256 bytes
    save_alone(tmp_path / "a", whole("w", full), whole("v", full.imag.contiguous()))
    conjugate, negative = torch.zeros(9, 20, dtype=torch.complex64).conj(), torch.zeros(9, 20, dtype=torch.complex64).conj()
    assert conjugate.is_conj()
    assert negative.imag.is_neg()
    load_into(tmp_path / "a", [whole("w", conjugate), whole("v", negative.imag)])
    assert torch.equal(conjugate, full)
    assert torch.equal(negative.imag, full.imag)


@pytest.mark.parametrize("shape", [(), (1,), (33,), (5, 9, 7), (1, 200), (200, 1), (3, 100)])
def test_what_is_larger_than_the_staging_buffer_is_cast_in_parts(
    tmp_path: Path, small_chunks: int, shape: tuple[int, ...]
) -> None:
    full = torch.randint(0, 100, shape).double()
    save_alone(tmp_path / "a", whole("w", full), whole("v", FULL))
    given, other = torch.zeros(shape), torch.zeros(10, 4, dtype=torch.float16)
    load_into(tmp_path / "a", [whole("w", given), whole("v", other)], cast=True)
    assert torch.equal(given, full.float())
    assert torch.equal(other, FULL.half())


def test_memory_that_two_elements_share_is_refused(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", whole("w", FULL))
    with pytest.raises(RuntimeError, match="single memory location"):
        load_into(tmp_path / "a", [whole("w", torch.zeros(4).expand(10, 4))])


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_checkpoints_in_memory_load() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        save_alone(Path(folder) / "a", whole("model/w", FULL))
        assert torch.equal(load_state_dict(Path(folder) / "a")["w"], FULL)


def test_only_chunks_that_hold_wanted_bytes_are_read(tmp_path: Path, small_chunks: int) -> None:
    full = torch.arange(8 * 64, dtype=torch.float32).reshape(8, 64)  # a row is four chunks
    shard = save_alone(tmp_path / "a", whole("w", full)) / SHARD
    good = shard.read_bytes()
    chunks = set(range(4096, 4096 + full.nbytes, 64))
    for box, used in [
        (Box((2, 0), (1, 64)), {4096 + 2 * 256 + i * 64 for i in range(4)}),  # a row
        (Box((0, 17), (8, 8)), {4096 + row * 256 + 64 for row in range(8)}),  # columns inside one chunk of each row
        (Box((3, 5), (1, 1)), {4096 + 3 * 256}),  # an element
        (Box((3, 5), (0, 1)), set()),
    ]:
        given = blank(holding("w", full, box, [Box((0, 0), box.shape)], (0,)))
        for chunk in chunks - used:
            flip_bit(shard, chunk + 7)
        load_into(tmp_path / "a", [given])  # nobody has noticed
        assert torch.equal(given.tensor, full[box.offset[0] :, box.offset[1] :][: box.shape[0], : box.shape[1]])
        for chunk in used:
            shard.write_bytes(good)
            flip_bit(shard, chunk + 63)
            with pytest.raises(ChecksumError, match=f"of the tensor w the bytes from {chunk} to {chunk + 64}"):
                load_into(tmp_path / "a", [given])
        shard.write_bytes(good)


# ---- What does not match --------------------------------------------------------------------------------------------


def test_all_mismatches_are_listed_at_once_and_nothing_is_filled(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", whole("w", FULL), whole("v", FULL), whole("u", FULL))
    untouched = torch.zeros(10, 4)
    wanted = [
        whole("u", untouched),
        whole("w", torch.zeros(4, 10)),
        whole("v", torch.zeros(10, 4, dtype=torch.bfloat16)),
        whole("x", torch.zeros(1)),
    ]
    with pytest.raises(MismatchError) as caught:
        load_into(tmp_path / "a", wanted)
    assert caught.value.problems == (
        "w: stored with the shape [10, 4], wanted [4, 10]",
        "v: stored as torch.float32, wanted torch.bfloat16 (cast=True converts)",
        "x: not in the checkpoint",
    )
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert not untouched.any()
    for one, kind in zip(wanted[1:], (ShapeMismatchError, DtypeMismatchError, TensorMissingError), strict=True):
        with pytest.raises(kind):
            load_into(tmp_path / "a", [one])


def test_without_strict_what_is_missing_is_returned_and_the_rest_filled(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", whole("w", FULL))
    given, other = torch.zeros(10, 4), torch.full((2,), 5.0)
    assert load_into(tmp_path / "a", [whole("x", other), whole("w", given)], strict=False) == ["x"]
    assert torch.equal(given, FULL)
    assert torch.equal(other, torch.full((2,), 5.0))
    with pytest.raises(ShapeMismatchError):
        load_into(tmp_path / "a", [whole("w", torch.zeros(3))], strict=False)


def test_cast_converts_to_the_dtype_of_the_target(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", whole("w", FULL))
    given = torch.zeros(10, 4, dtype=torch.bfloat16)
    load_into(tmp_path / "a", [whole("w", given)], cast=True)
    assert torch.equal(given, FULL.bfloat16())


def test_the_state_of_a_rank_that_did_not_save_is_refused(tmp_path: Path) -> None:
    save_alone(tmp_path / "a")
    with pytest.raises(RankStateMissingError, match="was saved by 1 ranks and has no state of rank 1"):
        load_rank_state(tmp_path / "a", 1)


def test_load_state_dict_takes_the_prefix_off_and_leaves_the_state_out(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL), whole("optimizer/w", FULL), state={"t": FULL})
    assert load_state_dict(path).keys() == {"w"}
    assert load_state_dict(path, prefix="").keys() == {"model/w", "optimizer/w"}
    assert load_state_dict(read_manifest(path), prefix="optimizer/").keys() == {"w"}


# ---- Damage ---------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_chunk_is_found_and_the_tensor_and_the_file_are_named(tmp_path: Path, small_chunks: int) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL), whole("model/v", torch.arange(50).char()))
    shard = path / SHARD
    good = shard.read_bytes()
    generator = random.Random(0)
    num_chunks = 0
    for name, tensor in read_manifest(path).tensors.items():
        (piece,) = tensor.pieces
        for start in range(piece.begin, piece.end, small_chunks):
            end = min(start + small_chunks, piece.end)
            flip_bit(shard, generator.randrange(start, end), generator.randrange(8))
            with pytest.raises(
                ChecksumError, match=f"{SHARD} is damaged: of the tensor {name} the bytes from {start} to {end}"
            ):
                load_state_dict(path)
            shard.write_bytes(good)
            num_chunks += 1
    assert num_chunks == 4


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL), state={"lr": 0.1})
    file = path / "manifest.json"
    good = file.read_bytes()
    for position in range(len(good)):
        for bit in (0, 5):
            flip_bit(file, position, bit)
            with pytest.raises((ManifestDamagedError, NotACheckpointError), match=re.escape(str(path))):
                read_manifest(path)
            file.write_bytes(good)
    for length in (0, 10, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises((ManifestDamagedError, NotACheckpointError)):
            read_manifest(path)


def test_a_file_that_is_cut_lengthened_or_gone_is_named(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL))
    shard = path / SHARD
    good = shard.read_bytes()
    for data in (good[:-1], good + b"x", b""):
        shard.write_bytes(data)
        with pytest.raises(FileSizeError, match=rf"{SHARD} has {len(data)} bytes and should have {len(good)}"):
            load_state_dict(path)
    shard.write_bytes(good)
    manifest = read_manifest(path)
    shard.unlink()
    for source in (path, manifest):
        with pytest.raises(FileMissingError, match=SHARD):
            load_state_dict(source)


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL))
    manifest = read_manifest(path)
    monkeypatch.setattr("kenotron.checkpoint.load.check_file_size", lambda file, num_bytes: None)
    os.truncate(path / SHARD, 4100)
    with pytest.raises(FileSizeError, match=rf"{SHARD} ends at byte 4100; it has been cut since it was opened"):
        load_state_dict(manifest)


def test_what_the_system_refuses_is_an_os_error_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(save_alone(tmp_path / "a", whole("model/w", FULL)))
    monkeypatch.setattr("kenotron.checkpoint.load.check_file_size", lambda file, num_bytes: None)
    (tmp_path / "a" / SHARD).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_state_dict(manifest)
    assert caught.value.filename == str(tmp_path / "a" / SHARD)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("{}")
    for name in ("nothing", "file", "foreign", ""):
        assert not is_checkpoint(tmp_path / name)
        told = "there is no such file or folder" if name == "nothing" else r"no manifest\.json"
        with pytest.raises(NotACheckpointError, match=f"is not a checkpoint: {told}"):
            read_manifest(tmp_path / name)


def test_an_unpublished_checkpoint_is_never_loaded_not_even_through_a_link(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL))
    assert is_checkpoint(path)
    partial = unpublished(path, "x")
    path.rename(partial)
    (tmp_path / "last").symlink_to(partial.name)
    for other in (partial, path, tmp_path / "last"):
        assert not is_checkpoint(other)
        with pytest.raises(NotPublishedError):
            load_state(other)


def set_at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(node: dict[str, Any]) -> None:
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


PIECE = ("tensors", "model/w", "pieces", 0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (set_at("version", value=2), VersionTooNewError),
        (set_at("version", value=0), ManifestDamagedError),
        (set_at("version", value=True), ManifestDamagedError),
        (set_at("files", "../secret", value=1), UnsafeFileNameError),
        (set_at("files", "/etc/passwd", value=1), UnsafeFileNameError),
        (set_at("files", "..", value=1), UnsafeFileNameError),
        (set_at("files", "a\\b", value=1), UnsafeFileNameError),
        (set_at("files", "manifest.json", value=1), UnsafeFileNameError),
        (set_at(*PIECE, "file", value="../secret"), ManifestDamagedError),
        (set_at(*PIECE, "bytes", value=[4096, 4096 + 10**15]), ManifestDamagedError),
        (set_at(*PIECE, "bytes", value=[-160, 0]), ManifestDamagedError),
        (set_at(*PIECE, "bytes", value=[10**9, 10**9 + 160]), ManifestDamagedError),
        (set_at(*PIECE, "crc32c", value=[]), ManifestDamagedError),
        (set_at(*PIECE, "crc32c", value=["1"]), ManifestDamagedError),
        (set_at(*PIECE, "crc32c", value=[-1]), ManifestDamagedError),
        (set_at(*PIECE, "crc32c", value=[2**32]), ManifestDamagedError),
        (set_at(*PIECE, "shape", value=[10**15, 4]), ManifestDamagedError),
        (set_at(*PIECE, "offset", value=[1, 0]), ManifestDamagedError),
        (set_at(*PIECE, "offset", value=[0]), ManifestDamagedError),
        (set_at("tensors", "model/w", "shape", value=[10**15, 4]), ManifestDamagedError),
        (set_at("tensors", "model/w", "shape", value=[0, 2**62, 2**62]), ManifestDamagedError),
        (set_at("tensors", "model/w", "shape", value=[-1]), ManifestDamagedError),
        (set_at("tensors", "model/w", "dtype", value="F4"), ManifestDamagedError),
        (set_at("tensors", "model/w", "pieces", value=[]), ManifestDamagedError),
        (set_at("tensors", value=[]), ManifestDamagedError),
        (set_at("world_size", value=10**12), ManifestDamagedError),
        (set_at("save_id", value=None), ManifestDamagedError),
        (lambda node: node.pop("files"), ManifestDamagedError),
    ],
)
def test_forged_manifests_are_refused_with_one_typed_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], kind: type[CheckpointError]
) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL))
    (tmp_path / "secret").write_text("s")
    forge(path, change)
    with pytest.raises(kind) as caught:
        read_manifest(path)
    assert type(caught.value) is kind


def test_pieces_that_share_bytes_are_refused_so_that_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a", whole("model/w", FULL))

    def copy(node: dict[str, Any]) -> None:
        node["tensors"]["model/v"] = node["tensors"]["model/w"]

    forge(path, copy)
    with pytest.raises(ManifestDamagedError, match=r"model/[vw] and model/[vw] share bytes"):
        read_manifest(path)


def test_a_state_that_was_never_encoded_is_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a")
    for node in ({"$tensor": "model/w"}, {"$pickle": {"file": "../x", "type": "x", "crc32c": 0}}):
        forge(path, set_at("state", value=node))
        with pytest.raises(ManifestDamagedError):
            load_state(path, allow_pickle=True)


def test_a_manifest_without_end_is_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "a")
    file = path / "manifest.json"
    content = file.read_bytes().split(b',"world_size"')[0] + b',"state":' + b"[" * 100_000
    file.write_bytes(content + b',"crc32c":"%08x"}\n' % crc32c(content))
    with pytest.raises(ManifestDamagedError):
        read_manifest(path)


def test_tied_weights_are_there_under_each_of_their_names(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    save(
        tmp_path / "c",
        [LocalTensor.whole("model/embed", weight)],
        {},
        rank=0,
        world_size=1,
        save_id="one",
        aliases={"model/head": "model/embed", "model/gone": "model/nowhere"},
    )
    found = load_state_dict(tmp_path / "c")
    assert found.keys() == {"embed", "head"}
    assert found["head"] is found["embed"]
    assert torch.equal(found["head"], weight)

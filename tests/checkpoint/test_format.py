from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_helpers import rows, whole

from kenotron.checkpoint import LocalTensor, Piece, SyncShardWriter, load_state_dict, save
from kenotron.checkpoint.format import ALIGNMENT, DTYPES, ShardEntry, bytes_of, lay_out, unpublished, unpublished_name

#: safetensors writes F8_E8M0 and its torch front end does not read it.
READ_BY_SAFETENSORS = [dtype for name, dtype in DTYPES.items() if name != "F8_E8M0"]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    raw = torch.randint(0, 255, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def save_alone(path: Path, *tensors: LocalTensor) -> Path:
    save(path, tensors, {}, rank=0, world_size=1, save_id="alone")
    return path / "shard-00001-of-00001.safetensors"


def entry(name: str, data: torch.Tensor) -> ShardEntry:
    return ShardEntry(name=name, global_shape=tuple(data.shape), offset=(0,) * data.ndim, data=data)


def test_plain_safetensors_reads_every_dtype_that_a_shard_can_hold(tmp_path: Path) -> None:
    tensors = {str(dtype): random_tensor(dtype, (3, 5)) for dtype in READ_BY_SAFETENSORS}
    shard = save_alone(tmp_path / "a", *(whole(name, tensor) for name, tensor in tensors.items()))
    found = safetensors.torch.load_file(shard)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert bytes_of(found[name]) == bytes_of(tensor)


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {str(dtype): random_tensor(dtype, (3, 5)) for dtype in DTYPES.values()}
    save_alone(tmp_path / "a", *(whole("model/" + name, tensor) for name, tensor in tensors.items()))
    found = load_state_dict(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert bytes_of(found[name]) == bytes_of(tensor)


def test_data_begins_on_a_block_and_has_no_holes_and_large_tensors_come_first(tmp_path: Path) -> None:
    sizes = [3, 4096, 1, 64, 128, 7, 8192, 5]
    shard = save_alone(tmp_path / "a", *(whole(f"t{size}", torch.zeros(size, dtype=torch.int8)) for size in sizes))
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % ALIGNMENT == 0
    assert data[8:9] == b"{"
    spans = {name: node["data_offsets"] for name, node in header.items() if name != "__metadata__"}
    assert list(spans) == ["t4096", "t8192", "t64", "t128", "t3", "t1", "t7", "t5"]
    ends = [0, *(end for _, end in spans.values())]
    assert [begin for begin, _ in spans.values()] == ends[:-1]
    assert ends[-1] == len(data) - 8 - length


def test_every_tensor_is_aligned_for_its_dtype() -> None:
    dtypes = [torch.int8, torch.float64, torch.bfloat16, torch.float32]
    layout = lay_out([entry(str(dtype), torch.zeros(3, dtype=dtype)) for dtype in dtypes], {})
    for item, (begin, _) in zip(layout.entries, layout.ranges, strict=True):
        assert begin % item.data.itemsize == 0


def test_a_piece_is_named_after_its_tensor_and_where_it_begins(tmp_path: Path) -> None:
    full = torch.arange(24.0).reshape(4, 6)
    data = [ShardEntry(name="w", global_shape=(4, 6), offset=(2, 0), data=full[2:]), entry("v", full)]
    layout = lay_out(data, {})
    SyncShardWriter().write(tmp_path / "x", layout.header, layout.buffers(), num_bytes=layout.num_bytes)
    found = safetensors.torch.load_file(tmp_path / "x")
    assert found.keys() == {"w@2,0", "v"}
    assert torch.equal(found["w@2,0"], full[2:])


def test_any_strides_and_shapes_come_back_equal(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "transposed": base.transpose(0, 2),
        "stepped": base[:, ::2, 1:],
        "expanded": torch.ones(1).expand(4, 4),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "conjugate": torch.view_as_complex(base[:, :, :2].contiguous()).conj(),
        "parameter": torch.nn.Parameter(base),
    }
    save_alone(tmp_path / "a", *(whole("model/" + name, tensor) for name, tensor in tensors.items()))
    found = load_state_dict(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach()), name


def test_two_tensors_with_one_key_are_refused() -> None:
    first = ShardEntry(name="w", global_shape=(4,), offset=(2,), data=torch.zeros(2))
    with pytest.raises(ValueError, match="two tensors would be stored as 'w@2'"):
        lay_out([first, entry("w@2", torch.zeros(2))], {})


def test_a_dtype_that_safetensors_does_not_know_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model/z: safetensors has no dtype for .*complex128"):
        save_alone(tmp_path / "a", whole("model/z", torch.zeros(2, dtype=torch.complex128)))
    assert list(tmp_path.iterdir()) == []


def test_tensors_without_plain_storage_are_refused() -> None:
    with pytest.raises(ValueError, match="w: the tensor is on the meta device"):
        whole("w", torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="w: only dense tensors"):
        whole("w", torch.eye(2).to_sparse())

    class Wrapped(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="w: a Wrapped is not a plain tensor"):
        whole("w", torch.zeros(2).as_subclass(Wrapped))


def test_pieces_that_do_not_cover_the_local_tensor_are_refused() -> None:
    piece = Piece(local=(0,), offset=(0,), shape=(2,))
    with pytest.raises(ValueError, match=r"w: .* its element \(2,\) is in 0 of them"):
        LocalTensor(name="w", tensor=torch.zeros(3), global_shape=(9,), pieces=(piece,), owners=(0,))
    with pytest.raises(ValueError, match=r"w: .* does not lie inside the global shape \(1,\)"):
        LocalTensor(name="w", tensor=torch.zeros(2), global_shape=(1,), pieces=(piece,), owners=(0,))


def test_ranks_without_rows_hold_tensors_without_elements() -> None:
    assert [held.tensor.shape[0] for held in rows("w", torch.zeros(5, 2), 4)] == [2, 2, 1, 0]


def test_unpublished_names_are_told_apart_from_those_of_other_checkpoints(tmp_path: Path) -> None:
    assert unpublished_name(unpublished(tmp_path / "a.b", "id").name) == "a.b"
    assert unpublished_name(unpublished(tmp_path / "a", "id").name) == "a"
    assert unpublished_name(".hidden") is None
    assert unpublished_name("a.id.partial") is None


def test_single_elements_and_none_are_bytes_with_any_strides() -> None:
    for tensor in (torch.arange(2)[::2], torch.arange(12).view(3, 4)[1:2, ::4], torch.ones(4, 3)[:0, ::2]):
        assert bytes(bytes_of(tensor)) == tensor.clone(memory_format=torch.contiguous_format).numpy().tobytes()

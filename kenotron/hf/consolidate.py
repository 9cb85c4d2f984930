"""A checkpoint of any layout as one plain file, which safetensors or ``torch.load`` opens.

1. The file is laid out at its full size, under another name: a full disk is found here.
2. Each tensor is read from the shards, of whatever layout, and written to its place: memory stays below the largest one.
3. The file is brought to the disk and gets its name by one rename.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kenotron.checkpoint import LocalTensor, Manifest, load_into, load_state, read_manifest
from kenotron.durable import fsync, fsync_directory
from kenotron.hf.record import MODEL_PREFIX
from kenotron.hf.writer import HFWriter

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin")
_OPTIMIZER_PREFIX = "optimizer."
#: Smaller tensors are laid out in memory.
_SMALL_BYTES = 1 << 20


def consolidate(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, optimizer: bool = False) -> Path:
    """Write the tensors of a checkpoint to one file, under the names that the LightningModule's state dict has.

    A ``.safetensors`` file holds them by name; a ``.pt``, ``.pth`` or ``.bin`` file is what ``torch.save(module.state_dict())``
    would have made. Tied weights are there under each of their names.

    Args:
        checkpoint: one of Kénotron's, saved on any layout. out: the file to make.
        optimizer: the optimizers' state as well. In a safetensors file its tensors are named
            ``optimizer.0/<parameter>/exp_avg``; a file of torch's then is ``{"state_dict": {name: tensor}, "optimizers":
            [{"state": {name: {"exp_avg": tensor, ...}}, "param_groups": [...]}]}``.

    Raises:
        ValueError: another suffix, something stands at ``out``, or the checkpoint has no optimizer state.
        CheckpointError: the checkpoint is damaged, or one node's part.
    """
    out = Path(out)
    if out.suffix not in SAFETENSORS + TORCH:
        raise ValueError(f"{out}: its suffix says what is made. Use {', '.join(SAFETENSORS + TORCH)}.")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists. Choose another name, or remove it first.")
    manifest = read_manifest(checkpoint)
    stored = _wanted(manifest, optimizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix in SAFETENSORS:
        _write_safetensors(manifest, stored, out)
    else:
        _write_torch(manifest, stored, out, optimizer)
    return out


def _wanted(manifest: Manifest, optimizer: bool) -> dict[str, str]:
    """Return which tensors are written: name in the checkpoint, those of tied weights included -> name it is stored under."""
    names = {name: name for name in manifest.tensors} | dict(manifest.aliases)
    prefixes = (MODEL_PREFIX, _OPTIMIZER_PREFIX) if optimizer else (MODEL_PREFIX,)
    if optimizer and not any(name.startswith(_OPTIMIZER_PREFIX) for name in names):
        raise ValueError(f"{manifest.path} holds no optimizer state: it was saved with save_weights_only, or by a conversion.")
    found = {name: stored for name, stored in names.items() if name.startswith(prefixes)}
    if not found:
        raise ValueError(f"{manifest.path} holds no tensors of a model.")
    return found


def _write_safetensors(manifest: Manifest, stored: Mapping[str, str], out: Path) -> None:
    plan = {name.removeprefix(MODEL_PREFIX): manifest.tensors[origin] for name, origin in stored.items()}
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}")
    with HFWriter(folder, max_shard_bytes=1 << 62) as writer:
        writer.plan({name: (tensor.dtype, tensor.shape) for name, tensor in plan.items()})
        for name, origin in stored.items():
            target = torch.empty(manifest.tensors[origin].shape, dtype=manifest.tensors[origin].dtype)
            load_into(manifest, [LocalTensor.whole(origin, target)])
            writer.write(name.removeprefix(MODEL_PREFIX), target)
    (file,) = folder.iterdir()
    os.rename(file, out)
    folder.rmdir()
    fsync_directory(out.parent)


def _write_torch(manifest: Manifest, stored: Mapping[str, str], out: Path, optimizer: bool) -> None:
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}")
    crc32, options = torch.serialization.get_crc32_options(), torch.serialization.get_default_mmap_options() or mmap.MAP_PRIVATE
    try:
        # torch leaves room for the tensors' bytes; what is mapped for sharing is written there. Reading, it checks no CRC.
        torch.serialization.set_crc32_options(False)
        with tempfile.TemporaryFile(dir=out.parent) as backing, torch.serialization.skip_data():
            torch.save(_structure(manifest, _unfilled(manifest, stored, backing), optimizer), partial)
        torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
        mapped = torch.load(partial, mmap=True, weights_only=True)
        names = _structure(manifest, {name: name for name in stored}, optimizer)
        for name, tensor in _pairs(names, mapped):
            load_into(manifest, [LocalTensor.whole(stored[name], tensor)])
        del mapped
        fsync(partial)
        os.rename(partial, out)
        fsync_directory(out.parent)
    finally:
        torch.serialization.set_crc32_options(crc32)
        torch.serialization.set_default_mmap_options(options)
        partial.unlink(missing_ok=True)


def _unfilled(manifest: Manifest, stored: Mapping[str, str], backing: Any) -> dict[str, Tensor]:
    """Return a tensor for each name; large ones lie in a file without content, and so take no memory."""
    firsts: dict[str, Tensor] = {}
    for origin in stored.values():
        tensor = manifest.tensors[origin]
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        num_bytes = empty.numel() * empty.itemsize
        if num_bytes < _SMALL_BYTES:
            firsts[origin] = torch.empty(tensor.shape, dtype=tensor.dtype)
            continue
        backing.truncate(max(num_bytes, os.fstat(backing.fileno()).st_size))
        raw = torch.from_file(f"/proc/self/fd/{backing.fileno()}", shared=True, size=num_bytes, dtype=torch.uint8)
        firsts[origin] = raw.view(tensor.dtype).view(tensor.shape)
    return {name: firsts[origin] for name, origin in stored.items()}


def _structure(manifest: Manifest, values: Mapping[str, Any], optimizer: bool) -> dict[str, Any]:
    """Return the values in the order of a file of torch's."""
    model = {name.removeprefix(MODEL_PREFIX): value for name, value in values.items() if name.startswith(MODEL_PREFIX)}
    if not optimizer:
        return model
    groups = load_state(manifest).get("optimizers") or []
    optimizers: list[dict[str, Any]] = [{"state": {}, "param_groups": group} for group in groups]
    for name, value in values.items():
        if name.startswith(_OPTIMIZER_PREFIX):
            head, _, key = name.rpartition("/")
            index, _, parameter = head.removeprefix(_OPTIMIZER_PREFIX).partition("/")
            optimizers[int(index)]["state"].setdefault(parameter, {})[key] = value
    return {"state_dict": model, "optimizers": optimizers}


def _pairs(names: Any, values: Any) -> list[tuple[str, Tensor]]:
    """Return what stands at the same place in both: a name and its tensor."""
    if isinstance(values, Tensor):
        return [(names, values)]
    if isinstance(values, dict):
        return [pair for key, value in values.items() for pair in _pairs(names[key], value)]
    if isinstance(values, list):
        return [pair for name, value in zip(names, values, strict=True) for pair in _pairs(name, value)]
    return []  # hyper-parameters

"""What user code adds to a checkpoint, where ranks that share samples do not all have the same.

A checkpoint keeps one copy of what hooks (``on_save_checkpoint``) and callbacks (``state_dict``) give to Lightning's
dictionary. Before it is written, the ranks of a model compare checksums of their copies:

1. parts of weights (shadow weights in a callback, of layers that are split) can't be put together here: refused.
2. of anything else that differs, the copy of the last pipeline stage counts: only that one has run steps to their end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from kenotron.callbacks_native import crc32c

#: What Lightning and the strategy put there, alike on all ranks or saved in another way.
_KNOWN = {
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "optimizer_states", "lr_schedulers",
    "MixedPrecision", "hparams_name", "hyper_parameters", "hparams_type", "datamodule_hparams_name",
    "datamodule_hyper_parameters",
}  # fmt: skip
_SAMPLE = 64


def agree(
    checkpoint: Mapping[str, Any], group: dist.ProcessGroup, last: int, weight_shapes: Set[tuple[int, ...]]
) -> dict[str, Any]:
    """Return Lightning's dictionary with what the last pipeline stage has where ranks differ. All ranks of ``group`` call it.

    Args:
        group: the ranks that share this one's samples. last: the global rank of the last stage.
        weight_shapes: of parameters as they lie here.

    Raises:
        ValueError: on all ranks: parts of weights.
    """
    own = dict(_foreign(checkpoint))
    sums = {key: _checksum(value) for key, value in own.items()}
    parts = {key for key, value in own.items() if any(_is_part(tensor, weight_shapes) for tensor in _tensors(value))}
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (sums, parts), group=group)
    names = dict.fromkeys(key for keys, _ in found for key in keys)
    differing = [key for key in names if len({keys.get(key) for keys, _ in found}) > 1]
    for key in differing:
        if any(key in held for _, held in found):
            raise ValueError(
                f"{'the state of ' + key[1] if key[0] else repr(key[1])} holds tensors with the shapes of weights, and ranks "
                f"{dist.get_process_group_ranks(group)} have different ones: each has copies of its own part of the model, and "
                "one would be saved. Keep copies as parameters or buffers of the LightningModule (copy.deepcopy of a "
                "submodule, in __init__), or leave them out of the checkpoint."
            )
    if not differing:
        return dict(checkpoint)
    box = [{key: _to_cpu(own[key]) for key in differing if key in own} if dist.get_rank() == last else None]
    dist.broadcast_object_list(box, last, group=group)
    return _replaced(checkpoint, box[0] or {})


def _foreign(checkpoint: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    for key, value in checkpoint.items():
        if key == "callbacks":
            yield from (((key, name), state) for name, state in value.items())
        elif key not in _KNOWN and not key.startswith("kenotron_"):
            yield ("", key), value


def _replaced(checkpoint: Mapping[str, Any], values: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    new = {**checkpoint, "callbacks": dict(checkpoint.get("callbacks", {}))}
    for (where, key), value in values.items():
        (new[where] if where else new)[key] = value
    return new


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value):
        yield from _tensors(part)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _is_part(tensor: Tensor, weight_shapes: Set[tuple[int, ...]]) -> bool:
    return isinstance(tensor, DTensor) or (tensor.ndim > 0 and tuple(tensor.shape) in weight_shapes)


def _checksum(value: Any) -> int:
    """Return a number that tells two values apart: of tensors by their shapes and some of their elements."""
    checksum = 0
    for tensor in _tensors(value):
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        flat = here.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        checksum = crc32c(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), checksum)
        if sample.numel():
            checksum = crc32c(sample.view(torch.uint8).numpy().data, checksum)
    return crc32c("\0".join(_words(value)).encode(errors="replace"), checksum)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from map(str, value)
    if value is None or isinstance(value, str | bytes | int | float):
        yield repr(value)
    for part in _parts(value):
        yield from _words(part)


def _to_cpu(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)

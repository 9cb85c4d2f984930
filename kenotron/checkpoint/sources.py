"""What the native engine copies of tensors: addresses and strides, and who holds them until that is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint.format import ShardEntry, bytes_of

#: So much of what may change at any time is cloned; what is beyond is copied by the engine before ``save`` returns.
_MAX_CLONED_BYTES = 8 << 20

#: address, (extent, stride in bytes) of each dimension, bytes of an item, is eager, CUDA device or -1, CUDA stream
NativeSource = tuple[int, list[tuple[int, int]], int, bool, int, int]


class Sources:
    """The entries of a shard as the engine wants them. Holds their memory.

    Attributes:
        native: one for each entry.
        has_eager: whether the engine must copy some before the call returns.
        identity: equal to that of sources of the same layout which hold the same bytes, unless a fence came between them;
            None where that cannot be told.

    Args:
        entries: in the order of the file.
    """

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        self._held: list[torch.Tensor] = []
        self._watched: list[tuple[torch.Tensor, int]] = []
        self.native: list[NativeSource] = []
        self.has_eager = False
        identity: list[object] = []
        num_cloned = 0
        for entry in entries:
            tensor, is_eager = entry.data, not entry.lazy
            what: object = None
            if is_eager and num_cloned + tensor.nbytes <= _MAX_CLONED_BYTES:
                num_cloned += tensor.nbytes
                tensor = _plain(tensor.clone(memory_format=torch.contiguous_format))
                native = _native(tensor, False)
                if tensor.is_cpu:
                    what = crc32c(bytes_of(tensor))
            else:
                plain = _plain(tensor)
                native = _native(plain, is_eager)
                self.has_eager |= is_eager
                if plain is tensor and not is_eager and not tensor.is_inference():
                    self._watched.append((tensor, tensor._version))
                    what = (native, tensor._version)
                tensor = plain
            identity.append(what)
            self._held.append(tensor)
            self.native.append(native)
        self.identity = None if None in identity else identity

    def have_changed(self) -> bool:
        """Tell whether torch knows of a change in place. It does not know of all: fused optimizers, ``.data``, NumPy."""
        return any(tensor._version != version for tensor, version in self._watched)

    def look_again(self) -> None:
        """Take the tensors as they are now."""
        self._watched = [(tensor, tensor._version) for tensor, _ in self._watched]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose bytes in memory are its elements, at addresses that the engine can read: itself, mostly."""
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_cpu:
        return tensor
    return tensor.contiguous() if tensor.is_cuda else tensor.cpu()


def _native(tensor: torch.Tensor, is_eager: bool) -> NativeSource:
    size = tensor.itemsize
    if tensor.is_contiguous():
        dims = [(tensor.numel(), size)]
    else:
        dims = [(extent, stride * size) for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if tensor.is_cpu:
        return tensor.data_ptr(), dims, size, is_eager, -1, 0
    stream = torch.cuda.current_stream(tensor.device)
    return tensor.data_ptr(), dims, size, is_eager, tensor.device.index, stream.cuda_stream

"""What the native engine copies of tensors: addresses and strides, and who holds them until that is done.

A source holds the storage that its tensor has at the call. A tensor that is given another one meanwhile (``.data = …``) leaves
it as it was; what is written into it is found out by fingerprints: the engine's for host memory (``engine.hpp``), sums of
whole tensors on a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kenotron.callbacks_native import Snapshot
from kenotron.checkpoint.format import ShardEntry

#: So much of what may change at any time is cloned; what is beyond is copied by the engine before ``save`` returns.
_MAX_CLONED_BYTES = 8 << 20
#: Elements of a device's tensor that share a sum.
_SUMMED_TOGETHER = 1 << 14

#: address, (extent, stride in bytes) of each dimension, bytes of an item, is eager, CUDA device or -1, CUDA stream, is a clone
NativeSource = tuple[int, list[tuple[int, int]], int, bool, int, int, bool]


class Sources:
    """The entries of a shard as the engine wants them. Holds their memory.

    Attributes:
        native: one for each entry.
        has_eager: whether the engine must copy some before the call returns.
        is_own: whether all are clones, which nobody can change.

    Args:
        entries: in the order of the file.
    """

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        self._entries = entries
        self._held: list[torch.Tensor] = []
        self._watched: list[tuple[int, torch.Tensor, int]] = []  # index, tensor, version
        self._summed: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # index, tensor, sums
        self.native: list[NativeSource] = []
        self.has_eager = False
        num_cloned = 0
        for index, entry in enumerate(entries):
            tensor, is_eager = entry.data, not entry.lazy
            is_own = is_eager and num_cloned + tensor.nbytes <= _MAX_CLONED_BYTES
            if is_own:
                num_cloned += tensor.nbytes
                tensor = _plain(tensor.clone(memory_format=torch.contiguous_format))
                native = _native(tensor, False, is_own=tensor.is_cpu)
            else:
                plain = _plain(tensor)
                native = _native(plain, is_eager)
                self.has_eager |= is_eager
                if plain is tensor and not is_eager:
                    self._watch(index, tensor)
                tensor = plain
            self._held.append(tensor)
            self.native.append(native)
        self.is_own = all(native[-1] for native in self.native)

    def _watch(self, index: int, tensor: torch.Tensor) -> None:
        if not tensor.is_inference():
            self._watched.append((index, tensor, tensor._version))
        if tensor.is_cuda:
            self._summed.append((index, tensor, sums_of(tensor)))

    def changed(self, snapshot: Snapshot) -> list[ShardEntry]:
        """Return the entries that somebody has changed since the call, or may have, before they were copied.

        Torch counts changes in place, but not all: those of ``.data``, of a DTensor, of NumPy it does not see.
        """
        found = set(snapshot.changed())
        found.update(index for index, tensor, version in self._watched if tensor._version != version)
        found.update(index for index, tensor, sums in self._summed if not torch.equal(sums_of(tensor), sums))
        return [self._entries[index] for index in sorted(found)]


def sums_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return sums over all of a contiguous tensor's bits, on its device: each of some thousand elements (int64).

    Its host does not wait for them.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(kinds.get(tensor.itemsize, torch.int64))
    whole = flat.numel() // _SUMMED_TOGETHER * _SUMMED_TOGETHER
    parts = flat[:whole].view(-1, _SUMMED_TOGETHER).sum(1, dtype=torch.int64), flat[whole:].sum(dtype=torch.int64)[None]
    return torch.cat(parts)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose bytes in memory are its elements, at addresses that the engine can read: itself, mostly."""
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_cpu:
        return tensor
    return tensor.contiguous() if tensor.is_cuda else tensor.cpu()


def _native(tensor: torch.Tensor, is_eager: bool, *, is_own: bool = False) -> NativeSource:
    size = tensor.itemsize
    if tensor.is_contiguous():
        dims = [(tensor.numel(), size)]
    else:
        dims = [(extent, stride * size) for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if tensor.is_cpu:
        return tensor.data_ptr(), dims, size, is_eager, -1, 0, is_own
    stream = torch.cuda.current_stream(tensor.device)
    return tensor.data_ptr(), dims, size, is_eager, tensor.device.index, stream.cuda_stream, is_own

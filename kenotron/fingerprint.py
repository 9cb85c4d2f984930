"""A number that stands for the exact bits of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes that are hashed at a time: what is needed besides is a few times as much, however large the tensor.
_CHUNK_BYTES = 32 << 20
# Odd numbers of 64 bits, as signed ones. Multiplying by one of them maps 64-bit words onto each other one to one.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Return a hash of a tensor's bits and their places (0-dim int64, on its device). Nothing is read on the host.

    Every 64-bit word is mixed with its place by steps that can each be undone, and the results are added modulo 2^64. So a
    change of one word always shows, and other changes with all but one chance in 2^64. The sum of integers does not depend on
    its order: the same bits give the same number on any device.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        total += _mixed(_words(flat[start : start + _CHUNK_BYTES]), start // 8).sum()
    return total


def _words(chunk: Tensor) -> Tensor:
    missing = -chunk.numel() % 8
    if missing:
        chunk = torch.cat([chunk, chunk.new_zeros(missing)])
    elif chunk.storage_offset() % 8:
        chunk = chunk.clone()
    return chunk.view(torch.int64)


def _mixed(words: Tensor, first_place: int) -> Tensor:
    places = torch.arange(first_place + 1, first_place + 1 + words.numel(), device=words.device)
    mixed = words ^ places.mul_(_STEP)
    mixed.mul_(_FIRST)
    # Shifted to the right without its sign: with it the step could not be undone.
    mixed ^= (mixed >> 32) & 0xFFFFFFFF
    mixed.mul_(_SECOND)
    mixed ^= (mixed >> 29) & 0x7FFFFFFFF
    return mixed

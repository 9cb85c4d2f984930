"""Shuffling without a list: where each position of a shuffled order comes from is computed, in constant time and memory.

The construction is part of a run's state: a resumed run must find the same order, on any platform and version. It is

- *key*: BLAKE2b of the JSON list of the key's parts, 64 bytes, read as eight little-endian 64-bit round keys k_0 … k_7;
- *network*: with b the bits of n - 1, a number of b bits is split into its upper ⌊b/2⌋ bits l and its lower ⌈b/2⌉ bits r.
  Eight rounds of an alternating Feistel network: l ← l ⊕ f(r + k_i) for even i, r ← r ⊕ f(l + k_i) for odd i, where f is the
  finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), modulo 2^64, of which the lowest bits that fit are taken;
- *cycle walking* (Black and Rogaway, CT-RSA 2002): the network permutes range(2^b), and 2^b < 2n; a number is put through it
  again until it is below n. That is a permutation of range(n), and takes less than two passes on average.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

_LARGEST = 2**62
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def digest(*key: int | str) -> bytes:
    """Return 64 bytes that stand for a key: the same on every platform, others for any other key."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=64).digest()


class Permutation:
    """A pseudorandom permutation of ``range(n)``.

    Args:
        n: 1 to 2^62. key: what chooses the permutation, e.g. seed, corpus, epoch.

    Raises:
        ValueError: ``n`` is out of range.
    """

    def __init__(self, n: int, *key: int | str) -> None:
        if not 1 <= n <= _LARGEST:
            raise ValueError(f"a permutation of {n} numbers is not available: n must be 1 to 2^62.")
        bits = (n - 1).bit_length()
        self.n = n
        self._lower = np.uint64(bits - bits // 2)
        self._masks = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
        self._keys = np.frombuffer(digest(*key), dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return what stands at ``positions``: integers of any shape, each in ``range(n)``, as int64 of that shape."""
        given = np.asarray(positions)
        x = self._pass(given.astype(np.uint64).ravel())
        outside = np.flatnonzero(x >= self.n)
        while len(outside):
            again = self._pass(x[outside])
            x[outside] = again
            outside = outside[again >= self.n]
        return x.astype(np.int64).reshape(given.shape)

    def _pass(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._lower, x & self._masks[1]
        for i in range(0, len(self._keys), 2):
            left ^= _mix(right + self._keys[i]) & self._masks[0]
            right ^= _mix(left + self._keys[i + 1]) & self._masks[1]
        mixed: np.ndarray = (left << self._lower) | right
        return mixed


def _mix(z: np.ndarray) -> np.ndarray:
    """Change ``z``, which nobody else has, in place."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        z ^= z >> shift
        z *= multiplier
    z ^= z >> _SHIFTS[2]
    return z

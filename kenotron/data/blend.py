"""Which corpus a sample of a blend comes from: at every prefix of n samples each corpus has had n times its weight, within one.

Nothing is tabulated over the run. It is cut into blocks; how many samples each corpus has had where a block begins is a closed
form, and the order within a block is made when it is asked for. With weights w_j that sum to one:

- *Windows.* Counts stay strictly within one of n·w_j if and only if the i-th sample of corpus j (i = 1, 2, …) stands at one of
  the places ⌊(i-1)/w_j⌋ … ⌈i/w_j⌉-1 (Baruah, Cohen, Plaxton, Varvel, Algorithmica 1996).
- *Where a block begins*, at n: let f_j be the fraction of n·w_j. Their sum F is an integer, and F of the corpora with f_j > 0
  must have had ⌈n·w_j⌉ samples ("early"), all others ⌊n·w_j⌋. So the fractions are rounded to y_j ∈ {0, 1}, such that the sum
  of y - f is strictly within one over each prefix of two orders at once: by the end i/w_j of the window that n cuts, and by its
  begin (i-1)/w_j. ``_round`` does that.
- *Within a block* the samples have their windows, cut at the block's ends, and an order exists: by Hall's theorem it does if no
  interval of places has more windows inside than places. Windows inside [s, e) number Σ_j max(0, ⌊e·w_j⌋ - ⌈s·w_j⌉), which is
  at most e - s. If the interval begins with the block, at n, they are e - n - Φ + E, where Φ is the sum of the fractions of
  e·w_j, and E counts early corpora whose window ends after e. The fractions of these alone sum, at e, to no less than their
  f_j did at n, which is more than E - 1 by the rounding in the order of ends: so Φ, an integer, is at least E. An interval that
  ends with the block is the mirror image of that, by the order of begins. And the whole block has as many samples as places,
  since a block is at least 1/w_j long for each j, so that no corpus has had more where it begins than where it ends. The
  earliest end first finds the order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

#: Weights are multiples of 2^-62, so that all arithmetic is exact: n·w_j is off by less than 1e-6 up to 10^12 samples.
_BITS = 62
_ONE = 2**_BITS
_SHORTEST, _LONGEST = 256, 2**16


class Blend:
    """An order of corpora by weight. Pure arithmetic: it has no state but what it was made of.

    Args:
        weights: one for each corpus, of any scale; 0: never.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or one is less than 2^-16 of their sum, but not 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(0 <= w < float("inf") for w in weights) or not any(weights):
            raise ValueError(f"weights of {list(weights)}: set numbers of 0 or more for all corpora, and more than 0 for one.")
        exact = [Fraction(w) for w in weights]
        total = sum(exact)
        shares = [round(w * _ONE / total) for w in exact]
        shares[shares.index(max(shares))] += _ONE - sum(shares)
        smallest = min(share for share, weight in zip(shares, weights, strict=True) if weight)
        if smallest * _LONGEST < _ONE:
            raise ValueError(
                f"a weight of {smallest / _ONE:.3g} of the sum of {list(weights)} is too small to be kept to; set it to 0, or "
                f"to {1 / _LONGEST:.3g} or more."
            )
        self.num_corpora = len(weights)
        self._shares = shares
        self._only = shares.index(_ONE) if _ONE in shares else None
        self._block = _SHORTEST
        while smallest * self._block < _ONE:
            self._block *= 2
        self._schedule = lru_cache(maxsize=4)(self._make_schedule)

    def __reduce__(self) -> tuple[type[Blend], tuple[list[int]]]:
        return Blend, (self._shares,)

    @property
    def weights(self) -> list[float]:
        """What is kept to, summing to one."""
        return [share / _ONE for share in self._shares]

    def counts(self, n: int) -> np.ndarray:
        """Return how many of the first ``n`` samples each corpus has: int64 of shape (num_corpora,), which sum to ``n``."""
        if self._only is not None:
            return n * np.eye(self.num_corpora, dtype=np.int64)[self._only]
        block, rest = divmod(n, self._block)
        counts = self._counts_at(block * self._block)
        return counts + np.bincount(self._schedule(block)[0][:rest], minlength=self.num_corpora) if rest else counts

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return of which corpus the samples at ``positions`` are, and which of its samples, counted from 0.

        Args:
            positions: int64 of shape (k,), 0 or more.
        """
        if self._only is not None:
            return np.full_like(positions, self._only), positions.copy()
        blocks, rests = np.divmod(positions, self._block)
        corpora, numbers = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            here = blocks == block
            corpora[here], numbers[here] = (of_block[rests[here]] for of_block in self._schedule(int(block)))
        return corpora, numbers

    def _counts_at(self, n: int) -> np.ndarray:
        """Return how many samples each corpus has had where a block begins."""
        counts = [share * n >> _BITS for share in self._shares]
        fractions = [share * n & _ONE - 1 for share in self._shares]
        cut = [j for j, fraction in enumerate(fractions) if fraction]
        by_end = sorted(cut, key=lambda j: (Fraction(_ONE - fractions[j], self._shares[j]), j))
        by_begin = sorted(cut, key=lambda j: (Fraction(fractions[j], self._shares[j]), j))
        for j in _round(fractions, by_end, by_begin):
            counts[j] += 1
        return np.array(counts, dtype=np.int64)

    def _make_schedule(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each place in a block its corpus, and the sample's number among all of this corpus."""
        start, size = block * self._block, self._block
        begun, done = self._counts_at(start), self._counts_at(start + size)
        released: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for j, share in enumerate(self._shares):
            for i in range(int(begun[j]), int(done[j])):
                first = max((i << _BITS) // share - start, 0)
                last = -(-(i + 1 << _BITS) // share) - 1 - start
                released[first].append((min(last, size - 1), j))
        corpora = np.empty(size, dtype=np.int64)
        waiting: list[tuple[int, int]] = []
        for place in range(size):
            for window in released[place]:
                heapq.heappush(waiting, window)
            last, corpora[place] = heapq.heappop(waiting)
            assert place <= last
        numbers = np.empty(size, dtype=np.int64)
        for j in range(self.num_corpora):
            places = np.flatnonzero(corpora == j)
            numbers[places] = begun[j] + np.arange(len(places))
        return corpora, numbers


def _round(fractions: Sequence[int], *orders: Sequence[int]) -> list[int]:
    """Return which fractions, in units of 2^-62, are rounded up so that prefix sums change by less than one in both orders.

    Bit by bit from the lowest (Beck and Spencer, Discrete Mathematics 1984): numbers in which the bit is set are paired with
    their neighbours in each order, and of a pair one gives the bit to the other. The pairs of two orders make cycles of even
    length, so that both can be obeyed; their number is even since the sum of all is an integer. Each bit changes a prefix sum
    by at most the one number whose pair is cut: all together by less than one.
    """
    values = list(fractions)
    for bit in range(_BITS):
        odd = [[j for j in order if values[j] >> bit & 1] for order in orders]
        partners = [dict(_pairs(order)) for order in odd]
        left = set(odd[0])
        for first in odd[0]:
            j = first
            while j in left:
                other = partners[0][j]
                values[j] += 1 << bit
                values[other] -= 1 << bit
                left -= {j, other}
                j = partners[1][other]
    return [j for j, value in enumerate(values) if value == _ONE]


def _pairs(items: Sequence[int]) -> list[tuple[int, int]]:
    """Return each item with the other one of its pair."""
    pairs = list(zip(items[::2], items[1::2], strict=True))
    return pairs + [(b, a) for a, b in pairs]

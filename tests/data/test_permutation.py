"""Shuffled orders that are computed: permutations of any size, the same everywhere, different for each key."""

from __future__ import annotations

import hashlib
import json
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40), corpus=st.text())
def test_every_number_comes_once(n: int, seed: int, epoch: int, corpus: str) -> None:
    found = Permutation(n, seed, epoch, corpus)(np.arange(n))
    assert (np.sort(found) == np.arange(n)).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 2**62), seed=st.integers(0, 2**64), data=st.data())
def test_large_ones_stay_in_range_and_never_meet(n: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=30, unique=True)))
    found = Permutation(n, seed)(positions)
    assert found.dtype == np.int64
    assert ((found >= 0) & (found < n)).all()
    assert len(set(found.tolist())) == len(positions)


def test_one_position_is_as_many() -> None:
    permutation = Permutation(2**33 + 7, 3, "web")
    positions = np.array([[0, 2**33], [5, 17]])
    assert permutation(positions).shape == (2, 2)
    assert [int(permutation(np.array(p))) for p in positions.ravel()] == permutation(positions).ravel().tolist()


def test_the_order_is_the_one_that_is_specified() -> None:
    """Golden: a change here breaks the resume of every run that was begun before."""
    assert Permutation(10, 0, "web", 0)(np.arange(10)).tolist() == GOLDEN_TEN
    large = Permutation(10**12 + 39, 2**40, "ü", 7)(np.array([0, 1, 10**9, 10**12 + 38]))
    assert large.tolist() == GOLDEN_LARGE


GOLDEN_TEN = [8, 6, 7, 3, 4, 5, 9, 1, 2, 0]
GOLDEN_LARGE = [734375224285, 336113085694, 18445367204, 308657775401]


def by_the_book(position: int, n: int, *key: int | str) -> int:
    """The construction as its specification tells it, in plain integers."""
    keys = struct.unpack("<8Q", hashlib.blake2b(json.dumps(list(key)).encode(), digest_size=64).digest())
    bits = (n - 1).bit_length()
    upper, lower = bits // 2, bits - bits // 2

    def f(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    while True:
        left, right = position >> lower, position % 2**lower
        for i, k in enumerate(keys):
            if i % 2 == 0:
                left ^= f((right + k) % 2**64) % 2**upper
            else:
                right ^= f((left + k) % 2**64) % 2**lower
        position = left << lower | right
        if position < n:
            return position


@given(n=st.integers(1, 2**62), seed=st.integers(), epoch=st.integers(0, 9), data=st.data())
def test_the_computation_is_the_specified_one(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, n - 1))
    assert int(Permutation(n, seed, "web", epoch)(np.array(position))) == by_the_book(position, n, seed, "web", epoch)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 23])
def test_small_ones_are_even(n: int) -> None:
    """Each number is equally likely at each position: chi-squared of n × n counts, which 6 sigma around its mean must hold."""
    keys = 1000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, key)(np.arange(n))] += 1
    freedom = (n - 1) ** 2
    chi = float(((counts - keys / n) ** 2 / (keys / n)).sum())
    assert abs(chi - freedom) < 6 * (2 * freedom) ** 0.5 + 6


def test_orders_of_keys_are_strangers() -> None:
    n = 100_000
    first, second = (Permutation(n, 1, "web", epoch)(np.arange(n)) for epoch in range(2))
    assert (first == second).sum() < 10  # one is expected
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_sizes_out_of_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="1 to 2\\^62"):
        Permutation(n, 0)


def test_the_largest_takes_no_time() -> None:
    started = time.process_time()
    found = Permutation(2**62, 0)(np.array([0, 2**62 - 1]))
    assert time.process_time() - started < 0.1
    assert found[0] != found[1]

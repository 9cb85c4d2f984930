"""Blends: every corpus within one sample of its weight at every prefix, found at any place without a table."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.blend import Blend

weights_of_corpora = st.lists(st.floats(0.02, 1.0) | st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=8).filter(any)


@settings(max_examples=40, deadline=None)
@given(weights=weights_of_corpora, start=st.just(0) | st.integers(0, 10**12), length=st.integers(1, 800))
def test_every_prefix_is_within_one_of_its_weights(weights: list[float], start: int, length: int) -> None:
    blend = Blend(weights)
    corpora, numbers = blend.locate(np.arange(start, start + length))
    counts = blend.counts(start)
    shares = np.array(weights) / sum(weights)
    prefixes = counts + np.eye(len(weights), dtype=np.int64)[corpora].cumsum(axis=0)
    assert (numbers == prefixes[np.arange(length), corpora] - 1).all()
    # What n × weight rounds to in floating point is off by up to 1e-3 at 10^12.
    slack = 1e-3 if start > 10**9 else 1e-6
    assert np.abs(prefixes - np.arange(start + 1, start + length + 1)[:, None] * shares).max() < 1 + slack
    assert (blend.counts(start + length) == prefixes[-1]).all()


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=30), block=st.integers(0, 2**40))
def test_blocks_can_always_be_scheduled(weights: list[int], block: int) -> None:
    """The proof in the module's docstring, tried: scheduling asserts that no sample comes too late or is missing."""
    blend = Blend(weights)
    blend.locate(np.arange(block * blend._block, block * blend._block + 1))


def test_counts_never_fall() -> None:
    blend = Blend([0.9, 0.05, 0.05, 0.0])
    counts = np.array([blend.counts(n) for n in range(300)])
    assert (np.diff(counts, axis=0).sum(axis=1) == 1).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts[:, 3] == 0).all()


def test_many_unequal_corpora_and_the_smallest_weight() -> None:
    blend = Blend([1.0] + [2.0**-14] * 3 + [0.01] * 60)
    n = 70_000
    corpora, _ = blend.locate(np.arange(n))
    shares = np.array(blend.weights)
    for prefix in (1, 1000, 65_535, 65_536, 65_537, n):
        assert np.abs(np.bincount(corpora[:prefix], minlength=64) - shares * prefix).max() < 1


def test_the_order_is_part_of_a_runs_state() -> None:
    corpora, numbers = Blend([0.5, 0.3, 0.2]).locate(np.arange(10**9, 10**9 + 12))
    assert corpora.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1]
    assert numbers.tolist()[:3] == [500_000_000, 300_000_000, 500_000_001]
    assert (
        pickle.loads(pickle.dumps(Blend([0.5, 0.3, 0.2]))).locate(np.arange(99))[0].tolist()
        == Blend([5, 3, 2]).locate(np.arange(99))[0].tolist()
    )


def test_far_places_take_no_longer_than_near_ones() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    started = time.process_time()
    blend.locate(np.array([10**15]))
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.1], [float("nan"), 1.0], [float("inf")], [1.0, 1e-9]])
def test_weights_that_make_no_sense_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Blend(weights)

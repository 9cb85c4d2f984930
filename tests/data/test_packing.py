"""Packing: whole documents in sequences, each of their pairs once, none across documents, nothing held per document."""

from __future__ import annotations

import itertools
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data import packing
from kenotron.data.packing import GROUP, Packing, first_fit
from kenotron.data.rows import Rows
from kenotron.data.source import ArraySource


def corpus(lengths: list[int]) -> ArraySource:
    """Documents whose tokens are their own positions."""
    begins = np.cumsum([0, *lengths])
    return ArraySource("count", [np.arange(a, b) for a, b in itertools.pairwise(begins)])


def all_sequences(packed: Packing, length: int) -> dict[str, np.ndarray]:
    out = Rows(packed.num_samples, length, 0, True)
    packed.fill(out, np.arange(packed.num_samples), np.arange(packed.num_samples), 0)
    return out.batch()


lengths_of_documents = st.lists(st.integers(0, 60) | st.sampled_from([0, 1, 2, 200]), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, length=st.integers(1, 50), repeat=st.sampled_from([1, 1, 9]))
def test_each_pair_within_a_document_is_trained_once(lengths: list[int], length: int, repeat: int) -> None:
    lengths = lengths * repeat
    if max(lengths) < 2:
        return
    batch = all_sequences(Packing(corpus(lengths), length), length)
    kept = batch["shift_labels"] != -100
    found = Counter(zip(batch["input_ids"][kept].tolist(), batch["shift_labels"][kept].tolist(), strict=True))
    document = np.repeat(np.arange(len(lengths)), lengths)
    assert found == Counter((i, i + 1) for i in range(len(document) - 1) if document[i] == document[i + 1])
    # Positions count through a document, and begin anew with another one.
    runs_on = batch["position_ids"][:, 1:] == batch["position_ids"][:, :-1] + 1
    assert (runs_on | (batch["position_ids"][:, 1:] == 0)).all()
    same = kept[:, 1:] & kept[:, :-1] & runs_on
    assert (document[batch["input_ids"][:, 1:][same]] == document[batch["input_ids"][:, :-1][same]]).all()


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.lists(st.integers(0, 20), min_size=12, max_size=12), min_size=1, max_size=5))
def test_first_fit_is_what_its_name_says(sizes: list[list[int]]) -> None:
    bins, counts = first_fit(np.array(sizes), 20)
    for items, found, count in zip(sizes, bins.tolist(), counts.tolist(), strict=True):
        free: list[int] = []
        expected = []
        for size in items:
            if not size:
                expected.append(-1)
                continue
            place = next((i for i, room in enumerate(free) if room >= size), len(free))
            free += [20] * (place == len(free))
            free[place] -= size
            expected.append(place)
        assert found == expected
        assert count == len(free)


def test_short_documents_of_one_token_and_none_cost_nothing() -> None:
    packed = Packing(corpus([0, 1, 5, 0, 1, 4]), 7)
    batch = all_sequences(packed, 7)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_little_is_wasted() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 1, 3000)).astype(int) + 2
    packed = Packing(corpus(lengths.tolist()), 1024)
    assert (lengths - 1).sum() / (packed.num_samples * 1024) > 0.9


@pytest.mark.parametrize("lengths", [[], [0], [1, 1, 0]])
def test_documents_without_a_pair_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        Packing(corpus(lengths), 4)


def test_counts_are_kept_in_a_file_and_made_again_if_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus([3, 5, 9] * 300)
    fresh = Packing(source, 16)
    packed = Packing(source, 16, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(Packing, "_count", lambda self: pytest.fail("counted again"))
    again = Packing(source, 16, cache=tmp_path)
    monkeypatch.undo()
    assert fresh.num_samples == packed.num_samples == again.num_samples
    file.write_bytes(file.read_bytes()[:50])
    assert Packing(source, 16, cache=tmp_path).num_samples == fresh.num_samples
    Packing(source, 17, cache=tmp_path)
    Packing(corpus([3, 5, 8, 1] * 225), 16, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


class Countless:
    """2^33 documents of 11 tokens, none of which is in memory."""

    name, num_documents, num_tokens = "countless", 2**33, 11 * 2**33

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def ends(self, first: int, last: int) -> np.ndarray:
        return np.arange(first + 1, last + 1) * 11

    def document_of(self, position: int) -> int:
        return position // 11


def test_positions_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.arange(2**10 + 1) * 2**31  # as if of few groups
    monkeypatch.setattr(Packing, "_count", lambda self: counts)
    packed = Packing(Countless(), 100)
    first, last = packed._documents(2**32, 2**32 + 3)
    assert first.tolist() == [2**32 * 11, 2**32 * 11 + 11, 2**32 * 11 + 22]
    assert last.tolist() == [10] * 3


def test_a_batch_of_far_samples_is_packed_together() -> None:
    lengths = [20] * (GROUP * 40)
    packed = pickle.loads(pickle.dumps(Packing(corpus(lengths), 256)))
    numbers = np.arange(40) * (packed.num_samples // 40)
    out = Rows(40, 256, 0, True)
    started = time.process_time()
    packed.fill(out, np.arange(40), numbers, 0)
    assert time.process_time() - started < 0.5
    assert len(packed._kept) <= packing._KEPT

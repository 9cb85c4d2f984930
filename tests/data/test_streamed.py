"""Streams: samples in the order of the stream, from any place on, whatever can be asked of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.made import Refused
from kenotron.data.rows import IGNORED, Rows
from kenotron.data.source import ArraySource
from kenotron.data.stream import Sampling
from kenotron.data.streamed import Cursor, DocumentStream, Sample, samples_of


class Rows_:
    """Rows that can be iterated over again; counts how many are read."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents, self.num_read = documents, 0

    def __iter__(self) -> Iterator[list[int]]:
        for document in self.documents:
            self.num_read += 1
            yield document


class WithState(Rows_):
    """The same, with a state, and another order in each epoch."""

    def __init__(self, documents: list[list[int]]) -> None:
        super().__init__(documents)
        self.at, self.begin, self.epoch = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        self.at, self.begin = self.begin, 0
        turned = self.documents[self.epoch :] + self.documents[: self.epoch]
        while self.at < len(turned):
            self.at += 1
            self.num_read += 1
            yield turned[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.begin = state_dict["at"]


def encode(rows: list[Any]) -> list[Any]:
    return [Refused("bad", "", "x") if row is None else row for row in rows]


PACKED, WINDOWS = Sampling(samples="documents", pad_token_id=7777), Sampling(pad_token_id=7777)


def samples(rows: Any, length: int, sampling: Sampling, cursor: Cursor = Cursor(), **options: Any) -> Iterator[Sample]:  # noqa: B008
    packs = sampling.samples == "documents"
    stream = DocumentStream(rows, encode, shortest=2 if packs else 1, **{"repeat": False, "skip": False, **options})
    return samples_of(stream, cursor, length, sampling)


def filled(found: list[Sample], length: int, sampling: Sampling) -> dict[str, np.ndarray]:
    out = sampling.rows(len(found), length)
    for row, sample in enumerate(found):
        sample.put(out, row, apart=sampling.samples == "documents" or sampling.mask_documents)
    return out.batch()


def pairs_of(batch: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    kept = batch["shift_labels"] != IGNORED
    return sorted(zip(batch["input_ids"][kept].tolist(), batch["shift_labels"][kept].tolist(), strict=True))


def numbered(lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


lengths = st.lists(st.integers(0, 23), max_size=30)


@given(lengths, st.integers(1, 12))
def test_windows_train_every_pair_of_the_stream_once(lengths: list[int], length: int) -> None:
    found = filled(list(samples(Rows_(numbered(lengths)), length, WINDOWS)), length, WINDOWS)
    assert pairs_of(found) == [(i, i + 1) for i in range(sum(lengths) - 1)]


@given(lengths, st.integers(1, 12))
def test_documents_train_every_pair_within_one_once_and_next_fit_keeps_them_whole(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    found = filled(list(samples(Rows_(documents), length, PACKED)), length, PACKED)
    assert pairs_of(found) == sorted(pair for document in documents for pair in itertools.pairwise(document))
    begins = found["input_ids"][(found["position_ids"] == 0) & (found["shift_labels"] != IGNORED)].tolist()
    wanted = [document[0] + at for document in documents for at in range(0, len(document) - 1, length)]
    assert sorted(begins) == wanted


def test_masked_windows_are_those_of_a_corpus() -> None:
    from kenotron.data.windows import Windows

    documents, sampling = numbered([5, 1, 13, 2, 30, 9]), Sampling(mask_documents=True, pad_token_id=7777)
    windows = Windows(ArraySource("a", [np.asarray(one) for one in documents]), 8, mask_documents=True)
    out: Rows = sampling.rows(windows.num_samples, 8)
    windows.fill(out, np.arange(windows.num_samples), np.arange(windows.num_samples), 0)
    found = filled(list(samples(Rows_(documents), 8, sampling)), 8, sampling)
    for name, value in out.batch().items():
        assert (found[name] == value).all(), name


@settings(max_examples=60, deadline=None)
@given(
    lengths.filter(lambda found: sum(length > 1 for length in found) > 0),
    st.integers(1, 9),
    st.sampled_from([PACKED, WINDOWS]),
    st.sampled_from([Rows_, WithState]),
    st.booleans(),
    st.data(),
)
def test_a_stream_goes_on_at_any_sample(
    lengths: list[int], length: int, sampling: Sampling, kind: type[Rows_], repeat: bool, data: st.DataObject
) -> None:
    documents = numbered(lengths) * 5
    whole = list(itertools.islice(samples(kind(documents), length, sampling, repeat=repeat), 70))
    at = data.draw(st.integers(0, len(whole) - 1))
    rest = samples(kind(documents), length, sampling, whole[at].following, repeat=repeat)
    found = list(itertools.islice(rest, len(whole) - at - 1))
    assert len(found) == len(whole) - at - 1
    for one, other in zip(found, whole[at + 1 :], strict=True):
        assert one.following.__dict__ | {"state": 0, "state_at": 0} == other.following.__dict__ | {"state": 0, "state_at": 0}
        for (tokens, begins), (others, other_begins) in zip(one.runs, other.runs, strict=True):
            assert tokens.tolist() == others.tolist() and begins.tolist() == other_begins.tolist()
    if not repeat and len(whole) < 70:
        assert not list(rest)


def test_what_has_a_state_is_not_read_again() -> None:
    documents = numbered([9] * 1000)
    found = list(itertools.islice(samples(WithState(documents), 8, PACKED), 900))
    again = WithState(documents)
    assert next(samples(again, 8, PACKED, found[-1].following)).runs[0][0].tolist() == documents[900]
    assert again.num_read < 150
    plain = Rows_(documents)
    assert next(samples(plain, 8, PACKED, Cursor(0, 900, 0))).runs[0][0].tolist() == documents[900]
    assert plain.num_read >= 900


def test_streams_of_datasets_go_on_exactly_and_buffers_are_skipped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kenotron"), "parent", logging.getLogger())  # a strategy gives it another one
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"ids": numbered([3, 5, 9, 4] * 50)})

    def made(shuffled: bool) -> Any:
        stream = rows.to_iterable_dataset(num_shards=3).map(lambda row: {"ids": [token + 1 for token in row["ids"]]})
        return stream.shuffle(seed=1, buffer_size=11) if shuffled else stream

    def encode_rows(found: list[Any]) -> list[Any]:
        return [row["ids"] for row in found]

    for shuffled in (False, True):

        def at(cursor: Cursor, shuffled: bool = shuffled) -> Iterator[Sample]:
            return samples_of(DocumentStream(made(shuffled), encode_rows, repeat=True, skip=False), cursor, 8, WINDOWS)

        whole = list(itertools.islice(at(Cursor()), 300))  # more than two passes
        for place in (0, 3, 101, 131, 140, 250):
            following = next(at(whole[place].following))
            assert following.runs[0][0].tolist() == whole[place + 1].runs[0][0].tolist(), (shuffled, place)
        assert ("buffer" in caplog.text) == shuffled


@pytest.mark.parametrize("sampling", [PACKED, WINDOWS])
def test_streams_without_documents_are_errors_and_not_endless(sampling: Sampling) -> None:
    for documents in ([], [[]], [[]] * 100):
        with pytest.raises(ValueError, match="Pass 0 over the stream has no document"):
            next(samples(Rows_(documents), 4, sampling, repeat=True))
        assert not list(samples(Rows_(documents), 4, sampling))
    with pytest.raises(ValueError, match=r"Pass 1 .* an iterable, not an iterator"):
        list(samples(iter(numbered([9])), 4, sampling, repeat=True))


def test_a_shorter_stream_than_was_trained_is_told() -> None:
    with pytest.raises(ValueError, match="ended after 3 documents, and 5 of them were trained"):
        next(samples(Rows_(numbered([9] * 3)), 4, PACKED, Cursor(0, 5, 0)))


def test_what_is_no_document_is_told_or_counted() -> None:
    documents: Any = [[1, 2, 3], None, [4, 5]]
    with pytest.raises(ValueError, match="document 1 of pass 0 over the stream: bad: x"):
        list(samples(Rows_(documents), 4, PACKED))
    stream = DocumentStream(Rows_(documents), encode, repeat=False, skip=True)
    assert [document.ids.tolist() for document in stream.read(Cursor())] == [[1, 2, 3], [4, 5]]
    assert stream.refused == {"bad": 1}

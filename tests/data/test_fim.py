"""Fill-in-the-middle: nothing is lost but three tokens, and every draw follows from the seed and the sample's number."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from kenotron.data.fim import CONVENTIONS, FillInTheMiddle, Infiller, Sentinels, permute, restore
from kenotron.data.rows import IGNORED
from kenotron.data.source import ArraySource
from kenotron.data.stages import Stage, plan
from kenotron.data.stream import Sampling, Stream

IDS = Sentinels(prefix=1000, middle=1001, suffix=1002)
EOS = 999


def infiller(seed: int = 0, split: int | None = None, **rates: Any) -> Infiller:
    return Infiller(FillInTheMiddle(**{"rate": 1.0, **rates}), seed=seed, sentinels=IDS, split=split, bos=998, eos=EOS)


def stream(documents: list[np.ndarray], length: int, sampling: Sampling, fim: Infiller | None = None) -> Stream:
    first = Stage(start_step=0, corpora={"a": 1.0}, sequence_length=length, global_batch_size=4)
    return Stream({"a": ArraySource("a", documents)}, plan([first]), sampling, infiller=fim)


tokens = st.lists(st.integers(0, 900), min_size=0, max_size=40).map(lambda ids: np.asarray(ids, np.int64))


@given(tokens, st.data())
def test_a_permuted_document_has_the_same_tokens_and_comes_back(document: np.ndarray, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(document)))
    stop = data.draw(st.integers(start, len(document)))
    for spm in (False, True):
        found = permute(document, start, stop, IDS, spm=spm)
        assert sorted(found) == sorted([*document, *IDS])
        assert restore(found, IDS).tolist() == document.tolist()


def test_orders_are_those_of_the_papers() -> None:
    document = np.arange(10)
    pre, mid, suf = IDS
    assert permute(document, 3, 7, IDS, spm=False).tolist() == [pre, 0, 1, 2, suf, 7, 8, 9, mid, 3, 4, 5, 6]
    assert permute(document, 3, 7, IDS, spm=True).tolist() == [pre, suf, 7, 8, 9, mid, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("wrong", [[], [1000], [1000, 1001, 1002], [1000, 1002, 1001, 1001], [5, 1000, 1002, 1001]])
def test_what_is_no_permuted_document_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="sentinels"):
        restore(np.asarray(wrong, np.int64), IDS)


def documents_of(batch: dict[str, np.ndarray], row: int) -> list[np.ndarray]:
    """Return the documents of a packed row, each with the last label."""
    begins = [*np.flatnonzero(batch["position_ids"][row] == 0).tolist(), batch["input_ids"].shape[1]]
    labels, ids = batch["shift_labels"][row], batch["input_ids"][row]
    return [np.append(ids[a:b], labels[b - 1]) for a, b in itertools.pairwise(begins) if labels[a] != IGNORED]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(0, 2**62), st.integers(0, 3))
def test_documents_that_are_packed_lose_three_tokens_and_keep_their_length(lengths: list[int], first: int, seed: int) -> None:
    begin = 0
    documents = []
    for length in lengths:
        documents.append(np.append(np.arange(begin, begin + length - 1), EOS))
        begin += length
    sampling = Sampling(samples="documents", shuffle=False)
    plain = stream(documents, 32, sampling).batch(first, 3)
    found = stream(documents, 32, sampling, infiller(seed)).batch(first, 3)
    assert (found["position_ids"] == plain["position_ids"]).all()
    assert ((found["shift_labels"] == IGNORED) == (plain["shift_labels"] == IGNORED)).all()
    assert (found["labels"][:, 1:] == found["shift_labels"][:, :-1]).all()
    for row in range(3):
        for document, before in zip(documents_of(found, row), documents_of(plain, row), strict=True):
            assert document[-1] == EOS
            if len(before) - 1 < 6:
                assert document.tolist() == before.tolist()
            else:
                assert restore(document[:-1], IDS).tolist() == before[:-4].tolist()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_windows_stay_sequences_of_tokens_and_next_tokens(mask: bool, shift: bool) -> None:
    documents = [np.append(np.arange(start, start + 13), EOS) for start in range(0, 130, 13)]
    sampling = Sampling(mask_documents=mask, shift_windows=shift, shuffle=False, pad_token_id=900)
    plain, found = (stream(documents, 25, sampling, fim).batch(0, 18) for fim in (None, infiller()))
    assert found.keys() == plain.keys()
    assert ((found["shift_labels"] == IGNORED) == (plain["shift_labels"] == IGNORED)).all()
    changed = (found["input_ids"] != plain["input_ids"]).any(axis=1)
    assert changed.all()
    for row in range(18):
        ids, labels, before = found["input_ids"][row], found["shift_labels"][row], plain["shift_labels"][row]
        followed = labels[:-1] != IGNORED
        same = ids[1:][followed] == labels[:-1][followed]
        # Where the corpus ends within a window, the last token is a label, and the first one or padding follows.
        seams = int((plain["input_ids"][row][1:][followed] != before[:-1][followed]).sum())
        assert int((~same).sum()) == seams
        assert np.array_equal(ids == EOS, plain["input_ids"][row] == EOS)


@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_sample_is_a_function_of_seed_and_number_alone(first: int, cut: int, seed: int) -> None:
    documents = [np.append(np.arange(start, start + 20), EOS) for start in range(0, 200, 20)]
    whole = stream(documents, 32, Sampling(), infiller(seed, rate=0.5)).batch(first, 10)
    parts = stream(documents, 32, Sampling(), infiller(seed, rate=0.5))
    again = [parts.batch(first + cut, 10 - cut), parts.batch(first, cut)]
    for name, value in whole.items():
        assert (np.concatenate([again[1][name], again[0][name]]) == value).all()


def test_rates_are_kept() -> None:
    documents = [np.append(np.arange(start, start + 20), EOS) for start in range(0, 800, 20)]
    batch = stream(documents, 20, Sampling(samples="documents"), infiller(rate=0.3, spm_rate=0.25)).batch(0, 4000)
    chosen = batch["input_ids"][:, 0] == IDS.prefix
    spm = batch["input_ids"][chosen, 1] == IDS.suffix
    assert abs(chosen.mean() - 0.3) < 0.03
    assert abs(spm.mean() - 0.25 - 0.75 / 19) < 0.05  # an empty prefix looks the same
    for rate in (0.0, 1.0):
        batch = stream(documents, 20, Sampling(samples="documents"), infiller(rate=rate)).batch(0, 50)
        assert ((batch["input_ids"][:, 0] == IDS.prefix) == bool(rate)).all()


def test_cuts_are_even() -> None:
    documents = [np.arange(24)]
    batch = stream(documents, 23, Sampling(samples="documents"), infiller(spm_rate=0.0)).batch(0, 3000)
    lengths = (batch["input_ids"] == IDS.suffix).argmax(axis=1) - 1
    # The smaller of two even draws from 0 … 21: each length n at (2 · (21 - n) + 1) / 22².
    expected = np.array([(2 * (21 - n) + 1) / 22**2 for n in range(22)])
    assert np.abs(np.bincount(lengths, minlength=22)[:21] / 3000 - expected[:21]).max() < 0.02


def test_documents_with_sentinels_and_fragments_of_prompts_stay() -> None:
    documents = [np.array([1, 2, 3, IDS.middle, *range(20)])]
    batch = stream(documents, 23, Sampling(samples="documents"), infiller()).batch(0, 4)
    assert (batch["input_ids"] == documents[0][:-1]).all()


def test_files_of_a_repository_are_rearranged_by_themselves() -> None:
    split = 777
    parts = [np.arange(start, start + 12) for start in (0, 100, 200)]
    document = np.concatenate([[998], parts[0], [split], parts[1], [split], parts[2], [EOS]])
    batch = stream([document], 39, Sampling(samples="documents"), infiller(split=split, fragment_rate=1.0)).batch(7, 1)
    found = batch["input_ids"][0]
    assert found[0] == 998 and batch["shift_labels"][0][38] == EOS
    for number, part in enumerate(parts):
        start = 1 + number * 13
        assert restore(found[start : start + 12], IDS).tolist() == part[:-3].tolist()
    few = stream([document], 39, Sampling(samples="documents"), infiller(split=split, fragment_rate=0.0)).batch(7, 1)
    assert (few["input_ids"][0] == document[:-1]).all()


# ------------------------------------------------------------------------------------------------------------ sentinels


def tokenizer(folder: Path, names: tuple[str, ...], config: bool = True) -> Path:
    folder.mkdir()
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.add_special_tokens(["<s>", "</s>", *names])
    made.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize("names", CONVENTIONS)
def test_sentinels_are_found_by_convention(names: tuple[str, str, str], tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "t", ("<other>", *names))
    for place in (folder, folder / "tokenizer.json"):
        assert FillInTheMiddle(tokenizer=str(place)).infiller(0).sentinels == Sentinels(5, 6, 7)
    assert FillInTheMiddle().infiller(0, folder).sentinels == Sentinels(5, 6, 7)


def test_sentinels_may_be_named_or_numbered(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "t", ("<x>", "<y>", "<z>"), config=False)
    named = FillInTheMiddle(prefix="<x>", middle="<y>", suffix=9, tokenizer=str(folder))
    assert named.infiller(0).sentinels == Sentinels(4, 5, 9)
    assert FillInTheMiddle(prefix=1, middle=2, suffix=3).infiller(0).sentinels == Sentinels(1, 2, 3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rate": 1.5}, "rate=1.5: it is a share"),
        ({"spm_rate": -1}, "spm_rate=-1"),
        ({"prefix": "<x>"}, "Set middle, suffix as well"),
        ({}, "no corpus has its tokenizer beside it"),
        ({"prefix": 1, "middle": 1, "suffix": 2}, "three tokens"),
        ({"prefix": 1, "middle": -1, "suffix": 2}, "middle=-1"),
        ({"tokenizer": "/nowhere"}, "there is no tokenizer.json"),
        ({"tokenizer": "T"}, "none of the known sentinels"),
        ({"tokenizer": "T", "prefix": "<x>", "middle": "<y>", "suffix": "<q>"}, "suffix='<q>' is no token of"),
    ],
)
def test_mistakes_are_told(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "t", ("<x>", "<y>"))
    if given.get("tokenizer") == "T":
        given = {**given, "tokenizer": str(folder)}
    with pytest.raises(ValueError, match=says):
        FillInTheMiddle(**given).infiller(0)

"""Windows: each pair of tokens once in a pass, at any length and phase; documents kept apart."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.rows import Rows
from kenotron.data.source import ArraySource
from kenotron.data.windows import Windows


def corpus(*lengths: int) -> ArraySource:
    """Documents whose tokens are their own positions, so that a pair of tokens tells where it comes from."""
    begins = np.cumsum([0, *lengths])
    return ArraySource("count", [np.arange(a, b) for a, b in itertools.pairwise(begins)])


def one_pass(source: ArraySource, length: int, phase: int, mask: bool = False) -> dict[str, np.ndarray]:
    windows = Windows(source, length, mask_documents=mask)
    out = Rows(windows.num_samples, length, 7, mask)
    windows.fill(out, np.arange(windows.num_samples), np.arange(windows.num_samples), phase)
    return out.batch()


def pairs(batch: dict[str, np.ndarray]) -> Counter[tuple[int, int]]:
    kept = batch["shift_labels"] != -100
    return Counter(zip(batch["input_ids"][kept].tolist(), batch["shift_labels"][kept].tolist(), strict=True))


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(2, 300), length=st.integers(1, 40) | st.integers(250, 400), phase=st.integers(0, 1000))
def test_each_pair_is_trained_once_in_as_few_windows_as_can_be(tokens: int, length: int, phase: int) -> None:
    batch = one_pass(corpus(tokens), length, phase)
    assert pairs(batch) == Counter((i, i + 1) for i in range(tokens - 1))
    assert len(batch["input_ids"]) == -(-(tokens - 1) // length)
    assert (batch["labels"][:, 1:] == batch["shift_labels"][:, :-1]).all()
    assert (batch["labels"][:, 0] == -100).all()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20), length=st.integers(1, 40), phase=st.integers(0, 99))
def test_masked_documents_never_meet(lengths: list[int], length: int, phase: int) -> None:
    if sum(lengths) < 2:
        return
    batch = one_pass(corpus(*lengths), length, phase, mask=True)
    document = np.repeat(np.arange(len(lengths)), lengths)
    within = [(i, i + 1) for i in range(sum(lengths) - 1) if document[i] == document[i + 1]]
    assert pairs(batch) == Counter(within)
    for ids, labels, positions in zip(*(batch[k] for k in ("input_ids", "shift_labels", "position_ids")), strict=True):
        assert positions[0] == 0
        for t in range(1, length):
            real = ids[t - 1] != 7 or ids[t] != 7
            if positions[t]:
                assert positions[t] == positions[t - 1] + 1
            if labels[t] != -100 and positions[t]:
                assert ids[t] == ids[t - 1] + 1
                assert document[ids[t]] == document[ids[t - 1]]
            elif real and labels[t] != -100:  # a new document, or a run that begins within one
                assert ids[t] != ids[t - 1] + 1 or document[ids[t]] != document[ids[t - 1]]


def test_other_phases_cut_elsewhere() -> None:
    source = corpus(100)
    starts = {tuple(sorted(one_pass(source, 10, phase)["input_ids"][:, 0].tolist())) for phase in range(10)}
    assert len(starts) == 10


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 0)])
def test_a_corpus_without_a_pair_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        Windows(corpus(*lengths), 4)


def test_a_length_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length=0"):
        Windows(corpus(9), 0)


def test_a_window_of_many_tiny_documents() -> None:
    batch = one_pass(corpus(*[1] * 600, 5, *[0] * 600, 3), 2000, 0, mask=True)
    assert pairs(batch) == Counter([(i, i + 1) for i in (600, 601, 602, 603, 605, 606)])


class Big(ArraySource):
    """As if there were 2^40 tokens before those in memory."""

    def __init__(self) -> None:
        super().__init__("big", [np.arange(100)])
        self.offset = 2**40
        self.num_tokens += self.offset

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)


def test_positions_beyond_32_bits() -> None:
    windows = Windows(Big(), 64)
    out = Rows(1, 64, 0, False)
    windows.fill(out, np.array([0]), np.array([2**34]), 0)
    assert out.input_ids[0, 0] == 2**40
    assert windows.num_samples == 2**34 + 2


@pytest.mark.parametrize("own", [False, True])
def test_models_take_the_batch_as_it_is_and_keep_documents_apart(own: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from kenotron.models import Decoder

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = Decoder(config) if own else LlamaForCausalLM(config)

    def loss_sum(batch: dict[str, np.ndarray]) -> float:
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        count = int((tensors["shift_labels"] != -100).sum())
        with torch.no_grad():
            return float(model(**tensors, use_cache=False).loss) * count

    together = one_pass(corpus(5, 9, 8), 32, 0, mask=True)
    apart = 0.0
    for begin, stop in ((0, 5), (5, 14), (14, 22)):
        source = ArraySource("one", [np.arange(begin, stop)])
        apart += loss_sum(one_pass(source, stop - begin - 1, 0))
    assert abs(loss_sum(together) - apart) < 1e-4

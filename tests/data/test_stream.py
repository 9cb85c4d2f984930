"""The stream of a run's samples: one pass after another, blends and stages, and a past that can't be changed."""

from __future__ import annotations

import itertools
import pickle
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.source import ArraySource
from kenotron.data.stages import Segment, Stage, after_batches, align, from_state, history, plan, resume, to_state
from kenotron.data.stream import Sampling, Stream

TOKENS = {"a": 101, "b": 57, "c": 300}


def sources() -> dict[str, Any]:
    """Corpora whose tokens are their positions plus 1000 for each corpus before them."""
    return {name: ArraySource(name, [np.arange(n) + 1000 * i]) for i, (name, n) in enumerate(TOKENS.items())}


def stages(*more: Stage, weights: dict[str, float] | None = None, length: int = 10, batch: int = 4) -> list[Stage]:
    return [Stage(start_step=0, corpora=weights or {"a": 1.0}, sequence_length=length, global_batch_size=batch), *more]


def stream(*more: Stage, sampling: Sampling | None = None, **first: Any) -> Stream:
    return Stream(sources(), plan(stages(*more, **first)), sampling or Sampling(shift_windows=False))


def starts(found: Stream, first: int, count: int) -> list[int]:
    return found.batch(first, count)["input_ids"][:, 0].tolist()


def test_each_pass_has_all_samples_in_an_order_of_its_own() -> None:
    found = stream()
    passes = [starts(found, 10 * i, 10) for i in range(5)]
    assert all(sorted(one) == list(range(0, 100, 10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 5


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=3), kind=st.sampled_from(["windows", "documents"]), seed=st.integers(0, 5))
def test_any_way_to_ask_gives_the_same_samples(cuts: list[int], kind: Any, seed: int) -> None:
    found = stream(weights={"a": 0.5, "b": 0.3, "c": 0.2}, sampling=Sampling(samples=kind, seed=seed))
    whole = found.batch(0, 200)
    edges = sorted({0, 200, *cuts})
    again = pickle.loads(pickle.dumps(found))
    for first, last in reversed(list(itertools.pairwise(edges))):
        part = again.batch(first, last - first)
        assert all((part[name] == whole[name][first:last]).all() for name in whole)


def test_without_shuffling_samples_come_in_order() -> None:
    found = stream(sampling=Sampling(shuffle=False, shift_windows=False))
    assert starts(found, 0, 20) == [*range(0, 100, 10)] * 2


def test_other_seeds_are_other_orders() -> None:
    assert starts(stream(sampling=Sampling(seed=1)), 0, 10) != starts(stream(sampling=Sampling(seed=2)), 0, 10)


def test_shifted_windows_still_train_each_pair_once_in_a_pass() -> None:
    found = stream(sampling=Sampling())
    for one in range(3):
        batch = found.batch(10 * one, 10)
        kept = batch["shift_labels"] != -100
        pairs = Counter(zip(batch["input_ids"][kept].tolist(), batch["shift_labels"][kept].tolist(), strict=True))
        assert pairs == Counter((i, i + 1) for i in range(100))


def test_what_was_consumed_is_counted_by_corpus() -> None:
    found = stream(Stage(start_step=50, corpora={"b": 1, "c": 1}, sequence_length=20), weights={"a": 3, "b": 1})
    assert found.consumed(0)["a"].samples == 0
    half = found.consumed(100)
    assert (half["a"].samples, half["b"].samples, half["c"].samples) == (75, 25, 0)
    assert half["a"].tokens == 750
    assert half["a"].epochs == 7.5
    later = found.consumed(300)
    assert (later["a"].samples, later["b"].samples, later["c"].samples) == (150, 100, 50)
    assert later["b"].tokens == 50 * 10 + 50 * 20


# -------------------------------------------------------------------------------------------------------------- stages


def test_a_corpus_goes_on_where_it_was_when_it_comes_back() -> None:
    found = stream(
        Stage(start_step=2, corpora={"b": 1}, sequence_length=8),
        Stage(start_step=4, corpora={"a": 1}, sequence_length=10, global_batch_size=2),
    )
    assert sorted(starts(found, 0, 8) + starts(found, 16, 2)) == list(range(0, 100, 10))
    assert found.batch(8, 8)["input_ids"].shape == (8, 8)


def test_a_stage_with_another_batch_alone_goes_on_with_the_same_order() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    plain, ramped = stream(weights=weights), stream(Stage(start_step=5, global_batch_size=16), weights=weights)
    assert (plain.batch(0, 100)["input_ids"] == ramped.batch(0, 100)["input_ids"]).all()


def test_stages_say_what_is_wrong_with_them() -> None:
    with pytest.raises(ValueError, match="begin at steps"):
        plan(stages(Stage(start_step=0, global_batch_size=8)))
    with pytest.raises(ValueError, match="uses d, but the corpora are a, b, c"):
        stream(Stage(start_step=5, corpora={"d": 1}))
    for wrong in ({"start_step": -1}, {"start_step": 1, "sequence_length": 0}, {"start_step": 1, "global_batch_size": 0}):
        with pytest.raises(ValueError, match=r"=-1|=0"):
            Stage(**wrong)  # type: ignore[arg-type]
    for weights in ({}, {"a": 0}, {"a": -1.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="weight"):
            Stage(start_step=1, corpora=weights)


@settings(max_examples=50, deadline=None)
@given(
    at=st.lists(st.integers(1, 30), max_size=4, unique=True),
    batches=st.lists(st.sampled_from([4, 8, 12, 24]), min_size=5, max_size=5),
    stop=st.integers(0, 80),
    rest=st.integers(0, 80),
    accumulate=st.sampled_from([1, 2, 4]),
    again=st.sampled_from([1, 2, 4]),
)
def test_batches_follow_each_other_without_a_gap(
    at: list[int], batches: list[int], stop: int, rest: int, accumulate: int, again: int
) -> None:
    """Stopped and resumed anywhere, with another number of batches for a step, stages still begin where batches do."""
    weights = [{"a": 1.0}, {"a": 1.0, "b": 1.0}]
    more = [Stage(start_step=s, global_batch_size=b, corpora=weights[s % 2]) for s, b in zip(at, batches[1:], strict=False)]
    segments = plan(stages(*more, batch=batches[0]))
    sample = after_batches(segments, 0, stop, accumulate)
    assert sample == sum(size for _, size in walk(segments, 0, stop, accumulate))
    state = to_state(history(segments, sample))
    resumed = resume(from_state(state), segments, sample)
    assert resumed == segments
    aligned = align(resumed, sample, again)
    for first, size in walk(aligned, sample, rest, again):
        here = [s for s in aligned if s.start_sample <= first][-1]
        following = [s.start_sample for s in aligned if s.start_sample > first]
        assert size == here.batch // again
        assert not following or first + size <= following[0]


def walk(segments: tuple[Segment, ...], sample: int, count: int, accumulate: int) -> list[tuple[int, int]]:
    found = []
    for _ in range(count):
        following = after_batches(segments, sample, 1, accumulate)
        found.append((sample, following - sample))
        sample = following
    return found


def test_another_batch_size_takes_effect_where_the_run_is_resumed() -> None:
    segments = plan(stages(batch=8))
    resumed = resume(history(segments, 80), plan(stages(Stage(start_step=20, global_batch_size=2), batch=4)), 80)
    assert [(s.start_step, s.start_sample, s.batch) for s in resumed] == [(0, 0, 8), (10, 80, 4), (20, 120, 2)]
    later = resume(history(resumed, 100), plan(stages(batch=4)), 100)
    assert [(s.start_step, s.start_sample, s.batch) for s in later] == [(0, 0, 8), (10, 80, 4)]


def test_stages_may_be_added_to_the_future_and_not_to_the_past() -> None:
    before = plan(stages())
    added = [Stage(start_step=10, corpora={"b": 1})]
    assert len(resume(history(before, 40), plan(stages(*added)), 40)) == 2
    with pytest.raises(ValueError, match="add a Stage with start_step=11 or more"):
        resume(history(before, 44), plan(stages(*added)), 44)
    with pytest.raises(ValueError, match=r"sequence_length=10 at step 0, and the data module says .*sequence_length=12"):
        resume(history(before, 4), plan(stages(length=12)), 4)
    assert resume(history(before, 0), plan(stages(length=12)), 0) == plan(stages(length=12))


def test_a_thousand_million_samples_later_takes_no_longer() -> None:
    def cost(first: int) -> float:
        started = time.process_time()
        found = stream(weights={"a": 0.5, "b": 0.3, "c": 0.2})
        found.batch(first, 8)
        found.consumed(first)
        return time.process_time() - started

    cost(0)
    assert min(cost(10**9) for _ in range(3)) < 5 * min(cost(0) for _ in range(3)) + 0.01


def test_samples_tell_their_corpus_where_it_is_asked_for() -> None:
    later = Stage(start_step=5, corpora={"c": 1.0, "b": 1.0})
    found = stream(later, weights={"a": 1.0, "b": 0.0, "c": 1.0}, sampling=Sampling(corpus_ids=True))
    for first in (0, 20):
        batch = found.batch(first, 12)
        assert batch["corpus"].dtype == np.int64 and len(set(batch["corpus"].tolist())) == 2
        assert (batch["corpus"] == batch["input_ids"].max(1) // 1000).all()
    assert "corpus" not in stream().batch(0, 4)

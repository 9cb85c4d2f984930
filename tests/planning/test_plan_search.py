"""The search: what fits, what fails and why, memory of runs against what was predicted, schedules."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from planning_helpers import LLAMA, job, spec

from kenotron.layout import ParallelLayout
from kenotron.planning.layouts import Choice
from kenotron.planning.memory import all_ranks, fullest, in_flight, shortage
from kenotron.planning.model import ModelSpec
from kenotron.planning.planner import Tracer, check, choice_of, plan
from kenotron.planning.published import CALIBRATE, TEST
from kenotron.planning.schedule import Span, order, simulate
from kenotron.testing import RankPool


def bubble_of(spans: list[Span], pp: int) -> float:
    """Return the share of all ranks' time in which they wait."""
    length = max(span.end for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / (length * pp)


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return spec()


@pytest.fixture(scope="module")
def traces(model: ModelSpec) -> Tracer:
    return Tracer(model, job())


def test_best_fit_and_are_in_order(model: ModelSpec, traces: Tracer) -> None:
    wide = plan(model, job(), traces=traces)
    assert wide.best and wide.too_large == 0
    steps = [round(planned.time.step, 4) for planned in wide.best]  # what is closer is equally fast: less memory comes first
    assert steps == sorted(steps)
    least = wide.smallest
    assert least is not None
    narrow = plan(model, job(memory=least.memory.total * 1.05), traces=traces)
    assert narrow.best and narrow.too_large > 0
    assert all(planned.memory.total <= narrow.job.usable for planned in narrow.best)
    assert narrow.nearest_miss is not None and shortage(narrow.nearest_miss.memory, narrow.job) > 0


def test_fixed_settings_are_kept(model: ModelSpec, traces: Tracer) -> None:
    found = plan(model, job(fixed={"tp": 2, "zero_stage": 3, "recompute": "full"}), traces=traces)
    assert found.best
    for planned in found.best:
        assert (planned.choice.layout.tp, planned.choice.layout.zero_stage) == (2, 3)
        assert planned.choice.recompute.mode == "full"


def test_reasons_are_told(model: ModelSpec, traces: Tracer) -> None:
    found = plan(model, job(devices=6, batch=5, fixed={"tp": 3, "pp": 2}), traces=traces)
    assert not found.best
    assert any("tp=3 does not divide" in reason for reason in found.refused)
    found = plan(model, job(devices=8, batch=3), traces=traces)
    assert found.left_out["the batch can't be divided by dp"] > 0


def test_what_does_not_fit_names_rank_shortage_and_what_does(model: ModelSpec, traces: Tracer) -> None:
    free = job()
    wanted = choice_of(free, zero_stage=0, microbatch=4)
    smallest = plan(model, free, traces=traces).smallest
    assert smallest is not None
    tight = dataclasses.replace(free, memory=smallest.memory.total * 1.2)
    with pytest.raises(ValueError, match=r"rank 0 takes .* MB are missing\. The nearest that fits: ") as error:
        check(model, tight, wanted, traces)
    assert "zero 0" in str(error.value)
    assert check(model, free, wanted, traces).memory.total > 0


@pytest.mark.parametrize("settings", [{"devices": 0}, {"seq": -1}, {"precision": "bf8"}, {"fixed": {"tpp": 2}}, {"memory": 0}])
def test_bad_jobs_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Set|set|settings of the planner"):
        job(**settings)


def test_first_stage_holds_most_microbatches() -> None:
    one = Choice(layout=ParallelLayout(pp=4, dp=1), microbatch=1, num_microbatches=8)
    assert [in_flight(one, rank) for rank in range(4)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]
    assert in_flight(dataclasses.replace(one, schedule="afab"), 2) == {2: 8}
    several = dataclasses.replace(one, schedule="interleaved_1f1b", virtual_stages=2)
    assert sum(in_flight(several, 0).values()) == 11  # 4 of the first chunk's round, 6 to warm up, 1


@pytest.mark.parametrize(("schedule", "chunks"), [("afab", 1), ("1f1b", 1), ("interleaved_1f1b", 2)])
def test_schedules_run_everything_once_and_have_the_known_bubble(schedule: str, chunks: int) -> None:
    pp, count = 4, 8
    actions = [action for rank in range(pp) for action in order(schedule, pp, chunks, count, rank)]
    assert len(actions) == len(set(actions)) == 2 * pp * chunks * count
    spans = simulate(schedule, pp, chunks, count, [1.0] * pp * chunks, [2.0] * pp * chunks)
    assert bubble_of(spans, pp) == pytest.approx((pp - 1) / chunks / (count + (pp - 1) / chunks), abs=0.02)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_orders_are_those_of_torch(schedule: str) -> None:
    """What a rank holds in flight by our count is what its order makes it hold."""
    chunks = 2 if schedule == "interleaved_1f1b" else 1
    one = Choice(layout=ParallelLayout(pp=4, dp=1), microbatch=1, num_microbatches=8, schedule=schedule, virtual_stages=chunks)
    for rank in range(4):
        held = most = 0
        for action in order(schedule, 4, chunks, 8, rank):
            held += 1 if action.kind == "F" else -1
            most = max(most, held)
        assert most == sum(in_flight(one, rank).values())


def test_every_figure_belongs_to_one_half() -> None:
    names = [(figure.table, figure.name) for figure in (*CALIBRATE, *TEST)]
    assert len(names) == len(set(names))
    assert abs(len(CALIBRATE) - len(TEST)) <= 2


def measured(strategy: dict[str, Any], batch: int) -> int:
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    from plan import fit  # type: ignore[import-not-found]

    peak: int = fit(LLAMA, strategy, batch, 1, "32-true", 64)[0]
    return peak


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", [{"zero_stage": 1}, {"pp": 2, "microbatches": 4}], ids=["dp", "pp"])
def test_memory_is_that_of_a_run(pool: RankPool, model: ModelSpec, traces: Tracer, strategy: dict[str, Any]) -> None:
    batch, count = 8, strategy.get("microbatches", 1)
    real = max(pool.run(measured, 2, strategy, batch, timeout_s=250))
    axes = {key: value for key, value in strategy.items() if key != "microbatches"}
    layout = ParallelLayout(**axes).resolve(2)
    choice = Choice(layout=layout, microbatch=batch // count, num_microbatches=count)
    one = job(devices=2, batch=batch * layout.dp_size, optimizer_copies=0.0)
    assert fullest(model, traces(choice), choice, one).total == pytest.approx(real, rel=0.1)


def test_every_rank_can_be_asked(model: ModelSpec, traces: Tracer) -> None:
    one = job()
    choice = choice_of(one, pp=4, microbatch=2)
    ranks = all_ranks(model, traces(choice), choice, one)
    assert [memory.rank for memory in ranks] == [0, 1, 2, 3]
    assert ranks[0].activations > ranks[1].activations

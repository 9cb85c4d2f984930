"""When each pipeline stage did what: spans of time, how much of it was idle, and how much would be in theory."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean
from typing import Any, NamedTuple

FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = "forward", "backward", "backward-input", "backward-weight"
OPTIMIZER = "optimizer"
_LETTERS = {FORWARD: "F", BACKWARD: "B", BACKWARD_INPUT: "I", BACKWARD_WEIGHT: "W"}


class Span(NamedTuple):
    """What one rank did for a while.

    Args:
        run: which pass through the schedule, the same on all ranks. step: the optimizer step that it belongs to.
        rank: the pipeline rank. stage, microbatch: -1 for the optimizer.
        action: one of the constants above. begin, end: in seconds, of a clock that all ranks share.
    """

    run: int
    step: int
    rank: int
    stage: int
    action: str
    microbatch: int
    begin: float
    end: float

    @property
    def name(self) -> str:
        return self.action if self.microbatch < 0 else f"{_LETTERS[self.action]}{self.microbatch}"


def runs_of(spans: Iterable[Span]) -> list[list[Span]]:
    """Return what stages did in each pass through the schedule, by time. The optimizer is no part of it."""
    runs: defaultdict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.action != OPTIMIZER:
            runs[span.run].append(span)
    return [sorted(runs[run], key=lambda span: span.begin) for run in sorted(runs)]


def bubble(run: Sequence[Span]) -> float:
    """Return which part of all ranks' time no stage worked in, from the first action of any rank to the last one."""
    begin, end = window(run)
    num_ranks = len({span.rank for span in run})
    return max(0.0, 1.0 - sum(span.end - span.begin for span in run) / (num_ranks * (end - begin)))


def ideal_bubble(run: Sequence[Span]) -> float:
    """Return what `bubble` would be in theory: the same actions in the same order on each rank, and nothing but that.

    All stages are equally fast (each kind of action takes as long as it did on average) and what they send arrives at once.
    For 1F1B and AFAB of m microbatches on p ranks this is (p - 1) / (m + p - 1).
    """
    costs = {action: mean(s.end - s.begin for s in run if s.action == action) for action in {s.action for s in run}}
    queues = {rank: [span for span in run if span.rank == rank] for rank in {span.rank for span in run}}
    clocks, positions = dict.fromkeys(queues, 0.0), dict.fromkeys(queues, 0)
    last_stage = max(span.stage for span in run)
    done: dict[tuple[bool, int, int], float] = {}
    placed: list[Span] = []
    while len(placed) < len(run):
        before = len(placed)
        for rank, queue in queues.items():
            while positions[rank] < len(queue):
                span = queue[positions[rank]]
                ready = _arrival(span, last_stage, done)
                if ready is None:
                    break
                begin = max(clocks[rank], ready)
                clocks[rank] = end = begin + costs[span.action]
                if span.action != BACKWARD_WEIGHT:
                    done[span.action == FORWARD, span.stage, span.microbatch] = end
                placed.append(span._replace(begin=begin, end=end))
                positions[rank] += 1
        assert len(placed) > before, "the schedule waits for itself"
    return bubble(placed)


def _arrival(span: Span, last_stage: int, done: dict[tuple[bool, int, int], float]) -> float | None:
    """Return when what an action needs from another stage is there; ``None``: not yet."""
    if span.action == BACKWARD_WEIGHT:
        return 0.0
    is_forward = span.action == FORWARD
    source = span.stage - 1 if is_forward else span.stage + 1
    return 0.0 if source in (-1, last_stage + 1) else done.get((is_forward, source, span.microbatch))


def window(spans: Sequence[Span]) -> tuple[float, float]:
    """Return when the first of some spans begins and the last one ends."""
    return min(span.begin for span in spans), max(span.end for span in spans)


def waits(run: Sequence[Span]) -> Iterator[tuple[int, float, float]]:
    """Yield ``(rank, begin, end)`` where a rank stood still in one pass through the schedule."""
    begin, end = window(run)
    for rank in sorted({span.rank for span in run}):
        own = [span for span in run if span.rank == rank]
        times = [begin, *itertools.chain.from_iterable((span.begin, span.end) for span in own), end]
        for idle_from, idle_to in zip(times[::2], times[1::2], strict=True):
            if idle_to > idle_from:
                yield rank, idle_from, idle_to


def chrome_trace(pipelines: Sequence[tuple[str, Sequence[str], Sequence[Span]]]) -> dict[str, Any]:
    """Return spans as a trace that Perfetto and chrome://tracing open.

    Args:
        pipelines: of each its name, what its ranks are called, and its spans.
    """
    origin = min(span.begin for _, _, spans in pipelines for span in spans)
    events: list[dict[str, Any]] = []
    for process, (name, ranks, spans) in enumerate(pipelines):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for thread, rank in enumerate(ranks):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": rank}})
        for span in spans:
            event = _event(process, span.rank, span.name, span.action, span.begin - origin, span.end - origin)
            event["args"] = {"step": span.step, "stage": span.stage, "microbatch": span.microbatch}
            events.append(event)
        for run in runs_of(spans):
            events += [_event(process, rank, "wait", "wait", b - origin, e - origin) for rank, b, e in waits(run)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(process: int, thread: int, name: str, category: str, begin: float, end: float) -> dict[str, Any]:
    times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
    return {"ph": "X", "name": name, "cat": category, "pid": process, "tid": thread, **times}

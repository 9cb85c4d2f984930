"""What each pipeline rank does when: the orders of torch's schedules, and the clock that follows from how long everything
takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kenotron.parallel import pipeline


class Action(NamedTuple):
    """A forward or backward pass of one microbatch through one stage."""

    kind: str  #: "F" or "B"
    stage: int
    microbatch: int


class Span(NamedTuple):
    """An action of one rank, and when it ran, in seconds."""

    rank: int
    action: Action
    start: float
    end: float


def order(schedule: str, pp: int, virtual_stages: int, microbatches: int, rank: int) -> list[Action]:
    """Return the actions of one rank in their order (those that split the backward pass: as if they did not)."""
    local = pipeline.local_stages(schedule, pp, virtual_stages, rank)
    m, v = microbatches, len(local)
    if schedule == "afab":
        return [Action("F", local[0], i) for i in range(m)] + [Action("B", local[0], i) for i in range(m)]
    if v == 1:
        ahead, per_round = min(m, pp - 1 - rank), m
    else:
        per_round = m // max(1, m // pp)
        ahead = min(m * v, (v - 1) * per_round + 2 * (pp - 1 - rank))

    def action(kind: str, index: int) -> Action:
        chunk, microbatch = (index // per_round) % v, index // (per_round * v) * per_round + index % per_round
        return Action(kind, local[chunk if kind == "F" else v - 1 - chunk], microbatch)

    found = [action("F", index) for index in range(ahead)]
    for index in range(m * v):
        if index + ahead < m * v:
            found.append(action("F", index + ahead))
        found.append(action("B", index))
    return found


def simulate(
    schedule: str, pp: int, virtual_stages: int, microbatches: int, forward: Sequence[float], backward: Sequence[float],
    transfer: float = 0.0,
) -> list[Span]:  # fmt: skip
    """Return when every action runs.

    Args:
        forward, backward: seconds of each stage. transfer: seconds from one rank to the next.
    """
    orders = [order(schedule, pp, virtual_stages, microbatches, rank) for rank in range(pp)]
    ends: dict[Action, float] = {}
    free, at, spans = [0.0] * pp, [0] * pp, []
    last = pp * virtual_stages - 1
    waiting = list(range(pp))
    while waiting:
        moved = False
        for rank in list(waiting):
            while at[rank] < len(orders[rank]):
                kind, stage, index = action = orders[rank][at[rank]]
                if kind == "F":
                    needs = Action("F", stage - 1, index) if stage else None
                else:
                    needs = Action("B", stage + 1, index) if stage < last else Action("F", stage, index)
                if needs is not None and needs not in ends:
                    break
                ready = ends[needs] + (transfer if needs.stage != stage else 0.0) if needs is not None else 0.0
                start = max(free[rank], ready)
                free[rank] = ends[action] = start + (forward if kind == "F" else backward)[stage]
                spans.append(Span(rank, action, start, free[rank]))
                at[rank], moved = at[rank] + 1, True
            if at[rank] == len(orders[rank]):
                waiting.remove(rank)
        assert moved or not waiting, "the schedule waits for itself"
    return spans

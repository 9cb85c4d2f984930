"""The schedule of a run's data: from which optimizer step on which corpora, sequence length and batch size.

Steps turn into samples once, here: a run is a list of segments, and everything else is a function of the global sample index.
What has been trained is history: a resumed run keeps the segments that it has behind it as they were saved, and may plan
what comes after them anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kenotron.data.windows import check_sequence_length


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What changes at a step. What is ``None`` stays as it was before.

    Args:
        start_step: the optimizer step (counted from 0) that is the first of the stage.
        corpora: weight of each corpus, of any scale; a corpus that is not named is not used.
        sequence_length: positions of a sample. A corpus that comes back at a length that it had before goes on where it was
            then; at a new one a pass over it begins, since other windows can't go on between those that were trained.
        global_batch_size: samples of an optimizer step, over all ranks and accumulated batches.

    Raises:
        ValueError: a number out of range, or a weight.
    """

    start_step: int
    corpora: Mapping[str, float] | None = None
    sequence_length: int | None = None
    global_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.start_step < 0:
            raise ValueError(f"start_step={self.start_step}: set the step that a stage begins with, 0 or more.")
        if self.sequence_length is not None:
            check_sequence_length(self.sequence_length)
        if self.global_batch_size is not None and self.global_batch_size < 1:
            raise ValueError(f"global_batch_size={self.global_batch_size}: set it to 1 or more.")
        if self.corpora is not None:
            used = {name: weight for name, weight in self.corpora.items() if weight}
            if not used or not all(0 < weight < math.inf for weight in used.values()):
                raise ValueError(
                    f"corpora={dict(self.corpora)} of the stage from step {self.start_step} on: give each corpus a weight of 0 "
                    "or more, and one more than 0."
                )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a run in which nothing changes.

    Args:
        start_step, start_sample: where it begins. batch: samples of a step.
        mix_start: the sample where the mix (weights and sequence length) began; before this segment if only the batch changed.
        sequence_length: of its samples. weights: of its corpora, without those of weight 0.
    """

    start_step: int
    start_sample: int
    batch: int
    mix_start: int
    sequence_length: int
    weights: Mapping[str, float]

    @property
    def mix(self) -> tuple[int, dict[str, float]]:
        """What samples are made of."""
        return self.sequence_length, dict(self.weights)

    def step_of(self, sample: int) -> int:
        """Return the first step, of this segment's, that has none of the samples before ``sample``."""
        return self.start_step + -(-(sample - self.start_sample) // self.batch)


def plan(stages: Sequence[Stage]) -> tuple[Segment, ...]:
    """Return the segments of a run that begins with the first stage, in which nothing is ``None``.

    Raises:
        ValueError: the first stage does not begin at step 0, or two at the same step.
    """
    ordered = sorted(stages, key=lambda stage: stage.start_step)
    steps = [stage.start_step for stage in ordered]
    if steps[0] != 0 or len(set(steps)) < len(steps):
        raise ValueError(f"stages begin at steps {steps}: each needs a step of its own, after 0, where the run begins.")
    first = ordered[0]
    assert first.corpora is not None and first.sequence_length is not None and first.global_batch_size is not None
    segments = [_segment(first.corpora, first.sequence_length, first.global_batch_size)]
    for stage in ordered[1:]:
        segments.append(_next(segments[-1], stage))
    return tuple(segments)


def _segment(corpora: Mapping[str, float], sequence_length: int, batch: int) -> Segment:
    weights = {name: weight for name, weight in corpora.items() if weight}
    return Segment(start_step=0, start_sample=0, batch=batch, mix_start=0, sequence_length=sequence_length, weights=weights)


def _next(last: Segment, stage: Stage) -> Segment:
    start_sample = last.start_sample + (stage.start_step - last.start_step) * last.batch
    new = _segment(
        last.weights if stage.corpora is None else stage.corpora,
        stage.sequence_length or last.sequence_length,
        stage.global_batch_size or last.batch,
    )
    mix_start = last.mix_start if new.mix == last.mix else start_sample
    return dataclasses.replace(new, start_step=stage.start_step, start_sample=start_sample, mix_start=mix_start)


def at_sample(segments: Sequence[Segment], sample: int) -> int:
    """Return which segment a sample belongs to, by its place in the list."""
    return max(i for i, segment in enumerate(segments) if segment.start_sample <= sample)


def history(segments: Sequence[Segment], sample: int) -> tuple[Segment, ...]:
    """Return the segments of which something comes before ``sample``; at least the first."""
    return tuple(segment for i, segment in enumerate(segments) if i == 0 or segment.start_sample < sample)


def to_state(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Return segments as plain values."""
    return [{**dataclasses.asdict(segment), "weights": dict(segment.weights)} for segment in segments]


def from_state(state: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
    """Return the segments that ``to_state`` was given."""
    return tuple(Segment(**segment) for segment in state)


def resume(past: Sequence[Segment], planned: Sequence[Segment], sample: int) -> tuple[Segment, ...]:
    """Return the segments of a run that goes on at ``sample``: those of the past, and what is planned from there on.

    Another batch size than before takes effect at ``sample``; the samples and their order do not depend on it.

    Raises:
        ValueError: the plan has other corpora, weights or another sequence length for a step that was trained already.
    """
    if not sample:
        return tuple(planned)
    last = past[-1]
    now = last.step_of(sample)
    for segment, following in zip(past, [*past[1:], None], strict=True):
        end = now if following is None else following.start_step
        for other in planned:
            step = max(segment.start_step, other.start_step)
            until = next((s.start_step for s in planned if s.start_step > other.start_step), math.inf)
            if step < min(end, until) and segment.mix != other.mix:
                raise ValueError(
                    f"the checkpoint was trained with {_told(segment)} at step {step}, and the data module says "
                    f"{_told(other)}. The past can't be changed: set what it was, and add a Stage with start_step={now} or "
                    "more."
                )
    in_force = max(i for i, segment in enumerate(planned) if segment.start_step < now)
    segments = [*past]
    if planned[in_force].batch != last.batch:
        segments.append(dataclasses.replace(last, start_step=now, start_sample=sample, batch=planned[in_force].batch))
    return _followed_by(segments, planned[in_force + 1 :])


def _followed_by(segments: Sequence[Segment], planned: Sequence[Segment]) -> tuple[Segment, ...]:
    """Return segments with others after them, from whose steps on these begin; without those that end where they begin."""
    found = [*segments]
    for segment in planned:
        stage = Stage(
            start_step=segment.start_step,
            corpora=segment.weights,
            sequence_length=segment.sequence_length,
            global_batch_size=segment.batch,
        )
        found.append(_next(found[-1], stage))
    ends = [*(segment.start_sample for segment in found[1:]), math.inf]
    return tuple(segment for segment, end in zip(found, ends, strict=True) if segment.start_sample < end)


def _told(segment: Segment) -> str:
    return f"corpora {dict(segment.weights)} and sequence_length={segment.sequence_length}"


def after_batches(segments: Sequence[Segment], sample: int, num_batches: int, accumulate: int) -> int:
    """Return the sample that follows ``num_batches`` batches which begin at ``sample``.

    Args:
        accumulate: batches of an optimizer step.
    """
    while num_batches:
        index = at_sample(segments, sample)
        size = segments[index].batch // accumulate
        following = segments[index + 1].start_sample if index + 1 < len(segments) else math.inf
        in_segment = num_batches if following == math.inf else min(num_batches, -(-int(following - sample) // size))
        sample, num_batches = sample + in_segment * size, num_batches - in_segment
    return sample


def check_division(segments: Sequence[Segment], sample: int, num_ranks: int, accumulate: int) -> None:
    """Raise ``ValueError`` where a step's samples, from ``sample`` on, can't be divided over ranks and accumulated batches."""
    for segment in segments[at_sample(segments, sample) :]:
        if segment.batch % (num_ranks * accumulate):
            raise ValueError(
                f"global_batch_size={segment.batch} (from step {segment.start_step} on) can't be divided over {num_ranks} "
                f"data-parallel ranks × {accumulate} accumulated batches. Set it to a multiple of {num_ranks * accumulate}."
            )


def align(segments: Sequence[Segment], sample: int, accumulate: int) -> tuple[Segment, ...]:
    """Return segments whose batches begin at ``sample``: a new one begins there if those of its segment do not.

    That happens where a checkpoint lies between the batches of one step, and steps have another number of batches now.
    """
    index = at_sample(segments, sample)
    current = segments[index]
    if (sample - current.start_sample) % (current.batch // accumulate) == 0:
        return tuple(segments)
    cut = dataclasses.replace(current, start_step=current.step_of(sample), start_sample=sample)
    return _followed_by([*segments[: index + 1], cut], segments[index + 1 :])

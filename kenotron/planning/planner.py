"""Search: every choice that could run, its memory and its time; the best, and why the others fail."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kenotron.parallel.recompute import Recompute
from kenotron.planning.layouts import Choice, Job, choices
from kenotron.planning.memory import Memory, fullest, shortage, size
from kenotron.planning.model import ModelSpec
from kenotron.planning.time import FITTED, Clock, Rates, Software, Time
from kenotron.planning.trace import Cut, Trace, trace


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A choice, the memory of its fullest rank, and the time of its step."""

    choice: Choice
    memory: Memory
    time: Time


@dataclass(kw_only=True)
class Plan:
    """What a search found.

    Args:
        best: the fastest choices that fit, the best first. num_fitting: how many do.
        left_out: reason -> how many were never looked at for it. refused: what the model itself can't have, in its words.
        too_large: how many lack memory. nearest_miss: of them, the one that lacks least, with what its time would be.
        traces: of the model, by what they depend on.
    """

    model: ModelSpec
    job: Job
    best: list[Planned] = field(default_factory=list)
    num_fitting: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    nearest_miss: Planned | None = None
    smallest: Planned | None = None
    traces: Tracer | None = None


class Tracer:
    """Traces of one model, each made once.

    Args:
        model: what is traced. job: its sequences and precision. tell: called with a line before each trace, which takes long.
    """

    def __init__(self, model: ModelSpec, job: Job, tell: Callable[[str], None] | None = None) -> None:
        self._model, self._job, self._tell = model, job, tell
        self._found: dict[Cut, Trace | ValueError] = {}

    def __call__(self, choice: Choice) -> Trace:
        """Return the trace that a choice depends on.

        Raises:
            ValueError: the model can't be cut so.
        """
        layout = choice.layout
        plain = dataclasses.replace(choice.recompute, every=1, budget=None, offload=False)
        return self.of(
            Cut(
                tp=layout.tp, ep=layout.ep, sequence_parallel=choice.sequence_parallel, recompute=plain,
                precision=self._job.precision, seq=self._job.seq,
            )
        )  # fmt: skip

    def of(self, cut: Cut) -> Trace:
        """Return the trace of one cut."""
        if cut not in self._found:
            if self._tell is not None:
                sharing = f", sequence parallel {'on' if cut.sequence_parallel else 'off'}, recompute {cut.recompute.mode}"
                self._tell(f"tracing the model with tp {cut.tp}, ep {cut.ep}{sharing}: number {len(self._found) + 1}")
            try:
                self._found[cut] = trace(self._model, cut)
            except ValueError as error:
                self._found[cut] = error
        found = self._found[cut]
        if isinstance(found, ValueError):
            raise found
        return found

    @property
    def base(self) -> Trace:
        """The whole model on one rank, with nothing computed again."""
        return self.of(Cut(precision=self._job.precision, seq=self._job.seq))


def plan(
    model: ModelSpec, job: Job, *, top: int = 10, rates: Rates = FITTED, software: Software | None = None,
    traces: Tracer | None = None,
) -> Plan:  # fmt: skip
    """Search the layouts of ``model`` for ``job``.

    Args:
        top: how many to return, of each layout the best way to run it. rates, software: of the time model.
        traces: made before, of the same model, sequences and precision.
    """
    traces = traces or Tracer(model, job)
    found = Plan(model=model, job=job, traces=traces)
    clock = Clock(model, job, rates, traces.base, software)
    fitting: list[Planned] = []
    for planned in _evaluate(found, traces, clock):
        missing = shortage(planned.memory, job)
        if found.smallest is None or planned.memory.total < found.smallest.memory.total:
            found.smallest = planned
        if missing <= 0:
            fitting.append(planned)
            continue
        found.too_large += 1
        if found.nearest_miss is None or missing < shortage(found.nearest_miss.memory, job):
            found.nearest_miss = planned
    found.num_fitting = len(fitting)
    # Of two that are equally fast the one that needs less memory.
    fitting.sort(key=lambda planned: (round(planned.time.step, 4), planned.memory.total))
    found.best = fitting[:top]
    return found


def _evaluate(found: Plan, traces: Tracer, clock: Clock) -> Iterator[Planned]:
    for choice in choices(found.model, found.job, found.left_out):
        try:
            made = traces(choice)
        except ValueError as error:
            found.refused[str(error)] += 1
            continue
        yield Planned(choice=choice, memory=fullest(found.model, made, choice, found.job), time=clock.step(made, choice))


def evaluate(model: ModelSpec, job: Job, choice: Choice, traces: Tracer | None = None) -> Planned:
    """Return memory and time of one choice, whether it fits or not."""
    traces = traces or Tracer(model, job)
    made = traces(choice)
    clock = Clock(model, job, FITTED, traces.base)
    return Planned(choice=choice, memory=fullest(model, made, choice, job), time=clock.step(made, choice))


def check(model: ModelSpec, job: Job, choice: Choice, traces: Tracer | None = None) -> Planned:
    """Return memory and time of one choice.

    Raises:
        ValueError: it does not fit; the text says which rank, how much is missing, and the nearest choice that does.
    """
    traces = traces or Tracer(model, job)
    planned = evaluate(model, job, choice, traces)
    if shortage(planned.memory, job) > 0:
        raise ValueError(explain(planned, job, nearest(model, job, choice, traces)))
    return planned


def explain(planned: Planned, job: Job, instead: Planned | None) -> str:
    """Say which rank lacks how much memory, at which moment, and what would fit."""
    memory = planned.memory
    parts = ("parameters", "gradients", "optimizer", "activations", "work", "communication")
    most = sorted(parts, key=lambda part: -getattr(memory, part))[:3]
    told = ", ".join(f"{part} {size(getattr(memory, part))}" for part in most)
    text = (
        f"{planned.choice} does not fit: rank {memory.rank} takes {size(memory.total)} at the {memory.moment} ({told}), and "
        f"{size(job.usable)} of a {job.device.name} are for tensors: {size(shortage(memory, job))} are missing."
    )
    if instead is None:
        return text + f" No layout of {job.devices} devices fits: take more of them, or a device with more memory."
    return text + f" The nearest that fits: {instead.choice}, with {size(instead.memory.total)}."


def nearest(model: ModelSpec, job: Job, choice: Choice, traces: Tracer | None = None) -> Planned | None:
    """Return the choice that fits and differs in fewest settings from ``choice``; of several the fastest."""
    free = dataclasses.replace(job, fixed={})
    found = plan(model, free, top=1_000_000, traces=traces)
    return min(found.best, key=lambda planned: (distance(planned.choice, choice), planned.time.step), default=None)


def distance(a: Choice, b: Choice) -> float:
    """Return how far apart two choices are: settings that differ, those that change what a rank does most counting most."""
    axes = sum(getattr(a.layout, name) != getattr(b.layout, name) for name in ("tp", "pp", "cp", "ep"))
    others = (a.layout.zero_stage != b.layout.zero_stage) + (a.recompute.mode != b.recompute.mode)
    finer = (a.microbatch != b.microbatch) + (a.layout.dp_replicate != b.layout.dp_replicate)
    return 3 * axes + others + 0.5 * finer + 0.5 * (a.schedule != b.schedule)


def choice_of(job: Job, **settings: object) -> Choice:
    """Return the one choice that settings of the strategy make, with microbatches as they are given or one sample each.

    Args:
        settings: as ``Job.fixed`` has them.
    """
    from kenotron.layout import ParallelLayout

    axes = {k: settings[k] for k in ("tp", "pp", "cp", "ep", "dp", "dp_replicate", "zero_stage") if k in settings}
    layout = ParallelLayout(**axes).resolve(job.devices)  # type: ignore[arg-type]
    samples = max(1, job.batch // layout.dp_size)
    microbatch = int(settings.get("microbatch", 1))  # type: ignore[call-overload]
    several = settings.get("schedule") == "interleaved_1f1b"
    return Choice(
        layout=layout,
        microbatch=microbatch,
        num_microbatches=max(1, samples // microbatch),
        schedule=str(settings.get("schedule", "1f1b")),
        virtual_stages=int(settings.get("virtual_stages", 2 if several else 1)),  # type: ignore[call-overload]
        sequence_parallel=bool(settings.get("sequence_parallel", False)),
        recompute=Recompute.of(settings.get("recompute", "none")),  # type: ignore[arg-type]
    )

"""Memory of every rank of a choice, and which one is the fullest.

What lives is followed through a step, at the moments where it can be most:

- the forward pass of each part, while what former parts kept is there (and the gradients of the last update: Lightning frees
  them before the backward pass);
- the backward pass of each part: gradients are made, gathered parameters are freed, gradients travel;
- the update.

Under ZeRO 0 to 2 parameters are whole. Gradients are whole under ZeRO 0; under ZeRO 1 until the last backward pass, of which
parts are left for the update alone; under ZeRO 2 parts of all microbatches add up, in float32 at least. (Where hooks look at
gradients they are whole, and this says too little.) Under ZeRO 3 one block's parameters are whole, and the next one's on their
way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kenotron.parallel import pipeline
from kenotron.parallel.buckets import BUCKET_BYTES
from kenotron.planning.layouts import Choice, Job
from kenotron.planning.model import ModelSpec
from kenotron.planning.trace import Part, Trace


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at the moment when most is taken.

    Args:
        rank: the first one of its pipeline stage. moment: what happens then.
        parameters, gradients, optimizer: what stays, with gathered parameters. activations: kept for the backward pass.
        work: what comes and goes in the part that runs. communication: buckets and buffers of what travels.
    """

    rank: int
    moment: str
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    work: float
    communication: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.work + self.communication


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The parts that one pipeline rank runs, in their order, with the stage (of all ranks) that each belongs to."""

    parts: tuple[Part, ...]
    names: tuple[str, ...]
    stage: tuple[int, ...]


def _edges(where: Stage) -> set[int]:
    """Return the first and the last part of each kind: in between everything grows or shrinks evenly."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, part in enumerate(where.parts):
        first.setdefault(id(part), at)
        last[id(part)] = at
    return {*first.values(), *last.values()}


def fullest(model: ModelSpec, trace: Trace, choice: Choice, job: Job) -> Memory:
    """Return the memory of the fullest rank: that with most microbatches in flight, that with the head, or one next to them."""
    pp = choice.layout.pp
    some = sorted({0, min(1, pp - 1), max(0, pp - 2), pp - 1})
    return max(all_ranks(model, trace, choice, job, some), key=lambda memory: memory.total)


def all_ranks(model: ModelSpec, trace: Trace, choice: Choice, job: Job, pp_ranks: Sequence[int] | None = None) -> list[Memory]:
    """Return the memory of one rank of each pipeline position (those in ``pp_ranks``)."""
    ranks = []
    for pp_rank in pp_ranks if pp_ranks is not None else range(choice.layout.pp):
        found = _Rank(model, trace, choice, job, pp_rank)
        ranks.append(max(found.moments(), key=lambda memory: memory.total))
    return ranks


def parts_of(model: ModelSpec, trace: Trace, choice: Choice, pp_rank: int) -> Stage:
    """Return the parts of one pipeline rank."""
    owner = model.stage_of_blocks(choice.num_stages)
    rows: list[tuple[Part, str, int]] = []
    for stage in pipeline.local_stages(choice.schedule, choice.layout.pp, choice.virtual_stages, pp_rank):
        if stage == 0:
            rows.append((trace.before, "before", stage))
        for index, kind in enumerate(model.kinds):
            if owner[index] == stage:
                rows.append((trace.kinds[kind], f"block {index}", stage))
        if stage == choice.num_stages - 1:
            rows.append((trace.after, "after", stage))
    parts, names, where = zip(*rows, strict=True)
    return Stage(parts=parts, names=names, stage=where)


def in_flight(choice: Choice, pp_rank: int) -> dict[int, int]:
    """Return how many microbatches each of a rank's stages holds at most at once, between forward and backward."""
    pp, m, v = choice.layout.pp, choice.num_microbatches, choice.virtual_stages
    local = pipeline.local_stages(choice.schedule, pp, v, pp_rank)
    if choice.schedule == "afab":
        return dict.fromkeys(local, m)
    if len(local) == 1:
        return {local[0]: min(m, pp - pp_rank)}
    # torch's interleaved schedule: so many forwards of chunks before the first backward, microbatches in rounds.
    rounds = max(1, m // pp)
    per_round = m // rounds
    ahead = min(m * v, (v - 1) * per_round + 2 * (pp - 1 - pp_rank) + 1)
    found = dict.fromkeys(local, 0)
    for index in range(ahead):
        found[local[(index // per_round) % v]] += 1
    return found


class _Rank:
    """What one rank holds, and the moments of its step."""

    def __init__(self, model: ModelSpec, trace: Trace, choice: Choice, job: Job, pp_rank: int) -> None:
        self.choice, self.job, self.trace = choice, job, trace
        self.where = parts_of(model, trace, choice, pp_rank)
        self._edges = _edges(self.where)
        self.pp_rank = pp_rank
        layout, width = choice.layout, trace.param_bytes
        self.rank = layout.rank_at(pp_rank, 0, 0, 0, 0)
        is_last_alone = model.is_tied and layout.pp > 1 and "after" in self.where.names and "before" not in self.where.names
        copy = trace.before.elements if is_last_alone else 0
        self.dense = sum(part.elements for part in self.where.parts) + copy
        self.experts = sum(part.expert_elements for part in self.where.parts)
        self.whole = (self.dense + self.experts) * width
        shards, spread = (choice.shards, choice.shards // layout.ep) if choice.is_sharded else (1, 1)
        self.shard = (self.dense / shards + self.experts / spread) * width
        spread = max(1, choice.state_shards // layout.ep)
        self.updated = (self.dense / choice.state_shards + self.experts / spread) * width
        self.optimizer = self.updated * job.optimizer_states
        # Each part is gathered on its own; those around the blocks together, for as long as the step lasts.
        self.sizes = [(part.elements + part.expert_elements) * width for part in self.where.parts]
        self.root = copy * width + sum(
            size for size, name in zip(self.sizes, self.where.names, strict=True) if not name.startswith("block")
        )
        self.largest_block = max(
            (s for s, n in zip(self.sizes, self.where.names, strict=True) if n.startswith("block")), default=0
        )
        self.accumulates = choice.num_microbatches > 1
        # Parts of gradients, while microbatches add up.
        self.parts = self.updated * max(width, 4) / width

    def moments(self) -> list[Memory]:
        found = [self._update()]
        if self.choice.layout.pp > 1:
            return found + self._pipeline()
        return found + self._plain()

    def _memory(self, moment: str, *, gathered: float, gradients: float, kept: float, work: float, buffers: float) -> Memory:
        return Memory(
            rank=self.rank, moment=moment, parameters=self.shard + gathered + self.trace.buffer_bytes, gradients=gradients,
            optimizer=self.optimizer, activations=kept, work=work, communication=buffers,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ without pipeline

    def _plain(self) -> list[Memory]:
        x, found, kept = self.choice.samples, [], 0.0
        old = self._old_gradients()
        names = self.where.names
        for at, part in enumerate(self.where.parts):
            if at in self._edges:
                gathered, buffers = self._gathered(at, forward=True)
                work, label = part.in_forward.at(x), f"forward of {names[at]}"
                found.append(self._memory(label, gathered=gathered, gradients=old, kept=kept, work=work, buffers=buffers))
            kept += part.kept.at(x) + part.cast.at(x)
        kept -= sum(part.cast.at(x) for part in self.where.parts)
        done = 0.0  # bytes of gradients of parts that are done
        for at, part in reversed(list(enumerate(self.where.parts))):
            if at in self._edges:
                gathered, buffers = self._gathered(at, forward=False)
                work = (part.in_backward if self._adds() else part.first_backward).at(x)
                gradients, travelling = self._gradients(at, done)
                buffers, label = buffers + travelling, f"backward of {names[at]}"
                found.append(self._memory(label, gathered=gathered, gradients=gradients, kept=kept, work=work, buffers=buffers))
            kept -= part.kept.at(x)
            done += self.sizes[at]
        return found

    def _adds(self) -> bool:
        """Whether a gradient is added to one that is there already, whole."""
        return self.accumulates and not self.choice.is_sharded and not self._sums_parts

    @property
    def _sums_parts(self) -> bool:
        return self.choice.keeps_parts and self.choice.layout.zero_stage == 2

    def _old_gradients(self) -> float:
        """Gradients during the forward pass: those of the last update, or of the microbatches before."""
        if self.choice.is_sharded:
            return self.shard
        if self.choice.keeps_parts and (self._sums_parts or not self.accumulates):
            return self.parts if self.accumulates else 0.0  # parts are gone with the update
        return self.whole

    def _gathered(self, at: int, *, forward: bool) -> tuple[float, float]:
        """Return bytes of whole parameters beside the shards, and of what is being gathered."""
        if not self.choice.is_sharded:
            return 0.0, 0.0
        blocks = [size if n.startswith("block") else 0.0 for size, n in zip(self.sizes, self.where.names, strict=True)]
        following = blocks[at + 1 : at + 2] if forward else blocks[max(0, at - 1) : at]
        return self.root + blocks[at], sum(following) or blocks[at]

    def _gradients(self, at: int, done: float) -> tuple[float, float]:
        """Return bytes of finished gradients, and of those which travel, during the backward pass of one part."""
        size, name = self.sizes[at], self.where.names[at]
        if self._sums_parts and self.accumulates:
            return self.parts, self._buckets(done)
        if self.choice.keeps_parts and not self.accumulates:
            return done * self.updated / self.whole, self._buckets(done)
        if not self.choice.is_sharded:
            return (self.whole if self._adds() else done), self._buckets()
        if not name.startswith("block"):
            return self.shard, 0.0 if name == "after" else self.root
        # Its own on their way, and those of the block before until they have arrived; what surrounds blocks goes last.
        before = self.where.names[at + 1] if at + 1 < len(self.where.names) else "after"
        return self.shard, size + (min(done, size) if before.startswith("block") else 0.0)

    def _buckets(self, done: float | None = None) -> float:
        """Bytes of gradients that are there twice: two buckets, of replicas that average.

        Args:
            done: bytes of gradients that are made, where parts are kept: a bucket that fills, and two on their way, whose sums
                arrive (all that they are made of, without NCCL).
        """
        if self.choice.is_sharded or self.choice.replicas == 1:
            return 0.0
        if done is None or not self.choice.keeps_parts:
            return min(self.whole, 2.0 * BUCKET_BYTES)
        arrives = 1 + (self.choice.shards - 1 if self.job.device.name == "cpu" else 1) / self.choice.shards
        filling = min(done, BUCKET_BYTES)
        return filling + min(max(done - filling, 0.0), 2 * BUCKET_BYTES) * arrives

    def _update(self) -> Memory:
        job = self.job
        copies = job.optimizer_copies if job.optimizer_copies is not None else (0.0 if job.device.name == "cpu" else 1.0)
        shards = self.choice.state_shards
        largest = max((part.largest for part in self.where.parts), default=0) * self.trace.param_bytes / shards
        work = max(copies * self.updated, 2 * largest if job.optimizer_copies is None else 0.0)
        gradients = self.shard if self.choice.is_sharded else self.updated if self.choice.keeps_parts else self.whole
        gathered = 0.0
        if self.choice.keeps_parts:  # afterwards, two buckets at a time
            gathered = min(self.whole, 2 * BUCKET_BYTES) * (1 + 1 / shards)
        buffers = self._received()
        return self._memory("update", gathered=0.0, gradients=gradients, kept=0.0, work=max(work, gathered), buffers=buffers)

    # --------------------------------------------------------------------------------------------------- with pipeline

    def _received(self) -> float:
        """Bytes of the buffers that receive hidden states and their gradients, one for each microbatch."""
        if self.choice.layout.pp == 1:
            return 0.0
        boundary = self.trace.kinds[0].output.at(self.choice.samples)
        if self.choice.sequence_parallel:  # what travels is whole
            boundary *= self.choice.layout.tp
        total = 0.0
        for stage in dict.fromkeys(self.where.stage):
            sides = (stage > 0) + (stage < self.choice.num_stages - 1)
            neighbours_elsewhere = self.choice.layout.pp > 1
            total += sides * boundary * self.choice.num_microbatches * neighbours_elsewhere
        return total

    def _pipeline(self) -> list[Memory]:
        x, flying, found = self.choice.samples, in_flight(self.choice, self.pp_rank), []
        kept_of: dict[int, float] = {}
        for part, stage in zip(self.where.parts, self.where.stage, strict=True):
            kept_of[stage] = kept_of.get(stage, 0.0) + part.kept.at(x)
        kept = sum(count * kept_of[stage] for stage, count in flying.items())
        received = self._received()
        buckets = self._buckets()
        sharded = self.choice.is_sharded
        gradients = self.shard if sharded else self.parts if self._sums_parts else self.whole
        if self._sums_parts:  # in each microbatch
            buckets = self._buckets(self.whole)
        whole = self.root if sharded else 0.0
        m = self.choice.num_microbatches
        cast: dict[int, float] = dict.fromkeys(kept_of, 0.0)
        last_kept: dict[int, float] = dict.fromkeys(kept_of, 0.0)  # of the microbatch that runs: up to this part
        rows = zip(self.where.parts, self.where.names, self.where.stage, self.sizes, strict=True)
        for at, (part, name, stage, size) in enumerate(rows):
            if at not in self._edges and self.where.stage[min(at + 1, len(self.where.stage) - 1)] == stage:
                last_kept[stage] += part.kept.at(x)
                cast[stage] += part.cast.at(x)
                continue
            is_block = name.startswith("block")
            gathered = whole + (2 * size if sharded and is_block else 0.0)
            # Where all forward passes come first, gradients of the last update are gone and there are none of this one.
            is_first = self.choice.schedule == "afab"
            others = kept - kept_of[stage] + last_kept[stage]
            forward = self._memory(
                f"forward of {name}", gathered=gathered, gradients=0.0 if is_first else gradients, kept=others + cast[stage],
                work=part.in_forward.at(x), buffers=received + buckets,
            )  # fmt: skip
            last_kept[stage] += part.kept.at(x)
            cast[stage] += part.cast.at(x)
            others = kept - kept_of[stage] + last_kept[stage]
            travelling = 2 * size if sharded and is_block else 0.0
            done = sum(self.sizes[at + 1 :]) if is_first else gradients
            backward = self._memory(
                f"backward of {name}", gathered=gathered, gradients=min(done, gradients), kept=others,
                work=(part.first_backward if is_first else part.in_backward).at(x), buffers=received + buckets + travelling,
            )  # fmt: skip
            found += [forward, backward]
            if is_first and m > 1:  # the second microbatch: one less is kept, gradients are there
                fewer = others - kept_of[stage]
                second = dataclasses.replace(backward, gradients=gradients, activations=fewer, work=part.in_backward.at(x))
                found.append(second)
        return found


def size(count: float) -> str:
    """Return bytes as people read them."""
    return f"{count / 1e9:,.1f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.2f} MB"


def shortage(memory: Memory, job: Job) -> float:
    """Return bytes that are missing on the fullest rank; negative: that are left."""
    return memory.total - job.usable


def table(found: Sequence[Memory]) -> str:
    """Return the memory of ranks, a line each."""
    heads = ("parameters", "gradients", "optimizer", "activations", "work", "communication")
    lines = ["rank  " + "".join(f"{head:>15}" for head in heads) + f"{'total GB':>10}  at"]
    for memory in found:
        cells = "".join(f"{getattr(memory, head) / 1e9:>15.2f}" for head in heads)
        lines.append(f"{memory.rank:>4}  {cells}{memory.total / 1e9:>10.2f}  {memory.moment}")
    return "\n".join(lines)

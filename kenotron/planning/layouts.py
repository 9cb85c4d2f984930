"""What can be chosen, and the choices that could run at all: sizes of axes, schedules, microbatches, recompute.

A choice is left out with a reason: what does not divide, what does not go together. What only lacks memory is told by `memory`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kenotron.devices import Device
from kenotron.layout import ParallelLayout, divisors
from kenotron.parallel import pipeline
from kenotron.parallel.recompute import MODES, Recompute
from kenotron.planning.model import ModelSpec
from kenotron.planning.trace import PRECISIONS

#: What is left of a device's memory for tensors: contexts, communicators' buffers and fragments take the rest.
USABLE = 0.92


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained on what.

    Args:
        devices: how many. device: which. seq: tokens of a sample. batch: samples of an update, over all devices.
        precision: Lightning's name. memory: bytes of a device that tensors may take; None: `USABLE` of what it has.
        optimizer_states: numbers that the optimizer keeps for each parameter, of its type (AdamW: 2).
        optimizer_copies: how much of all parameters an update needs for a moment (AdamW: 1 on CUDA, where it takes them all at
            once, 0 if fused); None: what torch does by itself on this device, which on a CPU is one parameter at a time.
        compile: blocks are compiled. fixed: setting -> what it must be; others are searched.

    Raises:
        ValueError: numbers out of range, an unknown precision or setting.
    """

    devices: int
    device: Device
    seq: int
    batch: int
    precision: str = "bf16-mixed"
    memory: float | None = None
    optimizer_states: float = 2.0
    optimizer_copies: float | None = None
    compile: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("devices", "seq", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: set a whole number of 1 or more.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown. Set one of {', '.join(PRECISIONS)}.")
        unknown = sorted(set(self.fixed) - set(SETTINGS))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no settings of the planner, which are {', '.join(SETTINGS)}.")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory={self.memory}: set bytes above 0.")

    @property
    def usable(self) -> float:
        """Bytes of a device for tensors."""
        return self.device.memory * USABLE if self.memory is None else self.memory


#: What `Job.fixed` may hold, as the strategy calls it; ``microbatch`` is samples of one.
SETTINGS = (
    "tp", "pp", "cp", "ep", "dp", "dp_replicate", "zero_stage", "sequence_parallel", "schedule", "virtual_stages", "microbatch",
    "recompute",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run a job.

    Args:
        layout: resolved. microbatch: samples of one dp rank that run at once. num_microbatches: of an update, one after
            another.
        schedule, virtual_stages, sequence_parallel, recompute: as for the strategy.
    """

    layout: ParallelLayout
    microbatch: int
    num_microbatches: int
    schedule: str = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = field(default_factory=Recompute)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards parameters, with their gradients and state."""
        return self.layout.zero_stage == 3 and self.shards > 1

    @property
    def keeps_parts(self) -> bool:
        """Whether parameters are whole, and each rank keeps its part of gradients and state (ZeRO 1 and 2)."""
        return self.layout.zero_stage in (1, 2) and self.shards > 1

    @property
    def state_shards(self) -> int:
        """Over how many ranks optimizer state is sharded."""
        return self.shards if self.layout.zero_stage else 1

    @property
    def shards(self) -> int:
        """Over how many ranks."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are averaged."""
        return self.layout.dp_size * self.layout.cp

    @property
    def samples(self) -> float:
        """Samples of a microbatch on one rank: a part of one under context parallelism."""
        return self.microbatch / self.layout.cp

    @property
    def num_stages(self) -> int:
        return self.layout.pp * self.virtual_stages

    def __str__(self) -> str:
        a = self.layout
        sizes = [f"{name} {size}" for name, size in (("dp", a.dp_size), ("tp", a.tp), ("pp", a.pp), ("cp", a.cp), ("ep", a.ep))]
        words = [text for text in sizes if not text.endswith(" 1")] or ["one device"]
        words.append(f"zero {a.zero_stage}")
        if a.dp_replicate > 1:
            words.append(f"{a.dp_replicate} replicas")
        if self.sequence_parallel:
            words.append("sp")
        if a.pp > 1:
            chunks = f" × {self.virtual_stages}" if self.virtual_stages > 1 else ""
            words.append(self.schedule + chunks)
        return ", ".join([*words, f"{self.num_microbatches} × {self.microbatch}", f"recompute {self.recompute.mode}"])


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


def _sizes(job: Job, name: str, default: Sequence[Any]) -> list[Any]:
    return [job.fixed[name]] if name in job.fixed else list(default)


def choices(model: ModelSpec, job: Job, left_out: Counter[str]) -> Iterator[Choice]:
    """Yield the choices whose sizes go together; the reasons why others do not are counted in ``left_out``."""
    per_node = job.device.per_node
    degrees = [n for n in divisors(job.devices) if n in _powers(job.devices) or n == job.devices]
    for tp in _sizes(job, "tp", [n for n in degrees if n <= per_node] if model.plan and model.plan.tensor else [1]):
        for pp in _sizes(job, "pp", [n for n in degrees if n <= min(model.num_blocks, 64)]):
            # Context parallelism is for sequences that one device can hardly take.
            for cp in _sizes(job, "cp", [n for n in degrees if n == 1 or (n <= 64 and job.seq // n >= 4096)]):
                if job.devices % (tp * pp * cp):
                    left_out[f"tp × pp × cp does not divide {job.devices} devices"] += 1
                    continue
                yield from _with_data_axes(model, job, tp, pp, cp, left_out)


def _with_data_axes(model: ModelSpec, job: Job, tp: int, pp: int, cp: int, left_out: Counter[str]) -> Iterator[Choice]:
    dp = job.devices // (tp * pp * cp)
    if job.fixed.get("dp", "auto") not in ("auto", dp):
        left_out[f"dp would not be {job.fixed['dp']}"] += 1
        return
    if job.batch % dp:
        left_out["the batch can't be divided by dp"] += 1
        return
    for ep in _sizes(job, "ep", [n for n in divisors(model.num_experts or 1) if n in _powers(model.num_experts or 1)]):
        for replicate in _sizes(job, "dp_replicate", [1] if dp * cp <= 512 else [1, dp * cp // 256]):
            for zero in _sizes(job, "zero_stage", [0, 1, 2, 3] if dp * cp > 1 else [1]):
                try:
                    layout = ParallelLayout(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, dp_replicate=replicate, zero_stage=zero)
                    layout = layout.resolve(job.devices)
                except ValueError:
                    left_out["ep or dp_replicate can't be divided into dp × cp"] += 1
                    continue
                yield from _with_schedules(model, job, layout, left_out)


def _with_schedules(model: ModelSpec, job: Job, layout: ParallelLayout, left_out: Counter[str]) -> Iterator[Choice]:
    samples = job.batch // layout.dp_size
    microbatches = [n for n in divisors(samples) if n <= 64]
    if "microbatch" not in job.fixed:
        # At first sight a power of two, and with a pipeline few: a bubble costs more than small products do.
        microbatches = [n for n in microbatches if n in _powers(64)][: 3 if layout.pp > 1 else 7]
    for schedule, chunks in _schedules(job, layout):
        if layout.pp * chunks > model.num_blocks:
            left_out[f"more stages than the {model.num_blocks} blocks"] += 1
            continue
        for sequence in _sizes(job, "sequence_parallel", [layout.tp > 1]):
            for microbatch in _sizes(job, "microbatch", microbatches):
                if samples % microbatch:
                    left_out["the microbatch does not divide a rank's batch"] += 1
                    continue
                count = samples // microbatch
                try:
                    pipeline.check_schedule(schedule, chunks, layout.pp)
                    if layout.pp > 1:
                        pipeline.check_microbatches(schedule, count, layout.pp)
                except ValueError:
                    left_out["the schedule can't run so many microbatches"] += 1
                    continue
                if layout.pp > 1 and count < layout.pp and "microbatch" not in job.fixed:
                    left_out["fewer microbatches than stages"] += 1
                    continue
                for recompute in _sizes(job, "recompute", MODES):
                    yield Choice(
                        layout=layout, microbatch=microbatch, num_microbatches=count, schedule=schedule, virtual_stages=chunks,
                        sequence_parallel=sequence, recompute=Recompute.of(recompute),
                    )  # fmt: skip


def _schedules(job: Job, layout: ParallelLayout) -> list[tuple[str, int]]:
    if layout.pp == 1:
        return [("1f1b", 1)]
    found = []
    for schedule in _sizes(job, "schedule", ["1f1b", "interleaved_1f1b"]):
        several = pipeline.SCHEDULES[schedule][1] if schedule in pipeline.SCHEDULES else False
        found += [(schedule, chunks) for chunks in _sizes(job, "virtual_stages", [2, 4, 8] if several else [1])]
    return found

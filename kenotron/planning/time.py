"""Time of a step: products, attention and memory traffic of each part, what is sent over each axis and what of it hides, the
bubble.

A part takes the time of its matrix products, of its attention and of all other operators' bytes, each at the share of the
device's
peak that `Rates` holds; or the time that the host needs to launch them, if that is longer. The shares were fitted to
published figures
(`calibration`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields

from kenotron.parallel.buckets import BUCKET_BYTES
from kenotron.planning.layouts import Choice, Job
from kenotron.planning.memory import parts_of
from kenotron.planning.model import ModelSpec
from kenotron.planning.trace import Costs, Trace

#: precision -> the kind of peak that its products run at
PEAKS = {
    "32-true": "fp32", "64-true": "fp32", "bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "bf16", "16-true": "bf16",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of peaks that are reached, and what hides behind what.

    Args:
        gemm, gemm_fp8: of the peak, by large products (fp8: those of blocks; the head stays bf16).
        attention: of the peak, counted over the half of the pairs that a causal mask leaves.
        memory: of the memory's bandwidth. fused: share of elementwise traffic that is left when blocks are compiled.
        link, network: of their bandwidths. hidden: share of compute behind which data-parallel traffic may hide.
        hidden_tp: share of tensor-parallel traffic that hides (asynchronous products).
        launch, launch_compiled: seconds of the host for an operator. latency: of a collective, per doubling of its ranks.
        spread: how much longer a step takes for each doubling of nodes: ranks wait for the slowest.
    """

    gemm: float = 0.72
    gemm_fp8: float = 0.55
    attention: float = 0.45
    memory: float = 0.75
    fused: float = 0.45
    link: float = 0.6
    network: float = 0.6
    hidden: float = 0.8
    hidden_tp: float = 0.0
    launch: float = 6e-6
    launch_compiled: float = 3e-6
    latency: float = 1.2e-5
    spread: float = 0.01

    def changed(self, **values: float) -> Rates:
        return Rates(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **values})


#: What `calibration.fit` found; ``python bench/plan.py --fit`` finds it again.
FITTED = Rates(
    gemm=0.689, gemm_fp8=0.387, attention=0.25, memory=0.9, fused=0.33, link=0.802, network=0.296, hidden=0.395, hidden_tp=0.0,
    launch=1.12e-5, launch_compiled=3e-6, latency=2.06e-5, spread=0.0138,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Software:
    """What a published figure was measured with, where it is not what Kénotron does.

    Args:
        fp8: products of blocks in fp8. async_tp: tensor-parallel traffic behind products.
        gathered_bytes: of a parameter as it travels (None: its own size).
        scatters: parameters are gathered behind a forward pass also under ZeRO 1 and 2.
    """

    fp8: bool = False
    async_tp: bool = False
    gathered_bytes: int | None = None
    scatters: bool = False


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one update, and what follows.

    Args:
        step: of all. compute: of the busiest rank, with recompute. bubble: in which it waits for other stages.
        traffic: axis -> seconds that do not hide. sent: axis -> bytes that a device sends. update: of the optimizer.
        forward, backward: of each stage, for one microbatch. tokens: of an update.
        flops, flops_causal: of the model for an update, all pairs of positions counted or half of them.
        peak: operations/s of all devices.
    """

    step: float
    compute: float
    bubble: float
    traffic: dict[str, float]
    sent: dict[str, float]
    update: float
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    tokens: int
    devices: int
    flops: float
    flops_causal: float
    peak: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """By all pairs of positions (6 N + 12 L H S)."""
        return self.flops / self.step / self.peak

    @property
    def mfu_causal(self) -> float:
        """By the pairs that a causal mask leaves (6 N + 6 L H S)."""
        return self.flops_causal / self.step / self.peak


class Clock:
    """Tells the time of choices for one model and job.

    Args:
        base: a trace of the whole model on one rank that recomputes nothing, by which operations of the model are counted.
    """

    def __init__(self, model: ModelSpec, job: Job, rates: Rates, base: Trace, software: Software | None = None) -> None:
        self.model, self.job, self.rates, self.software = model, job, rates, software or Software()
        self.peak = job.device.peak_flops[PEAKS[job.precision]]
        self.bandwidth = job.device.memory_bandwidth * rates.memory
        parts = [base.before, *(base.kinds[kind] for kind in model.kinds), base.after]
        gemm = sum(p.forward.gemm_flops.at(1) + p.backward.gemm_flops.at(1) for p in parts)
        attention = 3 * sum(p.forward.attention_flops.at(1) for p in parts)
        self.flops, self.flops_causal = (gemm + attention) * job.batch, (gemm + attention / 2) * job.batch

    def at(self, rates: Rates) -> Clock:
        """Return the same clock with other rates."""
        other = copy.copy(self)
        other.rates, other.bandwidth = rates, self.job.device.memory_bandwidth * rates.memory
        return other

    # ------------------------------------------------------------------------------------------------------- one part

    def seconds(self, costs: Costs, choice: Choice, is_block: bool) -> tuple[float, float]:
        """Return the time of one pass through one part, and that of its tensor-parallel traffic which does not hide."""
        x, rates, compiled = choice.samples, self.rates, self.job.compile and is_block
        # A rank's queries meet the keys of all cp ranks: of a whole sample's pairs it has its share.
        attention = costs.attention_flops.at(x) / 2
        fp8 = self.software.fp8 and is_block
        products = self.job.device.peak_flops["fp8"] * rates.gemm_fp8 if fp8 else self.peak * rates.gemm
        elementwise = costs.other_bytes.at(x) * (rates.fused if compiled else 1.0)
        device = (
            costs.gemm_flops.at(x) / products
            + attention / (self.peak * rates.attention)
            + (elementwise + 0.5 * costs.gemm_bytes.at(x)) / self.bandwidth
        )
        host = costs.num_operators * (rates.launch_compiled if compiled else rates.launch)
        sent = 0.0
        for kind, line in costs.sent.items():
            bandwidth = self._bandwidth(choice.layout.tp, 1)
            sent += (2 if kind == "all_reduce" else 1) * line.at(x) * (1 - 1 / choice.layout.tp) / bandwidth
        sent += costs.num_collectives * self._latency(choice.layout.tp)
        hidden = rates.hidden_tp if self.software.async_tp else 0.0
        return max(device, host), sent * (1 - hidden)

    def _latency(self, ranks: int) -> float:
        return self.rates.latency * math.log2(max(2, ranks))

    def _bandwidth(self, ranks: int, stride: int) -> float:
        """Return bytes/s of each of ``ranks`` devices, ``stride`` apart, that pass data around."""
        device = self.job.device
        if ranks * stride <= device.per_node:
            return device.link_bandwidth * self.rates.link
        # Where several of the ranks share a node they share its network cards.
        per_node = max(1, device.per_node // stride)
        return min(device.link_bandwidth * self.rates.link, per_node * device.network_bandwidth * self.rates.network)

    # --------------------------------------------------------------------------------------------------------- a step

    def step(self, trace: Trace, choice: Choice) -> Time:
        """Return the time of an update."""
        layout, m, v = choice.layout, choice.num_microbatches, choice.virtual_stages
        forward, backward, exposed_tp, sent_tp = self._stages(trace, choice)
        ranks = [
            sum(forward[s] + backward[s] for s in range(choice.num_stages) if s % layout.pp == r) for r in range(layout.pp)
        ]
        slowest = max(ranks)
        compute = m * slowest
        bubble = (layout.pp - 1) * slowest / v
        if choice.schedule in ("zbv", "interleaved_zero_bubble"):
            bubble /= 3
        traffic, sent = {"tp": m * exposed_tp}, {"tp": m * sent_tp}
        self._pipeline_traffic(trace, choice, traffic, sent)
        self._context_traffic(choice, slowest, traffic, sent)
        self._expert_traffic(choice, traffic, sent)
        local = [self._elements(trace, choice, rank) for rank in {0, layout.pp - 1}]
        self._data_traffic(trace, choice, max(local), slowest, traffic, sent)
        shard = max(local) / choice.state_shards * trace.param_bytes
        update = shard * (2 + 2 * self.job.optimizer_states) * 1.5 / self.bandwidth
        nodes = max(1.0, self.job.devices / self.job.device.per_node)
        # What tensor parallelism sends is part of its stages' time.
        rest = sum(seconds for axis, seconds in traffic.items() if axis != "tp")
        step = (compute + bubble + rest + update) * (1 + self.rates.spread * math.log2(nodes))
        return Time(
            step=step, compute=compute, bubble=bubble, traffic=traffic, sent=sent, update=update, forward=tuple(forward),
            backward=tuple(backward), tokens=self.job.batch * self.job.seq, devices=self.job.devices, flops=self.flops,
            flops_causal=self.flops_causal, peak=self.peak * self.job.devices,
        )  # fmt: skip

    def _stages(self, trace: Trace, choice: Choice) -> tuple[list[float], list[float], float, float]:
        """Return seconds of each stage's forward and backward, and of the busiest rank: seconds and bytes of tp traffic."""
        found = {}
        for name, part in (("before", trace.before), ("after", trace.after), *enumerate(trace.kinds)):
            is_block = isinstance(name, int)
            pair = [self.seconds(costs, choice, is_block) for costs in (part.forward, part.backward)]
            sent = sum(line.at(choice.samples) for costs in (part.forward, part.backward) for line in costs.sent.values())
            found[name] = (pair[0][0] + pair[0][1], pair[1][0] + pair[1][1], pair[0][1] + pair[1][1], sent)
        forward, backward = [0.0] * choice.num_stages, [0.0] * choice.num_stages
        exposed, sent_bytes = [0.0] * choice.num_stages, [0.0] * choice.num_stages
        owner = self.model.stage_of_blocks(choice.num_stages)
        where = [(0, "before"), *zip(owner, self.model.kinds, strict=True), (choice.num_stages - 1, "after")]
        for stage, name in where:
            f, b, e, s = found[name]
            forward[stage] += f
            backward[stage] += b
            exposed[stage] += e
            sent_bytes[stage] += s
        return forward, backward, max(exposed) * choice.virtual_stages, max(sent_bytes) * choice.virtual_stages

    def _elements(self, trace: Trace, choice: Choice, rank: int) -> float:
        parts = parts_of(self.model, trace, choice, rank).parts
        return float(sum(part.elements + part.expert_elements for part in parts))

    # -------------------------------------------------------------------------------------------------------- traffic

    def _pipeline_traffic(self, trace: Trace, choice: Choice, traffic: dict[str, float], sent: dict[str, float]) -> None:
        layout = choice.layout
        if layout.pp == 1:
            return
        boundary = trace.kinds[0].output.at(choice.samples) * (layout.tp if choice.sequence_parallel else 1)
        sent["pp"] = 2.0 * boundary * choice.num_microbatches * choice.virtual_stages
        bandwidth = self._bandwidth(2, self.job.devices // layout.pp)
        one = boundary / bandwidth + self._latency(2)
        # Of the hops that fill and drain the pipeline nothing hides; in between half does.
        traffic["pp"] = (
            2 * one * (layout.pp - 1) * choice.virtual_stages + one * choice.num_microbatches * choice.virtual_stages
        )

    def _context_traffic(self, choice: Choice, slowest: float, traffic: dict[str, float], sent: dict[str, float]) -> None:
        layout = choice.layout
        if layout.cp == 1:
            return
        width = 2 if PEAKS[self.job.precision] == "bf16" else 4
        tokens = choice.samples * self.job.seq
        blocks = self.model.num_blocks / layout.pp
        # Keys and values go around; in the backward pass again, and their gradients with them.
        size = (
            2 * self.model.kv_size / min(layout.tp, max(1, self.model.kv_size)) * tokens * width * (layout.cp - 1) * blocks * 3
        )
        sent["cp"] = size * choice.num_microbatches
        seconds = size / self._bandwidth(layout.cp, layout.tp)
        traffic["cp"] = max(seconds - 0.3 * slowest, 0.1 * seconds) * choice.num_microbatches

    def _expert_traffic(self, choice: Choice, traffic: dict[str, float], sent: dict[str, float]) -> None:
        layout = choice.layout
        if layout.ep == 1:
            return
        width = 2 if PEAKS[self.job.precision] == "bf16" else 4
        rows = choice.samples * self.job.seq * min(self.model.top_k, layout.ep)
        size = 4 * rows * self.model.hidden * width * self.model.num_expert_blocks / layout.pp * (1 - 1 / layout.ep)
        sent["ep"] = size * choice.num_microbatches
        traffic["ep"] = sent["ep"] / self._bandwidth(layout.ep, layout.tp)

    def _data_traffic(
        self, trace: Trace, choice: Choice, elements: float, slowest: float, traffic: dict[str, float], sent: dict[str, float]
    ) -> None:
        layout, m = choice.layout, choice.num_microbatches
        if choice.replicas == 1:
            return
        gradient, gathered = trace.param_bytes, self.software.gathered_bytes or trace.param_bytes
        bandwidth = self._bandwidth(choice.replicas, layout.tp)
        share = 1 - 1 / choice.replicas
        blocks = self.model.num_blocks / layout.pp
        update = 0.0
        if not choice.is_sharded and not (self.software.scatters and choice.keeps_parts):
            passes = m if choice.layout.zero_stage == 2 else 1
            size, window = 2 * elements * gradient, slowest * 2 / 3 * passes
            calls = max(1.0, elements * gradient / BUCKET_BYTES) * passes
            if choice.keeps_parts:
                size = elements * gradient * passes
                if layout.dp_replicate > 1:
                    size += 2 * elements * gradient / choice.shards
                # After the update, with nothing to hide behind.
                update = elements * trace.param_bytes * (1 - 1 / choice.shards)
        else:
            per_pass = m if layout.pp == 1 or layout.zero_stage == 3 else 1
            gathers = per_pass * (2 if layout.zero_stage == 3 else 1)
            scatters = m if layout.zero_stage > 1 else 1
            size = elements * (gathers * gathered + scatters * gradient)
            window, calls = slowest * max(per_pass, scatters), blocks * (gathers + scatters)
            if layout.dp_replicate > 1:
                size += 2 * elements * gradient * scatters / choice.shards
        sent["dp"] = size * share + update
        seconds = size * share / bandwidth + calls * self._latency(choice.replicas)
        # The first gather and the last reduction have nothing to hide behind.
        ends = seconds / max(1.0, calls)
        traffic["dp"] = max(seconds - self.rates.hidden * window, 2 * ends) + update / bandwidth

"""A plan as text, as JSON, as YAML for LightningCLI."""

from __future__ import annotations

from typing import Any

from kenotron.planning.layouts import Choice, Job
from kenotron.planning.memory import shortage, size
from kenotron.planning.planner import Plan, Planned

_PARTS = ("parameters", "gradients", "optimizer", "activations", "work", "communication")


def text(plan: Plan) -> str:
    """Return the best choices as a table, and why the others fail."""
    model, job = plan.model, plan.job
    lines = [
        f"{model.name}: {model.num_parameters / 1e9:,.2f} B parameters, {model.num_blocks} blocks of {len(set(model.kinds))} "
        f"kind{'s' if len(set(model.kinds)) > 1 else ''}",
        f"{job.devices:,} × {job.device.name}, {size(job.usable)} each for tensors; {job.batch:,} samples of "
        f"{job.seq:,} tokens an update ({job.batch * job.seq / 1e6:.2f} M tokens), {job.precision}"
        f"{', compiled' if job.compile else ''}",
        "",
    ]
    if plan.best:
        lines.append(
            f"{'':>3} {'GB':>6} {'step s':>8} {'tokens/s':>11} {'/device':>8} {'MFU':>6} {'causal':>6} {'bubble':>6}  layout"
        )
    for place, planned in enumerate(plan.best, 1):
        t = planned.time
        lines.append(
            f"{place:>3} {planned.memory.total / 1e9:>6.1f} {t.step:>8.3f} {t.tokens_per_second:>11,.0f} "
            f"{t.tokens_per_second / t.devices:>8,.0f} {t.mfu:>6.1%} {t.mfu_causal:>6.1%} {t.bubble / t.step:>6.1%}  "
            f"{planned.choice}"
        )
    if plan.best:
        lines += ["", *_details(plan.best[0])]
    return "\n".join([*lines, "", *failures(plan)])


def _details(best: Planned) -> list[str]:
    memory, time = best.memory, best.time
    cells = ", ".join(f"{part} {size(getattr(memory, part))}" for part in _PARTS)
    lines = [f"the first: rank {memory.rank} is the fullest, {size(memory.total)} at the {memory.moment}: {cells}"]
    lines.append(
        f"a step: compute {time.compute:.3f} s, bubble {time.bubble:.3f} s, update {time.update:.3f} s"
        + "".join(
            f"; {axis} sends {time.sent[axis] / 1e9:,.1f} GB a device, {seconds:.3f} s of it in the open"
            for axis, seconds in time.traffic.items()
            if time.sent.get(axis)
        )
    )
    return lines


def failures(plan: Plan) -> list[str]:
    """Return why choices fail, the most frequent reason first."""
    lines = [f"{plan.num_fitting:,} choices fit. Why others fail:"]
    if plan.too_large:
        line = f"{plan.too_large:>8,}  too large for a device"
        if plan.nearest_miss is not None:
            miss = plan.nearest_miss
            line += (
                f"; nearest: {miss.choice}: rank {miss.memory.rank} lacks {size(shortage(miss.memory, plan.job))} "
                f"at the {miss.memory.moment}"
            )
        lines.append(line)
    reasons = [*plan.left_out.items(), *plan.refused.items()]
    lines += [f"{count:>8,}  {reason}" for reason, count in sorted(reasons, key=lambda item: -item[1])]
    return lines if len(lines) > 1 else lines[:1] + ["       0"]


def settings(choice: Choice, job: Job) -> dict[str, Any]:
    """Return the arguments of ``KenotronStrategy`` for a choice."""
    layout = choice.layout
    found: dict[str, Any] = {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "ep": layout.ep}
    found |= {"dp_replicate": layout.dp_replicate, "zero_stage": layout.zero_stage}
    found |= {"sequence_parallel": choice.sequence_parallel, "recompute": choice.recompute.mode, "compile": job.compile}
    if layout.pp > 1:
        found |= {
            "schedule": choice.schedule, "virtual_stages": choice.virtual_stages, "microbatches": choice.num_microbatches,
        }  # fmt: skip
    return found


def batch_of(choice: Choice) -> tuple[int, int]:
    """Return samples of a data-parallel rank's batch, and how many batches an update accumulates."""
    if choice.layout.pp > 1:
        return choice.microbatch * choice.num_microbatches, 1
    return choice.microbatch, choice.num_microbatches


def yaml(planned: Planned, job: Job) -> str:
    """Return what LightningCLI takes for a choice."""
    batch, accumulate = batch_of(planned.choice)
    per_node = min(job.devices, job.device.per_node)
    lines = [
        f"# {planned.choice}",
        f"# predicted: {planned.memory.total / 1e9:.1f} GB on the fullest rank, {planned.time.step:.3f} s a step, "
        f"{planned.time.tokens_per_second:,.0f} tokens/s, MFU {planned.time.mfu:.1%}",
        f"# data: {batch} samples of {job.seq} tokens for each data-parallel rank (batch_size), {job.batch} for an update",
        "trainer:",
        f"  accelerator: {'cpu' if job.device.name == 'cpu' else 'gpu'}",
        f"  devices: {per_node}",
        f"  num_nodes: {-(-job.devices // per_node)}",
        f"  precision: {job.precision}",
        f"  accumulate_grad_batches: {accumulate}",
        "  strategy:",
        "    class_path: kenotron.KenotronStrategy",
        "    init_args:",
    ]
    for key, value in settings(planned.choice, job).items():
        lines.append(f"      {key}: {str(value).lower() if isinstance(value, bool) else value}")
    return "\n".join(lines) + "\n"


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values."""
    return {
        "model": {"name": plan.model.name, "parameters": plan.model.num_parameters, "blocks": plan.model.num_blocks},
        "devices": plan.job.devices,
        "device": plan.job.device.name,
        "usable_bytes": plan.job.usable,
        "best": [_row(planned, plan.job) for planned in plan.best],
        "num_fitting": plan.num_fitting,
        "too_large": plan.too_large,
        "nearest_miss": None if plan.nearest_miss is None else {
            **_row(plan.nearest_miss, plan.job), "missing_bytes": shortage(plan.nearest_miss.memory, plan.job),
        },
        "left_out": dict(plan.left_out),
        "refused": dict(plan.refused),
    }  # fmt: skip


def _row(planned: Planned, job: Job) -> dict[str, Any]:
    memory, time = planned.memory, planned.time
    return {
        "layout": str(planned.choice),
        "strategy": settings(planned.choice, job),
        "batch_size": batch_of(planned.choice)[0],
        "accumulate_grad_batches": batch_of(planned.choice)[1],
        "memory_bytes": {"total": memory.total, **{part: getattr(memory, part) for part in _PARTS}},
        "fullest_rank": memory.rank,
        "moment": memory.moment,
        "step_seconds": time.step,
        "compute_seconds": time.compute,
        "bubble_seconds": time.bubble,
        "traffic_seconds": time.traffic,
        "sent_bytes": time.sent,
        "tokens_per_second": time.tokens_per_second,
        "mfu": time.mfu,
        "mfu_causal": time.mfu_causal,
    }

"""A plan as a picture: memory and time of the best choices, and what every stage of the first one does when. Needs
matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kenotron.planning.planner import Plan, Planned
from kenotron.planning.schedule import simulate

_MEMORY = {
    "parameters": "#3b6ea8", "gradients": "#6fa3d0", "optimizer": "#1f3f66", "activations": "#d98c3f", "work": "#f0c27b",
    "communication": "#8a8a8a",
}  # fmt: skip
_TIME = {"compute": "#3b6ea8", "bubble": "#dddddd", "dp": "#8a8a8a", "pp": "#b5b5b5", "cp": "#a06fb0", "ep": "#c06060",
         "update": "#1f3f66", "other ranks": "#efefef"}  # fmt: skip
#: More of them can't be told apart.
_MOST_RANKS, _MOST_MICROBATCHES = 16, 24


def draw(plan: Plan, path: str | Path) -> None:
    """Write a picture of a plan, of the kind that the name's ending says.

    Raises:
        ValueError: matplotlib is not installed, or nothing fits.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Pictures need matplotlib: pip install matplotlib. Or leave --picture out.") from None
    if not plan.best:
        raise ValueError("Nothing fits, so there is nothing to draw.")
    figure = Figure(figsize=(14, 3.6 + 0.34 * len(plan.best) + 2.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.2 + 0.34 * len(plan.best), 3.2])
    above, below = parts
    memory, time = above.subplots(1, 2, sharey=True)
    job = plan.job
    figure.suptitle(
        f"{plan.model.name} ({plan.model.num_parameters / 1e9:,.1f} B) on {job.devices:,} × {job.device.name}, "
        f"{job.batch * job.seq / 1e6:.1f} M tokens an update, {job.precision}",
        fontsize=12,
    )
    _memory_bars(memory, plan)
    _time_bars(time, plan)
    _timeline(below.subplots(), plan.best[0])
    figure.savefig(path, dpi=110)


def _memory_bars(axes: Any, plan: Plan) -> None:
    left = [0.0] * len(plan.best)
    for part, colour in _MEMORY.items():
        widths = [getattr(planned.memory, part) / 1e9 for planned in plan.best]
        axes.barh(range(len(left)), widths, left=left, color=colour, label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.0f}", va="center", fontsize=8)
    axes.axvline(plan.job.usable / 1e9, color="#b03030", linewidth=1)
    axes.set_yticks(range(len(left)), [_label(planned) for planned in plan.best], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, plan.job.usable / 1e9 * 1.04)
    axes.set_title("memory of the fullest rank, GB (line: what fits)", fontsize=10)
    axes.legend(fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False, columnspacing=1.0)
    axes.spines[["top", "right"]].set_visible(False)


def _label(planned: Planned) -> str:
    words = str(planned.choice).split(", ")
    half = -(-len(words) // 2) if len(words) > 5 else len(words)
    return ", ".join(words[:half]) + ("\n" + ", ".join(words[half:]) if words[half:] else "")


def _time_bars(axes: Any, plan: Plan) -> None:
    rows = []
    for planned in plan.best:
        time = planned.time
        parts = {"compute": time.compute, "bubble": time.bubble, "update": time.update}
        parts |= {axis: seconds for axis, seconds in time.traffic.items() if axis != "tp"}
        rows.append({**parts, "other ranks": max(0.0, time.step - sum(parts.values()))})
    left = [0.0] * len(rows)
    for part, colour in _TIME.items():
        widths = [row.get(part, 0.0) for row in rows]
        if any(widths):
            names = {"compute": "compute and tp traffic", "other ranks": "waiting for the slowest"}
            name = names.get(part, part if part in ("bubble", "update") else f"{part} traffic")
            axes.barh(range(len(left)), widths, left=left, color=colour, label=name, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, planned in enumerate(plan.best):
        axes.text(left[row], row, f" MFU {planned.time.mfu:.1%}", va="center", fontsize=8)
    axes.set_xlim(0, max(left) * 1.16)
    axes.set_title("a step, seconds", fontsize=10)
    axes.legend(fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False, columnspacing=1.0)
    axes.spines[["top", "right"]].set_visible(False)


def _timeline(axes: Any, planned: Planned) -> None:
    choice, time = planned.choice, planned.time
    pp, count = choice.layout.pp, choice.num_microbatches
    shown = min(count, _MOST_MICROBATCHES)
    if pp > 1:  # what the schedule can run
        shown = max(pp, shown // pp * pp) if count >= pp else count
    schedule = choice.schedule if choice.schedule in ("afab", "1f1b", "interleaved_1f1b") else "interleaved_1f1b"
    spans = simulate(schedule, pp, choice.virtual_stages, shown, time.forward, time.backward)
    for span in spans:
        if span.rank % max(1, -(-pp // _MOST_RANKS)):
            continue
        chunk = span.action.stage // pp
        base = (0.23, 0.43, 0.66) if span.action.kind == "F" else (0.85, 0.55, 0.25)
        colour = tuple(c + (1 - c) * 0.55 * chunk / max(1, choice.virtual_stages - 1 or 1) for c in base)
        axes.barh(span.rank, span.end - span.start, left=span.start, color=colour, edgecolor="white", linewidth=0.4, height=0.9)
        if pp * shown * choice.virtual_stages <= 128:
            middle = (span.start + span.end) / 2
            axes.text(middle, span.rank, str(span.action.microbatch), ha="center", va="center", fontsize=7, color="white")
    axes.invert_yaxis()
    axes.set_yticks(range(0, pp, max(1, -(-pp // _MOST_RANKS))))
    axes.set_ylabel("pipeline rank" if pp > 1 else "a rank")
    axes.set_xlabel("seconds")
    some = "" if shown == count else f", the first {shown} of {count} microbatches"
    bubble = f"; bubble {time.bubble / time.step:.1%} of a step" if pp > 1 else ""  # the table's figure
    axes.set_title(f"the first one: forward (blue) and backward (orange){some}{bubble}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)

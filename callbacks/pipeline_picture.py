"""A pipeline's timeline as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kenotron.parallel.timeline import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    OPTIMIZER,
    Span,
    runs_of,
    waits,
    window,
)

#: Light and dark of each action: from a rank's first stage to its last one.
_COLOURS = {
    FORWARD: ("#8ab6e1", "#2f6db0"),
    BACKWARD: ("#86cbb0", "#1f7f5f"),
    BACKWARD_INPUT: ("#86cbb0", "#1f7f5f"),
    BACKWARD_WEIGHT: ("#c9b0e3", "#7a4fb0"),
    OPTIMIZER: ("#f2a65a", "#f2a65a"),
}
_LABELS = {BACKWARD_INPUT: "backward, inputs", BACKWARD_WEIGHT: "backward, weights"}
_WAIT, _INK, _FAINT = "#eef0f2", "#1f2933", "#7b8794"
_MOST_ROWS = 64


def require_matplotlib() -> None:
    """Raise ``ImportError`` where pictures can't be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"PipelineTrace draws with matplotlib: pip install matplotlib, or set picture=False ({error})"
        ) from error


def draw(path: Path, spans: Sequence[Span], ranks: Sequence[str], title: str, subtitle: str) -> None:
    """Draw what each rank of one pipeline did in one step: a row for each rank, a box for each action with its microbatch.

    Args:
        path: of the PNG. spans: of one step. ranks: what they are called, from the first one.
    """
    from matplotlib.figure import Figure

    begin, end = window(spans)
    rows = min(len(ranks), _MOST_ROWS)
    figure = Figure(figsize=(13.0, 1.9 + 0.52 * rows), dpi=150, facecolor="white")
    top, bottom = 0.95 / (1.9 + 0.52 * rows), 0.85 / (1.9 + 0.52 * rows)
    axes = figure.add_axes((0.085, bottom, 0.855, 1 - top - bottom))
    for run in runs_of(spans):
        for rank, idle_from, idle_to in waits(run):
            if rank < rows:
                axes.broken_barh(
                    [((idle_from - begin) * 1e3, (idle_to - idle_from) * 1e3)], (rank - 0.39, 0.78), color=_WAIT, lw=0
                )
    depth = {rank: sorted({s.stage for s in spans if s.rank == rank and s.stage >= 0}) for rank in range(rows)}
    for span in spans:
        if span.rank < rows:
            _box(axes, span, begin, end, depth[span.rank])
    _busy(axes, spans, rows, end - begin)
    axes.set_xlim(0, (end - begin) * 1e3)
    axes.set_ylim(rows - 0.45, -0.55)
    axes.set_yticks(range(rows), ranks[:rows], color=_INK)
    axes.set_xlabel("ms", color=_FAINT, loc="right", labelpad=2)
    axes.tick_params(axis="x", colors=_FAINT, length=3)
    axes.tick_params(axis="y", length=0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.34 / height, title, fontsize=14, fontweight="bold", color=_INK, va="center")
    figure.text(0.012, 1 - 0.66 / height, subtitle, fontsize=10, color=_FAINT, va="center")
    _legend(figure, {span.action for span in spans})
    figure.savefig(path)


def _box(axes: Any, span: Span, begin: float, end: float, stages: Sequence[int]) -> None:
    share = stages.index(span.stage) / max(1, len(stages) - 1) if span.stage in stages and len(stages) > 1 else 0.5
    left, width = (span.begin - begin) * 1e3, (span.end - span.begin) * 1e3
    colour = _between(*_COLOURS[span.action], share)
    axes.broken_barh([(left, width)], (span.rank - 0.39, 0.78), facecolor=colour, edgecolor="white", linewidth=0.6)
    if span.microbatch >= 0 and width > 0.011 * (end - begin) * 1e3 * len(str(span.microbatch)):
        axes.text(
            left + width / 2, span.rank + 0.02, str(span.microbatch), ha="center", va="center", fontsize=9, color="white"
        )  # fmt: skip


def _busy(axes: Any, spans: Sequence[Span], rows: int, length: float) -> None:
    """Note at the end of each row for which part of the step the rank worked."""
    for rank in range(rows):
        share = sum(span.end - span.begin for span in spans if span.rank == rank) / length
        axes.text(
            1.008, rank, f"{share:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=_FAINT
        )  # fmt: skip
    axes.text(1.008, -0.62, "busy", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9.5, color=_FAINT)


def _legend(figure: Any, actions: set[str]) -> None:
    from matplotlib.patches import Patch

    present = [action for action in _COLOURS if action in actions]
    handles = [Patch(facecolor=_between(*_COLOURS[a], 0.5), label=_LABELS.get(a, a)) for a in present]
    handles.append(Patch(facecolor=_WAIT, label="waiting"))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.078, 0.0), ncols=6, frameon=False, fontsize=10)


def _between(light: str, dark: str, share: float) -> str:
    """Return the colour that lies between two."""
    parts = [(int(light[i : i + 2], 16), int(dark[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)

"""The rows of a comparison as a picture: loss curves that lie on one another, how far apart they are, and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.rcParams["svg.fonttype"] = "none"

#: Colours that differ for colour-blind readers as well (Okabe and Ito), and greys after them.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#5C5C5C", "#A0A0A0", "#2F4B7C")
_ROUND: Any = {"solid_capstyle": "round", "solid_joinstyle": "round"}
_INK, _PALE = "#2b2b2b", "#d9d9d9"
#: Below this, differences are drawn at the bottom: zeros have no place on a logarithmic axis.
_FLOOR = 1e-9


def draw(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG of those rows that ran.

    Args:
        rows: as `compare` returns them. path: of the file. title: what was trained.
    """
    shown = [row for row in rows if row["reason"] is None]
    colours = {row["strategy"]: _COLOURS[index % len(_COLOURS)] for index, row in enumerate(rows)}
    height = 3.4 + 0.34 * len(shown) + 0.6
    figure = Figure(figsize=(12.5, height + 1.2), dpi=130, facecolor="white", layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.9, 0.34 * len(shown) + 1.3))
    upper, lower = halves
    curves, apart = upper.subplots(1, 2, width_ratios=(1.35, 1))
    _curves(curves, shown, colours)
    _differences(apart, shown, colours)
    handles, labels = curves.get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside lower center", ncols=min(len(shown), 8), frameon=False, fontsize=8.5)
    failed = ", ".join(row["strategy"] for row in rows if row["reason"] is not None)
    title += f"; {failed} can't run here" if failed else ""
    upper.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    _bars(lower.subplots(1, 5, sharey=True), shown, colours)
    figure.savefig(path)


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Draw each curve thinner than the one below it, so that all are seen where they agree."""
    for index, row in enumerate(rows):
        width = 1.2 + 1.35 * (len(rows) - 1 - index)
        steps = range(1, len(row["losses"]) + 1)
        axes.plot(steps, row["losses"], color=colours[row["strategy"]], linewidth=width, label=row["strategy"], **_ROUND)
    axes.set_title("Loss, each curve drawn thinner on top of the last", loc="left", fontsize=9.5, color=_INK)
    axes.set_xlabel("step", fontsize=9)
    _plain(axes)


def _differences(axes: Axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    reference = rows[0]
    for row in rows[1:]:
        apart = [max(abs(loss - other), _FLOOR) for loss, other in zip(row["losses"], reference["losses"], strict=True)]
        axes.plot(range(1, len(apart) + 1), apart, color=colours[row["strategy"]], linewidth=1.4, marker="o", markersize=2.5)
    axes.axhline(1e-5, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate("1e-5", (1, 1e-5), xytext=(0, 3), textcoords="offset points", fontsize=8, color=_INK)
    axes.set_yscale("log")
    top = max([1e-4, *(3 * abs(row["max_loss_difference"]) for row in rows)])
    axes.set_ylim(_FLOOR / 2, top)
    axes.set_title(f"How far from {reference['strategy']} (at the bottom: nothing)", loc="left", fontsize=9.5, color=_INK)
    axes.set_xlabel("step", fontsize=9)
    _plain(axes)


def _bars(panels: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    by_tokens = any(row["tokens_per_second"] != row["samples_per_second"] for row in rows)
    sections = (
        ("tokens_per_second", "tokens/s" if by_tokens else "samples/s", 1.0, "{:,.0f}"),
        ("peak_memory_bytes", "peak memory, MB", 1e6, "{:,.1f}"),
        ("checkpoint_stall_s", "checkpoint stall, ms", 1e-3, "{:,.0f}"),
        ("checkpoint_bytes", "checkpoint, MB", 1e6, "{:,.2f}"),
        ("load_s", "time to load, ms", 1e-3, "{:,.0f}"),
    )
    places = range(len(rows))
    for axes, (name, label, unit, form) in zip(panels, sections, strict=True):
        values = [(row[name] or 0.0) / unit for row in rows]
        axes.barh(places, values, height=0.62, color=[colours[row["strategy"]] for row in rows])
        largest = max([*values, 1e-12])
        for place, value, row in zip(places, values, rows, strict=True):
            text = form.format(value) if row[name] is not None else "–"
            axes.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=_INK)
        axes.set_xlim(0, 1.42 * largest)
        axes.set_title(label, loc="left", fontsize=9.5, color=_INK)
        axes.set_yticks(list(places), [row["strategy"] for row in rows], fontsize=8.5)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(_PALE)
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()  # shared: the first row is on top everywhere


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(axis="y", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color="#888888")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))

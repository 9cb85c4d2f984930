"""What the benchmarks say of ratios: one for each pair of interleaved repetitions, ours over the other's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(ratios: Sequence[float]) -> dict[str, Any]:
    """Return the median, the quartiles, the standard error of the median (of about normal noise), and how many there are."""
    low, median, high = statistics.quantiles(ratios, n=4)
    count = len(ratios)
    error = 1.25 * (high - low) / 1.35 / count**0.5
    return {"ratio": median, "low": low, "high": high, "error": error, "repetitions": count}


def verdict(figures: dict[str, Any]) -> str:
    """Return the last cell of a row; whether two standard errors reach across the bar belongs to it."""
    unsure = abs(figures["ratio"] - figures["bar"]) < 2 * figures["error"]
    return ("ok" if figures["ok"] else "MISSED") + (", too noisy to tell" if unsure else "")

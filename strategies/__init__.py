"""Kénotron's Lightning strategies. ``strategy_class`` builds the class for either of Lightning's two packages."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kenotron.strategies.guard import Guard, TooManySkippedStepsError
from kenotron.strategies.settings import AutoSettings, CheckpointSettings, ProcessGroupSettings
from kenotron.strategies.strategy import strategy_class

if TYPE_CHECKING:
    from kenotron.strategies.strategy import KenotronStrategyBase as KenotronStrategy

__all__ = [
    "AutoSettings",
    "CheckpointSettings",
    "Guard",
    "KenotronStrategy",
    "ProcessGroupSettings",
    "TooManySkippedStepsError",
    "strategy_class",
]


def __getattr__(name: str) -> Any:
    if name == "KenotronStrategy":
        only_twin = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
        return strategy_class("pytorch_lightning" if only_twin else "lightning.pytorch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

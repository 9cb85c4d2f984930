"""Make ``Trainer(strategy="kenotron")`` work without ``import kenotron``.

torch calls the entry points of the group ``torch.backends`` at the end of its own import (switched off by
``TORCH_DEVICE_BACKEND_AUTOLOAD=0``). Ours puts an import hook in place that registers lazy factories as soon as Lightning's
strategies are imported. It imports nothing heavy and never raises: torch would report that as a broken backend.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Lightning's two packages are two class trees: strategies module -> package.
PACKAGES = {"lightning.pytorch.strategies": "lightning.pytorch", "pytorch_lightning.strategies": "pytorch_lightning"}

#: Names under which the strategy is known -> its settings. Lightning compares names in lower case.
NAMES: dict[str, dict[str, Any]] = {
    "kenotron": {},
    "kenotron_ddp": {"zero_stage": 0},
    "kenotron_zero1": {"zero_stage": 1},
    "kenotron_zero2": {"zero_stage": 2},
    "kenotron_zero3": {"zero_stage": 3},
    "kenotron_spawn": {"start_method": "spawn"},
    "kenotron_fork": {"start_method": "fork"},
    "kenotron_notebook": {"start_method": "fork"},
}


def autoload() -> None:
    """Register the strategies now, where Lightning is imported already, or as soon as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, package in PACKAGES.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "StrategyRegistry"):
            register(module, package)


def register(strategies: ModuleType, package: str) -> None:
    """Register every name with the registry of one of Lightning's packages."""
    for name, settings in NAMES.items():
        strategies.StrategyRegistry.register(
            name, _factory(package), description="Kénotron: data, tensor and pipeline parallelism", override=True, **settings
        )


def _factory(package: str) -> Callable[..., Any]:
    def make(start_method: str = "popen", **settings: Any) -> Any:
        strategies = importlib.import_module("kenotron.strategies")
        group = strategies.ProcessGroupSettings(start_method=start_method)
        return strategies.strategy_class(package)(**{"process_group": group, **settings})

    return make


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself; lets the others find Lightning's strategies and registers ours after they ran."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PACKAGES or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register(module, PACKAGES[fullname])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

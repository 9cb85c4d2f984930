"""Make ``Trainer(strategy="kenotron")`` work without ``import kenotron``.

torch calls the entry points of the group ``torch.backends`` at the end of its own import (switched off by
``TORCH_DEVICE_BACKEND_AUTOLOAD=0``). Ours puts an import hook in place that registers lazy factories as soon as Lightning's
strategies are imported, and lets ``torch.load`` and Lightning's loading function open Kénotron's checkpoints, which are
directories. It imports nothing heavy and never raises: torch would report that as a broken backend.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import os
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


#: Where Lightning's packages define the function that all of their loading goes through.
LOADERS = ("lightning.fabric.utilities.cloud_io", "lightning_fabric.utilities.cloud_io")


#: Where they define which checkpoints a logger with ``log_model`` sends away.
LOGGERS = ("lightning.pytorch.loggers.utilities", "pytorch_lightning.loggers.utilities")


def autoload() -> None:
    """Register the strategies now, where Lightning is imported already, or as soon as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, package in PACKAGES.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "StrategyRegistry"):
            register(module, package)
    for name in LOADERS:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "_load"):
            open_directories(module)
    for name in LOGGERS:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "_scan_checkpoints"):
            log_directories(module)


def log_directories(utilities: ModuleType) -> None:
    """Let loggers that send checkpoints away find directories, too: as files that Lightning opens anywhere."""
    original = utilities._scan_checkpoints
    if hasattr(original, "_kenotron_original"):
        return

    @functools.wraps(original)
    def scans(checkpoint_callback: Any, logged_model_time: Any) -> Any:
        exported = importlib.import_module("kenotron.checkpoint.exported")
        return exported.scan(original, checkpoint_callback, logged_model_time)

    scans._kenotron_original = original  # type: ignore[attr-defined]
    package = utilities.__name__.removesuffix("utilities")
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and vars(module).get("_scan_checkpoints") is original:
            module._scan_checkpoints = scans  # type: ignore[attr-defined]


def open_directories(cloud_io: ModuleType) -> None:
    """Let Lightning's loading function, and ``torch.load``, open checkpoints that are directories."""
    torch = sys.modules["torch"]
    if not hasattr(torch.load, "_kenotron_original"):
        torch.load = _opening(torch.load)  # type: ignore[attr-defined]
    original = cloud_io._load
    if hasattr(original, "_kenotron_original"):
        return
    replaced = _opening(original)
    package = cloud_io.__name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in (package, package.replace("_fabric", "")) or name.startswith("pytorch_lightning."):
            for key in ("_load", "pl_load"):  # the names under which others have imported it already
                if vars(module).get(key) is original:
                    setattr(module, key, replaced)


def _opening(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``load``, but for paths at which a checkpoint of Kénotron stands, or is about to."""

    signature = inspect.signature(load)

    @functools.wraps(load)
    def opens(*args: Any, **kwargs: Any) -> Any:
        path = args[0] if args else kwargs.get("f", kwargs.get("path_or_url"))
        if not isinstance(path, (str, os.PathLike)) or not _is_ours(path):
            return load(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        open_checkpoint = importlib.import_module("kenotron.checkpoint").open_checkpoint
        return open_checkpoint(path, given.get("map_location"), given.get("weights_only"))

    opens._kenotron_original = load  # type: ignore[attr-defined]
    return opens


def _is_ours(path: Any) -> bool:
    saving = sys.modules.get("kenotron.checkpoint.asynchronous")
    if saving is not None:  # it may be writing what is to be opened
        return bool(saving.wait_for(path))
    return os.path.isdir(path) and bool(importlib.import_module("kenotron.checkpoint").is_checkpoint(path))


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
        if fullname not in (*PACKAGES, *LOADERS, *LOGGERS) or fullname in self._busy:
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
            if fullname in PACKAGES:
                register(module, PACKAGES[fullname])
            elif fullname in LOGGERS:
                log_directories(module)
            else:
                open_directories(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

"""Kénotron: pretraining of large transformers on 4D parallelism from ordinary Lightning code.

Importing it registers the strategies ``"kenotron"``, ``"kenotron_ddp"``, ``"kenotron_zero1"`` to ``"kenotron_zero3"``, and
``"kenotron_spawn"``, ``"kenotron_fork"`` and ``"kenotron_notebook"`` with Lightning. Everything else is imported when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kenotron import _autoload

if TYPE_CHECKING:
    from kenotron.checkpoint import load_state_dict
    from kenotron.hf import from_checkpoint, from_hf
    from kenotron.layout import ParallelLayout
    from kenotron.parallel.float8 import Float8
    from kenotron.parallel.plan import ParallelPlan
    from kenotron.parallel.recompute import Recompute
    from kenotron.strategies import KenotronStrategy
    from kenotron.tasks import CausalLM, ChatData, StreamData, TokenData

__version__ = "0.1.0"

_PUBLIC = {
    "CausalLM": "kenotron.tasks",
    "ChatData": "kenotron.tasks",
    "Float8": "kenotron.parallel.float8",
    "KenotronStrategy": "kenotron.strategies",
    "ParallelLayout": "kenotron.layout",
    "ParallelPlan": "kenotron.parallel.plan",
    "Recompute": "kenotron.parallel.recompute",
    "StreamData": "kenotron.tasks",
    "TokenData": "kenotron.tasks",
    "from_checkpoint": "kenotron.hf",
    "from_hf": "kenotron.hf",
    "load_state_dict": "kenotron.checkpoint",
}

__all__ = [
    "CausalLM",
    "ChatData",
    "Float8",
    "KenotronStrategy",
    "ParallelLayout",
    "ParallelPlan",
    "Recompute",
    "StreamData",
    "TokenData",
    "__version__",
    "from_checkpoint",
    "from_hf",
    "load_state_dict",
]

_autoload.autoload()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

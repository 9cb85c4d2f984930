"""Kénotron's own models and their parts. They are plain torch; of ranks only the loss knows, whose vocabulary may be split.

``Decoder`` and ``Mamba`` build on transformers and are imported when they are first used; the parts need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kenotron.models.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from kenotron.models.experts import Experts
from kenotron.models.moe import MoE, MoESettings, Router, balance_loss, set_loss_weight, update_expert_bias, z_loss

if TYPE_CHECKING:
    from kenotron.models.decoder import Decoder
    from kenotron.models.mamba import Mamba

__all__ = [
    "Decoder",
    "Experts",
    "LinearCrossEntropy",
    "Mamba",
    "MoE",
    "MoESettings",
    "Router",
    "balance_loss",
    "linear_cross_entropy",
    "set_loss_weight",
    "update_expert_bias",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name in ("Decoder", "Mamba"):
        return getattr(importlib.import_module(f"kenotron.models.{name.lower()}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Kénotron's own models and their parts. They are plain torch; of ranks only the loss knows, whose vocabulary may be split.

``Decoder`` builds on transformers and is imported when it is first used; the parts need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kenotron.models.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from kenotron.models.experts import Experts
from kenotron.models.moe import MoE, MoESettings, Router, balance_loss, set_loss_weight, update_expert_bias, z_loss

if TYPE_CHECKING:
    from kenotron.models.decoder import Decoder

__all__ = [
    "Decoder",
    "Experts",
    "LinearCrossEntropy",
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
    if name == "Decoder":
        return importlib.import_module("kenotron.models.decoder").Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

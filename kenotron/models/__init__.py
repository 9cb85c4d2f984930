"""Kénotron's own model parts. They are plain torch, and know nothing of ranks."""

from kenotron.models.experts import Experts
from kenotron.models.moe import MoE, MoESettings, Router, balance_loss, set_loss_weight, update_expert_bias, z_loss

__all__ = ["Experts", "MoE", "MoESettings", "Router", "balance_loss", "set_loss_weight", "update_expert_bias", "z_loss"]

"""What pretraining optimizes with: schedules, parameter groups, Muon on shards, parametrisations that transfer over widths."""

from __future__ import annotations

from kenotron.optim.groups import Rule, muon_groups, parameter_groups
from kenotron.optim.muon import Muon
from kenotron.optim.placement import Placement, ShardAware, check_optimizer
from kenotron.optim.schedules import Schedule, ScheduleLR, scheduler_config

__all__ = [
    "Muon",
    "Placement",
    "Rule",
    "Schedule",
    "ScheduleLR",
    "ShardAware",
    "check_optimizer",
    "muon_groups",
    "parameter_groups",
    "scheduler_config",
]

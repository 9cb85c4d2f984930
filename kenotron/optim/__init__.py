"""What pretraining optimizes with: schedules, parameter groups, Muon on shards, parametrisations that transfer over widths."""

from __future__ import annotations

from kenotron.optim.coordinates import Coordinate, coordinate_check, growth
from kenotron.optim.groups import Rule, muon_groups, parameter_groups
from kenotron.optim.muon import Muon
from kenotron.optim.offload import HostState
from kenotron.optim.parametrisation import Parametrised, parametrise, spectral_lr_scale, spectral_std
from kenotron.optim.placement import Placement, ShardAware, check_optimizer
from kenotron.optim.rounding import StochasticAdamW, stochastic_round
from kenotron.optim.schedules import Schedule, ScheduleLR, scheduler_config

__all__ = [
    "Coordinate",
    "HostState",
    "Muon",
    "Parametrised",
    "Placement",
    "Rule",
    "Schedule",
    "ScheduleLR",
    "ShardAware",
    "StochasticAdamW",
    "check_optimizer",
    "coordinate_check",
    "growth",
    "muon_groups",
    "parameter_groups",
    "parametrise",
    "scheduler_config",
    "spectral_lr_scale",
    "spectral_std",
    "stochastic_round",
]

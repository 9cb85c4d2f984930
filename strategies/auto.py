"""Settings that the planner chooses: ``KenotronStrategy(tp="auto", …)``.

1. all ranks: what is ``"auto"`` is noted where the strategy is made.
2. rank 0, once processes are connected: the module's model is built on the meta device (by its ``configure_model``, in a copy
   of the module), and the layouts of it are searched.
3. all ranks: rank 0's choice is theirs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kenotron.devices import DEVICES, Device, identify
from kenotron.parallel.init import deferring
from kenotron.parallel.plan import ParallelPlan, transformers_models
from kenotron.planning.layouts import Job
from kenotron.planning.memory import shortage
from kenotron.planning.model import ModelSpec
from kenotron.planning.planner import Plan, Planned, explain, plan
from kenotron.strategies.settings import AutoSettings

#: What may be "auto", and what it is until the planner has been asked.
DEFAULTS: dict[str, Any] = {
    "tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp_replicate": 1, "zero_stage": 1, "sequence_parallel": False, "recompute": "none",
}  # fmt: skip


def take_apart(settings: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return settings in which nothing is ``"auto"`` any more, and what was."""
    auto = frozenset(name for name in DEFAULTS if isinstance(settings[name], str) and settings[name] == "auto")
    return {name: DEFAULTS[name] if name in auto else value for name, value in settings.items()}, auto


def choose(
    module: nn.Module, auto: frozenset[str], given: Mapping[str, Any], *, world_size: int, precision: str, device: torch.device,
    accumulate: int, settings: AutoSettings, user_plan: ParallelPlan | None, blocks: str | None,
) -> Planned:  # fmt: skip
    """Return the fastest choice that fits, for what is ``auto``; everything else stays as ``given``.

    Raises:
        ValueError: the model is not one that the planner can look into, or nothing fits.
    """
    model = find_model(module)
    config = getattr(model, "config", None)
    seq = settings.sequence_length or min(2048, int(getattr(config, "max_position_embeddings", 0) or 2048))
    fixed = {name: value for name, value in given.items() if name not in auto}
    if fixed.get("tp") == 1 or "tp" in auto:
        fixed = {name: value for name, value in fixed.items() if name != "sequence_parallel" or value}
    job = Job(
        devices=world_size, device=hardware(device), seq=seq, batch=settings.global_batch_size or 8 * world_size * accumulate,
        precision=precision, memory=None if settings.memory_gb is None else settings.memory_gb * 1e9, fixed=fixed,
    )  # fmt: skip
    spec = ModelSpec.of(model, type(model).__name__, _plan_of(module, model, user_plan), blocks)
    found = plan(spec, job, top=1_000_000)
    best = next((one for one in found.best if _goes(one, accumulate)), None)
    if best is None:
        raise ValueError(_nothing(found, auto))
    return best


def _goes(planned: Planned, accumulate: int) -> bool:
    """Whether a choice splits batches as the trainer and a pipeline will."""
    choice = planned.choice
    return accumulate == 1 if choice.layout.pp > 1 else choice.num_microbatches == accumulate


def _nothing(found: Plan, auto: frozenset[str]) -> str:
    names = ", ".join(sorted(auto))
    if found.nearest_miss is not None and shortage(found.nearest_miss.memory, found.job) > 0 and not found.best:
        return f"{names}='auto': {explain(found.nearest_miss, found.job, None)}"
    return (
        f"{names}='auto': no layout of {found.job.devices} processes runs batches of {found.job.batch} samples with the other "
        "settings as they are. Change auto=AutoSettings(global_batch_size=...), accumulate_grad_batches, or what is fixed."
    )


def find_model(module: nn.Module) -> nn.Module:
    """Return the transformers model inside of a module, without its weights where it has none yet.

    Raises:
        ValueError: there is none, or there are several.
    """
    models = transformers_models(module)
    if not models:
        late = copy.deepcopy(module, _shared(module))
        with deferring(draw=False):
            late.configure_model()  # type: ignore[operator]
        models = transformers_models(late)
    if len(models) != 1:
        raise ValueError(
            f"'auto' asks the planner, which looks into one transformers model (or one of kenotron.models); "
            f"{type(module).__name__} has {len(models)}. Set numbers in the place of 'auto'; `kenotron plan` can tell which."
        )
    found: nn.Module = models[0][1]
    return found


def _shared(module: nn.Module) -> dict[int, Any]:
    """Return deepcopy's memo by which a copy of a LightningModule keeps the trainer of the original."""
    trainer = module.__dict__.get("_trainer")
    return {} if trainer is None else {id(trainer): trainer}


def _plan_of(module: nn.Module, model: nn.Module, user_plan: ParallelPlan | None) -> ParallelPlan | None:
    """Return the user's plan with names from the model on, where there is one."""
    prefix = next((name for name, found in transformers_models(module) if found is model), "model")
    if user_plan is None or not user_plan.tensor:
        return None
    styles = {key.removeprefix(f"{prefix}."): style for key, style in user_plan.tensor.items()}
    return ParallelPlan(tensor=styles, blocks=user_plan.blocks)


def hardware(device: torch.device) -> Device:
    """Return what is known of a device; of a CPU: the host's memory, shared by its cores."""
    if device.type == "cuda":
        total = float(torch.cuda.get_device_properties(device).total_memory)
        known = identify(device) or DEVICES["a100"]
        values = {name: getattr(known, name) for name in known.__dataclass_fields__}
        return Device(**{**values, "memory": total})
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    return Device(name="cpu", memory=memory, memory_bandwidth=1e10, peak_flops={"bf16": 1e11, "fp32": 1e11}, link_bandwidth=1e9)

"""A deterministic run is bitwise the same again, also after it was interrupted, with every part of the recipe."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import DP2_PP2, SLOW, TP2_PP2, Classifier, Task, fit

from kenotron.optim import Muon, Schedule, StochasticAdamW, muon_groups, scheduler_config
from kenotron.parallel.recompute import Recompute
from kenotron.strategies.guard import Guard
from kenotron.testing import RankPool


class Recipe(Classifier):
    """Dropout, and an optimizer and a schedule of one's choice."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(dropout=0.3)
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        if self.optimizer == "muon":
            optimizer: Any = Muon(muon_groups(self, lr=0.02), lr=0.02)
        elif self.optimizer == "stochastic":
            optimizer = StochasticAdamW(self.parameters(), lr=0.02)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = Schedule(total_steps=9, warmup_steps=2, decay="1-sqrt", decay_steps=4)
        return {"optimizer": optimizer, "lr_scheduler": scheduler_config(optimizer, schedule)}


RECIPES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "full recompute": (2, {"recompute": "full"}, {}, "adamw"),
    "selective recompute, zero 3": (2, {"recompute": "selective", "zero_stage": 3}, {}, "adamw"),
    "offloaded inputs, every 2nd block": (2, {"recompute": Recompute(mode="full", every=2, offload=True)}, {}, "adamw"),
    "guard, tp2 pp2": (*TP2_PP2, {}, "adamw"),
    "bf16, accumulated, zero 2": (2, {"zero_stage": 2}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, "adamw"),
    "muon, tp2": (2, {"tp": 2}, {}, "muon"),
    "muon, zero 3": (2, {"zero_stage": 3}, {}, "muon"),
    "interleaved pipeline": (2, {"pp": 2, "microbatches": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, {}, "adamw"),
    "recompute, dp2 pp2": (DP2_PP2[0], {**DP2_PP2[1], "recompute": "full"}, {}, "adamw"),
    "stochastic rounding, zero 3": (2, {"zero_stage": 3}, {"precision": "bf16-true"}, "stochastic"),
    "stochastic rounding, zero 0": (2, {"zero_stage": 0}, {"precision": "bf16-true"}, "stochastic"),
    "optimizer on the host, zero 3": (2, {"zero_stage": 3, "offload_optimizer": True}, {}, "adamw"),
    "muon on the host, tp2": (2, {"tp": 2, "offload_optimizer": True}, {}, "muon"),
    "compiled": (2, {"compile": True, "recompute": "selective"}, {}, "adamw"),
}
OFTEN = ("full recompute", "guard, tp2 pp2", "muon, zero 3", "bf16, accumulated, zero 2", "optimizer on the host, zero 3")


def each_epoch(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=SLOW) for name in RECIPES])
def test_an_interrupted_run_repeats_every_bit(pool: RankPool, name: str, tmp_path: Path) -> None:
    ranks, strategy, trainer, optimizer = RECIPES[name]
    strategy = {**strategy, "guard": Guard()}
    task = functools.partial(Task, functools.partial(Recipe, optimizer), strategy, folder=str(tmp_path))
    settings = {**trainer, "max_epochs": 3, "deterministic": True, "gradient_clip_val": 1.0}
    whole = pool.run(fit, ranks, task(trainer=settings, callbacks=[functools.partial(each_epoch, str(tmp_path))]))
    rest = pool.run(fit, ranks, task(trainer=settings, fit={"ckpt_path": str(tmp_path / "epoch=0.ckpt")}))
    for full, part in zip(whole, rest, strict=True):
        assert len(part["losses"]) == 6
        assert part["losses"] == full["losses"][3:]
        assert part["rates"] == full["rates"][3:]
    for key, value in whole[0]["weights"].items():
        assert (rest[0]["weights"][key] == value).all(), key

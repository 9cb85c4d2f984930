"""Ordinary Lightning code, unchanged, under ``kenotron`` and under Lightning's DDP: the same numbers in two processes.

What a step draws from torch's own generator differs on purpose: processes with other samples draw other numbers, and under
DDP all draw the same. So specimens that draw in their steps have a generator of their own.

Each specimen is a module of its own: ``build()``, ``loaders()``, and where it needs them ``callbacks()``, ``TRAINER``,
``after(trainer, module)`` and ``REFERENCE``: what it is compared with, where DDP is wrong.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from strategy_helpers import close, floats, make_trainer

from kenotron.testing import RankPool

HERE = Path(__file__).parent
SPECIMENS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("test_zoo", "zoo_data", "conftest"))


def train(name: str, strategy: str) -> dict[str, Any]:
    """Return what a specimen came to: its metrics, what its module holds, how many steps it made."""
    specimen: Any = importlib.import_module(name)
    L.seed_everything(5, verbose=False)
    module = specimen.build()
    callbacks = specimen.callbacks() if hasattr(specimen, "callbacks") else []
    trainer = make_trainer(strategy, callbacks, **{"use_distributed_sampler": True, **getattr(specimen, "TRAINER", {})})
    trainer.fit(module, **specimen.loaders())
    if hasattr(specimen, "after"):
        specimen.after(trainer, module)
    held = {key: value.float().numpy().copy() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {"metrics": floats(trainer.callback_metrics), "held": held, "step": trainer.global_step}


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_specimen_comes_to_the_same_as_under_ddp(pool: RankPool, name: str) -> None:
    ranks, strategy = getattr(importlib.import_module(name), "REFERENCE", (2, "ddp_find_unused_parameters_true"))
    expected = pool.run(train, ranks, name, strategy)[0]  # of rank 0, whose buffers are the model's
    assert expected["step"] > 3
    for rank, found in enumerate(pool.run(train, 2, name, "kenotron")):
        close(found, expected, 1e-6, f"rank {rank}")

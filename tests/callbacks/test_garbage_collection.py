"""Python's garbage collector during and after training."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
import pytest
from recorder_helpers import Model, loader, quiet

from kenotron.callbacks import GarbageCollection


class Watched(Model):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.enabled = fails, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.enabled.append(gc.isenabled())
        if self.fails:
            raise RuntimeError("no")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_off_in_steps_and_as_before_afterwards(fails: bool) -> None:
    quiet()
    module, before = Watched(fails), gc.isenabled()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, callbacks=[GarbageCollection(1)],
        enable_checkpointing=False,
    )  # fmt: skip
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            trainer.fit(module, loader(8))
    else:
        trainer.fit(module, loader(8))
    assert not any(module.enabled) and gc.isenabled() == before


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="generation=3"):
        GarbageCollection(generation=3)

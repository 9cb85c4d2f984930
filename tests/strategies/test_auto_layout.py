"""``tp="auto"`` and its like: what the planner chooses is what all ranks train on."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import kenotron
from kenotron.strategies import AutoSettings
from kenotron.testing import RankPool, RanksFailedError

CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256, "num_attention_heads": 4, "intermediate_size": 128,
    "num_key_value_heads": 2,
}  # fmt: skip


class Late(L.LightningModule):
    """A model that is built in ``configure_model``, as large ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def configure_model(self) -> None:
        from transformers import LlamaConfig

        if self.model is None:
            self.model = kenotron.models.Decoder(LlamaConfig(**CONFIG))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(settings: dict[str, Any], auto: AutoSettings) -> str:
    import kenotron.models

    strategy = kenotron.KenotronStrategy(**settings, auto=auto)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(0))
    trainer.fit(Late(), DataLoader(data, batch_size=4))
    assert trainer.global_step == 2
    return strategy.layout.table(max_rows=0)


@pytest.mark.timeout(300)
def test_all_ranks_train_on_what_was_planned(pool: RankPool) -> None:
    everything = dict.fromkeys(("tp", "pp", "cp", "zero_stage", "recompute", "sequence_parallel"), "auto")
    told = pool.run(fit, 2, everything, AutoSettings(sequence_length=32, global_batch_size=8), timeout_s=250)
    assert len(set(told)) == 1 and "world 2" in told[0]
    # What is given stays: with dp and tp of one rank only stages are left.
    told = pool.run(fit, 2, {"pp": "auto", "dp": 1}, AutoSettings(sequence_length=32, global_batch_size=8), timeout_s=250)
    assert set(told) == {told[0]} and told[0].startswith("pp 2")


@pytest.mark.timeout(300)
def test_what_never_fits_says_so_on_every_rank(pool: RankPool) -> None:
    small = AutoSettings(sequence_length=32, global_batch_size=8, memory_gb=1e-4)
    with pytest.raises(RanksFailedError) as error:
        pool.run(fit, 2, {"tp": "auto", "zero_stage": "auto"}, small, timeout_s=250)
    for rank in (0, 1):
        assert f"--- rank {rank} of 2 ---" in str(error.value)
    assert str(error.value).count("MB are missing") >= 2


def test_a_module_that_cannot_be_looked_into_is_refused() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=kenotron.KenotronStrategy(tp="auto"), logger=False, enable_checkpointing=False
    )
    with pytest.raises(ValueError, match="Set numbers in the place of 'auto'"):
        trainer.fit(Plain(), DataLoader(torch.zeros(4, 2)))

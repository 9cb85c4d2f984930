"""Weights that Lightning's callback prunes after each epoch, with masks as buffers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from zoo_data import CLASSES, WIDTH, shuffled


class Pruned(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def callbacks() -> list[Any]:
    return [ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False)]


build, loaders = Pruned, lambda: {"train_dataloaders": shuffled()}

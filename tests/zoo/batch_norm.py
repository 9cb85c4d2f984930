"""A classifier with batch norm, validated and tested by its running statistics."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from zoo_data import CLASSES, WIDTH, shuffled


class BatchNorm(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=None)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        told = self(batch[0])
        self.log("val_loss", cross_entropy(told, batch[1]), sync_dist=True)
        self.log("val_accuracy", (told.argmax(1) == batch[1]).float().mean(), sync_dist=True)


build, loaders = BatchNorm, lambda: {"train_dataloaders": shuffled(), "val_dataloaders": shuffled(24)}

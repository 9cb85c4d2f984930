"""Two optimizers of different kinds, each with a schedule of its own, stepped in turns."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from zoo_data import CLASSES, WIDTH, shuffled


class MultiOptimizer(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU()), nn.Linear(16, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        chosen = batch_idx % 2
        optimizer, schedule = self.optimizers()[chosen], self.lr_schedulers()[chosen]
        loss = cross_entropy(self.head(self.body(batch[0])), batch[1])
        for each in self.optimizers():
            each.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule.step()
        self.log("loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(self.body.parameters(), lr=0.1), torch.optim.AdamW(self.head.parameters(), lr=0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in optimizers]


build, loaders = MultiOptimizer, lambda: {"train_dataloaders": shuffled()}

"""Parametrised weights: weight norm, spectral norm, an orthogonal matrix."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from zoo_data import CLASSES, WIDTH, shuffled


class Parametrised(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            weight_norm(nn.Linear(WIDTH, 16)), nn.ReLU(), spectral_norm(nn.Linear(16, 8)), orthogonal(nn.Linear(8, CLASSES))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


build, loaders = Parametrised, lambda: {"train_dataloaders": shuffled()}

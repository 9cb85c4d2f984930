"""Two views, and a target network that follows by ``t.data = …`` after each batch."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from zoo_data import WIDTH, shuffled


class Byol(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.noise = torch.Generator().manual_seed(1)
        self.predictor = nn.Linear(8, 8)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, two = (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.noise) for _ in range(2))
        with torch.no_grad():
            wanted = self.target(two)
        loss = 1 - cosine_similarity(self.predictor(self.online(one)), wanted).mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            target.data = 0.9 * target.data + 0.1 * mine.data

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.online.parameters(), *self.predictor.parameters()], lr=0.05, momentum=0.9)


build, loaders = Byol, lambda: {"train_dataloaders": shuffled()}

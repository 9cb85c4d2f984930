"""A momentum encoder moved within the step, and a queue of keys that all processes fill."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from zoo_data import WIDTH, shuffled


class Moco(L.LightningModule):
    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)
        self.query = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 8))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(24, 8), dim=1))

    @torch.no_grad()
    def keys_of(self, x: Tensor) -> Tensor:
        for mine, other in zip(self.query.parameters(), self.key.parameters(), strict=True):
            other.mul_(0.95).add_(mine, alpha=0.05)
        return normalize(self.key(x), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        keys, queries = self.keys_of(x + 0.1 * torch.randn(x.shape, generator=self.noise)), normalize(self.query(x), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.T], dim=1) / 0.2
        loss = cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        self.queue = torch.cat([self.all_gather(keys).flatten(0, -2), self.queue])[: len(self.queue)]
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.query.parameters(), lr=0.1, weight_decay=1e-4)


build, loaders = Moco, lambda: {"train_dataloaders": shuffled()}

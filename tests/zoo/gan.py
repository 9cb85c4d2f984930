"""A GAN, by hand: two optimizers, each of its own half, toggled."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from zoo_data import WIDTH, shuffled


class Gan(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.noise = torch.Generator().manual_seed(1)
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def says(self, x: Tensor, real: bool) -> Tensor:
        told = self.critic(x)
        return binary_cross_entropy_with_logits(told, torch.full_like(told, float(real)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, noise = batch[0], torch.randn(len(batch[0]), 3, generator=self.noise)
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = self.says(self(noise), True)
        self.log("generator", loss, sync_dist=True)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        loss = (self.says(x, True) + self.says(self(noise).detach(), False)) / 2
        self.log("critic", loss, sync_dist=True)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(half.parameters(), lr=0.01, betas=(0.5, 0.9)) for half in (self.generator, self.critic)]


build, loaders = Gan, lambda: {"train_dataloaders": shuffled()}

"""A critic whose slope is held at 1: second derivatives."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from zoo_data import WIDTH, shuffled


class Penalty(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)
        self.critic = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        real, made = batch[0], torch.randn(batch[0].shape, generator=self.noise)
        between = torch.lerp(real, made, torch.rand(len(real), 1, generator=self.noise)).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        loss = self.critic(made).mean() - self.critic(real).mean() + 10 * penalty
        self.log_dict({"loss": loss, "penalty": penalty}, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.005, betas=(0.0, 0.9))


build, loaders = Penalty, lambda: {"train_dataloaders": shuffled()}

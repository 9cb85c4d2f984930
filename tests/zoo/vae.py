"""A variational autoencoder whose latents are drawn in the step, with a learning rate schedule."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from zoo_data import WIDTH, shuffled


class Vae(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.noise = torch.Generator().manual_seed(1)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        mean, deviation = self.encoder(batch[0]).chunk(2, dim=1)
        posterior = Normal(mean, deviation.exp())
        made = self.decoder(mean + deviation.exp() * torch.randn(mean.shape, generator=self.noise))
        likely = Normal(made, self.log_scale.exp()).log_prob(batch[0]).sum(1)
        divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
        loss = (divergence - likely).mean()
        self.log_dict({"loss": loss, "divergence": divergence.mean()}, sync_dist=True)
        return {"loss": loss, "made": made.detach()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


build, loaders = Vae, lambda: {"train_dataloaders": shuffled()}

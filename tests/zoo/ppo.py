"""Proximal policy optimization by hand: several clipped updates of what was played before."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributions import Categorical
from zoo_data import WIDTH, shuffled


class Ppo(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.noise = torch.Generator().manual_seed(1)
        self.actor, self.critic = (nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, n)) for n in (3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        place, optimizer = batch[0], self.optimizers()
        with torch.no_grad():
            played = Categorical(logits=self.actor(place))
            action = torch.multinomial(played.probs, 1, generator=self.noise)[:, 0]
            before, gain = played.log_prob(action), (action == batch[1]).float()
        for _ in range(3):
            policy = Categorical(logits=self.actor(place))
            value = self.critic(place)[:, 0]
            ratio, better = (policy.log_prob(action) - before).exp(), gain - value.detach()
            kept = torch.minimum(ratio * better, ratio.clamp(0.8, 1.2) * better).mean()
            loss = -kept + 0.5 * (value - gain).square().mean() - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
        self.log("loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


build, loaders = Ppo, lambda: {"train_dataloaders": shuffled()}

"""Q-learning that plays with its own network in the data set, and copies it to a target now and then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class Walk(IterableDataset):
    """A walk along a line towards 1, in steps that the network chooses."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.agent.global_rank)
        place = torch.zeros(2)
        for _ in range(32):
            with torch.no_grad():
                action = int(self.agent.net(place).argmax()) if torch.rand((), generator=generator) > 0.3 else 0
            after = (place + torch.tensor([0.2 * (2 * action - 1), 0.1])).clamp(-1, 1)
            yield place, action, 1 - (after[0] - 1).abs(), after
            place = after if torch.rand((), generator=generator) > 0.1 else torch.zeros(2)


class Dqn(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.target = (nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        place, action, reward, after = batch
        value = self.net(place).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            wanted = reward + 0.9 * self.target(after).max(1).values
        if self.global_step % 3 == 0:
            self.target.load_state_dict(self.net.state_dict())
        loss = nn.functional.mse_loss(value, wanted)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(Walk(self), batch_size=4)


build, loaders = Dqn, dict

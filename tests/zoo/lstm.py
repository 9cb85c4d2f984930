"""An LSTM with backpropagation through a few steps at a time, by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Lstm(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lstm, self.head = nn.LSTM(3, 8, num_layers=2, batch_first=True), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, state = self.optimizers(), None
        for part in batch[0].split(5, dim=1):
            told, state = self.lstm(part[:, :-1], state)
            loss = (self.head(told) - part[:, 1:]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            state = tuple(each.detach() for each in state)
            self.log("loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=0.005)


def series() -> Tensor:
    phase = torch.arange(32)[:, None, None] * 0.7
    return (phase + torch.arange(15)[:, None] * torch.tensor([0.3, 0.5, 0.7])).sin()


build, loaders = Lstm, lambda: {"train_dataloaders": DataLoader(TensorDataset(series()), batch_size=4)}

"""An IterableDataset without a length, split over processes by its own hand, with accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from zoo_data import CLASSES, WIDTH, points


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        samples = points(64)
        yield from (samples[index] for index in range(get_rank(), len(samples), get_world_size()))


class Streamed(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


build, loaders = Streamed, lambda: {"train_dataloaders": DataLoader(Stream(), batch_size=4)}
TRAINER = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_steps": 7, "max_epochs": -1}

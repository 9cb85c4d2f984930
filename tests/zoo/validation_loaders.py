"""Several validation loaders, one of them of batches of another size."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from zoo_data import CLASSES, WIDTH, shuffled


class SeveralLoaders(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)
        self.log("all_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True, add_dataloader_idx=dataloader_idx == 1)


def loaders() -> dict[str, Any]:
    return {"train_dataloaders": shuffled(), "val_dataloaders": [shuffled(24), shuffled(16, 4)]}


build = SeveralLoaders

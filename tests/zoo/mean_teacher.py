"""A teacher that is the running mean of its student, and validates."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from zoo_data import CLASSES, WIDTH, shuffled


class MeanTeacher(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.teacher = copy.deepcopy(self.student)
        for param in self.teacher.parameters():
            param.detach_()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        told = self.student(batch[0])
        loss = cross_entropy(told, batch[1]) + mse_loss(told, self.teacher(batch[0]))
        self.log("loss", loss, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.teacher(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.student.parameters(), lr=0.01)


build, loaders = MeanTeacher, lambda: {"train_dataloaders": shuffled(), "val_dataloaders": shuffled(24)}

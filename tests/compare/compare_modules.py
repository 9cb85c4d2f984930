"""A module and data as a user would write them, which know nothing of strategies."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return hidden


class Classifier(L.LightningModule):
    """Layers, and a loose parameter, directly in the module."""

    def __init__(self, depth: int = 4, width: int = 16, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.embed, self.shift = nn.Linear(8, width), nn.Parameter(torch.full((width,), 0.1))
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def parallel_plan(self) -> dict[str, str]:
        return {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.embed(x) + self.shift
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Late(L.LightningModule):
    """Built in ``configure_model``, of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = nn.Sequential(nn.Embedding(32, 16), Block(16), Block(16), nn.Linear(16, 32))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        return F.cross_entropy(self.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        ids = torch.randint(32, (60, 12), generator=torch.Generator().manual_seed(1))
        return DataLoader([{"input_ids": row} for row in ids], batch_size=4)  # type: ignore[arg-type]


class Broken(L.LightningModule):
    def __init__(self) -> None:
        raise RuntimeError("there is no such thing")


class Rows(L.LightningDataModule):
    """Shuffled; its last batch is smaller than the others."""

    def __init__(self, rows: int = 50, batch: int = 4) -> None:
        super().__init__()
        self.rows, self.batch = rows, batch

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(self.rows, 8, generator=generator)
        y = (x @ torch.randn(8, 3, generator=generator)).argmax(1)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch, shuffle=True)

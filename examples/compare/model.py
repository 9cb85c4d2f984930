"""A small language model and its data, in plain Lightning: nothing here knows of strategies.

kenotron compare --model model.Model --data model.Sources --devices 2 --strategies ddp fsdp kenotron kenotron:tp=2
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Attention(nn.Module):
    """Causal attention with heads of ``head_size``."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # As many heads as there are columns: a tensor-parallel rank has a share of both.
        query, key, value = (
            part(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, head_size)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Model(L.LightningModule):
    """A transformer on bytes."""

    def __init__(self, width: int = 128, depth: int = 4, head_size: int = 32, length: int = 128, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width, head_size) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def parallel_plan(self) -> dict[str, str]:
        """Say what tensor parallelism makes of the layers; data and pipeline parallelism need nothing of it."""
        columns = {f"layers.*.attention.{name}": "colwise" for name in ("query", "key", "value")}
        return columns | {"layers.*.attention.out": "rowwise", "layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs, labels = batch[:, :-1], batch[:, 1:]
        x = self.embed(inputs) + self.position(torch.arange(inputs.shape[1], device=inputs.device))
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Sources(L.LightningDataModule):
    """The standard library's sources, cut into samples of bytes."""

    def __init__(self, length: int = 128, batch: int = 8) -> None:
        super().__init__()
        self.length, self.batch = length, batch

    def train_dataloader(self) -> Any:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
        text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
        samples = text[: len(text) // (self.length + 1) * (self.length + 1)].view(-1, self.length + 1)
        return DataLoader(samples, batch_size=self.batch, shuffle=True)  # type: ignore[arg-type]

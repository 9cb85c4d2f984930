"""Data of the specimens: points of four classes, in random order."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

CLASSES, WIDTH = 4, 6


def points(count: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=generator)
    centre = torch.randn(CLASSES, WIDTH, generator=generator)
    return TensorDataset(centre[label] + 0.3 * torch.randn(count, WIDTH, generator=generator), label)


def shuffled(count: int = 48, batch: int = 6) -> DataLoader:
    return DataLoader(points(count), batch_size=batch, shuffle=True)

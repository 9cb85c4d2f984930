"""What the tests of callbacks for operations share: a small module that any layout takes, and a trainer."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

import kenotron


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return hidden


class Net(L.LightningModule):
    """Layers in a LightningModule. ``on_step`` is called at the start of each training step."""

    def __init__(self, depth: int = 4, width: int = 16, on_step: Callable[[L.LightningModule], None] | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.on_step = on_step

    def parallel_plan(self) -> dict[str, str]:
        return {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.on_step is not None:
            self.on_step(self)
        x = self.embed(batch[0])
        for layer in self.layers:
            x = layer(x)
        loss = F.cross_entropy(self.head(x), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class KeepLosses(L.Callback):
    """Keeps the loss of each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


class KeepLogger(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    name = version = "keep"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step or 0, dict(metrics)))

    def values(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for step, metrics in self.seen if name in metrics]


def data(rows: int = 64, batch: int = 8) -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 8, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch)


class ResumableData:
    """The batches of `data`, beginning where a checkpoint says."""

    def __init__(self) -> None:
        self.batches, self.next = list(data()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def make_trainer(strategy: Mapping[str, Any] | str, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """Return a trainer on the ranks that the environment tells of."""
    warnings.filterwarnings("ignore", message=".*(num_workers|GPU available|log_every_n_steps).*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": int(os.environ.get("WORLD_SIZE", "1")), "max_steps": 8, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    made = strategy if isinstance(strategy, str) else kenotron.KenotronStrategy(**strategy)
    return L.Trainer(strategy=made, callbacks=list(callbacks), **defaults | settings)

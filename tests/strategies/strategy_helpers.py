"""What the strategy tests share: tiny modules and data, and `fit`, which trains them on one rank of any layout."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import kenotron
from kenotron.testing import RankPool

FEATURES, WIDTH, CLASSES = 8, 16, 3

SLOW = pytest.mark.slow  # repeats on a further layout what another case tries

PP2 = (2, {"pp": 2, "microbatches": 4})
TP2_PP2 = (4, {"tp": 2, "pp": 2, "microbatches": 4})
DP2_PP2 = (4, {"pp": 2, "microbatches": 2})
DP2 = (2, {})


# ------------------------------------------------------------------------------------------------------------- modules


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        return hidden


class Classifier(L.LightningModule):
    """Layers directly in the LightningModule, and a loose parameter."""

    def __init__(self, depth: int = 4, dropout: float = 0.0, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1))
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)

    def parallel_plan(self) -> dict[str, str]:
        return {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.shift
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], eps=1e-6)


class Rows(Dataset[Any]):
    """Random features with classes that a linear rule gives, the same in every process."""

    def __init__(self, count: int, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, FEATURES, generator=generator)
        self.y = (self.x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(dim=1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def loader(data: Dataset[Any], batch: int, rank: int = 0, size: int = 1, collate: Any = None) -> DataLoader[Any]:
    """Return one data-parallel rank's share of each global batch of ``batch`` samples."""
    count = len(data)  # type: ignore[arg-type]
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    own = [row for rows in batches for row in rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]]
    return DataLoader(Subset(data, own), batch_size=batch // size, collate_fn=collate)


# ------------------------------------------------------------------------------------------------- one rank's training


@dataclass
class Task:
    """What one rank trains.

    Args:
        module, settings: class and arguments. strategy: arguments of KenotronStrategy; ``None``: plain Lightning; or a name.
        trainer: arguments of Trainer. callbacks: without arguments, return a callback.
        rows, batch: size of the data and of a global batch. collate: of the loaders.
        folder: where weights are written.
    """

    module: Callable[..., Any]
    strategy: Mapping[str, Any] | str | None
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callable[[], Any]] = ()
    rows: int = 22
    batch: int = 8
    collate: Any = None
    val_rows: int = 12
    fit: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    with_weights: bool = True


class Keep(L.Callback):
    """Keeps losses, learning rates, and what callbacks see at the end of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        if "train_loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.rates += [group["lr"] for optimizer in trainer.optimizers[:1] for group in optimizer.param_groups[:1]]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(floats(trainer.callback_metrics))


def floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_trainer(strategy: Any, callbacks: Sequence[Any] = (), **settings: Any) -> L.Trainer:
    quiet()
    if isinstance(strategy, Mapping):
        strategy = kenotron.KenotronStrategy(**strategy)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return L.Trainer(strategy=strategy or "auto", callbacks=list(callbacks), **{**defaults, **settings})


def data_rank(trainer: L.Trainer) -> tuple[int, int]:
    """Return this process' data-parallel rank and their number."""
    layout = getattr(trainer.strategy, "layout", None)
    if layout is None:
        return trainer.global_rank, trainer.world_size
    return layout.dp_rank(int(os.environ.get("RANK", "0"))), layout.dp_size


def loaders(trainer: L.Trainer, task: Task) -> tuple[DataLoader[Any], DataLoader[Any]]:
    rank, size = data_rank(trainer)
    train = loader(Rows(task.rows), task.batch, rank, size, task.collate)
    return train, loader(Rows(task.val_rows, seed=4), 4, rank, size, task.collate)


def whole_weights(trainer: L.Trainer, folder: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return the module's whole weights, on every rank."""
    if not isinstance(trainer.strategy, kenotron.KenotronStrategy):
        state = trainer.lightning_module.state_dict()
    else:
        path = str(Path(folder) / f"weights-{trainer.strategy.broadcast(uuid.uuid4().hex)}")
        trainer.save_checkpoint(path, weights_only=True)
        trainer.strategy.barrier()
        state = kenotron.load_state_dict(path)
    return {name: value.detach().float().numpy().copy() for name, value in state.items()}


def fit(task: Task) -> dict[str, Any]:
    """Train on this rank. Returns losses, metrics and whole weights, and the module's ``seen`` if it keeps that."""
    L.seed_everything(1, verbose=False)
    module = task.module(**task.settings)
    keep = Keep()
    trainer = make_trainer(task.strategy, [make() for make in task.callbacks] + [keep], **task.trainer)
    train, val = loaders(trainer, task)
    trainer.fit(module, train, val if task.val_rows else None, **task.fit)
    return {
        "losses": keep.losses,
        "rates": keep.rates,
        "epochs": keep.epochs,
        "metrics": floats(trainer.callback_metrics),
        "seen": getattr(module, "seen", None),
        "step": trainer.global_step,
        "weights": whole_weights(trainer, task.folder) if task.with_weights else {},
    }


# ---------------------------------------------------------------------------------------------------------- comparison


def close(found: Any, expected: Any, tolerance: float = 1e-5, where: str = "") -> None:
    """Assert that two nested results agree up to ``tolerance``, relative to the largest number compared."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), f"{where}: {sorted(found)} instead of {sorted(expected)}"
        for key in expected:
            close(found[key], expected[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), f"{where}: {found} instead of {expected}"
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            close(one, other, tolerance, f"{where}[{index}]")
    elif isinstance(expected, float | np.ndarray | Tensor):
        a, b = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        assert a.shape == b.shape, f"{where}: shape {a.shape} instead of {b.shape}"
        assert not np.isnan(b).any(), f"{where}: {b}"
        bar = tolerance * max(1.0, float(np.abs(b).max(initial=0.0)))
        assert float(np.abs(a - b).max(initial=0.0)) <= bar, f"{where}: {a} instead of {b}"
    else:
        assert found == expected, f"{where}: {found!r} instead of {expected!r}"


def fit_like_one_process(
    pool: RankPool,
    module: Callable[..., Any],
    layout: tuple[int, Mapping[str, Any]],
    folder: Path,
    *,
    weights: float = 1e-4,
    **task: Any,
) -> list[dict[str, Any]]:
    """Train on ``layout`` and in one process of plain Lightning, and assert that all ranks got what that got."""
    ranks, strategy = layout
    key = repr((module, sorted(task.items())))
    if key not in _one_process:
        _one_process[key] = pool.run(fit, 1, Task(module, None, **task))[0]
    expected = _one_process[key]
    found = pool.run(fit, ranks, Task(module, dict(strategy), folder=str(folder), **task))
    for rank, result in enumerate(found):
        for key in ("losses", "rates", "epochs", "metrics", "step"):
            close(result[key], expected[key], where=f"rank {rank} {key}")
        close(result["weights"], expected["weights"], weights, f"rank {rank} weights")
    assert expected["losses"], "nothing was trained"
    return [expected, *found]


#: What one process got, by task: layouts share it.
_one_process: dict[str, dict[str, Any]] = {}

"""Tiny language models, and `train`, which runs them on one rank of any layout with an optimizer of the test's."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, MixtralConfig

import kenotron
from kenotron.models import Decoder

VOCABULARY, LENGTH, ROWS = 32, 8, 8

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
}


def decoder(**settings: Any) -> nn.Module:
    return Decoder(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **settings}))


def experts(**settings: Any) -> nn.Module:
    return Decoder(MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **settings}))


def token_rows(steps: int) -> Tensor:
    """Return ``[steps, ROWS, LENGTH]`` tokens, the same in every process."""
    return torch.randint(0, VOCABULARY, (steps, ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


class Task(L.LightningModule):
    """A causal language model and the optimizer that a test gives."""

    def __init__(self, make: Callable[[], nn.Module], optimizers: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.make, self.optimizers_of = make, optimizers
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


@dataclass(frozen=True)
class Run:
    """What one rank trains.

    Args:
        strategy: of KenotronStrategy. steps: updates in all. path: where the end is saved.
        resume: a checkpoint to go on from, after ``skip`` batches.
    """

    make: Callable[[], nn.Module]
    optimizers: Callable[[nn.Module], Any]
    strategy: Mapping[str, Any]
    steps: int = 4
    path: str = ""
    resume: str | None = None
    skip: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)


def train(run: Run) -> list[float]:
    """Train on this rank and save a checkpoint. Returns the losses."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    L.seed_everything(1, verbose=False)
    losses: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    strategy = kenotron.KenotronStrategy(**run.strategy)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=run.steps,
        max_epochs=-1,
        callbacks=[Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **run.trainer,
    )
    rank, size = strategy.layout.dp_rank(int(os.environ["RANK"])), strategy.layout.dp_size
    share = ROWS // size
    batches = [rows[rank * share : (rank + 1) * share] for rows in token_rows(8)[run.skip :]]
    trainer.fit(Task(run.make, run.optimizers), DataLoader(batches, batch_size=None), ckpt_path=run.resume)
    if run.path:
        trainer.save_checkpoint(run.path)
    strategy.barrier()
    return losses

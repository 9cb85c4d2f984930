"""A plain LightningModule around transformers' Llama. Nothing in it knows of tensor, pipeline or data parallelism."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


class LlamaModule(L.LightningModule):
    """Pretrain a Llama from scratch.

    Args:
        config: the arguments of ``LlamaConfig``; a dictionary, so that checkpoints can hold it.
        learning_rate: at its peak. warmup_steps: until it is reached. total_steps: until it has fallen to a tenth.
    """

    def __init__(self, config: dict[str, Any], learning_rate: float, warmup_steps: int, total_steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: LlamaForCausalLM | None = None

    def configure_model(self) -> None:
        if self.model is None:  # Lightning calls this hook once for fit and once for validate
            self.model = LlamaForCausalLM(LlamaConfig(**self.hparams.config))

    def loss(self, tokens_BS: Tensor) -> Tensor:
        """Return the mean cross-entropy of every next token, in nats."""
        assert self.model is not None
        loss: Tensor = self.model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_factor(self, step: int) -> float:
        """Return the share of the peak: a linear warm-up, then half a cosine down to 0.1."""
        warmup, total = self.hparams.warmup_steps, self.hparams.total_steps
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.55 + 0.45 * math.cos(math.pi * done)

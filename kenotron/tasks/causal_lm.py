"""A causal language model to train, from a configuration or a Hugging Face directory, with nothing left to write."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from kenotron.callbacks import Perplexity
from kenotron.data.rows import IGNORED
from kenotron.optim import Rule, Schedule, parameter_groups, scheduler_config
from kenotron.strategies.base import StrategyBase


class CausalLM(L.LightningModule):
    """Pretrain or fine-tune a causal language model: AdamW, a schedule, and losses that weigh every token alike.

    Batches are those of :class:`kenotron.TokenData` and its like, or what transformers' collators make: ``input_ids``, with
    ``labels`` or ``shift_labels``, ``attention_mask``, ``position_ids``; without labels, all of ``input_ids`` that is not
    padding is learned. A bare tensor of ids is a batch as well.

    Logs ``loss``, of each training batch, and ``val_loss/<corpus>`` and ``perplexity/<corpus>`` of each validation set, in nats
    per token, over all ranks. Under ``KenotronStrategy`` gradients are those of the mean over all tokens of an update; under
    other strategies they are the mean of the means of batches and ranks.

    Args:
        model: a Hugging Face directory, or a transformers configuration as a mapping with ``model_type`` and what differs from
            that type's defaults.
        from_scratch: of a directory, take the configuration alone.
        implementation: ``"auto"``: Kénotron's own model where it covers the configuration, otherwise transformers';
            ``"kenotron"`` and ``"transformers"`` force one. settings: further arguments of the model, as ``attention``.
        learning_rate: at its peak. weight_decay: of matrices; norms, biases and embeddings do not decay. betas, eps: of AdamW.
        rules: exceptions by names of weights.
        warmup_steps: updates until the peak. total_steps: until the end of the decay; ``None``: as many as the trainer will do.
        decay: ``"cosine"``, ``"linear"`` or ``"1-sqrt"``. minimum: the share of the rate that it ends with.
        decay_steps: of the last updates that alone decay; ``None``: all after the warm-up.

    Raises:
        ValueError: a configuration without ``model_type``, or an optimizer's setting out of range.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | str | os.PathLike[str],
        from_scratch: bool = False,
        implementation: Literal["auto", "kenotron", "transformers"] = "auto",
        settings: Mapping[str, Any] | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rules: Sequence[Rule] = (),
        warmup_steps: int = 0,
        total_steps: int | None = None,
        decay: Literal["cosine", "linear", "1-sqrt"] = "cosine",
        minimum: float = 0.1,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, Mapping) and not isinstance(model.get("model_type"), str):
            raise ValueError(
                "model is a configuration without model_type. Name the family, as in {'model_type': 'llama', ...}, or give the "
                "path of a Hugging Face directory."
            )
        given = dict(model) if isinstance(model, Mapping) else os.fspath(model)
        self.save_hyperparameters({"model": given, "implementation": implementation, "settings": dict(settings or {})})
        self._given, self._from_scratch = given, from_scratch
        self._implementation, self._settings = implementation, dict(settings or {})
        self._adamw = {"lr": learning_rate, "betas": (betas[0], betas[1]), "eps": eps, "weight_decay": weight_decay}
        self._rules = tuple(rules)
        self._schedule = {"warmup_steps": warmup_steps, "decay": decay, "minimum": minimum, "decay_steps": decay_steps}
        self._total_steps = total_steps
        self.model: Any = None

    def configure_model(self) -> None:
        """Build the model; under a Kénotron strategy each rank makes, or reads, its own part alone."""
        if self.model is not None:  # Lightning calls this hook once for fit and once for validate
            return
        from kenotron.hf import from_hf
        from kenotron.hf.configuration import load_config, make_config
        from kenotron.models.own import build

        if isinstance(self._given, str) and not self._from_scratch:
            self.model = from_hf(self._given, implementation=self._implementation, **self._settings)
            return
        if isinstance(self._given, str):
            config = load_config(self._given)
        else:
            config = make_config(self._given)
        self.model = build(config, self._implementation, **self._settings)
        self.model.train()

    def configure_callbacks(self) -> list[L.Callback]:
        """Return what turns losses of validation batches into those of corpora."""
        return [Perplexity()]

    # ---------------------------------------------------------------------------------------------------------- steps

    def forward(self, **batch: Any) -> Any:
        """Return what the model does for a batch."""
        return self.model(**batch)

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss over what is learned of a batch, in nats, and how many tokens that is: scalars."""
        batch = _with_labels(batch)
        labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
        num_tokens = (labels != IGNORED).sum()
        # The sum over one more than none: a microbatch may be all padding.
        loss: Tensor = self.model(**batch, use_cache=False, num_items_in_batch=num_tokens.clamp(min=1)).loss
        return loss, num_tokens

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of a batch: a sum with its tokens where the strategy weighs by them, otherwise a mean."""
        loss, num_tokens = self._loss(batch)
        total = loss * num_tokens
        # Sums over microbatches and ranks, of which `on_after_backward` makes the mean over tokens.
        for name, value in (("loss_sum", total.detach()), ("num_tokens", num_tokens)):
            self.log(name, value.float(), on_step=True, reduce_fx="sum", sync_dist=True, logger=False)
        if isinstance(self.trainer.strategy, StrategyBase):
            return {"loss": total, "num_tokens": num_tokens}
        return loss

    def on_after_backward(self) -> None:
        """Log the mean loss over the tokens of all ranks: callbacks see it when the batch ends."""
        found = self.trainer.callback_metrics
        self.log("loss", found["loss_sum"] / found["num_tokens"].clamp(min=1), prog_bar=True, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the sum of losses and the number of tokens."""
        loss, num_tokens = self._loss(batch)
        return {"loss": loss * num_tokens, "num_tokens": num_tokens}

    # ------------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> Any:
        """Return AdamW with its groups, and the schedule."""
        settings: Any = dict(self._adamw)
        groups = parameter_groups(self, lr=settings["lr"], weight_decay=settings.pop("weight_decay"), rules=self._rules)
        optimizer = torch.optim.AdamW(groups, **settings)
        total_steps = self._total_steps or self.trainer.estimated_stepping_batches
        if not math.isfinite(total_steps):
            raise ValueError(
                "the training has no end that a schedule could decay to. Set total_steps, or max_steps of the trainer."
            )
        schedule: Any = dict(self._schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": scheduler_config(optimizer, Schedule(total_steps=int(total_steps), **schedule)),
        }


def _with_labels(batch: Any) -> dict[str, Any]:
    """Return a batch as models take it, with labels.

    Raises:
        ValueError: it is no batch of token ids.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        names = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else "nothing by name"
        raise ValueError(
            f"a batch is a {type(batch).__name__} with {names}. Give a mapping with input_ids, and labels or shift_labels."
        )
    found = dict(batch)
    if "labels" not in found and "shift_labels" not in found:
        mask = found.get("attention_mask")
        found["labels"] = found["input_ids"] if mask is None else found["input_ids"].masked_fill(mask == 0, IGNORED)
    return found

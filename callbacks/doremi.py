"""Weights of corpora by group distributionally robust optimization."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import functional as F

from kenotron.strategies.base import StrategyBase


class DoReMi(L.Callback):
    """Find the weights with which corpora should be blended: it owns them while a small proxy model is trained.

    The proxy is trained on batches that take the corpora evenly. In ``training_step`` it hands its losses and those of a
    trained reference model to :meth:`loss`. A corpus on which the proxy is still worse than the reference gets more weight in
    the loss, the others less. What comes out are the mean weights over all steps (Algorithm 1 of arXiv 2305.10429), kept in
    checkpoints.

    Args:
        corpora: their names, in the order of their numbers in batches (``Sampling(corpus_ids=True)``: that of ``TokenData``).
        step_size: of the update of weights by losses in nats (η). smoothing: the part of the weights that stays even (c).
        every_n_train_steps: optimizer steps between two of the logged weights.
        out: JSON file that the final weights are written to, as ``TokenData(weights=...)`` takes them.

    Raises:
        ValueError: fewer than two corpora, or numbers out of range; when training begins: pipelines, cut sequences, or
            accumulated batches, where no rank sees a whole batch's losses before it goes backward.
    """

    def __init__(
        self,
        corpora: Sequence[str],
        *,
        step_size: float = 1.0,
        smoothing: float = 1e-3,
        every_n_train_steps: int = 50,
        out: str | os.PathLike[str] | None = None,
    ) -> None:
        if len(corpora) < 2 or len(set(corpora)) < len(corpora):
            raise ValueError(f"corpora={list(corpora)}: name two or more, each once.")
        if not step_size > 0:
            raise ValueError(f"step_size={step_size}: set it above 0; the paper's is 1.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: set it to 0 or more, and below 1; the paper's is 1e-3.")
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: set it to 1 or more.")
        self.corpora = tuple(corpora)
        self._step_size, self._smoothing, self._every = step_size, smoothing, every_n_train_steps
        self._out = None if out is None else Path(out)
        self._weights = torch.full((len(corpora),), 1 / len(corpora))
        self._sum, self._excess, self._num_steps = torch.zeros(len(corpora)), torch.zeros(len(corpora)), 0
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse layouts on which a batch's losses are not known before its backward pass."""
        self._trainer = trainer
        if stage != "fit":
            return
        strategy = trainer.strategy
        if isinstance(strategy, StrategyBase) and (strategy.layout.pp > 1 or strategy.layout.cp > 1):
            raise ValueError(
                f"DoReMi weighs whole samples of a whole batch, and pp={strategy.layout.pp}, cp={strategy.layout.cp} cut them. "
                "Train the proxy with dp and tp alone: it is small."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: DoReMi updates its weights once for each "
                "optimizer step, from one batch. Set it to 1; the batch may be smaller, the proxy is small."
            )

    def loss(self, proxy_BS: Tensor, reference_BS: Tensor, learned_BS: Tensor, corpus_B: Tensor) -> Tensor:
        """Update the weights by a batch, and return the proxy's loss under them. Call it once in each ``training_step``.

        Args:
            proxy_BS: the proxy's loss of each token, in nats, (samples of this rank, tokens). reference_BS: the reference's.
            learned_BS: whether a token counts. corpus_B: the number of each sample's corpus, int64.

        Returns:
            A scalar: the mean over ranks of these is the sum over corpora of weight × mean loss of its tokens, which is what
            data-parallel averaging of gradients wants.
        """
        assert self._trainer is not None, "DoReMi is no callback of the trainer"
        learned_BS = learned_BS.float()
        proxy_BS = proxy_BS.float() * learned_BS
        excess_BS = (proxy_BS.detach() - reference_BS.detach().float() * learned_BS).clamp(min=0)
        membership_BK = F.one_hot(corpus_B, len(self.corpora)).float()
        sums = torch.stack([excess_BS.sum(1), learned_BS.sum(1)]) @ membership_BK
        # Means over ranks: the ratio is that of the sums.
        excess_K, tokens_K = self._trainer.strategy.reduce(sums, reduce_op="mean").unbind()
        self._update(excess_K / tokens_K.clamp(min=torch.finfo(torch.float32).tiny))
        share_K = torch.where(tokens_K > 0, self._weights / tokens_K, 0.0)
        return (proxy_BS.sum(1) * (membership_BK @ share_K)).sum()

    def _update(self, excess_K: Tensor) -> None:
        """Move the weights towards corpora with excess loss; one without tokens in the batch has none."""
        self._weights, self._sum = self._weights.to(excess_K.device), self._sum.to(excess_K.device)
        moved = (self._weights.log() + self._step_size * excess_K).softmax(0)
        self._weights = (1 - self._smoothing) * moved + self._smoothing / len(self.corpora)
        self._sum, self._excess = self._sum + self._weights, excess_K
        self._num_steps += 1

    @property
    def weights(self) -> dict[str, float]:
        """The mean weights over all steps: the algorithm's answer. Even before the first step. Waits for the device."""
        mean = self._sum / self._num_steps if self._num_steps else self._weights
        return dict(zip(self.corpora, mean.tolist(), strict=True))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log the weights of this step, their means, and the excess losses they follow."""
        if self._num_steps == 0:
            raise ValueError(
                "DoReMi's weights were not updated in a training step. Return the callback's loss(...) from training_step, as "
                "examples/doremi does."
            )
        if trainer.global_step % self._every or not trainer.loggers:
            return
        mean = (self._sum / self._num_steps).tolist()
        columns = zip(self.corpora, self._weights.tolist(), mean, self._excess.tolist(), strict=True)
        values: dict[str, float] = {}
        for name, weight, average, excess in columns:
            values[f"doremi/{name}/weight"], values[f"doremi/{name}/mean_weight"] = weight, average
            values[f"doremi/{name}/excess_nats_per_token"] = excess
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file of weights."""
        self._write()

    @rank_zero_only
    def _write(self) -> None:
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text(json.dumps(self.weights, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, their sum and the number of steps."""
        weights, total = self._weights.tolist(), self._sum.tolist()
        return {"corpora": list(self.corpora), "weights": weights, "sum": total, "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the weights of a checkpoint.

        Raises:
            ValueError: it is of other corpora.
        """
        if list(state_dict["corpora"]) != list(self.corpora):
            raise ValueError(
                f"the checkpoint's DoReMi weighs {', '.join(state_dict['corpora'])}, and this one {', '.join(self.corpora)}. "
                "Name the same corpora in the same order, or begin a new run."
            )
        self._weights, self._sum = torch.tensor(state_dict["weights"]), torch.tensor(state_dict["sum"])
        self._num_steps = state_dict["num_steps"]

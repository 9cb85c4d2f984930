"""What the model says, while it is being trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from kenotron.callbacks.summary import EveryNSteps
from kenotron.hf.generate import check_settings, generate
from kenotron.parallel.plan import transformers_models
from kenotron.strategies.training import Training


class Samples(L.Callback):
    """Print how the model continues some prompts, every so many optimizer steps. Training goes on as it would without.

    All ranks generate the same; pipelines and cut sequences can't. A TensorBoard logger gets the samples, too.

    Args:
        prompts: texts to continue.
        tokenizer: transformers', or a directory that has one.
        every_n_train_steps: optimizer steps between samples.
        max_new_tokens, temperature, top_k, top_p: as for :func:`kenotron.hf.generate`.
        seed: of sampling.

    Raises:
        ValueError: settings out of range, a strategy other than ``KenotronStrategy``, or ``pp`` or ``cp`` above 1.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: Any,
        every_n_train_steps: int,
        *,
        max_new_tokens: int = 32,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> None:
        check_settings(prompts, max_new_tokens, temperature, top_k, top_p)
        self._prompts, self._turn = list(prompts), EveryNSteps(every_n_train_steps)
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
        self._settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if isinstance(tokenizer, (str, os.PathLike)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
        self._tokenizer = tokenizer

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what can't generate."""
        if not isinstance(trainer.strategy, Training):
            raise ValueError(
                f"Samples samples under KenotronStrategy, and the strategy is {type(trainer.strategy).__name__}. Set "
                "strategy='kenotron'."
            )
        layout = trainer.strategy.layout
        if layout.pp > 1 or layout.cp > 1:
            raise ValueError(
                f"Samples needs whole models and whole sequences, and the layout has pp={layout.pp}, cp={layout.cp}. Leave "
                "it out, and use checkpoints: kenotron generate CHECKPOINT --prompt ..."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where this ``fit`` begins, which was dealt with before."""
        self._turn.begin(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Sample after every n-th optimizer step."""
        if not self._turn.is_due(trainer):
            return
        step = trainer.global_step
        for prompt, text in zip(self._prompts, self._sample(trainer, pl_module), strict=True):
            rank_zero_info(f"step {step}: {prompt}|{text}")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(f"sample/{prompt}", text, step)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        models = transformers_models(pl_module)
        if not models:
            raise ValueError(f"Samples: {type(pl_module).__name__} holds no transformers model (or Decoder) to generate with.")
        assert isinstance(trainer.strategy, Training)
        device = trainer.strategy.root_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            texts: list[str] = trainer.strategy.evaluate(
                lambda: generate(models[0][1], self._tokenizer, self._prompts, **self._settings)
            )
        return texts

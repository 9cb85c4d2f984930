"""TokenData from a YAML file, with its corpora on disk, its callbacks and its logs."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from kenotron.callbacks import Consumption, Perplexity
from kenotron.data.loader import Loading
from kenotron.data.source import ArraySource
from kenotron.tasks.token_data import TokenData

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 6
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  val_check_interval: 3
data:
  corpora:
    web: {folder}/web
    code:
      path: {folder}/code.ds
  weights: {{web: 3, code: 1}}
  sequence_length: 16
  global_batch_size: 4
  stages:
    - start_step: 3
      corpora: {{code: 1.0}}
      sequence_length: 8
  validation:
    held_out: {folder}/code.ds
  sampling: {{seed: 7, mask_documents: true}}
  loading: {{num_workers: 0}}
"""


class Unigram(L.LightningModule):
    """A table of logits, one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(50))
        self.shapes: list[tuple[int, ...]] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["shift_labels"]
        return F.cross_entropy(self.logits.expand(labels.numel(), -1), labels.flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.shapes.append(tuple(batch["shift_labels"].shape))
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def write(path: Path, *lengths: int) -> None:
    """Write documents as datatrove does."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(lengths))
    path.write_bytes(rng.integers(0, 50, sum(lengths)).astype("<u2").tobytes())
    Path(f"{path}.index").write_bytes(np.cumsum(lengths).astype("<u8").tobytes())
    Path(f"{path}.metadata").write_text(f"words|2\n{sum(lengths)}\n{sum(lengths)} tokens")


def test_everything_can_be_set_in_yaml(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore")
    write(tmp_path / "web" / "0.ds", 100, 37, 60)
    write(tmp_path / "web" / "1.ds", 90)
    write(tmp_path / "code.ds", 70, 5, 33)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    cli = LightningCLI(Unigram, TokenData, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None)
    assert cli.model.shapes == [(4, 16)] * 3 + [(4, 8)] * 3
    assert cli.datamodule.num_trained_samples == 24
    taken = cli.datamodule.consumed()
    assert (taken["web"].samples, taken["code"].samples) == (9, 15)
    assert taken["code"].tokens == 3 * 16 + 12 * 8


class Lines(L.pytorch.loggers.CSVLogger):
    """Keeps what is logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lines: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        self.lines.append({**metrics, "step": step})


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_perplexity_is_that_of_all_tokens_of_a_corpus(batch: int, tmp_path: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tokens = np.random.default_rng(1).integers(0, 50, 1001)
    validation = {"one": ArraySource("one", [tokens[:333]]), "two": ArraySource("two", [tokens[:40], tokens[40:41]])}
    data = TokenData(
        {"a": ArraySource("a", [tokens])}, 16, 4, validation=validation, val_batch_size=batch, loading=Loading(num_workers=0)
    )
    logger, module = Lines(tmp_path), Unigram()
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", devices=1, logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[Perplexity(), Consumption(every_n_train_steps=2)], enable_model_summary=False, val_check_interval=3,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    with torch.no_grad():
        per_token = -F.log_softmax(module.logits, 0).numpy()
    for name, source in validation.items():
        labels = source.read(1, source.num_tokens)
        assert trainer.callback_metrics[f"perplexity/{name}"].item() == pytest.approx(
            math.exp(per_token[labels].mean()), rel=1e-4
        )
    assert {"data/a/samples": 8, "data/a/tokens": 128, "data/a/epochs": 0.128, "step": 2} in logger.lines
    assert json.dumps(data.state_dict())


def test_a_step_without_a_loss_is_told() -> None:
    tokens = np.arange(50)
    data = TokenData(
        {"a": ArraySource("a", [tokens])}, 16, 1, validation={"v": ArraySource("v", [tokens])}, loading=Loading(num_workers=0)
    )
    module = Unigram()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign,assignment]
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[Perplexity()], enable_model_summary=False, val_check_interval=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="returned a loss"):
        trainer.fit(module, datamodule=data)


def test_loaders_of_pytorch_work_as_ever() -> None:
    class Custom(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"shift_labels": torch.arange(index, index + 16)}

    module = Unigram()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, strategy="kenotron",
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Custom(), batch_size=4))
    assert module.shapes == [(4, 16)] * 2

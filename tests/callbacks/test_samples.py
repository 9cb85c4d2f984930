"""Samples while training goes on, which change nothing in it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import kenotron
from kenotron.callbacks import Samples
from kenotron.hf import generate
from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
from word_model import PROMPTS, make_directory


class Module(L.LightningModule):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.lm = path, None

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm = kenotron.from_hf(self.path)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        noise = torch.rand(())  # a step that draws random numbers
        return self.lm(input_ids=batch, labels=batch).loss * (1 + noise)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(path: str, strategy: dict[str, Any], out: str, sample: bool = True, **settings: Any) -> list[tuple[int, list[str]]]:
    """Train four steps, sampling after the second and the fourth. Returns what was sampled; the weights go to ``out``."""
    from transformers import AutoTokenizer

    warnings.filterwarnings("ignore")
    found: list[tuple[int, list[str]]] = []

    class Keep(Samples):
        def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
            texts = super()._sample(trainer, pl_module)
            found.append((trainer.global_step, texts))
            return texts

    tokenizer = AutoTokenizer.from_pretrained(path)
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=kenotron.KenotronStrategy(**strategy),
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Keep(PROMPTS, tokenizer, 2, max_new_tokens=8, **settings)] if sample else [], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Module(path), torch.utils.data.DataLoader(torch.arange(256).view(16, 16) % 90 + 3, batch_size=4))
    trainer.save_checkpoint(out)
    return found


@pytest.mark.parametrize(("ranks", "strategy"), [(1, {}), (2, {"zero_stage": 1}), (2, {"zero_stage": 3}), (2, {"tp": 2})])
def test_samples_are_those_of_the_weights_and_change_no_training(tmp_path, ranks, strategy):
    from transformers import AutoTokenizer

    make_directory(tmp_path / "hf", "llama")
    hf, tokenizer = str(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    with RankPool(ranks) as pool:
        found = pool.run(fit, ranks, hf, strategy, str(tmp_path / "with"))
        pool.run(fit, ranks, hf, strategy, str(tmp_path / "without"), False)
    assert all(rank == found[0] for rank in found)
    (first, _), (last, texts) = found[0]
    assert (first, last) == (2, 4)
    assert texts == generate(kenotron.from_checkpoint(tmp_path / "with"), tokenizer, PROMPTS, max_new_tokens=8)
    without = kenotron.load_state_dict(tmp_path / "without")
    for name, value in kenotron.load_state_dict(tmp_path / "with").items():
        assert torch.equal(value, without[name]), name


def test_sampling_draws_from_its_own_seed(tmp_path):
    make_directory(tmp_path / "hf", "llama")
    runs = [
        fit(str(tmp_path / "hf"), {}, str(tmp_path / str(i)), temperature=1.0, seed=seed) for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_bad_input_is_told(tmp_path):
    make_directory(tmp_path / "hf", "llama")
    for settings, text in [((["a"], None, 0), "every_n_train_steps=0"), (([], None, 1), "one prompt or more")]:
        with pytest.raises(ValueError, match=text):
            Samples(*settings)
    callback = Samples(PROMPTS, tmp_path / "hf", 1)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, callbacks=[callback])
    with pytest.raises(ValueError, match=r"SingleDeviceStrategy.*strategy='kenotron'"):
        trainer.fit(Module(str(tmp_path / "hf")), torch.utils.data.DataLoader(torch.zeros(4, 8, dtype=torch.long)))
    with RankPool(2) as pool, pytest.raises(Exception, match="the layout has pp=2, cp=1"):
        pool.run(fit, 2, str(tmp_path / "hf"), {"pp": 2}, str(tmp_path / "x"))

"""Hugging Face directories that a callback writes while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import kenotron
from kenotron.callbacks import HFExport
from kenotron.models import Decoder
from kenotron.testing import RankPool


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lm: Any = None
        self.kept: dict[int, dict[str, torch.Tensor]] = {}

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm = Decoder(
                LlamaConfig(
                    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2,
                )
            )  # fmt: skip

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.lm(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-6)


def fit(out: str, strategy: dict[str, Any], devices: int = 1, accumulate: int = 1, **settings: Any) -> None:
    callback = HFExport(out, every_n_train_steps=2, **settings)
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=kenotron.KenotronStrategy(**strategy), max_steps=5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        use_distributed_sampler=False, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(1280).view(40, 32) % 64, batch_size=4))


def test_it_exports_steps_and_the_last_one_from_any_layout(tmp_path: Path) -> None:
    fit(str(tmp_path / "one"), {})
    with RankPool(2) as pool:
        pool.run(fit, 2, str(tmp_path / "two"), {"tp": 2}, 2)
    for folder in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["step=2", "step=4", "step=5"]
    models = {
        (folder, step): AutoModelForCausalLM.from_pretrained(tmp_path / folder / f"step={step}")
        for folder in ("one", "two")
        for step in (2, 4, 5)
    }
    for step in (2, 4, 5):
        for name, param in models["one", step].named_parameters():  # AdamW enlarges what rounding leaves of tiny gradients
            torch.testing.assert_close(models["two", step].get_parameter(name), param, rtol=1e-3, atol=1e-4)
    weights = [models["one", step].lm_head.weight for step in (2, 4, 5)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_failed_export_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exporting to .* failed: .*nowhere"):
        fit(str(tmp_path), {}, tokenizer=str(tmp_path / "nowhere"))


def test_accumulated_batches_are_no_steps(tmp_path: Path) -> None:
    fit(str(tmp_path), {}, accumulate=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2", "step=4", "step=5"]


def test_what_is_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "step=4").mkdir()
    (tmp_path / "step=4" / "mine").touch()
    with pytest.warns(UserWarning, match="step=4 is there already"):
        fit(str(tmp_path), {})
    assert [path.name for path in (tmp_path / "step=4").iterdir()] == ["mine"]


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=0"):
        HFExport(tmp_path, 0)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, callbacks=[HFExport(tmp_path, 1)])
    with pytest.raises(ValueError, match=r"SingleDeviceStrategy.*strategy='kenotron'"):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(4, 8, dtype=torch.long)))

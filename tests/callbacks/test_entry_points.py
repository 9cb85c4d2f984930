"""Every public callback under every entry point of a trainer. A new one is found by itself; what it needs goes to `NEEDS`."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from recorder_helpers import VOCABULARY, config, quiet
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import kenotron
from kenotron import callbacks
from kenotron.callbacks.summary import Recorder
from kenotron.data.loader import Loading
from kenotron.data.nanoset import NanosetWriter
from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
from word_model import PROMPTS, make_directory


def public_callbacks() -> dict[str, type[L.Callback]]:
    """Return the classes that the package's modules define, whether it exports them or not."""
    modules = [importlib.import_module(f"kenotron.callbacks.{each.name}") for each in pkgutil.iter_modules(callbacks.__path__)]
    found = [each for module in modules for _, each in inspect.getmembers(module, inspect.isclass)]
    wanted = {each.__name__: each for each in found if issubclass(each, L.Callback) and "kenotron.callbacks" in each.__module__}
    wanted.pop(Recorder.__name__)  # what they are made of
    return {name: wanted[name] for name in sorted(wanted) if not name.startswith("_")}


#: Arguments and companions of callbacks that need some; ``every_n_train_steps=1`` is given wherever it is taken.
NEEDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "DoReMi": lambda folder: {"corpora": ("a", "b"), "out": folder / "weights.json"},
    "HFExport": lambda folder: {"dirpath": folder / "hf"},
    "PipelineTrace": lambda folder: {"dirpath": folder / "trace", "start_step": 0, "picture": False},
    "Profiler": lambda folder: {"dirpath": folder / "profile", "start_step": 0, "num_steps": 1},
    "Samples": lambda folder: {"prompts": PROMPTS, "tokenizer": folder / "words", "max_new_tokens": 2},
    "Upload": lambda folder: {"url": f"file://{folder}/there", "every_s": 0.01},
}
LAYOUTS = {"PipelineTrace": {"pp": 2}}


class Module(L.LightningModule):
    """A small language model with experts, whose loss is DoReMi's where that is among the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = AutoModelForCausalLM.from_config(config("moe"))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        doremi = [each for each in self.trainer.callbacks if isinstance(each, callbacks.DoReMi)]
        if not doremi:
            return self._loss(batch)
        logits = self.lm(input_ids=batch["input_ids"], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="none")
        losses = losses.view(batch["input_ids"].shape)
        return doremi[0].loss(losses, losses - 1, torch.ones_like(losses), torch.arange(len(losses)) % 2)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._loss(batch)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self._loss(batch)

    def _loss(self, batch: Any) -> Any:
        return self.lm(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data(folder: Path) -> kenotron.TokenData:
    corpora = {name: folder / f"{name}.ds" for name in ("a", "b")}
    loading = Loading(num_workers=0)
    return kenotron.TokenData(corpora, 8, 4, validation=corpora, loading=loading, vocab_size=VOCABULARY)


def make(name: str, folder: Path) -> list[Any]:
    kind = public_callbacks()[name]
    settings = NEEDS[name](folder) if name in NEEDS else {}
    if "every_n_train_steps" in inspect.signature(kind).parameters:
        settings["every_n_train_steps"] = 1
    return [kind(**settings)]


def enter(name: str, entry: str, folder: str) -> int:
    """Enter a trainer as ``entry`` says, with fresh callbacks. Returns how many steps were trained."""
    quiet()
    path = Path(folder)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    common: dict[str, Any] = {
        "accelerator": "cpu", "devices": ranks, "strategy": kenotron.KenotronStrategy(**LAYOUTS.get(name, {})),
        "max_steps": 2, "limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 1,
    }  # fmt: skip
    shown = {"enable_progress_bar": False, "enable_model_summary": False}
    found = make(name, path)
    saving = ModelCheckpoint(path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    bars = [each for each in found if isinstance(each, ProgressBar)]
    shown["enable_progress_bar"] = bool(bars)
    if entry == "barebones":  # saves nothing, so that Upload has to wait for a preemption
        found += [callbacks.Preemption(path / "preempted")] if name == "Upload" else []
        own = [each for each in found if each not in bars]  # Lightning refuses bars there
        trainer = L.Trainer(**common, barebones=True, callbacks=own)
    else:
        logger = CSVLogger(path / "logs")
        trainer = L.Trainer(
            **common, **shown, callbacks=[*found, saving], logger=logger, default_root_dir=path, val_check_interval=1,
        )  # fmt: skip
    module, source = Module(), data(path)
    loaders: Any = torch.utils.data.DataLoader(_Rows(), batch_size=2)
    if entry in ("fit", "barebones"):
        trainer.fit(module, source)
    elif entry == "resume":
        trainer.fit_loop.epoch_loop.max_steps = 4
        trainer.fit(module, source, ckpt_path=str(path / "checkpoints" / "step=2.ckpt"), weights_only=False)
    elif entry == "twice":
        trainer.validate(module, source, verbose=False)
        trainer.fit(module, source)
        trainer.validate(module, loaders, verbose=False)  # one loader, where fit had two
        trainer.fit_loop.epoch_loop.max_steps = 3
        trainer.fit(module, source)
        trainer.test(module, loaders, verbose=False)
    elif entry == "predict":
        trainer.predict(module, loaders)
    else:
        getattr(trainer, entry)(module, loaders, verbose=False)
    return trainer.global_step


class _Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        ids = torch.arange(8) + index
        return {"input_ids": ids, "labels": ids}


#: Each with the step at which it ends.
ENTRIES = {"validate": 0, "test": 0, "predict": 0, "fit": 2, "resume": 4, "twice": 3, "barebones": 2}


def enter_all(name: str, folder: str) -> dict[str, int]:
    return {entry: enter(name, entry, folder) for entry in ENTRIES}


@pytest.mark.parametrize("name", public_callbacks())
def test_a_callback_works_under_every_entry_point(name: str, tmp_path: Path, pool: RankPool) -> None:
    make_directory(tmp_path / "words", "llama")
    for corpus in ("a", "b"):
        with NanosetWriter(tmp_path / f"{corpus}.ds", token_size=2) as out:
            out.write(torch.arange(600).remainder(VOCABULARY).numpy())
    ended = pool.run(enter_all, 2, name, str(tmp_path))[0] if name in LAYOUTS else enter_all(name, str(tmp_path))
    assert ended == ENTRIES

"""What the tests of recorders share: a small Llama or Qwen3-MoE that is trained with all of them, once for each layout."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import kenotron
from kenotron.callbacks import GarbageCollection, GradientNorms, LearningRate, Memory, MoELoad, Throughput
from kenotron.optim import Schedule
from kenotron.optim.schedules import scheduler_config
from kenotron.testing import RankPool

LENGTH, STEPS, VOCABULARY = 16, 6, 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def config(kind: str, attention: str = "sdpa") -> Any:
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        return Qwen3MoeConfig(**SIZES, **experts, attn_implementation=attention)
    return LlamaConfig(**SIZES, attn_implementation=attention)


class Model(L.LightningModule):
    """An unmodified transformers model in two parameter groups, by our schedule."""

    def __init__(self, kind: str = "llama") -> None:
        super().__init__()
        self.lm = AutoModelForCausalLM.from_config(config(kind))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.lm(**batch, labels=batch["input_ids"], use_cache=False).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.lm(**batch, use_cache=False)

    def configure_optimizers(self) -> Any:
        matrices = [p for n, p in self.named_parameters() if "norm" not in n]
        norms = [p for n, p in self.named_parameters() if "norm" in n]
        optimizer = torch.optim.AdamW([{"params": matrices, "name": "matrices"}, {"params": norms, "lr": 5e-4}], lr=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": scheduler_config(optimizer, Schedule(total_steps=STEPS, warmup_steps=2, decay="cosine")),
        }


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack(rows)}


def loader(batch: int, rows: int = 64, rank: int = 0, size: int = 1) -> DataLoader[Any]:
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(5))
    per_rank = batch // size
    own = [i for i in range(rows) if i % batch // per_rank == rank]
    return DataLoader(ids[own], batch_size=per_rank, collate_fn=collate)  # type: ignore[arg-type]


def quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def recorders(kind: str) -> list[Any]:
    found = [
        Throughput(2, peak_flops=1e12), Memory(2), GradientNorms(1, histogram=True), LearningRate(momentum=True),
        GarbageCollection(3),
    ]  # fmt: skip
    return [*found, MoELoad(2)] if kind == "moe" else found


def train(kind: str, strategy: Any, folder: str, **settings: Any) -> dict[str, Any]:
    """Train on this rank. Returns what was printed, the FLOPs that were counted, and the folder of the events."""
    quiet()
    L.seed_everything(1, verbose=False)
    callbacks = recorders(kind)
    if isinstance(strategy, dict):
        strategy = kenotron.KenotronStrategy(**strategy)
    trainer = L.Trainer(
        accelerator="cpu", strategy=strategy, max_steps=STEPS, callbacks=[*callbacks, ModelCheckpoint(folder, save_last=False)],
        logger=[TensorBoardLogger(folder, name="", version="tb"), CSVLogger(folder, name="", version="csv")],
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **settings,
    )  # fmt: skip
    sampling = getattr(trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
    printed = io.StringIO()
    module = Model(kind)
    with contextlib.redirect_stdout(printed):
        trainer.fit(module, loader(8, rank=sampling["rank"], size=sampling["num_replicas"]))
    flops = callbacks[0].flops
    return {"printed": printed.getvalue(), "flops": (flops.other, flops.attention), "state": callbacks[0].state_dict()}


def events(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard's own reader finds: (step, value) by tag; of histograms the number of elements."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(Path(folder) / "tb"), size_guidance={"scalars": 0, "histograms": 0})
    reader.Reload()
    found = {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    for tag in reader.Tags()["histograms"]:
        found[f"histogram:{tag}"] = [(e.step, e.histogram_value.num) for e in reader.Histograms(tag)]
    return found


@functools.cache
def pool() -> RankPool:
    return RankPool(4)


LAYOUTS: dict[str, tuple[int, Any]] = {
    "one": (1, ()),
    "tp2-pp2": (4, (("tp", 2), ("pp", 2), ("microbatches", 2))),
    "ddp": (2, "ddp"),
    "dp2-zero3-full": (2, (("zero_stage", 3), ("recompute", "full"))),
    "tp2-ep2": (4, (("tp", 2), ("ep", 2))),
}


@functools.cache
def run(kind: str, layout: str) -> tuple[list[dict[str, Any]], dict[str, list[tuple[int, float]]]]:
    """Return what each rank returned, and what the event files hold. Each case is trained once in all."""
    ranks, strategy = LAYOUTS[layout]
    folder = tempfile.mkdtemp()
    given = strategy if isinstance(strategy, str) else dict(strategy)
    results = pool().run(train, ranks, kind, given, folder, devices=ranks, timeout_s=180.0)
    return results, events(folder)

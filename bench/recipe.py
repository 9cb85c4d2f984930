"""The training recipe: memory and time of every recompute mode, and of every ZeRO stage.

- recompute: a Llama (`kenotron.models.Decoder`, fp32) takes steps in one process, the modes in turns. Activations are the bytes
  that live between forward and backward, beyond those before; peak is the most that lives at any time of a step.
- zero stages: the same model on 2 data-parallel ranks under `KenotronStrategy`, with and without recompute.

Memory is counted, not sampled: every tensor that torch's dispatcher returns, until it is freed. Times are of steps without it.

    python bench/recipe.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ratios import spread, verdict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kenotron import KenotronStrategy
from kenotron.models import Decoder
from kenotron.parallel.grads import local
from kenotron.parallel.recompute import Recompute
from kenotron.testing import RankPool

MODEL = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 4096, "max_position_embeddings": 1024,
}  # fmt: skip
MODES: dict[str, Recompute] = {
    "none": Recompute(),
    "full": Recompute(mode="full"),
    "selective": Recompute(mode="selective"),
    "full, every 2nd block": Recompute(mode="full", every=2),
    "full, budget 0.25": Recompute(mode="full", budget=0.25),
    "full, offloaded inputs": Recompute(mode="full", offload=True),
}
#: mode -> the least share of activations that it must save, and the most time that it may take
BARS = {"full": (0.60, None), "selective": (0.30, 1.20)}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators return while it is on, as long as they live.

    Args:
        known: tensors that were there before, which are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._found: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                # A DTensor's own storage is as large as the whole and holds nothing; what it stands for is not seen elsewhere.
                with torch.no_grad():
                    self._count(local(tensor).untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known and storage not in self._found:
            self._found.add(storage)
            self.peak = max(self.peak, self.now)

    @property
    def now(self) -> int:
        """What lives. FSDP2 empties storages and fills them again, so each is asked anew."""
        return sum(storage.nbytes() for storage in self._found)


# --------------------------------------------------------------------------------------------------------- recompute


def make(mode: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Decoder(_config()).train()
    MODES[mode].apply(list(model.model.layers))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _tensors(model: Any, optimizer: Any) -> list[torch.Tensor]:
    states = (value for state in optimizer.state.values() for value in state.values())
    return [*model.parameters(), *model.buffers(), *states]


def _config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**MODEL)


def step(model: Any, optimizer: Any, ids: torch.Tensor, live: LiveBytes | None = None) -> int:
    """Take a step. Returns the bytes of activations, if they are counted."""
    before = live.now if live else 0
    loss = model(input_ids=ids, labels=ids).loss
    activations = live.now - before if live else 0
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return activations


def compare_modes(shape: tuple[int, int], repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each mode."""
    ids = torch.randint(0, MODEL["vocab_size"], shape)
    contestants = {mode: make(mode) for mode in MODES}
    rows = {}
    for mode, (model, optimizer) in contestants.items():
        step(model, optimizer, ids)
        with LiveBytes(_tensors(model, optimizer)) as live:
            rows[mode] = {"name": mode, "activations": step(model, optimizer, ids, live), "peak": live.peak}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(repetitions):
        for mode, (model, optimizer) in contestants.items():
            started = time.perf_counter()
            step(model, optimizer, ids)
            times[mode].append(time.perf_counter() - started)
    for mode, row in rows.items():
        row |= spread([a / b for a, b in zip(times[mode], times["none"], strict=True)])
        row["seconds"] = statistics.median(times[mode])
        row["saved"] = 1 - row["activations"] / rows["none"]["activations"]
        least, most = BARS.get(mode, (None, None))
        row["ok"] = (least is None or row["saved"] >= least) and (most is None or row["ratio"] <= most)
    return list(rows.values())


# -------------------------------------------------------------------------------------------------------- zero stages


def fit(zero_stage: int, mode: str, shape: tuple[int, int], steps: int) -> tuple[int, float]:
    """Train on this rank. Returns the most bytes that lived, from the making of the model on, and seconds a step."""
    warnings.filterwarnings("ignore")
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    live = LiveBytes()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None
            self.times: list[float] = []

        def configure_model(self) -> None:
            if self.model is None:
                self.model = Decoder(_config())

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:  # the optimizer's state is there, and gradients have been made twice
                live.__exit__(None, None, None)
            self.times.append(time.perf_counter())

    module = Module()
    strategy = KenotronStrategy(zero_stage=zero_stage, recompute=MODES[mode])
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, max_steps=steps + 2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = shape[0] * (steps + 3) * 2
    data = torch.randint(0, MODEL["vocab_size"], (rows, shape[1]), generator=generator)
    live.__enter__()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=shape[0]))
    laps = [b - a for a, b in zip(module.times[2:], module.times[3:], strict=False)]
    return live.peak, statistics.median(laps)


def compare_stages(shape: tuple[int, int], steps: int) -> list[dict[str, Any]]:
    rows = []
    with RankPool(2) as pool:
        for stage in range(4):
            for mode in ("none", "full"):
                found = pool.run(fit, 2, stage, mode, shape, steps, timeout_s=600)
                peak, seconds = max(peak for peak, _ in found), max(seconds for _, seconds in found)
                rows.append({"name": f"zero {stage}, recompute {mode}", "peak": peak, "seconds": seconds})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions: under three minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    shape, repetitions = ((1, 256), 5) if options.quick else ((2, 1024), 7)
    print(f"recompute, {shape[0]} × {shape[1]} tokens, one process")
    print(f"{'':<26}{'activations':>12}{'saved':>7}{'peak':>9}{'time':>7}{'quartiles':>15}   bars")
    rows = compare_modes(shape, repetitions)
    for row in rows:
        least, most = BARS.get(row["name"], (None, None))
        bars = ", ".join(text for text in (least and f"saves ≥ {least:.0%}", most and f"time ≤ {most:.2f}") if text)
        told = verdict({**row, "bar": most}) if most else "ok" if row["ok"] else "MISSED"
        quartiles = f"{row['low']:.2f} – {row['high']:.2f}"
        print(
            f"{row['name']:<26}{row['activations'] / 1e6:>9.1f} MB{row['saved']:>7.0%}{row['peak'] / 1e6:>6.0f} MB"
            f"{row['ratio']:>7.2f}{quartiles:>15}   {f'{bars}: {told}' if bars else ''}",
            flush=True,
        )
    print(f"\nzero stages, {shape[0]} × {shape[1]} tokens on each of 2 ranks: everything that lives, parameters to activations")
    print(f"{'':<26}{'peak':>10}{'step':>10}")
    stages = compare_stages(shape, 3 if options.quick else 6)
    for row in stages:
        print(f"{row['name']:<26}{row['peak'] / 1e6:>7.0f} MB{row['seconds']:>8.2f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"recompute": rows, "zero": stages}, indent=1))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

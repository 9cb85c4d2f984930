"""A whole training: tp 2 × pp 2 under KenotronStrategy against a loop in plain PyTorch, on text.

Three million parameters (a Llama of transformers, fp32) see three million tokens of the Python standard library's sources,
once. The plain side is one process that knows nothing of Kénotron or Lightning: the loop stands below. Both start from the
same weights and take the same batches in the same order; AdamW, warm-up and cosine, norms clipped at 1. Bar: the losses on
held-out files differ by at most 0.5 % at the end.

    python bench/convergence.py [--quick] [--json FILE] [--picture FILE] [--data FOLDER]

Half an hour on two idle cores; --quick ends after 20 steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kenotron
from kenotron.testing import RankPool

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from llama_module import LlamaModule
from stdlib_data import StdlibData, TokenLoader, to_tensor

SEED, VOCABULARY, LENGTH, BATCH = 1, 1024, 256, 16
PEAK, WARMUP, CLIP = 2e-3, 40, 1.0
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
TOKENS = 3_000_000
BAR = 0.005

Losses = list[tuple[int, float]]  # (optimizer steps, mean over tokens in nats)


class Data(StdlibData):
    """Batches of the main job, validated on held-out files, ``val_samples`` windows of them."""

    def __init__(self, folder: Path, val_samples: int) -> None:
        super().__init__(
            folder, vocabulary=VOCABULARY, sequence_length=LENGTH, batch_size=BATCH, val_samples=val_samples, seed=SEED
        )

    def train_batches(self) -> TokenLoader:
        """Return what one process that stands alone reads."""
        return TokenLoader(self._windows("train"), BATCH, rank=0, num_ranks=1, seed=SEED)

    def val_batches(self) -> Sequence[Tensor]:
        windows_NS = self._windows("val")
        chosen = torch.linspace(0, len(windows_NS) - 1, min(self.val_samples, len(windows_NS)), dtype=torch.float64).long()
        return to_tensor(windows_NS[chosen.numpy()]).split(BATCH)


# ---- Plain PyTorch ----------------------------------------------------------------------------------------------------


def train_plainly(initial: Path, data: Data, steps: int, every: int) -> tuple[Losses, Losses]:
    """Return the losses of training and of validation, every so many steps."""
    model = LlamaForCausalLM.from_pretrained(initial)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    factor = LlamaModule(MODEL, PEAK, WARMUP, steps).learning_rate_factor
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    training: Losses = []
    validation: Losses = [(0, evaluate(model, data.val_batches()))]
    for step, batch in zip(range(1, steps + 1), data.train_batches(), strict=False):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        training.append((step, loss.item()))
        if step % every == 0 or step == steps:
            validation.append((step, evaluate(model, data.val_batches())))
            print(f"  step {step:>4}/{steps}   {validation[-1][1]:.4f} nats/token", flush=True)
    return training, validation


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, batches: Iterable[Tensor]) -> float:
    """Return the mean loss of held-out windows."""
    model.eval()
    weighted = [(model(input_ids=batch, labels=batch, use_cache=False).loss.item(), len(batch)) for batch in batches]
    model.train()
    return sum(loss * count for loss, count in weighted) / sum(count for _, count in weighted)


# ---- tp 2 × pp 2 ------------------------------------------------------------------------------------------------------


class Module(LlamaModule):
    """The main job's module, begun with given weights."""

    def __init__(self, initial: Path, steps: int) -> None:
        super().__init__(MODEL, PEAK, WARMUP, steps)
        self._initial = initial

    def configure_model(self) -> None:
        if self.model is None:
            self.model = kenotron.from_hf(self._initial, implementation="transformers")


class Curves(L.Callback):
    """Keeps the losses."""

    def __init__(self, steps: int) -> None:
        self.training: Losses = []
        self.validation: Losses = []
        self._steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.training.append((trainer.global_step, float(outputs["loss"])))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))
        if trainer.is_global_zero and not trainer.sanity_checking:
            print(f"  step {trainer.global_step:>4}/{self._steps}   {self.validation[-1][1]:.4f} nats/token", flush=True)


def train_in_parallel(initial: Path, data: Data, steps: int, every: int) -> tuple[Losses, Losses]:
    """Return the same of one of four ranks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    curves = Curves(steps)
    trainer = L.Trainer(
        strategy=kenotron.KenotronStrategy(tp=2, pp=2, microbatches=2),
        accelerator="cpu",
        devices=4,
        max_steps=steps,
        gradient_clip_val=CLIP,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        callbacks=[curves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(initial, steps), data)
    if curves.validation[-1][0] != steps:
        trainer.validate(trainer.lightning_module, data, verbose=False)
    return curves.training, curves.validation


# ---- Both -------------------------------------------------------------------------------------------------------------


def draw(curves: dict[str, tuple[Losses, Losses]], path: Path) -> None:
    """Draw the losses on one another, and below by how much those of validation differ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, (name, (training, validation)) in enumerate(curves.items()):
        color, style = f"C{index}", ("-", "--")[index]
        above.plot(*zip(*training, strict=True), color=color, alpha=0.35, linewidth=0.8, linestyle=style)
        above.plot(*zip(*validation, strict=True), color=color, linestyle=style, marker="os"[index], markersize=4, label=name)
    (_, plain), (_, ours) = curves.values()
    apart = [(step, 100 * abs(mine / theirs - 1)) for (step, theirs), (_, mine) in zip(plain, ours, strict=True)]
    below.plot(*zip(*apart, strict=True), color="C2", marker="o", markersize=4)
    below.axhline(100 * BAR, color="grey", linewidth=0.8, linestyle=":")
    below.annotate("bar", (0, 100 * BAR), xytext=(2, -10), textcoords="offset points", fontsize=8, color="grey")
    above.set(
        ylabel="loss, nats per token",
        title="Losses on held-out files (marked) and of training (pale)",
    )
    below.set(xlabel="optimizer steps of 4096 tokens", ylabel="difference, %", ylim=(0, None))
    above.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps, few held-out windows: under three minutes")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file (needs matplotlib)")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/convergence"), help="where tokens are kept (default: %(default)s)"
    )
    options = parser.parse_args()
    steps, every, val_samples = (20, 10, 16) if options.quick else (TOKENS // (BATCH * LENGTH), 61, 256)
    data = Data(options.data, val_samples)
    data.prepare_data()
    if len(data.train_batches()) < steps:
        print(f"note: {steps} steps want more than the {len(data.train_batches())} batches of one epoch", file=sys.stderr)
        steps = len(data.train_batches())
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    size = f"{model.num_parameters() / 1e6:.2f} M parameters"
    print(f"{size}, {steps} steps of {BATCH * LENGTH:,} tokens", flush=True)

    curves: dict[str, tuple[Losses, Losses]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, RankPool(4) as pool:
        initial = Path(folder) / "initial"
        model.save_pretrained(initial)
        for name in ("plain PyTorch, 1 process", "Kénotron, tp 2 × pp 2"):
            print(name, flush=True)
            begun = time.monotonic()
            if name.startswith("plain"):
                curves[name] = train_plainly(initial, data, steps, every)
            else:
                curves[name] = pool.run(train_in_parallel, 4, initial, data, steps, every, timeout_s=14_400)[0]
            seconds[name] = time.monotonic() - begun

    print(f"\n{'':<26}{'before':>9}{'after':>9}{'time':>9}")
    for name, (_, validation) in curves.items():
        print(f"{name:<26}{validation[0][1]:>9.4f}{validation[-1][1]:>9.4f}{seconds[name]:>7.0f} s")
    plain, ours = (validation[-1][1] for _, validation in curves.values())
    apart = abs(ours / plain - 1)
    print(f"final losses differ by {apart:.3%} (bar: {BAR:.1%}): {'ok' if apart <= BAR else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps({"curves": curves, "seconds": seconds, "difference": apart, "bar": BAR}, indent=1))
    if options.picture:
        draw(curves, options.picture)
    return 0 if apart <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())

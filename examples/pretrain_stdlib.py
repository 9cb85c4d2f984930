"""Pretrain a small Llama on the sources of Python's standard library: data × tensor × pipeline parallelism in one file.

    python examples/pretrain_stdlib.py                         # CPU: 4 processes, tp 2 × pp 2; GPUs: all of them, dp
    python examples/pretrain_stdlib.py --tp 2 --pp 2 --zero-stage 3 --devices 8

Kill it whenever you like: the same command goes on from the last checkpoint. So does another layout.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from llama_module import LlamaModule
from stdlib_data import StdlibData
from transformers import LlamaConfig, LlamaForCausalLM

import kenotron
from kenotron import checkpoint

SEED, VOCABULARY, SEQUENCE_LENGTH, BATCH_SIZE = 1, 4096, 256, 8
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
TOKENS_PER_STEP = BATCH_SIZE * SEQUENCE_LENGTH


def main() -> None:
    options = parse_options()
    silence()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes share the cores
    L.seed_everything(SEED, verbose=False)

    data = StdlibData(
        options.out / "data",
        vocabulary=VOCABULARY,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        seed=SEED,
    )
    found = latest_checkpoint(options.out / "checkpoints")
    if found is not None and step_of(found) >= options.steps:
        if "LOCAL_RANK" not in os.environ:
            print(f"{found} has {step_of(found)} steps already. Go on with more --steps, or start anew with another --out.")
            report(found, options, data)
        return

    progress = Progress(options.steps)
    trainer = make_trainer(options, progress)
    module = LlamaModule(MODEL, learning_rate=2e-3, warmup_steps=min(20, options.steps // 3), total_steps=options.steps)
    if trainer.is_global_zero:
        print(trainer.strategy.layout.table(device=options.accelerator))
        print(f"{count_parameters() / 1e6:.1f} M parameters, {options.steps} steps of {TOKENS_PER_STEP:,} tokens")
        if found is not None:
            print(f"Resuming from {found}")
        print(flush=True)

    trainer.fit(module, data, ckpt_path=found)
    if progress.last_step < options.steps:
        trainer.validate(module, data, verbose=False)
    final = options.out / "checkpoints" / f"step={options.steps}.ckpt"
    if not checkpoint.is_checkpoint(final):
        trainer.save_checkpoint(final)
    if trainer.is_global_zero:
        report(final, options, data)


def parse_options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="updates in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/stdlib"), help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() if on_gpu else 4, help="processes")
    parser.add_argument("--tp", type=int, default=1 if on_gpu else 2, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1 if on_gpu else 2, help="pipeline stages")
    parser.add_argument("--zero-stage", type=int, default=1, choices=(0, 1, 2, 3), help="default: %(default)s")
    parser.add_argument("--precision", default="bf16-mixed" if on_gpu else "32-true", help="as in Lightning's Trainer")
    # More microbatches fill the pipeline better, but four processes share two cores here, and each one costs some.
    parser.add_argument("--microbatches", type=int, default=2, help="into how many a batch is split under pp")
    parser.add_argument("--val-every", type=int, default=100, help="steps between validations, each with a checkpoint")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: there is nothing to train. Set it to 1 or more.")
    options.accelerator = "gpu" if on_gpu else "cpu"
    return options


def silence() -> None:
    """Keep to ourselves what a user of this script can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # tips, and what this script prints itself
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # tokens are in memory
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # it is where we resume from
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning's use of torch


def make_trainer(options: argparse.Namespace, progress: Progress) -> L.Trainer:
    callbacks = [
        progress,
        ModelCheckpoint(
            options.out / "checkpoints",
            filename="{step}",
            monitor="step",  # the newest two
            mode="max",
            save_top_k=2,
            save_on_train_epoch_end=False,  # after each validation
        ),
        LearningRateMonitor(),
    ]
    has_terminal = sys.stdout.isatty()
    if has_terminal:
        callbacks.append(ProgressBar())
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,
        strategy=kenotron.KenotronStrategy(
            tp=options.tp,
            pp=options.pp,
            zero_stage=options.zero_stage,
            microbatches=options.microbatches if options.pp > 1 else "auto",
        ),
        max_steps=options.steps,
        max_epochs=-1,
        val_check_interval=min(options.val_every, options.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # validation before the first step, to have what training starts from
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=TensorBoardLogger(options.out, name="", version="logs"),
        log_every_n_steps=5,
        use_distributed_sampler=False,  # the data module splits samples itself
        enable_progress_bar=has_terminal,
        enable_model_summary=False,
    )


class Progress(L.Callback):
    """Prints a line at each validation and keeps what the final summary needs, in checkpoints too."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.val_losses: list[tuple[int, float]] = []
        self.train_seconds = 0.0
        self._start, self._start_step = 0.0, 0

    @property
    def last_step(self) -> int:
        return self.val_losses[-1][0] if self.val_losses else -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart_clock(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log("tokens_per_s", self._tokens_per_second(trainer), prog_bar=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._rate = self._tokens_per_second(trainer)
            self.train_seconds += time.monotonic() - self._start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.val_losses.append((trainer.global_step, float(metrics["val_loss"])))
        line = f"step {trainer.global_step:>{len(str(self.total_steps))}}/{self.total_steps}"
        line += f"   val_loss {self.val_losses[-1][1]:.3f} nats/token"
        if not trainer.sanity_checking:
            line += f"   {self._rate:,.0f} tokens/s"
        if trainer.is_global_zero:
            if trainer.progress_bar_callback is not None:
                trainer.progress_bar_callback.print(line)
            else:
                print(line, flush=True)
        self._restart_clock(trainer)

    def _restart_clock(self, trainer: L.Trainer) -> None:
        self._start, self._start_step = time.monotonic(), trainer.global_step

    def _tokens_per_second(self, trainer: L.Trainer) -> float:
        tokens = (trainer.global_step - self._start_step) * TOKENS_PER_STEP
        return tokens / max(1e-9, time.monotonic() - self._start)

    def state_dict(self) -> dict[str, Any]:
        return {"val_losses": self.val_losses, "train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.val_losses = [(int(step), float(loss)) for step, loss in state_dict["val_losses"]]
        self.train_seconds = state_dict["train_seconds"]


class ProgressBar(TQDMProgressBar):
    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)  # the version of the logs: there is but one
        if "tokens_per_s" in metrics:
            metrics["tokens_per_s"] = f"{metrics['tokens_per_s']:,.0f}"  # tqdm writes 1.22e+3
        return metrics


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is published whole; one that a kill cut short is none."""
    return max(filter(checkpoint.is_checkpoint, folder.glob("step=*.ckpt")), key=step_of, default=None)


def count_parameters() -> int:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**MODEL)).num_parameters()


def report(path: Path, options: argparse.Namespace, data: StdlibData) -> None:
    """Print the summary of a finished run and a sample of what its model writes."""
    state = checkpoint.load_state(checkpoint.read_manifest(path))["lightning"]
    history = state["callbacks"]["Progress"]
    (_, first), (_, last) = history["val_losses"][0], history["val_losses"][-1]
    tokens = state["global_step"] * TOKENS_PER_STEP
    print(f"\nval_loss     {first:.3f} → {last:.3f} nats/token (ln {VOCABULARY} = {math.log(VOCABULARY):.3f})")
    print(f"tokens seen  {tokens:,} at {tokens / history['train_seconds']:,.0f} tokens/s")
    print(f"checkpoint   {path}")
    print(f"logs         {options.out / 'logs'}   (tensorboard --logdir {options.out})")
    print("\nA sample, from the checkpoint loaded into a plain LlamaForCausalLM:\n")
    print(sample(path, state["hyper_parameters"]["config"], data), flush=True)


def sample(path: Path, config: dict[str, Any], data: StdlibData, prompt: str = "class Queue:\n    def ") -> str:
    """Return what the model of a checkpoint makes of ``prompt``, in this one process."""
    model = LlamaForCausalLM(LlamaConfig(**config))
    weights = kenotron.load_state_dict(path)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    tokenizer = data.tokenizer()
    prompt_ids = torch.tensor([tokenizer.encode(prompt).ids])
    torch.manual_seed(SEED)
    ids = model.eval().generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=120,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        pad_token_id=0,
    )
    return tokenizer.decode(ids[0].tolist())


if __name__ == "__main__":
    main()

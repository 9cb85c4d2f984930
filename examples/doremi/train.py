"""Find weights for three corpora by DoReMi: a reference, a proxy, and the run that uses what they found.

    python examples/doremi/train.py corpora      # write three small corpora of bytes
    python examples/doremi/train.py reference    # train on all of them evenly
    python examples/doremi/train.py proxy        # the same model again, its loss weighed by what it has yet to learn
    python examples/doremi/train.py main         # train with the weights that were found; --even for comparison

All of it stays in ``runs/doremi``; a run that was killed goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F

import kenotron
from kenotron import CausalLM, TokenData
from kenotron.callbacks import DoReMi
from kenotron.checkpoint import is_checkpoint
from kenotron.data.nanoset import NanosetWriter
from kenotron.data.rows import IGNORED
from kenotron.data.stream import Sampling

sys.path.insert(0, str(Path(__file__).parents[1]))
from stdlib_data import is_held_out, source_files

CORPORA = ("python", "counting", "noise")
LENGTH, BATCH = 128, 24
MODEL = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip


def write_corpora(folder: Path) -> None:
    """Write what can be learned for long, what is learned at once, and what can't be learned; a token is a byte."""
    chance = random.Random(0)
    texts = {name: [] for name in CORPORA} | {"held_out": []}
    for path, text in source_files():
        texts["held_out" if is_held_out(path) else "python"].append(text)
    for _ in range(3000):
        first = chance.randrange(1000)
        texts["counting"].append(" ".join(str(first + step) for step in range(100)))
        texts["noise"].append("".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=400)))
    for name, documents in texts.items():
        with NanosetWriter(folder / name / "bytes.ds", token_size=2, tokenizer="bytes") as writer:
            for text in documents:
                writer.write(list(text.encode()))
        print(f"{folder / name}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens")


class Proxy(CausalLM):
    """A language model whose loss DoReMi weighs by corpus, with the reference model beside it.

    Args:
        reference: checkpoint of the reference run. settings: of :class:`kenotron.CausalLM`.
    """

    def __init__(self, reference: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._checkpoint = reference
        self.reference: Any = None

    def configure_model(self) -> None:
        super().configure_model()
        if self.reference is None:
            self.reference = kenotron.from_checkpoint(self._checkpoint).requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        (doremi,) = (callback for callback in self.trainer.callbacks if isinstance(callback, DoReMi))
        with torch.no_grad():
            reference = token_losses(self.reference, batch)
        proxy = token_losses(self.model, batch)
        return doremi.loss(proxy, reference, batch["shift_labels"] != IGNORED, batch["corpus"])

    def on_after_backward(self) -> None:
        """Log nothing of what the base class does: the loss is another one."""


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each token in nats, (samples, tokens)."""
    logits_BSV = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels_BS = batch["shift_labels"]
    losses = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels_BS.shape)


def train(options: argparse.Namespace) -> None:
    folder: Path = options.out
    name = "even" if options.run == "main" and options.even else options.run
    weights = dict.fromkeys(CORPORA, 1.0)
    if name == "main":
        weights = json.loads((folder / "weights.json").read_text())
        print("weights", ", ".join(f"{corpus} {weight:.3f}" for corpus, weight in weights.items()))
    settings: dict[str, Any] = {"model": MODEL, "learning_rate": 3e-3, "warmup_steps": 20, "total_steps": options.steps}
    module = Proxy(folder / "reference" / "last.ckpt", **settings) if name == "proxy" else CausalLM(**settings)
    data = TokenData(
        {corpus: str(folder / "corpora" / corpus) for corpus in CORPORA},
        LENGTH,
        BATCH,
        weights=weights,
        validation={"held_out": str(folder / "corpora" / "held_out")},
        sampling=Sampling(corpus_ids=name == "proxy"),
        steps_per_epoch=50,
    )
    checkpoints = ModelCheckpoint(folder / name, save_last=True, save_top_k=0, every_n_train_steps=50)
    callbacks: list[L.Callback] = [checkpoints]
    if name == "proxy":
        callbacks.append(DoReMi(CORPORA, out=folder / "weights.json"))
    trainer = L.Trainer(
        strategy=kenotron.KenotronStrategy(tp=options.tp),
        devices=options.devices,
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=20,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=f"{name}-logs"),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / name / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if is_checkpoint(last) else None)
    if name == "proxy" and trainer.is_global_zero:
        print((folder / "weights.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=("corpora", "reference", "proxy", "main"))
    parser.add_argument("--even", action="store_true", help="main: blend the corpora evenly instead")
    parser.add_argument("--steps", type=int, default=200, help="updates (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/doremi"), help="default: %(default)s")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes share the cores
    L.seed_everything(1, verbose=False)
    if options.run == "corpora":
        write_corpora(options.out / "corpora")
    else:
        train(options)


if __name__ == "__main__":
    main()

"""Train on data of your own: an ordinary PyTorch loader, or a stream that is tokenised as it is read.

    python examples/custom-dataloader/train.py                    # a Dataset and a DataLoader, as with any other strategy
    python examples/custom-dataloader/train.py --data stream      # an iterable of texts, through kenotron.StreamData

The task is to add: ``37+5=42``. Nothing is downloaded, and nothing is stored but a tokenizer.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kenotron

ALPHABET, LENGTH, BATCH = "\n+=0123456789", 32, 32
MODEL = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}


def sums(seed: int, count: int) -> Iterator[str]:
    """Yield lines such as ``37+5=42``, the same for a seed."""
    drawn = random.Random(seed)
    for _ in range(count):
        a, b = drawn.randrange(50), drawn.randrange(50)
        yield f"{a}+{b}={a + b}\n"


class Sums(Dataset[dict[str, Tensor]]):
    """Lines one after the other, in samples of the same length."""

    def __init__(self, seed: int, count: int) -> None:
        ids = torch.tensor([ALPHABET.index(character) for line in sums(seed, count) for character in line])
        self.samples = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.samples[index]}


class Loaders(L.LightningDataModule):
    """Two loaders. Lightning gives them the sampler that splits samples over data-parallel ranks."""

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Sums(seed=0, count=40_000), BATCH // self.trainer.world_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Sums(seed=1, count=2_000), BATCH)


class Lines:
    """A stream: rows with a text, from the begin on whenever it is iterated over."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        for line in sums(seed=0, count=40_000):
            yield {"text": line}


def stream(folder: Path) -> kenotron.StreamData:
    """Return the same lines as a stream, with those that are held out as a corpus beside it."""
    from kenotron.data.hf_datasets import DatasetCorpus

    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    held_out = DatasetCorpus([{"text": line} for line in sums(seed=1, count=2_000)], folder, cache_dir=folder / "cache")
    return kenotron.StreamData(Lines(), LENGTH, BATCH, tokenizer=folder, validation={"0": held_out})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("loader", "stream"), default="loader", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="updates (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/custom-dataloader"), help="default: %(default)s")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        devices=options.devices,
        strategy="kenotron",
        max_steps=options.steps,
        val_check_interval=options.steps // 3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = kenotron.CausalLM(MODEL, learning_rate=3e-3, warmup_steps=10)
    trainer.fit(module, datamodule=Loaders() if options.data == "loader" else stream(options.out))


if __name__ == "__main__":
    main()

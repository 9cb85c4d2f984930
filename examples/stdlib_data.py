"""The sources of Python's standard library as training data: always there, no download, and a model soon writes Python."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader

END_OF_FILE = "<|endoffile|>"  # token 0

#: Folders without prose or code worth learning: other people's packages, tests, tables of character sets.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}


def source_files() -> list[tuple[str, str]]:
    """Return (relative path, text) of the standard library's modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in paths if not SKIPPED & set(path.parts) and not path.name.startswith("_sysconfigdata")]
    return [(path.as_posix(), (root / path).read_bytes().decode("utf-8", "replace")) for path in kept]


def is_held_out(relative_path: str) -> bool:
    """Whether a file is for validation: 5 % of them, by a hash of the name, so that no other file can change the answer."""
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 20 == 0


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE; the same texts give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_FILE], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class TokenLoader:
    """Batches of one data-parallel rank, shuffled anew in every epoch, that can go on in the middle of one.

    Which windows are in global batch ``n`` depends on the seed and ``n`` alone. So all there is to save is how many samples
    were drawn, and a run may be resumed on more or fewer ranks.

    Args:
        windows_NS: token windows. batch_size: of all ranks together. rank, num_ranks: this one's place among those that
            load different samples.
    """

    def __init__(self, windows_NS: np.ndarray, batch_size: int, rank: int, num_ranks: int, seed: int) -> None:
        self._windows_NS, self._batch_size, self._seed = windows_NS, batch_size, seed
        self._rank, self._num_ranks = rank, num_ranks
        self._batches_drawn = 0

    def __len__(self) -> int:
        return len(self._windows_NS) // self._batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yield what the current epoch has left."""
        epoch, start = divmod(self._batches_drawn, len(self))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._windows_NS))
        for batch in range(start, len(self)):
            global_batch = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            self._batches_drawn += 1
            yield to_tensor(self._windows_NS[global_batch[self._rank :: self._num_ranks]])

    def state_dict(self) -> dict[str, Any]:
        """Lightning keeps this in its checkpoints."""
        return {"samples_drawn": self._batches_drawn * self._batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches_drawn = state["samples_drawn"] // self._batch_size


def to_tensor(windows_BS: np.ndarray) -> Tensor:
    return torch.from_numpy(windows_BS.astype(np.int64))


class StdlibData(L.LightningDataModule):
    """Tokenised once, under ``folder``; read by every rank.

    Args:
        folder: where tokenizer and tokens are kept. vocabulary: size of the BPE. sequence_length: tokens of a sample.
        batch_size: samples of a training step, all ranks together. val_samples: samples of a validation.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocabulary: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 16,
        val_samples: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # What the tokens depend on is in the name: another Python has other files.
        self.folder = folder / f"stdlib-{platform.python_version()}-bpe{vocabulary}"
        self.vocabulary, self.sequence_length, self.batch_size = vocabulary, sequence_length, batch_size
        self.val_samples, self.seed = val_samples, seed

    def prepare_data(self) -> None:
        """Train the tokenizer and write the tokens. Lightning calls this on one rank while the others wait."""
        if self.folder.exists():
            return
        print("Tokenising the standard library ...", flush=True)
        unfinished = self.folder.with_name(self.folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        files = source_files()
        texts = {
            "train": [text for path, text in files if not is_held_out(path)],
            "val": [text for path, text in files if is_held_out(path)],
        }
        tokenizer = train_tokenizer(texts["train"], self.vocabulary)
        tokenizer.save(str(unfinished / "tokenizer.json"))
        for split, documents in texts.items():
            encoded = tokenizer.encode_batch([text + END_OF_FILE for text in documents])
            tokens = np.concatenate([np.array(document.ids, dtype=np.uint16) for document in encoded])
            np.save(unfinished / f"{split}.npy", tokens)
            size = f"{sum(map(len, documents)):>10,} characters  {len(tokens):>9,} tokens"
            print(f"  {split:<5} {len(documents):>4} files  {size}", flush=True)
        os.rename(unfinished, self.folder)  # all at once: killed before, the next run starts over

    @property
    def tokenizer_folder(self) -> Path:
        """Checkpoints note it, so that ``kenotron generate`` needs to be told nothing."""
        return self.folder

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def train_dataloader(self) -> TokenLoader:
        rank, num_ranks = self._place()
        return TokenLoader(self._windows("train"), self.batch_size, rank, num_ranks, self.seed)

    def val_dataloader(self) -> DataLoader[Tensor]:
        rank, num_ranks = self._place()
        windows_NS = self._windows("val")
        # Evenly over all files; on each rank as many, since validation is a collective.
        count = min(self.val_samples, len(windows_NS)) // num_ranks * num_ranks
        chosen = np.linspace(0, len(windows_NS) - 1, count).astype(int)[rank::num_ranks]
        return DataLoader(to_tensor(windows_NS[chosen]), self.batch_size // num_ranks)  # type: ignore[arg-type]

    def _place(self) -> tuple[int, int]:
        """Return this rank's place among those that load different samples; ranks of one model replica share it."""
        assert self.trainer is not None
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        if self.batch_size % place["num_replicas"]:
            raise ValueError(
                f"batch_size={self.batch_size} can't be split over {place['num_replicas']} data-parallel ranks. "
                f"Set it to a multiple of {place['num_replicas']}."
            )
        return place["rank"], place["num_replicas"]

    def _windows(self, split: str) -> np.ndarray:
        tokens = np.load(self.folder / f"{split}.npy", mmap_mode="r")
        count = len(tokens) // self.sequence_length
        return tokens[: count * self.sequence_length].reshape(count, self.sequence_length)

"""Files of strangers beside checkpoints' manifests, mutated: models of Hugging Face, corpora, tokenizers, configurations.

Each reader ends in a value or an error that tells something, soon, without memory out of proportion, and touches nothing
outside of the folder. Each case follows from its seed and number, which failures name.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_fuzz import HOSTILE, PATIENCE_S, SPARE_BYTES, apart, mutate  # noqa: F401

from kenotron.data.corpus import open_corpus, read_record
from kenotron.data.tokenize.vocabulary import read_vocabulary, train_tokenizer
from kenotron.hf import HFDirectory
from kenotron.planning.model import read_config
from kenotron.testing import RankPool


def make_model(folder: Path) -> None:
    """A directory of two files and an index."""
    tensors = {f"layers.{n}.weight": torch.arange(12.0).reshape(3, 4) + n for n in range(4)}
    names = list(tensors)
    for file, held in (("a.safetensors", names[:2]), ("b.safetensors", names[2:])):
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": 192},
        "weight_map": {n: "a.safetensors" if n in names[:2] else "b.safetensors" for n in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 16}
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 16, "architectures": ["LlamaForCausalLM"]}))


def make_corpus(folder: Path) -> None:
    """Tokens of both formats, without what ``kenotron tokenize`` notes of them."""
    tokens, ends = np.arange(60, dtype="<u2"), np.array([20, 45, 60], dtype="<u8")
    tokens.tofile(folder / "x.ds")
    ends.tofile(folder / "x.ds.index")
    (folder / "x.ds.metadata").write_text("gpt2|2\n60\n1.0 K")
    lengths = np.array([20, 25, 15], "<i4")
    begins = 2 * np.array([0, 20, 45], "<i8")
    head = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([8]) + np.array([3, 4], "<u8").tobytes()
    (folder / "y.idx").write_bytes(head + lengths.tobytes() + begins.tobytes() + np.arange(4, dtype="<i8").tobytes())
    tokens.tofile(folder / "y.bin")
    files = [{"name": "x.ds", "bytes": 120, "num_documents": 3}]
    (folder / "corpus.json").write_text(json.dumps({"version": 1, "complete": True, "files": files}))


def make_tokenizer(folder: Path) -> None:
    folder.rmdir()
    train_tokenizer(["some words, and some more words"] * 20, 270, folder)


def read_model(folder: Path) -> None:
    found = HFDirectory(folder)
    for name in found.names():
        found.read(name)
    found.config()


def read_tokens(folder: Path) -> None:
    read_record(folder)
    for name in ("x.ds", "y.bin"):
        corpus: Any = open_corpus(folder / name, token_size=2)
        corpus.read(0, min(corpus.num_tokens, 60))
        corpus.ends(0, min(corpus.num_documents, 3))


def read_configuration(folder: Path) -> None:
    read_config(folder / "config.json")


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], list[str]]] = {
    "headers": (make_model, read_model, ["a.safetensors", "b.safetensors"]),
    "index": (make_model, read_model, ["model.safetensors.index.json", "config.json"]),
    "configuration": (make_model, read_configuration, ["config.json"]),
    "corpus": (make_corpus, read_tokens, ["corpus.json", "x.ds.index", "x.ds.metadata", "x.ds", "y.idx", "y.bin"]),
    "tokenizer": (make_tokenizer, read_vocabulary, ["tokenizer.json", "tokenizer_config.json"]),
}  # fmt: skip
#: What a reader may raise: that a file is no good, or that there is none.
EXPECTED = (ValueError, OSError, RuntimeError)
#: What the objects that JSON stands for, errors and tracebacks take in Python, beyond twice the bytes of the files: these
#: have 20 kB at most.
OBJECTS_BYTES = 256 << 10


def mutated(good: bytes, name: str, generator: random.Random) -> bytes:
    """Change the JSON in a file, where there is some, or else its bytes."""
    if name.endswith(".safetensors") and generator.random() < 0.8:
        length = int.from_bytes(good[:8], "little")
        text = mutated(good[8 : 8 + length], ".json", generator)
        told = len(text) if generator.random() < 0.8 else generator.choice([0, 7, 2**31, 2**62, 2**64 - 1, len(text) + 1])
        return told.to_bytes(8, "little") + text + good[8 + length :]
    if name.endswith(".json") and generator.random() < 0.8:
        node = json.loads(good)
        for _ in range(generator.choice([1, 1, 2, 4])):
            mutate(node, generator) if node else node.update(a=generator.choice(HOSTILE))
        return json.dumps(node).encode()
    data = bytearray(good)
    for _ in range(generator.choice([1, 2, 8])):
        match generator.randrange(4):
            case 0:
                del data[generator.randrange(len(data) + 1) :]
            case 1:
                data += generator.randbytes(generator.choice([1, 7, 4096]))
            case 2 if len(data) >= 8:
                place = generator.randrange(len(data) - 7)
                data[place : place + 8] = generator.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]).to_bytes(8, "little")
            case _ if data:
                data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data)


def read_mutations(folder: Path, reader: str, seed: int, count: int) -> dict[str, Any]:
    """Read ``count`` mutations with little memory; return what went wrong, and how often which error was raised."""
    make, read, names = READERS[reader]
    folder.mkdir(parents=True)
    make(folder)
    good = {name: (folder / name).read_bytes() for name in names}
    read(folder)  # so that what is imported late is there
    held = sum(path.stat().st_size for path in folder.iterdir())
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE_BYTES, limits[1]))
    tracemalloc.start()
    try:
        for number in range(count):
            generator = random.Random(seed * 1_000_003 + number)
            name = generator.choice(names)
            (folder / name).write_bytes(content := mutated(good[name], name, generator))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            began = time.monotonic()
            try:
                read(folder)
                outcomes["read"] += 1
            except EXPECTED as error:
                outcomes[type(error).__name__] += 1
                if not str(error):
                    problems.append(f"case {number}, {name}: {type(error).__name__} says nothing")
            except BaseException as error:
                problems.append(f"case {number}, {name}: {type(error).__name__}: {error!s:.200}")
            if time.monotonic() - began > PATIENCE_S:
                problems.append(f"case {number}, {name}: took {time.monotonic() - began:.1f} s")
            took = tracemalloc.get_traced_memory()[1] - before
            if took > 2 * (held + len(content)) + OBJECTS_BYTES:
                problems.append(f"case {number}, {name}: took {took} bytes for files of {held + len(content)}")
            (folder / name).write_bytes(good[name])
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return {"problems": problems, "outcomes": dict(outcomes), "files": sorted(os.listdir(folder.parent))}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("seed", "count"), [(1, 120), pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_mutated_files_end_in_errors_within_bounds(apart: RankPool, tmp_path: Path, reader: str, seed: int, count: int) -> None:  # noqa: F811
    (told,) = apart.run(read_mutations, 1, tmp_path / "in" / "folder", reader, seed, count, timeout_s=170.0)
    assert told["problems"] == []
    assert sum(told["outcomes"].values()) == count
    assert told["outcomes"].get("read", 0) < count
    assert told["files"] == ["folder"]
    shutil.rmtree(tmp_path / "in")

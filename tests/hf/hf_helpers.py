"""What the tests of Hugging Face directories share: tensors of all dtypes, boxes, a tiny model, the peak of memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

Ranges = tuple[tuple[int, int], ...]

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits, NaNs among them: what is copied as numbers would change some."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    values = random.Random(seed).choices(range(2 if dtype == torch.bool else 256), k=num_bytes)
    return torch.tensor(values, dtype=torch.uint8).view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [each.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for each in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)


def all_kinds() -> dict[str, torch.Tensor]:
    """Return for each dtype a matrix, a number and what has no elements."""
    tensors = {}
    for dtype in DTYPES:
        for shape in ((7, 5), (), (0,), (3, 0, 2)):
            tensors[f"{dtype}{list(shape)}"] = bits(shape, dtype, len(tensors))
    return tensors


def some_box(shape: tuple[int, ...], generator: random.Random) -> Ranges:
    """Return a box at random: empty, of all of a dimension, and between."""
    edges = [sorted(generator.choices(range(size + 1), k=2)) for size in shape]
    return tuple((0, size) if generator.random() < 0.4 else (a, b) for (a, b), size in zip(edges, shape, strict=True))


def cut(tensor: torch.Tensor, box: Ranges) -> torch.Tensor:
    return tensor[tuple(slice(*each) for each in box)]


def tiny_llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **sizes)).to(dtype)


def peak_growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the process's resident memory exceeds, at its peak, what it was before ``work``."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    kept = work()
    grown = _status("VmHWM") - before
    del kept
    return grown


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

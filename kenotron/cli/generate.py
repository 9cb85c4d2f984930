"""``kenotron generate``: text from a checkpoint, on one process or, started by torchrun, with tensor parallelism over all."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kenotron.checkpoint import CheckpointError, is_checkpoint, read_manifest
from kenotron.hf import from_checkpoint, from_hf, generate
from kenotron.hf.export import find_record
from kenotron.hf.generate import check_settings
from kenotron.layout import ParallelLayout
from kenotron.parallel.apply import Request, parallelize
from kenotron.parallel.init import deferring


def run(options: argparse.Namespace) -> int:
    """Print each prompt with what follows it, and return the exit code."""
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    try:
        check_settings(options.prompt, options.max_new_tokens, **sampling)
        tokenizer = _tokenizer(options)
        with _ranks() as device:
            texts = generate(
                _model(options, device), tokenizer, options.prompt, max_new_tokens=options.max_new_tokens,
                use_cache=not options.no_cache, seed=options.seed, **sampling,
            )  # fmt: skip
    except (ValueError, CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if _rank() == 0:
        for prompt, text in zip(options.prompt, texts, strict=True):
            print(f"{prompt}{text}")
    return 0


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _ranks() -> Iterator[torch.device]:
    """Join the other processes that torchrun has started, if any. Yields this one's device."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if _world_size() == 1:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _model(options: argparse.Namespace, device: torch.device) -> Any:
    dtype = None if options.dtype is None else getattr(torch, options.dtype)

    def load() -> Any:
        if is_checkpoint(options.checkpoint):
            return from_checkpoint(options.checkpoint, model=options.model, config=options.config, dtype=dtype)
        if options.model is not None or options.config is not None:
            raise ValueError(f"--model and --config are for checkpoints, and {options.checkpoint} is none. Leave them out.")
        return from_hf(options.checkpoint, dtype=dtype)

    if _world_size() == 1:
        return load().to(device)
    layout = ParallelLayout(dp=1, tp=_world_size()).resolve(_world_size())
    with deferring():
        model = load()
    return parallelize(model, layout.device_mesh(device.type), Request(layout=layout, device=device)).root


def _tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    place = options.tokenizer
    if place is None and is_checkpoint(options.checkpoint):
        place = find_record(read_manifest(options.checkpoint), options.model, options.config).source
    elif place is None:
        place = options.checkpoint
    if place is None or not (Path(place) / "tokenizer_config.json").is_file():
        raise ValueError(f"{place or options.checkpoint} has no tokenizer. Name a directory that has one: --tokenizer DIR")
    return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)

"""Whole conversions, in one process on a CPU, parameter by parameter: into checkpoints, and into Nanotron's layout.

A checkpoint's sizes are known before its first byte is written, so a parameter exists from its turn until it is written.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kenotron.checkpoint import LocalTensor, SyncShardWriter, read_manifest, save
from kenotron.checkpoint.format import Piece, bytes_of
from kenotron.checkpoint.save import remove_tree
from kenotron.durable import fsync, fsync_directory, make_directories
from kenotron.hf.configuration import load_config
from kenotron.hf.directory import HFDirectory
from kenotron.hf.export import find_record, read_whole
from kenotron.hf.load import DirectoryWeights, check_tensors, follow_ties
from kenotron.hf.names import EMBEDDINGS, decoder_pieces, model_pieces
from kenotron.hf.nanotron import (
    NanotronCheckpoint,
    config_from_nanotron,
    config_to_nanotron,
    halves_to_neighbours,
    nanotron_name,
    neighbours_to_halves,
    write_companions,
    write_parameter,
)
from kenotron.hf.record import ModelRecord

PathLike = str | os.PathLike[str]
Parameters = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def hf_to_kenotron(path: PathLike, out: PathLike, *, name: str = "model") -> Path:
    """Write a checkpoint of the model in a Hugging Face directory, as Decoder or Mamba.

    Args:
        path: the directory. out: the checkpoint to make.
        name: of the model in the LightningModule that will load it.

    Raises:
        ValueError: an architecture that neither covers, tensors that do not fit, or ``out`` is there.
    """
    directory = HFDirectory(path)
    directory.config()
    config = load_config(directory.path)
    model = _empty(config)
    pieces = follow_ties(directory, model, model_pieces(config))
    check_tensors(directory, model, pieces)
    generation = directory.path / "generation_config.json"
    settings = json.loads(generation.read_text()) if generation.is_file() else None
    record = ModelRecord.of(config, name, "kenotron", generation=settings, source=str(Path(path).resolve()))
    weights = DirectoryWeights(directory, pieces)
    parameters = {
        key: (directory.tensors[pieces[key][0].name].dtype, tuple(param.shape)) for key, param in model.named_parameters()
    }

    def make(key: str) -> Tensor:
        dtype, shape = parameters[key]
        whole, zeros = torch.empty(shape, dtype=dtype), (0,) * len(shape)
        weights.read(key, Piece(local=zeros, offset=zeros, shape=shape), whole)
        return whole

    return _write_checkpoint(out, record, parameters, make)


def nanotron_to_kenotron(path: PathLike, out: PathLike, *, name: str = "model") -> Path:
    """Write a checkpoint of the model in a Nanotron checkpoint, saved at any topology.

    Raises:
        ValueError: what is there is no Llama or Qwen2 of Nanotron, or is damaged, or ``out`` is there.
    """
    source = NanotronCheckpoint(path)
    config = config_from_nanotron(source)
    expected = {key: tuple(p.shape) for key, p in _empty(config).named_parameters()}
    theirs = {key: nanotron_name(key) for key in expected}
    problems = [f"{other} is missing" for other in theirs.values() if other not in source.parameters]
    problems += [f"{other} is no part of this {config.model_type}" for other in source.parameters.keys() - set(theirs.values())]
    problems += [
        f"{theirs[key]} has shape {list(source.parameters[theirs[key]].shape)}, the configuration wants {list(shape)}"
        for key, shape in expected.items()
        if theirs[key] in source.parameters and source.parameters[theirs[key]].shape != shape
    ]
    if problems:
        raise ValueError("\n".join([f"{source.path} does not fit its configuration:", *problems]))

    def make(key: str) -> Tensor:
        whole = source.read(theirs[key])
        return neighbours_to_halves(whole, *_heads(config)) if source.is_interleaved and ".qkv_proj." in key else whole

    parameters = {key: (source.parameters[other].dtype, source.parameters[other].shape) for key, other in theirs.items()}
    return _write_checkpoint(out, ModelRecord.of(config, name, "kenotron"), parameters, make)


def kenotron_to_nanotron(
    checkpoint: PathLike, out: PathLike, *, model: str | None = None, tp: int = 1, rope_interleaved: bool = False
) -> Path:
    """Write the Decoder of a checkpoint of any layout as a Nanotron checkpoint.

    Args:
        checkpoint: it. out: the folder of a step to make. model: as for :func:`~kenotron.hf.export`.
        tp: for so many tensor-parallel ranks; Nanotron itself reads it at any number.
        rope_interleaved: order the rows of heads so that rotary pairs are neighbours.

    Raises:
        ValueError: a model that Nanotron does not know, a ``tp`` that does not divide, or ``out`` is there.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another path, or remove it first")
    manifest = read_manifest(checkpoint)
    record = find_record(manifest, model, None)
    if record.implementation != "kenotron":
        raise ValueError(
            f"{checkpoint} holds transformers' {record.architecture}. Export it, and convert the directory: kenotron export, "
            "then kenotron convert hf-to-kenotron."
        )
    config = record.make_config()
    theirs = config_to_nanotron(config, rope_interleaved=rope_interleaved)
    made = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:12]}")
    make_directories(made)
    try:
        for key, group in decoder_pieces(config).items():
            whole = read_whole(manifest, record.prefix + key)
            if rope_interleaved and ".qkv_proj." in key:
                whole = halves_to_neighbours(whole, *_heads(config))
            parts = [piece.box[0][1] - piece.box[0][0] for piece in group]
            write_parameter(made / "model", nanotron_name(key), whole, parts, tp)
        write_companions(made, theirs, tp)
        for folder, _, files in os.walk(made):
            for file in files:
                fsync(Path(folder) / file)
            fsync_directory(Path(folder))
        made.rename(out)
        fsync_directory(out.parent)
    finally:
        if made.exists():
            remove_tree(made)
    return out


def _heads(config: Any) -> tuple[int, int]:
    """Return how many heads queries and keys have together, and their size."""
    heads = config.num_attention_heads
    return heads + config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _empty(config: Any) -> Any:
    from kenotron.models.own import own_class

    with torch.device("meta"):
        return own_class(config)(config)


def _write_checkpoint(out: PathLike, record: ModelRecord, parameters: Parameters, make: Callable[[str], Tensor]) -> Path:
    """Write a checkpoint of weights alone."""
    if Path(out).exists():
        raise ValueError(f"{out} exists; choose another path, or remove it first")
    # Stand-ins: one element each, seen as often as the parameter has elements.
    tensors = [
        LocalTensor.whole(record.prefix + key, torch.empty((), dtype=dtype).expand(shape))
        for key, (dtype, shape) in parameters.items()
    ]
    embedding = next(name for name in EMBEDDINGS if name in parameters)
    tied = {} if "lm_head.weight" in parameters else {record.prefix + "lm_head.weight": record.prefix + embedding}
    state: dict[str, Any] = {"lightning": {}, "extra_state": {}, "optimizers": None, "layout": None, "models": [vars(record)]}
    writer = _Made(lambda key: make(key.removeprefix(record.prefix)))
    save(out, tensors, state, rank=0, world_size=1, save_id=uuid.uuid4().hex, writer=writer, aliases=tied)
    return Path(out)


class _Made(SyncShardWriter):
    """Writes tensors that are made when it is their turn, in the place of their stand-ins."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        self._make = make

    def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], *, num_bytes: int) -> list[list[int]]:
        """Create ``path``; see ``ShardWriter.write``."""
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        names = sorted(entries, key=lambda name: entries[name]["data_offsets"][0])
        return super().write(path, header, (bytes_of(self._make(name)) for name in names), num_bytes=num_bytes)

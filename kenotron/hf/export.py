"""Checkpoints as Hugging Face directories, in one process on a CPU, without the model.

1. The checkpoint says which model it holds; its configuration gives the tensors of a directory and where in the parameters they
   lie.
2. Each tensor is read from the shards, of whatever layout, and written: memory stays below the largest one.
3. Configuration, generation settings and tokenizer are there by then, and the directory is published by one rename.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kenotron.checkpoint import LocalTensor, Manifest, load_into, load_state, read_manifest
from kenotron.checkpoint.format import Piece as LocalPiece
from kenotron.hf.conversions import transformers_pieces
from kenotron.hf.names import EMBEDDINGS, Piece, model_pieces
from kenotron.hf.record import MODEL_PREFIX, ModelRecord, record_of_directory
from kenotron.hf.writer import HFWriter

PathLike = str | os.PathLike[str]


def export(
    checkpoint: PathLike,
    out: PathLike,
    *,
    model: str | None = None,
    config: PathLike | None = None,
    tokenizer: PathLike | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write the model of a checkpoint as a Hugging Face directory, which ``from_pretrained`` loads.

    Args:
        checkpoint: one that ``KenotronStrategy`` wrote, on any layout. out: the directory to make.
        model: its name in the LightningModule, where there are several.
        config: a directory with the ``config.json`` of the model, in the place of what the checkpoint notes.
        tokenizer: a directory with a tokenizer to put beside; ``None``: that of the directory which the model was read from.
        dtype: to convert floating-point tensors to; ``None``: as they are.
        max_shard_bytes: size of a file.

    Raises:
        ValueError: nothing that can be exported, or ``out`` is there already.
        CheckpointError: the checkpoint is damaged.
    """
    manifest = read_manifest(checkpoint)
    record = find_record(manifest, model, config)
    made = record.make_config()
    pieces = pieces_of_record(record, made)
    stored = _stored_names(manifest, record, pieces)
    tensors = dict(_tensors(manifest, stored, pieces, dtype))
    with HFWriter(out, max_shard_bytes=max_shard_bytes) as writer:
        _write_companions(writer.path, record, made, tokenizer, next(iter(tensors.values()))[0])
        writer.plan(tensors)
        for name, group in pieces.items():
            for piece in group:
                writer.write(piece.name, _read(manifest, stored[name], piece).to(tensors[piece.name][0]))
    return Path(out)


def find_record(manifest: Manifest, model: str | None, config: PathLike | None) -> ModelRecord:
    """Return which model of a checkpoint is meant.

    Raises:
        ValueError: there is none, or several.
    """
    noted = [ModelRecord(**record) for record in load_state(manifest).get("models") or ()]
    names = ", ".join(repr(record.name) for record in noted)
    if noted and model is not None:
        noted = [record for record in noted if record.name == model]
        if not noted:
            raise ValueError(f"model={model!r} is none of the transformers models in {manifest.path}: {names}.")
    if len(noted) > 1:
        raise ValueError(f"{manifest.path} holds {len(noted)} transformers models: {names}. Say which one by model=.")
    if config is None:
        if not noted:
            raise ValueError(
                f"{manifest.path} notes no transformers model. Give the directory of its config.json, if there is one in it."
            )
        return noted[0]
    if noted:
        given = record_of_directory(config, noted[0].name, noted[0].implementation)
        return replace(given, architecture=noted[0].architecture, generation=noted[0].generation)
    ours = any(name.endswith("self_attn.qkv_proj.weight") for name in manifest.tensors)
    stored = [name.removeprefix(MODEL_PREFIX) for name in manifest.tensors if name.startswith(MODEL_PREFIX)]
    prefixes = [name.removesuffix(own).rstrip(".") for name in stored for own in EMBEDDINGS if name.endswith(own)]
    prefix = prefixes[0] if prefixes else ""
    return record_of_directory(config, prefix if model is None else model, "kenotron" if ours else "transformers")


def pieces_of_record(record: ModelRecord, config: Any) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of each parameter of a model, by its name in the model."""
    if record.implementation == "kenotron":
        return model_pieces(config)
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, record.architecture, None)
    if kind is None:
        raise ValueError(f"transformers {transformers.__version__} has no {record.architecture}, which the checkpoint holds.")
    with torch.device("meta"):
        model = kind(config)
    state = dict(model.state_dict(keep_vars=True))
    firsts = {id(value): name for name, value in reversed(state.items())}  # of tied weights one is written
    once = {name: value.detach() for name, value in state.items() if firsts[id(value)] == name}
    shapes = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, once).items()}
    return transformers_pieces(model, shapes)


def _stored_names(manifest: Manifest, record: ModelRecord, pieces: Mapping[str, Sequence[Piece]]) -> dict[str, str]:
    """Return under which name the checkpoint has each parameter."""
    stored = {name: manifest.aliases.get(record.prefix + name, record.prefix + name) for name in pieces}
    missing = [name for name, full in stored.items() if full not in manifest.tensors]
    if missing:
        raise ValueError(
            f"{manifest.path} lacks {len(missing)} tensors of a {record.architecture} with this configuration: "
            f"{', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}."
        )
    return stored


def _tensors(
    manifest: Manifest, stored: Mapping[str, str], pieces: Mapping[str, Sequence[Piece]], dtype: torch.dtype | None
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Yield name, dtype and shape of every tensor of the directory."""
    for name, group in pieces.items():
        whole = manifest.tensors[stored[name]]
        for piece in group:
            found = dtype if dtype is not None and whole.dtype.is_floating_point else whole.dtype
            yield piece.name, (found, piece.shape)


def read_whole(manifest: Manifest, name: str) -> torch.Tensor:
    """Return a whole tensor of a checkpoint, by its name there."""
    stored = manifest.tensors[name]
    return _read(manifest, name, Piece(name, tuple((0, size) for size in stored.shape)))


def _read(manifest: Manifest, name: str, piece: Piece) -> torch.Tensor:
    whole = manifest.tensors[name]
    extents = tuple(stop - start for start, stop in piece.box)
    tensor = torch.empty(extents, dtype=whole.dtype)
    place = LocalPiece(local=(0,) * len(extents), offset=tuple(start for start, _ in piece.box), shape=extents)
    load_into(manifest, [LocalTensor(name=name, tensor=tensor, global_shape=whole.shape, pieces=(place,), owners=(0,))])
    return tensor.view(piece.shape)


def _write_companions(path: Path, record: ModelRecord, config: Any, tokenizer: PathLike | None, dtype: torch.dtype) -> None:
    from transformers import AutoTokenizer

    config.dtype = dtype
    config.save_pretrained(path)
    if record.generation is not None:
        # Not through transformers, which refuses to write some that it has read (a temperature without sampling).
        text = json.dumps(dict(record.generation), indent=2, sort_keys=True) + "\n"
        (path / "generation_config.json").write_text(text)
    place = tokenizer if tokenizer is not None else record.source
    if place is None:
        return
    if tokenizer is None and not (Path(place) / "tokenizer_config.json").is_file():
        warnings.warn(f"{place} has no tokenizer (any more), so none is put beside; name one by tokenizer=.", stacklevel=3)
        return
    AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False).save_pretrained(path)

"""Models from checkpoints, without the code that trained them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from kenotron.checkpoint import LocalTensor, Manifest, load_into, read_manifest
from kenotron.checkpoint.format import Piece
from kenotron.hf.export import find_record
from kenotron.hf.record import ModelRecord
from kenotron.parallel.init import attach
from kenotron.parallel.recording import recording


def from_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    config: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the transformers model (or Decoder) of a checkpoint that was saved on any layout, with its weights.

    In ``configure_model`` under a Kénotron strategy each rank reads its own part alone. It is in training mode.

    Args:
        path: the checkpoint. model, config: as for :func:`kenotron.hf.export`.
        dtype: of the parameters; ``None``: torch's default.

    Raises:
        ValueError: the checkpoint notes no such model, or lacks some of its parameters.
        CheckpointError: it is damaged.
    """
    manifest = read_manifest(path)
    record = find_record(manifest, model, config)
    built = build(record, dtype)
    weights = _CheckpointWeights(manifest, record)
    missing = [name for name, _ in built.named_parameters() if name not in weights]
    if missing:
        more = ", …" if len(missing) > 8 else ""
        raise ValueError(f"{path} lacks {len(missing)} parameters of {record.architecture}: {', '.join(missing[:8])}{more}.")
    attach(built, weights)
    return built


def build(record: ModelRecord, dtype: torch.dtype | None) -> Any:
    """Return the model of a record, which waits for its weights."""
    import transformers
    from transformers import GenerationConfig

    from kenotron.models.own import own_class

    with recording(dtype, draw=False):
        config = record.make_config()
        kind: Any = own_class(config) if record.implementation == "kenotron" else getattr(transformers, record.architecture)
        model = kind(config)
    if record.generation is not None:
        model.generation_config = GenerationConfig.from_dict(dict(record.generation))
    return model


class _CheckpointWeights:
    """The parameters of a model, in a checkpoint."""

    def __init__(self, manifest: Manifest, record: ModelRecord) -> None:
        self._manifest = manifest
        self._prefix = record.prefix

    def _full(self, name: str) -> str:
        full = self._prefix + name
        return self._manifest.aliases.get(full, full)

    def __contains__(self, name: str) -> bool:
        return self._full(name) in self._manifest.tensors

    def read(self, name: str, piece: Piece, into: Tensor) -> None:
        """Fill ``into`` with a box of the parameter ``name``."""
        full = self._full(name)
        here = Piece(local=(0,) * into.ndim, offset=piece.offset, shape=piece.shape)
        shape = self._manifest.tensors[full].shape
        tensor = LocalTensor(name=full, tensor=into, global_shape=shape, pieces=(here,), owners=(0,))
        load_into(self._manifest, [tensor], cast=True)

"""Models from Hugging Face directories: each rank reads the byte ranges of its own part, and nothing else.

1. ``from_hf`` reads ``config.json`` and the headers, builds the model without computing anything (``parallel.deferred``) and
   compares the two: whatever is missing, left over or of another shape is told here.
2. The model carries where its weights lie. Under a Kénotron strategy it is then cut, and
3. every parameter is read when its part of it is known: no process holds the whole model. Elsewhere it is read at once.
   What is not stored, as buffers that follow from the configuration, is computed as the model's own code says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kenotron.checkpoint.boxes import Box, intersect
from kenotron.checkpoint.format import Piece as LocalPiece
from kenotron.hf.configuration import load_config
from kenotron.hf.conversions import transformers_pieces
from kenotron.hf.directory import HFDirectory
from kenotron.hf.errors import ModelMismatchError
from kenotron.hf.kinds import Implementation, check_implementation, class_of
from kenotron.hf.names import Piece, model_pieces, whole
from kenotron.parallel.deferred import Place
from kenotron.parallel.init import attach, names_of_parameters
from kenotron.parallel.recording import recording


def from_hf(
    path: str | os.PathLike[str],
    *,
    implementation: Implementation = "auto",
    config: Any = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Any:
    """Return the model of a Hugging Face directory, of the class that ``architectures`` in its ``config.json`` names.

    Call it in ``configure_model``: under a Kénotron strategy every rank then reads its own part alone. It is in training mode.

    Args:
        path: a local directory with ``config.json`` and safetensors files.
        implementation: ``"kenotron"`` for :class:`~kenotron.models.Decoder` or :class:`~kenotron.models.Mamba` (causal language
            models), ``"transformers"`` for transformers' own class, ``"auto"`` for the first where it covers the model.
        config: in the place of the directory's.
        dtype: of the parameters; ``None``: torch's default, which Lightning's precision plugins set.
        settings: further arguments of ``Decoder`` or ``Mamba``, or of the ``from_config`` of transformers' Auto classes.

    Raises:
        HFDirectoryError: a ``ValueError``: files that can't be read, or tensors that do not fit the model; all are named.
        ValueError: an architecture that is not covered.
    """
    from transformers import GenerationConfig

    from kenotron.models.own import is_ours, own_class

    if implementation not in ("auto", "kenotron", "transformers"):
        raise ValueError(f"implementation={implementation!r}: set 'auto', 'kenotron' or 'transformers'.")
    directory = HFDirectory(path)
    stored = directory.config() if config is None or (directory.path / "config.json").is_file() else {}
    if config is None:
        config = load_config(directory.path)
    kind = class_of(config, stored, directory.path)
    ours = is_ours(config, check_implementation(implementation, config, kind))
    with recording(dtype, draw=False):
        if ours:
            model: Any = own_class(config)(config, **settings)
        else:
            model = kind._from_config(config, dtype=torch.get_default_dtype(), **settings)
    if ours:
        pieces = model_pieces(config)
    else:
        pieces = transformers_pieces(model, {name: at.shape for name, at in directory.tensors.items()})
    pieces = follow_ties(directory, model, pieces)
    check_tensors(directory, model, pieces)
    if (directory.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory.path, local_files_only=True)
    attach(model, DirectoryWeights(directory, pieces))
    return model


class DirectoryWeights:
    """The parameters of a model, in a directory's tensors."""

    def __init__(self, directory: HFDirectory, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self._directory, self._pieces = directory, pieces

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def read(self, name: str, piece: LocalPiece, into: Tensor) -> None:
        """Fill ``into`` with a box of the parameter ``name``."""
        for stored in self._pieces[name]:
            place = Box(tuple(start for start, _ in stored.box), tuple(stop - start for start, stop in stored.box))
            common = intersect(Box(piece.offset, piece.shape), place)
            if common is None:
                continue
            here = tuple(
                slice(at - start, at - start + size)
                for at, start, size in zip(common.offset, piece.offset, common.shape, strict=True)
            )
            ranges = tuple(
                (at - start, at - start + size)
                for at, start, size in zip(common.offset, place.offset, common.shape, strict=True)
            )[stored.front :]
            target = into[here].flatten(0, stored.front) if stored.front else into[here]
            if target.is_cpu:
                self._directory.read(stored.name, ranges, out=target)
            else:
                target.copy_(self._directory.read(stored.name, ranges))


_HEAD = "lm_head.weight"


def follow_ties(
    directory: HFDirectory, model: nn.Module, pieces: Mapping[str, tuple[Piece, ...]]
) -> dict[str, tuple[Piece, ...]]:
    """Return ``pieces`` with tied parameters read from whichever of their names is stored (the head's, where it is alone)."""
    found = dict(pieces)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    for first, *others in names_of_parameters(model).values():
        if all(piece.name in directory.tensors for piece in found.get(first, ())) and first in found:
            continue
        for other in others:
            if other in directory.tensors:
                found[first] = pieces.get(other, whole(other, *shapes[first]))
    return found


_COMPARED_ELEMENTS = 2**22

#: Tensors that files of old have and no model wants: they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def check_tensors(directory: HFDirectory, model: nn.Module, pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Raise ``ModelMismatchError`` unless each tensor has its place in the model, and each weight of the model its tensor."""
    kept = model.state_dict(keep_vars=True)
    tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name in kept or name in pieces}
    problems = [f"the model's {name} is in no tensor" for name, t in tensors.items() if name not in pieces and not _is_made(t)]
    wanted = {piece.name: piece.shape for group in pieces.values() for piece in group}
    for name, shape in wanted.items():
        stored = directory.tensors.get(name)
        if stored is None:
            problems.append(f"{name} of shape {list(shape)} is missing")
        elif stored.shape != shape:
            problems.append(f"{name} has shape {list(stored.shape)}, the configuration wants {list(shape)}")
    problems += [flaw for name, group in pieces.items() if name in tensors for flaw in _misfits(name, tensors[name], group)]
    tied = {_HEAD} if getattr(model.config, "tie_word_embeddings", False) else set()
    embedding = next((name for name in wanted if name.endswith(("embed_tokens.weight", "embeddings.weight"))), None)
    if tied and embedding is not None and {embedding, _HEAD} <= directory.tensors.keys():
        if not _are_equal(directory, embedding, _HEAD):
            problems.append(f"{_HEAD} is not {embedding}, to which it should be tied; set tie_word_embeddings=False")
    left = (name for name in directory.tensors if name not in wanted and name not in tied and not name.endswith(_DERIVED))
    problems += [f"{name} is no part of a {type(model).__name__} with this configuration" for name in left]
    if problems:
        raise ModelMismatchError("\n".join([f"{directory.path} does not fit its configuration:", *problems]), tuple(problems))


def _is_made(tensor: Tensor) -> bool:
    """Return whether a tensor that is not stored has values: a buffer that the model's own code computes."""
    place = Place.of(tensor)
    return not isinstance(tensor, nn.Parameter) and (place is None or place.is_written)


def _misfits(name: str, tensor: Tensor, pieces: Sequence[Piece]) -> list[str]:
    """Return what is wrong with the tensors that make up one parameter or buffer, if anything."""
    shape = tuple(max(stops) for stops in zip(*([stop for _, stop in piece.box] for piece in pieces), strict=True))
    volume = sum(math.prod(stop - start for start, stop in piece.box) for piece in pieces)
    if shape == tuple(tensor.shape) and volume == tensor.numel():
        return []
    if len(pieces) == 1:
        return [f"{pieces[0].name} has shape {list(pieces[0].shape)}, the configuration wants {list(tensor.shape)}"]
    names = f"{pieces[0].name} … {pieces[-1].name} ({len(pieces)} tensors)"
    return [f"{names} make up the shape {list(shape)}, the model's {name} has {list(tensor.shape)}"]


def _are_equal(directory: HFDirectory, one: str, other: str) -> bool:
    """Compare two tensors of a directory, some rows at a time."""
    shape = directory.tensors[one].shape
    if shape != directory.tensors[other].shape:
        return False
    step = max(1, _COMPARED_ELEMENTS // max(1, shape[1]))
    return all(
        torch.equal(directory.read(one, box), directory.read(other, box))
        for start in range(0, shape[0], step)
        for box in [((start, min(start + step, shape[0])), (0, shape[1]))]
    )

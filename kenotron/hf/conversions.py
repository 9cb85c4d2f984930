"""Which tensors of a directory make up the parameters of a transformers model.

Mostly they have the parameters' names. Where transformers renames, stacks or concatenates what it reads (experts, above all),
its own conversions are asked, and followed with names and shapes in the place of data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from kenotron.hf.names import Box, Piece


class _Virtual(NamedTuple):
    """A tensor without data: where in it stored ones lie."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def transformers_pieces(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of each parameter and buffer of a transformers model that a directory holds.

    Args:
        model: a ``PreTrainedModel``, on any device.
        shapes: of the directory's tensors, by name.

    Raises:
        ValueError: transformers computes a parameter from what it reads.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = model.state_dict()
    found: dict[str, tuple[Piece, ...]] = {}
    converted: dict[str, dict[str, list[_Virtual]]] = defaultdict(lambda: defaultdict(list))
    for stored in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, names)
        tensor = _Virtual(shapes[stored], (Piece(stored, tuple((0, size) for size in shapes[stored])),))
        if pattern is not None:
            converted[name][pattern].append(tensor)
        elif name in names:
            found[name] = tensor.pieces
    for name, inputs in converted.items():
        found[name] = _convert(name, converter_of[next(iter(inputs))], inputs).pieces
    return found


def _convert(name: str, converter: Any, inputs: Mapping[str, list[_Virtual]]) -> _Virtual:
    """Follow the operations of a converter, in the order of its sources."""
    lists = [inputs[pattern] for pattern in converter.source_patterns if pattern in inputs]
    for operation in converter.operations:
        kind, dim = type(operation).__name__, getattr(operation, "dim", None)
        if kind == "MergeModulelist" and dim == 0:
            lists = [[_stack(tensors)] for tensors in lists]
        elif kind == "Concatenate":
            assert dim is not None
            lists = [[_concatenate([tensor for tensors in lists for tensor in tensors], dim)]]
        else:
            raise ValueError(
                f"{name} is computed by {kind} from what its files hold, which can't be read in parts. Load the model with "
                "transformers' from_pretrained, outside of configure_model."
            )
    if len(lists) != 1 or len(lists[0]) != 1:
        raise ValueError(f"{name} is made of several tensors in a way that is not known. Load it with from_pretrained.")
    return lists[0][0]


def _stack(tensors: list[_Virtual]) -> _Virtual:
    pieces = [Piece(p.name, ((i, i + 1), *p.box), p.front + 1) for i, tensor in enumerate(tensors) for p in tensor.pieces]
    return _Virtual((len(tensors), *tensors[0].shape), tuple(pieces))


def _concatenate(tensors: list[_Virtual], dim: int) -> _Virtual:
    pieces: list[Piece] = []
    start = 0
    for tensor in tensors:
        pieces += [piece._replace(box=_shift(piece.box, dim, start)) for piece in tensor.pieces]
        start += tensor.shape[dim]
    first = tensors[0].shape
    return _Virtual((*first[:dim], start, *first[dim + 1 :]), tuple(pieces))


def _shift(box: Box, dim: int, by: int) -> Box:
    return tuple((start + by, stop + by) if d == dim else (start, stop) for d, (start, stop) in enumerate(box))

"""Initial weights that do not depend on the layout, and never a full model in one process.

Weights that exist when the strategy starts come from the user's constructor; rank 0's are given to all. What
``configure_model`` builds is only recorded (``deferred``): when everything is cut, one tensor after the other is computed as it
would have been there, and this rank keeps its part. Of weights that are stored (``StoredWeights``), and were not changed since,
each rank reads its part alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kenotron.checkpoint.format import Piece
from kenotron.parallel._torch import compute_local_shape_and_global_offset
from kenotron.parallel.deferred import Place, fingerprint, record_source, values
from kenotron.parallel.pieces import local_pieces
from kenotron.parallel.recording import is_recording, recording
from kenotron.parallel.reset import INITIALISER, initial_values, initialisers
from kenotron.parallel.shards import Shards, TensorShard, canonical, take_over


class StoredWeights(Protocol):
    """Where the weights of a model lie that is built without them, see ``attach``."""

    def __contains__(self, name: str) -> bool:
        """Tell whether a parameter or buffer, by its name in the model, is stored."""

    def read(self, name: str, piece: Piece, into: Tensor) -> None:
        """Fill ``into``, on any device, with a box of a parameter."""


@dataclass(frozen=True)
class _StoredTensor:
    """One tensor of ``StoredWeights``."""

    weights: StoredWeights
    name: str

    def read(self, offset: tuple[int, ...], into: Tensor) -> None:
        self.weights.read(self.name, Piece(local=(0,) * into.ndim, offset=offset, shape=tuple(into.shape)), into)


@contextlib.contextmanager
def deferring(*, draw: bool = True) -> Iterator[None]:
    """Let models that are built inside leave their weights for ``materialize`` to make. ``draw``: see ``recording``."""
    with recording(draw=draw):
        yield


@contextlib.contextmanager
def meta_device(dtype: torch.dtype | None) -> Iterator[None]:
    """Build modules for their shapes alone, with parameters of ``dtype`` (``None``: torch's default)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def attach(model: nn.Module, weights: StoredWeights) -> None:
    """Give a model that was built inside of a ``recording`` its weights: at once, or when it has been cut, where that comes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in weights:
            source = _StoredTensor(weights, name)
            if Place.of(tensor) is None:  # it was made of given numbers
                source.read((0,) * tensor.ndim, tensor.data)
            else:
                record_source(tensor, source)
    if not is_recording():
        aliases = {name: first for first, *others in names_of_parameters(model).values() for name in others}
        materialize(model, Shards(), aliases, places_of(model), 0, torch.device("cpu"))


def set_initialiser(module: nn.Module, fill: Callable[[nn.Module], None]) -> None:
    """Let ``fill`` have the last word on the initial parameters of one module: at once, or when they are made.

    Args:
        fill: changes the parameters of the module that it is given (this one, or a copy of it at full size) in place, after its
            own initialiser. It takes random numbers from torch's default generator.
    """
    module.__dict__[INITIALISER] = fill
    own = list(module.parameters(recurse=False))
    if all(Place.of(p) is not None or not p.is_meta for p in own):
        with recording() if any(p.is_meta for p in own) else contextlib.nullcontext():
            fill(module)


def has_initialiser(module: nn.Module) -> bool:
    """Tell whether `set_initialiser` was called for a module."""
    return INITIALISER in module.__dict__


def names_of_parameters(root: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter, several where it is tied, in the order of the module."""
    names: dict[int, list[str]] = {}
    for name, param in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical(name))
    return names


@torch.no_grad()
def broadcast_weights(root: nn.Module, device: torch.device) -> None:
    """Give rank 0's parameters and buffers to all ranks. Tensors on the meta device have no weights yet.

    Raises:
        ValueError: the ranks built different modules.
    """
    tensors = [t for t in [*root.parameters(), *root.buffers()] if not t.is_meta and t.numel()]
    signature = [(tuple(t.shape), str(t.dtype)) for t in tensors]
    box: list[Any] = [signature]
    dist.broadcast_object_list(box, 0)
    if box[0] != signature:
        raise ValueError(
            f"this rank built another module than rank 0 ({len(signature)} weights against {len(box[0])}): every rank must "
            "build the same one. Build it from the same configuration, and never by rank."
        )
    for tensor in tensors:
        if tensor.device.type == device.type:
            dist.broadcast(tensor.data, 0)
        else:
            moved = tensor.data.to(device)
            dist.broadcast(moved, 0)
            tensor.data.copy_(moved)


def check_alike(places: Mapping[str, Place]) -> None:
    """Raise ``ValueError`` on ranks whose ``configure_model`` did something else to a weight than rank 0's."""
    own = {name: fingerprint(place) for name, place in places.items()}
    box: list[Any] = [own]
    dist.broadcast_object_list(box, 0)
    differing = sorted(name for name in own.keys() | box[0].keys() if own.get(name) != box[0].get(name))
    if differing:
        more = ", …" if len(differing) > 4 else ""
        raise ValueError(
            f"configure_model gives {', '.join(differing[:4])}{more} other values on this rank than on rank 0. Every rank must "
            "build the same module: seed numpy and random alike (lightning.seed_everything), and never build by rank."
        )


def places_of(root: nn.Module) -> dict[str, Place]:
    """Return where the recorded parameters and buffers of a module lie, by their canonical names. Before anything is cut.

    Raises:
        ValueError: parameters that are two share memory.
    """
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    found = {canonical(name): place for name, tensor in named if (place := Place.of(tensor)) is not None}
    params = {canonical(name): param for name, param in root.named_parameters()}
    _check_memory({name: found[name] for name in params if name in found})
    return found


def _check_memory(places: Mapping[str, Place]) -> None:
    """Raise ``ValueError`` where two parameters are the same numbers: each would be trained on its own."""
    by_memory: dict[int, list[str]] = {}
    for name, place in places.items():
        by_memory.setdefault(id(place.memory), []).append(name)
    for names in by_memory.values():
        if len(names) == 1:
            continue
        place = places[names[0]]
        taken = torch.zeros(place.memory.num_bytes // place.dtype.itemsize, dtype=torch.bool)
        for name in names:
            view = taken.as_strided(places[name].shape, places[name].stride, places[name].offset)
            if view.any():
                raise ValueError(
                    f"{', '.join(names)} are parameters that share memory. Tie them by one parameter under several names "
                    "(head.weight = embed.weight), or give each a clone()."
                )
            view.fill_(True)


@torch.no_grad()
def materialize(
    root: nn.Module,
    shards: Shards,
    aliases: Mapping[str, str],
    places: Mapping[str, Place],
    seed: int,
    device: torch.device,
) -> None:
    """Replace every meta parameter and buffer of ``root`` by this rank's part of its initial value.

    Args:
        aliases: further names of tied parameters -> their first name, under which ``shards`` knows them.
        places: of recorded tensors, from `places_of`.
        seed: for modules that were not recorded.

    Raises:
        ValueError: a parameter that nobody gave values.
    """
    done: dict[int, nn.Parameter] = {}
    memories: dict[int, tuple[Any, Tensor]] = {}
    for name, module in root.named_modules():
        prefix = canonical(name) + "." if name else ""
        late: list[str] = []
        for key, param in module._parameters.items():
            if param is None or not param.is_meta:
                continue
            full = aliases.get(prefix + key, prefix + key)
            if id(param) not in done:
                if param.numel() == 0:  # another stage's: nothing to fill
                    done[id(param)] = nn.Parameter(torch.empty_like(param, device="cpu"), param.requires_grad)
                elif full in places:
                    done[id(param)] = _recorded_parameter(full, places[full], shards.of(full, param), param, device)
                else:
                    late.append(key)
                    continue
            module._parameters[key] = done[id(param)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                place = places.get(prefix + key)
                if place is None:
                    late.append(key)
                else:
                    module._buffers[key] = _recorded_buffer(place, memories, device)
        _make_attributes(module, memories, device)
        if late:
            _reset(root, name, late, shards, aliases, seed, device, done)


def _recorded_parameter(name: str, place: Place, shard: TensorShard, param: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return this rank's part of a parameter: read from where it is stored, or computed whole and cut."""
    if not place.is_written:
        raise ValueError(
            f"{name} was built in configure_model, and nothing gave it values. Fill it where it is made (nn.init.normal_, or a "
            "reset_parameters() that __init__ calls), or load weights into it."
        )
    source = place.source
    if source is None:
        return _local_parameter(shard, param, place.value(), device)
    shape = tuple(param.shape)
    if isinstance(param, DTensor):
        shape, _ = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    local = torch.empty(shape, dtype=param.dtype, device=device)
    for piece in local_pieces(shard, param):
        ranges = (slice(at, at + size) for at, size in zip(piece.local, piece.shape, strict=True))
        source.read(piece.offset, local[tuple(ranges)])
    return _parameter(param, local)


def _recorded_buffer(place: Place, memories: dict[int, tuple[Any, Tensor]], device: torch.device) -> Tensor:
    """Return a buffer, all of it. Those that shared memory share it again."""
    if id(place.memory) not in memories:
        whole = Place(place.memory, torch.uint8, (place.memory.num_bytes,), (1,), 0)
        memories[id(place.memory)] = (place.memory, values([whole])[0].to(device))
    storage = memories[id(place.memory)][1].untyped_storage()
    return torch.empty(0, dtype=place.dtype, device=device).set_(storage, place.offset, place.shape, place.stride)


def _make_attributes(module: nn.Module, memories: dict[int, tuple[Any, Tensor]], device: torch.device) -> None:
    """Make tensors that a module has as plain attributes, or in lists and dicts of them."""

    def made(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and (place := Place.of(value)) is not None:
            return _recorded_buffer(place, memories, device)
        if type(value) not in (list, tuple, dict):
            return value
        old = list(value.values() if isinstance(value, dict) else value)
        new = [made(each) for each in old]
        if all(a is b for a, b in zip(new, old, strict=True)):
            return value
        return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)

    for key, value in list(module.__dict__.items()):
        if isinstance(value, Tensor) or (type(value) in (list, tuple, dict) and not key.startswith("_")):
            module.__dict__[key] = made(value)


def _reset(
    root: nn.Module,
    name: str,
    keys: list[str],
    shards: Shards,
    aliases: Mapping[str, str],
    seed: int,
    device: torch.device,
    done: dict[int, nn.Parameter],
) -> None:
    """Make the tensors of one module that was built on the meta device by hand."""
    module, prefix = root.get_submodule(name), canonical(name) + "." if name else ""
    parameters = {key: param for key in keys if (param := module._parameters.get(key)) is not None}
    shard = {key: shards.of(aliases.get(prefix + key, prefix + key), param) for key, param in parameters.items()}
    others = {  # those of other stages: an initialiser may touch them, but gives them no value
        key: shards.absent.get(prefix + key) for key in module._parameters.keys() - parameters.keys()
    }
    whole = initial_values(name, module, shard, others, dict(initialisers(root)).get(name), seed)
    for key in keys:
        if key in parameters:
            param = parameters[key]
            done[id(param)] = module._parameters[key] = _local_parameter(shard[key], param, whole[key], device)
        else:
            module._buffers[key] = whole[key].to(device)


def _local_parameter(shard: TensorShard, param: nn.Parameter, whole: Tensor, device: torch.device) -> nn.Parameter:
    mine = shard.take(whole)
    if isinstance(param, DTensor):
        shape, offset = compute_local_shape_and_global_offset(mine.shape, param.device_mesh, param.placements)
        for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
            mine = mine.narrow(dim, start if length else 0, length)
        return _parameter(param, mine.to(device, copy=True))
    return _parameter(param, mine.to(device, copy=mine.data_ptr() == whole.data_ptr() and mine.numel() != whole.numel()))


def _parameter(like: nn.Parameter, local: Tensor) -> nn.Parameter:
    """Return a parameter like another one, with this rank's part."""
    if isinstance(like, DTensor):
        local = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    made = nn.Parameter(local, requires_grad=like.requires_grad)
    take_over(like, made)
    return made

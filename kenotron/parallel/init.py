"""Initial weights that do not depend on the layout, and never a full model in one process.

Weights that exist when the strategy starts come from the user's constructor; rank 0's are given to all. Weights on the
meta device (built in ``configure_model``) are made module by module after everything is cut: the module's own initialiser
runs on full-size parameters of this one module, with a seed made of the run's seed and the module's name, and this
rank keeps its part. Where a model comes with stored weights instead (``StoredWeights``), each rank reads its part alone.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kenotron.checkpoint.format import Piece
from kenotron.parallel._torch import compute_local_shape_and_global_offset
from kenotron.parallel.pieces import local_pieces
from kenotron.parallel.plan import transformers_models
from kenotron.parallel.shards import Shards, TensorShard, canonical, take_over


class StoredWeights(Protocol):
    """Where the weights of a model lie, which was built on the meta device. The model carries it, see ``attach``."""

    def __contains__(self, name: str) -> bool:
        """Tell whether a parameter or buffer, by its name in the model, is stored."""

    def read(self, name: str, piece: Piece, into: Tensor) -> None:
        """Fill ``into``, on any device, with a box of a parameter."""


_STORED = "_kenotron_weights"
_INITIALISER = "_kenotron_initialiser"
_is_deferring = ContextVar("_is_deferring", default=False)


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Let models that are built inside leave their weights for ``materialize`` to make."""
    token = _is_deferring.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        _is_deferring.reset(token)


@contextlib.contextmanager
def meta_device(dtype: torch.dtype | None) -> Iterator[None]:
    """Build modules without data, with parameters of ``dtype`` (``None``: torch's default)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def attach(model: nn.Module, weights: StoredWeights) -> None:
    """Give a model on the meta device its weights: at once, or when it has been cut, where that is about to come."""
    model.__dict__[_STORED] = weights
    if not _is_deferring.get():
        with torch.device("cpu"):
            aliases = {name: first for first, *others in names_of_parameters(model).values() for name in others}
            materialize(model, Shards(), aliases, 0, torch.device("cpu"))


def set_initialiser(module: nn.Module, fill: Callable[[nn.Module], None]) -> None:
    """Let ``fill`` have the last word on the initial parameters of one module: at once, or when they are made.

    Args:
        fill: changes the parameters of the module that it is given (a copy of this one, at full size) in place, after that
            module's own initialiser. It takes random numbers from torch's default generator.
    """
    module.__dict__[_INITIALISER] = fill
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        fill(module)


def has_initialiser(module: nn.Module) -> bool:
    """Tell whether `set_initialiser` was called for a module."""
    return _INITIALISER in module.__dict__


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


@torch.no_grad()
def materialize(root: nn.Module, shards: Shards, aliases: Mapping[str, str], seed: int, device: torch.device) -> None:
    """Replace every meta parameter and buffer of ``root`` by this rank's part of its initial value.

    Args:
        aliases: further names of tied parameters -> their first name, under which ``shards`` knows them.

    Raises:
        ValueError: a module with meta parameters that has no initialiser.
    """
    initialisers, stored = dict(_initialisers(root)), _Stored(root)

    def name_of(module: str, key: str) -> str:
        full = canonical(f"{module}.{key}" if module else key)
        return aliases.get(full, full)

    done: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name, module in root.named_modules():
        parameters = {k: p for k, p in module._parameters.items() if p is not None and p.is_meta}
        buffers = {k: b for k, b in module._buffers.items() if b is not None and b.is_meta}
        if not parameters and not buffers:
            continue
        if all(p.numel() == 0 for p in parameters.values()) and parameters:
            for key, param in parameters.items():  # another stage's: nothing to fill
                module._parameters[key] = nn.Parameter(torch.empty_like(param, device="cpu"), param.requires_grad)
            continue
        shard = {key: shards.of(name_of(name, key), param) for key, param in parameters.items()}
        made = {key: value for key, value in shard.items() if name_of(name, key) not in stored}
        whole: dict[str, Tensor] = {}
        if made or any(name_of(name, key) not in stored for key in buffers):
            others = {  # stored ones, and those of other stages: an initialiser may touch them, but gives them no value
                key: shard[key].global_shape if key in shard else shards.absent.get(canonical(f"{name}.{key}"))
                for key in module._parameters.keys() - made.keys()
            }
            whole = _initial_values(name, module, made, others, initialisers.get(name), seed)
        for key, param in parameters.items():
            if id(param) not in done and key in made:
                done[id(param)] = _local_parameter(shard[key], param, whole[key], device)
            elif id(param) not in done:
                done[id(param)] = stored.parameter(name_of(name, key), shard[key], param, device)
            replaced.append((param, done[id(param)]))
            module._parameters[key] = done[id(param)]
        for key, buffer in buffers.items():
            is_stored = name_of(name, key) in stored
            module._buffers[key] = stored.buffer(name_of(name, key), buffer, device) if is_stored else whole[key].to(device)
    for param, new in dict(replaced).items():
        take_over(param, new)


class _Stored:
    """The stored weights of all models in a module, by names from that. The models themselves no longer carry them."""

    def __init__(self, root: nn.Module) -> None:
        self._models = {canonical(n): m.__dict__.pop(_STORED) for n, m in root.named_modules() if _STORED in m.__dict__}

    def _find(self, name: str) -> tuple[StoredWeights, str] | None:
        for prefix, weights in self._models.items():
            own = name.removeprefix(f"{prefix}.") if prefix else name
            if (own != name or not prefix) and own in weights:
                return weights, own
        return None

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def parameter(self, name: str, shard: TensorShard, param: nn.Parameter, device: torch.device) -> nn.Parameter:
        """Return this rank's part of a parameter, read from where it is stored."""
        shape = tuple(param.shape)
        if isinstance(param, DTensor):
            shape, _ = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        local = torch.empty(shape, dtype=param.dtype, device=device)
        self._fill(name, local_pieces(shard, param), local)
        return _parameter(param, local)

    def buffer(self, name: str, buffer: Tensor, device: torch.device) -> Tensor:
        """Return a buffer, all of it."""
        value = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        self._fill(name, local_pieces(TensorShard(global_shape=tuple(buffer.shape)), value), value)
        return value

    def _fill(self, name: str, pieces: tuple[Piece, ...], local: Tensor) -> None:
        found = self._find(name)
        assert found is not None
        weights, own = found
        for piece in pieces:
            place = local[tuple(slice(at, at + size) for at, size in zip(piece.local, piece.shape, strict=True))]
            weights.read(own, piece, place)


def _initial_values(
    name: str,
    module: nn.Module,
    shards: dict[str, TensorShard],
    others: Mapping[str, tuple[int, ...] | None],
    initialise: Any,
    seed: int,
) -> dict[str, Tensor]:
    """Run the initialiser of one module on full-size parameters in host memory.

    Args:
        shards: of the parameters that it is to fill. others: the shapes of those that are only to be there.
    """
    model = object.__new__(type(module))  # not copy.copy: FSDP2's classes call __init__ when they are made
    model.__dict__ = {**module.__dict__, "_parameters": {}}
    for key, param in module._parameters.items():
        shape = others.get(key)
        if param is None or key not in shards:
            model._parameters[key] = (
                param if param is None or shape is None else nn.Parameter(param.new_empty(shape, device="meta"))
            )
            continue
        whole = torch.full(shards[key].global_shape, torch.nan, dtype=param.dtype)
        model._parameters[key] = nn.Parameter(whole, param.requires_grad)
    model._buffers = {
        key: torch.empty_like(b, device="cpu") if b is not None and b.is_meta else b for key, b in module._buffers.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + zlib.crc32(canonical(name).encode())) % 2**63)
        if initialise is not None:
            initialise(model)
        reset = getattr(model, "reset_parameters", None) or getattr(model, "_reset_parameters", None)
        # Where an initialiser from outside does not know a module, it leaves it to itself.
        if callable(reset) and all(torch.isnan(model._parameters[key].view(-1)[0]) for key in shards):  # type: ignore[union-attr]
            reset()
        if _INITIALISER in module.__dict__:
            module.__dict__[_INITIALISER](model)
    values: dict[str, Tensor] = {k: v for k, v in {**model._parameters, **model._buffers}.items() if v is not None}
    for key in shards:
        if torch.isnan(values[key].view(-1)[0]):
            raise ValueError(
                f"{name}.{key} was built on the meta device and {type(module).__name__} has no initialiser for it. Give the "
                "module a method reset_parameters() that fills it, or build it in __init__ instead of configure_model."
            )
    return values


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
    return nn.Parameter(local, requires_grad=like.requires_grad)


def _initialisers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(module name, initialiser)`` for modules inside of transformers models, which initialise from outside."""
    for prefix, model in transformers_models(root):
        for name, _ in model.named_modules(prefix=prefix):
            ancestors = (
                root.get_submodule(name[:i]) for i in range(len(name), -1, -1) if i in (0, len(name)) or name[i] == "."
            )
            nearest = next((a for a in ancestors if hasattr(a, "_init_weights")), model)
            yield name, nearest._init_weights

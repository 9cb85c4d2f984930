"""What a checkpoint holds of a sharded training: tensors as boxes of global ones, everything else as typed values.

Names in the checkpoint do not depend on the layout: ``model/<name>`` and ``optimizer.<i>/<name>/<key>``, with a parameter's
name in the whole module.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from kenotron.checkpoint import LazyTensor, LocalTensor, Manifest, Piece, StoredTensor, entries, load_into
from kenotron.hf.record import describe_models
from kenotron.layout import ParallelLayout
from kenotron.optim.offload import HostState
from kenotron.optim.zero import ShardedUpdate
from kenotron.parallel.apply import Parallelized
from kenotron.parallel.buckets import Rows
from kenotron.parallel.grads import local
from kenotron.parallel.pieces import local_pieces
from kenotron.parallel.shards import TensorShard, canonical

_MODEL = "model/"


class _Place(NamedTuple):
    """Where in the global tensor a rank's part of a parameter lies, and who holds the same part."""

    global_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    owners: tuple[int, ...]


class CheckpointState:
    """Describes the sharded state of one training to the checkpoint.

    Args:
        done: the sharded module. optimizers: none in evaluation. layout: resolved. rank: of this process.
        sharing: the ranks whose checkpoints are on the same file system; None for all.
        offloaded: what keeps optimizers' state in host memory. updates: what shares out each optimizer's update, if anything.
    """

    def __init__(
        self,
        done: Parallelized,
        optimizers: Sequence[Optimizer],
        layout: ParallelLayout,
        rank: int,
        sharing: Sequence[int] | None = None,
        offloaded: Sequence[HostState] = (),
        updates: Sequence[ShardedUpdate] = (),
    ) -> None:
        self._done = done
        self._offloaded = offloaded
        self._updates = updates
        self._optimizers = optimizers
        self._layout = layout
        self._where = layout.coordinates(rank)
        # Neither changes from save to save, and a save returns at once.
        self._first_holders: dict[tuple[int, ...], int] = {}
        self._places: dict[tuple[Any, ...], _Place] = {}
        self._given: dict[int, tuple[str, Any]] = {}  # what `state_dict` returned last, and under which name, by `id`
        self._aliases: dict[str, str] = {}
        self._renamed: dict[str, str] = {}
        self._sharing = sharing if sharing is not None else range(layout.world_size)

    def models(self, tokenizer: str | os.PathLike[str] | None) -> list[dict[str, Any]]:
        """Return what is noted of the transformers models in the module, and of the data's tokenizer."""
        return describe_models(self._done.root, tokenizer)

    def layout_sizes(self) -> dict[str, int]:
        """Return what random states of ranks depend on: the size of each axis."""
        return dict(zip(("pp", "dp_replicate", "dp_shard", "cp", "tp"), self._layout.sizes, strict=True))

    # -------------------------------------------------------------------------------------------------------- module

    def state_dict(self) -> dict[str, Any]:
        """Return the module's state by canonical name: this rank's parts; other stages' weights are there, but empty."""
        state = {canonical(name): value for name, value in self._done.root.state_dict().items()}
        self._given = {id(value): (name, value) for name, value in state.items()}
        return state

    def model_tensors(self, state_dict: Mapping[str, Any]) -> Iterator[LocalTensor]:
        """Yield what this rank has of the tensors in ``state_dict``: what ``state_dict()`` returned, as hooks have changed it.

        A tensor that a hook has put under another name is still known. ``aliases`` then tells of the names that share one.
        """
        params, buffers = self._done.named_parameters(), {canonical(n) for n, _ in self._done.root.named_buffers()}
        given, self._given = self._given, {}
        seen: dict[str, str] = {}
        held: set[str] = set()
        self._aliases, self._renamed = {}, {}
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                continue
            origin = given[id(value)][0] if id(value) in given else name
            key = self._done.aliases.get(origin, origin)
            if key in seen:
                self._aliases[_MODEL + name] = seen[key]
            else:
                seen[key] = _MODEL + name
                if name != key:
                    self._renamed[name] = key
            # A pipeline stage may have a tied weight under another than its first name.
            if key in held or (self._done.cut and self._done.cut.is_elsewhere(origin)):
                continue
            held.add(key)
            if key in params:
                # A hook may have put something else under the parameter's name, which may change at any time.
                lazy = local(value).data_ptr() == local(params[key]).data_ptr()
                yield self._boxed(seen[key], key, value, params[key], lazy=lazy)
            elif isinstance(value, DTensor):
                raise ValueError(
                    f"a hook has put a part of a weight into the state dict as {name!r}, which is no parameter. Under another "
                    "name a weight is saved as it is; edit it under its own name, or put value.full_tensor() there."
                )
            else:
                if key not in buffers:
                    self._check_no_part(name, value, {given[id(each)][0] for each in state_dict.values() if id(each) in given})
                owner = self._first(self._ranks_of_stage(origin) if origin in buffers else self._ranks_at_the_end())
                yield LocalTensor.whole(_MODEL + name, local(value), owners=(owner,))

    def _check_no_part(self, name: str, value: Tensor, there: Collection[str]) -> None:
        """Raise ``ValueError`` for a new name whose value may be this rank's part of a weight that is not ``there`` now."""
        for key, param in self._done.named_parameters().items():
            if key in there or local(param).shape != value.shape:
                continue
            if self._boxed(key, key, param.detach(), param, lazy=False).global_shape != tuple(value.shape):
                raise ValueError(
                    f"a hook has put {name!r} into the state dict, in the shape that this rank's part of {key!r} has, which is "
                    "gone. A part is known under its own name, or as it is under another: edit a weight or rename it, not both."
                )

    def parameters(self) -> list[LocalTensor]:
        """Return what this rank has of each parameter, by the name in the module."""
        params = self._done.named_parameters().items()
        return [self._boxed(name, name, param.detach(), param, lazy=True) for name, param in params]

    def shapes(self) -> set[tuple[int, ...]]:
        """Return the shapes of parameters as they lie on this rank."""
        return {tuple(local(param).shape) for param in self._done.named_parameters().values()}

    @property
    def last_rank(self) -> int:
        """The first rank of the last pipeline stage among those that share this one's samples."""
        return self._layout.rank_at(self._done.last_pp_rank, self._where.dp_replicate, self._where.dp_shard, 0, 0)

    def stored(self) -> dict[int, str]:
        """Return the names under which the parameters of this rank are saved, by ``id``."""
        return {id(param): _MODEL + name for name, param in self._done.named_parameters().items()}

    def aliases(self) -> dict[str, str]:
        """Return the further names of tied weights, as the checkpoint that was described last knows them."""
        return self._aliases

    def renamed(self) -> dict[str, str]:
        """Return the names that hooks gave to tensors in the state dict described last -> the names in the module."""
        return self._renamed

    @torch.no_grad()
    def load_model(self, state_dict: Mapping[str, Any], strict: bool, manifest: Manifest | None = None) -> None:
        """Load this rank's parts in place from a whole state dict, as hooks have left it.

        Args:
            manifest: the checkpoint that the lazy tensors among its values are of: of these only this rank's parts are read.

        Raises:
            ValueError: names that only one side has (``strict``), or a shape that differs.
            MismatchError: a shape or a dtype differs from what the checkpoint holds.
        """
        own = self.state_dict()
        if strict:
            self._check_names(own, state_dict)
        wanted: list[LocalTensor] = []
        for tensor in list(self.model_tensors(own)):
            name = tensor.name.removeprefix(_MODEL)
            whole = self._found_in(state_dict, name)
            if isinstance(whole, LazyTensor) and whole.is_untouched:
                wanted.append(replace(tensor, name=whole.stored))
            elif whole is not None:
                if tuple(whole.shape) != tensor.global_shape:
                    raise ValueError(f"{name} has shape {tuple(whole.shape)} in the state dict and {tensor.global_shape} here.")
                _copy_part(whole, tensor)
        if wanted:
            assert manifest is not None
            load_into(manifest, wanted)
        for name, value in state_dict.items():
            if name in own and not isinstance(value, Tensor):
                self._done.root.get_submodule(name.rpartition(".")[0]).set_extra_state(value)

    def _found_in(self, state_dict: Mapping[str, Any], name: str) -> Any:
        """Return the value of a tensor, which may be there by another of its names; ``None``: it is not there."""
        names = [name, *(each for each, first in self._done.aliases.items() if first == name)]
        return next((state_dict[each] for each in names if each in state_dict), None)

    def stored_names(self, state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Return for parameters that a checkpoint has under another name, as hooks have left its tensors: that name."""
        found: dict[str, str] = {}
        for tensor in self.model_tensors(self.state_dict()):
            name = tensor.name.removeprefix(_MODEL)
            value = self._found_in(state_dict, name)
            if isinstance(value, LazyTensor) and value.stored != tensor.name:
                found[name] = value.stored.removeprefix(_MODEL)
        return found

    def _check_names(self, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        known = {self._done.aliases.get(name, name) for name in state_dict}
        tensors = [name for name, value in own.items() if isinstance(value, Tensor)]
        missing = [name for name in tensors if self._done.aliases.get(name, name) not in known]
        unexpected = [name for name in state_dict if name not in own]
        if missing or unexpected:
            raise ValueError(
                f"the checkpoint does not fit the module: {len(missing)} tensors are missing in it ({_some(missing)}), and it "
                f"has {len(unexpected)} that this module lacks ({_some(unexpected)}). Build the module as it was, rename them "
                "in on_load_checkpoint, or set strict_loading = False on the LightningModule."
            )

    # ---------------------------------------------------------------------------------------------------- optimizers

    def optimizer_tensors(self) -> Iterator[LocalTensor]:
        """Yield what this rank has of the optimizers' tensors."""
        for offloaded in self._offloaded:
            offloaded.wait()
        for index, optimizer in enumerate(self._optimizers):
            for name, param in self._own_parameters(optimizer):
                for key, value in optimizer.state.get(param, {}).items():
                    for entry, tensor in entries.flatten(key, value):
                        yield self._state_tensor(index, name, entry, param, tensor)

    def optimizer_groups(self) -> list[list[dict[str, Any]]]:
        """Return the hyper-parameters of each optimizer's groups."""
        return [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in self._optimizers
        ]

    def optimizer_parameters(self) -> list[list[list[str]]]:
        """Return the names of the parameters in each optimizer's groups, in their order."""
        names = self._done.names()
        return [
            [[names.get(id(param), "") for param in group["params"]] for group in optimizer.param_groups]
            for optimizer in self._optimizers
        ]

    def optimizer_kinds(self) -> list[str]:
        """Return the name of each optimizer's class."""
        return [type(optimizer).__name__ for optimizer in self._optimizers]

    def load_optimizers(
        self,
        manifest: Manifest,
        saved: Sequence[Sequence[Mapping[str, Any]]],
        kinds: Sequence[str] | None,
        renamed: Mapping[str, str],
    ) -> None:
        """Load the optimizers' state in place.

        Args:
            saved: what `optimizer_groups` returned. kinds: what `optimizer_kinds` did; ``None``: it was not saved.
            renamed: what `load_model` returned.

        Raises:
            ValueError: another number of optimizers or parameter groups than was saved, or optimizers of another kind.
        """
        made = [len(optimizer.param_groups) for optimizer in self._optimizers]
        if made != [len(groups) for groups in saved]:
            raise ValueError(
                f"configure_optimizers made {len(made)} optimizers with {made} parameter groups; {manifest.path} has "
                f"{[len(groups) for groups in saved]}. Configure the same ones, or load weights only."
            )
        for optimizer, groups, kind in zip(self._optimizers, saved, kinds or self.optimizer_kinds(), strict=True):
            # One that stands in for another has the same hyper-parameters.
            if type(optimizer).__name__ != kind and not all(optimizer.defaults.keys() <= group.keys() for group in groups):
                raise ValueError(
                    f"configure_optimizers made {type(optimizer).__name__}, and {manifest.path} has the state of {kind}. "
                    "Configure the same one, or load weights only."
                )
        keys: dict[str, list[str]] = {}
        for full_name in manifest.tensors:
            prefix, _, key = full_name.rpartition("/")
            keys.setdefault(prefix, []).append(key)
        for index, (optimizer, groups) in enumerate(zip(self._optimizers, saved, strict=True)):
            for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
                group.update(saved_group)
            self._load_state_of(index, optimizer, manifest, keys, renamed)
        for offloaded in self._offloaded:
            offloaded.put_away()

    @torch.no_grad()
    def load_whole_optimizers(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Load this rank's parts of state dicts of torch's optimizers in memory, as other strategies save them.

        Raises:
            ValueError: another number of optimizers, groups or parameters.
        """
        made = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self._optimizers]
        found = [[len(group["params"]) for group in state["param_groups"]] for state in saved]
        if made != found:
            raise ValueError(
                f"configure_optimizers made optimizers with groups of {made} parameters, and the checkpoint has those of "
                f"{found}. Configure the same ones, or load weights only."
            )
        own = {id(param): name for name, param in self._done.named_parameters().items()}
        for index, (optimizer, state) in enumerate(zip(self._optimizers, saved, strict=True)):
            for group, saved_group in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in saved_group.items() if key != "params"})
                for param, number in zip(group["params"], saved_group["params"], strict=True):
                    optimizer.state.pop(param, None)
                    kept = state["state"].get(number)
                    if kept and id(param) in own and self._updates_any(index, param):
                        parts = {key: self._part_of(index, own[id(param)], param, value) for key, value in kept.items()}
                        optimizer.state[param] = parts
        for offloaded in self._offloaded:
            offloaded.put_away()

    def _part_of(self, index: int, name: str, param: nn.Parameter, value: Any) -> Any:
        """Return this rank's part of a value that an optimizer keeps for a whole parameter."""
        if not isinstance(value, Tensor):
            return tree_map_only(Tensor, lambda leaf: self._part_of(index, name, param, leaf), value)
        share = self._share_of(index, param)
        if not value.ndim or tuple(value.shape) != self._done.shards.of(name, param).global_shape:
            return value.clone()
        part = torch.zeros_like(share, dtype=value.dtype, requires_grad=False)
        _copy_part(value, self._state_tensor(index, name, "", param, part))
        return part

    def _load_state_of(
        self,
        index: int,
        optimizer: Optimizer,
        manifest: Manifest,
        keys: Mapping[str, Sequence[str]],
        renamed: Mapping[str, str],
    ) -> None:
        group_of = {id(param): group for group in optimizer.param_groups for param in group["params"]}
        tensors: list[LocalTensor] = []
        loaded: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
        for name, param in self._own_parameters(optimizer):
            optimizer.state.pop(param, None)  # what the checkpoint lacks was not there: replace, not overwrite
            if not self._updates_any(index, param):
                continue
            group, share = group_of[id(param)], self._share_of(index, param)
            shape, state = self._done.shards.of(name, param).global_shape, dict[str, Tensor]()
            there = f"optimizer.{index}/{renamed.get(name, name)}"
            for key in keys.get(there, ()):
                stored = manifest.tensors[f"{there}/{key}"]
                counters_on_device = bool(group.get("capturable") or group.get("fused"))
                is_cut = stored.shape == shape and not key.endswith(entries.STRUCTURE)
                state[key] = _empty_state(share, stored, counters_on_device, is_cut=is_cut)
                tensors.append(replace(self._state_tensor(index, name, key, param, state[key]), name=f"{there}/{key}"))
            if state:
                loaded.append((param, state))
        load_into(manifest, tensors)
        for param, state in loaded:
            optimizer.state[param] = entries.join(state)

    def _rows(self, index: int, param: nn.Parameter) -> Rows | None:
        """Return the rows of a parameter of which this rank has state; ``None``: of all that it holds."""
        return self._updates[index].rows(param) if self._updates else None

    def _updates_any(self, index: int, param: nn.Parameter) -> bool:
        """Tell whether this rank has state of a parameter: where each has one rank that updates it, only that one does."""
        if not self._updates or self._updates[index].granularity != "parameters":
            return True
        rows = self._rows(index, param)
        return rows is None or rows.length > 0

    def _share_of(self, index: int, param: nn.Parameter) -> Tensor:
        rows = self._rows(index, param)
        return param if rows is None else rows.of(param.detach())

    def _state_tensor(self, index: int, name: str, key: str, param: nn.Parameter, value: Tensor) -> LocalTensor:
        full_name, rows = f"optimizer.{index}/{name}/{key}", self._rows(index, param)
        if value.shape == self._share_of(index, param).shape and not key.endswith(entries.STRUCTURE):
            return self._boxed(full_name, name, value, param, rows, lazy=True)
        owner = self._first_holder(name)
        if rows is not None and self._updates[index].granularity == "parameters":
            owner = self._first(self._holders_of_same_box(name, self._done.shards.of(name, param), (self._where.tp,), True))
        return LocalTensor.whole(full_name, local(value), owners=(owner,), lazy=True)

    def _own_parameters(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
        own = {id(param): name for name, param in self._done.named_parameters().items()}
        params = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        return [(own[id(param)], param) for param in params if id(param) in own]

    # --------------------------------------------------------------------------------------------------------- boxes

    def _boxed(
        self, full_name: str, name: str, value: Tensor, param: Tensor, rows: Rows | None = None, *, lazy: bool
    ) -> LocalTensor:
        """Describe a tensor that is cut like the parameter ``name``, or like these rows of it."""
        key = (name, tuple(value.shape), isinstance(value, DTensor), rows)
        place = self._places.get(key) or self._places.setdefault(key, self._place_of(name, value, param, rows))
        return LocalTensor(
            name=full_name,
            tensor=local(value),
            global_shape=place.global_shape,
            pieces=place.pieces,
            owners=place.owners,
            lazy=lazy,
        )

    def _place_of(self, name: str, value: Tensor, param: Tensor, rows: Rows | None) -> _Place:
        # What stands under a parameter's name in a state dict may have another shape: then it is whole.
        shard = self._done.shards.of(name, value if rows is None else param)
        is_sharded = isinstance(value, DTensor) or rows is not None
        owners = self._holders_of_same_box(name, shard, shard.replicas, is_sharded)
        pieces = tuple(
            replace(piece, owners=tuple(self._holders_of_same_box(name, shard, piece.owners, is_sharded)))
            if piece.owners is not None
            else piece
            for piece in local_pieces(shard, value, rows)
        )
        return _Place(shard.global_shape, pieces, tuple(owners))

    def _holders_of_same_box(self, name: str, shard: TensorShard, tp_ranks: tuple[int, ...], is_sharded: bool) -> list[int]:
        """Return the ranks that hold the same part of a parameter as this one, given which of the tp axis do."""
        layout, where = self._layout, self._where
        stages = self._done.shards.holders.get(name, (where.pp,))
        shards = [where.dp_shard] if is_sharded else range(layout.dp_shard)
        contexts = [where.cp] if is_sharded else range(layout.cp)
        pairs = list(itertools.product(shards, contexts))
        if shard.experts is not None:
            mine = layout.ep_rank(where.dp_shard, where.cp)
            pairs = [pair for pair in pairs if layout.ep_rank(*pair) == mine]
        boxes = itertools.product(stages, range(layout.dp_replicate), pairs, tp_ranks)
        return sorted(layout.rank_at(pp, copy, *pair, tp) for pp, copy, pair, tp in boxes)

    def _first_holder(self, name: str) -> int:
        """Return the rank that writes what all hold that hold any part of a parameter."""
        stages = self._done.shards.holders.get(name, (self._where.pp,))
        if stages not in self._first_holders:
            self._first_holders[stages] = self._first(self._ranks_of(stages))
        return self._first_holders[stages]

    def _ranks_of_stage(self, name: str) -> list[int]:
        """Return the ranks that have a buffer: those of this stage; of what lies in no unit, those at the end."""
        cut = self._done.cut
        return self._ranks_at_the_end() if cut is None or cut.stage_of(name) is None else self._ranks_of((self._where.pp,))

    def _ranks_at_the_end(self) -> list[int]:
        """Return the ranks of the last stage: only those run a step to its end."""
        ranks = self._ranks_of((self._done.last_pp_rank,))
        # On nodes that share no file system each writes its own.
        return ranks if not set(ranks).isdisjoint(self._sharing) else list(self._sharing)

    def _ranks_of(self, stages: Sequence[int]) -> list[int]:
        return [self._layout.rank_at(*where) for where in itertools.product(stages, *map(range, self._layout.sizes[1:]))]

    def _first(self, ranks: Iterable[int]) -> int:
        """Return which of several ranks writes what all of them hold, for those that share its file system."""
        return min(rank for rank in ranks if rank in self._sharing)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _copy_part(whole: Tensor, part: LocalTensor) -> None:
    """Fill what lies here of a tensor from the whole of it."""
    for piece in part.pieces:
        target, source = part.tensor, whole
        for dim, length in enumerate(piece.shape):
            target = target.narrow(dim, piece.local[dim], length)
            source = source.narrow(dim, piece.offset[dim], length)
        target.copy_(source)


def _empty_state(param: Tensor, stored: StoredTensor, counters_on_device: bool, *, is_cut: bool) -> Tensor:
    """Return the tensor into which one entry of an optimizer's state is loaded.

    Args:
        is_cut: it has the parameter's shape, and lies here as far as the parameter does.

    Step counters live on the host unless the optimizer is fused or capturable.
    """
    if not stored.shape and param.ndim:
        return torch.zeros((), dtype=stored.dtype, device=param.device if counters_on_device else "cpu")
    if is_cut:
        return torch.zeros_like(param, dtype=stored.dtype, requires_grad=False)
    return torch.zeros(stored.shape, dtype=stored.dtype, device=param.device)

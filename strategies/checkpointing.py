"""Save and restore a whole training: Lightning's checkpoint dictionary, the sharded state, random generators."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint import Checkpointer, PendingSave
from kenotron.files import is_url
from kenotron.parallel.shards import canonical
from kenotron.strategies.settings import CheckpointSettings
from kenotron.strategies.state import CheckpointState

#: In a dictionary that was read from a directory: where its lazy tensors are, and what else was saved.
STORED = "kenotron_stored"


def check_path(path: Any) -> None:
    """Refuse URLs, which ``pathlib`` would take for folders of this machine.

    Raises:
        ValueError: ``path`` is one.
    """
    if path is not None and is_url(path):
        raise ValueError(
            f"Checkpoints are directories on a file system that all ranks see, and {path} is a URL. Mount it and give a path, "
            "or use a CheckpointIO plugin. kenotron checkpoint fetch brings one that Upload has sent."
        )


def check_writable(folders: Iterable[Path], exchange: Callable[[Any], list[Any]], *, leads: bool) -> None:
    """Write into each folder of checkpoints, so that what can't be saved is told before anything is trained.

    Of one that is not there yet into the nearest that is: a run that saves nothing leaves none behind.

    Args:
        exchange: what a rank passes -> what each passes; all ranks call it. leads: whether this rank looks.

    Raises:
        ValueError: on all ranks: one of them can't be made or written to.
    """
    problem = None
    for folder in folders if leads else ():
        try:
            there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            problem = (
                f"checkpoints can't be written to {folder}: {error.strerror} ({error.filename}). Give ModelCheckpoint another "
                "dirpath, or the right to write there."
            )
            break
    for told in exchange(problem):
        if told is not None:
            raise ValueError(told)


def save_training(
    checkpointer: Checkpointer,
    checkpoint: Mapping[str, Any],
    path: Any,
    state: CheckpointState,
    *,
    rank: int,
    world_size: int,
    save_id: str,
    settings: CheckpointSettings,
    nodes: checkpoints.Nodes | None,
    rank_state: Mapping[str, Any],
    handling_exception: bool,
    ended: Callable[[], Collection[int]],
    tokenizer: str | os.PathLike[str] | None = None,
) -> PendingSave:
    """Begin to write Lightning's ``checkpoint`` and this rank's tensors; all ranks call it.

    Args:
        nodes: where these share no file system.
        handling_exception: other ranks may be gone, so they are not waited for for long.
        ended: tells which ranks' processes are gone.
        tokenizer: the folder of the data's.
    """
    values = dict(checkpoint)
    module_state = values.pop("state_dict", {})
    tensors = list(state.model_tensors(module_state))
    with_optimizers = values.pop("optimizer_states", None) is not None
    if with_optimizers:
        tensors += state.optimizer_tensors()
    is_lazy = checkpointer.lazy_tensors()
    tensors = [replace(each, lazy=False) if each.lazy and not is_lazy(each.tensor) else each for each in tensors]
    # Of what several ranks hold alike (or only nearly: statistics of a batch norm), the owners write.
    tensors = [tensor for tensor in tensors if rank in tensor.owners]
    shared = {
        "lightning": values,
        "extra_state": {name: value for name, value in module_state.items() if not isinstance(value, Tensor)},
        "optimizers": state.optimizer_groups() if with_optimizers else None,
        "optimizer_kinds": state.optimizer_kinds() if with_optimizers else None,
        "optimizer_parameters": state.optimizer_parameters() if with_optimizers else None,
        "names": list(module_state),
        "renamed": state.renamed(),
        "layout": state.layout_sizes(),
        "models": state.models(tokenizer),
    }
    return checkpointer.save(
        path,
        tensors,
        shared,
        rank=rank,
        world_size=world_size,
        save_id=save_id,
        rank_state=rank_state,
        allow_pickle=settings.allow_pickle,
        is_lazy=is_lazy,
        stored=state.stored(),
        timeout_s=settings.timeout_s,
        aliases=state.aliases(),
        nodes=nodes,
        ended=ended,
        start_timeout_s=settings.exception_timeout_s if handling_exception and world_size > 1 else None,
    )


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose tensors are still to be read.

    Args:
        saved: its shared state. allow_pickle: whether what only pickle can hold is loaded. left_out: where pickles are that
            were not opened.
    """

    manifest: checkpoints.Manifest
    saved: Mapping[str, Any]
    allow_pickle: bool
    left_out: list[str]

    def rank_state(self, state: CheckpointState, rank: int) -> tuple[str, dict[str, Any] | None]:
        """Return what is lost of the ranks' own states, if anything, and this rank's as it was saved."""
        if self.saved.get("layout") != state.layout_sizes():
            return "the states of its random generators, which belong to another layout", None
        return "", checkpoints.load_rank_state(self.manifest, rank, allow_pickle=self.allow_pickle, left_out=self.left_out)


def load_training(path: Any, *, allow_pickle: bool) -> dict[str, Any]:
    """Return Lightning's dictionary from a checkpoint of any layout, with what reads its tensors: ``checkpoint[STORED]``.

    Args:
        allow_pickle: also load what only pickle can hold, which can run code.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest, left_out = checkpoints.read_manifest(path), list[str]()
    saved = checkpoints.load_state(manifest, allow_pickle=allow_pickle, left_out=left_out)
    state_dict = checkpoints.in_order(checkpoints.lazy_state_dict(manifest), saved)
    stored = Stored(manifest, saved, allow_pickle, left_out)
    checkpoint = {**saved["lightning"], "state_dict": state_dict, STORED: stored}
    if saved["optimizers"] is not None:
        checkpoint["optimizer_states"] = checkpoints.LazyList(lambda: checkpoints.optimizer_states(manifest, saved))
    return checkpoint


def load_module(checkpoint: Mapping[str, Any], state: CheckpointState, *, strict: bool) -> None:
    """Load this rank's parts of the module in place, from Lightning's dictionary as hooks have left it."""
    stored: Stored | None = checkpoint.get(STORED)
    state.load_model(checkpoint["state_dict"], strict, None if stored is None else stored.manifest)


def load_optimizers(checkpoint: Mapping[str, Any], state: CheckpointState) -> None:
    """Load this rank's parts of the optimizers' states in place, from Lightning's dictionary as hooks have left it."""
    stored: Stored | None = checkpoint.get(STORED)
    states = checkpoint.get("optimizer_states")
    if isinstance(states, checkpoints.LazyList) and states.is_untouched:
        assert stored is not None
        saved = stored.saved
        by_hooks = saved.get("renamed") or {}  # an optimizer's state has its parameters' own names
        renamed = {name: by_hooks.get(there, there) for name, there in state.stored_names(checkpoint["state_dict"]).items()}
        state.load_optimizers(stored.manifest, saved["optimizers"], saved.get("optimizer_kinds"), renamed)
    elif states:
        state.load_whole_optimizers(states)


def named_as_in(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the names that a module has itself, where wrappers (``torch.compile``) put theirs between."""
    own = {canonical(name): name for name in module.state_dict()}
    return {own.get(name, name): value for name, value in state_dict.items()}


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global random generator of this process."""
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def share_random_state(group: dist.ProcessGroup) -> None:
    """Let ranks that share samples draw the same numbers from ``random`` and numpy, as the first of them would."""
    box: list[Any] = [(random.getstate(), np.random.get_state(legacy=True))]
    dist.broadcast_object_list(box, group=group, group_src=0)
    random.setstate(box[0][0])
    np.random.set_state(box[0][1])


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)

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
from torch import Tensor

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint import Checkpointer, PendingSave
from kenotron.files import is_url
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
    """Make the folders of checkpoints and write into each, so that what can't be saved is told before anything is trained.

    Args:
        exchange: what a rank passes -> what each passes; all ranks call it. leads: whether this rank looks.

    Raises:
        ValueError: on all ranks: one of them can't be made or written to.
    """
    problem = None
    for folder in folders if leads else ():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
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
class Restored:
    """What was restored.

    Args:
        checkpoint: Lightning's dictionary without tensors.
        rank_state: this rank's, if the layout was the same.
        lacks: what the checkpoint holds, or this layout needs, and could not be restored; empty if all was.
        left_out: where pickles are that were not opened.
    """

    checkpoint: dict[str, Any]
    rank_state: dict[str, Any] | None
    lacks: str
    left_out: list[str]


def load_training(
    path: Any,
    state: CheckpointState,
    *,
    rank: int,
    allow_pickle: bool,
) -> Restored:
    """Return what a checkpoint of any layout holds: Lightning's dictionary, its tensors to be read by `load_stored`.

    Args:
        allow_pickle: also load what only pickle can hold, which can run code.
    """
    manifest, left_out = checkpoints.read_manifest(path), list[str]()
    saved = checkpoints.load_state(manifest, allow_pickle=allow_pickle, left_out=left_out)
    state_dict = checkpoints.in_order(checkpoints.lazy_state_dict(manifest), saved)
    checkpoint = {**saved["lightning"], "state_dict": state_dict, STORED: Stored(manifest, saved)}
    if saved["optimizers"] is not None:
        checkpoint["optimizer_states"] = checkpoints.LazyList(lambda: checkpoints.optimizer_states(manifest, saved))
    lacks, rank_state = "", None
    if saved.get("layout") == state.layout_sizes():
        rank_state = checkpoints.load_rank_state(manifest, rank, allow_pickle=allow_pickle, left_out=left_out)
    else:
        lacks = "the states of its random generators, which belong to another layout"
    return Restored(checkpoint, rank_state, lacks, left_out)


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose tensors are still to be read: its manifest and its shared state."""

    manifest: checkpoints.Manifest
    saved: Mapping[str, Any]


def load_stored(checkpoint: Mapping[str, Any], state: CheckpointState, *, strict: bool, with_optimizers: bool) -> None:
    """Load this rank's parts of module and optimizers in place, from Lightning's dictionary as hooks have left it."""
    stored: Stored | None = checkpoint.get(STORED)
    renamed = state.load_model(checkpoint["state_dict"], strict, None if stored is None else stored.manifest)
    states = checkpoint.get("optimizer_states")
    if not with_optimizers or states is None:
        return
    if isinstance(states, checkpoints.LazyList) and states.is_untouched:
        assert stored is not None
        saved = stored.saved
        by_hooks = saved.get("renamed") or {}  # an optimizer's state has its parameters' own names
        renamed = {name: by_hooks.get(there, there) for name, there in renamed.items()}
        state.load_optimizers(stored.manifest, saved["optimizers"], saved.get("optimizer_kinds"), renamed)
    elif states:
        state.load_whole_optimizers(states)


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

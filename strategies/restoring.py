"""Restore in the order of one process, where every rank has plain, whole parameters before set-up.

1. ``load_checkpoint``, before set-up: Lightning's dictionary with whole weights, which hooks may change.
2. ``load_model_state_dict``: the module's own ``load_state_dict`` takes them.
3. ``load_optimizer_state_dict``, after set-up: each rank reads its part of the optimizers' state, its generators and guards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint import Manifest
from kenotron.parallel.shards import canonical
from kenotron.strategies.checkpointing import rank_state_of
from kenotron.strategies.state import CheckpointState


@dataclass(frozen=True)
class Waiting:
    """What of a checkpoint waits until the optimizers are made.

    Args:
        saved: the shared state. left_out: where pickles are that were not opened. allow_pickle: whether they are.
    """

    manifest: Manifest
    saved: dict[str, Any]
    left_out: list[str]
    allow_pickle: bool

    def load_optimizers(self, state: CheckpointState) -> None:
        """Load this rank's part of the optimizers' state in place."""
        if self.saved["optimizers"] is not None:
            state.load_optimizers(self.manifest, self.saved["optimizers"], self.saved.get("optimizer_kinds"))

    def of_rank(self, state: CheckpointState, rank: int) -> tuple[str, dict[str, Any] | None]:
        """Return what can't be restored, if anything, and what this rank kept for itself."""
        foreign = self.saved["optimizers"] is None and self.saved["lightning"].get("optimizer_states")
        lacks = "its optimizer state, which another strategy saved" if foreign else ""
        lost, own = rank_state_of(
            self.manifest, self.saved, state, rank, allow_pickle=self.allow_pickle, left_out=self.left_out
        )
        return " and ".join(filter(None, (lacks, lost))), own


def load_whole(path: Any, *, allow_pickle: bool) -> tuple[dict[str, Any], Waiting]:
    """Return Lightning's dictionary with whole weights, and what waits for set-up.

    Args:
        allow_pickle: also load what only pickle can hold, which can run code.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest, left_out = checkpoints.read_manifest(path), list[str]()
    saved = checkpoints.load_state(manifest, allow_pickle=allow_pickle, left_out=left_out)
    found = {**checkpoints.load_state_dict(manifest), **saved["extra_state"]}
    names = [name for name in saved.get("names") or () if name in found]
    checkpoint = {**saved["lightning"], "state_dict": {name: found[name] for name in dict.fromkeys([*names, *found])}}
    if saved["optimizers"] is not None:
        checkpoint["optimizer_states"] = []
    return checkpoint, Waiting(manifest, saved, left_out, allow_pickle)


def named_as_in(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the names that a module has itself, where wrappers (``torch.compile``) put theirs between."""
    own = {canonical(name): name for name in module.state_dict()}
    return {own.get(name, name): value for name, value in state_dict.items()}

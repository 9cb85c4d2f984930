"""Lightning's checkpoint calls, answered from the sharded state."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint import FolderClaim, LocalTensor
from kenotron.strategies import _lightning
from kenotron.strategies.agreement import agree
from kenotron.strategies.base import StrategyBase
from kenotron.strategies.callback_paths import forget_foreign_paths, paths_of, take_paths
from kenotron.strategies.checkpointing import (
    STORED,
    Stored,
    check_path,
    load_module,
    load_optimizers,
    load_training,
    named_as_in,
    random_state,
    save_training,
    set_random_state,
)
from kenotron.strategies.fences import fence_what_follows

_GUARDS = "kenotron_guards"  # of skipped steps, in Lightning's dictionary


class Persistence(StrategyBase):
    """Saves on all ranks, without a collective; loads any layout's checkpoint in place."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state is None:
            state: dict[str, Any] = super().lightning_module_state_dict()
            return state
        return self._state.state_dict()

    def held_parameters(self) -> list[LocalTensor]:
        """Return what this rank holds of each parameter, as boxes of global tensors, and which ranks hold the same."""
        assert self._state is not None
        return self._state.parameters()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: what this rank has of it goes to the checkpoint straight from the optimizer."""
        if self._state is None or self._uses_foreign_io:
            state: dict[str, Any] = super().optimizer_state(optimizer)
            return state
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._uses_foreign_io or self._state is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ValueError("storage_options belong to a CheckpointIO plugin; KenotronStrategy writes files itself.")
        filepath = self._path_of_rank_0(filepath, save_id := self._next_save_id())
        check_path(filepath)
        checkpointer = self.checkpointer
        if self.world_size > self._dp_size and not self._is_failing:
            checkpoint = agree(checkpoint, self._peers, self._state.last_rank, self._state.shapes())
        if self._guards:
            checkpoint = {**checkpoint, _GUARDS: [guard.state_dict() for guard in self._guards.values()]}
        callbacks = self._user_module.trainer.checkpoint_callbacks
        try:
            save = save_training(
                checkpointer,
                checkpoint,
                filepath,
                self._state,
                rank=self.global_rank,
                world_size=self.world_size,
                save_id=save_id,
                settings=self._checkpoint_settings,
                nodes=self._nodes,
                handling_exception=self._is_failing,
                ended=self._ended_ranks,
                tokenizer=getattr(self._user_module.trainer.datamodule, "tokenizer_folder", None),
                rank_state={"random": random_state(self.root_device), "streams": self._streams_state()},
            )
        except BaseException:
            self._beliefs.not_begun(callbacks, filepath)
            raise
        self._beliefs.begun(callbacks, save, filepath)
        if not (self._checkpoint_settings.asynchronous and checkpointer.is_training) or self._is_wanted_at_once():
            try:
                checkpointer.wait()
            finally:
                self._beliefs.mend(callbacks, checkpointer)
        else:
            fence_what_follows(checkpointer)
        self._rest()

    def _path_of_rank_0(self, path: Any, save_id: str) -> str:
        """Return where rank 0 saves: callbacks of other ranks may name a file after a value that each rank has for itself.

        Through the store, without a collective: where an error is handled ranks may be missing. The callbacks of this rank
        then hold rank 0's paths as well.
        """
        own = os.path.abspath(path) if "://" not in str(path) else str(path)
        if self._announcements is None:
            return own
        callbacks = self._user_module.trainer.checkpoint_callbacks
        if self.is_global_zero:
            told = json.dumps([own, [paths_of(callback) for callback in callbacks]])
            with contextlib.suppress(RuntimeError):  # a store that is gone: so are those who would ask it
                self._announcements.set(save_id, told)
            return own
        limit_s = self._checkpoint_settings.exception_timeout_s if self._is_failing else self._checkpoint_settings.timeout_s
        announced = self._announced(save_id, limit_s)
        if announced is None:
            return own
        first, paths = json.loads(announced)
        for callback, theirs in zip(callbacks, paths, strict=False):
            take_paths(callback, theirs)
        return str(first)

    def _announced(self, key: str, limit_s: float) -> str | None:
        """Return what rank 0 has announced; ``None`` where it does not come to it: then saving fails, and tells why."""
        assert self._announcements is not None
        began, pause_s = time.monotonic(), 0.0002
        try:
            while not self._announcements.check([key]):
                failure = None if self._monitor is None else self._monitor.failure
                if time.monotonic() - began > limit_s or 0 in self._ended_ranks() or (failure and not self._is_failing):
                    return None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            return str(self._announcements.get(key).decode())
        except RuntimeError:  # the store is gone, and rank 0 with it
            return None

    def _claim(self, folder: Path) -> None:
        """Tell the user where another run writes to the same folder at this moment: each removes what it takes for its own."""
        claim = FolderClaim(folder)
        if claim.is_shared:
            _lightning.warn(
                self.names,
                f"Another run writes checkpoints to {folder} at this moment. Each removes and replaces what the other saves "
                "under the same names, and resumes from it: give each a folder of its own.",
            )
        self._claims.append(claim)

    def _rest(self) -> None:
        """Outside of ``fit`` and its like nothing ends threads later: so let them end now."""
        is_running = self._trainer is not None and self._trainer.state.status == "running"
        if not is_running and not self.checkpointer.is_training:
            self.checkpointer.close()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, once one that was begun later is published."""
        if self._uses_foreign_io or self._held_checkpointer is None:  # nothing was saved here: it is somebody else's file
            super().remove_checkpoint(filepath)
        elif self.leads_checkpoints:
            callbacks = self._user_module.trainer.callbacks
            if any(str(getattr(callback, "ckpt_path", None)) == str(filepath) for callback in callbacks):
                self.checkpointer.adopt(Path(filepath).parent)  # OnExceptionCheckpoint: it was named in the script
            self.checkpointer.remove(filepath)
            if not self.checkpointer.is_training:
                self.checkpointer.wait()
                self._rest()

    @property
    def leads_checkpoints(self) -> bool:
        """Whether this rank removes checkpoints: the first of all, or of its node where nodes share no file system."""
        return self.is_global_zero if self._nodes is None else self.global_rank == self._nodes.ranks[0]

    @property
    def checkpoint_node(self) -> int | None:
        """The number of this node where each stores its part of checkpoints on its own; ``None``: all ranks see the same."""
        return None if self._nodes is None else self._nodes.index

    def _exchange(self, own: Any) -> list[Any]:
        """Return what each rank passes."""
        if self.world_size == 1:
            return [own]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, own)
        return found

    def _is_wanted_at_once(self) -> bool:
        """Whether the checkpoint must stand there when the call returns: a callback links to it, or a logger sends it away."""
        trainer = self._user_module.trainer
        callbacks = trainer.checkpoint_callbacks
        keeps_all = any(getattr(callback, "save_top_k", None) == -1 for callback in callbacks)
        return any(getattr(callback, "save_last", None) == "link" for callback in callbacks) or any(
            _lightning.logs_each_checkpoint(logger, keeps_all=keeps_all) for logger in trainer.loggers
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        weights_only = _lightning.asked_weights_only() if weights_only is None else weights_only
        if self._held_checkpointer is not None:
            self._held_checkpointer.wait()
        if not self._uses_foreign_io:
            check_path(checkpoint_path)
        if self._nodes is not None:
            checkpoint_path = checkpoints.common_path(checkpoint_path, self._exchange)
        else:
            checkpoint_path = self.broadcast(checkpoint_path)
        if self._uses_foreign_io or not checkpoints.is_checkpoint(checkpoint_path):
            loaded: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
            self._forget_foreign_paths(loaded, checkpoint_path)
            return loaded
        if self._state is None and self.restore_checkpoint_after_setup:
            raise RuntimeError(
                f"{checkpoint_path} is loaded into the sharded module, which is not there yet. Pass it as ckpt_path to fit, "
                "validate, test or predict."
            )
        loaded = load_training(checkpoint_path, allow_pickle=checkpoints.is_trusted(weights_only))
        if loaded[STORED].left_out and self.is_global_zero:
            _lightning.warn(self.names, checkpoints.what_was_left_out(checkpoint_path, loaded[STORED].left_out))
        self._forget_foreign_paths(loaded, checkpoint_path)
        return loaded

    def _restore_ranks(self, checkpoint: Mapping[str, Any]) -> None:
        """Put back this rank's random generators, where the layout is the one that saved them, and the guards."""
        stored: Stored | None = checkpoint.get(STORED)
        if stored is None:
            return
        assert self._state is not None
        lacks, rank_state = stored.rank_state(self._state, self.global_rank)
        if lacks and self.is_global_zero:
            _lightning.warn(self.names, f"{stored.manifest.path} is restored without {lacks}.")
        if rank_state is not None:
            set_random_state(rank_state["random"], self.root_device)
            if self._streams is not None and rank_state["streams"] is not None:
                self._streams.load_state_dict(rank_state["streams"])
        for guard, state in zip(self._guards.values(), checkpoint.get(_GUARDS, ()), strict=False):
            guard.load_state_dict(state)

    def _forget_foreign_paths(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        """Do not believe what a file says of other files: retention would remove them."""
        callbacks = () if self._trainer is None else self._trainer.checkpoint_callbacks
        folders = [folder for callback in callbacks if (folder := getattr(callback, "dirpath", None))]
        foreign = forget_foreign_paths(checkpoint.get("callbacks") or {}, [*folders, os.path.dirname(os.path.abspath(path))])
        if foreign:
            _lightning.warn(
                self.names,
                f"{path} names as checkpoints of its run what lies elsewhere, or is none: {', '.join(foreign)[:300]}. They "
                "are forgotten: they are neither removed nor loaded as the best one.",
            )

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights that hooks have left in the dictionary.

        After set-up this rank's parts of them, and with them what belongs to training. Before it, where parameters are whole
        and plain, by the module's own ``load_state_dict``: the rest waits for ``load_optimizer_state_dict``.
        """
        if not self.restore_checkpoint_after_setup:
            module = self._user_module
            module.load_state_dict(named_as_in(module, checkpoint["state_dict"]), strict=strict)
            return
        assert self._state is not None
        load_module(checkpoint, self._state, strict=strict)
        if self._is_fitting:
            self._load_training(checkpoint)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what has waited for set-up."""
        if not self.restore_checkpoint_after_setup and self._state is not None:  # else there are no optimizers
            self._load_training(checkpoint)

    def _load_training(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._state is not None
        load_optimizers(checkpoint, self._state)
        self._restore_ranks(checkpoint)

    def _streams_state(self) -> Any:
        return None if self._streams is None else self._streams.state_dict()

    def _next_save_id(self) -> str:
        """Return the same new name on all ranks, without asking them."""
        self._num_saves += 1
        return f"{self._run_id}-{self._num_saves}"

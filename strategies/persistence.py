"""Lightning's checkpoint calls, answered from the sharded state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint import LocalTensor
from kenotron.strategies import _lightning
from kenotron.strategies.base import StrategyBase
from kenotron.strategies.checkpointing import (
    LOADED_IN_PLACE,
    check_path,
    load_training,
    random_state,
    save_training,
    set_random_state,
)

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
        check_path(filepath)
        checkpointer = self.checkpointer
        if self._guards:
            checkpoint = {**checkpoint, _GUARDS: [guard.state_dict() for guard in self._guards.values()]}
        save_training(
            checkpointer,
            checkpoint,
            filepath,
            self._state,
            rank=self.global_rank,
            world_size=self.world_size,
            save_id=self._next_save_id(),
            settings=self._checkpoint_settings,
            nodes=self._nodes,
            handling_exception=self._is_failing,
            tokenizer=getattr(self._user_module.trainer.datamodule, "tokenizer_folder", None),
            rank_state={"random": random_state(self.root_device), "streams": self._streams_state()},
        )
        if not (self._checkpoint_settings.asynchronous and checkpointer.is_training) or self._links_to_last():
            checkpointer.wait()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, once one that was begun later is published."""
        if self._uses_foreign_io:
            super().remove_checkpoint(filepath)
        elif self.leads_checkpoints:
            self.checkpointer.remove(filepath)
            if not self.checkpointer.is_training:
                self.checkpointer.wait()

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

    def _links_to_last(self) -> bool:
        """Whether a callback makes a link to the checkpoint as soon as the call returns: it must not dangle."""
        return any(
            getattr(callback, "save_last", None) == "link" for callback in self._user_module.trainer.checkpoint_callbacks
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if self._held_checkpointer is not None:
            self._held_checkpointer.wait()
        if self._nodes is not None:
            checkpoint_path = checkpoints.common_path(checkpoint_path, self._exchange)
        if self._uses_foreign_io or not checkpoints.is_checkpoint(checkpoint_path):
            loaded: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
            if loaded.get("optimizer_states") and self._user_module.trainer.state.fn == self.names.TrainerFn.FITTING:
                _lightning.warn(
                    self.names,
                    f"{checkpoint_path} was not written by Kénotron: its weights, loops and schedulers are restored, its "
                    "optimizer state is not.",
                )
            return loaded
        if self._state is None:
            raise RuntimeError(
                f"{checkpoint_path} is loaded into the sharded module, which is not there yet. Pass it as ckpt_path to fit, "
                "validate, test or predict."
            )
        module = self._user_module
        restored = load_training(
            checkpoint_path,
            self._state,
            strict=module.strict_loading,
            with_optimizers=module.trainer.state.fn == self.names.TrainerFn.FITTING,
            rank=self.global_rank,
            allow_pickle=self._checkpoint_settings.allow_pickle,
        )
        if restored.lacks and module.trainer.state.fn == self.names.TrainerFn.FITTING and self.is_global_zero:
            _lightning.warn(self.names, f"{checkpoint_path} is restored without {restored.lacks}.")
        if restored.rank_state is not None and module.trainer.state.fn == self.names.TrainerFn.FITTING:
            set_random_state(restored.rank_state["random"], self.root_device)
            if self._streams is not None and restored.rank_state["streams"] is not None:
                self._streams.load_state_dict(restored.rank_state["streams"])
        for guard, state in zip(self._guards.values(), restored.checkpoint.pop(_GUARDS, ()), strict=False):
            guard.load_state_dict(state)
        return restored.checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load a whole state dict, as another strategy saved it; a sharded checkpoint is in place already."""
        if not checkpoint.get(LOADED_IN_PLACE):
            assert self._state is not None
            self._state.load_whole(checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: they are loaded with the checkpoint."""

    def _streams_state(self) -> Any:
        return None if self._streams is None else self._streams.state_dict()

    def _next_save_id(self) -> str:
        """Return the same new name on all ranks, without asking them."""
        self._num_saves += 1
        return f"{self._run_id}-{self._num_saves}"

"""Lightning's ``CheckpointIO``, written by Kénotron's engine while training goes on."""

from __future__ import annotations

import sys
import uuid
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from torch import Tensor

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint import Checkpointer, CheckpointError, EngineSettings, LocalTensor
from kenotron.strategies.fences import fence_what_follows

_MODEL = "model/"


class AsyncCheckpointIO(CheckpointIO):
    """Write checkpoints of any strategy in the background: ``Trainer(strategy="ddp", plugins=[AsyncCheckpointIO()])``.

    ``save_checkpoint`` returns at once. What optimizers change (parameters and their state) is copied during the next
    forward and backward pass and held back from the next update by a fence that puts itself before every optimizer step;
    all else is copied in the call. The end of ``fit``, an exception in it and ``teardown`` wait until all is on the disk.

    A checkpoint is a directory (``docs/checkpoint-format.md``), visible only when it is complete and durable.
    ``load_checkpoint`` also reads files that Lightning itself has written. Before the first optimizer step, and after
    ``fit``, saves are synchronous. ``KenotronStrategy`` takes the plugin's settings for its own sharded checkpoints.

    Args:
        engine: memory, threads and bandwidth that writing may use.
        on_error: what a save that failed in the background does: ``"raise"`` at the next save or at the end of ``fit``, or
            ``"warn"`` and train on. The last published checkpoint is there in any case.
        allow_pickle: keep values that only pickle can hold, apart and marked; what can't be pickled is left out with a warning.
            False refuses both. Only ``weights_only=False`` loads them.
        timeout_s: how long one save may take.
    """

    def __init__(
        self,
        engine: EngineSettings | None = None,
        *,
        on_error: Literal["raise", "warn"] = "raise",
        allow_pickle: bool = True,
        timeout_s: float = 1800.0,
    ) -> None:
        twin = sys.modules.get("lightning_fabric.plugins.io")
        if twin is not None:  # the other package of Lightning, with a class tree of its own
            twin.CheckpointIO.register(type(self))
        self.checkpointer = Checkpointer(engine, on_error=on_error)
        self.checkpointer.guard_optimizers()
        self._allow_pickle = allow_pickle
        self._timeout_s = timeout_s

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begin to save what one process holds.

        Raises:
            ValueError: ``storage_options``, a URL, or a value that only pickle can hold (see ``allow_pickle``).
            SaveFailedError: an earlier save failed.
        """
        if storage_options is not None or "://" in str(path):
            raise ValueError(f"AsyncCheckpointIO writes directories on a file system, not {path} with {storage_options!r}.")
        is_lazy = self.checkpointer.guard_optimizers().lazy_tensors()
        module_state = checkpoint.get("state_dict", {})
        tensors, aliases = _model_tensors(module_state, is_lazy)
        state = {
            "lightning": {key: value for key, value in checkpoint.items() if key != "state_dict"},
            "extra_state": {name: value for name, value in module_state.items() if not isinstance(value, Tensor)},
            "optimizers": None,
        }
        self.checkpointer.save(
            path,
            tensors,
            state,
            rank=0,
            world_size=1,
            save_id=uuid.uuid4().hex,
            allow_pickle=self._allow_pickle,
            timeout_s=self._timeout_s,
            aliases=aliases,
            is_lazy=is_lazy,
        )
        if self.checkpointer.is_training:
            fence_what_follows(self.checkpointer)
        else:
            self.checkpointer.wait()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a whole checkpoint; of this format, saved by any strategy, or a file of Lightning's.

        Raises:
            CheckpointError: it is damaged or none.
        """
        self.checkpointer.wait()
        if not checkpoints.is_checkpoint(path):
            checkpoints.check_torch_file(path)
            loaded: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
            return loaded
        return checkpoints.open_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, once all that was begun before is published; never the last published one."""
        self.checkpointer.remove(path)
        if not self.checkpointer.is_training:
            self.checkpointer.wait()

    def wait(self) -> None:
        """Return when all checkpoints are complete and durable.

        Raises:
            SaveFailedError: a save failed (``on_error="raise"``).
        """
        self.checkpointer.wait()

    def teardown(self) -> None:
        """Wait, and stop all threads. The next save starts them again."""
        is_handling_exception = sys.exc_info()[0] is not None
        try:
            self.checkpointer.close()
        except CheckpointError as error:
            if not is_handling_exception:
                raise
            warnings.warn(f"A checkpoint that was being written is lost: {error}", stacklevel=2)


def _model_tensors(state_dict: Mapping[str, Any], is_lazy: Any) -> tuple[list[LocalTensor], dict[str, str]]:
    """Return each tensor once, and the further names of those that have several."""
    tensors: list[LocalTensor] = []
    aliases: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            continue
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else (name,)
        first = first_names.setdefault(key, name)
        if first == name:
            tensors.append(LocalTensor.whole(_MODEL + name, value, lazy=is_lazy(value)))
        else:
            aliases[_MODEL + name] = _MODEL + first
    return tensors, aliases

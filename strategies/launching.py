"""Processes that the trainer's call starts by itself, as ``ddp_spawn`` and ``ddp_notebook`` do: the script is not run again.

Each of them runs the call; the process that started them has neither ranks nor groups, and gets results, metrics, and after
``fit`` the weights. Where those are spread over ranks they come in a checkpoint, to which all ranks write their parts.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kenotron import checkpoint as checkpoints
from kenotron.strategies import _lightning

if TYPE_CHECKING:
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher as _LightningLauncher
else:  # mixed in by `launcher_class`
    _LightningLauncher = object

_WEIGHTS = "weights"


class LauncherBase(_LightningLauncher):
    """Brings whole weights back to the process that has started the others."""

    def _wrapping_function(self, process_idx: int, trainer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super()._wrapping_function(process_idx, trainer, *args, **kwargs)
        except BaseException as error:  # Lightning handles it in the process that has started this one: nothing is saved there
            strategy: Any = self._strategy
            if trainer is not None:
                trainer.state.status = "interrupted"
            strategy.on_exception(error)
            strategy.teardown()
            raise

    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        strategy: Any = self._strategy
        if strategy.layout.keeps_whole_parameters or trainer.state.fn != "fit":
            return super()._collect_rank_zero_results(trainer, results)
        folder = strategy.broadcast(tempfile.mkdtemp() if strategy.is_global_zero else None)
        trainer.save_checkpoint(Path(folder, _WEIGHTS), weights_only=True)
        strategy.barrier()
        fn, trainer.state.fn = trainer.state.fn, None  # Lightning's own saves weights after fit alone: they are this rank's
        output = super()._collect_rank_zero_results(trainer, results)
        trainer.state.fn = fn
        return output if output is None else output._replace(weights_path=folder)

    def _recover_results_in_main_process(self, worker_output: Any, trainer: Any) -> None:
        folder = worker_output.weights_path
        if folder is not None and Path(folder).is_dir():
            trainer.lightning_module.load_state_dict(checkpoints.load_state_dict(Path(folder, _WEIGHTS)), strict=False)
            shutil.rmtree(folder)
            worker_output = worker_output._replace(weights_path=None)
        super()._recover_results_in_main_process(worker_output, trainer)


@functools.cache
def launcher_class(package: str) -> type[LauncherBase]:
    """Return the launcher for one of Lightning's two packages."""
    bases = (LauncherBase, _lightning.Names(package).MultiProcessingLauncher)
    return type(_CLASS_NAMES[package], bases, {"__module__": __name__})


#: Under which ``pickle`` finds the classes again, in processes that are spawned.
_CLASS_NAMES = {"lightning.pytorch": "Launcher", "pytorch_lightning": "TwinLauncher"}


def __getattr__(name: str) -> Any:
    for package, class_name in _CLASS_NAMES.items():
        if name == class_name:
            return launcher_class(package)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Every private Lightning name, and nowhere else. ``tests/strategies/test_lightning_seam.py`` holds each of them.

Lightning comes as two packages with two class trees (``lightning.pytorch`` and ``pytorch_lightning``). `Names` finds the same
things in either.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


class Names:
    """Lightning's names in one of its packages.

    Args:
        package: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        fabric = FABRIC[package]

        def load(module: str, name: str) -> Any:
            return getattr(importlib.import_module(module), name)

        self.ParallelStrategy: Any = load(f"{package}.strategies", "ParallelStrategy")
        self.Precision: Any = load(f"{package}.plugins.precision", "Precision")
        self.TrainerFn: Any = load(f"{package}.trainer.states", "TrainerFn")
        self.SIGTERMException: Any = load(f"{package}.utilities.exceptions", "SIGTERMException")
        self.SubprocessScriptLauncher: Any = load(
            f"{package}.strategies.launchers.subprocess_script", "_SubprocessScriptLauncher"
        )
        self.MultiProcessingLauncher: Any = load(f"{package}.strategies.launchers.multiprocessing", "_MultiProcessingLauncher")
        self.is_overridden: Callable[[str, Any], bool] = load(f"{package}.utilities.model_helpers", "is_overridden")
        self.init_dist_connection: Any = load(f"{fabric}.utilities.distributed", "_init_dist_connection")
        self.backend_for_device: Any = load(f"{fabric}.utilities.distributed", "_get_default_process_group_backend_for_device")
        self.all_gather_if_available: Any = load(f"{fabric}.utilities.distributed", "_all_gather_ddp_if_available")
        self.optimizers_to_device: Any = load(f"{fabric}.utilities.optimizer", "_optimizers_to_device")
        self.add_worker_init_fn: Any = load(f"{fabric}.utilities.data", "_auto_add_worker_init_fn")
        self.reset_seed: Any = load(f"{fabric}.utilities.seed", "reset_seed")
        self.rank_zero_only: Any = load(f"{package}.utilities.rank_zero", "rank_zero_only")


def set_rank(names: Names, rank: int) -> None:
    """Tell Lightning's and lightning_utilities' ``rank_zero_only`` who this is."""
    utilities = importlib.import_module("lightning_utilities.core.rank_zero")
    names.rank_zero_only.rank = utilities.rank_zero_only.rank = rank
    log = logging.getLogger("kenotron")  # speaks through Lightning's, and of what is no warning on rank 0 alone
    log.parent = logging.getLogger(names.package)
    log.setLevel(logging.NOTSET if rank == 0 else logging.WARNING)  # not set: as Lightning's is


def say(names: Names, text: str) -> None:
    """Print on rank 0, through Lightning's logger."""
    importlib.import_module(f"{names.package}.utilities.rank_zero").rank_zero_info(text)


def warn(names: Names, text: str) -> None:
    """Warn on rank 0, through Lightning's logger."""
    importlib.import_module(f"{names.package}.utilities.rank_zero").rank_zero_warn(text)


def replace_filesystem(callback: Any, wrap: Callable[[Any], Any]) -> None:
    """Replace what a ``ModelCheckpoint`` asks whether files exist; its ``setup`` makes it anew. Others have none."""
    if "_fs" in vars(callback):
        callback._fs = wrap(callback._fs)


def logs_each_checkpoint(logger: Any, *, keeps_all: bool) -> bool:
    """Tell whether a logger looks at each checkpoint as soon as it is saved.

    Args:
        keeps_all: whether a callback keeps all checkpoints; then ``log_model=True`` means ``"all"``.
    """
    hook = type(logger).after_save_checkpoint
    known = [f"{package}.loggers" for package in FABRIC]
    if not hook.__module__.startswith(tuple(known)):
        return True  # the user's own
    wanted = getattr(logger, "_log_model", False)
    return wanted == "all" or (wanted is True and keeps_all)


def skip_backward(trainer: Any) -> None:
    """Keep Lightning from zeroing gradients and going backward around ``training_step``: a pipeline does both inside of it."""
    assert hasattr(trainer.fit_loop.epoch_loop.automatic_optimization, "_skip_backward")
    trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = True


def asked_weights_only() -> bool | None:
    """Return the ``weights_only`` that a running ``fit``, ``validate``, … was given.

    Lightning forgets it where a checkpoint is restored after set-up.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_run" and str(frame.f_globals.get("__name__")).endswith(".trainer.trainer"):
            asked: bool | None = frame.f_locals.get("weights_only")
            return asked
        frame = frame.f_back
    return None


def allow_compiled_modules(package: str, strategy: type) -> None:
    """Let Lightning accept modules that ``torch.compile`` returned for our strategy too: it knows its own alone."""
    trainer: Any = importlib.import_module(f"{package}.trainer.trainer")
    verify = trainer._verify_strategy_supports_compile

    def verify_others(model: Any, used: Any) -> None:
        if not isinstance(used, strategy):
            verify(model, used)

    trainer._verify_strategy_supports_compile = verify_others


def is_compiled(module: Any) -> bool:
    """Tell whether a LightningModule came out of ``torch.compile``, whose steps then are compiled as a whole."""
    return getattr(module, "_compiler_ctx", None) is not None


def zero_grad(trainer: Any, batch_idx: int, optimizer: Optimizer) -> None:
    """Zero gradients with the hooks and counters of Lightning's closure."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    loop._on_before_zero_grad(optimizer)
    loop._optimizer_zero_grad(batch_idx, optimizer)


def current_batch_idx(trainer: Any) -> int:
    return trainer.fit_loop.epoch_loop.batch_idx


def replace_sigterm_polling(trainer: Any, on_signal: Callable[[], None], at_boundary: Callable[[], bool], stop: Any) -> None:
    """Replace the broadcast that Lightning does on every batch (and in its signal handler) to agree on a SIGTERM.

    Args:
        on_signal: called in the signal handler. at_boundary: called before each batch; true where all ranks stop.
        stop: the exception that stops.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    assert hasattr(connector, "_sigterm_notifier_fn") and hasattr(loop, "_broadcast_sigterm_tensor")

    def notify(signum: Any, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not getattr(connector, "_kenotron_notified", False):
            connector._kenotron_notified = True
            launcher.kill(signum)
        on_signal()

    def poll() -> None:
        if at_boundary():
            connector.received_sigterm = True
            raise stop

    connector._sigterm_notifier_fn = notify
    loop._broadcast_sigterm_tensor = poll


def disable_inference_mode(trainer: Any) -> None:
    """Evaluate under ``no_grad``: DTensors and inference mode do not go together."""
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop.inference_mode = False


def validation_loaders(trainer: Any) -> Any:
    """Return the loaders of the validation that runs: ``trainer.val_dataloaders`` are those of an earlier ``fit``, if any."""
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    return None if loop._combined_loader is None else loop._combined_loader.iterables


def call_hook(trainer: Any, package: str, name: str, *args: Any) -> None:
    """Call a hook of callbacks and module, as Lightning's own loops do."""
    call = importlib.import_module(f"{package}.trainer.call")
    call._call_callback_hooks(trainer, name, *args)
    call._call_lightning_module_hook(trainer, name, *args)


def set_device_mesh(module: nn.Module, mesh: Any) -> None:
    """Let user code read ``self.device_mesh``."""
    module._device_mesh = mesh

"""Private Lightning names that the strategy leans on: each must still be there, in both packages."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from kenotron import _autoload
from kenotron.strategies import _lightning

PACKAGES = sorted(_lightning.FABRIC)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_load(package: str) -> None:
    names = _lightning.Names(package)
    assert all(value is not None for value in vars(names).values())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_loops_have_what_is_replaced(package: str) -> None:
    trainer_class = importlib.import_module(package).Trainer
    trainer = trainer_class(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    loop = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    assert callable(trainer._signal_connector._sigterm_notifier_fn)
    assert loop.automatic_optimization._skip_backward is False
    for name in ("_on_before_zero_grad", "_optimizer_zero_grad"):
        assert callable(getattr(loop.automatic_optimization, name))
    for evaluation in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, loop.val_loop):
        assert isinstance(evaluation.inference_mode, bool)
    assert isinstance(loop.batch_idx, int)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_training_loop_polls_for_signals_before_it_fetches_a_batch(package: str) -> None:
    loop = importlib.import_module(f"{package}.loops.training_epoch_loop")._TrainingEpochLoop
    source = inspect.getsource(loop.advance)
    assert source.index("_broadcast_sigterm_tensor") < source.index("next(data_fetcher)")


@pytest.mark.parametrize("package", PACKAGES)
def test_hooks_can_be_called_as_the_loops_do(package: str) -> None:
    call = importlib.import_module(f"{package}.trainer.call")
    assert callable(call._call_callback_hooks)
    assert callable(call._call_lightning_module_hook)


@pytest.mark.parametrize("package", PACKAGES)
def test_loaders_of_the_validation_that_runs_can_be_told_from_those_of_an_earlier_fit(package: str) -> None:
    trainer = importlib.import_module(package).Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for fn, loop in (("fit", trainer.fit_loop.epoch_loop.val_loop), ("validate", trainer.validate_loop)):
        loop._combined_loader = importlib.import_module(f"{package}.utilities.combined_loader").CombinedLoader([fn])
        trainer.state.fn = fn
        assert _lightning.validation_loaders(trainer) == [fn]


@pytest.mark.parametrize("package", PACKAGES)
def test_model_checkpoint_asks_a_file_system_that_can_be_replaced(package: str) -> None:
    kind = importlib.import_module(f"{package}.callbacks").ModelCheckpoint
    assert "self._fs.exists(filepath)" in inspect.getsource(kind.file_exists)
    assert "self._fs = " in inspect.getsource(kind.setup)


@pytest.mark.parametrize("cloud_io", _autoload.LOADERS)
def test_all_loading_goes_through_one_function_that_opens_directories(cloud_io: str) -> None:
    load = importlib.import_module(cloud_io)._load
    assert list(inspect.signature(load).parameters) == ["path_or_url", "map_location", "weights_only"]
    package = "lightning.pytorch" if cloud_io.startswith("lightning.") else "pytorch_lightning"
    assert importlib.import_module(f"{package}.core.saving").pl_load is load
    assert importlib.import_module(cloud_io.replace("utilities.cloud_io", "plugins.io.torch_io")).pl_load is load
    assert hasattr(load, "_kenotron_original") and hasattr(torch.load, "_kenotron_original")

"""An update right after a save does not reach the checkpoint; and where the fence is taken away, that does not go unseen."""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import kenotron
from kenotron.callbacks import AsyncCheckpointIO
from kenotron.checkpoint import (
    Checkpointer,
    EngineSettings,
    LocalTensor,
    SaveFailedError,
    is_checkpoint,
    load_state,
    load_state_dict,
    save,
)
from kenotron.checkpoint.guard import OptimizerGuard
from kenotron.checkpoint.pending import PendingSave
from kenotron.checkpoint.sources import Sources
from kenotron.strategies.settings import CheckpointSettings

#: All but 64 KiB of the state is copied no faster than this: an update comes long before the copy is complete.
SLOW = EngineSettings(pool_bytes=1 << 16, slot_bytes=1 << 14, max_bytes_per_s=3e6, checked_share=1.0)

Update = Callable[[], object]


class Training:
    """A loop in plain PyTorch: ``update`` is one step of it."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Tanh(), nn.Linear(512, 64))
        self.optimizers, self.update = getattr(self, f"_{kind}")(list(self.model.parameters()))

    def loss(self) -> Tensor:
        return self.model(torch.randn(16, 64)).square().mean()

    def _stepping(self, *optimizers: torch.optim.Optimizer) -> tuple[list[torch.optim.Optimizer], Update]:
        def update() -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.loss().backward()
            for optimizer in optimizers:
                optimizer.step()

        return list(optimizers), update

    def _with_closure(self, optimizer: torch.optim.Optimizer) -> tuple[list[torch.optim.Optimizer], Update]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return [optimizer], lambda: optimizer.step(closure)  # type: ignore[arg-type]

    def _adamw_foreach(self, params: list[nn.Parameter]) -> Any:
        return self._stepping(torch.optim.AdamW(params, foreach=True))

    def _adamw_fused(self, params: list[nn.Parameter]) -> Any:
        return self._stepping(torch.optim.AdamW(params, fused=True))

    def _adam_closure(self, params: list[nn.Parameter]) -> Any:
        return self._with_closure(torch.optim.Adam(params))

    def _lbfgs(self, params: list[nn.Parameter]) -> Any:
        return self._with_closure(torch.optim.LBFGS(params, max_iter=3, history_size=2))

    def _two_optimizers(self, params: list[nn.Parameter]) -> Any:
        return self._stepping(torch.optim.SGD(params[:2], lr=0.1, momentum=0.9), torch.optim.AdamW(params[2:], fused=True))

    def _in_backward(self, params: list[nn.Parameter]) -> Any:
        optimizers = [torch.optim.Adam([param]) for param in params]
        for param, optimizer in zip(params, optimizers, strict=True):
            param.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())

        def update() -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.loss().backward()

        return optimizers, update

    @property
    def state(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def tensors(self, is_lazy: Callable[[Tensor], bool] = lambda tensor: False) -> list[LocalTensor]:
        """Parameters and buffers."""
        return [LocalTensor.whole(name, value, lazy=is_lazy(value)) for name, value in self.model.state_dict().items()]


KINDS = [
    *["adamw_fused", "adam_closure", "two_optimizers", "in_backward"],
    *[pytest.param(kind, marks=pytest.mark.slow) for kind in ("adamw_foreach", "lbfgs")],
]


def save_now(training: Training, path: Path) -> Path:
    save(path, training.tensors(), training.state, rank=0, world_size=1, save_id=uuid.uuid4().hex)
    return path


def differ(a: Path, b: Path) -> bool:
    """Tell whether two checkpoints differ in any bit of what they hold."""

    def is_same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return isinstance(y, Tensor) and x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes()
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(is_same(x[key], y[key]) for key in x)
        if isinstance(x, list | tuple):
            return len(x) == len(y) and all(is_same(one, other) for one, other in zip(x, y, strict=True))
        return bool(x == y)

    return not is_same(load_state_dict(a, ""), load_state_dict(b, "")) or not is_same(load_state(a), load_state(b))


@pytest.fixture
def checkpointer() -> Iterator[Checkpointer]:
    made = Checkpointer(SLOW)
    made.guard_optimizers()
    yield made
    with contextlib.suppress(SaveFailedError):
        made.close()


def begin(checkpointer: Checkpointer, training: Training, path: Path, **options: Any) -> PendingSave:
    is_lazy = checkpointer.guard_optimizers().lazy_tensors()
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "save_id": uuid.uuid4().hex, "is_lazy": is_lazy, **options}
    return checkpointer.save(path, training.tensors(is_lazy), training.state, **settings)


@pytest.fixture(params=KINDS)
def training(request: pytest.FixtureRequest, checkpointer: Checkpointer) -> Training:
    """Some steps into a training whose optimizers the guard has seen."""
    made = Training(request.param)
    made.update()
    made.update()
    return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set no more is copied than the pool holds: its slots are not written."""
    opened, write = threading.Event(), PendingSave.write

    def write_later(self: PendingSave, file: Path) -> Any:
        opened.wait()
        return write(self, file)

    monkeypatch.setattr(PendingSave, "write", write_later)
    yield opened
    opened.set()


# ------------------------------------------------------------------------------------------------ loops in plain PyTorch


def test_an_update_right_after_a_save_does_not_reach_the_checkpoint(
    checkpointer: Checkpointer, training: Training, tmp_path: Path
) -> None:
    expected = save_now(training, tmp_path / "expected")
    pending = begin(checkpointer, training, tmp_path / "a")
    training.update()
    training.update()
    assert pending.stats["fence_s"] > 0
    checkpointer.wait()
    assert not differ(tmp_path / "a", expected)
    assert differ(save_now(training, tmp_path / "later"), expected)


def take_away_the_fence(patch: pytest.MonkeyPatch, checkpointer: Checkpointer) -> None:
    patch.setattr(checkpointer.guard_optimizers(), "_fence", lambda: None)
    patch.setattr(checkpointer, "fence", lambda: 0.0)


def test_without_the_fence_and_without_detection_the_checkpoint_would_be_torn(
    checkpointer: Checkpointer, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """So the test above would fail: it does not hold by chance."""
    expected = save_now(training, tmp_path / "expected")
    with monkeypatch.context() as patch:
        take_away_the_fence(patch, checkpointer)
        patch.setattr(Sources, "changed", lambda self, snapshot: [])
        begin(checkpointer, training, tmp_path / "a")
        training.update()
        later = save_now(training, tmp_path / "later")
        gate.set()
        checkpointer.wait()
    assert differ(tmp_path / "a", expected)
    assert differ(tmp_path / "a", later)


def test_without_the_fence_a_change_is_detected_and_nothing_published(
    checkpointer: Checkpointer, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    with monkeypatch.context() as patch:
        take_away_the_fence(patch, checkpointer)
        begin(checkpointer, training, tmp_path / "a")
        training.update()
        gate.set()
        with pytest.raises(SaveFailedError, match=r"(0\.weight|3\.weight|state/).* changed between the call and the copy"):
            checkpointer.wait()
    assert not is_checkpoint(tmp_path / "a")
    expected = save_now(training, tmp_path / "expected")
    begin(checkpointer, training, tmp_path / "a")
    checkpointer.wait()
    assert not differ(tmp_path / "a", expected)


# ------------------------------------------------------------------------------------------- other changes of the state


def test_buffers_that_the_next_forward_changes_are_copied_in_the_call(checkpointer: Checkpointer, tmp_path: Path) -> None:
    training = Training("adamw_foreach")
    training.update()
    expected = save_now(training, tmp_path / "expected")
    begin(checkpointer, training, tmp_path / "a")
    for _ in range(3):
        training.loss()
    checkpointer.wait()
    assert not differ(tmp_path / "a", expected)
    assert differ(save_now(training, tmp_path / "later"), expected)


def clamp(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.clamp_(-0.01, 0.01)


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(0.5)


def through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] = 3.0


@pytest.mark.parametrize("change", [clamp, through_data, through_numpy])
def test_a_change_that_is_no_step_is_told_and_copied_in_the_call_from_then_on(
    checkpointer: Checkpointer, tmp_path: Path, change: Callable[[nn.Parameter], None], gate: threading.Event
) -> None:
    """``clamp`` is seen by the version that torch counts, the others by fingerprints."""
    training = Training("adamw_foreach")
    training.update()
    training.update()
    begin(checkpointer, training, tmp_path / "a")
    weight = training.model[3].weight
    version = weight._version
    change(weight)
    assert (weight._version != version) == (change is clamp)
    gate.set()
    with pytest.raises(SaveFailedError, match=r"/a: 3\.weight changed between the call and the copy"):
        checkpointer.wait()
    assert not is_checkpoint(tmp_path / "a")
    before = save_now(training, tmp_path / "before")
    begin(checkpointer, training, tmp_path / "a")
    change(weight)
    checkpointer.wait()
    assert not differ(tmp_path / "a", before)


def test_what_the_first_steps_were_seen_to_change_is_copied_in_the_call(checkpointer: Checkpointer, tmp_path: Path) -> None:
    training = Training("adamw_foreach")
    weight, still = training.model[0].weight, training.model[3].weight
    assert not checkpointer.lazy_tensors()(still)
    for _ in range(2):
        training.update()
        through_data(weight)
    training.update()
    is_lazy = checkpointer.lazy_tensors()
    assert (is_lazy(weight), is_lazy(still), is_lazy(training.model[1].running_mean)) == (False, True, False)
    expected = save_now(training, tmp_path / "expected")
    begin(checkpointer, training, tmp_path / "a")
    through_data(weight)
    checkpointer.wait()
    assert not differ(tmp_path / "a", expected)


def test_parameters_that_get_other_memory_are_saved_as_they_were(checkpointer: Checkpointer, tmp_path: Path) -> None:
    training = Training("adamw_foreach")
    training.update()
    expected = save_now(training, tmp_path / "expected")
    begin(checkpointer, training, tmp_path / "a")
    for param in training.model.parameters():
        param.data = torch.zeros_like(param)
    training.update()
    checkpointer.wait()
    assert not differ(tmp_path / "a", expected)


# ----------------------------------------------------------------------------------------------------------- Lightning


class Automatic(L.LightningModule):
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Tanh())
        self.second = nn.Linear(512, 64)
        self._make = optimizer

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.second(self.first(batch)).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self._make(self.parameters())


class Manual(Automatic):
    """Two optimizers, the second with a closure."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        first, second = self.optimizers()  # type: ignore[misc,attr-defined]

        def closure() -> Tensor:
            first.zero_grad()
            second.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        closure()
        first.step()
        second.step(closure=closure)

    def configure_optimizers(self) -> Any:
        return [self._make(self.first.parameters()), torch.optim.SGD(self.second.parameters(), lr=0.1, momentum=0.9)]


class WaitingIO(AsyncCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        self.wait()


def fit(folder: Path, module: L.LightningModule, io: str, *, asynchronous: bool) -> list[Path]:
    """Train five steps and save after each; return the checkpoints."""
    if io == "strategy":
        settings = CheckpointSettings(asynchronous=asynchronous, engine=SLOW)
        how: dict[str, Any] = {"strategy": kenotron.KenotronStrategy(checkpoint=settings)}
    else:
        how = {"plugins": [(AsyncCheckpointIO if asynchronous else WaitingIO)(SLOW)]}
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[keep], **quiet, **how)
    data = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    return sorted(folder.iterdir(), key=lambda path: load_state(path)["lightning"]["global_step"])


def adamw_foreach(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, foreach=True)


def adamw_fused(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True)


@pytest.mark.parametrize(
    ("io", "module", "optimizer"),
    [
        ("strategy", Automatic, adamw_fused),
        pytest.param("strategy", Manual, adamw_foreach, marks=pytest.mark.slow),
        pytest.param("plugin", Automatic, adamw_foreach, marks=pytest.mark.slow),
        ("plugin", Manual, adamw_fused),
    ],
)
def test_every_checkpoint_of_a_fit_is_that_of_a_synchronous_one(
    tmp_path: Path, io: str, module: type[Automatic], optimizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, asynchronous: bool) -> list[Path]:
        L.seed_everything(1, verbose=False)
        return fit(tmp_path / name, module(optimizer), io, asynchronous=asynchronous)

    def tensors_differ(a: Path, b: Path) -> bool:
        one, other = load_state_dict(a, ""), load_state_dict(b, "")
        assert one.keys() == other.keys()
        return any(one[name].numpy().tobytes() != other[name].numpy().tobytes() for name in one)

    expected, found = run("expected", False), run("found", True)
    assert len(expected) == 5
    assert [path.name for path in found] == [path.name for path in expected]
    assert not any(itertools.starmap(tensors_differ, zip(found, expected, strict=True)))
    # Without the fence what is copied is no longer what was there at the call, and every save says so.
    make_guard = OptimizerGuard.__init__
    monkeypatch.setattr(OptimizerGuard, "__init__", lambda self, fence, on_step: make_guard(self, lambda: None, on_step))
    with pytest.raises(SaveFailedError, match="changed between the call and the copy"):
        run("unfenced", True)

"""Checkpoints of any layout, opened as Lightning's are: ``torch.load``, ``load_from_checkpoint``, other strategies."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import utilities
from strategy_helpers import DP2, SLOW, TP2_PP2, Classifier, Task, close, fit, loaders, make_trainer
from torch import nn

from kenotron import checkpoint as checkpoints
from kenotron.checkpoint.readme import README
from kenotron.testing import RankPool

LAYOUTS: dict[str, tuple[int, Any]] = {
    "one": (1, {}), "dp2": DP2, "dp2-zero3": (2, {"zero_stage": 3}), "tp2-pp2": TP2_PP2,
}  # fmt: skip


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        decayed = [param for param in self.parameters() if param.ndim > 1]
        others = [param for param in self.parameters() if param.ndim < 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], eps=1e-6)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def train_and_save(strategy: Any, path: str, module: Any = Scheduled) -> None:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, max_epochs=1)
    trainer.fit(module(), *loaders(trainer, Task(module, strategy)))
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("name", ["one", "dp2", pytest.param("dp2-zero3", marks=SLOW), "tp2-pp2"])
def test_torch_load_returns_lightnings_dictionary(pool: RankPool, name: str, tmp_path: Path) -> None:
    train_and_save(None, str(tmp_path / "file.ckpt"))
    pool.run(train_and_save, LAYOUTS[name][0], LAYOUTS[name][1], str(tmp_path / "a.ckpt"))
    expected = torch.load(tmp_path / "file.ckpt", weights_only=False)
    found = torch.load(tmp_path / "a.ckpt")
    assert found.keys() - {"kenotron_guards"} == expected.keys()
    assert list(found["state_dict"]) == list(expected["state_dict"])
    close(found["state_dict"], expected["state_dict"], 1e-4)
    close(found["optimizer_states"], expected["optimizer_states"], 1e-4)
    for key in ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name", "lr_schedulers"):
        assert found[key] == expected[key]
    module = Scheduled.load_from_checkpoint(tmp_path / "a.ckpt", lr=0.5)
    assert module.hparams["lr"] == 0.5
    close(module.state_dict(), expected["state_dict"], 1e-4)


class Wrapped(L.LightningModule):
    """As lightning-hydra-template writes them: the network and the optimizer are hyper-parameters."""

    def __init__(self, net: nn.Module, optimizer: Any, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.hparams["optimizer"](self.parameters())


def wrapped() -> Wrapped:
    return Wrapped(nn.Linear(8, 3), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))


@pytest.mark.parametrize("name", ["one", "dp2"])
def test_modules_and_partials_among_hyper_parameters_are_opened_by_whoever_trusts_them(
    pool: RankPool, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    pool.run(train_and_save, LAYOUTS[name][0], LAYOUTS[name][1], str(path), wrapped)
    module = Wrapped.load_from_checkpoint(path, weights_only=False)
    weights = checkpoints.load_state_dict(path)
    assert torch.equal(module.net.weight, weights["net.weight"]) and module.net is module.hparams["net"]
    assert module.hparams["optimizer"].keywords == {"lr": 0.1, "momentum": 0.9}
    assert len([n for n in checkpoints.read_manifest(path).tensors if n.startswith("state/")]) == 0  # stored once
    with pytest.warns(
        UserWarning, match=r"hyper_parameters → net \(torch\.nn.*hyper_parameters → optimizer .*weights_only=False"
    ):
        opened = torch.load(path)
    assert opened["hyper_parameters"] == {"width": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Wrapped.load_from_checkpoint(path, net=nn.Linear(8, 3), optimizer=None)
        trainer = make_trainer(None, max_epochs=2)
        trainer.fit(wrapped(), *loaders(trainer, Task(wrapped, None)), ckpt_path=str(path))  # another strategy goes on
    assert torch.equal(module.net.bias, weights["net.bias"]) and trainer.global_step == 6


def resume(strategy: Any, path: str, weights_only: bool | None) -> list[str]:
    """Return the hyper-parameters that a resumed run finds in the checkpoint."""
    warnings.simplefilter("ignore")
    module, trainer = wrapped(), make_trainer(strategy, max_epochs=2)
    found: list[str] = []
    module.on_load_checkpoint = lambda checkpoint: found.extend(sorted(checkpoint["hyper_parameters"]))
    trainer.fit(module, *loaders(trainer, Task(wrapped, None)), ckpt_path=path, weights_only=weights_only)
    return found


@pytest.mark.parametrize(
    ("strategy", "trusted"),
    [({}, ["net", "optimizer", "width"]), ({"zero_stage": 3}, ["optimizer", "width"])],  # FSDP2's modules are no pickles
    ids=["before set-up", "after it"],
)
def test_a_run_that_trusts_a_checkpoint_resumes_with_what_pickle_holds(
    pool: RankPool, strategy: Any, trusted: list[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "a.ckpt")
    pool.run(train_and_save, 2, strategy, path, wrapped)
    assert pool.run(resume, 2, strategy, path, False) == [trusted] * 2
    assert pool.run(resume, 2, strategy, path, None) == [["width"]] * 2


class Quasi(Classifier):
    """An optimizer that keeps lists."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2, history_size=3)


class Factored(Classifier):
    """An optimizer whose state has other shapes with as many dimensions."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=0.02)


@pytest.mark.parametrize(("module", "name"), [(Quasi, "one"), pytest.param(Quasi, "dp2", marks=SLOW), (Factored, "dp2")])
def test_state_that_is_no_flat_dictionary_is_resumed_bit_for_bit(
    pool: RankPool, module: Any, name: str, tmp_path: Path
) -> None:
    save = functools.partial(L.pytorch.callbacks.ModelCheckpoint, str(tmp_path), filename="{epoch}", save_top_k=-1)
    (ranks, strategy), trainer = LAYOUTS[name], {"max_epochs": 3}
    task = functools.partial(Task, module, strategy, trainer=trainer, val_rows=0, folder=str(tmp_path))
    whole = pool.run(fit, ranks, task(callbacks=[save]))
    rest = pool.run(fit, ranks, task(fit={"ckpt_path": str(tmp_path / "epoch=0.ckpt")}))
    assert rest[0]["losses"] == whole[0]["losses"][3:]
    for key, value in whole[0]["weights"].items():
        assert (rest[0]["weights"][key] == value).all(), key
    (state,) = torch.load(tmp_path / "epoch=0.ckpt")["optimizer_states"]
    if module is Quasi:
        kept = state["state"][0]
        assert len(kept["old_dirs"]) == len(kept["old_stps"]) == 2 and isinstance(kept["n_iter"], int)


class Boom:
    """Runs code when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.mark),)


def test_a_strangers_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["hyper_parameters"]["x"] = Boom(str(tmp_path / "ran"))

    path = tmp_path / "a.ckpt"
    train_and_save({}, str(path), Evil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path)
        torch.load(path, weights_only=True)
        Classifier.load_from_checkpoint(path)
        for strategy in ({}, None):
            trainer = make_trainer(strategy, max_epochs=2)
            trainer.fit(Classifier(), *loaders(trainer, Task(Classifier, strategy)), ckpt_path=str(path))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_torch_alone_reads_it_as_its_text_says(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    pool.run(train_and_save, *TP2_PP2, str(path))
    lines = (path / README).read_text().partition("    import json, torch")
    code = "import json, torch" + "\n".join(line[4:] for line in lines[2].splitlines()[:-1])
    code += f"\ntorch.save(load({str(path)!r}), {str(tmp_path / 'out.pt')!r})"
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    read = torch.load(tmp_path / "out.pt")
    weights = checkpoints.load_state_dict(path)
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


def test_one_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    seen = []

    class Opens(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            before = module.head.weight.detach().clone()
            seen.append(torch.equal(torch.load(path)["state_dict"]["head.weight"], before))

    trainer = make_trainer({}, [Opens()], max_epochs=1)
    trainer.fit(Classifier(), *loaders(trainer, Task(Classifier, {})))
    assert seen == [True] * 3


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_both_packages_and_fabric_open_it(package: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    train_and_save({}, str(path))
    fabric = "from lightning.fabric import Fabric" if package == "lightning" else "from lightning_fabric import Fabric"
    code = f"""
import {package} as L
{fabric}
from lightning.pytorch.loggers import utilities
from torch import nn
class Module(L.LightningModule):
    def __init__(self, depth, dropout, lr):
        super().__init__()
        self.head = nn.Linear(16, 3)
print(Module.load_from_checkpoint({str(path)!r}, map_location="cpu", strict=False).head.weight.sum().item())
print(Fabric(accelerator="cpu", devices=1).load({str(path)!r})["state_dict"]["head.weight"].sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = checkpoints.load_state_dict(path)["head.weight"].sum().item()
    assert [float(line) for line in done.stdout.split()] == [expected, expected]


class Sends(L.pytorch.loggers.Logger):
    """As WandbLogger and MLFlowLogger do it: looks for new files when a checkpoint was saved, and sends them away."""

    name, version = "sends", 0

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, float] = {}
        self.sent: list[tuple[int, str, bool]] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        for time, path, _, _ in utilities._scan_checkpoints(checkpoint_callback, self.times):
            checkpoint = torch.load(open(path, "rb"))  # noqa: SIM115
            is_best = path == checkpoint_callback.best_model_path
            self.sent.append((checkpoint["global_step"], Path(path).name, is_best))
            self.times[path] = time


def test_loggers_get_each_checkpoint_as_a_file_when_it_is_published(tmp_path: Path) -> None:
    logger = Sends()
    keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer({}, [keep], max_epochs=1, logger=logger)
    trainer.fit(Classifier(), *loaders(trainer, Task(Classifier, {})))
    assert logger.sent == [(step, f"step={step}.ckpt", True) for step in (1, 2, 3)]

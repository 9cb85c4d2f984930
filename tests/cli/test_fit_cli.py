"""``kenotron fit``: a YAML that says everything, what is wrong in one, and the configuration in every checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import kenotron
from kenotron import checkpoint as checkpoints
from kenotron.cli import main
from kenotron.cli.fit import KenotronCLI
from kenotron.cli.stored_config import stored_config
from kenotron.data.nanoset import NanosetWriter

CONFIG = """
seed_everything: 3
model:
  model:
    model_type: llama
    vocab_size: 64
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
  total_steps: 4
data:
  corpora: {a: a.ds}
  sequence_length: 16
  global_batch_size: 4
  loading: {num_workers: 0}
trainer:
  accelerator: cpu
  devices: 1
  strategy: kenotron
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: "{step}", every_n_train_steps: 2, save_top_k: -1}
"""

MODULE = """
import lightning as L
import torch


class Line(L.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with NanosetWriter(tmp_path / "a.ds", token_size=2) as writer:
        writer.write(torch.arange(400).remainder(64).numpy())
    (tmp_path / "x.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def changed(folder: Path, **sections: Any) -> str:
    """Write a configuration in which some sections have further entries, and return its path."""
    config = yaml.safe_load(CONFIG)
    for name, entries in sections.items():
        config[name] = {**config.get(name, {}), **entries}
    (folder / "changed.yaml").write_text(yaml.safe_dump(config))
    return "changed.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what is told of wrong input; it has no traceback, and exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_a_yaml_says_everything_and_a_checkpoint_goes_on(folder: Path) -> None:
    assert main(["fit", "--config", "x.yaml"]) == 0
    path = folder / "checkpoints" / "step=2.ckpt"
    kept = yaml.safe_load(stored_config(path))
    assert kept["model"]["class_path"] == "kenotron.CausalLM"
    assert (kept["trainer"]["max_steps"], kept["seed_everything"]) == (2, 3)
    # The checkpoint is a configuration itself.
    assert main(["fit", "--config", str(path), "--ckpt_path", str(path), "--trainer.max_steps", "4"]) == 0
    assert yaml.safe_load(stored_config(folder / "checkpoints" / "step=4.ckpt"))["trainer"]["max_steps"] == 4


@pytest.mark.parametrize("strategy", ["kenotron", "auto"])
def test_checkpoints_of_weights_alone_and_of_other_strategies_keep_it(
    folder: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "c", "save_weights_only": True, "filename": "last"}}
    config = changed(folder, trainer={"strategy": strategy, "callbacks": [callback], "limit_train_batches": 2})
    assert main(["fit", "--config", config, "--trainer.max_epochs", "1"]) == 0
    assert main(["checkpoint", "config", "c/last.ckpt", "-o", "again.yaml"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "config", "c/last.ckpt"]) == 0
    text = capsys.readouterr().out
    assert text == (folder / "again.yaml").read_text()
    assert yaml.safe_load(text)["trainer"]["strategy"] == strategy


def test_a_checkpoint_without_a_configuration_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.save(folder / "other", [], {}, rank=0, world_size=1, save_id="x")
    assert main(["checkpoint", "config", "other"]) == 2
    assert "other holds no configuration" in capsys.readouterr().err
    assert main(["checkpoint", "config", "nowhere"]) == 2
    assert main(["checkpoint", "config", "x.yaml"]) == 2
    assert "x.yaml is not a checkpoint" in capsys.readouterr().err


def test_strategies_come_by_name_settings_or_class(folder: Path) -> None:
    given: dict[str, Any] = {
        "kenotron_zero3": ("kenotron_zero3", 3),
        "settings": ("kenotron:zero_stage=2", 2),
        "class": ({"class_path": "kenotron.KenotronStrategy", "init_args": {"zero_stage": 0, "guard": {"norm_spike": 5.0}}}, 0),
    }
    for strategy, stage in given.values():
        cli = KenotronCLI(args=["--config", changed(folder, trainer={"strategy": strategy})], run=False)
        assert cli.trainer.strategy.layout.zero_stage == stage
        assert isinstance(cli.trainer.checkpoint_callback, ModelCheckpoint)


def test_a_module_of_the_folder_trains_with_an_optimizer_of_the_yaml(folder: Path) -> None:
    (folder / "line_module.py").write_text(MODULE)
    config = {
        "model": {"class_path": "line_module.Line"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "trainer": {
            **yaml.safe_load(CONFIG)["trainer"],
            "max_steps": -1,
            "max_epochs": 1,
            "strategy": "kenotron_zero3",
            "devices": 2,
        },
    }
    (folder / "line.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "kenotron.cli", "fit", "--config", "line.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "checkpoints").iterdir()
    state = kenotron.load_state_dict(path)
    torch.manual_seed(42)  # which is the default
    layer = torch.nn.Linear(3, 1)
    # Of ones, the loss is the square of the sum of all weights; each of two steps takes 4 · 2 · 0.05 of that sum away.
    expected = (layer.weight.sum() + layer.bias) * 0.6**2
    torch.testing.assert_close(state["layer.weight"].sum() + state["layer.bias"], expected, rtol=1e-4, atol=1e-6)
    assert checkpoints.load_state(path)["optimizers"][0][0]["initial_lr"] == 0.05


def test_print_config_is_a_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "x.yaml", "--print_config"])
    assert end.value.code == 0
    (folder / "full.yaml").write_text(capsys.readouterr().out)
    full = yaml.safe_load((folder / "full.yaml").read_text())
    assert full["data"]["init_args"]["loading"] == {"num_workers": 0, "prefetch": 4, "pin_memory": None}
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "full.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == full


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"trainer": {"max_stepz": 3}}, "trainer.max_stepz is not known; the nearest is max_steps"),
        ({"data": {"sequence_lenght": 3}}, "data.init_args.sequence_lenght is not known; the nearest is sequence_length"),
        ({"data": {"loading": {"workers": 3}}}, "data.init_args.loading.workers is not known; the nearest is num_workers"),
        (
            {"data": {"stages": [{"start_stp": 3}]}},
            "data.init_args.stages[0].start_stp is not known; the nearest is start_step",
        ),
        ({"modle": {}}, "modle is not known; the nearest is model"),
        ({"trainer": {"strategy": "kenotrn"}}, "trainer.strategy: 'kenotrn' is not known; the nearest is kenotron"),
        (
            {"trainer": {"strategy": {"class_path": "kenotron.KenotronStrategy", "init_args": {"zero": 1}}}},
            "trainer.strategy.init_args.zero is not known; the nearest is zero_stage",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "kenotron.callbacks.Perplexty"}]}},
            "The nearest is kenotron.callbacks.Perplexity",
        ),
        (
            {"model": {"class_path": "kenotron.CausalLM", "init_arg": {}}},
            "model.init_arg is not known; the nearest is init_args",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(
    folder: Path, sections: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, "--config", changed(folder, **sections))


def test_all_unknown_keys_are_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "--config", changed(folder, trainer={"max_stepz": 3}, data={"sequence_lenght": 3}))
    assert "max_stepz" in err and "sequence_lenght" in err


def test_unknown_options_name_the_nearest_known_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in [
        ("--trainer.max_stepz 3", "trainer.max_stepz is not known; the nearest is max_steps."),
        ("--ckpt_pth last", "--ckpt_pth is not known; the nearest is --ckpt_path."),
        ("--data.sequence_lenght 5", "data.sequence_lenght is not known; the nearest is sequence_length."),
        ("--data.loading.num_worker=3", "data.loading.num_worker is not known; the nearest is num_workers."),
        ("--trainer.strategy kenotronn", "'kenotronn' is not known; the nearest is kenotron."),
        ("--trainer.strategy kenotron:tpp=2", "trainer.strategy.tpp is not known; the nearest is tp."),
        ("--trainer.strategy.tp 2", "settings of a strategy that is named are written with its name"),
        (
            "--trainer.strategy=kenotron.KenotronStrategy --trainer.strategy.zero 1",
            "zero is not known; the nearest is zero_stage",
        ),
        ("--trainer.callbacks+=kenotron.callbacks.Perplexty", "The nearest is kenotron.callbacks.Perplexity."),
        ("--trainer.callbacks.init_args.dirpth x", "trainer.callbacks.init_args.dirpth is not known; the nearest is dirpath."),
        ("--optimizer torch.optim.AdamW --optimizer.lrr 3", "optimizer.lrr is not known; the nearest is lr."),
        ("--modle.x 3", "modle is not known; the nearest is model."),
    ]:
        err = refused(capsys, "--config", "x.yaml", *options.split())
        assert told in err, options
        assert "Subtypes" not in err


def test_known_options_reach_the_classes_that_are_named(folder: Path) -> None:
    options = (
        "--data.sequence_length 8 --trainer.callbacks+=kenotron.callbacks.Throughput --trainer.callbacks.every_n_train_steps 3"
    )
    options += " --trainer.strategy kenotron:tp=1,zero_stage=2 --trainer.callbacks.count_flops=false --model.learning_rate=1e-3"
    cli = KenotronCLI(args=["fit", "--config", "x.yaml", *options.split()])
    assert cli.datamodule.sequence_length == 8
    assert cli.trainer.strategy.layout.zero_stage == 2


def test_samples_that_are_longer_than_the_model_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sequence_length=32, and the model has max_position_embeddings=24"):
        KenotronCLI(args=["fit", "--config", "x.yaml", "--data.sequence_length=32", "--model.model.max_position_embeddings=24"])


def test_a_folder_that_cannot_be_written_is_told_before_training(folder: Path) -> None:
    (folder / "file").touch()
    place = folder / "file" / "checkpoints"
    with pytest.raises(ValueError, match=r"checkpoints can't be written to .*file/checkpoints: Not a directory"):
        KenotronCLI(args=["fit", "--config", "x.yaml", f"--trainer.callbacks.dirpath={place}"])


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"trainer": {"max_steps": "many"}}, "max_steps"),
        (
            {"trainer": {"strategy": {"class_path": "kenotron.KenotronStrategy", "init_args": {"tp": 0}}}},
            "Set tp to an integer",
        ),
        ({"trainer": {"strategy": "kenotron:tp"}}, "'tp' is no setting"),
        ({"data": {"global_batch_size": 0}}, "global_batch_size=0: set it to 1 or more"),
    ],
)
def test_wrong_values_are_told(folder: Path, sections: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, "--config", changed(folder, **sections))


def test_what_is_no_configuration_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such file" in refused(capsys, "--config", "nowhere.yaml")
    (folder / "list.yaml").write_text("- a\n- b\n")
    assert "a configuration is a mapping" in refused(capsys, "--config", "list.yaml")
    (folder / "broken.yaml").write_text("a: [1\n")
    assert "broken.yaml" in refused(capsys, "--config", "broken.yaml")


def test_all_commands_are_listed_at_once() -> None:
    code = "import sys, kenotron.cli.parsers as p; print(p.parser().format_help()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    for name in ("fit", "validate", "test", "predict", "compare", "checkpoint", "completion"):
        assert f"\n    {name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


# ---- Progress -------------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_each_log_and_none_of_what_is_not_the_users(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = changed(folder, trainer={"enable_progress_bar": None, "log_every_n_steps": 2, "max_steps": 4})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        assert main(["fit", "--config", text]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line[0] for line in lines] == ["step 2/4", "step 4/4"]
    for line in lines:
        assert [part.split()[0] for part in line[1:4]] == ["loss", "lr", "grad"]
        assert "tokens/s" in line[4] and "GiB" in line[5] and "left" in line[6]
    others = [str(each.message) for each in told]
    assert not [each for each in others if "deprecated" in each or "is zero" in each], others

"""``kenotron import-config``: what becomes of Nanotron's keys, and that the result trains."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoConfig

from kenotron.cli import main
from kenotron.cli.fit import KenotronCLI
from kenotron.cli.import_config import imported
from kenotron.data.nanoset import NanosetWriter

TINY = Path(__file__).with_name("nanotron.yaml")


def given(**changes: Any) -> dict[str, Any]:
    """Return Nanotron's tiny Llama with other values at dotted paths, in which dots are double underscores."""
    config: dict[str, Any] = copy.deepcopy(yaml.safe_load(TINY.read_text()))
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[key] = value
    return config


def lost(**changes: Any) -> dict[str, str]:
    return {one.key: one.hint for one in imported(given(**changes))[1]}


def strategy(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = imported(given(**changes))[0]["trainer"]["strategy"]["init_args"]
    return found


def test_every_key_is_read_or_named() -> None:
    named = lost()
    assert named["tokenizer.tokenizer_name_or_path"].startswith("corpora are tokenised before: kenotron tokenize")
    assert "general.benchmark_csv_path" not in named  # null says nothing
    assert "tokens.train_steps" not in named
    assert "model.model_config.colour" in lost(model__model_config__colour=3)
    assert "parallelism.tpp" in lost(parallelism__tpp=3)


def test_the_layout_and_its_microbatches() -> None:
    found = strategy(
        parallelism__pp=2, parallelism__tp=4, parallelism__recompute_layer=True, tokens__batch_accumulation_per_replica=8
    )
    assert found == {
        "dp": 2, "pp": 2, "tp": 4, "zero_stage": 1, "schedule": "1f1b", "microbatches": 8, "sequence_parallel": True,
        "recompute": "full",
    }  # fmt: skip
    config, _ = imported(given(parallelism__tp=8, parallelism__dp=4, tokens__batch_accumulation_per_replica=8))
    trainer = config["trainer"]
    assert (trainer["devices"], trainer["num_nodes"], trainer["accumulate_grad_batches"]) == (8, 4, 8)
    assert config["data"]["init_args"]["global_batch_size"] == 2 * 8 * 4
    assert strategy(parallelism__expert_parallel_size=2)["dp"] == 2  # borrowed
    assert strategy(parallelism__expert_parallel_size=4)["dp"] == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"warmup_steps": 2, "total_steps": 6, "decay": "cosine", "minimum": 1e-5 / 3e-4}),
        (
            {"lr_decay_starting_step": 4, "lr_decay_steps": 2, "lr_decay_style": "1-sqrt", "min_decay_lr": 0},
            {"warmup_steps": 2, "total_steps": 6, "decay": "1-sqrt", "minimum": 0.0, "decay_steps": 2},
        ),
        (
            {"lr_decay_steps": None, "min_decay_lr": None},
            {"warmup_steps": 2, "total_steps": 6, "decay": "cosine", "minimum": 1.0},
        ),
    ],
)
def test_the_schedule(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    prefix = "optimizer__learning_rate_scheduler__"
    config, _ = imported(given(**{prefix + key: value for key, value in changes.items()}))
    model = config["model"]["init_args"]
    schedule = {
        name: model[name] for name in ("warmup_steps", "total_steps", "decay", "minimum", "decay_steps") if name in model
    }
    assert schedule == pytest.approx(expected)


def test_a_constant_warm_up_is_named() -> None:
    assert "optimizer.learning_rate_scheduler.lr_warmup_style" in lost(
        optimizer__learning_rate_scheduler__lr_warmup_style="constant"
    )


def test_families() -> None:
    base = given()["model"]["model_config"]
    qwen = {**{key: value for key, value in base.items() if key != "is_llama_config"}, "is_qwen2_config": True}
    experts = {"num_experts": 4, "top_k": 2, "moe_intermediate_size": 32, "layers": [1], "enable_shared_expert": True}

    def model(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
        found: dict[str, Any] = imported(given(model__model_config=config, **changes))[0]["model"]["init_args"]
        return found

    assert model({**qwen, "no_rope_layer": 4})["model"]["model_type"] == "smollm3"
    assert model({**qwen, "sliding_window_size": 8})["model"]["sliding_window"] == 8
    found = model({**qwen, "moe_config": experts, "z_loss_enabled": True, "z_loss_coefficient": 1e-3})
    assert (found["model"]["model_type"], found["model"]["mlp_only_layers"]) == ("qwen2_moe", [0])
    assert found["settings"] == {"z_loss": 1e-3}
    star = {"is_starcoder2_config": True, "grouped_query": True, "num_kv_heads": 2, "hidden_size": 64}
    assert model(star)["model"]["num_key_value_heads"] == 2
    assert model({"is_starcoder2_config": True})["model"]["num_key_value_heads"] == 1
    assert model(base, model__make_vocab_size_divisible_by=48)["model"]["vocab_size"] == 96
    with pytest.raises(ValueError, match=r"is_gpt9_config: this family is not known\. Known are is_llama_config"):
        model({"is_gpt9_config": True})


def test_texts_become_corpora_to_tokenise_and_chats_conversations() -> None:
    data = [{"name": "a", "start_training_step": 1, "data": {"dataset": {"hf_dataset_or_datasets": "org/text"}, "seed": 1}}]
    config, named = imported(given(data_stages=data))
    assert config["data"]["init_args"]["corpora"] == {"text": "tokens/text"}
    assert "kenotron tokenize" in {one.key: one.hint for one in named}["data_stages.0.data.dataset.hf_dataset_or_datasets"]
    data[0]["data"] = {"dataset": {"hf_dataset_or_datasets": "org/chat", "sft_dataloader": True}}
    chat = imported(given(data_stages=data))[0]["data"]
    assert chat["class_path"] == "kenotron.ChatData" and chat["init_args"]["conversations"] == {"chat": "org/chat"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens__train_steps": None}, "tokens.train_steps is missing"),
        ({"parallelism__tp": 0}, "parallelism.tp is 0. Set it to an integer of 1 or more"),
        ({"model__dtype": "float8"}, "model.dtype is float8. Set it to one of bfloat16"),
        ({"data_stages": []}, "there is nothing to train on"),
        ({"optimizer__optimizer_factory__name": "lion"}, "Set it to 'adamW' or 'sgd'"),
    ],
)
def test_what_is_missing_or_wrong_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        imported(given(**changes))


def test_what_is_no_configuration_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main(["import-config", str(tmp_path / "list.yaml")]) == 2
    assert main(["import-config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "is a mapping of sections" in capsys.readouterr().err


def test_the_result_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("web", "code"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        with NanosetWriter(tmp_path / "corpus" / name / "0.ds", token_size=2) as writer:
            writer.write(np.arange(900) % 64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["import-config", str(TINY), "-o", "ours.yaml"]) == 0
    assert "15 keys have no counterpart" in capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    assert config["trainer"]["devices"] == 2
    config["trainer"]["strategy"]["init_args"].pop("dp")
    config["trainer"] |= {"devices": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    config["data"]["init_args"]["loading"] = {"num_workers": 0}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "ours.yaml"]) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt",
    ]  # fmt: skip
    cli = KenotronCLI(args=["--config", "ours.yaml"], run=False)
    assert cli.trainer.max_steps == 6


def test_what_was_converted_as_a_whole_is_not_called_lost() -> None:
    folders = {"/data/llama-3.1": 0.25, "/data/b": 0.75}
    changes = {"data_stages": [{"start_training_step": 1, "data": {"dataset": {"dataset_folder": folders}, "seed": 3}}]}
    scaling = {"rope_type": "linear", "factor": 2.0}
    config, named = imported(given(**changes, model__model_config__rope_scaling=scaling))
    assert config["data"]["init_args"]["weights"] == {"llama-3.1": 0.25, "b": 0.75}
    assert config["model"]["init_args"]["model"]["rope_scaling"] == scaling
    assert not [one.key for one in named if "dataset_folder" in one.key or "rope_scaling" in one.key]


def test_older_configurations_have_one_data_section_and_a_flat_optimizer() -> None:
    old = given()
    old["data"] = {"dataset": {"hf_dataset_or_datasets": "texts"}, "seed": 5, "num_loading_workers": 2}
    del old["data_stages"]
    old["optimizer"] = {key: value for key, value in old["optimizer"].items() if key != "optimizer_factory"}
    old["optimizer"] |= {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_eps": 1e-6, "torch_adam_is_fused": True}
    config, named = imported(old)
    assert config["data"]["init_args"]["corpora"] == {"texts": "tokens/texts"}
    assert config["data"]["init_args"]["sampling"]["seed"] == 5
    model = config["model"]["init_args"]
    assert (model["betas"], model["eps"]) == ([0.8, 0.99], 1e-6)
    assert not [one.key for one in named if "adam_beta" in one.key or "adam_eps" in one.key]


def test_uploads_become_a_callback() -> None:
    upload = {"upload_s3_path": "s3://bucket/run", "remove_after_upload": True, "s5cmd_numworkers": 8}
    config, named = imported(given(s3_upload=upload))
    assert config["trainer"]["callbacks"][1] == {
        "class_path": "kenotron.callbacks.Upload", "init_args": {"url": "s3://bucket/run", "delete_local": True},
    }  # fmt: skip
    assert [one.key for one in named if one.key.startswith("s3_upload")] == ["s3_upload.s5cmd_numworkers"]


def test_mamba_and_llamoe() -> None:
    mamba = {
        "is_mamba_config": True, "d_model": 32, "num_hidden_layers": 2, "vocab_size": 61, "pad_vocab_size_multiple": 8,
        "rms_norm_eps": 1e-6, "ssm_cfg": {"d_state": 4, "d_conv": 3, "expand": 2, "bias": False, "dt_rank": "auto"},
    }  # fmt: skip
    model = imported(given(model__model_config=mamba))[0]["model"]["init_args"]["model"]
    wanted = {
        "model_type": "mamba",
        "hidden_size": 32,
        "vocab_size": 64,
        "state_size": 4,
        "conv_kernel": 3,
        "time_step_rank": "auto",
    }
    assert wanted.items() <= model.items()
    assert AutoConfig.for_model(**model).time_step_rank == 2
    experts = {"is_llamoe_config": True, "hidden_size": 32, "moe_num_experts": 4, "num_experts_per_tok": 1}
    config, _ = imported(given(model__model_config=experts))
    model = config["model"]["init_args"]["model"]
    assert (model["model_type"], model["num_local_experts"], model["num_experts_per_tok"]) == ("mixtral", 4, 1)

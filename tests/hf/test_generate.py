"""Text from checkpoints and directories: token for token what transformers generates, on one process and on two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from word_model import PROMPTS, make_directory

import kenotron
from kenotron.hf import generate
from kenotron.testing import RankPool


def expected(path: Path, **settings: Any) -> list[str]:
    """Return what transformers makes of the prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    out = model.generate(**batch, max_new_tokens=10, **settings)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def on_ranks(path: str, settings: dict[str, Any]) -> list[str]:
    """Generate on this rank of a tensor-parallel group."""
    from transformers import AutoTokenizer

    from kenotron.layout import ParallelLayout
    from kenotron.parallel.apply import Request, parallelize
    from kenotron.parallel.init import deferring

    world = int(os.environ["WORLD_SIZE"])
    layout = ParallelLayout(dp=1, tp=world).resolve(world)
    with deferring():
        model = kenotron.from_hf(path)
    torch.distributed.init_process_group("gloo")
    try:
        parallelize(model, layout.device_mesh("cpu"), Request(layout=layout, device=torch.device("cpu")))
        return generate(model, AutoTokenizer.from_pretrained(path), PROMPTS, max_new_tokens=10, **settings)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as processes:
        yield processes


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "mamba", "mamba2"])
def test_the_likeliest_tokens_are_those_of_transformers(pool, tmp_path, model_type, use_cache):
    sizes = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1} if model_type.startswith("mamba") else {}
    make_directory(tmp_path, model_type, tie_word_embeddings=model_type in ("qwen3", "mamba"), **sizes)
    theirs = expected(tmp_path, do_sample=False, use_cache=use_cache)
    assert all(len(text.split()) > 3 for text in theirs)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ours = generate(kenotron.from_hf(tmp_path), tokenizer, PROMPTS, max_new_tokens=10, use_cache=use_cache)
    assert ours == theirs
    assert pool.run(on_ranks, 2, str(tmp_path), {"use_cache": use_cache}) == [theirs, theirs]


def test_sampling_is_seeded_and_alike_on_all_ranks(pool, tmp_path):
    make_directory(tmp_path, "llama")
    torch.manual_seed(7)
    theirs = expected(tmp_path, do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7}
    found = pool.run(on_ranks, 2, str(tmp_path), settings)
    assert found == [theirs, theirs]
    other = pool.run(on_ranks, 2, str(tmp_path), {**settings, "seed": 8})
    assert other[0] == other[1] != theirs


def test_the_command_line_continues_prompts_from_checkpoints(tmp_path, capfd):
    from kenotron.checkpoint import LocalTensor, save
    from kenotron.cli import main
    from kenotron.hf.record import describe_models

    make_directory(tmp_path / "hf", "llama")
    theirs = expected(tmp_path / "hf", do_sample=False)
    model = kenotron.from_hf(tmp_path / "hf")
    root = torch.nn.Module()
    root.lm = model
    tensors = [LocalTensor.whole(f"model/lm.{name}", value, owners=(0,)) for name, value in model.state_dict().items()]
    save(tmp_path / "ckpt", tensors, {"models": describe_models(root)}, rank=0, world_size=1, save_id="a")
    lines = [f"{prompt}{text}" for prompt, text in zip(PROMPTS, theirs, strict=True)]
    arguments = ["generate", str(tmp_path / "ckpt"), *(f"--prompt={prompt}" for prompt in PROMPTS), "--max-new-tokens=10"]
    assert main(arguments) == 0
    assert capfd.readouterr().out.splitlines() == lines
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kenotron.cli"]
    done = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lines
    restored = kenotron.from_checkpoint(tmp_path / "ckpt")
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


def test_bad_input_is_told(tmp_path, capfd):
    from kenotron.cli import main

    make_directory(tmp_path, "llama")
    make_directory(tmp_path / "smaller", "llama", vocab_size=8)
    for options, text in [
        (["--max-new-tokens=0"], "max_new_tokens=0"),
        (["--temperature=0"], "temperature=0.0: set it above 0"),
        (["--top-k=0"], "top_k=0"),
        (["--top-p=1.5"], "top_p=1.5"),
        (["--prompt="], "no empty one"),
        (["--tokenizer=nowhere"], "nowhere: there is no such file or folder"),
    ]:
        assert main(["generate", str(tmp_path), "--prompt=t5", *options]) == 1
        assert text in capfd.readouterr().err
    assert main(["generate", str(tmp_path / "smaller"), "--prompt=t5 t9"]) == 1
    assert "the tokenizer gives token 9, and the model's vocabulary ends at 7" in capfd.readouterr().err
    assert main(["generate", str(tmp_path / "none"), "--prompt=t5"]) == 1
    assert "none is not a checkpoint: there is no such file or folder" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["generate", str(tmp_path / "empty"), "--prompt=t5"]) == 1
    assert "empty holds no model: neither manifest.json nor config.json" in capfd.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt=t5", f"--tokenizer={tmp_path / 'empty'}"]) == 1
    assert "empty has no tokenizer: none of tokenizer.json" in capfd.readouterr().err


def test_a_lone_tokenizer_json_is_a_tokenizer_and_checkpoints_note_that_of_the_data(tmp_path, capfd):
    from kenotron.checkpoint import LocalTensor, save
    from kenotron.cli import main
    from kenotron.hf.record import describe_models

    make_directory(tmp_path / "hf", "llama")
    lone = tmp_path / "llama-3.1" / "tokenizer.json"
    lone.parent.mkdir()
    shutil.copyfile(tmp_path / "hf" / "tokenizer.json", lone)
    root = torch.nn.Module()
    root.lm = kenotron.from_hf(tmp_path / "hf")
    weights = root.lm.state_dict().items()
    tensors = [LocalTensor.whole(f"model/lm.{name}", value, owners=(0,)) for name, value in weights]
    root.lm.config._name_or_path = ""  # as of a model that was read from nowhere
    for name, tokenizer in (("noted", lone.parent), ("none", None)):
        state = {"models": describe_models(root, tokenizer)}
        save(tmp_path / "ckpts" / name, tensors, state, rank=0, world_size=1, save_id=name)
    ask = ["--prompt=t5 t6", "--max-new-tokens=4"]
    texts = []
    for arguments in (["noted"], ["none", f"--tokenizer={lone}"], ["none", f"--tokenizer={lone.parent}"]):
        assert main(["generate", str(tmp_path / "ckpts" / arguments[0]), *arguments[1:], *ask]) == 0
        texts.append(capfd.readouterr().out)
    assert texts == [texts[0]] * 3
    assert main(["generate", str(tmp_path / "ckpts" / "none"), *ask]) == 1
    assert "none notes no tokenizer. Name a folder that has one: --tokenizer DIR" in capfd.readouterr().err
    assert main(["generate", str(tmp_path / "ckpts"), *ask]) == 1
    assert "2 are in it, of which one can be named: none, noted" in capfd.readouterr().err
    assert main(["export", str(tmp_path / "ckpts" / "noted"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()

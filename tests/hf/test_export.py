"""HF → Kénotron → HF: from a directory into a sharded training, and back, bit for bit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kenotron.hf import export
from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))


@pytest.fixture(scope="module")
def pool():
    with RankPool(8) as processes:
        yield processes


def make_directory(path: Path, model_type: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Save a small model with a tokenizer as transformers does."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    common = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    common["num_key_value_heads"] = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **settings}), dtype=dtype)
    for param in model.parameters():
        param.data.normal_()
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(path, max_shard_size="30KB")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), unk_token="a")
    tokenizer.save_pretrained(path)
    return model


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def keep(path: str, strategy: dict[str, Any], out: str, settings: dict[str, Any]) -> list[int]:
    """Build a model from a directory under a strategy, and save it without training."""
    import os
    import warnings

    import lightning as L

    import kenotron

    warnings.filterwarnings("ignore")

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = kenotron.from_hf(path, **settings)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=kenotron.KenotronStrategy(**strategy), max_steps=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module := Module(), torch.utils.data.DataLoader(torch.arange(64).view(8, 8), batch_size=4))
    trainer.save_checkpoint(out)
    return [getattr(p, "_local_tensor", p).numel() for p in module.parameters()]


MODELS = {
    "llama": ("llama", {"attention_bias": True}, {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}, {}),
    "starcoder2": ("starcoder2", {"bos_token_id": 1, "eos_token_id": 2}, {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}, {}),
    "unmodified mixtral": ("mixtral", {"num_local_experts": 4}, {"implementation": "transformers"}),
    "mamba": ("mamba", {"state_size": 8}, {}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}, {}),
    "unmodified gemma2, tied": ("gemma2", {"head_dim": 8}, {}),
}


@pytest.mark.parametrize(
    ("name", "ranks", "strategy"),
    [
        ("llama", 4, {"pp": 2, "zero_stage": 3}),
        ("mixtral", 4, {"ep": 2, "tp": 2, "zero_stage": 3}),
        ("mamba2", 4, {"tp": 4}),  # pairs of ranks hold the same rows within one matrix, as for KV heads
        ("qwen3, tied", 8, {"tp": 4, "zero_stage": 3}),
        ("unmodified gemma2, tied", 1, {}),
        *(pytest.param(name, 8, {"tp": 2, "pp": 2, "zero_stage": 3}, marks=pytest.mark.slow) for name in MODELS),
        pytest.param("unmodified mixtral", 4, {"ep": 4, "zero_stage": 3}, marks=pytest.mark.slow),
    ],
)
def test_hf_to_kenotron_to_hf_changes_no_bit(pool, tmp_path, name, ranks, strategy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_type, settings, options = MODELS[name]
    make_directory(tmp_path / "hf", model_type, settings)
    sizes = pool.run(keep, ranks, str(tmp_path / "hf"), strategy, str(tmp_path / "ckpt"), options)
    assert ranks == 1 or max(map(sum, sizes)) < sum(t.numel() for t in tensors_of(tmp_path / "hf").values())
    export(tmp_path / "ckpt", tmp_path / "out", max_shard_bytes=30_000)
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "hf" / file).read_text()) == json.loads((tmp_path / "out" / file).read_text()), file
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_other_dtypes_and_a_checkpoint_that_notes_nothing(pool, tmp_path):
    from transformers import AutoModelForCausalLM

    from kenotron import checkpoint as checkpoints

    model = make_directory(tmp_path / "hf", "llama", {}, torch.bfloat16)
    pool.run(keep, 1, str(tmp_path / "hf"), {}, str(tmp_path / "ckpt"), {})
    export(tmp_path / "ckpt", tmp_path / "half", dtype=torch.bfloat16)
    for key, tensor in tensors_of(tmp_path / "half").items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"

    whole = {f"model/{k}": v for k, v in checkpoints.load_state_dict(tmp_path / "ckpt").items()}
    from kenotron.checkpoint import LocalTensor, save

    tensors = [LocalTensor.whole(key, value, owners=(0,)) for key, value in whole.items()]
    save(tmp_path / "bare", tensors, {"models": []}, rank=0, world_size=1, save_id="a")
    with pytest.raises(ValueError, match="notes no transformers model"):
        export(tmp_path / "bare", tmp_path / "x")
    export(tmp_path / "bare", tmp_path / "bare_hf", config=tmp_path / "hf", dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "bare_hf", dtype=torch.bfloat16)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match=r"model='lm' is none of the transformers models in .*: 'model'"):
        export(tmp_path / "ckpt", tmp_path / "x", model="lm")
    with pytest.raises(ValueError, match="half"):
        export(tmp_path / "ckpt", tmp_path / "half")


def test_what_json_lacks_and_transformers_refuses_to_write_is_kept(tmp_path):
    from transformers import GenerationConfig, LlamaConfig, Mamba2Config

    from kenotron.hf.record import ModelRecord

    config = json.loads(Mamba2Config(num_hidden_layers=1).to_json_string(use_diff=False))
    record = ModelRecord(name="", implementation="transformers", architecture="Mamba2ForCausalLM", config=config)
    assert list(record.make_config().time_step_limit) == [0.0, float("inf")]

    from kenotron.checkpoint import LocalTensor, save
    from kenotron.hf.record import describe_models
    from kenotron.models import Decoder

    model = Decoder(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6)
    tensors = [LocalTensor.whole(f"model/{name}", value, owners=(0,)) for name, value in model.state_dict().items()]
    save(tmp_path / "ckpt", tensors, {"models": describe_models(model)}, rank=0, world_size=1, save_id="a")
    export(tmp_path / "ckpt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.9


def test_the_command_line_exports_and_says_what_it_wrote(pool, tmp_path, capsys):
    from kenotron.cli import main

    make_directory(tmp_path / "hf", "llama", {})
    pool.run(keep, 1, str(tmp_path / "hf"), {}, str(tmp_path / "ckpt"), {})
    assert main(["export", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--dtype", "bfloat16", "--max-shard-gb", "1e-5"]) == 0
    assert re.search(r"out: .* GB in .* s: config.json, generation_config.json, model-00001-of-000", capsys.readouterr().out)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert main(["export", str(tmp_path / "hf"), str(tmp_path / "x")]) == 1
    assert "hf" in capsys.readouterr().err

"""Models from Hugging Face directories: bit for bit what the files hold, in one process."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel

from kenotron.hf import ModelMismatchError, ShardTruncatedError, from_hf
from kenotron.models import Decoder, Mamba
from kenotron.parallel.init import deferring, materialize, places_of
from kenotron.parallel.shards import Shards

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from decoder_families import FAMILIES, configuration, on_disk


def saved(path: Path, family: str = "llama", **settings: object) -> AutoModelForCausalLM:
    """Return a small model after saving it as transformers does, in several files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(family, **settings))
    model.save_pretrained(path, max_shard_size="20KB")
    return model.train()


def ids() -> torch.Tensor:
    return torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_has_the_weights_of_the_directory(tmp_path, family):
    theirs = saved(tmp_path, family)
    ours = from_hf(tmp_path)
    assert isinstance(ours, Decoder)
    assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])
    assert (ours(ids()).logits - theirs(ids()).logits).abs().max() <= 1e-5
    assert copy.deepcopy(ours).state_dict().keys() == ours.state_dict().keys()


def test_a_mamba_has_the_weights_of_the_directory(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    assert isinstance(ours, Mamba)
    assert (ours(ids()).logits - theirs(ids(), use_cache=False).logits).abs().max() <= 1e-5
    assert type(from_hf(tmp_path, implementation="transformers")).__name__ == "MambaForCausalLM"


@pytest.mark.parametrize("implementation", ["kenotron", "transformers"])
def test_a_tied_directory_may_hold_the_head_alone(tmp_path, implementation):
    theirs = saved(tmp_path, tie_word_embeddings=True)
    tensors = {
        name if name != "model.embed_tokens.weight" else "lm_head.weight": tensor.contiguous()
        for name, tensor in theirs.state_dict().items()
        if name != "lm_head.weight"
    }
    for file in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert (from_hf(tmp_path, implementation=implementation)(ids()).logits - theirs(ids()).logits).abs().max() <= 1e-5


DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"bos_token_id": 1, "eos_token_id": 2}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        ("deepseek_v3", DEEPSEEK),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": None}),
        ("phi3", {"pad_token_id": 0, "eos_token_id": 2}),
        ("gemma2", {"head_dim": 8}),
    ],
)
def test_a_transformers_model_has_every_bit_of_the_directory(tmp_path, model_type, settings):
    common = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    common["num_key_value_heads"] = 4
    config = AutoConfig.for_model(model_type, **{**common, **settings})
    theirs = AutoModelForCausalLM.from_config(config)
    for buffer in theirs.buffers():  # those that are stored too
        if buffer.is_floating_point() and buffer.ndim == 1 and not buffer.any():
            buffer.normal_()
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path, implementation="transformers")
    assert type(ours) is type(theirs)
    assert ours.training
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids()).logits, theirs.eval()(ids()).logits)


def test_weights_are_converted_to_the_dtype_that_is_asked_for(tmp_path):
    theirs = saved(tmp_path)
    ours = from_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight.bfloat16())
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32


def test_everything_that_does_not_fit_is_named(tmp_path):
    theirs = saved(tmp_path, num_hidden_layers=2)
    theirs.config.intermediate_size = 48
    theirs.config.num_hidden_layers = 1
    theirs.config.attention_bias = True
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ModelMismatchError) as caught:
        from_hf(tmp_path)
    text = str(caught.value)
    assert "model.layers.0.mlp.gate_proj.weight has shape [40, 32], the configuration wants [48, 32]" in text
    assert "model.layers.0.self_attn.q_proj.bias of shape [32] is missing" in text
    assert "model.layers.1.mlp.up_proj.weight is no part of a Decoder" in text
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ModelMismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is no part of a LlamaForCausalLM"):
        from_hf(tmp_path, implementation="transformers")


def test_a_truncated_file_and_an_architecture_without_cover_are_told(tmp_path):
    saved(tmp_path / "a")
    victim = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    with victim.open("rb+") as file:
        file.truncate(victim.stat().st_size - 1000)
    with pytest.raises(ShardTruncatedError, match=victim.name):
        from_hf(tmp_path / "a")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)).save_pretrained(
        tmp_path / "b"
    )
    with pytest.raises(ValueError, match=r"'gpt2' is not covered.*can be trained unmodified"):
        from_hf(tmp_path / "b", implementation="kenotron")
    with pytest.raises(ValueError, match="implementation='hf': set 'auto'"):
        from_hf(tmp_path / "b", implementation="hf")  # type: ignore[arg-type]


def test_a_setting_without_cover_falls_back_to_transformers_own(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kenotron"), "parent", logging.getLogger())  # a strategy gives it another one
    saved(tmp_path, hidden_act="tanh")
    assert type(from_hf(tmp_path)).__name__ == "LlamaForCausalLM"
    assert "takes transformers' own llama: activation='tanh' is not known" in caplog.text
    with pytest.raises(ValueError, match="activation='tanh'"):
        from_hf(tmp_path, implementation="kenotron")


def test_a_head_that_differs_from_what_it_is_tied_to_is_told(tmp_path):
    theirs = saved(tmp_path)
    theirs.config.tie_word_embeddings = True
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ModelMismatchError, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*tie_word_embeddings"):
        from_hf(tmp_path)


def test_what_old_directories_hold_besides_is_left_alone(tmp_path):
    theirs = saved(tmp_path / "a", tie_word_embeddings=True)
    tensors = {name: tensor.contiguous() for name, tensor in on_disk(theirs).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    (tmp_path / "b").mkdir()
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    ours = from_hf(tmp_path / "b")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


@pytest.mark.parametrize(("key", "value", "wanted"), [("vocab_size", 56, "[56, 32]"), ("intermediate_size", 80, "[80, 32]")])
def test_shapes_are_those_of_the_model_also_of_transformers_own(tmp_path, key, value, wanted):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **sizes)).save_pretrained(tmp_path)
    change(tmp_path, **{key: value})
    with pytest.raises(ModelMismatchError) as caught:
        from_hf(tmp_path)
    assert f"has shape [64, 32], the configuration wants {wanted}" in str(caught.value)


def test_experts_that_are_missing_are_told(tmp_path):
    saved(tmp_path, "mixtral")
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, num_local_experts=config["num_local_experts"] + 1)
    with pytest.raises(ModelMismatchError, match=r"tensors\) make up the shape .* the model's model\.layers\.0\.mlp\.experts"):
        from_hf(tmp_path, implementation="transformers")


BERT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_the_class_is_the_one_that_architectures_names(tmp_path):
    theirs = BertForMaskedLM(BertConfig(**BERT))
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    assert type(ours) is BertForMaskedLM
    assert torch.equal(ours.eval()(ids()).logits, theirs.eval()(ids()).logits)
    with pytest.raises(ValueError, match="the directory holds a BertForMaskedLM"):
        from_hf(tmp_path, implementation="kenotron")
    change(tmp_path, architectures=["BertForMaskedLanguage"])
    with pytest.raises(ValueError, match=r"no such model, but .*BertForMaskedLM"):
        from_hf(tmp_path)
    change(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match=r"wants a LlamaConfig.*model_type='bert'"):
        from_hf(tmp_path)


def test_parameters_that_are_not_made_by_factories_are_read(tmp_path):
    """XLNet's are ``torch.FloatTensor(…)``, which no device context reaches."""
    sizes = {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlnet", **sizes))
    theirs.save_pretrained(tmp_path)
    expected, found = theirs.state_dict(), from_hf(tmp_path).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_buffer_that_the_models_initialiser_fills_has_its_values(tmp_path, monkeypatch):
    """As FalconH1 has one: the module itself leaves its memory as it was found."""
    saved(tmp_path)
    build, initialise = LlamaDecoderLayer.__init__, LlamaPreTrainedModel._init_weights

    def build_with_scales(self, *args):
        build(self, *args)
        self.register_buffer("scales", torch.empty(4), persistent=False)

    def fill_scales(self, module):
        initialise(self, module)
        if "scales" in module._buffers:
            module.scales.copy_(torch.arange(4.0))

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", build_with_scales)
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", fill_scales)
    assert from_hf(tmp_path, implementation="transformers").model.layers[0].scales.tolist() == [0, 1, 2, 3]


def test_what_is_done_to_a_model_after_it_was_read_counts(tmp_path):
    """In ``configure_model`` nothing is read yet when user code changes weights."""
    theirs = saved(tmp_path)
    with deferring():
        ours = from_hf(tmp_path, implementation="transformers")
        ours.resize_token_embeddings(100, mean_resizing=False)
        torch.nn.init.zeros_(ours.model.layers[0].mlp.down_proj.weight)
        ours.model.layers[1] = Adapted(ours.model.layers[1])
    materialize(ours, Shards(), {}, places_of(ours), 0, torch.device("cpu"))
    assert torch.equal(ours.model.embed_tokens.weight[:96], theirs.model.embed_tokens.weight)
    assert not ours.model.layers[0].mlp.down_proj.weight.any()
    assert torch.equal(ours.model.layers[1].inner.mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)


class Adapted(torch.nn.Module):
    """Gives the weights of a layer other names."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def change(path: Path, **settings: object) -> None:
    """Change the configuration of a directory, and not its tensors."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))

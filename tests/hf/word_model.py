"""A small language model over words that stand for themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
PROMPTS = ["t5 t6 t7 t8", "t9 t10"]


def make_directory(path: Path, model_type: str, **settings: Any) -> None:
    """Save a small model, and a tokenizer whose words are t0, t1, … and stand for themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = {
        **sizes,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **settings}))
    for param in model.parameters():
        param.data.normal_(std=0.3)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t3", pad_token="t0", eos_token="t2").save_pretrained(path)

"""What the planner's tests share: small configurations, jobs, and a training run whose memory is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kenotron.devices import Device
from kenotron.parallel.init import meta_device
from kenotron.planning.layouts import Job
from kenotron.planning.model import ModelSpec, build_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256}

#: A device on which a few megabytes are scarce.
TINY = Device(
    name="tiny", memory=1e9, memory_bandwidth=1e11, peak_flops={"bf16": 1e12, "fp32": 1e12}, link_bandwidth=1e10, per_node=4
)


def make(values: dict[str, Any], implementation: Any = "auto") -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    return build_model(config, implementation)


def spec(values: dict[str, Any] = LLAMA, implementation: Any = "auto") -> ModelSpec:
    with meta_device(torch.float32):
        return ModelSpec.of(make(values, implementation))


def job(**settings: Any) -> Job:
    return Job(**{"devices": 4, "device": TINY, "seq": 64, "batch": 16, "precision": "32-true", **settings})


def write_config(folder: Path, values: dict[str, Any] = LLAMA) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path

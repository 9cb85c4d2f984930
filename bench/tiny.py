"""Tiny models and data that the benchmarks train."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from kenotron.models import MoE, MoESettings
from kenotron.models.own import own_class

VOCABULARY, LENGTH = 256, 16

#: architecture -> settings of its config beyond the common ones
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None},
    # Its norms come after attention and MLP: with the usual 0.02, at this width, they would blow up rounding noise.
    "olmo2": {"num_key_value_heads": 2, "initializer_range": 0.1, "eos_token_id": None},
    "starcoder2": {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "own_moe": {"model_type": "mixtral", "num_key_value_heads": 2, "own_moe": True},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "attn_implementation": "eager",
    },
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "attn_implementation": "eager"},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "mamba2-one-group": {
        "model_type": "mamba2",
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}


def build(architecture: str, layers: int = 4, **overrides: Any) -> Any:
    """Return a tiny causal LM of one architecture with random weights; with ``own=True`` Kénotron's."""
    settings = {**ARCHITECTURES[architecture], **overrides}
    attention, own_moe = settings.pop("attn_implementation", "sdpa"), settings.pop("own_moe", False)
    own = settings.pop("own", False)
    family = settings.pop("model_type", architecture)
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    if not family.startswith("mamba"):
        sizes |= {"intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family, **sizes, **settings)
    if own:
        return own_class(config)(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if own_moe:  # what is linear in the tokens: the balancing loss is not, and differs between batches by its nature
        moe = MoESettings(
            hidden=64, intermediate=64, num_experts=8, top_k=2, shared_intermediate=32, z_coefficient=0.01, bias_rate=0.004
        )
        for layer in model.model.layers:
            layer.mlp = MoE(moe)
    return model


class TinyLM(L.LightningModule):
    """A plain LightningModule around a transformers model."""

    def __init__(
        self, architecture: str, late: bool = False, lr: float = 1e-3, documents: tuple[int, ...] = (LENGTH,), **settings: Any
    ) -> None:
        super().__init__()
        self._documents = documents  # lengths of those that are packed into a sequence
        self._build = lambda: build(architecture, **settings)
        self._lr = lr
        self.model = None if late else self._build()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._build()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        positions = torch.cat([torch.arange(length, device=batch.device) for length in self._documents])
        positions = positions.expand_as(batch)
        loss: Tensor = self.model(input_ids=batch, labels=batch, position_ids=positions, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self.model is not None
        self.log("val_loss", self.model(input_ids=batch, labels=batch, use_cache=False).loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # With eps = 1e-8 Adam moves by lr where a gradient is nothing but rounding noise, and parity would measure that.
        return torch.optim.AdamW(self.parameters(), lr=self._lr, eps=1e-6)


class Tokens(Dataset[Tensor]):
    """Random token sequences, the same in every process."""

    def __init__(self, count: int, length: int = LENGTH) -> None:
        self._ids = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Tensor:
        return self._ids[index]


def loader_of_rank(steps: int, global_batch: int, dp_rank: int, dp_size: int) -> DataLoader[Tensor]:
    """Return the batches of one data-parallel rank: its slice of each global batch, so that layouts see the same ones."""
    size = global_batch // dp_size
    batches = [list(range(s * global_batch + dp_rank * size, s * global_batch + (dp_rank + 1) * size)) for s in range(steps)]
    return DataLoader(Tokens(steps * global_batch), batch_sampler=batches)

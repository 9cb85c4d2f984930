"""Attention of a decoder, through whichever kernels transformers knows.

Kernels are called by the names that transformers' ``AttentionInterface`` has for them, and masks come from its
``masking_utils``: packed documents, padding, windows and caches are one code path for all. ``choose_attention`` names the
fastest that is here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from kenotron.models.architecture import Architecture
from kenotron.models.layers import FusedLinear, RMSNorm, rotate

ATTENTIONS = ("auto", "flash_attention_3", "flash_attention_2", "flex_attention", "sdpa", "eager")


def check_attention(name: str) -> None:
    """Raise ``ValueError`` for kernels that do not exist."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention={name!r} is unknown. Set attention to one of {', '.join(map(repr, ATTENTIONS))}.")


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the fastest kernels for tensors of ``dtype`` on ``device``.

    flash-attn where it is installed and takes them: version 3 on GPUs of compute capability 9, version 2 from 8.0 on. Otherwise
    torch's, which choose among themselves.
    """
    if device.type == "cuda" and torch.version.hip is None and dtype in (torch.float16, torch.bfloat16):
        capability = torch.cuda.get_device_capability(device)
        if capability[0] == 9 and is_flash_attn_3_available():
            return "flash_attention_3"
        if capability >= (8, 0) and is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


class Attention(nn.Module):
    """Grouped-query attention with queries, keys and values in one matrix.

    ``qkv_proj`` has the rows of all query heads, then of all key heads, then of all value heads.
    """

    def __init__(self, config: Any, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        self.config, self.layer = config, layer
        self.head_dim = a.head_dim
        self.scaling, self.dropout = a.head_dim**-0.5, a.attention_dropout
        self.window, self.is_rotary, self.is_causal = a.windows[layer], a.rotary[layer], True
        self.num_key_value_groups = a.num_heads // a.num_kv_heads  # query heads to a KV head; transformers' kernels read it
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        shared = (False, True, True)
        self.qkv_proj = FusedLinear(a.hidden, (queries, keys, keys), bias=a.qkv_bias, unit=a.head_dim, shared=shared)
        self.o_proj = nn.Linear(queries, a.hidden, bias=a.output_bias)
        self.norms_all = a.qk_norm == "all"
        sizes = (queries, keys) if self.norms_all else (a.head_dim, a.head_dim)
        self.q_norm = RMSNorm(sizes[0], a.eps) if a.qk_norm else None
        self.k_norm = RMSNorm(sizes[1], a.eps) if a.qk_norm else None

    def forward(
        self,
        x_BSH: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return ``[B, S, H]``.

        Args:
            rotation: cosines and sines ``[B or 1, S, D]``. mask: as the kernels want it. kwargs: go to them.
        """
        q_BSND, k_BSKD, v_BSKD = self._project(x_BSH, rotation)
        q_BNSD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BSND, k_BSKD, v_BSKD))
        if past_key_values is not None:
            k_BKSD, v_BKSD = past_key_values.update(k_BKSD, v_BKSD, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        out_BSND, _ = attend(
            self, q_BNSD, k_BKSD, v_BKSD, mask,
            dropout=dropout, scaling=self.scaling, sliding_window=self.window, **kwargs,
        )  # fmt: skip
        return cast(Tensor, self.o_proj(out_BSND.flatten(2)))

    def _project(self, x_BSH: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, normed and rotated."""
        qkv = self.qkv_proj(x_BSH)
        keys = qkv.shape[-1] // (self.num_key_value_groups + 2)  # where tensor parallelism splits heads, those of this rank
        both, v = qkv.split([qkv.shape[-1] - keys, keys], -1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = both.split([self.num_key_value_groups * keys, keys], -1)
            if not self.norms_all:
                q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
            parts = [self.q_norm(q), self.k_norm(k)]
            if self.norms_all:
                parts = [x.unflatten(-1, (-1, self.head_dim)) for x in parts]
            turned = [rotate(x, *rotation) for x in parts] if self.is_rotary else parts
            q_BSND, k_BSKD = turned
        else:
            heads = both.unflatten(-1, (-1, self.head_dim))
            turned_heads = rotate(heads, *rotation) if self.is_rotary else heads
            num_kv = keys // self.head_dim
            q_BSND, k_BSKD = turned_heads.split([self.num_key_value_groups * num_kv, num_kv], 2)
        return q_BSND, k_BSKD, v.unflatten(-1, (-1, self.head_dim))

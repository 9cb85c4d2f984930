"""One decoder for the Llama-like families of transformers: read from their configurations, exact to their logits, faster.

What is different from transformers' own: queries, keys and values are one matrix, and so are gate and up; norms, rotations and
gated activations take one pass and keep less; the loss never holds the full logits; experts are Kénotron's. Everything around
stays transformers': masks, attention kernels, caches and ``generate``.

Shapes: B sequences, S positions, H hidden.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kenotron.models.architecture import Architecture
from kenotron.models.attention import Attention, check_attention, choose_attention
from kenotron.models.autocast import compute_dtype
from kenotron.models.causal import OwnCausalLM
from kenotron.models.experts import Experts
from kenotron.models.layers import MLP, RMSNorm
from kenotron.models.moe import Float32Buffers, MoE, Router
from kenotron.parallel.plan import ParallelPlan

_log = logging.getLogger(__name__)


class DecoderLayer(GradientCheckpointingLayer):
    """Attention, then an MLP or a mixture of experts, each added to what it was given."""

    def __init__(self, config: Any, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        self.norm_output, self.dropout = a.norm_output, a.residual_dropout
        self.attention_norm, self.mlp_norm = _norm(a), _norm(a)
        self.self_attn = Attention(config, a, layer)
        settings = a.experts[layer]
        self.mlp: nn.Module
        if settings is None:
            sizes: dict[str, Any] = {"activation": a.activation, "is_gated": a.is_gated, "bias": a.mlp_bias}
            self.mlp = MLP(a.hidden, a.intermediate, dropout=a.residual_dropout, **sizes)
        else:
            self.mlp = MoE(settings)

    def forward(self, x_BSH: Tensor, rotation: tuple[Tensor, Tensor], mask: Any = None, **kwargs: Any) -> Tensor:
        """Return ``[B, S, H]``; arguments are those of :class:`Attention`."""
        if self.norm_output:
            x_BSH = x_BSH + self.attention_norm(self._attend(x_BSH, rotation, mask, **kwargs))
            return cast(Tensor, x_BSH + self.mlp_norm(self.mlp(x_BSH)))
        x_BSH = x_BSH + self._attend(self.attention_norm(x_BSH), rotation, mask, **kwargs)
        return cast(Tensor, x_BSH + self.mlp(self.mlp_norm(x_BSH)))

    def _attend(self, x_BSH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.dropout(self.self_attn(x_BSH, *args, **kwargs), self.dropout, self.training)


def _norm(architecture: Architecture) -> nn.Module:
    if architecture.norm == "layer":
        return nn.LayerNorm(architecture.hidden, architecture.eps)
    return RMSNorm(architecture.hidden, architecture.eps)


class RotaryEmbedding(Float32Buffers, LlamaRotaryEmbedding):
    """The angles of positions, by any of transformers' rotary scalings; frequencies stay float32 when the model is cast."""


class _Pretrained(PreTrainedModel):
    """What transformers must know of both models below."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, Router)):
            for name, param in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    param.zero_()
                else:
                    param.normal_(0.0, self.config.initializer_range)
        if isinstance(module, Router):
            module.expert_bias.zero_()
        if isinstance(module, MoE):
            module.reset_parameters()


class DecoderModel(_Pretrained):
    """A decoder without its head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.architecture = a = Architecture.of(config)
        self.embed_tokens = nn.Embedding(a.vocabulary, a.hidden, a.padding)
        self.layers = nn.ModuleList([DecoderLayer(self.config, a, layer) for layer in range(a.num_layers)])
        self.norm = _norm(a)
        self.rotary_emb = RotaryEmbedding(cast(Any, self.config))
        self.chooses_attention = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states ``[B, S, H]``; for the arguments see :class:`Decoder`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Decoder needs either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        has_documents = position_ids is not None and past_key_values is None
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        if self.chooses_attention:
            self._choose_attention(inputs_embeds)
        documents = None
        if has_documents and (isinstance(attention_mask, Tensor) or self._is_flash):
            documents = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[:2]))
        if documents is not None and self._is_flash and "cu_seq_lens_q" not in kwargs:
            kwargs |= document_lengths(documents, attention_mask)
        masks = self._masks(inputs_embeds, attention_mask, position_ids, past_key_values, documents)
        x_BSH = F.dropout(inputs_embeds, self.architecture.embedding_dropout, self.training)
        rotation = self.rotary_emb(x_BSH, position_ids=position_ids)
        states: list[Tensor] = []
        for layer, window in zip(self.layers, self.architecture.windows, strict=True):
            if output_hidden_states:
                states.append(x_BSH)
            x_BSH = layer(
                x_BSH, rotation, masks[window], past_key_values=past_key_values, position_ids=position_ids, use_cache=use_cache,
                **kwargs,
            )  # fmt: skip
        x_BSH = self.norm(x_BSH)
        hidden_states = (*states, x_BSH) if output_hidden_states else None
        return BaseModelOutputWithPast(
            last_hidden_state=x_BSH, past_key_values=past_key_values if use_cache else None, hidden_states=hidden_states
        )

    @property
    def _is_flash(self) -> bool:
        return str(self.config._attn_implementation).startswith("flash_attention")

    def _masks(
        self, embeds: Tensor, attention_mask: Any, position_ids: Tensor, past_key_values: Cache | None, documents: Tensor | None
    ) -> dict[int | None, Any]:
        """Return the mask of each window, as the kernels want it."""
        # transformers looks for documents in positions only where there is no mask of padding.
        apart: dict[str, Any] = {}
        if documents is not None and not self._is_flash:
            apart["and_mask_function"] = packed_sequence_mask_function(documents)
        given = attention_mask if isinstance(attention_mask, dict) else {}  # made by `generate` already
        made: dict[int | None, Any] = {}
        for window in set(self.architecture.windows):
            make, kind = create_causal_mask, "full_attention"
            if window is not None:
                make, kind = create_sliding_window_causal_mask, "sliding_attention"
            made[window] = given[kind] if given else make(
                config=self.config, inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=past_key_values,
                position_ids=position_ids, **apart,
            )  # fmt: skip
        return made

    def _choose_attention(self, embeds: Tensor) -> None:
        """Take the kernels for what comes in; once, and not where others were set meanwhile."""
        self.chooses_attention = False
        if self.config._attn_implementation != "sdpa":
            return
        dtype = compute_dtype(embeds)
        self.set_attn_implementation(choose_attention(embeds.device, dtype))
        _log.info("Decoder: attention by %s (%s on %s)", self.config._attn_implementation, dtype, embeds.device)


def document_lengths(documents: Tensor, attention_mask: Any) -> dict[str, Any]:
    """Return how transformers' flash kernels learn of documents: where each begins among all positions of a batch.

    Args:
        documents: ``[B, S]``, a number for each position, ascending.

    Raises:
        ValueError: padding beside documents, which these kernels know only one at a time.
    """
    if attention_mask is not None:
        raise ValueError(
            "attention_mask with position_ids that begin anew: flash-attn takes padding or packed documents, not both. Leave "
            "the mask out (padding at the end can be a document of its own), or set attention='sdpa'."
        )
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
    ends = F.pad(begins, (0, 1), value=documents.numel()).to(torch.int32)
    longest = int(ends.diff().max())  # read on the host once a call: the kernels' grid depends on it
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class Decoder(OwnCausalLM, _Pretrained, GenerationMixin):
    """A causal language model of one of the families that :data:`~kenotron.models.architecture.FAMILIES` names.

    Args:
        config: a transformers configuration (``LlamaConfig``, …). A copy is kept.
        attention: kernels, by transformers' names; ``"auto"``: see :func:`choose_attention`.
        z_loss: coefficient of the mean over tokens of logsumexp(logits)² beside the loss (PaLM, arXiv 2204.02311, section 5).

    Raises:
        ValueError: a family or a setting that is not covered.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any, *, attention: str = "auto", z_loss: float = 0.0) -> None:
        check_attention(attention)
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa" if attention == "auto" else attention
        config._experts_implementation = None  # ours are no choice of transformers'
        super().__init__(config)
        self.model = DecoderModel(self.config)
        self.model.chooses_attention = attention == "auto"
        self._make_head(config, z_loss)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the loss where there are labels, otherwise logits.

        Args:
            input_ids: ``[B, S]``. inputs_embeds: ``[B, S, H]``, in their place.
            attention_mask: ``[B, S]``, 0 for padding.
            position_ids: ``[B or 1, S]``; where they begin anew, a document does, unless there is a cache.
            labels: ``[B, S]``, shifted inside; -100 for none. shift_labels: ``[B, S]``, shifted already.
            use_cache: return keys and values; ``None``: as the configuration says, but not in training, with labels or with
                position ids of the caller's.
            logits_to_keep: of how many last positions (or of which) logits are wanted; 0: of all.
            num_items_in_batch: what the sum of losses is divided by; ``None``: the number of labels.
            return_logits: ``None``: where there are no labels. With them they are what a loss costs most memory for.
        """
        has_labels = labels is not None or shift_labels is not None
        use_cache = self._keeps_states(use_cache, past_key_values, has_labels, position_ids)
        _refuse(kwargs)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        x_BSH = output.last_hidden_state
        loss, logits = self._end(x_BSH, labels, shift_labels, num_items_in_batch, return_logits, logits_to_keep)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )

    def parallel_plan(self) -> ParallelPlan:
        """Return what becomes of each module under tensor and pipeline parallelism."""
        layer = "model.layers.*"
        a = self.model.architecture
        tensor = {
            "model.embed_tokens": "vocab_embedding",
            f"{layer}.self_attn.qkv_proj": "packed_colwise",
            f"{layer}.self_attn.o_proj": "rowwise",
            "lm_head": "vocab_head",
        }
        if a.qk_norm:
            style = "split_norm" if a.qk_norm == "all" else "replicated_with_grad_allreduce"
            tensor |= {f"{layer}.self_attn.q_norm": style, f"{layer}.self_attn.k_norm": style}
        if None in a.experts:
            up = ("gate_up_proj", "packed_colwise") if a.is_gated else ("up_proj", "colwise")
            tensor |= {f"{layer}.mlp.{up[0]}": up[1], f"{layer}.mlp.down_proj": "rowwise"}
        if any(a.experts):
            tensor |= {
                f"{layer}.mlp.experts.gate_up_proj": "packed_colwise",
                f"{layer}.mlp.experts.down_proj": "rowwise",
                f"{layer}.mlp.experts": "moe_tp_experts",
            }
        return ParallelPlan(tensor=tensor, blocks="model.layers")


def _refuse(arguments: dict[str, Any]) -> None:
    """Raise ``ValueError`` for what transformers' models take and this one would leave out in silence."""
    for name in ("output_attentions", "output_router_logits"):
        if arguments.get(name):
            raise ValueError(
                f"{name}={arguments[name]!r}: Decoder does not return these. Leave it out, or use transformers' model."
            )
    if arguments.pop("return_dict", True) is False:
        raise ValueError("return_dict=False: Decoder returns objects with names. Leave it out.")

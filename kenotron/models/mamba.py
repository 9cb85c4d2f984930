"""Mamba and Mamba-2: read from transformers' configurations, exact to their logits, with a scan that trains anywhere.

What is different from transformers' own: the plain scans are made for training (time in the cache, states computed anew for the
backward pass), packed documents start with an empty state, the loss never holds the full logits, and tensor, sequence, pipeline
and context parallelism are known. Parameters have transformers' names and shapes.

Shapes: B sequences, S positions, D hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from kenotron.models import kernels
from kenotron.models.causal import OwnCausalLM
from kenotron.models.experts import check_activation
from kenotron.models.layers import RMSNorm
from kenotron.models.mixer import CausalConv, GatedNorm, Mamba1Mixer, Mamba2Mixer, OutProjection, Place, TimeStep
from kenotron.parallel.plan import ParallelPlan

_log = logging.getLogger(__name__)

#: ``model_type`` -> the mixer
MIXERS: Mapping[str, Callable[[Any, int], nn.Module]] = MappingProxyType({"mamba": Mamba1Mixer, "mamba2": Mamba2Mixer})


class States:
    """What the positions so far left in each layer: the last inputs of the convolution, and the state.

    ``generate`` asks for ``get_seq_length`` and, for beams, ``reorder_cache``.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.by_layer: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions have been seen."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the states of the sequences that go on."""
        for layer, states in self.by_layer.items():
            recent, state = (x.index_select(0, beam_idx.to(x.device)) for x in states)
            self.by_layer[layer] = recent, state


@dataclass
class MambaOutput(ModelOutput):
    """``last_hidden_state [B, S, D]``, the states after it, and the hidden states of all layers where they were asked for."""

    last_hidden_state: Tensor | None = None
    cache_params: States | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MambaCausalLMOutput(ModelOutput):
    """``loss``, 0-dim, where there were labels; ``logits [B, S, V]``; the states, and hidden states as above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: States | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MambaBlock(GradientCheckpointingLayer):
    """A norm and a mixer, added to what the block was given."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.residual_dtype = torch.float32 if config.residual_in_fp32 else None
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[config.model_type](config, layer)

    def forward(self, x_BSD: Tensor, place: Place, kernel: str) -> Tensor:
        """Return ``[B, S, D]``; for the arguments see the mixers."""
        normal = self.norm(x_BSD.to(self.norm.weight.dtype))
        residual = x_BSD if self.residual_dtype is None else x_BSD.to(torch.promote_types(x_BSD.dtype, self.residual_dtype))
        return cast(Tensor, residual + self.mixer(normal, place, kernel))


class _Pretrained(PreTrainedModel):
    """What transformers must know of both models below."""

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaBlock"]
    _is_stateful = True
    _input_embed_layer = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (CausalConv, GatedNorm, Mamba1Mixer, Mamba2Mixer, OutProjection, RMSNorm, TimeStep)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class MambaModel(_Pretrained):
    """The model without its head."""

    def __init__(self, config: Any, scan: str = "auto") -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MambaBlock(self.config, layer) for layer in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.scan = scan
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_params: States | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        kenotron_context: Any = None,
        **kwargs: Any,
    ) -> MambaOutput:
        """Return hidden states ``[B, S, D]``; for the arguments see :class:`Mamba`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Mamba needs either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        if self.scan == "auto":
            self.scan = kernels.choose_scan(inputs_embeds.device)
            _log.info("Mamba: scan by %s on %s", self.scan, inputs_embeds.device)
        if use_cache and cache_params is None:
            cache_params = States()
        if kenotron_context is not None:
            place = kenotron_context.place()
        else:
            starts = None if position_ids is None or cache_params is not None else starts_of(position_ids, inputs_embeds.shape)
            place = Place(attention_mask, starts, states=None if cache_params is None else cache_params.by_layer)
        x_BSD = inputs_embeds
        states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x_BSD)
            x_BSD = layer(x_BSD, place, self.scan)
        x_BSD = self.norm_f(x_BSD.to(self.norm_f.weight.dtype))
        if cache_params is not None:
            cache_params.length += x_BSD.shape[1]
        return MambaOutput(
            last_hidden_state=x_BSD,
            cache_params=cache_params if use_cache else None,
            hidden_states=(*states, x_BSD) if output_hidden_states else None,
        )


def starts_of(position_ids: Tensor, shape: torch.Size) -> Tensor:
    """Return where documents start, ``[B, S]``: where positions do not go on. The first position of all starts none."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=False).expand(shape[:2])


class Mamba(OwnCausalLM, _Pretrained, GenerationMixin):
    """A causal language model of the families Mamba and Mamba-2.

    Args:
        config: transformers' ``MambaConfig`` or ``Mamba2Config``. A copy is kept.
        scan: ``"torch"`` runs anywhere, ``"mamba_ssm"`` is the packages mamba-ssm and causal-conv1d on CUDA; ``"auto"`` takes
            the second where it runs, and says so in the log.
        z_loss: coefficient of the mean over tokens of logsumexp(logits)² beside the loss (PaLM, arXiv 2204.02311, section 5).

    Raises:
        ValueError: a family or a setting that is not covered.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: Any, *, scan: str = "auto", z_loss: float = 0.0) -> None:
        kernels.check_scan(scan)
        check_config(config)
        super().__init__(copy.deepcopy(config))
        self.backbone = MambaModel(self.config, scan)
        self._make_head(config, z_loss)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_params: States | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> MambaCausalLMOutput:
        """Return the loss where there are labels, otherwise logits.

        Args:
            input_ids: ``[B, S]``. inputs_embeds: ``[B, S, D]``, in their place.
            attention_mask: ``[B, S]``, 0 for padding, which leaves the state as it is where it stands before the text.
            position_ids: ``[B or 1, S]``; where they do not go on, a document starts. They mean nothing else.
            cache_params: the states after the positions before. use_cache: return them; ``None``: as the configuration says,
                but not in training, with labels or with position ids of the caller's.
            labels: ``[B, S]``, shifted inside; -100 for none. shift_labels: ``[B, S]``, shifted already.
            logits_to_keep: of how many last positions (or of which) logits are wanted; 0: of all.
            num_items_in_batch: what the sum of losses is divided by; ``None``: the number of labels.
            return_logits: ``None``: where there are no labels. With them they are what a loss costs most memory for.
        """
        has_labels = labels is not None or shift_labels is not None
        use_cache = self._keeps_states(use_cache, cache_params, has_labels, position_ids)
        if kwargs.pop("return_dict", True) is False:
            raise ValueError("return_dict=False: Mamba returns objects with names. Leave it out.")
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache_params=cache_params,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        x_BSD = output.last_hidden_state.to(self.lm_head.weight.dtype)
        loss, logits = self._end(x_BSD, labels, shift_labels, num_items_in_batch, return_logits, logits_to_keep)
        return MambaCausalLMOutput(
            loss=loss, logits=logits, cache_params=output.cache_params, hidden_states=output.hidden_states
        )

    # ---------------------------------------------------------------------------------------------------- generation

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # then `generate` leaves it to the model to make one

    def prepare_inputs_for_generation(  # type: ignore[override]  # what `generate` hands over differs between versions
        self,
        input_ids: Tensor,
        cache_params: States | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return what the next call is given: all positions at first, then those that the states do not know."""
        if cache_params is not None:
            input_ids, attention_mask = input_ids[:, cache_params.length :], None
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "cache_params": cache_params,
            "use_cache": bool(use_cache),
            "logits_to_keep": kwargs.get("logits_to_keep") or 0,
        }

    def parallel_plan(self) -> ParallelPlan:
        """Return what becomes of each module under tensor and pipeline parallelism."""
        mixer = "backbone.layers.*.mixer"
        tensor = {
            "backbone.embeddings": "vocab_embedding",
            f"{mixer}.in_proj": "packed_colwise",
            f"{mixer}.conv1d": "split_rows",
            f"{mixer}.A_log": "split_rows",
            f"{mixer}.D": "split_rows",
            f"{mixer}.out_proj": "rowwise",
            "lm_head": "vocab_head",
        }
        if self.config.model_type == "mamba":
            tensor |= {f"{mixer}.x_proj": "rowwise_to_split", f"{mixer}.dt_proj": "split_rows"}
        else:
            tensor |= {f"{mixer}.dt_bias": "split_rows", f"{mixer}.norm": "split_norm"}
        return ParallelPlan(tensor=tensor, blocks="backbone.layers")


def check_config(config: Any) -> None:
    """Raise ``ValueError`` for a configuration that :class:`Mamba` does not cover."""
    if config.model_type not in MIXERS:
        raise ValueError(
            f"model_type={config.model_type!r} is not covered by Mamba, which knows {', '.join(MIXERS)}. The transformers "
            "model itself can be trained unmodified: AutoModelForCausalLM.from_config(config)."
        )
    check_activation(config.hidden_act)
    if config.model_type == "mamba2" and config.num_heads % config.n_groups:
        raise ValueError(
            f"num_heads={config.num_heads} with n_groups={config.n_groups}: set the second to a divisor of the first."
        )


def mamba_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter; a tied head is none of its own.

    Raises:
        ValueError: a family or a setting that is not covered.
    """
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in Mamba(config).named_parameters()}

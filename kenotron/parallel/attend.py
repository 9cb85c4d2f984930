"""Attention over cp ranks as an implementation of transformers' interface, and what reaches it with a call of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kenotron.models.mixer import Place
from kenotron.parallel.certify import Tape, UnfitError, check_mask
from kenotron.parallel.ring import ring_attention, ulysses_attention
from kenotron.parallel.states import Stretches

if TYPE_CHECKING:
    from kenotron.parallel.context import ContextParallel

IMPLEMENTATION = "kenotron_context"  # as transformers knows it; also the argument by which it finds the ranks


@dataclass(frozen=True)
class Sequences:
    """What attention must know of the sequences that a call of a model is about.

    Args:
        axis: the ranks that share them. documents: as ``ring_attention`` takes them; ``None``: one, without padding.
        given: the names of what the model was called with, of which attention may hear as well.
    """

    axis: ContextParallel
    documents: Tensor | None
    given: frozenset[str] = frozenset()

    def place(self) -> Place:
        """Return what a mixer of Mamba must know of this rank's stretch."""
        axis, documents = self.axis, self.documents
        if documents is None:
            return Place(neighbours=Stretches(group=axis.group, rank=axis.rank, documents=None))
        length = documents.shape[1] // axis.size
        here = slice(axis.rank * length, (axis.rank + 1) * length)
        numbers = torch.where(documents < 0, -2 - documents, documents)  # padding belongs to what it stands beside
        starts = F.pad(numbers.diff(dim=1) != 0, (1, 0), value=False)
        neighbours = Stretches(group=axis.group, rank=axis.rank, documents=numbers)
        return Place(documents[:, here] >= 0, starts[:, here], neighbours)


#: What models hand to attention beside what it computes with.
_ALWAYS = frozenset({"position_ids", "position_embeddings", "cache_position", "num_items_in_batch"})


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kenotron_context: Sequences | Tape | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention of this rank's queries to all ranks' keys, as an implementation of transformers' interface.

    Args:
        query: [batch, heads, local length, head size]. key, value: with as many heads, or a divisor.
        s_aux: [heads], sinks. kenotron_context: where the sequences lie.

    Returns:
        [batch, local length, heads, head size of the values], and no weights.
    """
    if kenotron_context is None:
        raise ValueError(
            f"cp > 1: {type(module).__name__} was called from outside of its model, or the model does not hand its arguments "
            "down. Call the model, or set cp=1."
        )
    if dropout:
        raise ValueError(f"cp > 1 with attention dropout of {dropout} is not available. Set attention_dropout=0 in the config.")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    of_caller = _ALWAYS if isinstance(kenotron_context, Tape) else _ALWAYS | kenotron_context.given
    further = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name not in of_caller}
    if attention_mask is not None or further:
        what = "a mask of its own" if attention_mask is not None else ", ".join(further)
        kind = UnfitError if isinstance(kenotron_context, Tape) else ValueError
        raise kind(
            f"cp > 1: {type(module).__name__} hands {what} to attention, which knows causality, windows, padding and documents "
            "alone. Set cp=1."
        )
    if isinstance(kenotron_context, Tape):
        return kenotron_context.note(module, query, key, value, is_causal, sliding_window), None
    axis = kenotron_context.axis
    function = ring_attention if axis.kind == "ring" else ulysses_attention
    out = function(
        query,
        key,
        value,
        group=axis.group,
        documents=kenotron_context.documents,
        causal=is_causal,
        window=sliding_window,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> None:
    """Masks are made of positions and documents where they are needed; here it is seen whether these are enough."""
    check_mask(mask_function)

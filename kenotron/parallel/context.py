"""Context parallelism of a transformers model that knows nothing of it: each cp rank works on its part of every sequence.

All cp ranks of a data-parallel rank load the same batch. What the model is called with is cut along the sequence at the call of
the outermost transformers model, and what comes out is right for any code around it:

1. in: ``input_ids`` (or embeddings), position ids and whatever else runs along the sequence are padded to a length that can be
   cut, and cut: in a zig-zag under ``ring``, so that causal work is even, contiguously under ``ulysses``. Masks of padding and
   packed documents become *documents*, a number for each token of the whole sequence, which go along to the attention.
2. inside: norms, MLPs, experts and the head work on their tokens. Attention runs over all ranks (``ring.py``), put in place
   through transformers' attention interface. Kénotron's Mamba, always cut contiguously, passes on states (``states.py``).
3. out, with ``labels``: they were shifted before they were cut, the loss is the mean over the tokens of all ranks, and the
   logits stay cut. Without labels: logits or hidden states are put together, and the caller computes what it wants from them.

So a ``training_step`` sees one loss on all cp ranks, as if it had run the whole sequence, and gradients are averaged over
``dp × cp``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kenotron.layout import divisors
from kenotron.parallel import stages
from kenotron.parallel.attend import IMPLEMENTATION, Sequences, attend, no_mask
from kenotron.parallel.certify import UnfitError, Verdict, try_parts
from kenotron.parallel.collectives import gather_from, mean_from
from kenotron.parallel.entry import BlockEntry, Call
from kenotron.parallel.logits import VocabParallelLogits
from kenotron.parallel.plan import pipeline_hints, transformers_models
from kenotron.parallel.random import OwnStream
from kenotron.parallel.ring import contiguous_indices, zigzag_indices

ContextKind = Literal["ring", "ulysses"]
KINDS = ("ring", "ulysses")


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` for a kind of context parallelism that does not exist."""
    if kind not in KINDS:
        raise ValueError(f"context={kind!r} is unknown. Set context to one of {', '.join(map(repr, KINDS))}.")


_VERDICT, _ENTRY = "_kenotron_parts", "_kenotron_entry"  # attributes of a model: what was found of it, how it is entered
_IGNORED = -100  # the label of tokens without one
_ATTENTION_KINDS = {"full_attention", "sliding_attention"}
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """One rank's view of the cp axis.

    Args:
        group: the ranks that share sequences. rank, size: of this process in it.
        kind: ``"ring"`` passes keys and values around; ``"ulysses"`` exchanges parts of the sequence for heads.
        tp: ranks over which heads are split already. pp: stages, of which each has some of the blocks.
        random: what the model draws from in training; ``None``: what is drawn from around it.
    """

    group: ProcessGroup
    rank: int
    size: int
    kind: ContextKind
    tp: int = 1
    pp: int = 1
    random: OwnStream | None = None

    def apply(self, root: nn.Module) -> None:
        """Let every transformers model in ``root`` work on parts of sequences.

        Raises:
            ValueError: an attention that can't be replaced, or heads that can't be split.
        """
        models = transformers_models(root)
        if not models:
            raise ValueError(
                f"cp={self.size}, but {type(root).__name__} holds no transformers model, whose attention could be replaced"
                f"{_named(root, 'attention')}. Set cp=1."
            )
        look(root, self.size, self.kind)  # where nobody has done so before
        for _, model in models:
            has_attention = _VERDICT in model.__dict__
            if has_attention:
                self._check_heads(model.config.get_text_config(decoder=True))
                model.set_attn_implementation(IMPLEMENTATION)
                model.__dict__[_ENTRY] = self._entry(model)
            kind = type(model)
            model.__class__ = type(kind.__name__, (_CutModel, kind), {"__module__": kind.__module__})
            model.__dict__["_context"] = self if has_attention else replace(self, kind="ulysses")

    def _entry(self, model: Any) -> BlockEntry | None:
        """Return how a model is entered that needs whole sequences before its first block, if it can be."""
        if model.__dict__[_VERDICT].kind != "entered" or self.pp > 1:
            return None
        return BlockEntry(model.get_submodule(_blocks_of(model)).children())

    @property
    def multiple(self) -> int:
        """What a sequence's length must be a multiple of."""
        return 2 * self.size if self.kind == "ring" else self.size

    def indices(self, length: int, rank: int, device: torch.device) -> Tensor:
        """Return where in a sequence of ``length`` the tokens of a rank are, in order."""
        of = zigzag_indices if self.kind == "ring" else contiguous_indices
        return of(length, self.size, rank).to(device)

    def cut(self, x: Tensor, length: int, fill: float = 0, dim: int = 1) -> Tensor:
        """Return this rank's part of ``x`` along ``dim``, which is first padded to ``length`` with ``fill``."""
        missing = length - x.shape[dim]
        if missing:
            x = torch.cat([x, x.new_full((*x.shape[:dim], missing, *x.shape[dim + 1 :]), fill)], dim)
        return x.index_select(dim, self.indices(length, self.rank, x.device))

    def join(self, x: Tensor, length: int) -> Tensor:
        """Return the whole of what the ranks have along dimension 1, ``length`` long; gradients are summed over the ranks."""
        if isinstance(x, VocabParallelLogits):
            return VocabParallelLogits.from_local(self.join(x.to_local(), length), x._group)
        whole = gather_from(x, 1, self.group, grad="reduce_scatter")
        places = torch.cat([self.indices(whole.shape[1], rank, x.device) for rank in range(self.size)])
        return whole.index_select(1, places.argsort()[:length])

    def _check_heads(self, config: Any) -> None:
        heads = config.num_attention_heads
        if self.kind == "ulysses" and heads % (self.tp * self.size):
            raise ValueError(
                f"context='ulysses' splits {heads} attention heads over tp × cp = {self.tp} × {self.size} ranks, which does "
                f"not go. Set cp to one of {divisors(heads // self.tp)}, or context='ring'."
            )


def look(root: nn.Module, cp: int, kind: ContextKind) -> None:
    """Look at the whole models in ``root``, before anything is cut: can they work on parts, and what do they need of the whole?

    Raises:
        ValueError: an attention that can't be replaced, or that does what attention on parts can't do.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from kenotron.models.mamba import Mamba

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
    length = 4 * cp
    of = zigzag_indices if kind == "ring" else contiguous_indices
    parts = [of(length, cp, rank) for rank in range(cp)]
    for _, model in transformers_models(root):
        if _VERDICT in model.__dict__ or isinstance(model, Mamba):
            continue
        _check(model, cp)
        try:
            found = try_parts(model, IMPLEMENTATION, parts, blocks=_blocks_of(model))
        except UnfitError as problem:
            raise ValueError(str(problem)) from None
        model.__dict__[_VERDICT] = found


def _blocks_of(model: Any) -> str | None:
    """Return the name of a model's list of blocks, if there is one such list."""
    try:
        return stages.find_blocks(model, None, pipeline_hints(model))
    except ValueError:
        return None


def _check(model: Any, cp: int) -> None:
    kind, config = type(model).__name__, model.config.get_text_config(decoder=True)
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS)
    if strange:
        mixers = _named(model, *(word.removesuffix("_attention") for word in strange), "mamba", "conv", "delta")
        raise ValueError(f"cp={cp}: {kind} has layers of kind {', '.join(strange)}{mixers}. Set cp=1.")
    parameters = inspect.signature(model.forward).parameters
    takes_all = "position_ids" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not (model._supports_attention_backend and model._can_set_attn_implementation() and takes_all):
        raise ValueError(
            f"cp={cp}: the attention of {kind} does not go through transformers' AttentionInterface with position "
            f"ids{_named(model, 'attention')}. Set cp=1."
        )
    ropes = getattr(config, "rope_parameters", None) or {}
    every = [ropes, *(rope for rope in ropes.values() if isinstance(rope, Mapping))]  # or one for each kind of layer
    by_length = [rope["rope_type"] for rope in every if rope.get("rope_type") in _ROPE_BY_LENGTH]
    if by_length:
        raise ValueError(
            f"cp={cp}: {kind} has rope_type={by_length[0]!r}, which depends on the longest position that a "
            "rank sees. Set rope_type to 'default', 'linear', 'yarn' or 'llama3', or cp=1."
        )
    is_language_model = kind.endswith(("ForCausalLM", "ForMaskedLM", "LMHeadModel")) or _takes_shifted_labels(model.forward)
    if not (model.base_model is model or is_language_model):
        raise ValueError(f"cp={cp}: {kind} is no language model, and can't be run on parts of sequences. Set cp=1.")


def _named(root: nn.Module, *words: str) -> str:
    """Return the names of modules whose class is called like one of ``words``, as part of a sentence."""
    found = [n for n, m in root.named_modules() if n and any(word in type(m).__name__.lower() for word in words)]
    return f" ({', '.join(found[:6])}{', …' if len(found) > 6 else ''})" if found else ""


# ---- In and out -----------------------------------------------------------------------------------------------------


class _CutModel:
    """Mixed into the class of a transformers model."""

    _context: ContextParallel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        axis, model = self._context, self
        given = _arguments(super().forward, args, kwargs)  # type: ignore[misc]
        like = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(like, Tensor):
            raise ValueError("cp > 1: the model was called without input_ids and inputs_embeds, so there is nothing to cut.")
        _refuse(given)
        length = like.shape[1]
        padded = -(-length // axis.multiple) * axis.multiple
        labels, shifted, count = (given.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
        entry = self._whole_entry(given)
        inside = _cut_inputs(axis, given, like.shape[:2], padded, is_whole=entry is not None)
        loss = None
        if labels is not None or shifted is not None:
            loss = _Loss(axis, model, labels, shifted, count, padded)
            takes_shifted = _takes_shifted_labels(super().forward)  # type: ignore[misc]
            inside |= loss.hand_over() if takes_shifted else loss.stand_in()
        stream = axis.random if model.training else None  # type: ignore[attr-defined]
        if entry is not None:
            cut = functools.partial(axis.cut, length=padded)
            entry.open(Call(batch=like.shape[0], length=length, own=padded // axis.size, cut=cut))
        try:
            with contextlib.nullcontext() if stream is None else stream.entered():
                output = super().forward(**inside)  # type: ignore[misc]
        finally:
            if loss is not None:
                loss.restore()
            if entry is not None:
                entry.close()
        return _whole_output(axis, output, like.shape[0], length, padded // axis.size, loss)

    def _whole_entry(self, given: Mapping[str, Any]) -> BlockEntry | None:
        """Return how the model is entered with whole sequences, if it makes positions of its own out of them."""
        verdict: Verdict | None = self.__dict__.get(_VERDICT)
        if verdict is None or verdict.kind == "alike" or given.get("position_ids") is not None:
            return None
        entry: BlockEntry | None = self.__dict__[_ENTRY]
        if entry is None:
            why = f"could not be tried ({verdict.problem})" if verdict.problem else "are not those that count from 0"
            raise ValueError(
                f"cp > 1: the positions that {type(self).__name__} makes of whole sequences {why}, and its parts can't be told "
                f"them{' with pp > 1' if self._context.pp > 1 else ''}. Call it with position_ids [batch, length], or set cp=1."
            )
        return entry


def _arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments by name."""
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs).arguments
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    further = bound.pop(rest[0], {}) if rest else {}
    return {**bound, **further}


def _refuse(given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for arguments that only make sense with whole sequences."""
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"cp > 1: attention_mask is {what}. Pass one of shape [batch, length] with 0 for padding; for packed documents, "
            "position_ids that begin anew with each."
        )
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim != 2:
        raise ValueError(f"cp > 1: position_ids has shape {tuple(positions.shape)}; pass [batch, length].")
    for name in ("past_key_values", "use_cache", "output_attentions", "logits_to_keep"):
        value = given.get(name)
        if value is not None and not isinstance(value, Tensor) and value:
            raise ValueError(f"cp > 1: {name}={value!r} needs whole sequences. Leave it out, or set cp=1.")


def _cut_inputs(
    axis: ContextParallel, given: Mapping[str, Any], size: torch.Size, padded: int, *, is_whole: bool
) -> dict[str, Any]:
    """Return what the model is called with: this rank's part of everything that runs along the sequence.

    Args:
        is_whole: all of it, which is cut where the first block is entered.
    """
    documents = _documents(given, size, padded)
    if is_whole:
        inside = {name: value for name, value in given.items() if name not in _PACKING}
        return inside | {"use_cache": False, IMPLEMENTATION: Sequences(axis, documents, frozenset(inside))}
    inside = {name: value for name, value in given.items() if name not in ("attention_mask", *_PACKING)}
    positions = inside.pop("position_ids", None)
    device = next(value.device for value in given.values() if isinstance(value, Tensor))
    if positions is None:
        positions = torch.arange(padded, device=device)[None]
    for name, value in inside.items():
        if isinstance(value, Tensor) and value.shape[:2] == size:
            inside[name] = axis.cut(value, padded)
    inside["position_ids"] = axis.cut(positions, padded)
    inside["use_cache"] = False
    inside[IMPLEMENTATION] = Sequences(axis, documents, frozenset(inside))
    return inside


#: How transformers' collators tell where packed documents begin, besides position ids.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def _documents(given: Mapping[str, Any], size: torch.Size, padded: int) -> Tensor | None:
    """Return the document of each token [batch, padded], -2 - d for padding in d; ``None``: there is one and no padding."""
    batch, length = size
    mask, positions, starts = given.get("attention_mask"), given.get("position_ids"), given.get("cu_seq_lens_q")
    documents: Tensor | None = None
    if isinstance(starts, Tensor):
        places = torch.arange(length, device=starts.device)
        documents = torch.searchsorted(starts[1:].contiguous(), places, right=True).expand(batch, length)
    elif isinstance(positions, Tensor) and mask is None:  # as transformers does: a jump begins a document
        steps = F.pad(positions.diff(dim=1) != 1, (1, 0))
        # One read on the host for each call: without it every batch would pay for masks.
        documents = steps.cumsum(1).expand(batch, length) if bool(steps.any()) else None
    if isinstance(mask, Tensor) and not bool(mask.all()):
        documents = torch.zeros_like(mask, dtype=torch.long) if documents is None else documents
        # Padding is seen by nobody, but sees what is before it: its outputs are as without cp, should anybody want them.
        documents = torch.where(mask == 0, -2 - documents, documents)
    if padded == length:
        return documents
    if documents is None:
        device = next(value.device for value in given.values() if isinstance(value, Tensor))
        documents = torch.zeros(size, dtype=torch.long, device=device)
    return F.pad(documents, (0, padded - length), value=-1)


def _takes_shifted_labels(forward: Callable[..., Any]) -> bool:
    """Return whether a model computes its loss by itself, from what it is told."""
    return {"shift_labels", "num_items_in_batch"} <= inspect.signature(forward).parameters.keys()


class _Loss:
    """The loss of a model on all ranks' tokens.

    A rank's loss is the sum over its tokens over the mean number of tokens on a rank: the mean of these over the ranks is that
    over all tokens. A model that takes shifted labels and their number is given them. For others this stands in for their
    ``loss_function`` during one call.
    """

    def __init__(
        self, axis: ContextParallel, model: Any, labels: Tensor | None, shifted: Tensor | None, count: Any, padded: int
    ) -> None:
        self._model, self._function = model, model.loss_function
        self._is_own = "_loss_function" in model.__dict__
        self._shifts = model.loss_type != "ForMaskedLM"
        if shifted is None:
            assert labels is not None
            shifted = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:] if self._shifts else labels
        count = (shifted != _IGNORED).sum() if count is None else torch.as_tensor(count)
        self._labels = axis.cut(shifted, padded, _IGNORED)
        self._count = count / axis.size
        self.was_called = False

    def hand_over(self) -> dict[str, Any]:
        """Return the arguments by which a model learns of the labels."""
        self.was_called = True
        return {"shift_labels": self._labels, "num_items_in_batch": self._count}

    def stand_in(self) -> dict[str, Any]:
        """Take the place of the model's loss function. Returns the arguments that make the model call it."""
        self._model._loss_function = self
        return {"labels": self._labels}

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.was_called = True
        kwargs = {name: value for name, value in kwargs.items() if name != IMPLEMENTATION}
        kwargs |= {"num_items_in_batch": self._count} | ({"shift_labels": self._labels} if self._shifts else {})
        loss: Tensor = self._function(logits, self._labels, *args, **kwargs)
        return loss

    def restore(self) -> None:
        if self._is_own:
            self._model._loss_function = self._function
        else:
            self._model.__dict__.pop("_loss_function", None)


def _whole_output(axis: ContextParallel, output: Any, batch: int, length: int, own: int, loss: _Loss | None) -> Any:
    """Return the output as the caller expects it of the whole sequence, of which this rank has ``own`` tokens."""
    if loss is not None and not loss.was_called:
        raise ValueError(
            "cp > 1: the model was given labels but did not use its loss_function. Compute the loss from its logits."
        )

    def whole(value: Any) -> Any:
        if isinstance(value, Tensor):
            return axis.join(value, length) if value.shape[:2] == (batch, own) else value
        return tuple(whole(part) for part in value) if isinstance(value, tuple) else value

    if not isinstance(output, MutableMapping):
        parts = list(output) if isinstance(output, tuple) else [output]
        if loss is not None:
            parts[0] = mean_from(parts[0], axis.group)
        return tuple(whole(part) for part in parts) if isinstance(output, tuple) else whole(output)
    keeps_cut = loss is not None and torch.is_grad_enabled()
    for name, value in list(output.items()):
        if name == "loss" and value is not None:
            output["loss"] = mean_from(value, axis.group)
        elif name == "logits" and keeps_cut:
            output["logits"] = CutLogits()
        else:
            output[name] = whole(value)
    return output


class CutLogits:
    """Stands for logits that lie in parts on the cp ranks, in training with labels, where putting them together costs most."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "cp > 1: a model that was given labels in training leaves its logits in parts on the ranks. Call it without labels "
            "to get them whole and compute the loss from them, or compute metrics in validation."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and pytrees ask of any object
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __len__ = __iter__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls()._refuse()

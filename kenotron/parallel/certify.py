"""Does a part of a sequence get from a model what it gets within the whole? Tried before the model is cut, on a stand-in.

Context parallelism calls a model with parts of sequences and tells it their positions. That is right where attention alone
looks beyond a token, and where positions count from 0. Models differ: some count positions from the padding in ``input_ids`` or
in ``attention_mask``, some mask by rules of their own, some mix neighbours by a convolution. Names tell nothing of it, so it is
tried:

1. The stand-in is a copy of the model whose parameters lie in a few numbers each (overlapping windows of one vector), on the
   CPU.
2. In place of attention, a function that hands each token its own value and notes queries, keys and values. Two blocks and the
   beginning of the third are run: costs are those of a few hundred products of vectors.
3. A short batch with padding tokens, with and without a mask, is run whole and in each rank's part. What was noted must agree.

It costs no communication, and all ranks find the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kenotron.parallel.entry import BlockEntry, Call
from kenotron.parallel.expert import call_of, find_experts
from kenotron.parallel.expert_load import ExpertsCall

_CALLS = 3  # of attention, until it is enough
_BATCH = 2
_TOLERANCE = 1e-3
_SMALL = 1 << 16  # elements of a parameter that may as well be there


class UnfitError(ValueError):
    """What a model does to attention, attention on parts of sequences can't do."""


class _Enough(Exception):
    """As many calls of attention as were asked for."""


@dataclass
class Tape:
    """What a stand-in notes. It goes the way of what attention is told of sequences.

    Args:
        masks: of each mask that the model made, whether it is causal and its window.
    """

    notes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    masks: set[tuple[bool, int | None]] = field(default_factory=set)

    def note(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window: int | None) -> Tensor:
        """Stand for attention: return each token's own value, ``[batch, length, heads, size]``.

        Raises:
            UnfitError: the model's masks are other ones than this attention goes by.
        """
        if self.masks and (is_causal, window) not in self.masks:
            kinds = ", ".join(f"causal={causal}, window={size}" for causal, size in sorted(self.masks, key=str))
            raise UnfitError(
                f"cp > 1: {type(module).__name__} has causal={is_causal}, window={window}, but its model makes masks of "
                f"{kinds}. Set cp=1."
            )
        self.notes.append((q, k, v))
        if len(self.notes) == _CALLS:
            raise _Enough
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()


_tape: ContextVar[Tape | None] = ContextVar("_tape", default=None)


# ---- Masks -------------------------------------------------------------------------------------------------------------

#: Of transformers' rules, those that attention goes by itself, or that are known from documents.
_RULES = {
    "causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay", "sliding_window_bidirectional_overlay",
    "padding_mask_function", "packed_sequence_mask_function", "remap_positions_for_packed_sequence", "and_masks",
    "add_offsets_to_mask_function",
}  # fmt: skip


def check_mask(rule: Callable[..., Any]) -> None:
    """Look at a mask that a model asks for.

    Raises:
        ValueError: it masks by another rule than causality, a window, padding and documents.
    """
    names, windows = set(), []
    waiting = [rule]
    while waiting:
        function = waiting.pop()
        name = function.__qualname__.partition(".")[0]
        if name not in _RULES or not function.__module__.startswith("transformers."):
            kind = ValueError if _tape.get() is None else UnfitError
            raise kind(
                f"cp > 1: the model masks by a rule of its own ({function.__module__}.{function.__qualname__}), beside "
                "causality, a window, padding and packed documents. Set cp=1."
            )
        names.add(name)
        for cell in function.__closure__ or ():
            held = cell.cell_contents
            waiting += [part for part in (held if isinstance(held, tuple) else (held,)) if callable(part)]
            if name.startswith("sliding_window") and isinstance(held, int):
                windows.append(held)
    tape = _tape.get()
    if tape is not None:
        tape.masks.add(("causal_mask_function" in names, windows[0] if windows else None))


# ---- The stand-in ------------------------------------------------------------------------------------------------------


def _numbers(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor of the shape of ``like`` in little memory, whose rows differ."""
    size = max(1, sum(like.shape))
    if like.is_floating_point() and like.numel() <= _SMALL:
        return torch.rand(like.shape, generator=generator) - 0.5
    if not like.is_floating_point():
        line = torch.zeros(size, dtype=like.dtype)
        return line.as_strided(like.shape, (0,) * like.ndim)
    line = torch.rand(size, generator=generator) - 0.5
    return line.as_strided(like.shape, (1,) * like.ndim)


def _counted(like: Tensor) -> Tensor:
    """Return what positions in a buffer are, where they are not known yet: 0, 1, …"""
    last = torch.arange(like.shape[-1] if like.ndim else 1).to(like.dtype)
    return last.expand(like.shape) if like.ndim else last[0]


def _stand_in(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(_numbers(param, generator), requires_grad=False)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            memo[id(buffer)] = _counted(buffer) if "position" in name else _numbers(buffer, generator)
    found = copy.deepcopy(model, memo).cpu().eval()
    for module in found.modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            product: Any = _thin_product(module.in_features, module.out_features, generator)
            module.forward = product  # type: ignore[method-assign]
    for module in find_experts(found).values():
        module.forward = functools.partial(_thin_experts, call_of(module))
    return found


def _thin_experts(call: ExpertsCall, *args: Any, **kwargs: Any) -> Tensor:
    """Stand for experts, whose matrices are the most of many a model: by what each token's weights are."""
    hidden, _, weights = call.bind(args, kwargs)
    return hidden.tanh() * weights.reshape(*hidden.shape[:-1], -1).square().sum(-1, keepdim=True)


def _thin_product(width: int, out: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return what stands for a linear layer: a product of rank two, that makes no matrix."""
    into, back = torch.rand(width, 2, generator=generator) - 0.5, torch.rand(2, out, generator=generator) - 0.5
    return lambda input: input.float() @ into @ back


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        yield


def _run(stand_in: Any, implementation: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return what one run notes: tensors ``[batch, heads, length, size]``."""
    tape = Tape()
    token = _tape.set(tape)
    try:
        output = stand_in(**inputs, use_cache=False, **{implementation: tape})
    except _Enough:
        output = None
    finally:
        _tape.reset(token)
    notes = [part for call in tape.notes for part in call]
    if output is not None:  # a model of fewer blocks
        first = output[0]
        notes.append(first.unsqueeze(1) if isinstance(first, Tensor) and first.ndim == 3 else torch.zeros(()))
    return notes


def batches(model: Any, length: int) -> list[dict[str, Tensor]]:
    """Return batches in which everything is that positions could be counted from."""
    words = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words.num_embeddings, (_BATCH, length), generator=generator)
    pad = words.padding_idx if words.padding_idx is not None else getattr(model.config, "pad_token_id", None)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, -2:] = 0, 0
    if isinstance(pad, int) and 0 <= pad < words.num_embeddings:
        ids[mask == 0] = pad
        ids[0, length // 2] = pad
    return [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]


@dataclass(frozen=True)
class Verdict:
    """What was found of a model.

    Args:
        kind: ``"alike"``: parts get what they get within the whole. ``"entered"``: they do where the whole is cut at the first
            block. ``"told"``: they do where positions are given.
        problem: why it could not be tried without given positions, if so.
    """

    kind: Literal["alike", "entered", "told"]
    problem: str = ""


def try_parts(model: Any, implementation: str, parts: Sequence[Tensor], *, blocks: str | None) -> Verdict:
    """Find out whether parts of a sequence, with positions that count from 0, get from a model what the whole gets.

    Args:
        model: whole, on any device; it is not changed.
        implementation: of attention, which notes on a ``Tape`` that it gets as an argument of that name.
        parts: where the tokens of each rank are. blocks: the name of the list of blocks, if it is known.

    Raises:
        UnfitError: what the model does to attention, attention on parts can't do, or it mixes tokens outside of attention.
    """
    try:
        with _quiet():
            stand_in = _stand_in(model)
            stand_in.set_attn_implementation(implementation)
            trial = _Trial(stand_in, implementation, parts)
            if trial.agrees(positions=False):
                return Verdict("alike")
    except UnfitError:
        raise
    except Exception as error:  # of any code of the model
        return Verdict("told", f"{type(error).__name__}: {error}")
    with _quiet():
        try:
            is_enough = trial.agrees(positions=True)
        except UnfitError:
            raise
        except Exception as error:  # it takes no positions of this shape
            return Verdict("told", f"{type(error).__name__}: {error}")
        if not is_enough:
            raise UnfitError(
                f"cp > 1: {type(model).__name__} computes with neighbouring tokens, or with the length of sequences, outside "
                "of attention. Set cp=1."
            )
        return Verdict("entered") if blocks is not None and trial.is_entered(blocks) else Verdict("told")


@dataclass(frozen=True)
class _Trial:
    """A stand-in, run on whole batches and on their parts."""

    stand_in: Any
    implementation: str
    parts: Sequence[Tensor]

    @property
    def length(self) -> int:
        return sum(len(part) for part in self.parts)

    def run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        return _run(self.stand_in, self.implementation, inputs)

    def agrees(self, *, positions: bool) -> bool:
        """Compare parts that are given positions with the whole; ``positions``: it is given them as well."""
        for whole in batches(self.stand_in, self.length):
            given = {"position_ids": torch.arange(self.length)[None]} if positions else {}
            expected = self.run(whole | given)
            for part in self.parts:
                found = self.run({"input_ids": whole["input_ids"][:, part], "position_ids": part[None]})
                if not _agree(expected, found, part, whole):
                    return False
        return True

    def is_entered(self, blocks: str) -> bool:
        """Compare parts that are cut where the first block is entered with the whole."""
        wholes = batches(self.stand_in, self.length)
        expected = [self.run(whole) for whole in wholes]
        entry = BlockEntry(self.stand_in.get_submodule(blocks).children())
        for part in self.parts:
            cut = functools.partial(torch.index_select, dim=1, index=part)
            entry.open(Call(batch=_BATCH, length=self.length, own=len(part), cut=cut))
            if not all(_agree(notes, self.run(whole), part, whole) for notes, whole in zip(expected, wholes, strict=True)):
                return False
        return True


def _agree(expected: list[Tensor], found: list[Tensor], part: Tensor, batch: dict[str, Tensor]) -> bool:
    """Compare what was noted of a part with what was noted of the whole, but for padding."""
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, None, :, None]
    if len(expected) != len(found):
        return False
    for whole, own in zip(expected, found, strict=True):
        if whole.ndim == 4:
            weight = seen.index_select(2, part)
            whole, own = whole.index_select(2, part) * weight, own * weight
        if whole.shape != own.shape or not F.l1_loss(own, whole, reduction="none").max() <= _TOLERANCE * whole.abs().max():
            return False
    return True

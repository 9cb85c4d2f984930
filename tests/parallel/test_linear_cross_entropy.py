"""The cross-entropy of a head whose vocabulary is cut over ranks is that of one process, on every rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from parallel_helpers import GROUP_SIZES, Ranks
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from kenotron.models import cross_entropy
from kenotron.models.cross_entropy import linear_cross_entropy
from kenotron.parallel.collectives import all_gather_stack

B, S, H, V = 3, 7, 8, 24

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"z_loss": 0.1, "softcap": 2.0, "scale": 1.7},
    "ignored word": {"ignore_index": V - 1},
}


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what all ranks know: hidden states, the whole weight and bias, labels."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((B, S, H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[:, 0] = torch.tensor([0, V // 2, V - 1])  # the first and the last words of ranks' slices
    labels[1:, 3] = -100
    return hidden, weight, bias, labels


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, checkpointed: bool = False, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the sums, and the gradients of hidden states, weight and bias."""
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]

    def sums(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2], **options))

    out = checkpoint(sums, *inputs, use_reentrant=True) if checkpointed else sums(*inputs)
    (0.7 * out[0]).backward()
    return [x.detach() for x in out], [x.grad for x in inputs if x.grad is not None]


def agrees(
    group: ProcessGroup, inputs: tuple[Tensor, ...], tolerance: float = 1e-10, checkpointed: bool = False, **options: Any
) -> list[Tensor]:
    """Compare with one process; return the sums."""
    hidden, weight, bias, labels = inputs
    parts, part = group.size(), group.rank()
    want, want_grads = run(hidden, weight, bias, labels, **options)
    got, got_grads = run(
        hidden, weight.chunk(parts)[part], bias.chunk(parts)[part], labels, checkpointed, group=group, **options
    )
    want_grads[1:] = (x.chunk(parts)[part] for x in want_grads[1:])
    for x, y in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    gathered = all_gather_stack(torch.stack([x.double() for x in got]), group)
    assert gathered.eq(gathered[0]).all()  # to the last bit: ranks must not drift apart
    return got


def every_option_agrees(group: ProcessGroup, tokens_per_chunk: int) -> None:
    hidden, weight, bias, labels = make_inputs(torch.float64)
    for options in OPTIONS.values():
        labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
        agrees(group, (hidden, weight, bias, labels), max_logits=tokens_per_chunk * V // group.size(), **options)
    agrees(group, make_inputs(torch.float64), checkpointed=True)


def edges_agree(group: ProcessGroup) -> None:
    hidden, weight, bias, labels = make_inputs(torch.float64)
    sums = agrees(group, (hidden, weight, bias, labels.new_full(labels.shape, -100)), z_loss=0.1)
    assert [x.item() for x in sums] == [0, 0, 0]
    sums = agrees(group, (hidden[:0], weight, bias, labels[:0]), z_loss=0.1)
    assert [x.item() for x in sums] == [0, 0, 0]
    bias[V // group.size() :] = -torch.inf  # all words of all ranks but the first
    sums = agrees(group, (hidden, weight, bias, labels.clamp(max=2)), z_loss=0.1)
    assert sums[0].isfinite()
    agrees(group, make_inputs(torch.bfloat16), 4e-2)
    with torch.autocast("cpu", torch.bfloat16):
        agrees(group, make_inputs(torch.float32), 4e-2)


def labels_outside_the_whole_vocabulary_raise(group: ProcessGroup) -> None:
    hidden, weight, _, labels = make_inputs(torch.float64)
    labels[0, 0] = V
    with pytest.raises(ValueError, match=f"label {V} in a vocabulary of {V}"):
        linear_cross_entropy(hidden, weight.chunk(group.size())[group.rank()], labels, group=group)


def one_collective_per_chunk_and_one_more(group: ProcessGroup) -> None:
    hidden, weight, bias, labels = make_inputs(torch.float32)
    weight, bias = (x.chunk(group.size())[group.rank()] for x in (weight, bias))
    with (
        mock.patch.object(cross_entropy, "all_gather_stack", wraps=all_gather_stack) as gathers,
        mock.patch.object(cross_entropy, "reduce_from", wraps=cross_entropy.reduce_from) as sums,
    ):
        run(hidden, weight, bias, labels, group=group, max_logits=8 * len(weight))
    assert [call.args[0].shape for call in gathers.call_args_list] == [(3, 8), (3, 8), (3, 5)]
    assert [call.args[0].shape for call in sums.call_args_list] == [(B * S, H)]


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("tokens_per_chunk", [5, 1000])
def test_sums_and_gradients_are_those_of_one_process(ranks: Ranks, tokens_per_chunk: int, size: int) -> None:
    ranks(every_option_agrees, tokens_per_chunk, size=size)


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_no_tokens_no_labels_masked_ranks_and_sixteen_bits_give_what_one_process_gives(ranks: Ranks, size: int) -> None:
    ranks(edges_agree, size=size)


def test_labels_outside_the_whole_vocabulary_raise_on_every_rank(ranks: Ranks) -> None:
    ranks(labels_outside_the_whole_vocabulary_raise)


def test_a_chunk_costs_one_collective_of_three_numbers_per_token(ranks: Ranks) -> None:
    ranks(one_collective_per_chunk_and_one_more)

"""Attention over a sequence that several ranks hold, against a dense softmax over the whole of it in one process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from kenotron.flops import FlopCounter, Flops, total
from kenotron.parallel import ring as R
from kenotron.parallel.ring import contiguous_indices, ring_attention, ulysses_attention, zigzag_indices

SIZES = [2, 4]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
WAYS: dict[str, tuple[Callable[..., Tensor], Callable[[int, int, int], Tensor]]] = {
    "ring": (ring_attention, zigzag_indices),
    "ulysses": (ulysses_attention, contiguous_indices),
}

#: documents, by the lengths of each row's; what is left is padding
PACKED = ((5, 11, 3, 21), (40,))
PADDED = ((7, 2, 20), (1, 1, 30))
CASES: dict[str, dict[str, Any]] = {
    "plain": {"causal": False},
    "causal": {},
    "grouped, scaled": {"heads": (8, 4), "scale": 0.2},
    "one KV head": {"heads": (4, 1)},
    "two KV heads": {"heads": (4, 2)},
    "values of another dim": {"dims": (24, 8)},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "window over several ranks": {"window": 27},
    "documents": {"documents": PACKED},
    "documents with padding": {"documents": PADDED},
    "documents, not causal": {"documents": PADDED, "causal": False},
    "nothing but padding": {"documents": ((), ())},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "sinks, window": {"sinks": True, "window": 9, "heads": (8, 4)},
    "all": {"sinks": True, "window": 13, "documents": PADDED, "softcap": 2.0, "heads": (8, 4), "dims": (16, 24)},
}


# ---- One process that sees everything -------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, causal: bool = True, window: int | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend with a dense mask."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    numbers = [[0] * length] * q.shape[0] if documents is None else documents.tolist()

    def sees(row: list[int], i: int, j: int) -> bool:
        near = not causal or (j <= i and (window is None or i - j < window))
        return near and row[i] == row[j] != -1

    visible = torch.tensor([[[[sees(row, i, j) for j in range(length)] for i in range(length)]] for row in numbers])
    scores = scores.masked_fill(~visible, -1e30)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    p = scores.softmax(dim=3)[..., :length] * visible
    return torch.einsum("bhij,bhjd->bhid", p, v)


def numbered(rows: tuple[tuple[int, ...], ...], length: int) -> Tensor:
    """Return documents of these lengths; their numbers do not rise."""
    numbers = torch.full((len(rows), length), -1)
    for row, lengths in enumerate(rows):
        ends = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        for n in range(len(lengths)):
            numbers[row, ends[n] : ends[n + 1]] = (5 * n + 3) % 7
    return numbers


def whole(
    seed: int, heads: tuple[int, int] = (4, 4), dims: tuple[int, int] = (16, 16), length: int = 40, batch: int = 2,
    sinks: bool = False, documents: tuple[tuple[int, ...], ...] | None = None, **settings: Any,
) -> tuple[list[Tensor], Tensor, Tensor | None, dict[str, Any]]:  # fmt: skip
    """Return leaves (q, k, v and perhaps sinks), a gradient of the output, documents and the other settings, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(batch, heads[i > 0], length, dims[i > 1]) for i in range(3)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [*shapes, heads[:1]][: 3 + sinks]]
    dout = torch.randn((batch, heads[0], length, dims[1]), generator=generator, dtype=torch.float64)
    return leaves, dout, None if documents is None else numbered(documents, length), settings


# ---- On each rank ---------------------------------------------------------------------------------------------------


def compare(group: ProcessGroup | None, way: str, dtype: torch.dtype, cases: dict[str, dict[str, Any]]) -> None:
    """Each case's output and gradients on this rank against the reference's at its positions."""
    size, rank = (group.size(), group.rank()) if group else (1, 0)
    attention, indices = WAYS[way]
    for seed, (name, case) in enumerate(cases.items()):
        leaves, dout, documents, settings = whole(seed, **case)
        leaves, dout = [x.to(dtype) for x in leaves], dout.to(dtype)
        exact = [x.double().requires_grad_() for x in leaves]
        expected = reference(*exact[:3], documents, **settings, sinks=exact[3] if len(exact) > 3 else None)
        expected_gradients = torch.autograd.grad(expected, exact, dout.double(), materialize_grads=True)

        here = indices(dout.shape[2], size, rank)
        local = [(x[:, :, here] if x.ndim == 4 else x).clone().requires_grad_() for x in leaves]
        sinks = local[3] if len(local) > 3 else None
        out = attention(*local[:3], group=group, documents=documents, **settings, sinks=sinks)
        assert out.dtype == dtype
        gradients = list(torch.autograd.grad(out, local, dout[:, :, here]))
        if sinks is not None and group is not None:
            dist.all_reduce(gradients[3], group=group)
        pairs = zip((out, *gradients), (expected, *expected_gradients), ("out", "dq", "dk", "dv", "dsinks"), strict=False)
        for actual, wanted, what in pairs:
            if wanted.ndim == 4:
                wanted = wanted[:, :, here]
            scale = max(1.0, wanted.abs().max().item())  # sinks' gradients are sums over everything
            tolerance = TOLERANCES[dtype]
            message = f"{what} of {name!r} by {way}, {dtype}"
            torch.testing.assert_close(
                actual.double() / scale, wanted / scale, rtol=tolerance, atol=tolerance, msg=lambda m, t=message: f"{t}: {m}"
            )


def compare_random(group: ProcessGroup, seeds: range) -> None:
    compare(group, "ring", torch.float64, {f"seed {seed}": random_case(seed, group.size(), "ring") for seed in seeds})
    compare(group, "ulysses", torch.float64, {f"seed {seed}": random_case(seed, group.size(), "ulysses") for seed in seeds})


def random_case(seed: int, size: int, way: str) -> dict[str, Any]:
    """Return shapes, documents and settings, any of them."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 4]) * (1 if way == "ring" or size < 4 else draw.choice([1, 2]))
    groups = draw.choice([1, 2, 3]) if way == "ring" else draw.choice([1, 2]) * max(1, size // kv_heads)
    length = 2 * size * draw.randint(1, 9)
    batch = draw.randint(1, 3)
    causal = draw.random() < 0.8
    case: dict[str, Any] = {
        "heads": (kv_heads * groups, kv_heads), "dims": (draw.choice([8, 20]), draw.choice([8, 20])), "length": length,
        "batch": batch, "causal": causal, "sinks": draw.random() < 0.3,
    }  # fmt: skip
    if causal and draw.random() < 0.5:
        case["window"] = draw.randint(1, length + 2)
    if draw.random() < 0.3:
        case["softcap"] = draw.uniform(0.5, 5.0)
    if draw.random() < 0.5:
        rows = []
        for _ in range(batch):
            cuts = sorted(draw.sample(range(length + 1), min(length, draw.randint(1, 6))))
            rows.append(tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False) if b > a))
        case["documents"] = tuple(rows)
    return case


def events(group: ProcessGroup, settings: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return what a rank does forward and backward: ("send", elements) and ("attend", pairs that are seen)."""
    log: list[Any] = []

    def noting(name: str, function: Callable[..., Any], what: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            log.append((name, what(*args, **kwargs)))
            return function(*args, **kwargs)

        return call

    def seen(position: int) -> Callable[..., int]:
        def count(*args: Any, mask: Any, **kwargs: Any) -> int:
            spans = slice(0, args[position].shape[2]), slice(0, args[position + 1].shape[2])
            return int(mask.seen(*spans, torch.device("cpu")).sum())

        return count

    def elements(leaving: Tensor, *args: Any, **kwargs: Any) -> int:
        return leaving.numel()

    leaves, dout, documents, settings = whole(0, length=64, **settings)
    here = zigzag_indices(64, group.size(), group.rank())
    q, k, v = (x[:, :, here].requires_grad_() for x in leaves)
    with (
        patch.object(R, "attend", noting("attend", R.attend, seen(0))),
        patch.object(R, "attend_backward", noting("attend", R.attend_backward, seen(1))),
        patch.object(R, "_pass_on", noting("send", R._pass_on, elements)),
    ):
        out = ring_attention(q, k, v, group=group, documents=documents, **settings)
        forward = list(log)
        log.clear()
        out.backward(dout[:, :, here])
    return forward, log


def kept_bytes(group: ProcessGroup | None, way: str) -> int:
    """Return how many bytes a rank keeps from forward to backward."""
    size, rank = (group.size(), group.rank()) if group else (1, 0)
    attention, indices = WAYS[way]
    leaves, _, _, _ = whole(0, heads=(8, 4), length=64)
    q, k, v = (x[:, :, indices(64, size, rank)].contiguous().requires_grad_() for x in leaves)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attention(q, k, v, group=group)
    assert out.requires_grad
    return sum(kept.values())


def recomputed_compiled_and_autocast(group: ProcessGroup) -> None:
    """As models run it: in a checkpoint, in a compiled function, and under autocast."""
    for attention, indices in WAYS.values():
        leaves, dout, _, _ = whole(0)
        here = indices(40, group.size(), group.rank())
        q, k, v = (x[:, :, here].float().requires_grad_() for x in leaves)
        dout = dout[:, :, here].float()

        def layer(
            q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor] = attention, group: ProcessGroup = group
        ) -> Tensor:
            return attention(q * 1.5, k, v, group=group) * 2.0

        expected = torch.autograd.grad(layer(q, k, v), (q, k, v), dout)
        recomputed = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)
        compiled = torch.compile(layer, backend="aot_eager")(q, k, v)
        for out in (recomputed, compiled):
            for actual, wanted in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
                torch.testing.assert_close(actual, wanted)
        for softcap in (None, 2.0):
            half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
            expected = attention(*half, group=group, softcap=softcap)
            expected_gradients = torch.autograd.grad(expected, half, dout.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                out = attention(q, k, v, group=group, softcap=softcap)
                gradients = torch.autograd.grad(out, (q, k, v), dout.bfloat16())
            assert out.equal(expected)
            for actual, wanted in zip(gradients, expected_gradients, strict=True):
                assert actual.equal(wanted.float())


def refused(group: ProcessGroup) -> list[str]:
    """Return what ``ulysses_attention`` says of heads, and ``ring_attention`` of an odd number of positions."""
    said = []
    for attention, heads, length in (
        (ulysses_attention, (6, 6), 8),
        (ulysses_attention, (12, 3), 8),
        (ring_attention, (4, 4), 7),
    ):
        q, k, v = whole(0, heads=heads, length=length)[0]
        with pytest.raises(ValueError) as error:
            attention(q, k, v, group=group)
        said.append(str(error.value))
    return said


# ---- Tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_output_and_gradients_are_those_of_one_process(ranks, way, size):
    ranks(compare, way, torch.float64, CASES, size=size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(ranks, dtype, way):
    names = ("causal", "grouped, scaled", "documents with padding", "softcap", "sinks, window")
    ranks(compare, way, dtype, {name: CASES[name] for name in names})


@pytest.mark.parametrize("size", SIZES)
def test_random_shapes_and_masks(ranks, size):
    ranks(compare_random, range(16), size=size)


@pytest.mark.parametrize("way", WAYS)
def test_one_process_needs_no_group(way):
    compare(None, way, torch.float64, {**CASES, "odd": {"length": 9}})


@pytest.mark.parametrize("size", SIZES)
def test_transfers_begin_before_the_computation_that_hides_them(ranks, size):
    for forward, backward in ranks(events, {}, size=size):
        kinds = [kind for kind, _ in forward]
        assert kinds[0] == "send"
        assert kinds[-1] == "attend"
        assert kinds.count("send") == size - 1
        kinds = [kind for kind, _ in backward]
        assert kinds[0] == "send"
        assert kinds.count("send") == size - 1 + size  # keys and values, and their gradients all the way home
        steps = "".join(kind[0] for kind in kinds).replace("aaa", "a")
        assert steps == "sa" + "ssa" * (size - 2) + "sa" + "s"  # gradients leave, and then the next step's keys and values


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_have_the_same_work_in_every_step(ranks, size):
    every = ranks(events, {}, size=size)
    forward = [[pairs for kind, pairs in log if kind == "attend"] for log, _ in every]
    chunk = 64 // (2 * size)
    for work in forward:
        assert sum(work[:3]) == 2 * chunk * chunk + chunk  # two diagonals and a chunk by chunk
        assert work[3:] == [2 * chunk * chunk] * (size - 1)  # two chunks by chunk at once, none of them masked


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent_does_not_depend_on_masks(ranks, size):
    plain = ranks(events, {}, size=size)
    masked = ranks(events, {"window": 3, "documents": ((9,), (2, 3))}, size=size)
    for pass_ in (0, 1):
        sent = [[what for kind, what in log[pass_] if kind == "send"] for log in plain + masked]
        assert all(what == sent[0] for what in sent)
        worked = [sum(what for kind, what in log[pass_] if kind == "attend") for log in masked]
        assert sum(worked) < 2 * 64 * 3 + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_each_rank_keeps_its_share_of_what_one_process_keeps(ranks, way, size):
    assert ranks(kept_bytes, way, size=size) == [kept_bytes(None, way) // size] * size


def test_recomputed_compiled_and_under_autocast(ranks):
    ranks(recomputed_compiled_and_autocast)


def test_what_cannot_be_shared_is_refused_with_what_can(ranks):
    heads, kv_heads, positions = ranks(refused, size=4)[0]
    assert "6 query heads for 4 ranks" in heads
    assert "[1, 2, 3, 6]" in heads
    assert "3 KV heads for 4 ranks" in kv_heads
    assert "7 positions" in positions
    assert "2 × 4" in positions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3, "causal": False}, "needs causal=True"),
        ({"window": 0}, "at least 1"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"sinks": torch.zeros(3)}, "one logit for each head"),
        ({"documents": torch.zeros(2, 7, dtype=torch.long)}, r"whole sequence.*natural order"),
        ({"documents": torch.zeros(2, 8)}, "integers"),
        ({"k": torch.zeros(2, 4, 6, 16)}, "that differ in heads and v's dim only"),
        ({"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16)}, "multiple of the KV heads"),
        ({"k": torch.zeros(2, 4, 8, 8)}, "one dim"),
        ({"k": torch.zeros(2, 4, 8, 16, dtype=torch.half)}, "one floating-point dtype"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_settings_that_do_not_go_together_are_refused(way, settings, message):
    q, k, v = (torch.zeros(2, 4, 8, 16) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        WAYS[way][0](**{"q": q, "k": k, "v": v, "group": None, **settings})


@pytest.mark.parametrize("indices", [zigzag_indices, contiguous_indices])
def test_every_position_lies_on_one_rank(indices):
    for size in (1, 2, 4):
        every = [indices(24, size, rank) for rank in range(size)]
        assert all(here.dtype == torch.int64 and len(here) == 24 // size for here in every)
        assert torch.cat(every).sort().values.equal(torch.arange(24))


def test_where_chunks_lie():
    assert zigzag_indices(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_indices(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert contiguous_indices(8, 2, 1).tolist() == [4, 5, 6, 7]
    assert zigzag_indices(5, 1, 0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="pad them to 16"):
        zigzag_indices(12, 4, 0)
    with pytest.raises(ValueError, match="pad them to 12"):
        contiguous_indices(9, 4, 0)


def counted_flops(group: ProcessGroup, attention: Any) -> Flops:
    shape = (2, 4, 8, 4)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with FlopCounter() as counter:
        attention(q, k, v, group=group).sum().backward()
        checkpoint(attention, q, k, v, group=group, use_reentrant=False).sum().backward()
    return total(counter.products())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attention", [ring_attention, ulysses_attention])
def test_flops_are_those_of_all_queries_and_keys_whatever_tiles_ran(ranks, attention, size):
    found = ranks(counted_flops, attention, size=size)
    # Two products forward, four backward, twice; that which is computed again does not count.
    assert sum(flops.attention for flops in found) == 2 * 6 * 2 * 2 * 4 * (8 * size) ** 2 * 4
    assert all(flops.other == 0 for flops in found)

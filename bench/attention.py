"""Attention over a long sequence that ranks share: time, and what a rank keeps from forward to backward.

    plain     F.scaled_dot_product_attention over the whole sequence in one process, which has all cores to itself
    ring      ``ring_attention``: K and V travel from rank to rank
    gather    K and V of all ranks gathered (and their gradients reduce-scattered), then one's own queries: what ring must beat
    ulysses   ``ulysses_attention``: an all-to-all to a part of the heads, and back

Forward and backward, causal, fp32, 4 heads of 64, one sequence; the ranks share the cores, a processor each. In a round the
contestants take turns, all ranks begin each together and the slowest counts; a row shows medians and quartiles over the rounds.
"cpu" is processor time summed over the ranks, which waiting does not enter, nor do other programs except through caches.
"kept" counts the storages that autograd saves on one rank; "× ranks" holds that, times the ranks, against plain's.
"peak" is by how much the largest resident set in a forward and backward exceeds the one before; it holds what kernels and
messages need at a time, and is there for information.

Bars: ring and ulysses keep on all ranks together what one process keeps, within 15 %; ring keeps less than gather, and is no
slower: the median of their ratios, round by round, lies no more than two of its standard errors (±) above 1.0.

    python bench/attention.py [--quick] [--ranks N] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratios import spread

from kenotron.testing import RankPool

HEADS, DIM = 4, 64
LENGTHS, QUICK_LENGTHS = (4096, 8192, 16384, 32768), (4096, 8192)
LEAST_ROUNDS = 3
SHARE_BAR, TIME_BAR = 0.15, 1.0


@dataclass
class Figures:
    """What one contestant measured on one rank: seconds of each round, and bytes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    kept: int = 0
    peak: int | None = None


# --------------------------------------------------------------------------------------------------------- contestants


def gather_attention(q: Any, k: Any, v: Any, group: Any) -> Any:
    """Attend with K and V of all ranks, gathered at once, from the same places of the sequence as the ring's."""
    import torch

    from kenotron.parallel.attention import Mask, attend, attend_backward, empty_result
    from kenotron.parallel.collectives import gather_from

    class Attention(torch.autograd.Function):
        """Two chunks of queries with all the keys before them, in natural order."""

        @staticmethod
        def blocks(ranks: int, rank: int, half: int) -> list[tuple[slice, slice, Any]]:
            found = []
            for rows, start in ((slice(0, half), rank * half), (slice(half, 2 * half), (2 * ranks - 1 - rank) * half)):
                if start:
                    found.append((rows, slice(0, start), Mask()))
                found.append((rows, slice(start, start + half), Mask(causal=True)))
            return found

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, ranks: int, rank: int) -> Any:
            out, lse = empty_result(q, v)
            ctx.blocks = Attention.blocks(ranks, rank, q.shape[2] // 2)
            for rows, cols, mask in ctx.blocks:
                into = out[:, :, rows], lse[:, :, rows]
                attend(q[:, :, rows], k[:, :, cols], v[:, :, cols], mask=mask, scale=DIM**-0.5, into=into)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            q, k, v, out, lse = ctx.saved_tensors
            dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
            for rows, cols, mask in ctx.blocks:
                mine = (x[:, :, rows] for x in (dout, q))
                others = (x[:, :, cols] for x in (k, v))
                into = dq[:, :, rows], dk[:, :, cols], dv[:, :, cols]
                attend_backward(*mine, *others, out[:, :, rows], lse[:, :, rows], mask=mask, scale=DIM**-0.5, into=into)
            return dq, dk, dv, None, None

    ranks, rank = group.size(), group.rank()
    half = q.shape[2] // 2
    # One collective for both; then from the ring's order, 0 and 2n-1, 1 and 2n-2, ..., to the natural one.
    gathered = gather_from(torch.stack((k, v)), 3, group, grad="reduce_scatter")
    chunks = gathered.split(half, 3)
    k, v = torch.cat(chunks[0::2] + chunks[1::2][::-1], 3)
    return Attention.apply(q, k, v, ranks, rank)


def contestants(length: int) -> dict[str, tuple[Callable[[], Any], list[Any], Any]]:
    """Return by name: a forward pass on this rank, its leaves, and the gradient of its result."""
    import torch
    import torch.distributed as dist

    from kenotron.parallel.ring import contiguous_indices, ring_attention, ulysses_attention, zigzag_indices

    group = dist.group.WORLD
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(4)]

    def part(indices: Callable[..., Any] | None) -> list[Any]:
        here = [x.clone() if indices is None else x[:, :, indices(length, ranks, rank)] for x in whole]
        return [x.requires_grad_() for x in here[:3]] + here[3:]

    plain, ring, gather, ulysses = part(None), part(zigzag_indices), part(zigzag_indices), part(contiguous_indices)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "plain": (lambda: sdpa(*plain[:3], is_causal=True), plain[:3], plain[3]),
        "ring": (lambda: ring_attention(*ring[:3], group=group), ring[:3], ring[3]),
        "gather": (lambda: gather_attention(*gather[:3], group), gather[:3], gather[3]),
        "ulysses": (lambda: ulysses_attention(*ulysses[:3], group=group), ulysses[:3], ulysses[3]),
    }


# ------------------------------------------------------------------------------------------------------------ measures


def measure(length: int, budget_s: float) -> dict[str, Figures]:
    """Let the contestants take turns on this rank for about ``budget_s`` seconds."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    agree(min(length, 512))
    runs = contestants(length)
    found = {name: Figures() for name in runs}
    begun, goes_on, warm = time.monotonic(), torch.ones(()), False
    while goes_on:
        for name, (forward, leaves, dout) in runs.items():
            dist.barrier()
            if name == "plain" and dist.get_rank() != 0:
                continue  # it has the machine to itself
            threads = torch.get_num_threads()
            if name == "plain":
                torch.set_num_threads(os.cpu_count() or 1)
            if not warm:
                found[name].kept, found[name].peak = memory(forward, leaves, dout)
            else:
                start = time.perf_counter(), time.process_time()
                torch.autograd.grad(forward(), leaves, dout)
                found[name].wall.append(time.perf_counter() - start[0])
                found[name].cpu.append(time.process_time() - start[1])
            torch.set_num_threads(threads)
        warm = True
        if time.monotonic() - begun > budget_s and len(found["ring"].wall) >= LEAST_ROUNDS:
            goes_on.zero_()
        dist.broadcast(goes_on, 0)  # rank 0 decides
    return found


def agree(length: int) -> None:
    """Hold the contestants' results against one another's: what is wrong needs no time taken."""
    import torch
    import torch.distributed as dist

    from kenotron.parallel.ring import contiguous_indices, zigzag_indices

    results = {}
    for name, (forward, leaves, dout) in contestants(length).items():
        out = forward()
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for name, indices in (("ring", zigzag_indices), ("gather", zigzag_indices), ("ulysses", contiguous_indices)):
        here = indices(length, dist.get_world_size(), dist.get_rank())
        for ours, plain in zip(results[name], results["plain"], strict=True):
            torch.testing.assert_close(ours, plain[:, :, here], rtol=1e-4, atol=1e-4)


def memory(forward: Callable[[], Any], leaves: list[Any], dout: Any) -> tuple[int, int | None]:
    """Return the bytes of the storages that autograd keeps, and by how many the resident set grew at most."""
    import torch

    kept: dict[int, int] = {}

    def pack(x: Any) -> Any:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set so far is forgotten
    except OSError:
        tells = False
    else:
        tells = True
    before = resident("VmRSS")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    torch.autograd.grad(out, leaves, dout)
    return sum(kept.values()), resident("VmHWM") - before if tells else None


def resident(name: str) -> int:
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


# -------------------------------------------------------------------------------------------------------------- report


def summarize(length: int, ranks: list[dict[str, Figures]]) -> list[dict[str, Any]]:
    """Return a row per contestant, with its bars."""
    wall: dict[str, list[float]] = {}
    rows = []
    for name in ranks[0]:
        took = [rank[name] for rank in ranks if rank[name].wall]
        wall[name] = [max(times) for times in zip(*(rank.wall for rank in took), strict=True)]
        cpu = [sum(times) for times in zip(*(rank.cpu for rank in took), strict=True)]
        kept = max(rank.kept for rank in took)
        low, median, high = statistics.quantiles(wall[name], n=4)
        row: dict[str, Any] = {
            "length": length, "name": name, "ranks": len(took), "s": median, "low": low, "high": high, "wall": wall[name],
            "cpu_s": statistics.median(cpu), "kept": kept, "share": kept * len(took) / ranks[0]["plain"].kept,
            "peak": max((rank.peak for rank in took if rank.peak is not None), default=None), "missed": [],
        }  # fmt: skip
        if name in ("ring", "ulysses") and abs(row["share"] - 1) > SHARE_BAR:
            row["missed"].append(f"keeps {row['share']:.2f} of plain's")
        rows.append(row)
    ring, gather = (next(row for row in rows if row["name"] == name) for name in ("ring", "gather"))
    found = spread([a / b for a, b in zip(wall["ring"], wall["gather"], strict=True)])
    ring.update(
        ratio=found["ratio"], ratio_low=found["low"], ratio_high=found["high"], error=found["error"],
        rounds=found["repetitions"], cpu_ratio=ring["cpu_s"] / gather["cpu_s"],
    )  # fmt: skip
    if ring["kept"] >= gather["kept"]:
        ring["missed"].append("keeps no less than gather")
    if found["ratio"] - 2 * found["error"] > TIME_BAR:
        ring["missed"].append(f"slower than gather, {found['ratio']:.3f}")
    return rows


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    peak = "     -" if row["peak"] is None else f"{row['peak'] / 2**20:6.1f}"
    note = "MISSED: " + "; ".join(row["missed"]) if row["missed"] else ""
    if "ratio" in row:
        note = (
            f"{note or 'ok'}   ring / gather {row['ratio']:.3f} ± {row['error']:.3f}"
            f" [{row['ratio_low']:.3f},{row['ratio_high']:.3f}], cpu {row['cpu_ratio']:.3f}, {row['rounds']} rounds"
        )
    print(
        f"{row['length']:>6} {row['name']:<8} {row['ranks']:>5} {row['s']:8.3f} [{row['low']:7.3f},{row['high']:7.3f}]"
        f" {row['cpu_s']:8.2f} {row['kept'] / 2**20:8.2f} {row['share']:8.2f} {peak}   {note}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sequences of 4k and 8k, less than three minutes in all")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="processes that share a sequence")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="lengths that match this pattern")
    options = parser.parse_args()
    budget_s = 45.0 if options.quick else 180.0
    cores = os.cpu_count() or 1
    threads = max(1, cores // options.ranks)
    load = os.getloadavg()[0]
    print(f"{cores} processors, load {load:.1f}; {options.ranks} ranks, threads in each: {threads}; times in s, sizes in MB")
    print(f"length {'':<8} ranks     time {'quartiles':>17} {'cpu':>8} {'kept':>8} {'× ranks':>8} {'peak':>6}")
    found: list[dict[str, Any]] = []
    with RankPool(options.ranks, threads) as pool:
        for length in QUICK_LENGTHS if options.quick else LENGTHS:
            if fnmatch.fnmatch(str(length), options.only):
                rows = summarize(length, pool.run(measure, options.ranks, length, budget_s, timeout_s=1800))
                for row in rows:
                    show(row)
                found += rows
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 1 if any(row["missed"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())

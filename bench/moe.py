"""Speed of the experts of a MoE layer, forward and backward, against transformers' implementations of the same.

All contestants hold the same weights and get the same tokens and the same routing (softmax of random logits), in one process,
and take turns. A repetition gives one ratio: our time over that of the contestant which is fastest in the median; a row
shows their median and quartiles. On a CPU one thread does everything, and its processor time counts: other programs enter
that through caches alone. On CUDA time on the clock counts. "kept" is what the forward pass keeps for the backward pass,
in MB, without weights and inputs: ours and that contestant's.

    python bench/moe.py [--quick] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ratios import spread, verdict
from torch import Tensor, nn

from kenotron.models.experts import Experts

#: transformers' batched_mm copies a matrix for each pair of token and expert; above this it is left out
BATCHED_BYTES = 1 << 30
WARM_UP = 2
#: one that takes so many times as long as the fastest does the warm-up alone
HOPELESS = 10
BAR = 1.0


@dataclass(frozen=True)
class Row:
    """Sizes of one comparison."""

    device: str
    dtype: torch.dtype
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tokens: int

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.device} {kind} E{self.experts} K{self.top_k} H{self.hidden} I{self.intermediate} T{self.tokens}"


ROWS = [
    Row("cpu", torch.float32, 16, 4, 256, 512, 2048),
    Row("cpu", torch.float32, 64, 8, 256, 128, 1024),
    Row("cpu", torch.float32, 8, 2, 256, 256, 256),
    Row("cuda", torch.bfloat16, 64, 8, 2048, 1408, 16384),
    Row("cuda", torch.bfloat16, 64, 8, 2048, 768, 16384),
]


@dataclass
class Contestant:
    """An experts module with what was measured of it."""

    name: str
    module: nn.Module
    seconds: list[float]
    kept_bytes: int = 0


def contestants_of(row: Row) -> list[Contestant]:
    """Return ours and theirs with the same weights; ours first."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(1)
    ours = Experts(row.hidden, row.intermediate, row.experts, device=row.device, dtype=row.dtype)
    found = [Contestant("ours", ours, [])]
    batched_bytes = row.tokens * row.top_k * 2 * row.intermediate * row.hidden * row.dtype.itemsize
    for name in ("eager", "grouped_mm", *(["batched_mm"] if batched_bytes <= BATCHED_BYTES else [])):
        config = Qwen3MoeConfig(
            num_experts=row.experts, hidden_size=row.hidden, moe_intermediate_size=row.intermediate, hidden_act="silu"
        )
        config._experts_implementation = name
        with torch.device("meta"):
            module = Qwen3MoeExperts(config).to(row.dtype)
        module.load_state_dict(ours.state_dict(), assign=True)  # the same storage: they take turns
        for param in module.parameters():
            param.requires_grad_()
        found.append(Contestant(name, module, []))
    return found


def inputs_of(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, index, weights and the output's gradient."""
    torch.manual_seed(2)
    x = torch.randn(row.tokens, row.hidden, device=row.device, dtype=row.dtype)
    weights, index = torch.randn(row.tokens, row.experts, device=row.device).softmax(-1).topk(row.top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).to(row.dtype)  # Qwen3's router returns the model's type
    return x.requires_grad_(), index, weights.requires_grad_(), torch.randn_like(x)


def step(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output and all gradients of one forward and backward pass."""
    out = module(x, index, weights)
    return out, *torch.autograd.grad(out, [x, weights, *module.parameters()], grad)


def kept_for_backward(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> int:
    """Return the bytes of storage that a forward pass keeps, besides those that exist anyway."""
    existing = {t.untyped_storage().data_ptr() for t in (x, index, weights, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in existing:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x, index, weights)
    del out
    return sum(kept.values())


def check_alike(row: Row, found: list[Contestant], inputs: tuple[Tensor, ...]) -> None:
    """Raise unless all contestants compute the same."""
    expected = step(found[0].module, *inputs)
    for contestant in found[1:]:
        for a, b in zip(step(contestant.module, *inputs), expected, strict=True):
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
            if error > (1e-5 if row.dtype == torch.float32 else 2e-2):
                raise RuntimeError(f"{row.name}: {contestant.name} and ours differ by {error:.1e}")


def measure(row: Row, budget_s: float) -> list[Contestant]:
    """Let the contestants take turns for about ``budget_s`` seconds, at least five times each but for hopeless ones."""
    settle: Callable[[], None] = torch.cuda.synchronize if row.device == "cuda" else lambda: None
    clock = time.perf_counter if row.device == "cuda" else time.process_time
    found, inputs = contestants_of(row), inputs_of(row)
    check_alike(row, found, inputs)
    for contestant in found:
        contestant.kept_bytes = kept_for_backward(contestant.module, *inputs[:3])
    playing, start, repetition = found, time.monotonic(), 0
    while repetition < WARM_UP + 5 or time.monotonic() - start < budget_s:
        if repetition == WARM_UP:
            fastest = min(contestant.seconds[-1] for contestant in found)
            playing = [c for c in found if c is found[0] or c.seconds[-1] < HOPELESS * fastest]
            for contestant in playing:
                contestant.seconds.clear()
        turn = repetition % len(playing)  # nobody always follows the same
        for contestant in playing[turn:] + playing[:turn]:
            settle()
            begin = clock()
            step(contestant.module, *inputs)
            settle()
            contestant.seconds.append(clock() - begin)
        repetition += 1
    return found


def summarize(row: Row, found: list[Contestant]) -> dict[str, Any]:
    """Return the figures of one row."""
    ours, *theirs = found
    best = min(theirs, key=lambda contestant: statistics.median(contestant.seconds))
    figures = spread([a / b for a, b in zip(ours.seconds, best.seconds, strict=True)])
    return {
        "name": row.name, "bar": BAR, "best": best.name, **figures,
        "ms": {contestant.name: 1e3 * statistics.median(contestant.seconds) for contestant in found},
        "kept_mb": {contestant.name: contestant.kept_bytes / 1e6 for contestant in found},
        "ok": figures["ratio"] <= BAR,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less than three minutes in all")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="rows whose name matches this pattern")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; times in ms")
    print(
        f"{'row':<42} {'ours':>8} {'eager':>8} {'grouped':>8} {'batched':>8} {'ratio':>6} {'spread':>15} {'± of it':>8} "
        f"{'kept':>13} {'times':>6} {'bar':>5}"
    )
    for row in ROWS:
        if not fnmatch.fnmatch(row.name, options.only):
            continue
        if row.device == "cuda" and not torch.cuda.is_available():
            print(f"{row.name:<42} no GPU here", flush=True)
            found.append({"name": row.name, "ok": True, "notes": ["no GPU here"]})
            continue
        figures = summarize(row, measure(row, 20.0 if options.quick else 60.0))
        found.append(figures)
        times = [figures["ms"].get(name) for name in ("ours", "eager", "grouped_mm", "batched_mm")]
        kept = f"{figures['kept_mb']['ours']:.1f}/{figures['kept_mb'][figures['best']]:.1f}"
        print(
            f"{row.name:<42}", *(f"{ms:8.2f}" if ms else f"{'-':>8}" for ms in times), f"{figures['ratio']:6.3f}",
            f"[{figures['low']:6.3f},{figures['high']:6.3f}] {figures['error']:8.3f} {kept:>13}",
            f"{figures['repetitions']:6} {figures['bar']:5.2f}   {verdict(figures)}",
            flush=True,
        )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 1 if any(not row["ok"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())

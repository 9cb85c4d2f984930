"""Parity: every layout trains like one process.

For each layout 20 AdamW steps in fp32 from the same seed; then the largest relative deviation from one process of losses
and gradient norms (bar 1e-5) and of final weights (per tensor, in norm; bar 1e-4).

    python bench/parity.py [--quick] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kenotron.testing import RankPool, RanksFailedError

STEPS, GLOBAL_BATCH = 20, 16
LOSS_BAR, WEIGHT_BAR = 1e-5, 1e-4
#: A key bias shifts all scores of a query alike, which softmax does not see: its gradient is zero, its update noise.
NO_GRADIENT = ("*k_proj.bias", "*key.bias", "*query_key_value.bias")


@dataclass(frozen=True)
class Case:
    """One row: a layout, the model, and what the Trainer is told."""

    name: str
    ranks: int
    strategy: dict[str, Any]
    model: dict[str, Any] = field(default_factory=lambda: {"architecture": "llama"})
    trainer: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    slow: bool = False  # left out of `make test`: it repeats on a further layout what another case tries

    @property
    def reference(self) -> str:
        """What one process must do alike: cases that share it share one reference run."""
        return json.dumps([self.model, self.trainer], sort_keys=True)


def model(architecture: str, **settings: Any) -> dict[str, Any]:
    return {"architecture": architecture, **settings}


def own(architecture: str, **settings: Any) -> dict[str, Any]:
    """Kénotron's own model."""
    return model(architecture, own=True, **settings)


CLIP = {"gradient_clip_val": 0.5}
ACCUMULATE = {"accumulate_grad_batches": 2}

PACKED = model("qwen3", documents=(5, 1, 7, 3))
#: transformers has no tensor-parallel plan for GPT-OSS.
EXPERTS_ALONE = {
    "model.model.layers.*.mlp.experts": "moe_tp_experts",
    "model.model.layers.*.mlp.experts.gate_up_proj": "colwise",
    "model.model.layers.*.mlp.experts.down_proj": "rowwise",
}

CASES = [
    Case("one process", 1, {}, quick=True),
    Case("dp 2, zero 0", 2, {"zero_stage": 0}, quick=True),
    Case("dp 2, zero 1", 2, {"zero_stage": 1}, quick=True),
    Case("dp 2, zero 2", 2, {"zero_stage": 2}),
    Case("dp 2, zero 3", 2, {"zero_stage": 3}),
    Case("dp 4, HSDP 2 × 2, zero 3", 4, {"zero_stage": 3, "dp_replicate": 2}),
    Case("dp 4, HSDP 2 × 2, zero 1, accumulate 2", 4, {"dp_replicate": 2}, trainer=ACCUMULATE),
    Case("tp 2", 2, {"tp": 2}, quick=True),
    Case("tp 4 over 2 KV heads", 4, {"tp": 4}),
    Case("tp 4 over 2 KV heads, SP, clip", 4, {"tp": 4, "sequence_parallel": True}, trainer=CLIP),
    Case("tp 2, sequence parallel", 2, {"tp": 2, "sequence_parallel": True}, quick=True),
    Case("pp 2, 1f1b", 2, {"pp": 2}, quick=True),
    Case("pp 2, afab", 2, {"pp": 2, "schedule": "afab"}),
    Case("pp 2, interleaved", 2, {"pp": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, quick=True),
    Case("pp 2, interleaved zero bubble", 2, {"pp": 2, "schedule": "interleaved_zero_bubble", "virtual_stages": 2}),
    Case("pp 2, zbv", 2, {"pp": 2, "schedule": "zbv", "virtual_stages": 2}),
    Case("pp 4, 1f1b", 4, {"pp": 4}),
    Case("pp 4, 6 blocks (uneven)", 4, {"pp": 4}, model("llama", layers=6)),
    Case("pp 2, tied embeddings, clip", 2, {"pp": 2}, model("llama-tied"), CLIP, quick=True),
    Case("pp 2, accumulate 2, clip", 2, {"pp": 2}, trainer={**ACCUMULATE, **CLIP}),
    Case("pp 2, made in configure_model", 2, {"pp": 2}, model("llama", late=True)),
    Case("dp 2, zero 0, made in configure_model", 2, {"zero_stage": 0}, model("llama", late=True)),
    Case("ep 2 in dp 4, zero 0, made in configure_model", 4, {"ep": 2, "zero_stage": 0},
         model("mixtral", late=True), slow=True),
    Case("tp 2, made in configure_model", 2, {"tp": 2}, model("llama-tied", late=True)),
    Case("dp 2, zero 3, made in configure_model", 2, {"zero_stage": 3}, model("qwen3", late=True)),
    Case("dp 2 × tp 2, zero 1", 4, {"tp": 2}),
    Case("dp 2, zero 2, optimizer on the host", 2, {"zero_stage": 2, "offload_optimizer": True}),
    Case("dp 2 × tp 2, zero 3, SP, clip", 4, {"tp": 2, "zero_stage": 3, "sequence_parallel": True}, trainer=CLIP),
    Case("dp 2 × pp 2, zero 0", 4, {"pp": 2, "zero_stage": 0}),
    Case("dp 2 × pp 2, zero 1, accumulate 2", 4, {"pp": 2}, trainer=ACCUMULATE),
    Case("dp 2 × pp 2, zero 2", 4, {"pp": 2, "zero_stage": 2}),
    Case("dp 2 × pp 2, zero 3, interleaved", 4,
         {"pp": 2, "zero_stage": 3, "schedule": "interleaved_1f1b", "virtual_stages": 2}),
    Case("tp 2 × pp 2", 4, {"tp": 2, "pp": 2}, quick=True),
    Case("tp 2 × pp 2, SP, tied, clip", 4, {"tp": 2, "pp": 2, "sequence_parallel": True}, model("llama-tied"), CLIP),
    Case("dp 2 × tp 2 × pp 2, zero 1, tied, clip", 8, {"tp": 2, "pp": 2}, model("llama-tied"), CLIP),
    Case("dp 2 × tp 2 × pp 2, zero 3, SP", 8, {"tp": 2, "pp": 2, "zero_stage": 3, "sequence_parallel": True}),
    Case("dp 2 × tp 2 × pp 2, zero 2, interleaved", 8,
         {"tp": 2, "pp": 2, "zero_stage": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}),
    Case("ep 2, zero 0", 2, {"ep": 2, "zero_stage": 0}, model("mixtral"), quick=True),
    Case("ep 2, zero 1", 2, {"ep": 2}, model("qwen3_moe"), CLIP, quick=True),
    Case("ep 2, zero 3", 2, {"ep": 2, "zero_stage": 3}, model("mixtral"), slow=True),
    Case("ep 2 in dp 4, zero 0", 4, {"ep": 2, "zero_stage": 0}, model("mixtral"), CLIP, slow=True),
    Case("ep 2 in dp 4, zero 1, accumulate 2", 4, {"ep": 2}, model("mixtral"), {**ACCUMULATE, **CLIP}),
    Case("ep 2 in dp 4, zero 2", 4, {"ep": 2, "zero_stage": 2}, model("qwen3_moe"), slow=True),
    Case("ep 2 in dp 4, zero 3, made in configure_model", 4, {"ep": 2, "zero_stage": 3}, model("qwen3_moe", late=True)),
    Case("ep 2, HSDP 2 × 2, zero 1", 4, {"ep": 2, "dp_replicate": 2}, model("mixtral"), CLIP, slow=True),
    Case("ep 4, zero 1", 4, {"ep": 4}, model("mixtral"), CLIP, quick=True, slow=True),
    Case("ep 4, zero 3: deepseek_v3", 4, {"ep": 4, "zero_stage": 3}, model("deepseek_v3"), slow=True),
    Case("ep 2 × tp 2, zero 1", 4, {"ep": 2, "tp": 2}, model("mixtral"), CLIP, slow=True),
    Case("ep 2 × tp 2, zero 3, SP", 4, {"ep": 2, "tp": 2, "zero_stage": 3, "sequence_parallel": True}, model("qwen3_moe")),
    Case("ep 2 in dp 4, zero 1: gpt_oss", 4, {"ep": 2}, model("gpt_oss"), CLIP, slow=True),
    Case("ep 2 × tp 2: gpt_oss, experts with biases cut", 4,
         {"ep": 2, "tp": 2, "plan": EXPERTS_ALONE}, model("gpt_oss"), CLIP, slow=True),
    Case("ep 2 × pp 2, zero 0", 4, {"ep": 2, "pp": 2, "zero_stage": 0}, model("mixtral"), CLIP, slow=True),
    Case("ep 2 × pp 2, zero 1, interleaved", 4,
         {"ep": 2, "pp": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}, model("qwen3_moe")),
    Case("ep 2 in dp 2 × tp 2 × pp 2, zero 1", 8, {"ep": 2, "tp": 2, "pp": 2}, model("mixtral"), CLIP),
    Case("ep 2 in dp 4, zero 2: own MoE", 4, {"ep": 2, "zero_stage": 2}, model("own_moe"), {**ACCUMULATE, **CLIP}),
    Case("ep 2 × tp 2: own MoE", 4, {"ep": 2, "tp": 2}, model("own_moe"), CLIP, slow=True),
    Case("ep 2 × pp 2: own MoE, made in configure_model", 4, {"ep": 2, "pp": 2}, model("own_moe", late=True), CLIP),
    Case("cp 2, ring, zero 1", 2, {"cp": 2}, quick=True),
    Case("cp 2, ulysses, zero 0, clip", 2, {"cp": 2, "context": "ulysses", "zero_stage": 0}, trainer=CLIP, quick=True),
    Case("cp 4, ring, zero 3", 4, {"cp": 4, "zero_stage": 3}, model("qwen3"), slow=True),
    Case("cp 4, ulysses over 2 KV heads", 4, {"cp": 4, "context": "ulysses"}, model("llama-tied"), CLIP),
    Case("dp 2 × cp 2, ring, zero 2, accumulate 2", 4, {"cp": 2, "zero_stage": 2}, trainer={**ACCUMULATE, **CLIP}),
    Case("cp 2 × tp 2, ring", 4, {"cp": 2, "tp": 2}, trainer=CLIP, slow=True),
    Case("cp 2 × tp 2, ulysses, SP", 4, {"cp": 2, "tp": 2, "context": "ulysses", "sequence_parallel": True}, model("qwen3")),
    Case("cp 2 × pp 2, ring, tied", 4, {"cp": 2, "pp": 2}, model("llama-tied"), CLIP),
    Case("cp 2 × pp 2, ulysses, interleaved", 4,
         {"cp": 2, "pp": 2, "context": "ulysses", "schedule": "interleaved_1f1b", "virtual_stages": 2}, slow=True),
    Case("cp 2 × ep 2, ring", 2, {"cp": 2, "ep": 2}, model("mixtral"), CLIP, slow=True),
    Case("cp 2 × ep 4, ulysses, zero 3", 4,
         {"cp": 2, "ep": 4, "context": "ulysses", "zero_stage": 3}, model("qwen3_moe"), slow=True),
    Case("cp 2 × ep 4, ring: own MoE", 4, {"cp": 2, "ep": 4}, model("own_moe"), CLIP),
    Case("cp 2, ring, packed documents", 2, {"cp": 2}, PACKED, quick=True),
    Case("cp 4, ulysses, packed documents", 4, {"cp": 4, "context": "ulysses"}, PACKED, slow=True),
    Case("cp 2 × tp 2, ring, packed documents", 4, {"cp": 2, "tp": 2}, PACKED, slow=True),
    Case("cp 2 × pp 2, ulysses, packed documents", 4, {"cp": 2, "pp": 2, "context": "ulysses"}, PACKED, slow=True),
    Case("HSDP 2 × cp 2, ring, zero 3", 4, {"cp": 2, "dp_replicate": 2, "zero_stage": 3}, trainer=CLIP, slow=True),
    Case("dp 2 × cp 2 × tp 2 × pp 2, ep 2: five axes", 16, {"cp": 2, "tp": 2, "pp": 2, "ep": 2}, model("mixtral"), CLIP),
    Case("decoder: dp 2, zero 3, llama", 2, {"zero_stage": 3}, own("llama-tied", late=True), CLIP),
    Case("decoder: tp 2, SP, olmo2", 2, {"tp": 2, "sequence_parallel": True}, own("olmo2")),
    Case("decoder: tp 2 × pp 2, starcoder2, tied", 4, {"tp": 2, "pp": 2}, own("starcoder2"), CLIP, slow=True),
    Case("decoder: tp 2 × pp 2, SP, qwen3, interleaved", 4,
         {"tp": 2, "pp": 2, "sequence_parallel": True, "schedule": "interleaved_1f1b", "virtual_stages": 2},
         own("qwen3", late=True)),
    Case("decoder: cp 2 × tp 2, ring, packed documents", 4, {"cp": 2, "tp": 2}, own("qwen3", documents=(5, 1, 7, 3))),
    Case("decoder: cp 2 × pp 2, ulysses, llama, biases", 4,
         {"cp": 2, "pp": 2, "context": "ulysses"}, own("llama-bias"), CLIP, slow=True),
    Case("decoder: ep 2 × tp 2, zero 2, qwen3_moe", 4, {"ep": 2, "tp": 2, "zero_stage": 2}, own("qwen3_moe"), CLIP),
    # Made late, for other weights: with those made early a router has a tie, which rounding decides.
    Case("decoder: cp 2 × ep 2 × pp 2, zero 1, mixtral", 4,
         {"cp": 2, "ep": 2, "pp": 2}, own("mixtral", late=True), CLIP, slow=True),
    Case("decoder: dp 2 × tp 2 × pp 2, ep 2, mixtral", 8, {"ep": 2, "tp": 2, "pp": 2}, own("mixtral", late=True), CLIP),
    Case("decoder: tp 4 over 2 KV heads, biases, llama", 4, {"tp": 4}, own("llama-bias", num_key_value_heads=2), CLIP),
    Case("decoder: dp 2 × tp 4 over 2 KV heads, zero 3, qwen3", 8, {"tp": 4, "zero_stage": 3},
         own("qwen3", num_key_value_heads=2), CLIP, slow=True),
    Case("dp 2, zero 3, full recompute", 2, {"zero_stage": 3, "recompute": "full"}, quick=True),
    Case("tp 2 × pp 2, SP, selective recompute", 4, {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "selective"}),
    Case("ep 2 × pp 2, full recompute: qwen3_moe", 4, {"ep": 2, "pp": 2, "recompute": "full"}, model("qwen3_moe"), CLIP),
    Case("decoder: cp 2 × tp 2, selective recompute", 4, {"cp": 2, "tp": 2, "recompute": "selective"},
         own("qwen3", documents=(5, 1, 7, 3))),
    Case("dp 2, zero 3, compiled, full recompute", 2, {"zero_stage": 3, "compile": True, "recompute": "full"}, slow=True),
    Case("decoder: tp 2 × pp 2, SP, compiled", 4, {"tp": 2, "pp": 2, "sequence_parallel": True, "compile": True},
         own("qwen3"), slow=True),
    Case("mamba: dp 2, zero 3", 2, {"zero_stage": 3}, own("mamba"), CLIP),
    Case("mamba: tp 2, SP", 2, {"tp": 2, "sequence_parallel": True}, own("mamba"), CLIP),
    Case("mamba: cp 2 × tp 2, packed documents", 4, {"cp": 2, "tp": 2}, own("mamba", documents=(5, 1, 7, 3)), CLIP),
    Case("mamba: cp 4, packed documents", 4, {"cp": 4}, own("mamba", documents=(3, 1, 12)), CLIP, slow=True),
    Case("mamba2: tp 2, SP, 2 groups", 2, {"tp": 2, "sequence_parallel": True}, own("mamba2"), CLIP),
    Case("mamba2: tp 4 over 2 groups", 4, {"tp": 4}, own("mamba2"), CLIP),
    Case("mamba2: tp 2 × pp 2 over one group, tied", 4, {"tp": 2, "pp": 2}, own("mamba2-one-group"), CLIP),
    Case("mamba2: cp 2 × tp 2, zero 2, packed documents", 4, {"cp": 2, "tp": 2, "zero_stage": 2},
         own("mamba2-one-group", documents=(5, 1, 7, 3)), CLIP),
    Case("mamba2: cp 2 × pp 2, ring", 4, {"cp": 2, "pp": 2, "context": "ring"}, own("mamba2"), CLIP, slow=True),
    *(
        Case(f"{name}: tp 2 × pp 2{', SP' if sp else ''}", 4, {"tp": 2, "pp": 2, "sequence_parallel": sp}, model(name))
        for name, sp in (
            ("llama-bias", True), ("qwen3", True), ("gpt_neox", False), ("phi3", True), ("olmo2", True),
            ("starcoder2", True), ("mixtral", True), ("qwen3_moe", False), ("gemma3_text", True),
        )
    ),
]  # fmt: skip


def train(strategy: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any], out: str) -> dict[str, Any]:
    """Train on this rank; rank 0 keeps losses and norms, the checkpoint keeps the weights."""
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch
    from tiny import TinyLM, loader_of_rank

    import kenotron

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.use_deterministic_algorithms(True, warn_only=True)
    L.seed_everything(1, verbose=False)

    class Keep(L.Callback):
        losses: list[float]
        norms: list[float]

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.losses, self.norms = [], []

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            self.norms.append(float(trainer.strategy.grad_norm(optimizer)))

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    keep = Keep()
    kenotron_strategy = kenotron.KenotronStrategy(**strategy)
    run = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=kenotron_strategy,
        max_epochs=1,
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer,
    )
    layout = kenotron_strategy.layout
    accumulate = trainer.get("accumulate_grad_batches", 1)
    rank = int(os.environ["RANK"])
    loader = loader_of_rank(STEPS * accumulate, GLOBAL_BATCH // accumulate, layout.dp_rank(rank), layout.dp_size)
    run.fit(TinyLM(**model), loader)
    run.save_checkpoint(out)
    return {"losses": keep.losses, "norms": keep.norms}


def deviations(found: dict[str, Any], reference: dict[str, Any], path: str, reference_path: str) -> dict[str, float]:
    """Return the largest relative deviations of losses, norms and weights, and of which tensor."""
    import kenotron

    def largest(a: list[float], b: list[float]) -> float:
        assert len(a) == len(b) > 0
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    weights, expected = kenotron.load_state_dict(path), kenotron.load_state_dict(reference_path)
    assert weights.keys() == expected.keys(), weights.keys() ^ expected.keys()
    by_tensor = {
        name: float((weights[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        for name in expected
        if not any(fnmatch.fnmatch(name, pattern) for pattern in NO_GRADIENT)
    }
    return {
        "loss": largest(found["losses"], reference["losses"]),
        "norm": largest(found["norms"], reference["norms"]),
        "weight": max(by_tensor.values()),
    }


def run_case(pool: RankPool, case: Case, folder: Path, references: dict[str, Any]) -> dict[str, float]:
    """Train a case (and its reference, once) and return its deviations."""
    if case.reference not in references:
        path = str(folder / f"reference-{len(references)}")
        references[case.reference] = pool.run(train, 1, {}, case.model, case.trainer, path)[0], path
    reference, reference_path = references[case.reference]
    path = str(folder / "found")
    found = pool.run(train, case.ranks, case.strategy, case.model, case.trainer, path, timeout_s=300)
    # The metrics that callbacks see are the same on every rank.
    assert all(rank["losses"] == found[0]["losses"] for rank in found), "losses differ between ranks"
    return deviations(found[0], reference, path, reference_path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a selection that takes less than three minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="cases whose name matches this pattern")
    options = parser.parse_args()
    cases = [c for c in CASES if fnmatch.fnmatch(c.name, options.only) and (c.quick or not options.quick)]
    rows, references = [], {}
    head = f"{'layout':<46} {'ranks':>5} {'loss':>9} {'norm':>9} {'weight':>9}"
    print(f"{head}   bars {LOSS_BAR:.0e}, {LOSS_BAR:.0e}, {WEIGHT_BAR:.0e}")
    with tempfile.TemporaryDirectory() as folder, RankPool(max(case.ranks for case in cases)) as pool:
        for case in cases:
            start = time.monotonic()
            try:
                found = run_case(pool, case, Path(folder), references)
            except (RanksFailedError, AssertionError) as error:
                print(f"{case.name:<46} {case.ranks:>5} failed\n{error}", flush=True)
                rows.append({"name": case.name, "ranks": case.ranks, "ok": False, "error": str(error)})
                continue
            ok = found["loss"] <= LOSS_BAR and found["norm"] <= LOSS_BAR and found["weight"] <= WEIGHT_BAR
            cells = " ".join(f"{found[key]:9.1e}" for key in ("loss", "norm", "weight"))
            took = time.monotonic() - start
            print(f"{case.name:<46} {case.ranks:>5} {cells}   {'ok' if ok else 'MISSED'} {took:5.1f} s", flush=True)
            rows.append({"name": case.name, "ranks": case.ranks, "ok": ok, **found})
    missed = [row["name"] for row in rows if not row["ok"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} layouts within the bars. Left out of weights: {', '.join(NO_GRADIENT)}.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

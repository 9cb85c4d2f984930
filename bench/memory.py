"""Host memory of setting up a large model in ``configure_model``: no rank ever holds all of it.

A Llama of 8 GB in fp32 on 4 ranks; the largest resident set of any rank, imports included, must stay under 3.5 GB.

    python bench/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

from kenotron.testing import RankPool

BAR_GB = 3.5
FULL = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 43, "vocab_size": 32000}
#: A fourth of it, and a bar that falls by what the weights do.
QUICK = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 16384}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 4, zero 3": {"zero_stage": 3},
    "tp 4": {"tp": 4},
    "pp 4": {"pp": 4},
    "tp 2 × pp 2": {"tp": 2, "pp": 2},
}


def set_up(strategy: dict[str, Any], model: dict[str, int]) -> tuple[float, float]:
    """Set the model up on this rank. Returns its largest resident set and the size of its weights, both in GB."""
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    import kenotron

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Large(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = LlamaForCausalLM(LlamaConfig(num_attention_heads=16, num_key_value_heads=8, **model))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = Large()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=kenotron.KenotronStrategy(**strategy),
        limit_train_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.zeros(8, 4, dtype=torch.long), batch_size=4))
    from torch.distributed.tensor import DTensor

    sizes = [(p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters()]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, sum(sizes) * 4 / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the model, under three minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    model = QUICK if options.quick else FULL
    rows = []
    for name, strategy in LAYOUTS.items():
        with RankPool(4) as pool:  # new processes: the largest resident set never falls
            found = pool.run(set_up, 4, strategy, model, timeout_s=900)
        weights = sum(size for _, size in found)
        bar = BAR_GB if not options.quick else BAR_GB - (8.0 - weights) / 4
        peak = max(peak for peak, _ in found)
        rows.append({"layout": name, "peak_gb": peak, "weights_gb": weights, "bar_gb": bar, "ok": peak < bar})
        verdict = "ok" if peak < bar else "MISSED"
        print(f"{name:<14} weights {weights:5.2f} GB   peak of a rank {peak:5.2f} GB   bar {bar:.2f}   {verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

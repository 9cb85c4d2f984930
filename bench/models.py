"""Models: training and loading with Kénotron's own, against transformers'.

- training: Decoder and LlamaForCausalLM (SDPA) with the same weights take turns, one optimizer step each, in one process; the
  ratio is of the times of each pair. On a CPU about 50 M parameters in fp32, on CUDA 1 B in bf16 with compiled layers, where
  model FLOPs utilisation counts attention in full (6 per parameter and token, 12 × layers × hidden × length per token).
  Likewise Mamba, smaller: without the kernels for CUDA, transformers' backward pass takes the square of the length.
- loading: 4 processes load a directory in bf16, to train in fp32, with ``from_hf`` under ZeRO 3 and with ``from_pretrained`` in
  each, in turns. The first clock runs from the begin of ``configure_model`` until the strategy has sharded the module, and
  both until each page of the weights has been touched. Peak host memory is what the kernel counted above what a process had
  before, and may exceed a rank's share of the weights by 300 MB. A second row loads them as bf16, where ``from_pretrained``
  maps its files and copies nothing: of that one the memory alone has a bar.

    python bench/models.py [--quick] [--json FILE] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from ratios import spread, verdict

from kenotron.testing import RankPool

#: sizes: 56 M parameters and 2 GB; 1.0 B parameters on a GPU
CPU_MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
GPU_MODEL = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
MAMBA = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 4096}
MAMBA_2 = {**MAMBA, "num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 64}
LOADED_MODEL = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16, "vocab_size": 32000,
}  # fmt: skip
TRAINING_BAR, LOADING_BAR, SLACK = 1 / 1.10, 1.0, 300e6
GPU_BAR, PEAK_FLOPS = 1 / 1.15, 989e12


# ---------------------------------------------------------------------------------------------------------- training


def train(family: str, model: dict[str, int], shape: tuple[int, int], repetitions: int) -> dict[str, Any]:
    """Return the ratios of step times, ours over transformers', and our tokens per second."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import kenotron

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.for_model(family, **model)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # SDPA, where there is attention
        ours = kenotron.from_hf(folder, dtype=dtype)
    contestants = []
    for contestant in (ours, theirs):
        contestant.to(device).train()
        if device.type == "cuda":
            for layer in contestant.base_model.layers:
                layer.compile()
        contestants.append((contestant, torch.optim.AdamW(contestant.parameters(), lr=1e-4, fused=True)))
    ids = torch.randint(0, config.vocab_size, shape, device=device)

    def step(contestant: Any, optimizer: Any) -> float:
        started = time.perf_counter()
        contestant(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(2):
        for contestant in contestants:
            step(*contestant)
    times = [[step(*contestant) for contestant in contestants] for _ in range(repetitions)]
    seconds = sorted(ours for ours, _ in times)[repetitions // 2]
    tokens = shape[0] * shape[1]
    parameters = sum(p.numel() for p in ours.parameters()) - ours.get_input_embeddings().weight.numel()
    attention = 0 if family != "llama" else 12 * model["num_hidden_layers"] * model["hidden_size"] * shape[1]
    utilisation = tokens / seconds * (6 * parameters + attention) / PEAK_FLOPS if device.type == "cuda" else None
    return {**spread([a / b for a, b in times]), "tokens_per_s": tokens / seconds, "mfu": utilisation}


# ----------------------------------------------------------------------------------------------------------- loading


class Meter:
    """Seconds from its making to ``stop``, and by how many bytes the process was larger meanwhile, at its largest."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        gc.collect()  # not in the midst of what is measured
        self._before, self._started = self._status("VmRSS"), time.perf_counter()

    def stop(self, module: Any) -> tuple[float, int]:
        """Touch every page of the weights first."""
        for param in module.parameters():
            getattr(param, "_local_tensor", param).detach().view(-1)[::1024].sum()
        return time.perf_counter() - self._started, self._status("VmHWM") - self._before

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def load_sharded(path: str, dtype: str) -> tuple[float, int]:
    """Load through a strategy, as a user does."""
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch

    import kenotron

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None
            self.took = (0.0, 0)

        def configure_model(self) -> None:
            if self.model is None:
                self.meter = Meter()
                self.model = kenotron.from_hf(path, dtype=getattr(torch, dtype))

        def on_fit_start(self) -> None:
            self.took = self.meter.stop(self)

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="kenotron_zero3", max_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(4, 1)))
    return module.took


def load_whole(path: str, dtype: str) -> tuple[float, int]:
    """Load with transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    meter = Meter()
    return meter.stop(AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)))


def load(model: dict[str, int], dtype: str, repetitions: int) -> dict[str, Any]:
    """Return the ratios of loading times, and the memory of both above a rank's share."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    ranks = 4
    with tempfile.TemporaryDirectory(dir=".") as folder, RankPool(ranks) as pool:
        config = LlamaConfig(**model, num_key_value_heads=model["num_attention_heads"])
        written = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        num_parameters = sum(p.numel() for p in written.parameters())
        written.save_pretrained(folder)
        del written
        rounds = []
        for _ in range(repetitions + 1):
            rounds.append([pool.run(function, ranks, folder, dtype, timeout_s=600) for function in (load_sharded, load_whole)])
    rounds = rounds[1:]  # the first one imports
    ratios = [max(seconds for seconds, _ in ours) / max(seconds for seconds, _ in theirs) for ours, theirs in rounds]
    memory = [max(peak for ours_theirs in rounds for _, peak in ours_theirs[i]) for i in (0, 1)]
    share = num_parameters * getattr(torch, dtype).itemsize / ranks
    seconds = [max(seconds for seconds, _ in by) for by in rounds[-1]]
    return {
        **spread(ratios),
        "gb": 2 * num_parameters / 1e9,
        "seconds": seconds,
        "above_share": memory[0] - share,
        "theirs_above_share": memory[1] - share,
    }


# -------------------------------------------------------------------------------------------------------------- rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, a smaller directory: under three minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", default="*", help="rows whose name matches this pattern")
    options = parser.parse_args()
    import torch

    quick, on_gpu = options.quick, torch.cuda.is_available()
    loaded = {**LOADED_MODEL, "num_hidden_layers": 4} if quick else LOADED_MODEL
    rows: list[tuple[str, float, Any]] = [
        ("training, 56 M, fp32, 4 × 512 tokens", TRAINING_BAR, lambda: train("llama", CPU_MODEL, (4, 512), 5 if quick else 15)),
        ("training, Mamba, fp32, 2 × 128 tokens", 1.0, lambda: train("mamba", MAMBA, (2, 128), 3 if quick else 9)),
        ("training, Mamba-2, fp32, 2 × 512 tokens", 1.0, lambda: train("mamba2", MAMBA_2, (2, 512), 3 if quick else 9)),
        ("loading on 4 ranks, to fp32", LOADING_BAR, lambda: load(loaded, "float32", 3 if quick else 5)),
        ("loading on 4 ranks, as stored", math.inf, lambda: load(loaded, "bfloat16", 3 if quick else 5)),
    ]
    if on_gpu:
        rows[0] = (
            "training, 1.0 B, bf16, compiled, 4 × 4096 tokens",
            GPU_BAR,
            lambda: train("llama", GPU_MODEL, (4, 4096), 20),
        )
    print(f"{'':<50} {'ratio':>6} {'quartiles':>15} {'bar':>6}")
    found = []
    for name, bar, measure in rows:
        if not fnmatch.fnmatch(name, options.only):
            continue
        figures = measure()
        ok = figures["ratio"] <= bar and figures.get("above_share", 0) <= SLACK
        row = {"name": name, "bar": bar, "ok": ok, **figures}
        found.append(row)
        quartiles = f"{row['low']:.3f} – {row['high']:.3f}"
        print(f"{name:<50} {row['ratio']:>6.3f} {quartiles:>15} {bar:>6.3f}  {verdict(row)}", flush=True)
        if "tokens_per_s" in row:
            mfu = f", model FLOPs utilisation {row['mfu']:.1%}" if row["mfu"] else ""
            print(f"    {row['tokens_per_s']:,.0f} tokens/s{mfu}")
        else:
            ours, theirs = (row[key] / 1e6 for key in ("above_share", "theirs_above_share"))
            print(
                f"    {row['gb']:.2f} GB, last round {row['seconds'][0]:.2f} s and {row['seconds'][1]:.2f} s; peak memory of a "
                f"rank above its share: ours {ours:+,.0f} MB, theirs {theirs:+,.0f} MB (bar {SLACK / 1e6:+,.0f} MB)"
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Train a small mixture of experts with expert parallelism, and watch the load of its experts even out.

    python examples/moe/train.py                    # 2 processes, ep=2: each has half of the experts
    python examples/moe/train.py --ep 4 --devices 4

The data are the sources of Python's standard library. Two things even out the load: a balancing loss, and a bias on each
expert's score that moves after every step (``--balance 0`` and ``--bias-rate 0`` turn them off). Writes ``load.png`` and
``load.json`` to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from stdlib_data import StdlibData

import kenotron
from kenotron.models import MoE, MoESettings

SEED, VOCABULARY, LENGTH, BATCH, EXPERTS = 1, 2048, 128, 16, 8


class MoEModule(L.LightningModule):
    """transformers' Mixtral with Kénotron's MoE layers. Nothing in it knows of experts on other ranks."""

    def __init__(self, balance: float, bias_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=0,
        )
        self.model = MixtralForCausalLM(config)
        settings = MoESettings(
            hidden=96, intermediate=160, num_experts=EXPERTS, top_k=2, balance_coefficient=balance, bias_rate=bias_rate
        )
        for layer in self.model.model.layers:
            layer.mlp = MoE(settings)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.1)


class LoadHistory(L.Callback):
    """Asks the strategy every few steps how evenly the experts were used, and keeps the answers."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[int] = []
        self.loads: dict[str, list[list[float]]] = {}
        self.imbalance: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every:
            return
        assert isinstance(trainer.strategy, kenotron.KenotronStrategy)
        found = trainer.strategy.expert_loads()  # on all ranks: it sums over them
        self.steps.append(trainer.global_step)
        for name, load in found.items():
            self.loads.setdefault(name, []).append(load.load.tolist())
            self.imbalance.setdefault(name, []).append(float(load.imbalance))
        if trainer.is_global_zero:
            worst = ", ".join(f"{values[-1]:.2f}" for values in self.imbalance.values())
            loss, entropy = float(trainer.callback_metrics["loss"]), [float(load.router_entropy) for load in found.values()]
            print(
                f"step {self.steps[-1]:>4}   loss {loss:.3f}   greatest load / mean by layer: {worst}   "
                f"router entropy {sum(entropy) / len(entropy):.2f} nats",
                flush=True,
            )


def draw(history: LoadHistory, path: Path) -> None:
    """Draw each layer's loads over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(history.loads), figsize=(4 * len(history.loads), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for layer, (axis, loads) in enumerate(zip(axes[0], history.loads.values(), strict=True)):
        for expert, shares in enumerate(zip(*loads, strict=True)):
            axis.plot(history.steps, [100 * share for share in shares], linewidth=1.2, label=f"expert {expert}")
        axis.axhline(100 / len(loads[0]), color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"layer {layer}", xlabel="step", ylim=(0, None))
    axes[0][0].set_ylabel("share of the tokens [%]")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=130)


def main() -> None:
    options = parse_options()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*treespec, LeafSpec.*", ".*have no `validation_step`.*"):
        warnings.filterwarnings("ignore", message=message)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    L.seed_everything(SEED, verbose=False)
    history = LoadHistory(every=options.every)
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=options.devices,
        strategy=kenotron.KenotronStrategy(ep=options.ep),
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = StdlibData(options.out / "data", vocabulary=VOCABULARY, sequence_length=LENGTH, batch_size=BATCH, seed=SEED)
    trainer.fit(MoEModule(options.balance, options.bias_rate), data)
    if trainer.is_global_zero:
        draw(history, options.out / "load.png")
        (options.out / "load.json").write_text(json.dumps({"steps": history.steps, "loads": history.loads}))
        first, last = (max(values[i] for values in history.imbalance.values()) for i in (0, -1))
        print(f"\ngreatest load / mean, worst layer: {first:.2f} → {last:.2f} (1 is even, {EXPERTS} the worst)")
        print(f"plot         {options.out / 'load.png'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the loads (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--ep", type=int, default=2, help="expert-parallel ranks (default: %(default)s)")
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the balancing loss (default: %(default)s)")
    parser.add_argument("--bias-rate", type=float, default=0.003, help="step of the experts' biases (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/moe"), help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How evenly routers spread tokens over experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning as L
import torch

from kenotron.callbacks.summary import EveryNSteps, Recorder
from kenotron.strategies.training import Training


class MoELoad(Recorder):
    """Log what the experts of each layer got since the last log, over all ranks, from ``strategy.expert_loads()``.

    - ``moe/<layer>/imbalance``: the greatest load over the mean one: 1 is even, the number of experts the worst.
    - ``moe/<layer>/idle_experts``: how many got less than a tenth of the mean.
    - ``moe/<layer>/dropped_percent``: pairs of token and expert beyond an expert's capacity.
    - ``moe/<layer>/router_entropy_nats``: where a router's logits were seen.
    - ``moe/max_imbalance``, ``moe/mean_imbalance``, ``moe/dropped_percent``: over the layers. These are in the table.

    Args:
        every_n_train_steps: optimizer steps between two of them.

    Raises:
        ValueError: the strategy is not ``KenotronStrategy``, or the model has no experts.
    """

    better: ClassVar[Mapping[str, Literal["max", "min"]]] = {
        "max_imbalance": "min", "mean_imbalance": "min", "dropped_percent": "min",
    }  # fmt: skip

    def __init__(self, every_n_train_steps: int = 50) -> None:
        super().__init__()
        self._turn = EveryNSteps(every_n_train_steps)

    def is_in_table(self, name: str) -> bool:
        """Not each layer."""
        return name.count("/") == 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that count no loads."""
        if stage == "fit" and not isinstance(trainer.strategy, Training):
            raise ValueError(
                f"MoELoad logs what KenotronStrategy counts, and the strategy is {type(trainer.strategy).__name__}. Set "
                "strategy='kenotron', or leave the callback out."
            )

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Begin to count anew."""
        self._turn.begin(trainer)
        if not trainer.strategy.expert_loads():
            raise ValueError("MoELoad: the model has no experts that KenotronStrategy knows. Leave the callback out.")

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        """Log after every n-th optimizer step."""
        if not self._turn.is_due(trainer):
            return
        loads = trainer.strategy.expert_loads()  # all ranks
        if not trainer.is_global_zero:
            return
        # One copy to the host for all layers.
        rows = [
            torch.stack([load.imbalance, (load.load * load.load.numel() < 0.1).sum(), load.dropped, load.router_entropy])
            for load in loads.values()
        ]
        values: dict[str, float] = {}
        figures = torch.stack(rows).tolist()
        for name, (imbalance, idle, dropped, entropy) in zip(loads, figures, strict=True):
            values |= {f"moe/{name}/imbalance": imbalance, f"moe/{name}/idle_experts": idle}
            values[f"moe/{name}/dropped_percent"] = 100 * dropped
            if entropy == entropy:  # NaN: no logits were seen
                values[f"moe/{name}/router_entropy_nats"] = entropy
        imbalances = [row[0] for row in figures]
        values |= {"moe/max_imbalance": max(imbalances), "moe/mean_imbalance": sum(imbalances) / len(imbalances)}
        values["moe/dropped_percent"] = 100 * sum(row[2] for row in figures) / len(figures)
        self.record(trainer, values)

"""The perplexity of each validation corpus, each of its tokens counted once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from kenotron.data.loader import ValidationLoader
from kenotron.data.rows import IGNORED
from kenotron.strategies._lightning import validation_loaders


class Perplexity(L.Callback):
    """Log the mean loss and the perplexity of each validation corpus: ``val_loss/<corpus>`` and ``perplexity/<corpus>``.

    Works with any module whose ``validation_step`` returns its loss: the mean over the labels of its batch, or
    ``{"loss": sum, "num_tokens": count}``. Means are weighted by labels and taken over all ranks, so that they do not depend on
    the layout or on batch sizes. Batches must have ``shift_labels``, as :class:`kenotron.TokenData` makes them, or ``labels``,
    which are taken as those of a model that shifts by itself. Loaders of :class:`kenotron.TokenData` tell the names;
    others are numbered.

    Raises:
        ValueError: a step returned no loss on any rank, or a batch has no labels.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._sums = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, unless it is one that another rank has as well."""
        total = self._sums.setdefault(dataloader_idx, torch.zeros(2, dtype=torch.float64, device=_device(pl_module)))
        loader = _loaders(trainer)[dataloader_idx]
        if outputs is None or (isinstance(loader, ValidationLoader) and not loader.counts(batch_idx)):
            return  # stages of a pipeline before the last have no loss
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if isinstance(outputs, Mapping) and "num_tokens" in outputs:
            count = torch.as_tensor(outputs["num_tokens"], device=total.device).double()
            added = loss.double()
        else:
            count = _num_labels(batch).double()
            added = torch.where(count > 0, loss.double() * count, 0.0)  # a mean over nothing is no number
        total += torch.stack([added.reshape(()), count.reshape(())])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what all ranks have together."""
        if trainer.sanity_checking:
            return
        loaders = _loaders(trainer)
        sums = torch.zeros(len(loaders), 2, dtype=torch.float64, device=_device(pl_module))
        for index, total in self._sums.items():
            sums[index] = total
        if dist.is_initialized() and trainer.world_size > 1:
            # Ranks of one (pp, cp, tp) block add the same, so that the ratio is that of the data-parallel ranks.
            dist.all_reduce(sums, group=dist.group.WORLD)
        told = []
        for index, (loss, count) in enumerate(sums.tolist()):
            if not count:
                raise ValueError(
                    f"Perplexity: no validation_step of {type(pl_module).__name__} returned a loss. Return the mean over the "
                    "labels, or {'loss': sum, 'num_tokens': count}."
                )
            loader = loaders[index]
            name = loader.name if isinstance(loader, ValidationLoader) else str(index)
            mean = loss / count
            values = {f"val_loss/{name}": mean, f"perplexity/{name}": math.exp(mean) if mean < 700 else math.inf}
            pl_module.log_dict(values, rank_zero_only=False, add_dataloader_idx=False)
            told.append(f"{name} {values[f'perplexity/{name}']:.4g}")
        rank_zero_info(f"step {trainer.global_step}: perplexity {', '.join(told)}")


def _device(pl_module: L.LightningModule) -> torch.device:
    # Sums in float64, which MPS has not.
    return pl_module.device if pl_module.device.type != "mps" else torch.device("cpu")


def _loaders(trainer: L.Trainer) -> list[Any]:
    loaders: Any = validation_loaders(trainer)
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _num_labels(batch: Any) -> Tensor:
    if isinstance(batch, Mapping) and isinstance(batch.get("shift_labels"), Tensor):
        return (batch["shift_labels"] != IGNORED).sum()
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return (batch["labels"][:, 1:] != IGNORED).sum()
    raise ValueError(
        "Perplexity: a validation batch has neither shift_labels nor labels to count. Return {'loss': sum, 'num_tokens': "
        "count} from validation_step."
    )

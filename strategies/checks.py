"""Modules and callbacks that can't go with a layout, refused before anything is cut or trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from kenotron.parallel.apply import Parallelized


def check_pipelined(module: Any, pp: int, *, overrides_backward: bool) -> None:
    """Raise ``ValueError`` where a module does by itself what a pipeline does."""
    if not module.automatic_optimization:
        raise ValueError(
            f"pp={pp} with manual optimization: forward and backward of a pipeline are interleaved, so they "
            "can't be called by hand. Set automatic_optimization = True, or pp=1."
        )
    if overrides_backward:
        raise ValueError(
            f"pp={pp} runs backward inside of the pipeline and would bypass {type(module).__name__}.backward. "
            "Remove the override, or set pp=1."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(f"pp={pp} splits batches; training_step(dataloader_iter) has none. Take a batch.")


def check_callbacks(callbacks: Iterable[Any], done: Parallelized) -> None:
    """Raise ``ValueError`` for those that copy the module before it is cut, and meet the parts later."""
    layout = done.layout
    if done.sharded is None and layout.tp == layout.pp == layout.ep == 1:
        return
    for callback in callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if kinds & {"StochasticWeightAveraging", "WeightAveraging"}:
            raise ValueError(
                f"{type(callback).__name__} averages whole modules, and here every rank has parts of the parameters. Set "
                "zero_stage=0 (strategy='kenotron_ddp'), or average in a callback of your own, over pl_module.parameters()."
            )

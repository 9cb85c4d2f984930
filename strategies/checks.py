"""Settings, modules and callbacks that can't go together, refused before anything is cut or trained."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kenotron.layout import ParallelLayout
from kenotron.parallel.apply import Parallelized
from kenotron.parallel.shards import successor


def no_such_setting(owner: str, name: str, known: Sequence[str]) -> str:
    """Say that ``owner`` has no setting of that name, and which one is near it, or all that it has."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"the nearest is {near[0]}" if near else f"known are {', '.join(known)}"
    return f"{owner} has no setting {name}; {hint}."


def with_known_names(make: Callable[..., None]) -> Callable[..., None]:
    """Let an ``__init__`` name the nearest setting where it is given one that it does not have.

    The wrapped one raises ``ValueError`` for it.
    """
    known = [name for name in inspect.signature(make).parameters if name != "self"]

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                raise ValueError(no_such_setting(type(self).__name__, name, known))
        make(self, *args, **settings)

    return checked


def check_compiled(module: Any, layout: ParallelLayout, is_compiled: bool) -> None:
    """Raise ``ValueError`` for a module that ``torch.compile`` returned where its layers are changed afterwards."""
    if is_compiled and not layout.keeps_whole_parameters:
        raise ValueError(
            f"torch.compile({type(module).__name__}) with {layout.table(max_rows=0)}: its steps are compiled as a whole, and "
            "here its layers are cut or sharded after that. Pass the module as it is and set compile=True, which compiles each "
            "block, or set tp=pp=cp=ep=1 and zero_stage to 0, 1 or 2."
        )


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


def adopt_optimizer(optimizer: Any, done: Parallelized, world_size: int) -> None:
    """Let an optimizer that was made before the module was sharded train what has replaced its parameters.

    Raises:
        ValueError: it holds others than the module's, which would be trained on each rank alone and saved by none.
    """
    own = done.names()
    for group in optimizer.param_groups:
        found = [successor(param) for param in group["params"]]
        for old, new in zip(group["params"], found, strict=True):
            if new is not old and old in optimizer.state:
                optimizer.state.pop(old)  # of a step before, for the whole parameter
        group["params"][:] = found  # in place: wrappers and LBFGS hold the list
        foreign = [tuple(param.shape) for param in found if id(param) not in own]
        if foreign and world_size > 1:
            raise ValueError(
                f"{type(optimizer).__name__} has {len(foreign)} parameters that are none of the LightningModule's (shapes "
                f"{', '.join(map(str, foreign[:4]))}{', …' if len(foreign) > 4 else ''}). Make them nn.Parameters of the "
                "module, and make the optimizer in configure_optimizers, from self.parameters()."
            )


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
                "zero_stage=1 with tp=pp=ep=1, or average in a callback of your own, over pl_module.parameters()."
            )

"""Who may look at whole gradients. Where nobody does, each rank keeps its parts alone, and half the bytes travel.

A hook that runs between a backward pass and its update sees gradients, whatever its code calls. After an update they are gone
where ranks keep parts (``param.grad`` is ``None``), so of all other code it matters whether it speaks of gradients.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

#: Of the module and of callbacks: between a backward pass and the next `zero_grad`.
HOOKS = (
    "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "clip_gradients", "optimizer_step",
    "on_before_zero_grad", "optimizer_zero_grad",
)  # fmt: skip

#: Packages whose code looks at no gradient of the user's, but through the strategy.
_KNOWN = ("lightning", "pytorch_lightning", "kenotron", "torch", "torchmetrics", "transformers", "builtins")

#: Names in code that have to do with gradients, and with none in particular.
_HARMLESS = {
    "requires_grad", "requires_grad_", "no_grad", "enable_grad", "set_grad_enabled", "is_grad_enabled", "zero_grad",
    "accumulate_grad_batches", "gradient_checkpointing", "gradient_checkpointing_enable", "gradient_clip_val",
    "gradient_clip_algorithm",
}  # fmt: skip


def who_looks(module: Any, callbacks: Iterable[Any], plugin: Any) -> str | None:
    """Return who may look at whole gradients, in words; ``None``: nobody.

    Args:
        module: the LightningModule. plugin: of precision.
    """
    if not module.automatic_optimization:
        return "manual optimization"
    for holder in (module, *callbacks):
        for name in HOOKS:
            if hasattr(holder, name) and _is_users(holder, name):
                return f"{type(holder).__name__}.{name}"
    for cls in dict.fromkeys(type(each) for each in (plugin, *callbacks, *module.modules())):
        if found := _speaks_of_gradients(cls):
            return found
    for name, param in module.named_parameters():
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        if any(not _is_known(getattr(hook, "__module__", None) or "") for hook in hooks.values()):
            return f"a hook on the gradient of {name}"
    return None


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN


def _is_users(holder: Any, name: str) -> bool:
    """Tell whether a hook is the user's: set on the object, or by a class of theirs."""
    if name in vars(holder):
        return True
    return any(not _is_known(cls.__module__) for cls in type(holder).__mro__ if name in vars(cls))


def _speaks_of_gradients(cls: type) -> str | None:
    """Return a method of the user's that names gradients of anything."""
    for each in cls.__mro__:
        if _is_known(each.__module__):
            continue
        for name, value in vars(each).items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and any("grad" in word for word in _words(function.__code__)):
                return f"{each.__name__}.{name}"
    return None


def _words(code: types.CodeType) -> Iterator[str]:
    yield from (name for name in code.co_names if name not in _HARMLESS)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
        elif constant == "grad":  # getattr(param, "grad")
            yield constant

"""Who may look at whole gradients. Where nobody does, each rank keeps its parts alone, and half the bytes travel.

A hook that runs between a backward pass and its update sees gradients, whatever its code calls. After an update they are gone
where ranks keep parts (``param.grad`` is ``None``), so of all other code it matters whether it speaks of gradients: code of the
user's classes, and of the functions, classes and objects that it names in turn.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

#: Of the module and of callbacks: between a backward pass and the next `zero_grad`.
HOOKS = (
    "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "clip_gradients", "optimizer_step",
    "on_before_zero_grad", "optimizer_zero_grad",
)  # fmt: skip

#: Packages whose code looks at no gradient of the user's, but through the strategy.
_KNOWN = {
    "lightning",
    "pytorch_lightning",
    "kenotron",
    "torch",
    "torchmetrics",
    "transformers",
    "numpy",
    *sys.stdlib_module_names,
}

#: What gradients are called: ``grad``, ``log_grads``, ``meanGradient``; not ``upgrade``.
_GRADIENTS = re.compile("(^|_)grad|Grad")

#: How many classes and functions are read.
_MOST = 2000

#: Lightning's callbacks that let the optimizer step without a backward pass, by the gradients of the step before.
_STEPS_AGAIN = ("StochasticWeightAveraging",)

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
    for callback in callbacks:
        if type(callback).__name__ in _STEPS_AGAIN:
            return type(callback).__name__
    for holder in (module, *callbacks):
        for name in HOOKS:
            if hasattr(holder, name) and _is_users(holder, name):
                return f"{type(holder).__name__}.{name}"
    holders = (plugin, *callbacks, *module.modules())
    kept = [value for each in holders for value in vars(each).values()]  # helpers that hooks may call
    if found := _Code().who_speaks([*map(type, holders), *map(type, kept), *kept]):
        return found
    for name, param in module.named_parameters():
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        if any(not _is_known(getattr(hook, "__module__", None) or "") for hook in hooks.values()):
            return f"a hook on the gradient of {name}"
    return None


def _is_known(module: str) -> bool:
    return module != "__main__" and module.partition(".")[0] in _KNOWN


def _is_users(holder: Any, name: str) -> bool:
    """Tell whether a hook is the user's: set on the object, or by a class of theirs."""
    if name in vars(holder):
        return True
    return any(not _is_known(cls.__module__) for cls in type(holder).__mro__ if name in vars(cls))


class _Code:
    """Walks through the user's code."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def who_speaks(self, start: Iterable[Any]) -> str | None:
        """Return who names gradients of anything: a class's method or a function, among these and what they name."""
        waiting: list[tuple[str, Any]] = [("", each) for each in dict.fromkeys(each for each in start if _is_code(each))]
        while waiting:
            where, found = waiting.pop()
            if id(found) in self._seen or _is_known(getattr(found, "__module__", None) or ""):
                continue
            self._seen.add(id(found))
            if len(self._seen) > _MOST:
                return f"{where}, with more code behind it than is read"
            if isinstance(found, type):
                waiting += [("", base) for base in found.__mro__[1:]]
                for name, value in vars(found).items():
                    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                    if isinstance(function, types.FunctionType):
                        waiting.append((f"{found.__name__}.{name}", function))
                continue
            where = where or found.__qualname__
            words = list(_words(found.__code__))
            if any(_GRADIENTS.search(word) for word in words):
                return where
            waiting += [(where if isinstance(each, types.FunctionType) else "", each) for each in _named(found, words)]
        return None


def _is_code(value: Any) -> bool:
    return isinstance(value, type | types.FunctionType)


def _named(function: types.FunctionType, words: list[str]) -> Iterator[Any]:
    """Yield the functions and classes that a function's names stand for, also as attributes of modules."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    for value in [*cells, *(function.__globals__.get(word) for word in words)]:
        if isinstance(value, types.ModuleType) and not _is_known(value.__name__):
            yield from (inner for word in words if _is_code(inner := vars(value).get(word)))
        elif _is_code(value):
            yield value
        elif value is not None and not isinstance(value, types.ModuleType):
            yield type(value)


def _words(code: types.CodeType) -> Iterator[str]:
    yield from (name for name in code.co_names if name not in _HARMLESS)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # getattr(param, "grad")
            yield constant

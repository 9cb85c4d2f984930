"""Strategies by name and settings, as one word: ``ddp``, ``kenotron:tp=2,pp=2``, ``my.package.MyStrategy:option=1``."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

#: Short names of what Lightning's registry leaves out.
_FURTHER = {"model_parallel": "lightning.pytorch.strategies.ModelParallelStrategy"}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A strategy to make.

    Args:
        name: one that is registered with Lightning, or an import path. settings: of its constructor.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def parse_spec(text: str) -> Spec:
    """Return what ``name:key=value,key=value`` says; values are YAML.

    Raises:
        ValueError: a setting without ``=``, or a value that is no YAML.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in _parts(rest):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{text!r}: {part!r} is no setting. Write name:key=value,key=value, as in kenotron:tp=2,pp=2.")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r}: the value of {key.strip()} can't be read: {error}") from error
    return Spec(name=name.strip(), settings=settings)


def _parts(text: str) -> list[str]:
    """Return what commas separate, but not those within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def check_spec(text: str) -> Spec:
    """Return the specification of a strategy that is known.

    Raises:
        ValueError: no strategy has that name; the nearest one is named.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    spec = parse_spec(text)
    known = sorted({*StrategyRegistry.available_strategies(), *_FURTHER})
    if "." not in spec.name and spec.name.lower() not in known:
        near = difflib.get_close_matches(spec.name.lower(), known, n=1, cutoff=0.5)
        hint = f"The nearest is {near[0]!r}" if near else f"Known are {', '.join(known)}"
        raise ValueError(f"{spec.name!r} is no strategy. {hint}; a class of your own is given by its import path.")
    return spec


def make_strategy(text: str, instead: Mapping[Any, Any] | None = None) -> Any:
    """Return the strategy that one word describes.

    Args:
        text: name and settings. instead: classes, and what is made in their place.

    Raises:
        ValueError: an unknown name, or settings that can't be.
    """
    from kenotron.strategies.checks import no_such_setting

    spec = check_spec(text)
    make, defaults = _maker(spec.name)
    known = settings_of(spec.name)
    for name in spec.settings.keys() - set(known):
        raise ValueError(f"{text!r}: {no_such_setting(spec.name, name, known)}")
    try:
        return (instead or {}).get(make, make)(**{**defaults, **spec.settings})
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}") from error


def settings_of(name: str) -> tuple[str, ...]:
    """Return the names of the settings of a strategy that is known by name."""
    from kenotron.strategies import KenotronStrategy

    made = _maker(name)[0]
    return parameters_of(made if inspect.isclass(made) or "." in name else KenotronStrategy)  # ours are made lazily


@functools.cache
def parameters_of(kind: Any) -> tuple[str, ...]:
    """Return the names of what a class (or a function that makes an object) takes, those passed on by ``**kwargs`` included."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    if inspect.isclass(kind):
        parser.add_class_arguments(kind, fail_untyped=False)
    else:
        parser.add_function_arguments(kind, fail_untyped=False)
    return tuple(dict.fromkeys(key.partition(".")[0] for key in parser.get_defaults().keys()))  # noqa: SIM118


def _maker(name: str) -> tuple[Any, dict[str, Any]]:
    """Return what makes a strategy, and the settings that its name stands for."""
    from lightning.pytorch.strategies import StrategyRegistry

    name = _FURTHER.get(name.lower(), name)
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute), {}
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the strategy {name} can't be imported: {error}") from error
    entry = StrategyRegistry[name.lower()]
    return entry["strategy"], dict(entry["init_params"])

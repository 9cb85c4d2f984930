"""Keys of a configuration that nobody knows, each with the nearest one that is known at its place.

The tree of a configuration: parsers know the top; a mapping with ``class_path`` is that class, and ``init_args`` its
parameters; where a parameter is a dataclass, its fields are keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from kenotron.compare.strategies import parameters_of, parse_spec, settings_of

#: Options whose values are import paths of classes.
_CLASSES = {"model", "data", "optimizer", "lr_scheduler", *(f"trainer.{key}" for key in ("strategy", "callbacks", "logger"))}
#: What a mapping with ``class_path`` may have besides.
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def unknown_keys(config: Mapping[str, Any], parser: ArgumentParser) -> list[str]:
    """Return a sentence for each key of ``config`` that ``parser``, or a class that it names, does not know."""
    return list(_in_sections(config, parser))


def unknown_options(given: Sequence[str], config: Mapping[str, Any], parser: ArgumentParser) -> list[str]:
    """Return a sentence for each option of the command line that ``parser``, or a class of the configuration, does not know.

    Args:
        given: the options. config: what they change, the classes of its sections named.
    """
    tree: dict[str, Any] = {}
    problems = []
    for index, word in enumerate(given):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or ("." not in name and name not in _CLASSES):
            continue
        if not equals:
            value = given[index + 1] if index + 1 < len(given) else ""
        problem = _put(tree, name.removesuffix("+").split("."), value, config, name.removesuffix("+"), is_added=name[-1] == "+")
        problems += [] if problem is None else [problem]
    told = problems + unknown_keys(tree, parser)
    return told if any(".init_args." in word for word in given) else [each.replace(".init_args.", ".") for each in told]


def _put(
    node: dict[str, Any], path: Sequence[str], value: str, config: Any, name: str, *, is_added: bool = False
) -> str | None:
    """Put an option's value to its place, through the classes that are named there: ``--data.x`` is ``data.init_args.x``.

    Returns what is wrong with it, if anything.
    """
    key, rest = path[0], path[1:]
    there = config.get(key) if isinstance(config, Mapping) else None
    if not rest:
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            read = value
        is_class = isinstance(read, str) and "." in read.partition(":")[0] and (is_added or name in _CLASSES)
        made = {"class_path": read} if is_class and ":" not in read else read
        node[key] = [made] if is_added else made
        return None
    if isinstance(there, list):  # further settings are those of the last one
        there = there[-1] if there else None
    inner = node.setdefault(key, {})
    inner = inner[-1] if isinstance(inner, list) else inner
    if isinstance(there if inner == {} else inner, str):
        return f"  {name}: settings of a strategy that is named are written with its name, as kenotron:tp=2,pp=2."
    if not isinstance(inner, dict):
        return None
    named = inner.get("class_path") or (there.get("class_path") if isinstance(there, Mapping) else None)
    if named is None or rest[0] in _CLASS_KEYS[::2]:
        return _put(inner, rest, value, there, name, is_added=is_added)
    inner["class_path"] = named
    known = there.get("init_args") if isinstance(there, Mapping) and there.get("class_path") == named else None
    rest = rest[1:] if rest[0] == "init_args" else rest
    return _put(inner.setdefault("init_args", {}), rest, value, known, name, is_added=is_added) if rest else None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return which of the known names is meant, ``None`` where none is like it."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    if found:
        return by_lower[found[0]]
    begun = [each for lower, each in by_lower.items() if len(lower) > 2 and (lower in name.lower() or name.lower() in lower)]
    return min(begun, key=len, default=None)


def _in_sections(config: Mapping[str, Any], parser: ArgumentParser) -> Iterator[str]:
    sections: dict[str, list[str]] = {}
    for key in parser.get_defaults().keys():  # noqa: SIM118  # a Namespace
        section, _, name = key.partition(".")
        sections.setdefault(section, []).extend([name.partition(".")[0]] if name else [])
    sections.setdefault("config", [])
    yield from _unknown(config, sections, "")
    for section, names in sections.items():
        value = config.get(section)
        if not isinstance(value, Mapping) or "class_path" in value or not names:
            yield from _within(value, section)
            continue
        yield from _unknown(value, names, section)
        hints = _trainer_hints() if section == "trainer" else {}
        for name, item in value.items():
            yield from _within(item, f"{section}.{name}", hints.get(name))
        if section == "trainer":
            yield from _strategy(value.get("strategy"))


def _unknown(given: Iterable[Any], known: Iterable[str], where: str) -> Iterator[str]:
    known = list(known)
    for key in given:
        if str(key) in known:
            continue
        near = nearest(str(key), known)
        place = f"{where}.{key}" if where else str(key)
        hint = f"the nearest is {near}" if near else f"known are {', '.join(sorted(known))}"
        yield f"  {place} is not known; {hint}."


def _within(value: Any, where: str, hint: Any = None) -> Iterator[str]:
    """Yield what is not known in a value of any kind."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _within(item, f"{where}[{index}]", hint)
    elif isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        yield from _unknown(value, _CLASS_KEYS, where)
        yield from _in_class(value["class_path"], value.get("init_args"), where)
    elif isinstance(value, Mapping):
        kinds = list(_dataclasses_in(hint))
        if len(kinds) == 1 and not _takes_mappings(hint):
            yield from _in_class(f"{kinds[0].__module__}.{kinds[0].__qualname__}", value, where, is_class=False)


def _in_class(class_path: str, given: Any, where: str, *, is_class: bool = True) -> Iterator[str]:
    try:
        kind = _import(class_path)
    except (ImportError, AttributeError) as error:
        if is_class and "." in class_path:
            yield f"  {where}.class_path: {class_path} can't be imported: {error}.{_nearest_class(class_path)}"
        return  # a bare name is looked up by jsonargparse among the classes that it knows
    if not isinstance(given, Mapping):
        return
    place = f"{where}.init_args" if is_class else where
    yield from _unknown(given, parameters_of(kind), place)
    hints = _hints(kind)
    for name, item in given.items():
        yield from _within(item, f"{place}.{name}", hints.get(str(name)))


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    if not module:
        raise ImportError(f"{class_path} names no module")
    return getattr(importlib.import_module(module), name)


def _nearest_class(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return ""
    near = nearest(name, [each for each in dir(found) if inspect.isclass(getattr(found, each, None))])
    return f" The nearest is {module}.{near}." if near else ""


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind.__init__ if inspect.isclass(kind) else kind)
    except (NameError, TypeError, AttributeError):  # names that are there for type checkers alone
        return {}


@functools.cache
def _trainer_hints() -> dict[str, Any]:
    import lightning

    return _hints(lightning.Trainer)


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses_in(part)


def _takes_mappings(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return True
    return any(_takes_mappings(part) for part in typing.get_args(hint))


def _strategy(value: Any) -> Iterator[str]:
    """Yield what is wrong with a strategy's short name."""
    if not isinstance(value, str) or "." in value.partition(":")[0]:
        return
    from lightning.pytorch.strategies import StrategyRegistry

    known = ["auto", *StrategyRegistry.available_strategies()]
    name = value.partition(":")[0].lower()
    if name not in known:
        near = nearest(name, known)
        hint = f"the nearest is {near}" if near else f"known are {', '.join(known)}"
        yield f"  trainer.strategy: {value!r} is not known; {hint}."
    elif ":" in value:
        yield from _unknown(parse_spec(value).settings, settings_of(name), "trainer.strategy")

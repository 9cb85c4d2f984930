"""Everything in a checkpoint that is not a tensor of the model: typed values as JSON, nothing that can run code.

None, bool, int, finite float, str, list and a dict of texts are themselves. All else is an object with one key that
begins with ``$``: ``{"$tuple": [1, 2]}``. Tensors and numpy arrays go into the shards, and the JSON holds their names.
What is not in the table below is refused, or with ``allow_pickle`` stored apart as a pickle and marked as one. What not even
pickle can hold is then left out, as pickles are by who reads without ``allow_pickle``: the key of a dict, or None in a list.

Some types come back simpler than they went: an Enum that is an int or a str as that value, a ``Parameter`` as a plain
tensor on the CPU. Aliasing is not kept: a value that is reached twice is stored twice.
"""

from __future__ import annotations

import base64
import datetime
import enum
import json
import math
import pathlib
import re
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint import pickles
from kenotron.checkpoint.errors import ChecksumError, ManifestDamagedError, PickleRefusedError, UnpicklingError
from kenotron.checkpoint.format import DTYPE_NAMES, check_is_plain

#: Encodes a value that stands inside another one, given the step that leads to it.
Below = Callable[[Any, str], Any]
#: Decodes a node that stands inside another one, given the step that leads to it.
Inner = Callable[[Any, str], Any]

#: Stands for a value that is left out.
_LEFT_OUT: Any = type("_LeftOut", (), {})()

_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
_PATHS = {kind.__name__: kind for kind in (pathlib.Path, pathlib.PurePosixPath, pathlib.PureWindowsPath)}
#: numpy kinds whose bytes are the value: bool, integers, floats, complex, times and texts; not objects and records.
_NUMPY_KINDS = "biufcmMSU"
_NUMPY_DTYPE = re.compile(rf"[<>|][{_NUMPY_KINDS}]\d{{1,9}}(\[\w+\])?")
#: By name, and not by `getattr`: of torch's attributes some are modules that are imported when they are asked for.
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_JSON_INT = 2**63


@dataclass
class Attachments:
    """What an encoded structure refers to: tensors for the shard, pickles for files of their own.

    Attributes:
        stored: by ``id``, parameters that the checkpoint holds whole, and their names there: pickles refer to them.
        left_out: what not even pickle can hold: where it is, and why.
    """

    tensor_prefix: str = "state/"
    pickle_prefix: str = "pickle-"
    stored: Mapping[int, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pickles: dict[str, bytes] = field(default_factory=dict)

    def add_tensor(self, tensor: torch.Tensor) -> str:
        """Return the name that the tensor is stored under."""
        name = f"{self.tensor_prefix}{len(self.tensors)}"
        self.tensors[name] = tensor
        return name

    def cut(self, num_tensors: int, num_pickles: int) -> None:
        """Forget all but the first ones."""
        self.tensors = dict(list(self.tensors.items())[:num_tensors])
        self.pickles = dict(list(self.pickles.items())[:num_pickles])

    def add_pickle(self, data: bytes) -> str:
        """Return the file that the pickle is stored in."""
        name = f"{self.pickle_prefix}{len(self.pickles)}.bin"
        self.pickles[name] = data
        return name


def encode(value: Any, attachments: Attachments, *, allow_pickle: bool = False) -> Any:
    """Return ``value`` as what ``json.dumps`` takes.

    Args:
        value: nested values.
        attachments: receives the tensors, and the pickles where they are allowed.
        allow_pickle: pickle what no type of the table fits, and leave out what can't be pickled, instead of refusing it.

    Raises:
        ValueError: a value that cannot be stored; the text tells where it is, its type and what to do.
    """
    node = _Encoder(attachments, allow_pickle).encode(value, ())
    return None if node is _LEFT_OUT else node


def decode(
    node: Any,
    load_tensor: Callable[[str], torch.Tensor],
    load_pickle: Callable[[str], bytes],
    *,
    allow_pickle: bool = False,
    left_out: list[str] | None = None,
) -> Any:
    """Return the value that ``encode`` was given.

    Args:
        node: what ``encode`` returned, after a trip through JSON.
        load_tensor: returns a tensor by the name that ``Attachments`` gave it.
        load_pickle: returns the content of a pickle's file.
        allow_pickle: load pickles, which can run any code.
        left_out: receives where a pickle is that was left out because ``allow_pickle`` is False; None: refuse it.

    Raises:
        PickleRefusedError: there is a pickle, ``allow_pickle`` is False and ``left_out`` None.
        ChecksumError: a pickle is not the one that was stored.
        UnpicklingError: a pickle needs a class that is not there, or fails otherwise.
        ManifestDamagedError: the node is nothing that ``encode`` returns.
    """
    decoder = _Decoder(load_tensor, load_pickle, allow_pickle, left_out)
    try:
        value = decoder.decode(node, ())
        return None if value is _LEFT_OUT else value
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ManifestDamagedError(f"the state is not one that was encoded: {type(error).__name__}: {error}") from error


class StoredPickle(NamedTuple):
    """A pickle that an encoded structure refers to: its file, what type it holds, and the CRC-32C of the file."""

    file: str
    type: str
    crc32c: int


def pickles_in(node: Any) -> Iterator[StoredPickle]:
    """Yield the pickles that a node refers to, in no particular order, without loading any.

    Raises:
        ManifestDamagedError: the node is nothing that ``encode`` returns.
    """
    nodes = [node]
    while nodes:
        current = nodes.pop()
        if isinstance(current, list):
            nodes += current
        elif isinstance(current, dict) and "$pickle" not in current:
            nodes += current.values()
        elif isinstance(current, dict):
            try:
                content = current["$pickle"]
                yield StoredPickle(content["file"], content["type"], content["crc32c"])
            except (KeyError, TypeError) as error:
                raise ManifestDamagedError(f"the state is not one that was encoded: {current!r:.80}") from error


def tensors_in(node: Any) -> Iterator[str]:
    """Yield the names of the tensors that a node refers to, without those of its pickles."""
    nodes = [node]
    while nodes:
        current = nodes.pop()
        if isinstance(current, list):
            nodes += current
        elif isinstance(current, dict):
            nodes += current.values()
            yield from (name for tag in ("$tensor", "$ndarray") if isinstance(name := current.get(tag), str))


class _ContainsItself(Exception):
    """A value was reached from inside of itself."""


class _Encoder:
    def __init__(self, attachments: Attachments, allow_pickle: bool) -> None:
        self._attachments = attachments
        self._allow_pickle = allow_pickle
        self._open: set[int] = set()

    def encode(self, value: Any, where: tuple[str, ...]) -> Any:
        if isinstance(value, enum.Enum) and isinstance(value, int | str):
            value = value.value
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is float and math.isfinite(value):
            return value
        if kind is int and -_JSON_INT <= value < _JSON_INT:
            return value
        if id(value) in self._open:
            if self._allow_pickle:
                raise _ContainsItself(id(value))
            raise ValueError(f"cannot store {_at(where)}: it contains itself")
        self._open.add(id(value))
        counts = len(self._attachments.tensors), len(self._attachments.pickles)
        try:
            return self._encode_tagged(value, where)
        except _ContainsItself as met:
            if met.args != (id(value),):
                raise
            self._attachments.cut(*counts)
            return self._pickle(value, where)
        finally:
            self._open.remove(id(value))

    def _encode_tagged(self, value: Any, where: tuple[str, ...]) -> Any:
        def below(inner: Any, step: str) -> Any:
            return self.encode(inner, (*where, step))

        if type(value) is list:
            return _as_items(value, below)
        if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
            found = ((key, below(item, key)) for key, item in value.items())
            return {key: item for key, item in found if item is not _LEFT_OUT}
        if isinstance(value, torch.Tensor):
            return self._encode_tensor(value, where)
        if type(value) is np.ndarray and (tensor := _as_tensor(value)) is not None:
            return {"$ndarray": self._attachments.add_tensor(tensor)}
        tag = _tag_of(value)
        if tag is None:
            return self._pickle(value, where)
        return {f"${tag}": _CODECS[tag].encode(value, below)}

    def _encode_tensor(self, tensor: torch.Tensor, where: tuple[str, ...]) -> Any:
        try:
            check_is_plain(tensor, _at(where))
            if tensor.dtype not in DTYPE_NAMES:
                raise ValueError(f"cannot store {_at(where)}: safetensors has no dtype for {tensor.dtype}")
        except ValueError:
            if not self._allow_pickle:
                raise
            return self._pickle(tensor, where)
        return {"$tensor": self._attachments.add_tensor(tensor.detach())}

    def _pickle(self, value: Any, where: tuple[str, ...]) -> Any:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if not self._allow_pickle:
            raise ValueError(
                f"cannot store {_at(where)}: a checkpoint holds no {name}. Make it of plain values (numbers, texts, "
                f"lists, dicts, tensors), or pass allow_pickle=True, which loading then takes too and can run code"
            )
        try:
            data = pickles.dump(value, self._attachments.add_tensor, self._attachments.stored)
        except Exception as error:  # of the value's own code, which can raise anything
            self._attachments.left_out.append(f"{_at(where)} ({name}: {error})")
            return _LEFT_OUT
        return {"$pickle": {"file": self._attachments.add_pickle(data), "type": name, "crc32c": crc32c(data)}}


class _Decoder:
    def __init__(
        self,
        load_tensor: Callable[[str], torch.Tensor],
        load_pickle: Callable[[str], bytes],
        allow_pickle: bool,
        left_out: list[str] | None,
    ) -> None:
        self._load_tensor = load_tensor
        self._load_pickle = load_pickle
        self._allow_pickle = allow_pickle
        self._left_out = left_out

    def decode(self, node: Any, where: tuple[str, ...]) -> Any:
        def inner(item: Any, step: str) -> Any:
            return self.decode(item, (*where, step))

        if isinstance(node, list):
            return _decoded_items(node, inner)
        if not isinstance(node, dict):
            return node
        tag = next(iter(node), "")
        if not tag.startswith("$"):
            found = ((key, inner(item, key)) for key, item in node.items())
            return {key: item for key, item in found if item is not _LEFT_OUT}
        ((_, content),) = node.items()
        if tag == "$tensor":
            return self._load_tensor(content)
        if tag == "$ndarray":
            return self._load_tensor(content).numpy()
        if tag == "$pickle":
            return self._unpickle(content, where)
        return _CODECS[tag.removeprefix("$")].decode(content, inner)

    def _unpickle(self, content: Any, where: tuple[str, ...]) -> Any:
        file, kind = content["file"], content["type"]
        if not self._allow_pickle and self._left_out is not None:
            self._left_out.append(f"{_at(where)} ({kind})")
            return _LEFT_OUT
        if not self._allow_pickle:
            raise PickleRefusedError(
                f"{file} holds a {kind} as a pickle, which can run code; pass allow_pickle=True if you trust its origin"
            )
        data = self._load_pickle(file)
        if crc32c(data) != content["crc32c"]:
            raise ChecksumError(f"{file}, which holds a {kind}, does not have its checksum; load another checkpoint")
        try:
            return pickles.load(data, self._load_tensor)
        except Exception as error:  # a pickle runs foreign code, which can raise anything
            raise UnpicklingError(f"{file}, which holds a {kind}, cannot be unpickled: {error!r}") from error


def _at(where: tuple[str, ...]) -> str:
    return " → ".join(where) or "the state"


def _as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """Return a copy of the array as a tensor, None where a shard has no dtype for it."""
    try:
        tensor = torch.from_numpy(array.copy(order="C"))
    except (TypeError, ValueError):  # no torch dtype (texts, times), or another byte order
        return None
    return tensor if tensor.dtype in DTYPE_NAMES else None


def _tag_of(value: Any) -> str | None:
    kind = type(value)
    if isinstance(value, np.generic) or kind is np.ndarray:
        return "numpy" if value.dtype.kind in _NUMPY_KINDS else None
    if kind is datetime.datetime and type(value.tzinfo) not in (type(None), datetime.timezone):
        return None  # a named zone is more than its offset
    if kind is defaultdict and value.default_factory not in (None, *_FACTORIES.values()):
        return None
    return _TAGS.get(kind)


def _as_items(value: Any, below: Below) -> list[Any]:
    found = (below(item, f"[{i}]") for i, item in enumerate(value))
    return [None if item is _LEFT_OUT else item for item in found]


def _decoded_items(content: Any, inner: Inner) -> list[Any]:
    found = (inner(item, f"[{i}]") for i, item in enumerate(content))
    return [None if item is _LEFT_OUT else item for item in found]


def _from_items(build: Callable[[list[Any]], Any]) -> Callable[[Any, Inner], Any]:
    return lambda content, inner: build(_decoded_items(content, inner))


def _as_sorted_items(value: Any, below: Below) -> list[Any]:
    found = (below(item, f"element {item!r}") for item in value)
    return sorted((item for item in found if item is not _LEFT_OUT), key=json.dumps)  # the same file each time


def _from_elements(build: Callable[[list[Any]], Any]) -> Callable[[Any, Inner], Any]:
    return lambda content, inner: build([item for each in content if (item := inner(each, "element")) is not _LEFT_OUT])


def _as_pairs(value: Any, below: Below) -> list[Any]:
    found = ([below(key, f"key {key!r}"), below(item, str(key))] for key, item in value.items())
    return [[key, item] for key, item in found if key is not _LEFT_OUT and item is not _LEFT_OUT]


def _from_pairs(build: Callable[[list[tuple[Any, Any]]], Any]) -> Callable[[Any, Inner], Any]:
    def pairs(content: Any, inner: Inner) -> Iterator[tuple[Any, Any]]:
        for key, item in content:
            key = inner(key, "key")
            item = inner(item, key if isinstance(key, str) else f"[{key!r:.40}]")
            if key is not _LEFT_OUT and item is not _LEFT_OUT:
                yield key, item

    return lambda content, inner: build(list(pairs(content, inner)))


def _as_bounds(value: Any, below: Below) -> list[Any]:
    return _as_items((value.start, value.stop, value.step), below)


def _as_numpy(value: Any, below: Below) -> Any:
    array = np.asarray(value)
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "scalar": isinstance(value, np.generic), "data": data}


def _from_numpy(content: Any, inner: Inner) -> Any:
    if not _NUMPY_DTYPE.fullmatch(content["dtype"]):  # numpy's own parser takes more, and evaluates some of it
        raise ValueError(f"the numpy dtype {content['dtype']!r:.80} is not one that is stored")
    array = np.frombuffer(base64.b64decode(content["data"]), np.dtype(content["dtype"])).reshape(content["shape"]).copy()
    return array[()] if content["scalar"] else array


def _as_default_dict(value: Any, below: Below) -> Any:
    factory = value.default_factory
    return {"factory": factory and factory.__name__, "items": _as_pairs(value, below)}


def _from_default_dict(content: Any, inner: Inner) -> Any:
    factory = content["factory"] and _FACTORIES[content["factory"]]
    return _from_pairs(lambda pairs: defaultdict(factory, pairs))(content["items"], inner)


def _from_device(content: Any, inner: Inner) -> torch.device:
    try:
        return torch.device(content)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


class _Codec(NamedTuple):
    """How the values of some types become JSON, and the way back."""

    types: tuple[type, ...]
    encode: Callable[[Any, Below], Any]
    decode: Callable[[Any, Inner], Any]


#: The specification of these, tag by tag, is in docs/checkpoint-format.md.
_CODECS: dict[str, _Codec] = {
    "int": _Codec((int,), lambda v, _: hex(v), lambda c, _: int(c, 16)),
    "float": _Codec((float,), lambda v, _: str(v), lambda c, _: float(c)),
    "complex": _Codec(
        (complex,), lambda v, below: _as_items((v.real, v.imag), below), _from_items(lambda parts: complex(*parts))
    ),
    "bytes": _Codec((bytes,), lambda v, _: base64.b64encode(v).decode(), lambda c, _: base64.b64decode(c)),
    "tuple": _Codec((tuple,), _as_items, _from_items(tuple)),
    "dict": _Codec((dict,), _as_pairs, _from_pairs(dict)),
    "OrderedDict": _Codec((OrderedDict,), _as_pairs, _from_pairs(OrderedDict)),
    "Counter": _Codec((Counter,), _as_pairs, _from_pairs(lambda pairs: Counter(dict(pairs)))),  # MultiStepLR has one
    "defaultdict": _Codec((defaultdict,), _as_default_dict, _from_default_dict),
    "set": _Codec((set,), _as_sorted_items, _from_elements(set)),
    "frozenset": _Codec((frozenset,), _as_sorted_items, _from_elements(frozenset)),
    "deque": _Codec(
        (deque,),
        lambda v, below: {"maxlen": v.maxlen, "items": _as_items(v, below)},
        lambda c, inner: deque(_decoded_items(c["items"], inner), c["maxlen"]),
    ),
    "range": _Codec((range,), _as_bounds, _from_items(lambda bounds: range(*bounds))),
    "slice": _Codec((slice,), _as_bounds, _from_items(lambda bounds: slice(*bounds))),
    "path": _Codec(
        (type(pathlib.Path()), pathlib.PurePosixPath, pathlib.PureWindowsPath),
        lambda v, _: ["Path" if isinstance(v, pathlib.Path) else type(v).__name__, str(v)],
        lambda c, _: _PATHS[c[0]](c[1]),
    ),
    "datetime": _Codec(
        (datetime.datetime,),
        lambda v, _: [v.isoformat(), v.fold],
        lambda c, _: datetime.datetime.fromisoformat(c[0]).replace(fold=c[1]),
    ),
    "date": _Codec((datetime.date,), lambda v, _: v.isoformat(), lambda c, _: datetime.date.fromisoformat(c)),
    "timedelta": _Codec(
        (datetime.timedelta,), lambda v, _: [v.days, v.seconds, v.microseconds], lambda c, _: datetime.timedelta(*c)
    ),
    "Namespace": _Codec(
        (Namespace,), lambda v, below: _as_pairs(vars(v), below), _from_pairs(lambda pairs: Namespace(**dict(pairs)))
    ),
    "Size": _Codec((torch.Size,), lambda v, _: list(v), lambda c, _: torch.Size(c)),
    "dtype": _Codec((torch.dtype,), lambda v, _: str(v).removeprefix("torch."), lambda c, _: _DTYPES[c]),
    "device": _Codec((torch.device,), lambda v, _: str(v), _from_device),
    "numpy": _Codec((np.ndarray, np.generic), _as_numpy, _from_numpy),
}
_TAGS = {kind: tag for tag, codec in _CODECS.items() for kind in codec.types}

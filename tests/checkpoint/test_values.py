from __future__ import annotations

import argparse
import datetime
import enum
import json
import math
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint import ChecksumError, ManifestDamagedError, PickleRefusedError, UnpicklingError
from kenotron.checkpoint.values import Attachments, decode, encode

UTC = datetime.UTC
VALUES: list[Any] = [
    None,
    True,
    0,
    -(2**63),
    2**63,
    10**400,
    0.1,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    math.inf,
    -math.inf,
    "text → \ud800 \x00 $",
    [],
    [1, [2.0, "3"]],
    (),
    (1, (2, [3])),
    {},
    {"b": 1, "a": 2},
    {"$tuple": [1]},
    {1: "int", "1": "text", 1.5: "float", (1, "a"): "tuple", None: "none", b"k": "bytes", frozenset({1}): "set"},
    OrderedDict([("b", 1), (2, "a")]),
    Counter({30: 1, 80: 0}),
    defaultdict(list, {"a": [1]}),
    defaultdict(None, {"a": 1}),
    {3, 1, 2},
    {"x", 1, None},
    frozenset({(1, 2)}),
    b"",
    bytes(range(256)),
    complex(1.5, -math.inf),
    pathlib.Path("/a/b.ckpt"),
    pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("c:\\a"),
    datetime.datetime(2024, 2, 29, 1, 2, 3, 456789),
    datetime.datetime(2024, 2, 29, fold=1, tzinfo=UTC),
    datetime.date(2024, 2, 29),
    datetime.timedelta(days=-1, microseconds=3),
    argparse.Namespace(lr=1e-3, betas=(0.9, 0.95)),
    np.float32(0.1),
    np.float64(0.1),
    np.int64(-3),
    np.bool_(True),
    np.str_("a"),
    np.datetime64("2024-02-29"),
    torch.Size([2, 3]),
    torch.bfloat16,
    torch.device("cuda", 1),
    deque([1, 2], maxlen=5),
    deque(),
    range(1, 10, 3),
    slice(None, 3, None),
]


def there_and_back(value: Any, *, allow_pickle: bool = False) -> Any:
    found = Attachments()
    text = json.dumps(encode(value, found, allow_pickle=allow_pickle), allow_nan=False)
    return decode(json.loads(text), found.tensors.__getitem__, found.pickles.__getitem__, allow_pickle=allow_pickle)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{value!r:.30}")
def test_values_come_back_with_their_type(value: Any) -> None:
    for nested, unwrap in ((value, lambda it: it), ({"a": [(value,)]}, lambda it: it["a"][0][0])):
        found = unwrap(there_and_back(nested))
        assert type(found) is type(value)
        assert found == value
        assert repr(found) == repr(value)


def test_nan_and_order_and_metadata_come_back() -> None:
    assert math.isnan(there_and_back(math.nan))
    assert list(there_and_back({"z": 1, "a": 2, 3: 4})) == ["z", "a", 3]
    assert there_and_back(defaultdict(list))["new"] == []
    assert there_and_back(deque([1], maxlen=5)).maxlen == 5
    assert there_and_back(datetime.datetime(2024, 1, 1, fold=1)).fold == 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint16).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3))[:, ::-1],
        np.array(3.5),
        np.zeros((0, 2), dtype=np.int8),
        np.array([True, False]),
        np.array(["a", "bcd"]),
        np.array(["2024-02-29"], dtype="M8[s]"),
        np.arange(3, dtype=">i4"),
        np.array([1 + 2j]),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_numpy_arrays_come_back_equal(array: np.ndarray) -> None:
    found = there_and_back([array])[0]
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert np.array_equal(found, array)
    found.reshape(-1)[:1] = found.reshape(-1)[:1]  # writable


def test_tensors_are_kept_apart_from_the_json() -> None:
    found = Attachments(tensor_prefix="rank_state/3/")
    node = encode({"rng": torch.arange(3), "p": [torch.nn.Parameter(torch.ones(2))]}, found)
    assert node == {"rng": {"$tensor": "rank_state/3/0"}, "p": [{"$tensor": "rank_state/3/1"}]}
    assert torch.equal(found.tensors["rank_state/3/0"], torch.arange(3))
    assert not found.tensors["rank_state/3/1"].requires_grad


def test_an_enum_of_text_or_integers_is_stored_as_its_value() -> None:
    class Colour(enum.StrEnum):
        RED = "red"

    class Level(enum.IntEnum):
        LOW = 1

    assert there_and_back([Colour.RED, Level.LOW, {Colour.RED: 1}]) == ["red", 1, {"red": 1}]


class Foreign:
    """A class that no checkpoint knows."""

    def __init__(self, number: int = 7) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Foreign) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]


class Holder:
    def __init__(self, *values: Any) -> None:
        self.values = values


class Plain(enum.Enum):
    A = 1


@pytest.mark.parametrize(
    "value",
    [
        Foreign(),
        Plain.A,
        print,
        object(),
        np.array([object()]),
        np.ma.masked_array([1]),
        np.zeros(2, dtype="i4,f4"),
        type("Sub", (dict,), {})(),
        type("Sub", (str,), {})("a"),
        defaultdict(lambda: 1),
        datetime.datetime(2024, 1, 1, tzinfo=type("Zone", (datetime.tzinfo,), {})()),
        torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused_with_their_place_type_and_the_way_out(value: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot store callbacks → ModelCheckpoint → foo → \[1\]: ") as caught:
        there_and_back({"callbacks": {"ModelCheckpoint": {"foo": [0, value]}}})
    assert type(value).__qualname__ in str(caught.value)
    assert "allow_pickle=True" in str(caught.value)


def test_keys_are_refused_with_their_place() -> None:
    with pytest.raises(ValueError, match=r"cannot store a → key <object object at"):
        there_and_back({"a": {object(): 1}})


def test_tensors_that_no_shard_can_hold_are_refused_with_their_place() -> None:
    with pytest.raises(ValueError, match=r"cannot store a → z: safetensors has no dtype for torch\.complex128"):
        there_and_back({"a": {"z": torch.zeros(1, dtype=torch.complex128)}})
    with pytest.raises(ValueError, match="a → z: only dense tensors"):
        there_and_back({"a": {"z": torch.eye(2).to_sparse()}})


def test_a_value_that_contains_itself_is_refused_and_one_met_twice_is_not() -> None:
    shared = [1]
    assert there_and_back([shared, shared]) == [[1], [1]]
    shared.append(shared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot store a → \[1\]: it contains itself"):
        there_and_back({"a": shared})


def test_pickles_are_stored_apart_and_loaded_only_when_allowed() -> None:
    found = Attachments()
    node = encode({"a": 1, "b": Foreign(3)}, found, allow_pickle=True)
    assert node["b"]["$pickle"]["file"] == "pickle-0.bin"
    assert decode(node, {}.__getitem__, found.pickles.__getitem__, allow_pickle=True) == {"a": 1, "b": Foreign(3)}
    with pytest.raises(PickleRefusedError, match=r"pickle-0\.bin holds a .*Foreign as a pickle"):
        decode(node, {}.__getitem__, found.pickles.__getitem__)
    with pytest.raises(ChecksumError, match=r"pickle-0\.bin"):
        decode(node, {}.__getitem__, lambda name: b"x" + found.pickles[name][1:], allow_pickle=True)


def test_what_cannot_be_pickled_is_left_out_and_named() -> None:
    found = Attachments()
    value = {"f": lambda: 1, "in": ({"g": lambda: 2, "h": 3}, lambda: 4), "pairs": {1: lambda: 5, 2: 6}}
    node = encode(value, found, allow_pickle=True)
    assert decode(node, {}.__getitem__, {}.__getitem__) == {"in": ({"h": 3}, None), "pairs": {2: 6}}
    assert [text.partition(" (")[0] for text in found.left_out] == ["f", "in → [0] → g", "in → [1]", "pairs → 1"]


def test_pickles_are_left_out_and_named_where_they_are_not_trusted() -> None:
    found = Attachments()
    value = {"a": Foreign(), "b": [Foreign(), 1], "c": {(1, 2): Foreign(), "d": 2}, "e": {Plain.A, 5}}
    node, left_out = encode(value, found, allow_pickle=True), list[str]()
    opened = decode(node, {}.__getitem__, {}.__getitem__, left_out=left_out)
    assert opened == {"b": [None, 1], "c": {"d": 2}, "e": {5}}
    assert sorted(text.partition(" (")[0] for text in left_out) == ["a", "b → [0]", "c → [(1, 2)]", "e → element"]


def test_tensors_of_pickles_lie_in_the_shard_and_share_memory_as_they_did() -> None:
    layer, stored = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(2))
    whole = torch.arange(6.0)
    value = {"a": [slice(0, 1), Holder(layer, whole, whole[2:4], stored, torch.zeros(1, dtype=torch.complex128))]}
    value["a"].append(value)  # only pickle can hold what contains itself
    found = Attachments(stored={id(stored): "model/stored"})
    node = encode(value, found, allow_pickle=True)
    tensors = {**found.tensors, "model/stored": torch.full((2,), 7.0)}
    assert "model/stored" not in found.tensors and len(found.pickles) == 1
    back = decode(node, tensors.__getitem__, found.pickles.__getitem__, allow_pickle=True)
    assert back["a"][2] is back
    held = back["a"][1].values
    assert torch.equal(held[0].weight, layer.weight) and held[3].tolist() == [7.0, 7.0]
    held[2].fill_(-1)
    assert held[1].tolist() == [0, 1, -1, -1, 4, 5] and held[4].dtype == torch.complex128


def test_what_cannot_be_unpickled_is_told() -> None:
    found = Attachments()
    node = encode([Foreign()], found, allow_pickle=True)
    name, data = next(iter(found.pickles.items()))
    gone = data.replace(b"Foreign", b"Forgone")
    node[0]["$pickle"]["crc32c"] = crc32c(gone)
    with pytest.raises(UnpicklingError, match=r"pickle-0\.bin.*Forgone"):
        decode(node, {}.__getitem__, {name: gone}.__getitem__, allow_pickle=True)


@pytest.mark.parametrize(
    "node",
    [
        {"$unknown": 1},
        {"$tuple": 1},
        {"$tuple": [], "$set": []},
        {"$tensor": "nowhere"},
        {"$tensor": ["a"]},
        {"$float": "one"},
        {"$dict": [[1]]},
        {"$dict": [[{"$dict": []}, 1]]},
        {"$dtype": "load"},
        {"$device": "moon"},
        {"$path": ["Popen", "a"]},
        {"$defaultdict": {"factory": "eval", "items": []}},
        {"$numpy": {"dtype": "|O", "shape": [], "scalar": True, "data": ""}},
        {"$numpy": {"dtype": "<f4", "shape": [10**12], "scalar": False, "data": ""}},
        {"$timedelta": [10**30, 0, 0]},
        {"$pickle": {}},
    ],
    ids=str,
)
def test_nodes_that_were_never_encoded_are_refused(node: Any) -> None:
    with pytest.raises(ManifestDamagedError):
        decode({"a": node}, {}.__getitem__, {}.__getitem__, allow_pickle=True)


def test_nodes_without_end_are_refused() -> None:
    node: Any = []
    for _ in range(100_000):
        node = [node]
    with pytest.raises(ManifestDamagedError, match="RecursionError"):
        decode(node, {}.__getitem__, {}.__getitem__)

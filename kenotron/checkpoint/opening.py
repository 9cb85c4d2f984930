"""Open a checkpoint of any layout as ``torch.load`` opens Lightning's: one dictionary, whole tensors on the CPU.

``kenotron._autoload`` lets ``torch.load`` and Lightning's own loading functions come here where the path is a directory of
this format, and nothing else of theirs changes.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from kenotron.checkpoint import entries
from kenotron.checkpoint.asynchronous import wait_for
from kenotron.checkpoint.load import load_state, load_state_dict
from kenotron.checkpoint.manifest import Manifest, read_manifest

_MODEL = "model/"


def is_trusted(weights_only: bool | None) -> bool:
    """Tell whether a caller of ``torch.load`` lets the file run code: with ``weights_only=False``, as torch takes it.

    ``None`` is torch's and Lightning's default, which is True. torch's environment variables count here as there.
    """
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0") in _YES:
        return False
    if weights_only is None:
        return os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0") in _YES
    return not weights_only


_YES = ("1", "y", "yes", "true")


def what_was_left_out(path: Any, left_out: list[str]) -> str:
    """Return the text of a warning about pickles that were not opened."""
    shown = "; ".join(left_out[:8]) + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
    return (
        f"{path} is loaded without what only pickle can hold, which can run code: {shown}. Pass weights_only=False if you "
        "trust where the checkpoint comes from."
    )


def open_checkpoint(path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
    """Return Lightning's dictionary: ``state_dict``, ``optimizer_states`` as torch's optimizers have them, and all else.

    Of a checkpoint that no trainer saved: its tensors by their names. A save to ``path`` that is under way in this process is
    waited for.

    Args:
        map_location: as of ``torch.load``; None leaves tensors on the CPU.
        weights_only: False also loads what only pickle can hold, which can run code.

    Raises:
        CheckpointError: it is damaged or none.
    """
    wait_for(path)
    manifest, left_out = read_manifest(path), list[str]()
    saved = load_state(manifest, allow_pickle=is_trusted(weights_only), left_out=left_out)
    if left_out:
        warnings.warn(what_was_left_out(path, left_out), stacklevel=3)
    if "lightning" not in saved:
        return _moved(load_state_dict(manifest, ""), map_location)
    found = {**load_state_dict(manifest, _MODEL), **saved.get("extra_state", {})}
    names = [name for name in saved.get("names") or () if name in found]
    state_dict = {name: found[name] for name in dict.fromkeys([*names, *found])}
    checkpoint = {**saved["lightning"], "state_dict": state_dict}
    if saved.get("optimizers") is not None:
        checkpoint["optimizer_states"] = optimizer_states(manifest, saved)
    return _moved(checkpoint, map_location)


def optimizer_states(manifest: Manifest, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the state dicts of a training's optimizers.

    Args:
        saved: the shared state.
    """
    found = []
    for index, groups in enumerate(saved["optimizers"]):
        of_groups: list[list[str]] = (saved.get("optimizer_parameters") or {index: [[] for _ in groups]})[index]
        kept: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for full_name, tensor in load_state_dict(manifest, f"optimizer.{index}/").items():
            name, _, key = full_name.rpartition("/")
            kept[name][key] = tensor
        numbers = {name: number for number, name in enumerate(chain.from_iterable(of_groups))}
        counter = iter(range(len(list(chain.from_iterable(of_groups)))))
        found.append(
            {
                "state": {number: entries.join(kept[name]) for name, number in numbers.items() if name in kept},
                "param_groups": [
                    {**group, "params": [next(counter) for _ in names]} for group, names in zip(groups, of_groups, strict=True)
                ],
            }
        )
    return found


def _moved(checkpoint: dict[str, Any], map_location: Any) -> dict[str, Any]:
    if map_location is None:
        return checkpoint
    if callable(map_location):

        def move(tensor: torch.Tensor) -> torch.Tensor:
            storage = map_location(tensor.untyped_storage(), "cpu")
            return tensor if storage is None else tensor.to(storage.device)
    else:
        target = map_location.get("cpu", "cpu") if isinstance(map_location, Mapping) else map_location

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(target)

    moved: dict[int, torch.Tensor] = {}  # tied weights stay one tensor

    def move_once(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = move(tensor)
        return moved[id(tensor)]

    return {key: _map_tensors(move_once, value) for key, value in checkpoint.items()}


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    found: Any = tree_map_only(torch.Tensor, function, value)
    return found

"""What a model is made of: its blocks, which of them are alike, and a thin copy that holds one of each kind.

Built on the meta device. Blocks repeat: a model of 126 like layers is traced as one of one.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kenotron.files import read_regular
from kenotron.hf.configuration import refused
from kenotron.models.own import Implementation, build
from kenotron.parallel import stages
from kenotron.parallel.expert import find_experts
from kenotron.parallel.init import meta_device
from kenotron.parallel.plan import ParallelPlan, find_plan, pipeline_hints, transformers_models


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the planner sees it.

    Args:
        name: for tables. prototype: on the meta device, with one block of each kind; the others are skipped. Never run as it
            is.
        blocks: name of the list of like layers. kinds: of each block, numbers from 0.
        units: of the whole model, with their costs, as a pipeline is cut by them.
        num_parameters: of the whole model, tied ones once.
        plan: what tensor parallelism does to it; None: it can't be split so.
        vocabulary, hidden: sizes, 0 if the model does not tell. kv_size: of keys (as of values) of a token in a layer.
        num_experts, top_k: of a layer, 0 for a dense model. num_expert_blocks: blocks that have experts.
        is_tied: embedding and head are one matrix.
    """

    name: str
    prototype: nn.Module
    blocks: str
    kinds: tuple[int, ...]
    units: stages.Units
    num_parameters: int
    plan: ParallelPlan | None
    vocabulary: int = 0
    hidden: int = 0
    kv_size: int = 0
    num_experts: int = 0
    top_k: int = 0
    num_expert_blocks: int = 0
    is_tied: bool = False
    _cuts: dict[int, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_blocks(self) -> int:
        return len(self.kinds)

    def stage_of_blocks(self, num_stages: int) -> tuple[int, ...]:
        """Return the stage of each block, as the pipeline is cut. Kept: of a hundred blocks it takes a second.

        Raises:
            ValueError: there are fewer blocks than stages.
        """
        if num_stages not in self._cuts:
            first = self.units.first_block
            self._cuts[num_stages] = stages.balance(self.units, num_stages)[first : first + self.num_blocks]
        return self._cuts[num_stages]

    @property
    def representatives(self) -> tuple[int, ...]:
        """Index of the first block of each kind."""
        return tuple(self.kinds.index(kind) for kind in range(max(self.kinds) + 1))

    @staticmethod
    def of(module: nn.Module, name: str = "", plan: ParallelPlan | None = None, blocks: str | None = None) -> ModelSpec:
        """Describe a module whose ``forward(input_ids=…, labels=…)`` returns an object with a ``loss``.

        Args:
            module: on any device; it is not changed. plan, blocks: as for ``KenotronStrategy``.

        Raises:
            ValueError: it has no list of like layers.
        """
        found = find_plan(module, plan)
        block_list = stages.find_blocks(module, blocks or (found.blocks if found else None), pipeline_hints(module))
        children = list(module.get_submodule(block_list).children())
        signatures = _signatures(children)
        order = list(dict.fromkeys(signatures))
        kinds = tuple(order.index(signature) for signature in signatures)
        config = getattr(module, "config", None)
        experts = find_experts(module)
        aliases = [p for names in _names_by_parameter(module).values() if len(names) > 1 for p in names]
        return ModelSpec(
            name=name or type(module).__name__,
            prototype=_thin(module, block_list, kinds),
            blocks=block_list,
            kinds=kinds,
            units=stages.find_units(module, block_list),
            num_parameters=sum(p.numel() for p in module.parameters()),
            plan=found,
            vocabulary=int(getattr(config, "vocab_size", 0) or _vocabulary(module)),
            hidden=int(getattr(config, "hidden_size", 0) or 0),
            kv_size=_kv_size(config),
            num_experts=max((int(m.num_experts) for m in experts.values()), default=0),  # type: ignore[arg-type]
            top_k=int(getattr(config, "num_experts_per_tok", 0) or (2 if experts else 0)),
            num_expert_blocks=len(experts),
            is_tied=bool(aliases),
        )

    @staticmethod
    def load(source: str | Path, dtype: torch.dtype = torch.float32) -> ModelSpec:
        """Describe the model of a transformers configuration (its directory or JSON file), or of an import path.

        Args:
            source: ``"path/to/config.json"``, its directory, or ``"package.module:name"``: a module, a configuration, or what
                returns one of them when it is called.

        Raises:
            ValueError: there is no such thing.
        """
        found = _find(str(source))
        with meta_device(dtype):
            if callable(found) and not isinstance(found, nn.Module):
                found = found()
            found = _inside(found) if isinstance(found, nn.Module) else build_model(found)
        return ModelSpec.of(found, name_of(source))


def build_model(config: Any, implementation: Implementation = "auto") -> nn.Module:
    """Return the causal language model of a transformers configuration, ours where it covers it. On the device at hand."""
    model: nn.Module = build(config, implementation)
    return model


def _inside(module: nn.Module) -> nn.Module:
    """Return the transformers model that a LightningModule holds, built by its ``configure_model``; any other module itself."""
    configure = getattr(module, "configure_model", None)
    if not callable(configure):
        return module
    configure()
    models = transformers_models(module)
    return models[0][1] if len(models) == 1 else module


def _find(source: str) -> Any:
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"{path} does not exist. Give a transformers configuration: its directory, or its config.json.")
        return read_config(path)
    module, separator, name = source.replace("::", ":").partition(":")
    if not separator:
        module, _, name = source.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{source!r} is neither a transformers configuration (a directory with config.json, or that file) nor something to "
            f"import ('package.module:name'): {error}"
        ) from None


def read_config(path: Path) -> Any:
    """Return the transformers configuration in a JSON file."""
    from transformers import AutoConfig

    try:
        values = json.loads(read_regular(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    family = values.pop("model_type", None) if isinstance(values, dict) else None
    if family is None:
        raise ValueError(f"{path} names no model_type, so it is no configuration of transformers.")
    try:
        return AutoConfig.for_model(family, **values)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: transformers knows no model_type {family!r}: {str(error)[:200]}") from None
    except Exception as error:  # of the classes of transformers
        raise refused(path, error) from error


def _kv_size(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 0
    queries = getattr(config, "num_attention_heads", 0) or 1
    hidden = getattr(config, "hidden_size", 0) or 0
    return int(heads * (getattr(config, "head_dim", None) or hidden // queries))


def _vocabulary(module: nn.Module) -> int:
    return max((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=0)


def name_of(source: Any) -> str:
    """Return the name of a model that was given by a path or an import path. A folder's may have dots: llama-3.1."""
    path = Path(str(source))
    if not path.exists():
        return str(source)
    place = path.resolve()
    return place.stem if place.is_file() and place.name != "config.json" else (place.parent if place.is_file() else place).name


def _names_by_parameter(module: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), []).append(name)
    return found


def _signatures(blocks: Sequence[nn.Module]) -> list[Any]:
    """Return what blocks that cost the same have in common: classes, shapes and plain settings of all their modules.

    Settings that count the blocks (``layer_idx``) change nothing in what one costs.
    """
    settings: list[dict[tuple[str, str], Any]] = []
    for block in blocks:
        plain = {(n, k): v for n, m in block.named_modules() for k, v in m.__dict__.items() if isinstance(v, _PLAIN)}
        settings.append(plain)
    first = settings[0]
    counting = {key for key, value in first.items() if type(value) is int and _counts(key, value, settings)}
    found = []
    for block, plain in zip(blocks, settings, strict=True):
        kept = tuple(sorted((key, repr(value)) for key, value in plain.items() if key not in counting))
        shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
        found.append((tuple(type(module) for module in block.modules()), kept, shapes))
    return found


_PLAIN = (int, float, str, type(None))


def _counts(key: Any, first: int, settings: Sequence[dict[Any, Any]]) -> bool:
    return len(settings) > 1 and all(plain.get(key) == first + index for index, plain in enumerate(settings))


class Skipped(nn.Module):
    """Stands for a block that is like another one: hands the hidden state through."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        like = self.__dict__["_like"].get("output")
        return (hidden, *like[1:]) if isinstance(like, tuple) else hidden


def _thin(module: nn.Module, blocks: str, kinds: Sequence[int]) -> nn.Module:
    """Return a copy on the meta device with the first block of each kind; the others hand hidden states through."""
    block_list: Any = module.get_submodule(blocks)
    originals = dict(block_list._modules)
    shared: dict[str, Any] = {}
    try:
        seen: set[int] = set()
        for (key, block), kind in zip(originals.items(), kinds, strict=True):
            if kind in seen:
                stand_in = Skipped()
                plain = {k: v for k, v in block.__dict__.items() if isinstance(v, int | float | str | None)}
                stand_in.__dict__.update({k: v for k, v in plain.items() if k not in stand_in.__dict__})
                stand_in.__dict__["_like"] = shared
                block_list._modules[key] = stand_in
            seen.add(kind)
        thin = copy.deepcopy(module, _as_meta(module))
    finally:
        block_list._modules.update(originals)
    return thin


def _as_meta(module: nn.Module) -> dict[int, Any]:
    """Return deepcopy's memo in which every parameter and buffer has become one without data."""
    memo: dict[int, Any] = {}
    for param in module.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return memo

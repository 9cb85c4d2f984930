"""What a checkpoint notes of the transformers models in it, so that they can be built again without the user's code."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kenotron.hf.configuration import load_config
from kenotron.parallel.plan import transformers_models
from kenotron.tokenizers import has_tokenizer

MODEL_PREFIX = "model/"  #: of parameters and buffers, in the names of a checkpoint's tensors


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """One model of a checkpoint.

    Args:
        name: of the model in the LightningModule; ``""`` for the module itself.
        implementation: ``"kenotron"`` for Decoder and Mamba, else ``"transformers"``.
        architecture: the class as ``config.json`` names it.
        config, generation: as in ``config.json`` and ``generation_config.json``.
        source: the directory whose weights it began with, if any, or that of the data's tokenizer if that has none.
    """

    name: str
    implementation: str
    architecture: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    source: str | None = None

    @staticmethod
    def of(
        config: Any,
        name: str,
        implementation: str,
        *,
        architecture: str | None = None,
        generation: Mapping[str, Any] | None = None,
        source: str | None = None,
    ) -> ModelRecord:
        """Return the record of a model with a configuration of transformers; ``architecture``: if it is no causal LM."""
        return ModelRecord(
            name=name,
            implementation=implementation,
            architecture=causal_lm_of(config.model_type) if architecture is None else architecture,
            config=json.loads(config.to_json_string(use_diff=False)),
            generation=generation,
            source=source,
        )

    @property
    def prefix(self) -> str:
        """What stands before the names of its parameters in the names of a checkpoint's tensors."""
        return f"{MODEL_PREFIX}{self.name}." if self.name else MODEL_PREFIX

    def make_config(self) -> Any:
        """Return the configuration as an object of transformers.

        Raises:
            ValueError: a family that this version of transformers does not know.
        """
        from transformers import AutoConfig

        settings = _with_floats(dict(self.config))
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config.architectures = [self.architecture]
        return config


def _with_floats(node: Any) -> Any:
    """Return what transformers wrote with the floats that JSON does not have."""
    if isinstance(node, Mapping):
        return float(node["__float__"]) if node.keys() == {"__float__"} else {key: _with_floats(x) for key, x in node.items()}
    return [_with_floats(x) for x in node] if isinstance(node, list) else node


def describe_models(root: nn.Module, tokenizer: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """Return what a checkpoint notes of each transformers model in ``root``; one that JSON can't hold is left out, and told.

    Args:
        tokenizer: the folder of the data's, for models that were read from no directory with one.
    """
    records = []
    for name, model in transformers_models(root):
        try:
            records.append(vars(_describe(name, model, tokenizer)))
        except (TypeError, ValueError) as error:  # no reason to lose a checkpoint
            warnings.warn(
                f"the config of {type(model).__name__} can't be noted in checkpoints ({error}): give one to export them.",
                stacklevel=2,
            )
    return records


def _describe(name: str, model: Any, tokenizer: str | os.PathLike[str] | None) -> ModelRecord:
    from kenotron.models.own import own_class

    ours = isinstance(model, own_class(model.config))
    generation, source = getattr(model, "generation_config", None), model.config._name_or_path
    if tokenizer is not None and not (source and has_tokenizer(source)):
        source = os.fspath(tokenizer)
    return ModelRecord.of(
        model.config,
        name,
        "kenotron" if ours else "transformers",
        architecture=None if ours else _class_of(model).__name__,
        generation=None if generation is None else json.loads(generation.to_json_string()),
        source=os.path.abspath(source) if source and os.path.isdir(source) else None,
    )


def causal_lm_of(model_type: str) -> str:
    """Return the name of transformers' class for causal language models of a family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return name


def _class_of(model: nn.Module) -> type:
    """Return a model's class without what FSDP2 makes of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def record_of_directory(path: str | os.PathLike[str], name: str, implementation: str) -> ModelRecord:
    """Return the record of a model whose configuration lies in a directory, for checkpoints that have none."""
    return ModelRecord.of(load_config(path), name, implementation, source=str(path))

"""Which class a Hugging Face directory is of: the one that ``architectures`` in its ``config.json`` names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal

Implementation = Literal["auto", "kenotron", "transformers"]


def class_of(config: Any, stored: Mapping[str, Any], path: str | os.PathLike[str]) -> Any:
    """Return transformers' class of a model.

    Args:
        config: of the model. stored: the content of the directory's ``config.json``, whose ``architectures`` count where
            ``config`` has none and is of the same family; without any it is the causal language model of the family.

    Raises:
        ValueError: a class that transformers does not have, or that is of another family.
    """
    import transformers

    names = getattr(config, "architectures", None)
    if not names and stored.get("model_type") == config.model_type:
        names = stored.get("architectures")
    if not names:
        return _causal_lm(config, path)
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        known = [name for name in dir(transformers) if name.startswith(str(names[0])[:4])]
        near = difflib.get_close_matches(str(names[0]), known, n=3)
        raise ValueError(
            f"{path}/config.json has architectures={list(names)}, and transformers {transformers.__version__} has no such model"
            f"{', but ' + ', '.join(near) if near else ''}. Set architectures to the class that its weights are of; custom "
            "code is not run."
        )
    assert kind.config_class is not None
    if not isinstance(config, kind.config_class):
        raise ValueError(
            f"{path}: architectures={list(names)} wants a {kind.config_class.__name__}, and the configuration is a "
            f"{type(config).__name__} (model_type={config.model_type!r}). Make the two of one family."
        )
    return kind


def check_implementation(implementation: Implementation, config: Any, kind: Any) -> Implementation:
    """Return which implementation is to be asked for: Kénotron's models are causal language models, and nothing else.

    Raises:
        ValueError: Kénotron's is asked for, for another model.
    """
    if implementation == "transformers" or kind.__name__ == _causal_name(config):
        return implementation
    if implementation == "kenotron" and _causal_name(config) is not None:
        raise ValueError(
            f"implementation='kenotron' builds causal language models, and the directory holds a {kind.__name__}. Set "
            "implementation='transformers'."
        )
    return "transformers" if implementation == "auto" else implementation


def _causal_name(config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name: str | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return name


def _causal_lm(config: Any, path: str | os.PathLike[str]) -> Any:
    import transformers

    name = _causal_name(config)
    if name is None:
        raise ValueError(
            f"{path}/config.json names no architectures, and {config.model_type!r} has no causal language model. Set "
            "architectures to the class that its weights are of."
        )
    return getattr(transformers, name)

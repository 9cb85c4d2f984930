"""Which of Kénotron's models a configuration of transformers is for."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch

from kenotron.models.architecture import FAMILIES, Architecture
from kenotron.models.decoder import Decoder
from kenotron.models.mamba import MIXERS, Mamba, check_config

_log = logging.getLogger(__name__)

Implementation = Literal["auto", "kenotron", "transformers"]


def build(config: Any, implementation: Implementation = "auto", **settings: Any) -> Any:
    """Return a new causal language model of a transformers configuration, with parameters of torch's default dtype.

    Args:
        implementation: ``"kenotron"`` for ours, ``"transformers"`` for its own class, ``"auto"`` for ours where it covers the
            configuration.
        settings: further arguments of the class, or of ``AutoModelForCausalLM.from_config``.

    Raises:
        ValueError: an architecture that is not covered.
    """
    if is_ours(config, implementation):
        return own_class(config)(config, **settings)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), **settings)


def is_ours(config: Any, implementation: Implementation) -> bool:
    """Return whether ours is to be built; where another is taken for a setting's sake, say so."""
    if implementation not in ("auto", "kenotron", "transformers"):
        raise ValueError(f"implementation={implementation!r}: set 'auto', 'kenotron' or 'transformers'.")
    if implementation != "auto":
        return implementation == "kenotron"
    if not is_own_family(config):
        return False
    try:
        check_settings(config)
    except ValueError as error:
        _log.warning("implementation='auto' takes transformers' own %s: %s", config.model_type, error)
        return False
    return True


def own_class(config: Any) -> type[Decoder] | type[Mamba]:
    """Return the class that is made for a family; for one that neither covers, the one whose error names them all."""
    return Mamba if config.model_type in MIXERS else Decoder


def is_own_family(config: Any) -> bool:
    """Return whether a family is covered, though perhaps not with all settings."""
    return config.model_type in FAMILIES or config.model_type in MIXERS


def check_settings(config: Any) -> None:
    """Raise ``ValueError`` for a configuration that the class does not cover."""
    if config.model_type in MIXERS:
        check_config(config)
    else:
        Architecture.of(config)

"""Which of Kénotron's models a configuration of transformers is for."""

from __future__ import annotations

from typing import Any

from kenotron.models.architecture import FAMILIES, Architecture
from kenotron.models.decoder import Decoder
from kenotron.models.mamba import MIXERS, Mamba, check_config


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

"""The configuration of a model in a Hugging Face directory."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any

#: What files of transformers hold beside a model's own settings.
_OF_FILES = ("auto_map", "transformers_version", "quantization_config")


def load_config(folder: str | os.PathLike[str]) -> Any:
    """Return the transformers configuration in a directory. No code in it is run, and nothing is downloaded.

    Raises:
        ValueError: transformers does not take it. OSError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError):
        raise
    except Exception as error:  # its classes look at little of what they are given
        raise refused(f"{os.fspath(folder)}/config.json", error) from error


def make_config(settings: Mapping[str, Any]) -> Any:
    """Return the transformers configuration of a family, ``settings["model_type"]``, with the settings beside it.

    Raises:
        ValueError: a family that transformers does not know, or a setting that the family does not have: transformers would
            keep it as an attribute that nothing reads.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    family = settings["model_type"]
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, CONFIG_MAPPING, n=3)
        raise ValueError(f"transformers knows no model_type {family!r}." + (f" Near it: {', '.join(near)}." if near else ""))
    try:
        config = AutoConfig.for_model(**settings)
    except Exception as error:  # of its classes
        raise refused(f"{{'model_type': {family!r}, ...}}", error) from error
    kind = type(config)
    known = {*kind().to_dict(), *inspect.signature(kind.__init__).parameters, *kind.attribute_map, *_OF_FILES}
    # What an older name stands for is taken up by another attribute; what nobody knows is left as it is.
    unknown = [key for key in settings if key not in known and key[0] != "_" and key in vars(config)]
    if unknown:
        told = []
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1)
            told.append(f"{key}" + (f" (the nearest is {near[0]})" if near else ""))
        raise ValueError(
            f"{kind.__name__} has no setting {', '.join(told)}: nothing would read it. Correct the name, or leave it out."
        )
    return config


def refused(place: str | os.PathLike[str], error: Exception) -> ValueError:
    """Return the error of a configuration over which transformers stumbles."""
    text = f"{place} is no configuration that transformers takes: {type(error).__name__}: {str(error)[:300]}"
    return ValueError(f"{text}. Compare it with that of the model's authors.")

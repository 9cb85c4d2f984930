"""The configuration of a model in a Hugging Face directory."""

from __future__ import annotations

import os
from typing import Any


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


def refused(place: str | os.PathLike[str], error: Exception) -> ValueError:
    """Return the error of a configuration over which transformers stumbles."""
    text = f"{place} is no configuration that transformers takes: {type(error).__name__}: {str(error)[:300]}"
    return ValueError(f"{text}. Compare it with that of the model's authors.")

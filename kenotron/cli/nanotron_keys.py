"""A configuration of Nanotron's whose keys are counted: which were read, and which have no counterpart here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MISSING = object()

#: What to say of keys that have no counterpart, by pattern. The first that fits is said.
_HINTS = (
    (r"general\.(step|consumed_train_samples)", "a checkpoint knows it"),
    (r"general\.benchmark_csv_path", "kenotron compare measures"),
    (r"general\.ignore_sanity_checks", "checks that cost nothing are always on"),
    (r"parallelism\.tp_linear_async_communication|parallelism\.tp_recompute_allgather", "the strategy decides"),
    (r"model\.ddp_bucket_cap_mb", "the strategy decides"),
    (r"model\.model_config\.(use_cache|pretraining_tp)", "training never reads it"),
    (r"model\.model_config\._fused.*|model\.model_config\._use_qkv_packed", "kenotron.models.Decoder is always fused"),
    (
        r"model\.model_config\.rope_interleaved",
        "rotary pairs stand half a head apart here; kenotron convert rearranges weights",
    ),
    (r"model\.model_config\.moe_config\.router_aux_loss_coef", "it was never read; set router_aux_loss_coef in model.model"),
    (r"model\.init_method\.use_mup", "call kenotron.optim.parametrise(model, 'spectral_mup') in configure_model"),
    (r"model\.init_method\.path", "kenotron convert nanotron-to-kenotron, then --ckpt_path or kenotron.from_checkpoint"),
    (r"model\.init_method\.scaling_method", "weights begin as transformers makes them"),
    (r"tokenizer\..*", "corpora are tokenised before: kenotron tokenize INPUT tokens/NAME --tokenizer T"),
    (
        r".*\.hf_dataset.*|.*\.text_column_name|.*\.dataset_(processing|overwrite).*",
        "kenotron tokenize INPUT tokens/NAME --tokenizer T",
    ),
    (r"checkpoints\.resume_checkpoint_path", "kenotron convert nanotron-to-kenotron, then --ckpt_path"),
    (r"checkpoints\.save_initial_state", "trainer.save_checkpoint before fit does it"),
    (
        r"checkpoints\.checkpoints_path_is_shared_file_system",
        "where nodes share none: the strategy's checkpoint.node_local=true",
    ),
    (
        r"checkpoints\.(checkpointing_engine|datastates.*)",
        "checkpoints are always asynchronous; checkpoint.engine has settings",
    ),
    (r"checkpoints\.load_(lr_scheduler|optimizer)", "a checkpoint is restored whole"),
    (r"logging\..*", "Python's logging decides"),
    (r"metrics_logging\..*", "callbacks log, as kenotron.callbacks has them"),
    (r"optimizer\.(optimizer_factory\.)?torch_adam_is_fused", "torch chooses"),
    (r"tokens\.limit_test_batches", "nothing is tested while training: kenotron test"),
    (r"data_stages\.\d+\.data\.(seed|num_loading_workers)", "those of the first stage hold for all"),
    (r"doremi\.domain_names", "kenotron.TokenData names its corpora"),
    (r"doremi\..*", "kenotron.callbacks.DoReMi finds weights: docs/callbacks.md and examples/doremi"),
    (r"model\.model_config\.(moe_capacity_factor|moe_config\.token_dispatcher_type)", "experts take all of their tokens"),
    (r"model\.model_config\.(fused_add_norm|interleaved_rotary)", "the model decides"),
    (r"model\.model_config\.(rms_norm|dtype)", "mamba of transformers has RMS norms; trainer.precision decides the dtype"),
    (r"model\.model_config\.ssm_cfg\.(use_fast_path|dt_.*)", "transformers' mamba begins as its authors' does"),
    (r"model\.init_method\.n_residuals_per_layer", "one, as in transformers' mamba"),
    (r"parallelism\.moe_layer_recompute", "the strategy's recompute covers all layers"),
    (
        r".*\.dataset\.(use_old_brrr_dataloader|tokenizer_name|skip_in_stream|shuffle_files|return_positions|pad_samples.*)",
        "kenotron.TokenData draws all samples in one order, from corpora that know their tokenizer",
    ),
    (r"optimizer\.learning_rate_scheduler\.lr_warmup_style", "the rate rises linearly"),
    (r"lighteval\..*", "kenotron export writes what lighteval reads"),
    (r"s3_upload\..*", "fsspec's own settings decide; kenotron.callbacks.Upload sends checkpoints"),
    (r"profiler\..*", "arguments of torch.profiler.profile may follow dirpath"),
)


@dataclass(frozen=True)
class Lost:
    """A key without a counterpart, its value, and what to do instead."""

    key: str
    value: Any
    hint: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value!r}{f' ({self.hint})' if self.hint else ''}"


class Keys:
    """The keys of a configuration, by dotted paths in which numbers count the items of lists.

    Raises:
        ValueError: it is no mapping.
    """

    def __init__(self, config: Any) -> None:
        if not isinstance(config, Mapping):
            raise ValueError(f"a configuration of Nanotron is a mapping of sections, and this is a {type(config).__name__}.")
        self._config, self._taken = config, set[str]()
        self._missed: dict[str, str] = {}

    def peek(self, path: str) -> Any:
        """Return a value, ``None`` where there is none, without reading it."""
        found = self._find(path)
        return None if found is _MISSING else found

    def take(self, path: str, default: Any = _MISSING) -> Any:
        """Return a value that has a counterpart.

        Raises:
            ValueError: it is missing, and there is no default.
        """
        found = self._find(path)
        self._taken.add(path)
        if found is not _MISSING and (found is not None or default is None):
            return found
        if default is _MISSING:
            raise ValueError(f"{path} is missing.")
        return default

    def number(self, path: str, default: Any = _MISSING) -> int:
        """Return a value that is a positive integer.

        Raises:
            ValueError: it is missing, or something else.
        """
        found = self.take(path, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ValueError(f"{path} is {found!r}. Set it to an integer of 1 or more.")
        return found

    def items(self, path: str) -> list[Any]:
        """Return the items of a list, none where there is no list."""
        found = self.peek(path)
        return list(found) if isinstance(found, list) else []

    def miss(self, path: str, hint: str) -> None:
        """Name a key that has no counterpart, although its value is null."""
        self._missed[path] = hint

    def lost(self) -> list[Lost]:
        """Return the keys that nobody took; what is null says nothing."""
        found = [Lost(key, value, _hint(key)) for key, value in _leaves(self._config, "") if not self._is_taken(key)]
        return found + [Lost(key, None, hint) for key, hint in self._missed.items()]

    def _is_taken(self, key: str) -> bool:
        """Return whether a key was read, or a mapping that it is in as a whole."""
        parts = key.split(".")
        wholes = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        return not self._taken.isdisjoint(wholes)

    def _find(self, path: str) -> Any:
        node: Any = self._config
        for part in path.split("."):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                node = node[part]
            else:
                return _MISSING
        return node


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what is no section, with its path; lists of anything but sections are values."""
    if isinstance(node, Mapping):
        inner: Any = node.items()
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        inner = enumerate(node)
    else:
        if node is not None and path:
            yield path, node
        return
    if path and not node:
        yield path, node
    for key, value in inner:
        where = f"{path}.{key}" if path else str(key)
        yield from _leaves(value, where)


def _hint(key: str) -> str:
    return next((hint for pattern, hint in _HINTS if re.fullmatch(pattern, key)), "")

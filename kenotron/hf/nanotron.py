"""Checkpoints of Nanotron (and of the Kénotron that preceded this one): read at any topology, written at any tp.

A checkpoint is a folder named by its step; a folder of those has ``latest.txt``. In it:

- ``model_config.json``: the model's configuration.
- ``model/<parts of the module's name>/model_<weight|bias>_pp-rank-I-of-P_tp-rank-J-of-T.safetensors``: what tensor-parallel
  rank J has of a parameter, as the tensor ``data``. The file's metadata say where that lies in the whole:
  ``local_global_slices_pairs`` and ``unsharded_shape``.
- ``model/<parts of the module's name>/model_<weight|bias>.safetensors``: a parameter that every rank has.
- ``checkpoint_metadata.json``: version, sizes, and how far the training was.

Queries, keys and values lie one below the other in one matrix, as in :class:`~kenotron.models.Decoder`, and so do gate and up;
only names differ. With ``rope_interleaved`` the rows of each head of queries and keys are in another order: pairs that turn
together are neighbours there, and half a head apart here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kenotron.checkpoint.boxes import Box, find_flaw
from kenotron.files import check_regular, read_regular

VERSION = "1.4"
CONFIG, METADATA, LATEST = "model_config.json", "checkpoint_metadata.json", "latest.txt"
_RANKS = r"_pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+(?P<expert>_exp-rank-\d+-of-\d+)?"
_FILE = re.compile(rf"model_(?P<key>[a-z_]+?)({_RANKS})?\.safetensors")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

#: Decoder's name of a part of a layer -> Nanotron's
_PARTS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "self_attn.qkv_proj": "attn.qkv_proj",
    "self_attn.o_proj": "attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_REST = {
    "model.embed_tokens": "model.token_position_embeddings.pp_block.token_embedding",
    "model.norm": "model.final_layer_norm.pp_block",
    "lm_head": "model.lm_head.pp_block",
}


def nanotron_name(name: str) -> str:
    """Return Nanotron's name of a Decoder's parameter.

    Raises:
        ValueError: Nanotron's Llama and Qwen2 have no such parameter.
    """
    module, _, key = name.rpartition(".")
    layer = _LAYER.fullmatch(module)
    if layer is not None and layer[2] in _PARTS:
        return f"model.decoder.{layer[1]}.pp_block.{_PARTS[layer[2]]}.{key}"
    if module in _REST:
        return f"{_REST[module]}.{key}"
    raise ValueError(
        f"Nanotron's Llama and Qwen2 have nothing like {name}. Export the model as a Hugging Face directory instead."
    )


@dataclass(frozen=True)
class _Shard:
    """One file: what of a parameter it holds."""

    path: Path
    boxes: tuple[tuple[Box, Box], ...]  # in the file's tensor, and in the whole


@dataclass(frozen=True)
class _Parameter:
    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[_Shard, ...]


class NanotronCheckpoint:
    """The model of a Nanotron checkpoint. Making it reads headers; ``read`` reads data.

    Args:
        path: the folder of a step, or one with ``latest.txt``.

    Raises:
        ValueError: it is none, a file is damaged, or the shards of a parameter do not make up the whole; all is named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if (self.path / LATEST).is_file() and not (self.path / "model").is_dir():
            name = read_regular(self.path / LATEST).decode().strip()
            if not name or Path(name).name != name:
                raise ValueError(f"{self.path / LATEST} must name a folder beside it, not {name!r:.80}.")
            self.path /= name
        if not (self.path / "model").is_dir() or not (self.path / CONFIG).is_file():
            raise ValueError(f"{self.path} is no Nanotron checkpoint: it needs {CONFIG} and a folder model/.")
        self.config: dict[str, Any] = json.loads(read_regular(self.path / CONFIG))
        self.parameters = dict(self._find())

    @property
    def is_interleaved(self) -> bool:
        """Whether rotary pairs are neighbours."""
        return bool(self.config.get("rope_interleaved"))

    def read(self, name: str) -> Tensor:
        """Return a whole parameter, by Nanotron's name, on the CPU."""
        parameter = self.parameters[name]
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        for shard in parameter.shards:
            with safe_open(shard.path, "pt") as file:
                data = file.get_tensor("data")
            for local, place in shard.boxes:
                whole[_slices(place)] = data[_slices(local)]
        return whole

    def _find(self) -> Iterator[tuple[str, _Parameter]]:
        root, found, problems = self.path / "model", dict[str, list[Path]](), list[str]()
        for file in sorted(root.rglob("*.safetensors")):
            check_regular(file)
            match = _FILE.fullmatch(file.name)
            if match is None or match["expert"]:
                problems.append(f"{file.relative_to(self.path)}: experts and files of other names can't be converted")
                continue
            found.setdefault(".".join([*file.relative_to(root).parent.parts, match["key"]]), []).append(file)
        for name, files in found.items():
            try:
                yield name, _parameter(files)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise ValueError("\n".join([f"{self.path} can't be read:", *problems]))


def _parameter(files: Sequence[Path]) -> _Parameter:
    shards, shapes, dtypes = [], set(), set()
    for path in files:
        with safe_open(path, "pt") as file:
            data, metadata = file.get_slice("data"), file.metadata() or {}
            local_shape = tuple(data.get_shape())
            dtypes.add(data[(slice(0, 0),) * len(local_shape)].dtype)
        if "local_global_slices_pairs" not in metadata:
            shapes.add(local_shape)
            whole = Box((0,) * len(local_shape), local_shape)
            shards.append(_Shard(path, ((whole, whole),)))
            continue
        shape = tuple(int(n) for n in re.findall(r"\d+(?=\)?\s*(?:,|\)|$))", metadata["unsharded_shape"]))
        shapes.add(shape)
        pairs = (pair.split("#") for pair in metadata["local_global_slices_pairs"].split(";"))
        shards.append(_Shard(path, tuple((_box(a, local_shape), _box(b, shape)) for a, b in pairs)))
    if len(shapes) > 1 or len(dtypes) > 1:
        raise ValueError(f"its {len(files)} files disagree: {sorted(shapes)}, {sorted(map(str, dtypes))}")
    (shape,), (dtype,) = shapes, dtypes
    flaw = find_flaw([place for shard in shards for _, place in shard.boxes], shape)
    if flaw is not None:
        raise ValueError(f"element {flaw[0]} of {list(shape)} is in {flaw[1]} of {len(files)} files")
    return _Parameter(dtype, shape, tuple(shards))


def _box(text: str, shape: tuple[int, ...]) -> Box:
    """Return the box that slices like ``0,8,None|None,None,None`` are of a shape."""
    ranges = []
    for part, size in zip(text.split("|"), shape, strict=True):
        start, stop, step = (None if word == "None" else int(word) for word in part.split(","))
        if step not in (None, 1):
            raise ValueError(f"slices with a step: {text}")
        ranges.append(range(*slice(start, stop).indices(size)))
    return Box(tuple(r.start for r in ranges), tuple(len(r) for r in ranges))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))


# ---- Order of rows --------------------------------------------------------------------------------------------------


def neighbours_to_halves(qkv: Tensor, heads: int, head_dim: int) -> Tensor:
    """Return ``qkv_proj`` with rotary pairs half a head apart, of one where they are neighbours.

    Args:
        qkv: weight or bias; its rows are those of queries, keys and values. heads: of queries and keys together.
    """
    turned = qkv[: heads * head_dim].unflatten(0, (heads, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return torch.cat([turned, qkv[heads * head_dim :]])


def halves_to_neighbours(qkv: Tensor, heads: int, head_dim: int) -> Tensor:
    """Undo :func:`neighbours_to_halves`."""
    turned = qkv[: heads * head_dim].unflatten(0, (heads, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return torch.cat([turned, qkv[heads * head_dim :]])


# ---- Configurations -------------------------------------------------------------------------------------------------

_COMMON = (
    "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def config_from_nanotron(checkpoint: NanotronCheckpoint) -> Any:
    """Return the transformers configuration of a Nanotron checkpoint.

    Which family it is follows from the biases that are there: those of queries, keys and values alone are Qwen2's.

    Raises:
        ValueError: a model that neither Llama, Qwen2 nor SmolLM3 is.
    """
    from transformers import AutoConfig

    given, names = checkpoint.config, checkpoint.parameters
    if given.get("moe_config"):
        raise ValueError(f"{checkpoint.path} holds experts (moe_config), which can't be converted.")
    settings = {key: given[key] for key in _COMMON if given.get(key) is not None or key == "pad_token_id"}
    settings["num_key_value_heads"] = given.get("num_key_value_heads") or given["num_attention_heads"]
    rope = dict(given.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
    settings["rope_parameters"] = {**rope, "rope_theta": given.get("rope_theta", 10000.0)}
    on_qkv, on_output = (any(name.endswith(f"attn.{part}.bias") for name in names) for part in ("qkv_proj", "o_proj"))
    every = given.get("no_rope_layer")
    if every:
        settings |= {"no_rope_layer_interval": every, "attention_bias": on_output}
        kind = "smollm3"
    elif on_qkv and not on_output:
        kind = "qwen2"
    else:
        settings |= {"attention_bias": on_qkv, "mlp_bias": any(".mlp." in n and n.endswith("bias") for n in names)}
        kind = "llama"
    if every and on_qkv != on_output:
        raise ValueError(f"{checkpoint.path}: no_rope_layer with biases of queries alone is no family that transformers has.")
    window = given.get("sliding_window_size")
    if window:
        raise ValueError(
            f"{checkpoint.path}: sliding_window_size={window} is not converted; set it to null if it was never used."
        )
    return AutoConfig.for_model(kind, **settings)


def config_to_nanotron(config: Any, *, rope_interleaved: bool) -> dict[str, Any]:
    """Return Nanotron's ``model_config.json`` for a transformers configuration.

    Raises:
        ValueError: a family other than Llama and Qwen2, or a setting that Nanotron does not know.
    """
    if config.model_type not in ("llama", "qwen2") or getattr(config, "mlp_bias", False):
        raise ValueError(
            f"model_type={config.model_type!r}: Nanotron's layout is written for llama (without mlp_bias) and qwen2."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"head_dim={head_dim} with {config.num_attention_heads} heads: in Nanotron they make up hidden_size.")
    if getattr(config, "sliding_window", None):
        raise ValueError(f"sliding_window={config.sliding_window} is not converted; export a Hugging Face directory instead.")
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    return {
        **{key: getattr(config, key) for key in _COMMON},
        f"is_{config.model_type}_config": True,
        "num_key_value_heads": config.num_key_value_heads,
        "attention_bias": config.model_type == "qwen2" or bool(config.attention_bias),
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else rope,
        "rope_interleaved": rope_interleaved,
        "pretraining_tp": 1,
        "use_cache": True,
    }


# ---- Writing --------------------------------------------------------------------------------------------------------

#: end of a module's name -> the dimension of its weight that tensor parallelism cuts
_CUTS = {
    "token_embedding": 0,
    "attn.qkv_proj": 0,
    "attn.o_proj": 1,
    "mlp.gate_up_proj": 0,
    "mlp.down_proj": 1,
    "lm_head.pp_block": 0,
}


def write_parameter(root: Path, name: str, whole: Tensor, parts: Sequence[int], tp: int) -> None:
    """Write the files of one parameter.

    Args:
        root: the folder ``model/``. name: Nanotron's. parts: rows of each layer in a fused one; of others, all of them.
        tp: how many tensor-parallel ranks to write for.

    Raises:
        ValueError: ``tp`` does not divide what it cuts.
    """
    module, _, key = name.rpartition(".")
    folder = root.joinpath(*module.split("."))
    folder.mkdir(parents=True, exist_ok=True)
    dim = next((cut for end, cut in _CUTS.items() if module.endswith(end)), None)
    if dim is None or (key == "bias" and dim == 1):
        save_file({"data": whole.contiguous()}, folder / f"model_{key}.safetensors")
        return
    sizes = list(parts) if dim == 0 else [whole.shape[dim]]
    if any(size % tp for size in sizes):
        raise ValueError(f"{name} has parts of {sizes}, which tp={tp} does not divide. Set tp to a divisor of them, or 1.")
    for rank in range(tp):
        pairs, pieces, begin, start = [], [], 0, 0
        for size in sizes:
            length = size // tp
            at = start + rank * length
            pieces.append(whole.narrow(dim, at, length))
            pairs.append(f"{_cut(dim, begin, length, whole.ndim)}#{_cut(dim, at, length, whole.ndim)}")
            begin, start = begin + length, start + size
        metadata = {
            "version": VERSION,
            "local_global_slices_pairs": ";".join(pairs),
            "unsharded_shape": str(tuple(whole.shape)),
        }
        file = folder / f"model_{key}_pp-rank-0-of-1_tp-rank-{rank}-of-{tp}.safetensors"
        save_file({"data": torch.cat(pieces, dim).contiguous()}, file, metadata=metadata)


def _cut(dim: int, start: int, length: int, ndim: int) -> str:
    return "|".join(f"{start},{start + length},None" if d == dim else "None,None,None" for d in range(ndim))


def write_companions(path: Path, config: Mapping[str, Any], tp: int) -> None:
    """Write what stands beside the parameters."""
    (path / CONFIG).write_text(json.dumps(config))
    stage = {"name": "converted", "start_training_step": 1, "consumed_train_samples": 0}
    metas = {"consumed_train_samples": 0, "last_train_step": 0, "last_stage_idx": 0, "data_stages": [stage]}
    metadata = {"version": VERSION, "tp": tp, "dp": 1, "metas": metas, "custom_metas": None}
    (path / METADATA).write_text(json.dumps(metadata, indent=2, sort_keys=True))

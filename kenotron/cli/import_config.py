"""``kenotron import-config``: a configuration of Nanotron, or of the first Kénotron, becomes one of ours.

Every key is either read, and stands in the result under its new name, or is named as one without a counterpart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from kenotron.cli.nanotron_keys import Keys, Lost
from kenotron.cli.nanotron_model import model_of


def run(options: argparse.Namespace) -> int:
    """Import, print or write the result, name what has no counterpart, and return the exit code."""
    try:
        given = yaml.safe_load(Path(options.path).read_text())
        config, lost = imported(given, devices_per_node=options.devices_per_node)
        text = as_yaml(config, lost, options.path)
        if options.output is not None:
            Path(options.output).write_text(text)
    except FileNotFoundError as error:
        print(f"{error.filename}: there is no such file or folder.", file=sys.stderr)
        return 2
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"{options.path}: {error}", file=sys.stderr)
        return 2
    for one in lost:
        print(one, file=sys.stderr)
    if options.output is None:
        print(text, end="")
    else:
        print(
            f"{options.output}: kenotron fit --config {options.output}; {len(lost)} keys have no counterpart", file=sys.stderr
        )
    return 0


def as_yaml(config: dict[str, Any], lost: list[Lost], source: str) -> str:
    """Return a configuration as text; comments at its head tell what is missing in it."""
    head = [f"# From {source}.", *(["# Without a counterpart:"] if lost else []), *(f"#   {one}" for one in lost)]
    return "\n".join(head) + "\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def imported(given: Any, *, devices_per_node: int = 8) -> tuple[dict[str, Any], list[Lost]]:
    """Return the configuration that ``kenotron fit`` takes, and the keys that have no counterpart.

    Raises:
        ValueError: a key that is needed is missing, or has a value that can't be.
    """
    keys = Keys(_in_stages(given))
    layout = _layout(keys)
    steps, accumulate = keys.number("tokens.train_steps"), keys.number("tokens.batch_accumulation_per_replica")
    micro = keys.number("tokens.micro_batch_size")
    config: dict[str, Any] = {"seed_everything": keys.take("general.seed", 42)}
    optimizer, schedule = _optimizer(keys, steps)
    model = {"model": model_of(keys, layout["tp"]), **schedule}
    settings = model["model"].pop("settings", None)
    config["model"] = {"class_path": "kenotron.CausalLM", "init_args": model | ({"settings": settings} if settings else {})}
    config["data"] = _data(keys, global_batch_size=micro * accumulate * layout["dp"])
    if optimizer is not None:
        config["optimizer"] = optimizer
    config["trainer"] = _trainer(keys, layout, steps, accumulate, devices_per_node)
    return config, keys.lost()


def _in_stages(given: Any) -> Any:
    """Return a configuration whose data stands in stages: older ones had one ``data`` for all steps."""
    if not isinstance(given, dict) or given.get("data_stages") or not isinstance(given.get("data"), dict):
        return given
    stage = {"start_training_step": 1, "data": given["data"]}
    return {**{key: value for key, value in given.items() if key != "data"}, "data_stages": [stage]}


# ---- Layout and trainer ---------------------------------------------------------------------------------------------


def _layout(keys: Keys) -> dict[str, Any]:
    """Return the strategy's settings, dp included."""
    sizes = {name: keys.number(f"parallelism.{name}") for name in ("dp", "pp", "tp")}
    cp, ep = keys.number("parallelism.context_parallel_size", 1), keys.number("parallelism.expert_parallel_size", 1)
    if sizes["dp"] * cp % ep:
        sizes["dp"] *= ep  # there experts have ranks of their own, here they borrow those of dp
    found: dict[str, Any] = {**sizes, "cp": cp, "ep": ep, "zero_stage": keys.take("optimizer.zero_stage", 0)}
    engine = str(keys.take("parallelism.pp_engine", "1f1b")).lower()
    if found["pp"] > 1:
        found["schedule"] = engine
        found["microbatches"] = keys.number("tokens.batch_accumulation_per_replica")
    if keys.take("parallelism.tp_mode", "ALL_REDUCE") == "REDUCE_SCATTER" and found["tp"] > 1:
        found["sequence_parallel"] = True
    if keys.take("parallelism.recompute_layer", False):
        found["recompute"] = "full"
    return found


def _trainer(keys: Keys, layout: dict[str, Any], steps: int, accumulate: int, devices_per_node: int) -> dict[str, Any]:
    world = layout["dp"] * layout["pp"] * layout["tp"] * layout["cp"]
    nodes = world // devices_per_node if world > devices_per_node and world % devices_per_node == 0 else 1
    clip = keys.take("optimizer.clip_grad", None)
    found: dict[str, Any] = {
        "accelerator": "auto",
        "devices": world // nodes,
        "num_nodes": nodes,
        "strategy": {"class_path": "kenotron.KenotronStrategy", "init_args": _without_defaults(layout)},
        "precision": _precision(keys),
        "max_steps": steps,
        "accumulate_grad_batches": 1 if layout["pp"] > 1 else accumulate,
        "gradient_clip_val": None if clip is None else float(clip),
        "log_every_n_steps": keys.take("logging.iteration_step_info_interval", 1),
        "logger": _logger(keys),
        "callbacks": _checkpoints(keys),
    }
    for theirs, ours in (("val_check_interval", "val_check_interval"), ("limit_val_batches", "limit_val_batches")):
        value = keys.take(f"tokens.{theirs}", None)
        if isinstance(value, int) and value > 0:
            found[ours] = value * (found["accumulate_grad_batches"] if theirs == "val_check_interval" else 1)
    if found.get("val_check_interval"):
        found["check_val_every_n_epoch"] = None  # counted in batches, over epochs
    profiles = keys.take("profiler.profiler_export_path", None)
    if profiles is not None:
        found["profiler"] = {"class_path": "lightning.pytorch.profilers.PyTorchProfiler", "init_args": {"dirpath": profiles}}
    return {name: value for name, value in found.items() if value is not None}


def _without_defaults(layout: dict[str, Any]) -> dict[str, Any]:
    defaults = {"pp": 1, "tp": 1, "cp": 1, "ep": 1}
    return {name: value for name, value in layout.items() if defaults.get(name) != value}


def _precision(keys: Keys) -> str:
    """Weights in fp32 with bf16 arithmetic take the place of bf16 weights with fp32 copies: the numbers are the same."""
    dtype, in_fp32 = str(keys.take("model.dtype", "bfloat16")), keys.take("optimizer.accumulate_grad_in_fp32", True)
    known = {"bfloat16": "bf16-mixed" if in_fp32 else "bf16-true", "float16": "16-mixed", "float32": "32-true"}
    found = known.get(dtype.removeprefix("torch."))
    if found is None:
        raise ValueError(f"model.dtype is {dtype}. Set it to one of {', '.join(known)}.")
    return found


def _logger(keys: Keys) -> dict[str, Any]:
    project, name = keys.take("general.project", "runs"), keys.take("general.run", None)
    settings: dict[str, Any] = {"save_dir": "runs", "name": str(project)}
    if isinstance(name, str) and "%" not in name:
        settings["version"] = name
    return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": settings}


def _checkpoints(keys: Keys) -> list[dict[str, Any]]:
    settings = {
        "dirpath": str(keys.take("checkpoints.checkpoints_path")),
        "every_n_train_steps": keys.number("checkpoints.checkpoint_interval"),
        "filename": "{step}",
        "save_top_k": -1,
        "save_last": bool(keys.take("checkpoints.save_final_state", True)),
    }
    found = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": settings}]
    url = keys.take("s3_upload.upload_s3_path", None)
    if url is not None:
        upload = {"url": str(url), "delete_local": bool(keys.take("s3_upload.remove_after_upload", False))}
        found.append({"class_path": "kenotron.callbacks.Upload", "init_args": upload})
    return found


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def _optimizer(keys: Keys, steps: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the optimizer that takes the place of CausalLM's, if one does, and that one's arguments."""
    rate = float(keys.take("optimizer.learning_rate_scheduler.learning_rate"))
    decay = float(keys.take("optimizer.weight_decay", 0.0))
    name = str(keys.take("optimizer.optimizer_factory.name", "adamW"))
    if name == "sgd":
        return {"class_path": "torch.optim.SGD", "init_args": {"lr": rate, "weight_decay": decay}}, {}
    if name.lower() != "adamw":
        raise ValueError(f"optimizer.optimizer_factory.name is {name!r}. Set it to 'adamW' or 'sgd'.")
    found: dict[str, Any] = {"learning_rate": rate, "weight_decay": decay}
    factory = "optimizer.optimizer_factory"

    def of_adam(key: str, default: float) -> float:  # older configurations have it beside the factory
        flat = keys.take(f"optimizer.{key}", default)
        return float(keys.take(f"{factory}.{key}", flat))

    found["betas"] = [of_adam("adam_beta1", 0.9), of_adam("adam_beta2", 0.95)]
    found["eps"] = of_adam("adam_eps", 1e-8)
    excluded = keys.take("optimizer.weight_decay_exclude_named_params", [])
    if excluded:  # there a pattern stands at the beginning of a name, and names begin with the model
        found["rules"] = [{"pattern": str(pattern), "weight_decay": 0.0} for pattern in excluded]
    return None, found | _schedule(keys, rate, steps)


def _schedule(keys: Keys, rate: float, steps: int) -> dict[str, Any]:
    where = "optimizer.learning_rate_scheduler"
    warmup = int(keys.take(f"{where}.lr_warmup_steps", 0))
    if keys.peek(f"{where}.lr_warmup_style") in (None, "linear"):
        keys.take(f"{where}.lr_warmup_style", None)
    start = keys.take(f"{where}.lr_decay_starting_step", None)
    start = warmup if start is None else int(start)
    length = keys.take(f"{where}.lr_decay_steps", None)
    length = steps - start if length is None else int(length)
    lowest = keys.take(f"{where}.min_decay_lr", None)
    total = min(start + length, steps)
    found = {
        "warmup_steps": warmup,
        "total_steps": total,
        "decay": keys.take(f"{where}.lr_decay_style", "linear") or "linear",
        "minimum": 1.0 if lowest is None else float(lowest) / rate,
    }
    return found | ({"decay_steps": total - start} if start > warmup else {})


# ---- Data -----------------------------------------------------------------------------------------------------------


def _data(keys: Keys, global_batch_size: int) -> dict[str, Any]:
    stages = keys.items("data_stages")
    if not stages:
        raise ValueError("data_stages is missing or empty: there is nothing to train on.")
    order = sorted(range(len(stages)), key=lambda index: keys.number(f"data_stages.{index}.start_training_step", 1))
    corpora: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for index in order:
        keys.take(f"data_stages.{index}.name", None)
        weights, paths = _corpora(keys, f"data_stages.{index}.data.dataset")
        corpora |= paths
        stage: dict[str, Any] = {
            "start_step": keys.number(f"data_stages.{index}.start_training_step", 1) - 1,
            "corpora": weights,
        }
        length = keys.take(f"data_stages.{index}.sequence_length", None)
        found.append(stage | ({"sequence_length": length} if length is not None else {}))
    first = f"data_stages.{order[0]}.data"
    seed = keys.take(f"{first}.seed", None)
    settings: dict[str, Any] = {
        "sequence_length": found[0].get("sequence_length") or keys.number("tokens.sequence_length"),
        "global_batch_size": global_batch_size,
    }
    keys.take("tokens.sequence_length", None)
    workers = {"num_workers": keys.take(f"{first}.num_loading_workers", 1)}
    if keys.take(f"{first}.dataset.sft_dataloader", False):
        tokenizer = keys.take("tokenizer.tokenizer_name_or_path", "tokenizer")
        chat = {"conversations": corpora, "tokenizer": tokenizer, **settings, "seed": 42 if seed is None else seed}
        return {"class_path": "kenotron.ChatData", "init_args": {**chat, "loading": workers}}
    sampling: dict[str, Any] = {"seed": 42 if seed is None else seed}
    if keys.take("model.model_config._use_doc_masking", False):
        sampling["mask_documents"] = True
    settings |= {"corpora": corpora, "weights": found[0]["corpora"], "sampling": sampling, "loading": workers}
    if len(found) > 1:
        settings["stages"] = found[1:]
    vocab_size = keys.take(f"{first}.dataset.vocab_size", None)
    if isinstance(vocab_size, int) and vocab_size > 0:
        settings["vocab_size"] = vocab_size
    return {"class_path": "kenotron.TokenData", "init_args": settings}


def _corpora(keys: Keys, where: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the weights of a stage's corpora, and where these are; texts are to be tokenised to such places."""
    folders = keys.take(f"{where}.dataset_folder", None)
    weights = keys.take(f"{where}.dataset_weights", None)
    is_chat = bool(keys.peek(f"{where}.sft_dataloader"))
    texts = None
    if folders is None:
        texts = keys.take(f"{where}.hf_dataset_or_datasets", None) if is_chat else keys.peek(f"{where}.hf_dataset_or_datasets")
        folders = texts if texts is not None else "random"
        if keys.peek(where) is None:
            keys.miss(where, "there random tokens were trained: tokenise some text into tokens/random")
    if isinstance(folders, dict):
        weights, folders = list(folders.values()), list(folders)
    folders = [folders] if isinstance(folders, str) else [str(folder) for folder in folders]
    if weights is not None and len(weights) != len(folders):
        raise ValueError(f"{where}: {len(folders)} folders have {len(weights)} weights. Give each folder one.")
    size = keys.take(f"{where}.token_size_in_bytes", None)
    names = _names(folders)
    paths: dict[str, Any] = {}
    for name, folder in zip(names, folders, strict=True):
        path = folder if is_chat or (texts is None and folder != "random") else f"tokens/{name}"
        paths[name] = path if size is None else {"path": path, "token_size": int(size)}
    values = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    return dict(zip(names, values, strict=True)), paths


def _names(folders: list[str]) -> list[str]:
    """Return a name for each folder: its last part, or as many of the last ones as tell it from the others."""
    for length in range(1, 20):
        names = ["-".join(Path(folder.rstrip("/")).parts[-length:]).strip("/-") for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError(
        f"data_stages name the same folder twice: {', '.join(folders)}. Name it once, with the sum of its weights."
    )

"""``kenotron launch slurm``: a batch script that trains a configuration, comes back when its job is preempted, and goes on.

1. SLURM sends SIGUSR1 to all ranks some time before the job's end, and SIGTERM when it is preempted.
2. ``kenotron.callbacks.Preemption`` saves a checkpoint, waits until it is published, and requeues the job.
3. The job begins again with the same script, and ``--ckpt_path last`` finds that checkpoint; the first time there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_PREEMPTION = "kenotron.callbacks.Preemption"
#: What SLURM takes for --time.
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


def slurm(options: argparse.Namespace) -> int:
    """Write the script, or print it, and return the exit code."""
    try:
        text = script(options)
        if options.dry_run:
            print(text, end="")
            return 0
        path = Path(options.output or f"{options.job_name or Path(options.config).stem}.sbatch")
        path.write_text(text)
        Path(options.log_dir).mkdir(parents=True, exist_ok=True)  # SLURM does not make it, and the job fails in silence
    except FileNotFoundError as error:
        print(f"{error.filename}: there is no such file.", file=sys.stderr)
        return 2
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{path}: sbatch {path}")
    return _submit(path) if options.submit else 0


def _submit(path: Path) -> int:
    if shutil.which("sbatch") is None:
        print(f"There is no sbatch here. Run it where SLURM is: sbatch {path}", file=sys.stderr)
        return 2
    return subprocess.run(["sbatch", str(path)], check=False).returncode


def script(options: argparse.Namespace) -> str:
    """Return the batch script.

    Raises:
        ValueError: a setting that SLURM would not take, or a configuration that can't be read.
    """
    _check(options)
    settings = _checked(options)
    lines = ["#!/bin/bash", *(f"#SBATCH --{each}" for each in _directives(options)), ""]
    lines += [
        f"# Trains {options.config} on {options.nodes} × {options.gpus_per_node} processes.",
        f"# SIGUSR1 comes {options.signal_s} s before the time is over, SIGTERM when the job is preempted. {_PREEMPTION}",
        "# then saves a checkpoint and requeues the job, and this script begins again: --ckpt_path last goes on from there.",
        "",
        "set -eo pipefail",
        *options.setup,
        *(f"export {_assignment(each)}" for each in options.env),
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{max(options.cpus_per_task - 1, 1)}}}",
        f"cd {shlex.quote(str(Path(options.chdir or '.').resolve()))}",
        'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"',
        "",
        _command(options, settings),
    ]
    return "\n".join(lines) + "\n"


def _check(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "cpus_per_task", "signal_s"):
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: set it to 1 or more.")
    if options.time is not None and not _TIME.fullmatch(options.time):
        raise ValueError(f"--time {options.time}: write minutes, hours:minutes:seconds, or days-hours:minutes:seconds.")
    words = [
        options.job_name,
        options.partition,
        options.account,
        options.qos,
        options.constraint,
        options.mem,
        options.log_dir,
    ]
    for word in [*words, *options.sbatch]:
        if word is not None and (not word.strip() or "\n" in word):
            raise ValueError(f"{word!r} can't stand in a line of a batch script. Give one word.")


def _checked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration, once it is seen that the job can run it.

    Raises:
        ValueError: unknown keys or options, or a layout that does not fit the processes.
    """
    from kenotron.cli.fit import problems_of  # the other commands need no torch

    here = os.getcwd()
    if options.chdir is not None and Path(options.chdir).is_dir():
        os.chdir(options.chdir)  # from where class paths begin, and the configuration is read
    try:
        settings, problems = problems_of(options.config, options.fit_options)
    finally:
        os.chdir(here)
    if options.container is not None:  # which has packages that this machine has not
        problems = [each for each in problems if "can't be imported" not in each]
    if problems:
        raise ValueError(f"{options.config}:\n" + "\n".join(problems))
    trainer = settings.get("trainer") or {}
    _check_layout(trainer.get("strategy"), options.nodes * options.gpus_per_node, options.config)
    if not _saves_last(trainer):
        print(
            f"{options.config}: no ModelCheckpoint has save_last: true, and the job goes on from the last checkpoint. After a "
            "crash it would begin anew, or where it was preempted. Set save_last: true.",
            file=sys.stderr,
        )
    return settings


def _check_layout(strategy: Any, world_size: int, path: str) -> None:
    from kenotron.compare.strategies import parse_spec
    from kenotron.layout import ParallelLayout

    name = strategy if isinstance(strategy, str) else strategy.get("class_path", "") if isinstance(strategy, dict) else ""
    if "kenotron" not in name.lower().partition(":")[0]:
        return
    given = parse_spec(name).settings if isinstance(strategy, str) else strategy.get("init_args") or {}
    axes = {field.name for field in dataclasses.fields(ParallelLayout)} & given.keys()
    if any(given[axis] == "auto" for axis in axes - {"dp"}):
        return  # the planner chooses on the cluster
    try:
        ParallelLayout(**{axis: given[axis] for axis in axes}).resolve(world_size)
    except ValueError as error:
        raise ValueError(f"{path}, trainer.strategy: {error} --nodes × --gpus-per-node are {world_size}.") from error


def _saves_last(trainer: Any) -> bool:
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    arguments = [each.get("init_args") or {} for each in callbacks if isinstance(each, dict)]
    return any(each.get("save_last") for each in arguments)


def _directives(options: argparse.Namespace) -> list[str]:
    found = [
        f"job-name={options.job_name or Path(options.config).stem}",
        f"nodes={options.nodes}",
        f"ntasks-per-node={options.gpus_per_node}",
        *([] if options.cpu else [f"gpus-per-node={options.gpus_per_node}"]),
        f"cpus-per-task={options.cpus_per_task}",
    ]
    for name in ("time", "partition", "account", "qos", "constraint", "mem"):
        value = getattr(options, name)
        if value is not None:
            found.append(f"{name}={value}")
    # No `B:` before the signal: it goes to the ranks, not to this script.
    found += [f"output={options.log_dir}/%x-%j.log", "open-mode=append", "requeue", f"signal=SIGUSR1@{options.signal_s}"]
    return found + [each.removeprefix("--") for each in options.sbatch]


def _assignment(text: str) -> str:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"--env {text}: write it as NAME=VALUE.")
    return f"{name}={shlex.quote(value)}"


def _command(options: argparse.Namespace, settings: dict[str, Any]) -> str:
    inside = ["kenotron", "fit", "--config", options.config]
    inside += [f"--trainer.num_nodes={options.nodes}", f"--trainer.devices={options.gpus_per_node}"]
    if _PREEMPTION not in _class_paths(settings):
        inside.append(f"--trainer.callbacks+={_PREEMPTION}")
    inside += ["--ckpt_path", "last", *options.fit_options]
    outside = ["srun", "--kill-on-bad-exit=1"]
    if options.container is not None and _is_apptainer(options.container):
        binds = [f"--bind={mount}" for mount in options.container_mount]
        outside += ["apptainer", "exec", *([] if options.cpu else ["--nv"]), *binds, options.container]
    elif options.container is not None:
        outside += [
            f"--container-image={options.container}",
            "--container-workdir=" + str(Path(options.chdir or ".").resolve()),
        ]
        outside += [f"--container-mounts={','.join(options.container_mount)}"] if options.container_mount else []
    return f"{shlex.join(outside)} \\\n    {shlex.join(inside)}"


def _is_apptainer(image: str) -> bool:
    return image.endswith(".sif")


def _class_paths(node: Any) -> Sequence[str]:
    if isinstance(node, dict):
        own = [node["class_path"]] if isinstance(node.get("class_path"), str) else []
        return [*own, *(path for value in node.values() for path in _class_paths(value))]
    if isinstance(node, list):
        return [path for value in node for path in _class_paths(value)]
    return [node] if node == _PREEMPTION else []

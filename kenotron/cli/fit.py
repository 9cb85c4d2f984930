"""``kenotron fit``, ``validate``, ``test`` and ``predict``: Lightning's own command line, on a YAML that says everything.

1. A ``--config`` that is a checkpoint stands for the configuration in it; a model or a data module without ``class_path`` is
   ``kenotron.CausalLM`` or ``kenotron.TokenData``.
2. Keys that nobody knows are told, each with the nearest one that is known.
3. LightningCLI reads the rest, builds module, data and trainer, and every checkpoint gets the whole configuration.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    SaveConfigCallback,
    instantiate_class,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from kenotron.callbacks import StepBar, StepLines
from kenotron.checkpoint import CheckpointError
from kenotron.cli.keys import nearest, unknown_keys, unknown_options
from kenotron.cli.stored_config import CONFIG_KEY, stored_config
from kenotron.compare.strategies import make_strategy

#: What a section of the configuration is where it names no class.
DEFAULT_CLASSES = {"model": "kenotron.CausalLM", "data": "kenotron.TokenData"}


def run(arguments: Sequence[str]) -> int:
    """Run one of Lightning's commands, and return the exit code; wrong input ends the process with 2."""
    import_from_here()
    quieten()
    KenotronCLI(args=list(arguments))
    return 0


def quieten() -> None:
    """Silence what others say at every start and no user of the command line can do anything about."""
    # Of Lightning's calls into libraries that have deprecated them, and of a data module without validation.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"\s*.*deprecated in v\d")
    for message in (".*deprecated, use .*treespec", "Total length of .* across ranks is zero"):
        warnings.filterwarnings("ignore", message=message)


def import_from_here() -> None:
    """Let class paths in a configuration begin in the current folder, as they do under ``python script.py``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def parts_of(path: str) -> tuple[L.LightningModule, L.LightningDataModule | None]:
    """Return the module and the data of a configuration, without its trainer."""

    class Parts(KenotronCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return None

    built = Parts(args=["--config", path], run=False)
    return built.model, built.datamodule


def bare_parser() -> LightningArgumentParser:
    """Return the parser of a configuration, which has parsed nothing."""

    class Bare(KenotronCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = Namespace(seed_everything=False)

        def instantiate_classes(self) -> None:
            pass

        def after_instantiate_classes(self) -> None:
            pass

    return Bare(run=False).parser


def options_of(command: str) -> list[str]:
    """Return the options of one of Lightning's commands, as on the command line."""
    keys = [key for key in bare_parser().get_defaults().keys() if key]  # noqa: SIM118  # a Namespace
    return ["--config", "--print_config", "--help", "--ckpt_path", "--model", "--data", *(f"--{key}" for key in keys)]


def problems_of(path: str, options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration, its classes named, and a sentence for each key and each option that nobody knows.

    Raises:
        ValueError: it is no configuration.
    """
    import_from_here()
    found: dict[str, Any] = complete(yaml.safe_load(Path(path).read_text()) or {})
    parser = bare_parser()
    own = {key: value for key, value in found.items() if key not in ("ckpt_path", "weights_only")}  # of ``fit`` itself
    classes = {section: {"class_path": kind} for section, kind in DEFAULT_CLASSES.items()}
    return found, unknown_keys(own, parser) + unknown_options(options, classes | found, parser)


def check_config(path: str) -> None:
    """End the process with exit code 2 where a configuration has keys that nobody knows."""

    class Check(KenotronCLI):
        def instantiate_classes(self) -> None:
            self.model = L.LightningModule()

        def after_instantiate_classes(self) -> None:
            pass

    Check(args=["--config", path], run=False)


class Parser(LightningArgumentParser):
    """Names the nearest option where one is not known."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Say what is wrong, and end the process with exit code 2."""
        for option in re.findall(r"(?<=--)[A-Za-z_][\w.]*", message.partition("nrecognized arguments")[2]):
            near = nearest(option, [key for key in self.get_defaults().keys() if key])  # noqa: SIM118  # a Namespace
            message += f"\n--{option} is not known{f'; the nearest is --{near}' if near else ''}."
        if not self.exit_on_error:
            return super().error(message, ex)
        sys.stderr.write(
            f"error: {_condensed(message)}\n{self.prog.replace(' [options]', '')} --help lists what is accepted.\n"
        )
        return self.exit(2)


def _condensed(message: str) -> str:
    """Return a message of jsonargparse's without what it says of its own types."""
    left_out = ("Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class", "- Expected a path")
    lines = [line for line in message.splitlines() if line.strip() and not line.strip().startswith(left_out)]
    return "\n".join(dict.fromkeys(lines))


class KeepConfig(SaveConfigCallback):
    """Writes ``config.yaml`` where loggers write, and nowhere if there are none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration, in the place of one that an earlier run has left there."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class KenotronCLI(LightningCLI):
    """LightningCLI for any module and any data, with Kénotron's own where none is named."""

    def __init__(self, **settings: Any) -> None:
        self.parsers: list[LightningArgumentParser] = []
        defaults: dict[str, Any] = {
            "save_config_callback": KeepConfig,
            "save_config_kwargs": {"overwrite": True},
            "parser_class": Parser,
            "parser_kwargs": {"prog": "kenotron"},
            "seed_everything_default": 42,
            "auto_configure_optimizers": False,  # it would be built of parameters that are cut afterwards
        }
        super().__init__(**{**defaults, **settings})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser, and remember it: commands have one each."""
        parser = super().init_parser(**kwargs)
        self.parsers.append(parser)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add an optimizer and a schedule, for modules that configure none."""
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)

    @property
    def _options(self) -> LightningArgumentParser:
        """The parser of the command that runs."""
        commands = list(self.subcommands())
        return self.parsers[0 if self.subcommand is None else 1 + commands.index(self.subcommand)]

    @property
    def _section(self) -> Namespace:
        """The command's part of the configuration."""
        found: Namespace = self.config if self.subcommand is None else self.config[self.subcommand]
        return found

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, once its keys are known."""
        self.subcommand = args[0] if args and args[0] in self.subcommands() and len(self.parsers) > 1 else None
        self._given_config: dict[str, Any] = {section: {"class_path": kind} for section, kind in DEFAULT_CLASSES.items()}
        full = self._with_full_configs(args)
        problems = unknown_options(args, self._given_config, self._options)
        if problems:
            self._options.error("on the command line:\n" + "\n".join(problems))
        self.config = parser.parse_args(full)

    def _with_full_configs(self, given: Sequence[str]) -> list[str]:
        """Return options whose ``--config`` are completed and checked."""
        out = list(given)
        for index, option in enumerate(given):
            name, equals, value = option.partition("=")
            if name not in ("-c", "--config") or not (equals or index + 1 < len(given)):
                continue
            text = self._full_config(value if equals else given[index + 1])
            out[index + (not equals)] = f"{name}={text}" if equals else text
        return out

    def _full_config(self, path: str) -> str:
        """Return what jsonargparse should read: the path, or the text that comes in its place."""
        if not Path(path).exists():
            self._options.error(f"--config {path}: there is no such file.")
        try:
            text = stored_config(path) if Path(path).is_dir() else Path(path).read_text()
            config = yaml.safe_load(text) or {}
            completed = complete(config)
            problems = unknown_keys(completed, self._options)
        except (ValueError, CheckpointError, OSError, yaml.YAMLError) as error:
            self._options.error(f"--config {path}: {error}")
        self._given_config |= completed
        if problems:
            self._options.error(f"--config {path}:\n" + "\n".join(problems))
        return path if completed == config and not Path(path).is_dir() else yaml.safe_dump(completed, sort_keys=False)

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what a user got wrong is told without a traceback."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            self.parser.error(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer; a strategy's name may have settings: ``kenotron:tp=2,pp=2``."""
        found = self._section.get("trainer.strategy")
        if isinstance(found, str) and ":" in found:
            kwargs["strategy"] = make_strategy(found)
        return super().instantiate_trainer(**self._progress(), **kwargs)

    @property
    def _instances(self) -> Any:
        """The command's part of the configuration, its classes built."""
        return self.config_init if self.subcommand is None else self.config_init[self.subcommand]

    def _progress(self) -> dict[str, Any]:
        """Return arguments of the trainer: lines for a log and, in a terminal, a bar of steps; unless it has others."""
        trainer = self._instances.get("trainer") or {}
        given = trainer.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        is_quiet = trainer.get("enable_progress_bar") is False or trainer.get("barebones")
        if self.subcommand != "fit" or is_quiet or any(isinstance(each, (ProgressBar, StepLines)) for each in given):
            return {}
        shown = sys.stdout.isatty() or trainer.get("enable_progress_bar") is True
        # The lines are on all ranks, whose terminals may differ: the norm in them is a collective.
        return {"callbacks": [*given, StepLines(), *([StepBar()] if shown else [])], "enable_progress_bar": shown}

    def after_instantiate_classes(self) -> None:
        """Let the module have the configuration's optimizer, and every checkpoint the whole configuration."""
        instances = self._instances
        if instances.get("optimizer"):
            give_optimizer(self.model, instances["optimizer"], instances.get("lr_scheduler"))
        keep_config(self.model, self._options.dump(self._section, skip_none=False, format="yaml"))


def give_optimizer(module: L.LightningModule, optimizer: Any, schedule: Any) -> None:
    """Let a module train by an optimizer that is made when the strategy asks for it, of the parameters that there are then."""

    def configure_optimizers() -> Any:
        made = instantiate_class(module.parameters(), optimizer)
        return LightningCLI.configure_optimizers(module, made, instantiate_class(made, schedule) if schedule else None)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]


def complete(config: Any) -> Any:
    """Return a configuration whose model and data name their classes."""
    if not isinstance(config, dict):
        raise ValueError(f"a configuration is a mapping, and this is a {type(config).__name__}.")
    full = dict(config)
    for section, kind in DEFAULT_CLASSES.items():
        given = config.get(section)
        if isinstance(given, dict) and "class_path" not in given:
            full[section] = {"class_path": kind, "init_args": given.get("init_args", given)}
    return full


def keep_config(module: L.LightningModule, config: str) -> None:
    """Let every checkpoint of a module hold ``config``, under `CONFIG_KEY` of Lightning's dictionary."""
    hook = module.on_save_checkpoint  # Lightning calls this one, not those of callbacks, for weights alone as well

    def with_config(checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = config
        hook(checkpoint)

    module.on_save_checkpoint = with_config  # type: ignore[method-assign]

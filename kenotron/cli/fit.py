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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    SaveConfigCallback,
    instantiate_class,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from kenotron.checkpoint import CheckpointError
from kenotron.cli.keys import nearest, unknown_keys
from kenotron.cli.stored_config import CONFIG_KEY, stored_config
from kenotron.compare.strategies import make_strategy

#: What a section of the configuration is where it names no class.
DEFAULT_CLASSES = {"model": "kenotron.CausalLM", "data": "kenotron.TokenData"}


def run(arguments: Sequence[str]) -> int:
    """Run one of Lightning's commands, and return the exit code; wrong input ends the process with 2."""
    import_from_here()
    KenotronCLI(args=list(arguments))
    return 0


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


def options_of(command: str) -> list[str]:
    """Return the options of one of Lightning's commands, as on the command line."""

    class Options(KenotronCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = Namespace(seed_everything=False)

        def instantiate_classes(self) -> None:
            pass

        def after_instantiate_classes(self) -> None:
            pass

    cli = Options(run=False)
    keys = [key for key in cli.parser.get_defaults().keys() if key]  # noqa: SIM118  # a Namespace
    return ["--config", "--print_config", "--help", "--ckpt_path", "--model", "--data", *(f"--{key}" for key in keys)]


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
        return super().error(message, ex)


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
        self.config = parser.parse_args(self._with_full_configs(args))

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
        except (ValueError, CheckpointError, OSError, yaml.YAMLError) as error:
            self._options.error(f"--config {path}: {error}")
        problems = unknown_keys(completed, self._options)
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
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Let the module have the configuration's optimizer, and every checkpoint the whole configuration."""
        instances = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
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

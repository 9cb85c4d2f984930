"""What every command of ``kenotron`` takes. Nothing heavy is imported: ``--help`` should answer at once.

The work is in the function that ``run`` names, as ``module:function`` of this package.
"""

from __future__ import annotations

import argparse

#: Commands that Lightning's command line runs, whose options jsonargparse reads.
TRAINER_COMMANDS = {
    "fit": "train",
    "validate": "run the validation",
    "test": "run the test",
    "predict": "predict",
}


def local(text: str) -> str:
    """Take a path on this machine; a URL, which ``pathlib`` would take for a folder named ``s3:``, is an error."""
    scheme, separator, _ = text.partition("://")
    if separator and scheme.isalnum():
        raise argparse.ArgumentTypeError(f"{text} is a URL, and must be a path on this machine. Mount it, or copy it first.")
    return text


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what it parses holds the function to call as ``run``."""
    root = argparse.ArgumentParser(prog="kenotron", description="Pretraining of large transformers.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in TRAINER_COMMANDS.items():  # here for the list of commands alone: `main` hands them on
        commands.add_parser(name, help=f"{what}: module, data, trainer, strategy and callbacks from a YAML", add_help=False)
    _add_checkpoint(commands)
    _add_export(commands)
    _add_convert(commands)
    _add_generate(commands)
    _add_tokenize(commands)
    _add_data(commands)
    _add_compare(commands)
    _add_import_config(commands)
    _add_launch(commands)
    _add_completion(commands)
    _add_plan(commands)
    return root


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = commands.add_parser("checkpoint", help="look into checkpoints", description="Look into checkpoints.")
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser(
        "ls",
        help="list what a checkpoint holds, or the checkpoints of a folder",
        description="List what a checkpoint holds, or the checkpoints of a folder. Reads manifests only.",
    )
    ls.add_argument("path", type=local, metavar="PATH", help="a checkpoint, or a folder of checkpoints")
    ls.add_argument("--json", action="store_true", help="print it as JSON")
    ls.set_defaults(run="checkpoint:ls")
    config = actions.add_parser(
        "config",
        help="print the configuration that kenotron fit kept in a checkpoint",
        description="Print the configuration that kenotron fit kept in a checkpoint, Kénotron's or Lightning's.",
    )
    config.add_argument("path", type=local, metavar="PATH", help="a checkpoint")
    config.add_argument("-o", "--output", type=local, metavar="FILE", help="write it there")
    config.set_defaults(run="stored_config:run")
    verify = actions.add_parser(
        "verify",
        help="read all of a checkpoint and tell what is damaged",
        description="Read all of a checkpoint and tell what is damaged. Exit code: 0 if nothing is, 1 if something is, "
        "2 if it is no checkpoint.",
    )
    verify.add_argument("path", type=local, metavar="PATH", help="a checkpoint")
    verify.set_defaults(run="checkpoint:verify")
    _add_export(actions)
    consolidate = actions.add_parser(
        "consolidate",
        help="write the weights of a checkpoint to one plain file",
        description="Write the weights of a checkpoint, saved on any layout, to one file: a .safetensors, or a .pt that "
        "torch.load opens. Memory stays below the largest tensor.",
    )
    consolidate.add_argument("checkpoint", type=local, metavar="CHECKPOINT", help="a checkpoint")
    consolidate.add_argument("out", type=local, metavar="OUT", help="the file to make: .safetensors, .pt, .pth or .bin")
    consolidate.add_argument("--optimizer", action="store_true", help="and the optimizers' state")
    consolidate.set_defaults(run="export:consolidate")
    merge = actions.add_parser(
        "merge",
        help="make one checkpoint of the parts of nodes that share no file system",
        description="Make one checkpoint, for any layout to load, of the parts that nodes without a common file system hold.",
    )
    merge.add_argument("path", type=local, metavar="OUT", help="the checkpoint to make")
    merge.add_argument(
        "parts", type=local, metavar="PART", nargs="+", help="the directory of each node, all of them, in any order"
    )
    merge.set_defaults(run="checkpoint:merge")
    fetch = actions.add_parser(
        "fetch",
        help="bring a checkpoint that Upload has sent away back to this machine",
        description="Bring a checkpoint that the callback Upload has sent to a URL to this machine, to resume from it.",
    )
    fetch.add_argument("url", metavar="URL", help="the folder that Upload sends to, such as s3://bucket/run")
    fetch.add_argument(
        "path", type=local, metavar="OUT", help="the checkpoint to make; it is left alone where it is there already"
    )
    fetch.add_argument("--name", help="of the checkpoint (default: the last that was sent)")
    fetch.set_defaults(run="checkpoint:fetch")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export",
        help="write the model of a checkpoint as a Hugging Face directory",
        description="Write the model of a checkpoint, saved on any layout, as a directory that from_pretrained loads: "
        "config.json, safetensors files, generation config and tokenizer. Memory stays below the largest tensor.",
    )
    parser.add_argument("checkpoint", type=local, metavar="CHECKPOINT", help="a checkpoint")
    parser.add_argument("out", type=local, metavar="OUT", help="the directory to make")
    _add_model_options(parser, "convert floating-point tensors to this (default: as they are)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a file in GB (default: 5)")
    parser.set_defaults(run="export:run")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        description="Convert a whole model, on a CPU, parameter by parameter. Checkpoints that this makes hold weights alone: "
        "kenotron.from_checkpoint(path) in configure_model begins with them.",
        help="convert between Hugging Face directories, checkpoints, and checkpoints of Nanotron",
    )
    kinds = ("hf-to-kenotron", "kenotron-to-hf", "nanotron-to-kenotron", "kenotron-to-nanotron")
    parser.add_argument("kind", choices=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("path", type=local, metavar="PATH", help="what to convert")
    parser.add_argument("out", type=local, metavar="OUT", help="what to make")
    parser.add_argument("--name", default="model", help="name of the model in the LightningModule (default: model)")
    parser.add_argument("--tp", type=int, default=1, help="to Nanotron: for so many tensor-parallel ranks (default: 1)")
    parser.add_argument("--rope-interleaved", action="store_true", help="to Nanotron: rotary pairs are neighbours")
    parser.set_defaults(run="export:convert")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue prompts with the model of a checkpoint",
        description="Continue prompts with the model of a checkpoint. On several GPUs, or processes, the model is split over "
        "all of them: torchrun --nproc-per-node 2 -m kenotron.cli generate ...",
    )
    parser.add_argument(
        "checkpoint", type=local, metavar="CHECKPOINT", help="a checkpoint of any layout, or a Hugging Face directory"
    )
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; several make a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most so many for each prompt (default: 64)")
    parser.add_argument("--temperature", type=float, help="sample, from logits divided by this")
    parser.add_argument("--top-k", type=int, help="sample among so many of the likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens that make up so much probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--no-cache", action="store_true", help="compute keys and values anew for every token")
    _add_model_options(parser, "of the parameters (default: float32)")
    parser.set_defaults(run="generate:run")


def _add_tokenize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="turn text into a corpus of tokens",
        description="Turn text into a corpus of tokens: JSON lines and Parquet, or plain text, a document a file; .gz and .zst "
        "are unpacked. The same bytes for any number of workers; after a kill, the same command goes on.",
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="a file, a folder, a glob, or any URL that fsspec reads")
    parser.add_argument("out", type=local, metavar="OUT", help="the folder to make, with tokens and tokenizer")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument(
        "--tokenizer", type=local, metavar="T", help="a tokenizer.json, or a folder that AutoTokenizer reads"
    )
    vocabulary.add_argument("--train-tokenizer", metavar="V", type=int, help="train a byte-level BPE of V tokens on the input")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--append-eos", action="store_true", help="end each document with the tokenizer's token for that")
    parser.add_argument("--eos-token", metavar="TOKEN", help="with --append-eos: this token, in the place of the tokenizer's")
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the tokenizer's token for that")
    parser.add_argument("--format", choices=("nanoset", "megatron"), default="nanoset", help="of the tokens (default: nanoset)")
    parser.add_argument("--column", default="text", help="that holds the text, in JSON lines and Parquet (default: text)")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what becomes of invalid UTF-8, broken JSON, missing columns, values that are no text and empty documents: the "
        "end of the run, or they are counted (default: fail)",
    )
    parser.add_argument("--shard-mb", type=float, help="input of one file of tokens (default: 1/256 of all, 4 MiB to 1 GiB)")
    parser.set_defaults(run="tokenize:run")


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("data", help="look into corpora of tokens", description="Look into corpora of tokens.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="read all of a corpus and tell what is wrong with it",
        description="Read all of a corpus: where every document ends, and every id. Exit code: 0 if it is sound, 1 if "
        "something is wrong, 2 if it can't be opened.",
    )
    check.add_argument("path", type=local, metavar="PATH", help="a file of tokens, a folder of them, or a glob")
    check.add_argument("--vocab-size", type=int, help="of the model: ids must be below (default: no limit)")
    check.add_argument("--token-size", type=int, choices=(2, 4), help="bytes of a token, where older files don't tell")
    check.set_defaults(run="data:run")


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="run one training under several strategies, side by side",
        description="Run the same module, seed, data, global batch and steps under each strategy, in fresh processes, in turn; "
        "print losses, speed, memory and what checkpoints cost. Of a configuration, callbacks, loggers and strategy are left "
        "out. Exit code: 0 if all ran, 1 if some could not, 2 if none could.",
    )
    parser.add_argument("--config", type=local, metavar="YAML", help="what is trained, as kenotron fit takes it")
    parser.add_argument(
        "--model", type=local, metavar="PATH", help="or a LightningModule: package.Module, with settings: :depth=4,lr=0.1"
    )
    parser.add_argument(
        "--data", type=local, metavar="PATH", help="and a data module, in the same form (default: the module's loaders)"
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        required=True,
        metavar="S",
        help="names with settings: ddp fsdp model_parallel deepspeed kenotron kenotron:tp=2,pp=2; the first is the reference",
    )
    parser.add_argument("--devices", type=int, help="processes (default: the configuration's, or 1)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each strategy, in turn (default: 2)")
    parser.add_argument("--seed", type=int, help="of all processes (default: the configuration's, or 1)")
    parser.add_argument("--accelerator", help="cpu, cuda, … (default: the configuration's, or what there is)")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds for one run (default: 1800)")
    parser.add_argument("--json", type=local, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=local, metavar="PNG", help="write a picture there: loss curves and bars")
    parser.add_argument(
        "--scratch", metavar="DIR", help="put what runs write here, in the place of the system's temporary folder"
    )
    parser.set_defaults(run="compare:run")


def _add_import_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import-config",
        help="make a configuration for kenotron fit of one of Nanotron's",
        description="Make a configuration for kenotron fit of a YAML of Nanotron's or of the first Kénotron's. Keys without a "
        "counterpart are named on stderr and at the head of the result.",
    )
    parser.add_argument("path", type=local, metavar="YAML", help="what to import")
    parser.add_argument("-o", "--output", type=local, metavar="FILE", help="write the result there (default: print it)")
    parser.add_argument("--devices-per-node", type=int, default=8, metavar="N", help="more processes are nodes (default: 8)")
    parser.set_defaults(run="import_config:run")


def _add_launch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    launch = commands.add_parser("launch", help="write job scripts for clusters", description="Write job scripts for clusters.")
    systems = launch.add_subparsers(dest="system", required=True, metavar="SYSTEM")
    parser = systems.add_parser(
        "slurm",
        help="a batch script that trains, is requeued when it is preempted, and goes on",
        description="Write a batch script that trains a configuration, is requeued when it is preempted or its time is over, "
        "and goes on from the last checkpoint. Options of kenotron fit may follow after --.",
    )
    parser.add_argument("--config", type=local, metavar="YAML", required=True, help="what is trained, as kenotron fit takes it")
    parser.add_argument("--nodes", type=int, default=1, help="(default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node, and processes (default: 8)")
    parser.add_argument("--cpu", action="store_true", help="ask for no GPUs; processes are as many")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="cores of a process (default: 8)")
    parser.add_argument("--time", help="limit of the job, as 12:00:00 (default: the partition's)")
    for name in ("job-name", "partition", "account", "qos", "constraint", "mem"):
        parser.add_argument(f"--{name}", help="as sbatch takes it")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further one, as exclusive or nice=10"
    )
    parser.add_argument("--signal-s", type=int, default=180, help="seconds from the signal to the end (default: 180)")
    parser.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="of shell, before training: module load cuda"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="an environment variable")
    parser.add_argument("--chdir", type=local, metavar="DIR", help="folder to train in (default: this one)")
    parser.add_argument("--container", metavar="IMAGE", help="train in it: a .sif by Apptainer, all else by pyxis")
    parser.add_argument("--container-mount", action="append", default=[], metavar="FROM:TO", help="a folder that it should see")
    parser.add_argument("--log-dir", default="logs", type=local, metavar="DIR", help="of what the job prints (default: logs)")
    parser.add_argument(
        "-o", "--output", type=local, metavar="FILE", help="of the script (default: the job's name, with .sbatch)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, and write nothing")
    parser.add_argument("--submit", action="store_true", help="run sbatch")
    parser.add_argument("fit_options", nargs="*", metavar="OPTION", help="of kenotron fit, after --")
    parser.set_defaults(run="launch:slurm")


def _add_completion(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that lets a shell complete commands and options",
        description="Print a script that lets a shell complete commands and options. For this shell alone: source "
        "<(kenotron completion bash). For all to come, write it to ~/.local/share/bash-completion/completions/kenotron.",
    )
    parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")
    parser.set_defaults(run="completion:run")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="find the layouts of a model that fit, and the fastest of them",
        description="Find the layouts of a model that fit on so many devices: memory of the fullest rank, bubble, traffic, "
        "time of a step. Runs on a laptop. Exit code: 0 if something fits, 1 if nothing does, 2 if the input is no good.",
    )
    parser.add_argument(
        "--model", required=True, metavar="CONFIG",
        help="a transformers configuration (its directory or config.json), or package.module:name of a module or configuration",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, required=True, help="how many")
    parser.add_argument("--device", default="h100", help="which: h100, a100, mi300x, … (default: h100)")
    parser.add_argument("--batch-tokens", default="4M", help="of an update, over all devices: 4M, 512K, 4194304 (default: 4M)")
    parser.add_argument("--seq", type=int, default=8192, help="tokens of a sample (default: 8192)")
    parser.add_argument("--precision", default="bf16-mixed", help="as Trainer takes it (default: bf16-mixed)")
    parser.add_argument("--memory-gb", type=float, help="of a device for tensors (default: 92 %% of what it has)")
    parser.add_argument("--optimizer-states", type=float, default=2.0, help="numbers for each parameter (default: 2, AdamW)")
    parser.add_argument("--compile", action="store_true", help="blocks are compiled")
    fixed = parser.add_argument_group("settings", "What is given here is kept to; everything else is searched.")
    for name in ("tp", "pp", "cp", "ep", "dp-replicate", "virtual-stages"):
        fixed.add_argument(f"--{name}", type=int, metavar="N")
    fixed.add_argument("--zero", type=int, choices=(0, 1, 2, 3))
    fixed.add_argument("--schedule", choices=("1f1b", "afab", "interleaved_1f1b"))
    fixed.add_argument("--microbatch", type=int, metavar="N", help="samples that run at once")
    fixed.add_argument("--recompute", choices=("none", "full", "selective"))
    fixed.add_argument("--sequence-parallel", choices=("on", "off"))
    parser.add_argument("--top", type=int, default=10, help="how many to print (default: 10)")
    parser.add_argument("--json", type=local, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--yaml", type=local, metavar="FILE", help="write the first one as LightningCLI takes it")
    parser.add_argument(
        "--picture", type=local, metavar="FILE", help="draw the best ones: memory, time, what each stage does when"
    )
    parser.set_defaults(run="plan:run")


def _add_model_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--model", help="name of the model in the LightningModule, where there are several")
    parser.add_argument("--config", help="a directory with the model's config.json, in the place of what the checkpoint notes")
    parser.add_argument("--tokenizer", help="a directory with the tokenizer, in the place of what the checkpoint notes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=dtype)

"""The command line: ``kenotron checkpoint``, ``export``, ``convert``, ``generate``, ``tokenize``, ``data check``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code of the process.

    Args:
        arguments: those of the command line, without the program's name; None takes them from there.
    """
    options = _parser().parse_args(arguments)
    if options.command == "export":
        from kenotron.cli import export

        return export.run(options)
    if options.command == "convert":
        from kenotron.cli import export

        return export.convert(options)
    if options.command == "tokenize":
        from kenotron.cli import tokenize

        return tokenize.run(options)
    if options.command == "data":
        from kenotron.cli import data

        return data.run(options)
    if options.command == "generate":
        from kenotron.cli import generate

        return generate.run(options)
    from kenotron.cli import checkpoint  # imports torch, which takes seconds that no --help should

    if options.action == "ls":
        return checkpoint.ls(options.path, as_json=options.json)
    if options.action == "merge":
        return checkpoint.merge(options.parts, options.path)
    return checkpoint.verify(options.path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kenotron", description="Pretraining of large transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checkpoint = commands.add_parser("checkpoint", help="look into checkpoints", description="Look into checkpoints.")
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser(
        "ls",
        help="list what a checkpoint holds, or the checkpoints of a folder",
        description="List what a checkpoint holds, or the checkpoints of a folder. Reads manifests only.",
    )
    ls.add_argument("path", metavar="PATH", help="a checkpoint, or a folder of checkpoints")
    ls.add_argument("--json", action="store_true", help="print it as JSON")
    verify = actions.add_parser(
        "verify",
        help="read all of a checkpoint and tell what is damaged",
        description="Read all of a checkpoint and tell what is damaged. Exit code: 0 if nothing is, 1 if something is, "
        "2 if it is no checkpoint.",
    )
    verify.add_argument("path", metavar="PATH", help="a checkpoint")
    merge = actions.add_parser(
        "merge",
        help="make one checkpoint of the parts of nodes that share no file system",
        description="Make one checkpoint, for any layout to load, of the parts that nodes without a common file system hold.",
    )
    merge.add_argument("path", metavar="OUT", help="the checkpoint to make")
    merge.add_argument("parts", metavar="PART", nargs="+", help="the directory of each node, all of them, in any order")
    _add_export(commands)
    _add_convert(commands)
    _add_generate(commands)
    _add_tokenize(commands)
    _add_data(commands)
    return parser


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export",
        help="write the model of a checkpoint as a Hugging Face directory",
        description="Write the model of a checkpoint, saved on any layout, as a directory that from_pretrained loads: "
        "config.json, safetensors files, generation config and tokenizer. Memory stays below the largest tensor.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    _add_model_options(parser, "convert floating-point tensors to this (default: as they are)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a file in GB (default: 5)")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        description="Convert a whole model, on a CPU, parameter by parameter. Checkpoints that this makes hold weights alone: "
        "kenotron.from_checkpoint(path) in configure_model begins with them.",
        help="convert between Hugging Face directories, checkpoints, and checkpoints of Nanotron",
    )
    kinds = ("hf-to-kenotron", "kenotron-to-hf", "nanotron-to-kenotron", "kenotron-to-nanotron")
    parser.add_argument("kind", choices=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("path", metavar="PATH", help="what to convert")
    parser.add_argument("out", metavar="OUT", help="what to make")
    parser.add_argument("--name", default="model", help="name of the model in the LightningModule (default: model)")
    parser.add_argument("--tp", type=int, default=1, help="to Nanotron: for so many tensor-parallel ranks (default: 1)")
    parser.add_argument("--rope-interleaved", action="store_true", help="to Nanotron: rotary pairs are neighbours")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue prompts with the model of a checkpoint",
        description="Continue prompts with the model of a checkpoint. On several GPUs, or processes, the model is split over "
        "all of them: torchrun --nproc-per-node 2 -m kenotron.cli generate ...",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of any layout, or a Hugging Face directory")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; several make a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most so many for each prompt (default: 64)")
    parser.add_argument("--temperature", type=float, help="sample, from logits divided by this")
    parser.add_argument("--top-k", type=int, help="sample among so many of the likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens that make up so much probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--no-cache", action="store_true", help="compute keys and values anew for every token")
    _add_model_options(parser, "of the parameters (default: float32)")


def _add_tokenize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="turn text into a corpus of tokens",
        description="Turn text into a corpus of tokens: JSON lines and Parquet, or plain text, a document a file; .gz and .zst "
        "are unpacked. The same bytes for any number of workers; after a kill, the same command goes on.",
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="a file, a folder, a glob, or any URL that fsspec reads")
    parser.add_argument("out", metavar="OUT", help="the folder to make, with tokens and tokenizer")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--tokenizer", metavar="T", help="a tokenizer.json, or a folder that AutoTokenizer reads")
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


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("data", help="look into corpora of tokens", description="Look into corpora of tokens.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="read all of a corpus and tell what is wrong with it",
        description="Read all of a corpus: where every document ends, and every id. Exit code: 0 if it is sound, 1 if "
        "something is wrong, 2 if it can't be opened.",
    )
    check.add_argument("path", metavar="PATH", help="a file of tokens, a folder of them, or a glob")
    check.add_argument("--vocab-size", type=int, help="of the model: ids must be below (default: no limit)")
    check.add_argument("--token-size", type=int, choices=(2, 4), help="bytes of a token, where older files don't tell")


def _add_model_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--model", help="name of the model in the LightningModule, where there are several")
    parser.add_argument("--config", help="a directory with the model's config.json, in the place of what the checkpoint notes")
    parser.add_argument("--tokenizer", help="a directory with the tokenizer, in the place of what the checkpoint notes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=dtype)

"""What every command may be told: a table of its arguments, which needs no torch to print `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from gpt2lite.config import ACTIVATIONS, EMBEDDED, NEW_TOKENS, OFFICIAL_SIZES, official_name
from gpt2lite.finetuning.recipe import Recipe

# Tables of the library, by their names: the tables themselves hold functions of torch.
STRATEGIES = ("baseline", "sequential", "meta", "mmap", "per_tensor", "stream")
ENGINES = ("numba", "cuda_graph", "torch")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}
FORMATS = ("pth", "safetensors", "per-tensor", "dcp", "gguf")
REFERENCES = ("torch", "transformers")
PARALLEL = ("fsdp", "tp", "ddp")
OFFLOAD = ("auto", "disk", "host")
DIALECTS = {"book": "book", "hf": "huggingface", "nanogpt": "nanogpt", "gguf": "gguf"}

EMBEDDED_PROMPT = "Once upon a time"
DEFAULT_PROMPT = "Hello, I am"
CHECKPOINT = "a checkpoint, a model on the Hub (gpt2 … gpt2-xl, owner/name), or an address: hf://, https://"
OR_EMBEDDED = f"{CHECKPOINT} (default: the small model that is embedded in gpt2lite)"

Rows = dict[str, dict[str, Any]]


def _arg(help: str, **options: Any) -> dict[str, Any]:
    return {"help": help, **options}


def _dtype(name: str) -> str:
    return SHORT.get(name.lower(), name)


_int, _number = partial(_arg, type=int, metavar="N"), partial(_arg, type=float, metavar="X")
_size, _path = partial(_arg, metavar="SIZE"), partial(_arg, type=Path)
_file, _switch = partial(_path, metavar="FILE"), partial(_arg, action="store_true")
_text = partial(_arg, metavar="TEXT")

SIZES: dict[str, Any] = {"type": official_name, "choices": OFFICIAL_SIZES}
SHARED: Rows = {
    "--quiet": _switch("no progress and no remarks, only results and warnings"),
    "path": _arg(OR_EMBEDDED, nargs="?", default=EMBEDDED),
    "source": _arg(CHECKPOINT),
    "destination": _path("a .pth, a .safetensors, a .gguf, or a new folder"),
    "--to": _arg(
        "whose names and layout; gguf is llama.cpp's (default: %(default)s)", choices=DIALECTS, default="book"
    ),
    "--folder": _path("for temporary files (default: the system's)", metavar="DIR"),
    "--json": _switch("print JSON"),
    "--device": _arg("cpu, cuda, cuda:1 … (default: a GPU that is free, else cpu)", default="auto"),
    "--strategy": _arg(
        "how to load (default: the best that fits)", choices=("auto", *STRATEGIES), default="auto"
    ),
    "--revision": _arg("branch, tag or commit of a model on the Hub", metavar="REV"),
    "--n-heads": _int("number of attention heads, if the file does not say"),
    "--activation": _arg(
        "activation function, if the file does not say (nanoGPT, minGPT)", choices=ACTIVATIONS
    ),
    "--lora-alpha": _number("alpha of the book's LoRA layers, if the file has any"),
    "--dtype": _arg("cast the weights (default: as in the file)", type=_dtype, choices=DTYPES),
    "--quantize": _arg("int8: weights of 8 bits with one scale per row", choices=("int8",)),
    "--offload": _arg("where blocks stay that do not fit", choices=OFFLOAD),
    "--parallel": _arg("under torchrun: how its processes share the model", choices=PARALLEL),
    "--max-host-memory": _size("cap on what loading adds to host memory: 512MiB, 2GiB"),
    "--max-device-memory": _size("cap on what loading adds to device memory"),
}
CONFIG = ("--revision", "--n-heads", "--activation")
CAPS = ("--max-host-memory", "--max-device-memory")
LOADING = ("--strategy", "--device", *CONFIG, "--lora-alpha", "--dtype", *CAPS)


@dataclass(frozen=True, slots=True)
class Command:
    """A command: where its `run_NAME` is, its own arguments and SHARED ones, which exclude or need others."""

    module: str
    summary: str
    own: Rows
    shared: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    needs_one: bool = False
    needs: tuple[tuple[str, str], ...] = ()
    with_recipe: bool = False


COMMANDS = {
    "generate": Command(
        "texts",
        "write text with a model, by default a small one that is embedded",
        {
            "--model": _arg(argparse.SUPPRESS),  # as it was called before it came first
            "--prompt": _text(f"default: {EMBEDDED_PROMPT!r}; {DEFAULT_PROMPT!r} for other models"),
            "--prompts": _arg("one prompt per line; - reads standard input", metavar="FILE"),
            "--instruction": _text("for a model that was finetuned on instructions: what to do"),
            "--input": _text("with --instruction: what to do it with"),
            "--num-samples": _int("texts for each prompt (default: 1)", default=1),
            "--max-new-tokens": _int(f"default: {NEW_TOKENS}, or what fits in the context"),
            "--temperature": _number("0 is greedy (default), 1 samples as trained", default=0.0),
            "--top-k": _int("sample from the N most probable tokens"),
            "--top-p": _number("sample from the most probable tokens that together reach X"),
            "--min-p": _number("sample from tokens with at least X × the top probability"),
            "--repetition-penalty": _number("above 1: repeat less (default: 1)", default=1.0),
            "--stop": _arg("end the output before this text; can be repeated", action="append", default=[]),
            "--seed": _int("makes sampling repeatable; each further text uses the next seed"),
            "--window": _int("when the context is full, go on from the last N tokens"),
            "--engine": _arg(
                "what computes tokens (default: the fastest that can run)",
                choices=("auto", *ENGINES),
                default="auto",
            ),
        },
        ("path", *LOADING, "--parallel", "--quantize", "--offload"),
        one_of=("--prompt", "--prompts", "--instruction"),
        needs=(("input", "instruction"),),
    ),
    "classify": Command(
        "texts",
        "say which class a text belongs to, with a finetuned classifier",
        {
            "path": _arg(CHECKPOINT),
            "text": _arg("the text", nargs="?"),
            "--file": _arg("records with text (.json, .jsonl, .csv), else a text per line", metavar="FILE"),
        },
        ("--json", *LOADING),
        one_of=("text", "--file"),
        needs_one=True,
    ),
    "bench": Command(
        "bench",
        "measure what every way of loading costs in memory and time",
        {
            "path": _arg(OR_EMBEDDED, nargs="?"),
            "--size": _arg("write a random checkpoint of this size first", **SIZES),
            "--strategies": _arg(
                "ways of loading (default: all)", nargs="+", choices=STRATEGIES, default=STRATEGIES
            ),
            "--json": _arg("save everything as JSON; - prints it instead", metavar="FILE.json"),
            "--plot": _path("draw memory over time (needs matplotlib)", metavar="FILE.png"),
        },
        ("--folder", "--device", *CONFIG, "--dtype"),
        one_of=("path", "--size"),
    ),
    "plan": Command(
        "plan",
        "show what a load will cost, what fits, and what auto would choose, before loading",
        {
            "--device": _arg("cpu, cuda, cuda:1 …; it may be absent (default: what is here)", default="auto"),
            "--size": _arg("plan for this size, without any file", **SIZES),
            "--train": _switch("show what training would take instead"),
            "--fit": _size("with --train: find the cheapest settings that fit in SIZE"),
            "--classes": _int("with --train: a classifier of N classes"),
            "--ranks": _int("what the first of N processes of torchrun would take; none need run"),
            "--parallel": _arg("how they share the model (default: fsdp)", choices=PARALLEL),
        },
        ("path", "--json", *CONFIG, "--dtype", "--quantize", "--offload", *CAPS),
        one_of=("path", "--size"),
        with_recipe=True,
        needs=(("fit", "train"), ("classes", "train"), ("parallel", "ranks")),
    ),
    "convert": Command(
        "checkpoints",
        "write a checkpoint with another program's names, layout and file format",
        {
            "--format": _arg("kind of file (default: by suffix; safetensors for a folder)", choices=FORMATS),
            "--max-shard-size": _size("split a folder's safetensors: 2GiB, 5GB"),
            "--no-verify": _switch("do not read the result back"),
        },
        ("source", "destination", "--to", *CONFIG, "--dtype"),
    ),
    "prune": Command(
        "checkpoints",
        "write a checkpoint without some of its blocks, those that a text misses least",
        {
            "--keep-blocks": _int("how many blocks stay, chosen by --text"),
            "--blocks": _arg("the numbers of the blocks that stay, from 0", type=int, nargs="+", metavar="N"),
            "--text": _arg("UTF-8 that it was not trained on; - reads standard input", metavar="FILE"),
        },
        ("source", "destination", "--to", "--device", *CONFIG, "--dtype"),
        one_of=("--keep-blocks", "--blocks"),
        needs_one=True,
    ),
    "inspect": Command(
        "checkpoints",
        "describe a checkpoint from its headers alone",
        {
            "path": _arg(
                "a file, a TensorFlow model.ckpt, a folder, a Hub model, or an address: hf://, https://"
            )
        },
        ("--json", *CONFIG),
    ),
    "verify": Command(
        "checkpoints",
        "load a checkpoint in two independent ways and compare what they compute",
        {"--against": _arg("what else loads it (default: torch)", choices=REFERENCES, default="torch")},
        ("path", "--json", "--folder", *LOADING),
    ),
    "evaluate": Command(
        "texts",
        "measure how well a model predicts a text: its perplexity",
        {
            "--text": _arg("UTF-8; - reads standard input", required=True, metavar="FILE"),
            "--context": _int("tokens in each window (default: the model's context)"),
            "--stride": _int("tokens from one window to the next (default: half the context)"),
        },
        ("path", "--json", *LOADING, "--parallel", "--quantize", "--offload"),
    ),
    "finetune": Command(
        "finetune",
        "train a checkpoint further, on text, instructions or labelled texts",
        {
            "--text": _file("UTF-8, or tokens: .npy, or .bin as gpt2lite, nanoGPT and llm.c write it"),
            "--instructions": _file("records with instruction, output, perhaps input: .json, .jsonl, .csv"),
            "--classify": _file("records with text and label: .json, .jsonl, .csv; trains a classifier"),
            "--out": _path("a new or empty folder", required=True, metavar="DIR"),
            "--keep-blocks": _int("first leave out all but N blocks, chosen by the end of --text"),
            "--resume": _switch("continue the run in --out with its recipe; flags given here win"),
        },
        ("path", "--strategy", "--device", "--parallel", *CONFIG, "--dtype", *CAPS),
        one_of=("--text", "--instructions", "--classify"),
        needs_one=True,
        with_recipe=True,
    ),
    "tokenize": Command(
        "texts",
        "write a text as a token file to train on",
        {
            "text": _path("UTF-8; <|endoftext|> separates documents"),
            "tokens": _path("output: .npy, or .bin with 16 bits per token like nanoGPT's train.bin"),
            "--model": _arg("use this model's tokenizer (default: GPT-2's)", metavar="PATH|NAME"),
        },
        ("--revision",),
    ),
    "env": Command("bench", "show versions, processors and available memory", {}, ("--json",)),
}


BY_TYPE: dict[type, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    tuple: {"nargs": "+", "metavar": "LAYER"},
    str: {"metavar": "NAME"},
}


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each field of Recipe; only those that are given are in the arguments."""
    group = parser.add_argument_group("recipe")
    for field in fields(Recipe):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        kind = int if default is None else type(default)
        number = {"type": kind, "metavar": "N" if kind is int else "X"}
        options = BY_TYPE.get(type(default), number)
        shown = f" (default: {default})" if options is number and default is not None else ""
        group.add_argument(flag, default=argparse.SUPPRESS, help=field.metadata["help"] + shown, **options)


def add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    """Declare what a command may be told."""
    rows = command.own | {name: SHARED[name] for name in (*command.shared, "--quiet")}
    group = parser.add_mutually_exclusive_group(required=command.needs_one) if command.one_of else parser
    for name, options in rows.items():
        if "choices" in options:  # a line of usage would be wider than a terminal with all of them
            told = f"{options['help']}; one of {', '.join(options['choices'])}"
            told = options["help"] if len(options["choices"]) == 1 else told
            options = {**options, "metavar": "NAME", "help": told}
        (group if name in command.one_of else parser).add_argument(name, **options)
    if command.with_recipe:
        _add_recipe(parser)


def check_needs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for an argument that says nothing without another one."""
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    for name, needed in COMMANDS[args.command].needs:
        if name in given and needed not in given:
            parser.error(f"argument --{name}: says nothing without --{needed}")


def recipe_of(args: argparse.Namespace, otherwise: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that the flags say, and `otherwise` where they are silent. Raises UsageError."""
    said = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    found: dict[str, Any] = {**(otherwise or {}), **said}
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return Recipe(**found)

"""A recipe from the command line: a flag for each of its fields."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gpt2lite.finetuning.recipe import LORA_TARGETS, Recipe

HELP = {
    "steps": "optimisation steps",
    "batch_size": "rows in memory at once",
    "seq_len": "tokens a row (default: the context)",
    "accumulate": "batches a step",
    "learning_rate": "at its highest",
    "warmup_steps": "steps until the learning rate is at its highest",
    "weight_decay": "of matrices",
    "clip": "largest norm of the gradient, 0 for no clipping",
    "seed": "of the data's order, adapters and dropout",
    "autocast": "bf16 (or fp16) in matrix products",
    "recompute": "keep only blocks' inputs, run blocks again in backward",
    "chunked_loss": "logits for a few rows at a time",
    "step_in_backward": "step each weight as soon as its gradient is there (with --clip 0)",
    "lora_rank": "train only adapters of this rank, 0 for none",
    "lora_alpha": "what their product is multiplied by",
    "lora_targets": f"layers that get an adapter: {', '.join(LORA_TARGETS)}",
    "last_blocks": "train only this many last blocks and the last norm",
    "eight_bit": "Adam's moments in 8 bits, by torchao",
    "compile": "torch.compile the step",
    "validate_every": "steps between validations",
    "save_every": "steps between saved states",
    "keep": "saved states to keep",
}
OPTIONS: dict[type, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    tuple: {"nargs": "+", "metavar": "LAYER"},
}


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each field of Recipe; only those that are given are in the arguments."""
    group = parser.add_argument_group("recipe")
    for field in fields(Recipe):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        number = {"type": int if default is None else type(default), "metavar": "N"}
        options = OPTIONS.get(type(default), number)
        shown = f" (default: {default})" if options is number and default is not None else ""
        group.add_argument(flag, default=argparse.SUPPRESS, help=HELP[field.name] + shown, **options)


def recipe_of(args: argparse.Namespace, otherwise: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that the flags say, and `otherwise` where they are silent. Raises UsageError."""
    said = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    found: dict[str, Any] = {**(otherwise or {}), **said}
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return Recipe(**found)

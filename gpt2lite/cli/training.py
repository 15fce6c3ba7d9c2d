"""A recipe from the command line: a flag for each of its fields."""

from __future__ import annotations

import argparse
from dataclasses import fields

from gpt2lite.finetuning import Recipe
from gpt2lite.finetuning.recipe import LORA_TARGETS

HELP = {
    "steps": "optimisation steps",
    "batch_size": "rows in memory at once",
    "seq_len": "tokens a row (default: the context)",
    "accumulate": "batches a step",
    "learning_rate": "at its highest",
    "warmup_steps": "until it is there",
    "weight_decay": "of matrices",
    "clip": "largest norm of the gradient, 0 for any",
    "seed": "of the data's order, adapters and dropout",
    "autocast": "bf16 (or fp16) in matrix products",
    "recompute": "keep blocks' inputs alone, run blocks again in backward",
    "chunked_loss": "logits for a few rows at a time",
    "step_in_backward": "step each weight as soon as its gradient is there (with --clip 0)",
    "lora_rank": "train adapters of this rank alone, 0 for none",
    "lora_alpha": "what their product is multiplied by",
    "lora_targets": f"layers that get one: {', '.join(LORA_TARGETS)}",
    "last_blocks": "train so many blocks and the last norm alone",
    "eight_bit": "Adam's moments in 8 bits, by torchao",
    "compile": "torch.compile the step",
}
PARSERS = {"seq_len": int, "last_blocks": int}


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each field of Recipe."""
    group = parser.add_argument_group("recipe")
    for field in fields(Recipe):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        text = HELP[field.name] + ("" if default is None else " (default: %(default)s)")
        if isinstance(default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=default, help=HELP[field.name]
            )
        elif isinstance(default, tuple):
            group.add_argument(flag, nargs="+", default=default, metavar="LAYER", help=HELP[field.name])
        else:
            parse = PARSERS.get(field.name, type(default))
            group.add_argument(flag, type=parse, default=default, metavar="N", help=text)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags say. Raises UsageError for what cannot work."""
    said = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return Recipe(**said | {"lora_targets": tuple(args.lora_targets)})

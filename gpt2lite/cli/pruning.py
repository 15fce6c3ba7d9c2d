"""`gpt2lite prune`: a smaller model, and what it lost."""

from __future__ import annotations

import argparse

import torch

from gpt2lite.cli.arguments import DIALECTS
from gpt2lite.cli.loading import config_of, dtype_of, local_path
from gpt2lite.cli.terminal import bytes_bar, facts, read_text
from gpt2lite.errors import UsageError
from gpt2lite.memory import human
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened
from gpt2lite.pruning import Pruning, choose_blocks, keep_blocks, prune
from gpt2lite.tokenizer import text_ids, tokenizer_for


def _choose(opened: Opened[GPTModel], args: argparse.Namespace) -> Pruning:
    """The blocks that stay. Raises UsageError without a text."""
    if args.text is None:
        raise UsageError("--keep-blocks needs --text, a text to choose by; or name the blocks with --blocks")
    encoding = tokenizer_for(opened.path, opened.config.vocab_size)
    ids = text_ids(encoding, read_text(args.text))
    with bytes_bar("loading") as progress:
        model = opened.load(args.device, dtype=torch.float32, progress=progress)
    with bytes_bar("choosing", "window") as progress:
        return choose_blocks(model, ids, args.keep_blocks, progress)


def run_prune(args: argparse.Namespace) -> int:
    """Choose, write, and print what was kept and what it costs in loss."""
    if args.blocks and args.text is not None:
        raise UsageError("--text chooses the blocks that stay; leave it out, or --blocks")
    opened = open_model(local_path(args.source, args.revision), config=config_of(args))
    chosen = Pruning(tuple(args.blocks), ()) if args.blocks else _choose(opened, args)
    with bytes_bar(f"writing {args.destination.name}") as progress:
        to, dtype, blocks = DIALECTS[args.to], dtype_of(args), chosen.kept
        path = prune(opened, args.destination, blocks=blocks, progress=progress, to=to, dtype=dtype)
    sizes = (human(part.plan().model_bytes) for part in (opened, keep_blocks(opened, chosen.kept)))
    losses = " → ".join(f"{loss:.4f}" for loss in chosen.losses)
    print(facts([
        ("destination", path),
        ("blocks", f"{', '.join(map(str, chosen.kept))} of {opened.config.n_layers}"),
        ("weights", " → ".join(sizes)),
        ("loss", f"{losses} nats per token, with one block less each" if losses else "not measured"),
    ]))  # fmt: skip
    return 0

"""`gpt2lite verify`: whether a checkpoint is loaded right, by two independent ways."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from gpt2lite.cli.loading import config_of, load_to_read, local_path, strategy_of
from gpt2lite.cli.terminal import as_json, facts
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.model import open_model
from gpt2lite.tokenizer import tokenizer_for
from gpt2lite.verification import Verification, verify


def _text(path: Path, found: Verification) -> str:
    try:
        return repr(tokenizer_for(path, found.config.vocab_size).decode(found.ids[found.prompt_tokens :]))
    except (CheckpointError, UsageError):
        return "no tokenizer at hand"


def run(args: argparse.Namespace) -> int:
    """Print the largest difference, and pass or fail; 1 for fail."""
    path = local_path(args.path, args.revision)
    opened = open_model(path, config=config_of(args), lora_alpha=args.lora_alpha)
    found = verify(lambda: load_to_read(path, args), opened, against=args.against, folder=args.folder)
    if args.json:
        print(as_json({"path": str(path), **asdict(found), "passed": found.passed}))
    else:
        print(facts([
            ("loaded by", f"gpt2lite, strategy {strategy_of(args)}; and {found.reference}"),
            ("logits", f"largest difference {found.difference:.3g}, allowed {found.tolerance:.3g}"),
            ("greedy tokens", f"{found.agreed_tokens} of {found.new_tokens} agree"),
            ("written", _text(path, found)),
            ("not checked", found.unchecked or "nothing is shared but the weights' bytes"),
        ]))  # fmt: skip
        print("PASS" if found.passed else "FAIL")
    return 0 if found.passed else 1

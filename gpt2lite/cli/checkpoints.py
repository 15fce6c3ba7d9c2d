"""`gpt2lite inspect`, `verify`, `convert`, `prune`: what a checkpoint is, if it loads right, its copies."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from gpt2lite.cli.arguments import DIALECTS
from gpt2lite.cli.loading import choose_by, config_of, dtype_of, load_to_read, open_to_read, strategy_of
from gpt2lite.cli.terminal import as_json, bytes_bar, facts, read_text
from gpt2lite.converting import plan_conversion, run_conversion
from gpt2lite.dialects.configs import UNSAYABLE
from gpt2lite.dialects.reading import Reading
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.memory import human
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened, locate
from gpt2lite.pruning import Pruning, keep_blocks, prune
from gpt2lite.tokenizer import text_ids
from gpt2lite.verification import Verification, verify

MAX_NAMED = 3


def _oddities(reading: Reading) -> list[str]:
    spans = list(reading.manifest.tensors.values())
    misaligned = sum(span.offset % span.dtype.itemsize != 0 for span in spans)
    counted = [
        (len(reading.masks), "stored attention masks, which loading skips"),
        (len(reading.passengers), "tensors beside the model (an optimizer?), which loading never reads"),
        (len(reading.adapters), "LoRA layers, merged while loading, with the alpha you give"),
        (len(reading.unexpected), f"unknown tensors: {', '.join(reading.unexpected[:MAX_NAMED])}"),
        (len(reading.manifest.unreadable), f"unreadable: {', '.join(reading.manifest.unreadable)[:200]}"),
        (misaligned, "tensors not aligned to their item size"),
        (sum(span.extent != span.nbytes for span in spans), "tensors whose bytes are not contiguous"),
    ]
    return [f"{count} {what}" for count, what in counted if count]


def _config(opened: Opened[GPTModel]) -> tuple[dict[str, Any], str]:
    """The config; None where it cannot be known, and the reason is the second value."""
    try:
        return opened.config.as_dict(), ""
    except CheckpointError as error:
        unsaid = {key: None for key in UNSAYABLE if opened.found.fields.get(key) is None}
        return opened.sizes.as_dict() | unsaid, str(error)


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    opened = open_model(args.path, revision=args.revision, config=config_of(args))
    reading, manifest = opened.reading, opened.reading.manifest
    config, problem = _config(opened)
    sources = (manifest.tensors[placement.source] for placement in reading.placements.values())
    spans = list({span.address: span for span in sources}.values())
    shared = defaultdict(list)
    for span in manifest.tensors.values():
        shared[span.address].append(span.name)
    dtypes = Counter(str(span.dtype).removeprefix("torch.") for span in spans)
    return {
        "path": str(manifest.path),
        "format": manifest.format,
        "dialect": reading.dialect,
        "config": config,
        "parameters": sum(span.numel for span in spans),
        "model_bytes": sum(span.nbytes for span in spans),
        "file_bytes": sum(state.size for state in manifest.files.values()),
        "tensors": len(manifest.tensors),
        "dtypes": dict(dtypes),
        "ties": [names for names in shared.values() if len(names) > 1],
        "oddities": [*_oddities(reading), *opened.found.notes, *([problem] if problem else [])],
    }


def run_inspect(args: argparse.Namespace) -> int:
    """Print what the checkpoint is."""
    found = _describe(args)
    print(as_json(found) if args.json else facts([
        *((name, found[name]) for name in ("path", "format", "dialect")),
        ("config", "  ".join(f"{key}={value}" for key, value in found["config"].items())),
        ("parameters", f"{found['parameters']:,}"),
        ("size", f"{human(found['model_bytes'])} of weights in {human(found['file_bytes'])} of files"),
        ("tensors", found["tensors"]),
        ("dtypes", ", ".join(f"{name} × {count}" for name, count in found["dtypes"].items())),
        ("ties", "; ".join(" = ".join(names) for names in found["ties"]) or "none"),
        ("oddities", "\n          ".join(found["oddities"]) or "none"),
    ]))  # fmt: skip
    return 0


def _text(opened: Opened[GPTModel], found: Verification) -> str:
    try:
        return repr(opened.beside.tokenizer.decode(found.ids[found.prompt_tokens :]))
    except (CheckpointError, UsageError):
        return "no tokenizer found"


def run_verify(args: argparse.Namespace) -> int:
    """Print the largest difference, and pass or fail; 1 for fail."""
    path = locate(args.path, {"revision": args.revision})
    opened = open_to_read(path, args)
    found = verify(lambda: load_to_read(opened, args), opened, against=args.against, folder=args.folder)
    if args.json:
        print(as_json({"path": str(path), **asdict(found), "passed": found.passed}))
    else:
        agreed = ("greedy tokens", f"{found.agreed_tokens} of {found.new_tokens} agree")
        print(facts([
            ("loaded by", f"gpt2lite, strategy {strategy_of(opened, args)}; and {found.reference}"),
            ("logits", f"largest difference {found.difference:.3g}, allowed {found.tolerance:.3g}"),
            *([agreed, ("written", _text(opened, found))] if found.new_tokens else ()),  # a classifier: none
            ("not checked", found.unchecked or "nothing is shared but the weights' bytes"),
        ]))  # fmt: skip
        print("PASS" if found.passed else "FAIL")
    return 0 if found.passed else 1


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and say what was made."""
    job = plan_conversion(
        locate(args.source, {"revision": args.revision}),
        args.destination,
        to=DIALECTS[args.to],
        format=args.format,
        dtype=dtype_of(args),
        max_shard_size=args.max_shard_size,
        config=config_of(args),
    )
    with bytes_bar(f"writing {args.destination.name}") as progress:
        run_conversion(job, verified=not args.no_verify, progress=progress)
    print(facts([
        ("source", f"{args.source} ({job.dialect}, {job.source.format})"),
        ("destination", job.destination),
        ("dialect", job.to),
        ("format", job.format),
        ("size", f"{human(job.nbytes)} in {len(job.tensors)} tensors"),
        ("verified", "no" if args.no_verify else "yes, every tensor read back"),
    ]))  # fmt: skip
    return 0


def _choose(opened: Opened[GPTModel], args: argparse.Namespace) -> Pruning:
    """The blocks that stay: those that are named, or as many as are asked for, chosen by a text."""
    if args.blocks and args.text is not None:
        raise UsageError("--text chooses the blocks that stay; leave it out, or --blocks")
    if args.blocks:
        return Pruning(tuple(args.blocks), ())
    if args.text is None:
        raise UsageError("--keep-blocks needs --text, a text to choose by; or name the blocks with --blocks")
    ids = text_ids(opened.beside.tokenizer, read_text(args.text))
    return choose_by(ids, opened, args)


def run_prune(args: argparse.Namespace) -> int:
    """Choose, write, and print what was kept and what it costs in loss."""
    opened = open_model(args.source, revision=args.revision, config=config_of(args))
    chosen = _choose(opened, args)
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

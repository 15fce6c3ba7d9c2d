"""`gpt2lite inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from typing import Any

from gpt2lite.cli.loading import config_of
from gpt2lite.cli.terminal import as_json, facts
from gpt2lite.dialects.configs import UNSAYABLE
from gpt2lite.dialects.reading import Reading
from gpt2lite.errors import CheckpointError
from gpt2lite.memory import human
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened

MAX_NAMED = 3


def _oddities(reading: Reading) -> list[str]:
    spans = list(reading.manifest.tensors.values())
    misaligned = sum(span.offset % span.dtype.itemsize != 0 for span in spans)
    strided = sum(span.extent != span.nbytes for span in spans)
    counted = [
        (len(reading.masks), "stored attention masks, which loading skips"),
        (len(reading.passengers), "tensors beside the model (an optimizer?), which loading never reads"),
        (len(reading.adapters), "LoRA layers, merged while loading, with the alpha you give"),
        (len(reading.unexpected), f"unknown tensors: {', '.join(reading.unexpected[:MAX_NAMED])}"),
        (len(reading.manifest.unreadable), f"unreadable: {', '.join(reading.manifest.unreadable)[:200]}"),
        (misaligned, "tensors not aligned to their item size"),
        (strided, "tensors whose bytes are not contiguous"),
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


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint is."""
    found = _describe(args)
    if args.json:
        print(as_json(found))
        return 0
    print(facts([
        ("path", found["path"]),
        ("format", found["format"]),
        ("dialect", found["dialect"]),
        ("config", "  ".join(f"{key}={value}" for key, value in found["config"].items())),
        ("parameters", f"{found['parameters']:,}"),
        ("size", f"{human(found['model_bytes'])} of weights in {human(found['file_bytes'])} of files"),
        ("tensors", found["tensors"]),
        ("dtypes", ", ".join(f"{name} × {count}" for name, count in found["dtypes"].items())),
        ("ties", "; ".join(" = ".join(names) for names in found["ties"]) or "none"),
        ("oddities", "\n          ".join(found["oddities"]) or "none"),
    ]))  # fmt: skip
    return 0

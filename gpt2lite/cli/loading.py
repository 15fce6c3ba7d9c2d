"""What the arguments mean to the library: the options of opening and of loading, and the load itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor

from gpt2lite import parallel
from gpt2lite.checkpoint.remote import Place
from gpt2lite.cli.arguments import PARALLEL
from gpt2lite.cli.terminal import bytes_bar, is_watched
from gpt2lite.config import EMBEDDED
from gpt2lite.devices import CPU, accelerators, free_memory, name_device, name_of, resolve_device
from gpt2lite.errors import UsageError
from gpt2lite.loading.options import LoadOptions, Progress
from gpt2lite.memory import human
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened
from gpt2lite.pruning import Pruning, choose_blocks


def config_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The part of the config that the arguments give."""
    given = {"n_heads": args.n_heads, "activation": args.activation}
    return {key: value for key, value in given.items() if value is not None} or None


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """--dtype as torch's own."""
    return getattr(torch, args.dtype) if args.dtype else None


def choose_by(ids: Tensor, opened: Opened[GPTModel], args: argparse.Namespace) -> Pruning:
    """The --keep-blocks that these ids miss most, found with the model in fp32."""
    with bytes_bar("loading") as progress:
        model = opened.load(args.device, dtype=torch.float32, progress=progress)
    with bytes_bar("choosing", "window") as progress:
        return choose_blocks(model, ids, args.keep_blocks, progress)


def load_options(args: argparse.Namespace, progress: Progress) -> LoadOptions:
    """What the weights become, and what loading them may take."""
    return {
        "dtype": dtype_of(args),
        "quantize": getattr(args, "quantize", None),
        "max_host_memory": args.max_host_memory,
        "max_device_memory": args.max_device_memory,
        "progress": progress,
        "offload": getattr(args, "offload", None),
        "mesh": getattr(args, "mesh", None),
    }


def choose_device(args: argparse.Namespace) -> None:
    """Choose the device of a command that was not told any, once, and say which where there is a choice."""
    if getattr(args, "device", None) != "auto":
        return
    args.device = str(found := name_device("auto"))
    if accelerators() and is_watched():
        why = f"{human(free_memory(found) or 0)} free" if found != CPU else "no accelerator is mostly free"
        print(f"on {name_of(found)}: {why}", file=sys.stderr)


@contextmanager
def ranks(args: argparse.Namespace) -> Iterator[None]:
    """With --parallel, `args.mesh` and this process's own device; only the first of its ranks writes."""
    choose_device(args)
    can_share = "parallel" in args and args.command != "plan"
    if can_share and not args.parallel and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        how = f"say how they share the model: --parallel {', '.join(PARALLEL)}"
        raise UsageError(f"torchrun started several processes; {how}")
    if not can_share or not args.parallel:
        yield
        return
    device = name_device(args.device)
    with parallel.started(args.parallel, device) as args.mesh, open(os.devnull, "w") as silence:
        if device.type != "cpu":
            args.device = f"{device.type}:{os.environ['LOCAL_RANK']}"
        is_first = parallel.is_first(args.mesh)
        out, err = (sys.stdout, sys.stderr) if is_first else (silence, silence)
        with redirect_stdout(out), redirect_stderr(err):
            yield


def strategy_of(opened: Opened[GPTModel], args: argparse.Namespace) -> str:
    """--strategy; on the CPU auto maps what can be: a command that only reads never writes to the file."""
    copies = getattr(args, "quantize", None) or getattr(args, "offload", None)
    maps = resolve_device(args.device).type == "cpu" and not copies
    maps = maps and all(span.source.can_map for span in opened.reading.manifest.tensors.values())
    return "mmap" if maps and args.strategy == "auto" else str(args.strategy)


def open_to_read(path: Place, args: argparse.Namespace) -> Opened[GPTModel]:
    """What lies at a path, with what the arguments say of it."""
    with parallel.together(getattr(args, "mesh", None)):
        return open_model(path, config=config_of(args), lora_alpha=args.lora_alpha)


def load_to_read(opened: Opened[GPTModel], args: argparse.Namespace) -> GPTModel:
    """The model, behind a progress bar; the embedded one, which is stored in fp16, computes in fp32."""
    with bytes_bar("loading") as progress:
        options = load_options(args, progress)
        if opened.path == EMBEDDED and not args.dtype:
            options["dtype"] = torch.float32
        return opened.load(resolve_device(args.device), strategy_of(opened, args), **options)

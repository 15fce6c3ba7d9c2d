"""A model over several ranks: our loads beside every other way, on gloo, each rank measured by itself.

    python benchmarks/compare_ranks.py --size gpt2 --ranks 2 4 --json benchmarks/results/ranks-cpu-gpt2.json

Every run is a fresh `torchrun`: each rank imports, loads something tiny in the same way, waits for the
others, then loads once, FSDP2 by blocks, file in the page cache. Ways take turns; seconds are medians of the
slowest rank, bytes are the worst rank's: anonymous memory at the peak above the imports, and what it read by
read() (rchar, without mapped pages). What cannot run says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from machine import warm_memory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gpt2lite import GPTConfig, GPTModel, convert, track_memory
from gpt2lite.benchmarking import TINY, write_random_checkpoint
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import table
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.parallel import divide

MIB = 1 << 20


def ours(strategy: str) -> Callable[[Path, Any], Any]:
    """One of our strategies, from the ordinary file."""

    def load(folder: Path, mesh: Any) -> Any:
        config = json.loads((folder / "config.json").read_text())
        return GPTModel.from_checkpoint(folder / "model.pth", "cpu", strategy, config=config, mesh=mesh)

    return load


def on_meta(folder: Path, mesh: Any) -> nn.Module:
    """The model without memory, divided."""
    with torch.device("meta"):
        model = GPTModel(json.loads((folder / "config.json").read_text()))
    divide(model, mesh)
    return model


def _filled(model: nn.Module, value_of: Callable[[str, Any], torch.Tensor]) -> nn.Module:
    """Each part from a whole tensor, which is there for as long as that takes."""
    from torch.distributed.tensor import distribute_tensor

    state = {}
    for name, wanted in model.state_dict().items():
        whole = value_of(name, wanted)
        state[name] = distribute_tensor(whole, wanted.device_mesh, wanted.placements, src_data_rank=None)
    model.load_state_dict(state, assign=True)
    return model


def torch_load_each(folder: Path, mesh: Any) -> Any:
    """Every rank reads the whole file and keeps its part."""
    state = torch.load(folder / "model.pth", weights_only=True)
    return _filled(on_meta(folder, mesh), lambda name, wanted: state[name])


def torch_load_mapped(folder: Path, mesh: Any) -> Any:
    """The same with mmap=True: what a careful user writes by hand."""
    state = torch.load(folder / "model.pth", weights_only=True, mmap=True)
    return _filled(on_meta(folder, mesh), lambda name, wanted: state[name])


def rank_0_and_broadcast(folder: Path, mesh: Any) -> Any:
    """torch's own advice: the first rank reads, the others get it from there."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = on_meta(folder, mesh)
    model.to_empty(device="cpu")
    state = torch.load(folder / "model.pth", weights_only=True, mmap=True) if dist.get_rank() == 0 else {}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".mask")}
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    return model


def dcp(folder: Path, mesh: Any) -> Any:
    """torch.distributed.checkpoint, from a folder of its own format."""
    import torch.distributed.checkpoint as checkpoint

    model = on_meta(folder, mesh)
    model.to_empty(device="cpu")
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=str(folder / "dcp"))
    return model


def safetensors_slices(folder: Path, mesh: Any) -> Any:
    """`get_slice` by hand: only the rows of a rank, from a mapped file."""
    from safetensors import safe_open

    from gpt2lite.parallel import box_of, part_like

    model, state = on_meta(folder, mesh), {}
    with safe_open(folder / "book.safetensors", "pt") as file:
        for name, wanted in model.state_dict().items():
            rows = tuple(slice(r.start, r.stop) for r in box_of(wanted))
            state[name] = part_like(wanted, file.get_slice(name)[rows].clone())
    model.load_state_dict(state, assign=True)
    return model


def transformers(folder: Path, mesh: Any) -> Any:
    """What its users write."""
    from transformers import GPT2LMHeadModel
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return GPT2LMHeadModel.from_pretrained(folder / "hub", distributed_config=config)


WAYS: dict[str, Callable[[Path, Any], Any]] = {
    "stream": ours("stream"),
    "mmap": ours("mmap"),
    "torch.load on each rank": torch_load_each,
    "torch.load(mmap=True) on each rank": torch_load_mapped,
    "rank 0 and broadcast": rank_0_and_broadcast,
    "torch's DCP": dcp,
    "safetensors, get_slice": safetensors_slices,
    "transformers DistributedConfig": transformers,
}


def bytes_read() -> int:
    """What this process has read by read()."""
    return int(Path("/proc/self/io").read_text().split()[1])


def run_rank(way: str, folder: Path) -> None:
    """One rank of one run."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    WAYS[way](folder / "tiny", mesh)
    warm_memory((folder / "model.pth").stat().st_size // dist.get_world_size())
    dist.barrier()
    before = bytes_read()
    with track_memory() as memory:
        began = time.perf_counter()
        model = WAYS[way](folder, mesh)
        seconds = time.perf_counter() - began
    found = {"seconds": seconds, "anonymous": memory.peak_host_anonymous, "read": bytes_read() - before}
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(ids)
    checksum = float(getattr(logits, "logits", logits).double().abs().sum())
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found | {"checksum": checksum}))
    dist.barrier()
    dist.destroy_process_group()


def run(way: str, folder: Path, ranks: int) -> dict[str, float] | str:
    """One run of all ranks: the worst of each figure, or why there is none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--rank-of", way, "--folder", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for path in folder.glob("rank-*.json"):
        path.unlink()
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    found = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    if result.returncode or len(found) != ranks:
        lines = [line for line in result.stderr.splitlines() if "Error" in line and "Child" not in line]
        return (lines or ["failed"])[0][-160:]
    return {key: max(rank[key] for rank in found) for key in found[0]}


def write_files(folder: Path, config: GPTConfig) -> None:
    """One model in every layout that a way wants."""
    import torch.distributed.checkpoint as checkpoint

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.as_dict()))
    write_random_checkpoint(config, folder / "model.pth")
    said = {"config": config}
    convert(folder / "model.pth", folder / "hub", to="huggingface", verify=False, **said)
    model = GPTModel.from_checkpoint(folder / "model.pth", strategy="mmap", **said)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "state.pth")
    from safetensors.torch import save_file

    save_file(state, folder / "book.safetensors")
    checkpoint.save(state, checkpoint_id=str(folder / "dcp"), no_dist=True)
    (folder / "state.pth").unlink()


def main() -> None:
    """Run all ways, print a table for each number of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*OFFICIAL_SIZES], default="gpt2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--rank-of", choices=[*WAYS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args.folder)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        untied = GPTConfig.of(GPTConfig.named(args.size).as_dict() | {"tied_head": False})
        write_files(folder, untied)
        write_files(folder / "tiny", TINY)
        model_bytes = (folder / "book.safetensors").stat().st_size
        for ranks in args.ranks:
            runs: dict[str, list[Any]] = {way: [] for way in WAYS}
            for _ in range(args.repeat):
                for way in WAYS:
                    runs[way].append(run(way, folder, ranks))
            rows = [("way", "seconds", "anon MiB", "read MiB")]
            for way, found in runs.items():
                good = [each for each in found if isinstance(each, dict)]
                if not good:
                    rows.append((way, "–", "–", found[0]))
                    continue
                worst = {
                    key: (median if key == "seconds" else max)(each[key] for each in good) for key in good[0]
                }
                sizes = (f"{worst[key] / MIB:.1f}" for key in ("anonymous", "read"))
                rows.append((way, f"{worst['seconds']:.2f}", *sizes))
            results[str(ranks)] = runs
            share = f"{model_bytes / ranks / MIB:.0f} of {model_bytes / MIB:.0f} MiB"
            print(f"{args.size} over {ranks} ranks, {share} each\n\n{table(*rows)}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

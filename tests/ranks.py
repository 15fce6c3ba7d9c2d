"""What each rank of test_parallel.py does, under torchrun: `ranks.py FOLDER` writes what it saw to FOLDER."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from conftest import TINY
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from gpt2lite import (
    GPT2LiteError,
    GPTModel,
    Recipe,
    Task,
    Tuning,
    as_classifier,
    evaluate,
    finetune,
    forecast,
    load_module,
    track_memory,
)
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.data import text_batches, text_windows
from gpt2lite.finetuning.loop import read_metrics
from gpt2lite.parallel import divide, forecast_filled_up, is_first, local_of, rest, started, together

FILES = ("model.pth", "tied.pth", "model.safetensors", "sharded", "hub.safetensors")
RECIPE = {"steps": 10, "batch_size": 4, "seq_len": 16, "accumulate": 2, "warmup_steps": 2, "save_every": 5}
TOKENS = torch.randint(TINY.vocab_size, (4000,), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
BIG_HEADS = 8
STRATEGIES = {2: ("stream", "mmap", "meta", "sequential"), 4: ("stream", "mmap", "meta")}


def task() -> Task:
    def sample(model: GPTModel) -> str:
        return str(model.generate(torch.tensor([[1, 2, 3]]), 5, temperature=0.7, seed=0).tolist())

    return Task(text_batches(TOKENS, 16, 4, 0), text_windows(TOKENS[:300], 16, 4, 8), sample=sample)


def curve(out: Path) -> list[tuple[Any, ...]]:
    return [(m["loss"], m["gradient_norm"], m.get("validation_loss", 0.0)) for m in read_metrics(out)]


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    found = model.state_dict().items()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found}


class Ranks:
    """What is tried, a method each; `folder` holds what one process made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size, self.rank = folder, dist.get_world_size(), dist.get_rank()
        self.meshes = {kind: self.mesh(self.size, (kind,)) for kind in ("fsdp", "tp", "ddp")}
        self.meshes["both"] = init_device_mesh("cpu", (self.size // 2, 2), mesh_dim_names=("fsdp", "tp"))

    def mesh(self, size: int, names: tuple[str, ...] | None = None) -> Any:
        return init_device_mesh("cpu", (size,), mesh_dim_names=names)

    def load(self, file: str, kind: str, strategy: str = "stream", **options: Any) -> GPTModel:
        mesh = self.meshes[kind]
        config = {"n_heads": TINY.n_heads}
        return GPTModel.from_checkpoint(
            self.folder / file, "cpu", strategy, config=config, mesh=mesh, **options
        )

    def loads(self) -> dict[str, Any]:
        """{what: [parameters equal, largest difference of logits, same tokens, difference of evaluation]}"""
        found = {}
        for file in FILES if self.size == 2 else FILES[::4]:
            one = GPTModel.from_checkpoint(self.folder / file, config={"n_heads": TINY.n_heads})
            wanted, logits = one.state_dict(), one(IDS).detach()
            tokens, nats = one.generate(IDS, 8), evaluate(one, TOKENS[:100]).nats
            for kind in self.meshes:
                for strategy in STRATEGIES[self.size] if file == "model.pth" else ("stream",):
                    model = self.load(file, kind, strategy)
                    equal = all(torch.equal(t, wanted[name]) for name, t in whole(model).items())
                    with torch.no_grad():
                        difference = (model(IDS) - logits).abs().max().item()
                    same = torch.equal(model.generate(IDS, 8), tokens)
                    off = abs(evaluate(model, TOKENS[:100]).nats - nats)
                    is_tied = model.out_head.weight is model.tok_emb.weight
                    found[f"{file} {kind} {strategy}"] = [equal, difference, same, off, is_tied]
        return found

    def memory(self) -> dict[str, Any]:
        """{what: bytes of the shard, anonymous peak, bytes read, forecast}"""
        found = {}
        for kind in ("fsdp", "tp"):
            self.load("model.pth", kind)  # imports
            for file in ("big.pth", "big.safetensors"):
                found[f"{file} {kind}"] = self.measured(file, kind)[1:]
        return found

    def measured(self, file: str, kind: str, strategy: str = "stream", **more: Any) -> tuple[Any, ...]:
        """The model, bytes of its part, anonymous peak, bytes read, forecast."""
        options = {"config": {"n_heads": BIG_HEADS}, "mesh": self.meshes[kind], **more}
        before = bytes_read()
        with track_memory() as memory:
            model = GPTModel.from_checkpoint(self.folder / file, "cpu", strategy, **options)
        read = bytes_read() - before
        shard = sum(local_of(p).nbytes for p in model.parameters())
        foreseen = forecast(self.folder / file, "cpu", **options)[strategy].peak_host_anonymous
        return model, shard, memory.peak_host_anonymous, read, foreseen

    def whole_files(self) -> list[int]:
        """Of `sequential`, which reads the whole file: bytes of the shard, anonymous peak, forecast."""
        _, shard, peak, _, foreseen = self.measured("big.pth", "fsdp", "sequential")
        return [shard, peak, foreseen]

    def broadcasts(self) -> dict[str, Any]:
        """Of a file that the first rank reads for all."""
        sent = {"tuning": Tuning(broadcast=True)}
        model, *sizes = self.measured("big.safetensors", "ddp", **sent)
        wanted = GPTModel.from_checkpoint(self.folder / "big.safetensors", config={"n_heads": BIG_HEADS})
        equal = [same(model, wanted)]
        for options in ({"quantize": "int8"}, {"dtype": torch.bfloat16}):
            one = GPTModel.from_checkpoint(self.folder / "tied.pth", **options)
            equal.append(same(self.load("tied.pth", "ddp", "auto", **options, **sent), one))
        return {"equal": equal, "sizes": sizes}

    def trains(self) -> dict[str, Any]:
        found = {}
        for kind in self.meshes if self.size == 2 else ("fsdp", "both"):
            out = self.folder / f"run-{kind}-{self.size}"
            model = self.load("tied.pth", kind)
            model.generate(IDS, 2)  # what it leaves behind must not keep the model from training
            finetune(model, task(), out, Recipe(**RECIPE))
            model.save_checkpoint(out / "again.safetensors")
            dist.barrier()
            found[kind] = curve(out)
        if self.size == 2:
            out = self.folder / "run-lora-2"
            finetune(self.load("tied.pth", "ddp"), task(), out, Recipe(**RECIPE, lora_rank=2))
            dist.barrier()
            found["lora"] = curve(out)
        return found

    def resumes(self) -> dict[str, Any]:
        """What two ranks began, on as many as these are."""
        found = {}
        for kind in self.meshes if self.size != 2 else ():
            out = self.folder / f"cut-{kind}"
            finetune(self.load("tied.pth", kind), task(), out, Recipe(**RECIPE), resume=True)
            dist.barrier()
            found[kind] = curve(out)
        return found

    def refusals(self) -> dict[str, str]:
        def lora() -> object:
            recipe = Recipe(**RECIPE, lora_rank=2)
            return finetune(self.load("model.pth", "fsdp"), task(), self.folder / "no", recipe)

        def classifier() -> object:
            model = self.load("model.pth", "fsdp")
            as_classifier(model, 2)
            data = Task(task().train, [], labels=("a", "b"))
            return finetune(model, data, self.folder / "no", Recipe(**RECIPE))

        def by_file(file: str, kind: str, **options: Any) -> Callable[[], object]:
            return lambda: self.load(file, kind, **options)

        self.meshes["other"] = self.mesh(self.size, ("pp",))
        tries: dict[str, Callable[[], object]] = {
            "baseline": by_file("model.pth", "fsdp", strategy="baseline"),
            "int8": by_file("model.pth", "fsdp", quantize="int8"),
            "names": by_file("model.pth", "other"),
            "lora": lora,
            "classifier": classifier,
            "16 bits": lambda: finetune(
                self.load("model.pth", "fsdp", dtype=torch.bfloat16), task(), self.folder / "no"
            ),
            "no seed": lambda: self.load("model.pth", "tp").generate(IDS, 2, temperature=1.0),
            "heads": lambda: GPTModel.from_checkpoint(
                self.folder / "three.pth", config={"n_heads": 3}, mesh=self.meshes["tp"]
            ),
            "module": lambda: load_module(
                lambda: nn.Linear(2, 2), self.folder / "linear.pth", mesh=self.meshes["tp"]
            ),
            "lora in the file": by_file("lora.pth", "fsdp", lora_alpha=2.0),
            "broadcast": by_file("model.pth", "fsdp", tuning=Tuning(broadcast=True)),
            "broadcast mapped": by_file("model.pth", "ddp", strategy="mmap", tuning=Tuning(broadcast=True)),
            "one rank": self.fails_on_the_last,
            "memory": by_file("model.pth", "fsdp", max_host_memory="4KiB" if self.rank == 1 else "1GiB"),
        }
        return {name: said(attempt) for name, attempt in tries.items()}

    def fails_on_the_last(self) -> None:
        with together(self.meshes["fsdp"]):
            if self.rank == self.size - 1:
                raise OSError("its disk is full")

    def differ(self) -> dict[str, str]:
        """What each rank says where the second was given something else, or fails alone."""
        odd, model, fine = self.rank == 1, self.load("tied.pth", "fsdp"), task()

        def train(task: Task = fine, out: str = "no", model: GPTModel = model, **recipe: Any) -> object:
            report = fails if out == "report" and is_first(model.device_mesh) else None
            return finetune(model, task, self.folder / out, Recipe(**RECIPE | recipe), report=report)

        def later(number: int) -> Any:
            return text_batches(TOKENS, 16, 4, int(odd and number > 3))(number)

        def fails(number: object) -> Any:
            raise OSError("its disk is full")

        tries: dict[str, Callable[[], object]] = {
            "prompts": lambda: model.generate(IDS[:, : 17 - odd], 4),
            "number of tokens": lambda: model.generate(IDS, 4 + odd),
            "text": lambda: evaluate(model, TOKENS[: 100 + 64 * odd]),
            "file": lambda: self.load("model.pth" if odd else "tied.pth", "fsdp"),
            "weights": lambda: self.load("other/tied.pth" if odd else "tied.pth", "tp"),
            "dtype": lambda: self.load("tied.pth", "fsdp", dtype=torch.bfloat16 if odd else None),
            "heads": lambda: GPTModel.from_checkpoint(
                self.folder / "model.pth", config={"n_heads": 2 + 2 * odd}, mesh=self.meshes["fsdp"]
            ),
            "recipe": lambda: train(steps=10 + odd),
            "data": lambda: train(Task(text_batches(TOKENS, 16, 4, odd), fine.validation)),
            "later data": lambda: train(Task(later, fine.validation), "later"),
            "path": lambda: model.save_checkpoint(self.folder / f"{odd}.pth"),
            "a wrong prompt": lambda: model.generate(IDS if not odd else IDS.float(), 4),
            "no file": lambda: self.load("none.pth" if odd else "tied.pth", "ddp"),
            "no batch": lambda: train(
                Task(lambda n: fails(n) if odd and n > 3 else fine.train(n), fine.validation), "batch"
            ),
            "report": lambda: train(out="report"),
        }
        return {name: said(attempt) for name, attempt in tries.items()}

    def traps(self) -> dict[str, Any]:
        """What dividing on meta sends; bytes that the first forward copies, and how many were foreseen."""
        with torch.device("meta"):
            skeleton = GPTModel(TINY)
        with CommDebugMode() as sent:
            divide(skeleton, self.meshes["tp"])
        model = self.load("tied.pth", "fsdp")
        foreseen = forecast_filled_up(model, 4)
        places = {p: local_of(p).data_ptr() for p in model.parameters()}
        with torch.no_grad():
            model(IDS)
        rest(model)
        copied = sum(local_of(p).nbytes for p, place in places.items() if local_of(p).data_ptr() != place)
        return {"sent": sent.get_total_counts(), "copied": copied, "foreseen": foreseen}

    def dcp(self) -> dict[str, Any]:
        """Of torch's own checkpoint of these ranks, read back: equal?, bytes of a part and what is read."""
        folder, model = self.folder / f"dcp-{self.size}", self.load("tied.pth", "fsdp")
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=folder)
        wanted = whole(model)
        again = whole(self.load(folder.name, "fsdp"))
        options = {"config": {"n_heads": BIG_HEADS}, "mesh": self.meshes["fsdp"]}
        big = GPTModel.from_checkpoint(self.folder / "big.pth", strategy="stream", **options)
        checkpoint.save(big.state_dict(), checkpoint_id=self.folder / f"dcp-big-{self.size}")
        before = bytes_read()
        big = GPTModel.from_checkpoint(self.folder / f"dcp-big-{self.size}", strategy="stream", **options)
        read = bytes_read() - before
        written = GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32, mesh=self.meshes["fsdp"])
        checkpoint.save(written.state_dict(), checkpoint_id=self.folder / f"embedded-{self.size}")
        equal = all(torch.equal(again[name], t) for name, t in wanted.items())
        return {"equal": equal, "shard": sum(local_of(p).nbytes for p in big.parameters()), "read": read}

    def modules(self) -> dict[str, Any]:
        """A module of the caller's, divided as the caller says or block by block; more ranks than rows."""
        build, path = (lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))), self.folder / "plain.pth"
        mesh, wanted = self.meshes["fsdp"], torch.load(path)

        def by_hand(module: nn.Module, mesh: Any) -> None:
            fully_shard(module[0], mesh=mesh)

        found = {}
        for name, options in {"alone": {}, "by hand": {"parallelize": by_hand}}.items():
            module = load_module(build, path, mesh=mesh, **options)
            equal = all(torch.equal(t, wanted[key]) for key, t in whole(module).items())
            found[name] = [equal, [local_of(p).numel() for p in module.parameters()]]
        return found


def same(model: nn.Module, wanted: nn.Module) -> bool:
    return all(torch.equal(t, wanted.state_dict()[name]) for name, t in model.state_dict().items())


def said(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (GPT2LiteError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    ranks = Ranks(folder)
    tried = (
        "memory",  # in a fresh process
        *(("whole_files", "broadcasts", "differ") if ranks.size == 2 else ()),
        "loads",
        "trains",
        "resumes",
        "refusals",
        "traps",
        "modules",
        "dcp",
    )
    found = {name: getattr(ranks, name)() for name in tried}
    (folder / f"saw-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def dies(mesh: Any) -> None:
    """A rank that is killed in the middle of it all."""
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def raises(mesh: Any) -> None:
    """A rank that fails within a step, when the others wait for its part of a layer."""
    model = GPTModel.from_checkpoint(Path(sys.argv[1]) / "tied.pth", mesh=mesh)
    seen = []

    def hook(*_: object) -> None:
        seen.append(0)
        if len(seen) == 9 and dist.get_rank() == 1:
            raise OSError("its disk is full")

    model.trf_blocks[1].register_forward_hook(hook)
    finetune(model, task(), Path(sys.argv[1]) / "raises", Recipe(**RECIPE))


if __name__ == "__main__":
    if how := sys.argv[2:]:
        with started("fsdp", torch.device("cpu")) as mesh:  # as a command does
            {"dies": dies, "raises": raises}[how[0]](mesh)
    else:
        main()

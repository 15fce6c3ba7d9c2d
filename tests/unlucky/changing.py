"""Files that are truncated, written over or replaced at a chosen moment, each in a process of its own.

    python changing.py FOLDER

Prints a line of JSON: for each case and way what came of it, "right", "error: …" (a CheckpointError's words),
"wrong: …", or the signal that ended the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gpt2lite import GPTConfig, GPTModel, convert, load_lora, open_model, save_per_tensor
from gpt2lite.checkpoint import open_checkpoint, writing
from gpt2lite.errors import CheckpointError
from gpt2lite.finetuning.data import open_tokens, text_batches
from gpt2lite.finetuning.loop import finetune
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import Task
from gpt2lite.verification import verify

CONFIG = GPTConfig(vocab_size=101, context_length=32, emb_dim=64, n_heads=4, n_layers=3)
Change = Callable[[Path], None]


def truncated(path: Path) -> None:
    """To less than a page, so that all that is mapped of it is gone."""
    os.truncate(path, 10)


def overwritten(path: Path) -> None:
    """In place, in its own length, as `torch.save` does."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\x3f" * size)
    os.utime(path, ns=(1, 1))  # a file system may be no finer than its clock's tick


def replaced(path: Path) -> None:
    """By another file of the same length, renamed over it."""
    other = path.with_name("other")
    other.write_bytes(b"\x3f" * path.stat().st_size)
    os.replace(other, path)


CHANGES: dict[str, Change] = {each.__name__: each for each in (truncated, overwritten, replaced)}


def same(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a model holds what was written to its file."""
    wanted = make().state_dict()
    return all(torch.equal(value, wanted[name].to(dtype)) for name, value in model.state_dict().items())


def make() -> GPTModel:
    """The model of every file."""
    generator = torch.Generator().manual_seed(0)
    model = GPTModel(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def at_first_call(change: Change, path: Path) -> Callable[[int, int], None]:
    """A progress callback that changes a file once."""
    left = [path]

    def progress(done: int, total: int) -> None:
        while left:
            change(left.pop())

    return progress


@contextmanager
def when_writing(change: Change, path: Path) -> Iterator[None]:
    """Changes a file when the first tensor has been taken to be written."""
    taken, progress = writing.chunks_of, at_first_call(change, path)

    def chunks(*args: Any) -> Iterator[memoryview]:
        for chunk in taken(*args):
            yield chunk
            progress(0, 0)

    writing.chunks_of = chunks
    try:
        yield
    finally:
        writing.chunks_of = taken


# ---- what runs while a file changes: whether it ended right ------------------------------------------------


def converting(path: Path, change: Change) -> bool:
    """Between two tensors; Hugging Face's are transposed."""
    out = path.with_name("converted")
    convert(path, out, to="huggingface", progress=at_first_call(change, path))
    return same(open_model(out).load(strategy="stream"))


def casting(path: Path, change: Change) -> bool:
    """A load from a mapping."""
    opened = open_model(path)
    progress = at_first_call(change, path)
    return same(opened.load(strategy="mmap", dtype=torch.bfloat16, progress=progress), torch.bfloat16)


def loading(strategy: str) -> Callable[[Path, Change], bool]:
    """A file that changes after its headers were read."""

    def case(path: Path, change: Change) -> bool:
        opened = open_model(path)
        change(path)
        return same(opened.load(strategy=strategy))

    return case


def streaming(path: Path, change: Change) -> bool:
    """Between two chunks."""
    from gpt2lite import Tuning

    small = Tuning(readers=1, chunk_bytes=4096, ring_bytes=4096 * 8)
    progress = at_first_call(change, path)
    return same(open_model(path).load(strategy="stream", tuning=small, progress=progress))


def verifying(path: Path, change: Change) -> bool:
    """After the model that is verified was loaded."""
    opened = open_model(path)

    def load() -> GPTModel:
        model = opened.load(strategy="stream")
        change(path)
        return model

    return verify(load, opened).passed


def saving_mapped(path: Path, change: Change) -> bool:
    """A model that stands on the file."""
    model = open_model(path).load(strategy="mmap")
    out = path.with_name("saved.pth")
    with when_writing(change, path):
        model.save_checkpoint(out)
    return same(open_model(out).load(strategy="stream"))


def saving_per_tensor(path: Path, change: Change) -> bool:
    """A folder of a file per tensor, made of the file."""
    out = path.with_name("parts")
    with when_writing(change, path):
        save_per_tensor(path, out)
    return same(open_model(out, config=CONFIG).load(strategy="stream"))


def training(path: Path, change: Change) -> bool:
    """On a token file: what has the length of a window and a next token is drawn again."""
    tokens = path.with_name("tokens.bin")
    tokens.write_bytes((torch.arange(20000) % 101).to(torch.uint16).numpy().tobytes())
    batches = text_batches(open_tokens(tokens, 101), 16, 4, 1)
    before = batches(3)
    change(tokens)
    return torch.equal(before.ids, batches(3).ids)


def _run(out: Path, change: Callable[[int], None], resume: bool = False) -> Any:
    def train(number: int) -> Any:
        change(number)
        ids = torch.full((2, 9), number + 1)
        return batch_of(ids)

    recipe = Recipe(steps=3, batch_size=2, lora_rank=2, save_every=2)
    return finetune(make(), Task(train, []), out, recipe, resume=resume)


def batch_of(ids: torch.Tensor) -> Any:
    """Windows of a text."""
    from gpt2lite import Batch

    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def resuming(path: Path, change: Change) -> bool:
    """A saved state that changes after it was checked, before it is restored."""
    out = path.with_name("run")

    def cut(number: int) -> None:
        if number == 2:
            raise RuntimeError("cut")

    with suppress(RuntimeError):
        _run(out, cut)
    state, again = out / "step-000002.pth", []

    def when_compared(number: int) -> None:
        again.extend([number] if number == 1 else [])
        if number == 1 and len(again) == 1:
            change(state)

    _run(out, when_compared, resume=True)
    return True


def adapting(path: Path, change: Change) -> bool:
    """Adapters that change while the weights under them are compared."""
    out, model = path.with_name("run"), make()
    _run(out, lambda number: None)
    with when_writing(change, out / "adapters.pth"):  # digests take a tensor as writers do
        load_lora(model, out / "adapters.pth")
    return True


def merging(path: Path, change: Change) -> bool:
    """LoRA layers in a file that is mapped."""
    model = make()
    state = dict(model.state_dict())
    for block in range(CONFIG.n_layers):
        name = f"trf_blocks.{block}.ff.layers.0"
        state[f"{name}.linear.weight"], state[f"{name}.linear.bias"] = (
            state.pop(f"{name}.weight"),
            state.pop(f"{name}.bias"),
        )
        state[f"{name}.lora.A"], state[f"{name}.lora.B"] = torch.ones(64, 2), torch.zeros(2, 256)
    torch.save(state, path)
    opened = open_model(path, lora_alpha=2.0, config=CONFIG)
    return same(opened.load(strategy="mmap", progress=at_first_call(change, path)))


def opening_parts(path: Path, change: Change) -> bool:
    """A distributed checkpoint, whose file changes before the headers in it are read."""
    folder = convert(path, path.with_name("dcp"), format="dcp")
    change(next(folder.glob("*.distcp")))
    return bool(open_checkpoint(folder).tensors)


CASES: dict[str, Callable[[Path, Change], bool]] = {
    each.__name__: each
    for each in (
        converting,
        casting,
        streaming,
        verifying,
        saving_mapped,
        saving_per_tensor,
        training,
        resuming,
        adapting,
        merging,
        opening_parts,
    )
} | {f"loading {name}": loading(name) for name in ("baseline", "stream")}


def run(case: Callable[[Path, Change], bool], change: Change, folder: Path) -> str:
    """What came of a case, in a process that it may end."""
    folder.mkdir()
    path = make().save_checkpoint(folder / "model.pth")
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            said = "right" if case(path, change) else "wrong"
        except CheckpointError as error:
            said = f"error: {error}"
        except BaseException as error:
            said = f"wrong: {error!r}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said


def main(folder: Path) -> None:
    """Run all."""
    found = {
        f"{name}, {how}": run(case, change, folder / f"{name}-{how}")
        for name, case in CASES.items()
        for how, change in CHANGES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

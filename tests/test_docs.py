"""Every command and every block of Python in README and docs, run as written in a folder with a small model.

What cannot run here is a row of `INSTEAD` or `NOT_RUN`: devices that are not there, sizes that take minutes.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpt2lite
from gpt2lite import GPTConfig, GPTModel, convert, save_per_tensor
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.tokenizer import tokenizer_files, write_beside

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTEAD = {  # what is written: what is run
    r'"cuda"': '"cpu"',
    r" --size gpt2-xl": "",
    r"=\"1GiB\"": '="1MiB"',
    r"--text book\.txt": "--text book.txt --steps 2 --seq-len 16 --batch-size 2",
    # A CPU without bf16 computes in it a hundred times slower; tests/test_finetuning.py runs the flag.
    r" --autocast": "",
    r"--instructions alpaca\.json": "--instructions alpaca.json --steps 2 --batch-size 2",
    r"--classify spam\.csv": "--classify spam.csv --steps 2 --batch-size 2",
    r"--steps 500 --seq-len 256": "",
    r"steps=500, batch_size=4, seq_len=256": "steps=2, batch_size=2, seq_len=16",
    r"steps=500": "steps=2, batch_size=2, seq_len=16",
}
NOT_RUN = {  # what a block or command holds: why it is not run
    ".venv": "sets up an environment: continuous integration runs it",
    "gpt2lite bench": "tests/test_cli.py measures",
    "init_process_group": "tests/test_parallel.py starts ranks",
    "torchrun": "tests/test_parallel.py starts ranks",
    "from_pretrained": "needs the network: tests/test_hub.py",
    "python benchmarks/": "takes minutes",
    "--against transformers": "tests/test_verification.py",
    "fsdp-checkpoint/": "tests/test_parallel.py writes one",
}


def not_run(text: str) -> str | None:
    return next((why for what, why in NOT_RUN.items() if what in text), None)


def as_run(text: str) -> str:
    for written, instead in INSTEAD.items():
        text = re.sub(written, instead, text)
    return text


def examples(page: Path) -> list[tuple[str, str]]:
    """(language, text) of what a page runs, in its order: blocks of Python, and commands behind a $."""
    found = []
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        found += [("python", text)] if language == "python" else [(language, line) for line in lines]
    return [(language, text) for language, text in found if not not_run(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: model.pth, a Hub folder `gpt2`, texts, instructions; all of it small."""
    folder = tmp_path_factory.mktemp("docs")
    files = tokenizer_files(EMBEDDED)
    config = GPTConfig(GPTModel.from_checkpoint(EMBEDDED).config.vocab_size, 256, 32, 4, 12, tied_head=True)
    torch.manual_seed(0)
    model = GPTModel(config)
    model.initialise()
    model.save_checkpoint(folder / "model.pth")
    write_beside(folder / "model.pth", files)
    convert(folder / "model.pth", folder / "gpt2", to="huggingface")
    save_per_tensor(folder / "model.pth", folder / "folder")
    story = "Once upon a time there was a girl called Ella. She had a lantern, and lost it in the wood. "
    for name in ("book.txt", "held-out.txt"):
        (folder / name).write_text(story * 60, encoding="utf-8")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    (folder / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    spam = [f"you have won {n},spam\nsee you at {n},ham" for n in range(20)]
    (folder / "spam.csv").write_text("\n".join(["text,label", *spam]) + "\n", encoding="utf-8")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


@pytest.fixture
def inside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder for each page, in which its commands follow each other."""
    copy = shutil.copytree(folder, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if examples(page)])
def test_a_page_runs_from_top_to_bottom(page: Path, inside: Path, capfd: pytest.CaptureFixture[str]):
    names: dict[str, object] = {}
    for language, text in examples(page):
        if language == "text":
            run(as_run(text), inside, capfd)
            continue
        for source, error in parts(as_run(text)):
            expected = pytest.raises(gpt2lite.GPT2LiteError) if error else contextlib.nullcontext()
            with contextlib.redirect_stdout(io.StringIO()), expected as caught:
                exec(compile(source, str(page), "exec"), names)
            assert not error or type(caught.value).__name__ in error


def parts(text: str) -> Iterator[tuple[str, str]]:
    """(source, the error that it shall raise or "") of a block: a session's examples, or all of it."""
    if ">>>" not in text:
        yield text, ""
        return
    for example in doctest.DocTestParser().get_examples(text):
        yield example.source, example.want if re.match(r"[\w.]+Error", example.want) else ""


def run(command: str, inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line, _, output = command.partition(" > ")
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
        code, out, err = result.returncode, result.stdout, result.stderr
    else:
        assert program == "gpt2lite"
        code = main(arguments)
        out, err = capfd.readouterr()
    assert code == 0, f"{command}\n{err}"
    if output:
        (inside / shlex.split(output, comments=True)[0]).write_text(out, encoding="utf-8")


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[#)]", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_pages_build_as_a_site(tmp_path: Path):
    pytest.importorskip("mkdocstrings", reason="the extra [docs] is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

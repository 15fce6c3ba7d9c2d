"""Make a classifier of a checkpoint (the book, ch. 6): `gpt2lite finetune --classify`.

Without arguments: the embedded model learns to tell the heroes of stories, she or he, in half a minute, into
a new folder.
"""

import sys
import tempfile
from pathlib import Path

from lessons import labelled, write_lines

from gpt2lite.cli import main


def example(folder: Path) -> list[str]:
    """The arguments of the example."""
    records = write_lines(labelled(seed=3, count=1000), folder / "heroes.jsonl")
    words = ["--classify", records, "--out", folder / "model", "--steps", 150, "--batch-size", 8]
    return [str(word) for word in [*words, "--seq-len", 144, "--learning-rate", 1e-3]]


if __name__ == "__main__":
    words = sys.argv[1:] or example(Path(tempfile.mkdtemp(prefix="gpt2lite-finetuned-")))
    raise SystemExit(main(["finetune", *words]))

"""Train a checkpoint to answer: `gpt2lite finetune --instructions`, the loss on the response alone.

Without arguments: the embedded model learns to say how the sky was, in half a minute, into a new folder.
"""

import sys
import tempfile
from pathlib import Path

from lessons import questions, write_lines

from gpt2lite.cli import main


def example(folder: Path) -> list[str]:
    """The arguments of the example."""
    records = write_lines(questions(seed=1, count=400), folder / "questions.jsonl")
    words = ["--instructions", records, "--out", folder / "model", "--steps", 150, "--batch-size", 8]
    return [str(word) for word in [*words, "--learning-rate", 1e-3]]


if __name__ == "__main__":
    words = sys.argv[1:] or example(Path(tempfile.mkdtemp(prefix="gpt2lite-finetuned-")))
    raise SystemExit(main(["finetune", *words]))

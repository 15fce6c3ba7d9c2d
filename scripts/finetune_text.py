"""Train a checkpoint further on a text: `gpt2lite finetune --text`.

Without arguments: the embedded model learns to write weather reports, in half a minute, into a new folder.
"""

import sys
import tempfile
from pathlib import Path

from lessons import reports

from gpt2lite.cli import main


def example(folder: Path) -> list[str]:
    """The arguments of the example."""
    text = folder / "reports.txt"
    text.write_text(reports(seed=1, count=1500))
    words = ["--text", text, "--out", folder / "model", "--steps", 150, "--seq-len", 128, "--batch-size", 8]
    return [str(word) for word in [*words, "--learning-rate", 1e-3]]


if __name__ == "__main__":
    words = sys.argv[1:] or example(Path(tempfile.mkdtemp(prefix="gpt2lite-finetuned-")))
    raise SystemExit(main(["finetune", *words]))

"""Cases by number, drawn from format and number alone: one that failed can be run again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from formats import FORMATS
from mutating import MUTATORS
from watching import faults


@dataclass(frozen=True)
class Failed:
    """A case that failed: the file that was mutated, its content then, and what was wrong."""

    number: int
    file: str
    content: bytes
    faults: list[str]


def run_cases(name: str, numbers: Iterable[int], folder: Path) -> Iterator[Failed]:
    """Those of some cases that fail; `folder` is empty, and holds a sound checkpoint in between."""
    format = FORMATS[name]
    format.write(folder)
    sound = {file: (folder / file).read_bytes() for file in format.files}
    format.read(folder)  # imports, and that the seed is sound
    for number in numbers:
        random = Random(f"{name} {number}")
        file = random.choice([*format.files])
        content = MUTATORS[format.files[file]](sound[file], random)
        (folder / file).write_bytes(content)
        if found := faults(format.read, folder, len(content)):
            yield Failed(number, file, content, found)
        (folder / file).write_bytes(sound[file])

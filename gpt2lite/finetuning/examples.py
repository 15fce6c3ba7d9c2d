"""Examples from records: instructions with their responses, texts with their labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpt2lite.encoding import Encoding, end_of_text
from gpt2lite.errors import UsageError
from gpt2lite.finetuning.data import IGNORED, Example, shuffled
from gpt2lite.reading_text import decode_text, filled_lines

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INPUT = "input"  # the one field that an instruction may lack

Record = dict[str, str]
T = TypeVar("T")
Entries = Iterator[tuple[int, Any]]  # (its number, what stands there)


def _parsed(path: Path, content: str, line: int) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UsageError(f"{path}, line {line}: not JSON ({getattr(error, 'msg', error)})") from None


def _json_entries(path: Path, text: str) -> Entries:
    content = _parsed(path, text, 1)
    if not isinstance(content, list):
        raise UsageError(f"{path}: holds a {type(content).__name__}, wanted a list of objects")
    yield from enumerate(content, 1)


def _jsonl_entries(path: Path, text: str) -> Entries:
    yield from ((number, _parsed(path, line, number)) for number, line in filled_lines(text))


def _csv_entries(path: Path, text: str) -> Entries:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header; a text with a comma needs quotes")
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


READERS = {
    ".json": ("entry", _json_entries),
    ".jsonl": ("line", _jsonl_entries),
    ".csv": ("line", _csv_entries),
}


def _record(where: str, entry: Any, fields: Sequence[str]) -> Record:
    """The entry's texts and numbers, as text."""
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: is a {type(entry).__name__}, wanted an object with {', '.join(fields)}")
    record = {name: str(value) for name, value in entry.items() if isinstance(value, str | int | float)}
    wanted = fields if entry.get(INPUT) is None else (*fields, INPUT)
    if missing := [name for name in wanted if name not in record]:
        found = ", ".join(record) or "nothing"
        raise UsageError(f"{where}: lacks {', '.join(missing)} as text, found {found}")
    return record


def read_records(path: Path, fields: Sequence[str]) -> list[Record]:
    """The objects of a .json list, the lines of a .jsonl, or the rows of a .csv under its header.

    Values are text, numbers turned into it; what is neither is left out. Each has `fields`. Costs the whole
    file in memory. Raises UsageError, with the line or entry, for what is no such record.
    """
    if path.suffix.lower() not in READERS:
        raise UsageError(f"{path}: of unknown kind {path.suffix!r}; the known are {', '.join(READERS)}")
    text = decode_text(path.read_bytes(), path)
    kind, entries = READERS[path.suffix.lower()]
    records = [_record(f"{path}, {kind} {number}", entry, fields) for number, entry in entries(path, text)]
    if not records:
        raise UsageError(f"{path}: holds no records; wanted some with {', '.join(fields)}")
    return records


def format_prompt(record: Record) -> str:
    """An instruction, and its input if there is one, up to where the response begins.

    Source: Raschka, Build a Large Language Model (From Scratch), ch. 7, after Stanford Alpaca.
    """
    given = f"\n\n### Input:\n{record[INPUT]}" if record.get(INPUT) else ""
    return f"{PREAMBLE}\n\n### Instruction:\n{record['instruction']}{given}\n\n### Response:\n"


def instruction_examples(records: Sequence[Record], encoding: Encoding, seq_len: int) -> list[Example]:
    """Prompt, output and <|endoftext|>, the targets one ahead; loss on the output and the end alone.

    Longer ones are cut to seq_len; those whose prompt leaves no room are left out. Special tokens in a
    record are plain text. Raises UsageError where none is left.
    """
    examples = []
    for record in records:
        prompt = encoding.encode_ordinary(format_prompt(record))
        response = [*encoding.encode_ordinary(record["output"]), end_of_text(encoding)]
        if len(prompt) < seq_len:
            targets = [IGNORED] * (len(prompt) - 1) + response
            examples.append(Example((prompt + response)[:-1][:seq_len], targets[:seq_len]))
    if not examples:
        raise UsageError(
            f"all {len(records)} prompts are too long, {seq_len} tokens or more, so that no response fits; "
            "use a larger --seq-len"
        )
    return examples


def _inshuffled(labels: set[str]) -> list[str]:
    try:
        return sorted(sorted(labels), key=float)
    except ValueError:
        return sorted(labels)


def classifier_examples(
    records: Sequence[Record], encoding: Encoding, seq_len: int, labels: Sequence[str] | None = None
) -> tuple[list[Example], list[str]]:
    """(the first seq_len tokens of each text, its class the target of the last; the classes' labels).

    Without `labels` they are those found, sorted, by value where all are numbers. An empty text is
    <|endoftext|>. Raises UsageError for a label that is not among `labels`, and fewer than two classes.
    """
    names = _inshuffled({record["label"] for record in records}) if labels is None else list(labels)
    if len(names) < 2:
        raise UsageError(f"a classifier needs at least two labels, found {', '.join(names) or 'none'}")
    classes, examples = {name: i for i, name in enumerate(names)}, []
    for number, record in enumerate(records, 1):
        if record["label"] not in classes:
            raise UsageError(f"entry {number}: the label {record['label']!r} is not of {', '.join(names)}")
        ids = encoding.encode_ordinary(record["text"])[:seq_len] or [end_of_text(encoding)]
        examples.append(Example(ids, [IGNORED] * (len(ids) - 1) + [classes[record["label"]]]))
    return examples, names


def split(records: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation): shuffled by the seed, `fraction` of them for validation; one in each at least.

    Raises UsageError where that cannot be.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"the fraction for validation must be between 0 and 1, got {fraction}")
    if len(records) < 2:
        raise UsageError(f"{len(records)} records cannot be split in two; wanted at least 2")
    order = shuffled(len(records), seed, 0)
    held = min(max(round(len(records) * fraction), 1), len(records) - 1)
    return [records[i] for i in order[held:]], [records[i] for i in order[:held]]

"""Examples from records: instructions with their responses, texts with their labels."""

from __future__ import annotations

import csv
import io
import json
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

from gpt2lite.errors import UsageError
from gpt2lite.finetuning.data import IGNORED, Example, shuffled
from gpt2lite.generation.classifying import ids_to_classify
from gpt2lite.generation.prompts import Instruction, filled
from gpt2lite.reading_text import HALVES, decode_text, filled_lines
from gpt2lite.tokenizer import Encoding, end_of_text

PREAMBLE = "Below is an instruction that describes a task. "
PREAMBLE += "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
# Source: Raschka, Build a Large Language Model (From Scratch), ch. 7, after Stanford Alpaca.
TEMPLATE = tuple(f"{PREAMBLE}{given}\n\n### Response:\n" for given in ("", "\n\n### Input:\n{input}"))
INPUT = "input"  # the one field that an instruction may lack
# How tables write a label that is not there.
MISSING = ("", "nan", "none", "null", "n/a", "#n/a", "na", "<na>")
FIELD_LIMIT = threading.Lock()  # csv's limit is the process's

T = TypeVar("T")
Entries = Iterable[tuple[int, Any]]  # (line or number of an entry, its content)


class Record(dict[str, str]):
    """Texts by field; `where` is a file with a line or an entry."""

    where = "a record"


def _twice(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name, count in Counter(names).items() if count > 1))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice(name for name, _ in pairs):
        raise ValueError(f"twice the key {twice!r}")
    return dict(pairs)


def _parsed(path: Path, content: str, line: int) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UsageError(f"{path}, line {line}: not JSON ({getattr(error, 'msg', error)})") from None


def _json_entries(path: Path, text: str) -> Entries:
    content = _parsed(path, text, 1)
    if not isinstance(content, list):
        raise UsageError(f"{path}: holds a {type(content).__name__}, wanted a list of objects")
    return enumerate(content, 1)


def _jsonl_entries(path: Path, text: str) -> Entries:
    return ((number, _parsed(path, line, number)) for number, line in filled_lines(text))


def _csv_entries(path: Path, text: str) -> Entries:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    with FIELD_LIMIT:
        before = csv.field_size_limit(max(len(text), 1))  # a field may be as long as the file
        try:
            if twice := _twice(reader.fieldnames or ()):
                raise csv.Error(f"two columns are called {twice}")
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None
        finally:
            csv.field_size_limit(before)
    return rows


READERS = {".json": _json_entries, ".jsonl": _jsonl_entries, ".csv": _csv_entries}


def _record(where: str, entry: Any, fields: Sequence[str]) -> Record:
    """The entry's texts and numbers, as text."""
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: is a {type(entry).__name__}, wanted an object with {', '.join(fields)}")
    if None in entry:  # csv's key for what no column is left for
        raise UsageError(f"{where}: not CSV (more cells than the header; a text with a comma needs quotes)")
    record = Record({k: str(value) for k, value in entry.items() if isinstance(value, str | int | float)})
    record.where = where
    if half := next((name for name, value in record.items() if HALVES.search(value)), None):
        raise UsageError(f"{where}: {half} holds half a character ({record[half]!r:.60}); write it whole")
    wanted = fields if entry.get(INPUT) is None else (*fields, INPUT)
    if missing := [name for name in wanted if name not in record]:
        found = ", ".join(record) or "nothing"
        raise UsageError(f"{where}: lacks {', '.join(missing)} as text, found {found}")
    return record


def read_records(path: Path, fields: Sequence[str]) -> list[Record]:
    """The objects of a .json list, the lines of a .jsonl, or the rows of a .csv under its header.

    Values are text, numbers turned into it; others are left out. Each record has `fields`. Costs the whole
    file in memory. Raises UsageError, with the line or entry, for what is not such a record.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UsageError(f"{path}: unknown kind of file {path.suffix!r}; choose from {', '.join(READERS)}")
    entries = READERS[kind](path, decode_text(path.read_bytes(), path))
    where = f"{path}, {'entry' if kind == '.json' else 'line'}"
    records = [_record(f"{where} {number}", entry, fields) for number, entry in entries]
    if not records:
        raise UsageError(f"{path}: holds no records; wanted some with {', '.join(fields)}")
    return records


def format_prompt(record: dict[str, str]) -> str:
    """An instruction, and its input if there is one, up to where the response begins."""
    return filled(TEMPLATE, Instruction(record["instruction"], record.get(INPUT, "")))


def instruction_examples(
    records: Sequence[Record], encoding: Encoding, seq_len: int
) -> list[tuple[Record, Example]]:
    """(record, its prompt, output and <|endoftext|>), targets one ahead; loss on output and end only.

    Longer ones are cut to seq_len, without the end; those whose prompt leaves no room are left out; a warning
    says how many. Special tokens in a record are plain text. Raises UsageError where more than half are left
    out, and for a tokenizer without a token that ends a text.
    """
    pairs, cut, end = [], 0, end_of_text(encoding)
    for record in records:
        prompt = encoding.encode_ordinary(format_prompt(record))
        response = [*encoding.encode_ordinary(record["output"]), end]
        if len(prompt) < seq_len:
            targets = [IGNORED] * (len(prompt) - 1) + response
            pairs.append((record, Example((prompt + response)[:-1][:seq_len], targets[:seq_len])))
            cut += len(targets) > seq_len
    dropped = len(records) - len(pairs)
    if 2 * dropped > len(records):
        what = f"{dropped} of {len(records)} prompts leave no room for a response in {seq_len} tokens"
        raise UsageError(f"{what}; use a larger --seq-len")
    if dropped or cut:
        lost = f"{dropped} are left out (their prompts fill {seq_len} tokens), and {cut} are cut at their end"
        warnings.warn(f"of {len(records)} instructions, {lost}; use a larger --seq-len", stacklevel=2)
    return pairs


def _look(label: str) -> str | Decimal:
    """Equal for labels that a reader would take for the same: 1 and 1.0, true and 1, Spam and spam.

    Spaces count as one, characters that are not seen, such as a soft hyphen, as none.
    """
    text = unicodedata.normalize("NFKC", label).casefold()
    text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    try:
        number = Decimal({"true": "1", "false": "0"}.get(text, text))
    except InvalidOperation:
        return text
    return text if number.is_nan() else number


def _labels_of(records: Sequence[Record]) -> list[str]:
    """Each record's label without the spaces around it. Refuses missing labels, and two that look alike."""
    labels, first = [], dict[str | Decimal, tuple[str, str]]()
    for record in records:
        label = record["label"].strip()
        if (look := _look(label)) in MISSING:
            do = "label the row or remove it"
            raise UsageError(f"{record.where}: the label is {record['label']!r}, a missing one; {do}")
        known, place = first.setdefault(look, (label, record.where))
        if known != label:
            alike = f"the label {label!r} looks like {known!r} at {place}"
            raise UsageError(f"{record.where}: {alike}; spell them the same")
        labels.append(label)
    return labels


def classifier_examples(
    records: Sequence[Record], encoding: Encoding, seq_len: int
) -> tuple[list[Example], list[str]]:
    """(the first seq_len tokens of each text, its class the target of the last; the classes' labels).

    The labels are sorted, by value where all are numbers. An empty text is <|endoftext|>; a warning says how
    many texts are cut. Raises UsageError for a label that is empty or looks like another, and for fewer than
    two classes.
    """
    found = _labels_of(records)
    names = sorted(set(found))
    if all(isinstance(_look(name), Decimal) for name in names):
        names.sort(key=_look)
    if len(names) < 2:
        raise UsageError(f"a classifier needs at least two labels, found {', '.join(names) or 'none'}")
    examples, cut = [], 0
    for record, label in zip(records, found, strict=True):
        text = encoding.encode_ordinary(record["text"])
        ids, cut = ids_to_classify(text, encoding, seq_len), cut + (len(text) > seq_len)
        examples.append(Example(ids, [IGNORED] * (len(ids) - 1) + [names.index(label)]))
    if cut:
        warnings.warn(f"{cut} of {len(records)} texts are cut to {seq_len} tokens (--seq-len)", stacklevel=2)
    return examples, names


def split(records: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation): shuffled by the seed, `fraction` of them for validation; one in each at least.

    Raises UsageError for fewer than two records.
    """
    if len(records) < 2:
        raise UsageError(f"found {len(records)} record, wanted at least 2: one is held out for validation")
    order = shuffled(len(records), seed, 0)
    held = min(max(round(len(records) * fraction), 1), len(records) - 1)
    return [records[i] for i in order[held:]], [records[i] for i in order[:held]]

"""From data to a `Task`: plain text, instructions with their responses, labelled texts."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2lite.errors import UsageError
from gpt2lite.finetuning import data, examples
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import Task
from gpt2lite.generation.prompts import tokenizer_of
from gpt2lite.model import GPTModel
from gpt2lite.tokenizer import Encoding

HELD_OUT = 0.1  # of the data, for validation
MOST_WINDOWS = 64
SAMPLE_TOKENS = 60


def _written(model: GPTModel, prompt: list[int], encoding: Encoding, **options: Any) -> str:
    """What the model writes after a prompt, until it ends the text."""
    prompt = prompt[-(model.config.context_length - 1) :]
    room = min(SAMPLE_TOKENS, model.config.context_length - len(prompt))
    stop = [] if encoding.eot_token is None else [encoding.eot_token]
    ids = model.generate([prompt], room, stop=stop, encoding=encoding, **options)[0]
    return encoding.decode([id for id in ids[len(prompt) :].tolist() if id not in stop])


def held_out(tokens: Tensor, least: int = 2) -> Tensor:
    """The end of a text that is not trained on: a tenth, and at least so many tokens."""
    return tokens[-max(int(len(tokens) * HELD_OUT), least) :]


def _file(data: object) -> Path:
    """The file that is meant. Raises UsageError for what is its content, or nothing that has a name."""
    if isinstance(data, Path):
        return data
    if not isinstance(data, str) or not os.path.exists(data):
        said = (
            f"{data:.60}: no such file"
            if isinstance(data, str)
            else f"wanted a path, got {type(data).__name__}"
        )
        raise UsageError(f"{said}; texts and records are read from a file, so save them as one")
    return Path(data)


def text_task(
    text: str | Path | Tensor, model: GPTModel, recipe: Recipe, *, encoding: Encoding | None = None
) -> Task:
    """Continue a text: a file of UTF-8 or of tokens, or ids (N,); its last tenth is for validation.

    A text takes 2 or 4 bytes per token in a temporary file, which is mapped. The tokenizer is the model's, or
    `encoding`. Raises UsageError for one that is too short for a window in each part.
    """
    seq_len, encoding = recipe.row_length(model.config.context_length), tokenizer_of(model, encoding)
    is_read = isinstance(text, Tensor)
    tokens: Any = text if is_read else tokens_of(_file(text), encoding, model.config.vocab_size)
    held = held_out(tokens, seq_len + 1)
    if len(tokens) - len(held) <= seq_len:
        parts = f"training and validation need a window of {seq_len + 1} tokens each"
        raise UsageError(f"the text has {len(tokens)} tokens; {parts}; use a smaller --seq-len")
    training = tokens[: -len(held)]
    first = int(tokens[0]) if encoding.eot_token is None else encoding.eot_token
    return Task(
        digest=data.digest_of(data.tensor_parts(tokens)),
        train=data.text_batches(training, seq_len, recipe.batch_size, recipe.seed),
        validation=data.text_windows(held, seq_len, recipe.batch_size, MOST_WINDOWS),
        sample=lambda model: _written(model, [first], encoding, temperature=0.8, seed=0),
    )


def instruction_task(
    path: str | Path, model: GPTModel, recipe: Recipe, *, encoding: Encoding | None = None
) -> Task:
    """Answer: records with instruction, output and perhaps input (.json, .jsonl, .csv), in Alpaca's words.

    The loss is of the response alone. A tenth is for validation. The tokenizer is the model's, or `encoding`.
    A model that learned it answers a `gpt2lite.Instruction`. Raises UsageError for bad records.
    """
    seq_len, encoding = recipe.row_length(model.config.context_length), tokenizer_of(model, encoding)
    records = examples.read_records(_file(path), ("instruction", "output"))
    pairs = examples.instruction_examples(records, encoding, seq_len)
    training, held = examples.split(pairs, HELD_OUT, recipe.seed)
    shown = held[0][0]
    prompt = encoding.encode_ordinary(examples.format_prompt(shown))
    task = _example_task([e for _, e in training], [e for _, e in held], recipe)
    task = replace(task, template=examples.TEMPLATE)
    return replace(task, sample=lambda model: f"{shown['instruction']} → {_written(model, prompt, encoding)}")


def _example_task(training: list[data.Example], held: list[data.Example], recipe: Recipe) -> Task:
    return Task(
        data.example_batches(training, recipe.batch_size, recipe.seed),
        data.example_windows(held, recipe.batch_size),
        digest=data.digest_of(repr(example).encode() for example in (*training, *held)),
    )


def classifier_task(
    path: str | Path, model: GPTModel, recipe: Recipe, *, encoding: Encoding | None = None
) -> Task:
    """Say what a text is: records with text and label (.json, .jsonl, .csv); the loss of the last token.

    A tenth is for validation. The model needs a head of `len(task.labels)` classes (`as_classifier`); one
    that learned it has `classify`. Raises UsageError for bad records, or fewer than two labels.
    """
    seq_len, encoding = recipe.row_length(model.config.context_length), tokenizer_of(model, encoding)
    records = examples.read_records(_file(path), ("text", "label"))
    labelled, labels = examples.classifier_examples(records, encoding, seq_len)
    training, held = examples.split(labelled, HELD_OUT, recipe.seed)
    parts = {"to learn from": training, "to validate with, so accuracy does not cover them": held}
    for what, part in parts.items():
        seen = {example.targets[-1] for example in part}
        if lacking := [label for number, label in enumerate(labels) if number not in seen]:
            warnings.warn(f"{path}: no rows of {', '.join(lacking)} {what}; give more rows", stacklevel=2)
    return replace(_example_task(training, held, recipe), labels=tuple(labels), seq_len=seq_len)


def tokens_of(path: Path, encoding: Encoding, vocab_size: int, folder: Path | None = None) -> Tensor:
    """The ids of a token file (.bin, .npy), mapped, or of a text, in a file without a name in `folder`."""
    folder = folder or Path(tempfile.gettempdir())
    if path.suffix.lower() in (".bin", ".npy"):
        return data.open_tokens(path, vocab_size)
    return data.map_text(path, folder, encoding, vocab_size)

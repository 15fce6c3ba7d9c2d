"""What goes in and comes out: prompts → one padded batch; where each text stops; tokens → text."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gpt2lite.checkpoint.source import in_memory
from gpt2lite.config import SLOTS, GPTConfig
from gpt2lite.errors import UsageError
from gpt2lite.reading_text import plain_text
from gpt2lite.tokenizer import Beside, Encoding, Tokenizer, as_tokenizer, end_of_text

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Rows = Sequence[Tensor | Sequence[int]]
Ids = Tensor | Rows
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32)
CHECKED_AT_ONCE = 2**20  # ids
WANTED = "ids must be a tensor of integers of shape (batch, tokens ≥ 1), or a list of such rows"
GPT2_VOCABULARY, ROWS_PADDED_TO = 50257, 64


class Instruction(NamedTuple):
    """What a model that was trained on instructions is told to do, and with what."""

    instruction: str
    input: str = ""


Text = str | Instruction


def is_text(prompt: object) -> TypeIs[Text | Sequence[Text]]:
    """Whether a prompt is a text or an instruction, or a list that begins with one."""
    first = prompt[0] if isinstance(prompt, list | tuple) and prompt else prompt
    return isinstance(prompt, Text) or isinstance(first, Text)


def filled(template: Sequence[str], asked: Instruction) -> str:
    """An instruction as it is written in a template: its first text, or the second, which has an input."""
    return SLOTS.sub(lambda slot: getattr(asked, slot[1]), template[bool(asked.input)])


def tokenizer_of(model: Any, encoding: Encoding | None = None) -> Tokenizer:
    """The encoding that was passed, else that of the checkpoint which the model was loaded from.

    Raises UsageError where there is neither, and as `tokenizer_for`.
    """
    if encoding is not None:
        return as_tokenizer(encoding)
    beside: Beside | None = getattr(model, "beside", None)
    if beside is None:
        raise UsageError("this model was loaded from no checkpoint, so it has no tokenizer; pass encoding=…")
    return beside.tokenizer


def ids_of_text(model: Any, encoding: Tokenizer, prompt: object) -> tuple[str, list[int]]:
    """(what stands before the answer, its ids): a prompt as it is, and nothing for an instruction.

    A prompt is read as a file of its text would be, with special tokens as such; an empty one is the token
    that ends a text. An instruction is written as in training, special tokens in it as plain text. Raises
    UsageError for what is no text, and for an instruction to a model that was not trained on any.
    """
    if isinstance(prompt, Instruction):
        if not (purpose := getattr(model, "purpose", None)) or not purpose.template:
            raise UsageError("nothing says that this model was trained on instructions; give it a prompt")
        return "", encoding.encode_ordinary(filled(purpose.template, prompt))
    if not isinstance(prompt, str):
        raise UsageError(f"a list of texts holds a {type(prompt).__name__}; give texts alone")
    text = plain_text("prompt", prompt)
    return text, encoding.encode(text, allowed_special="all") or [end_of_text(encoding)]


def ends_of(ids: Tensor) -> tuple[int, int]:
    """The least and the largest of integers of any shape, at least one; converts some at a time."""
    ends = [in_memory(part).long().aminmax() for part in ids.flatten().split(CHECKED_AT_ONCE)]
    return int(min(low for low, _ in ends)), int(max(high for _, high in ends))


def require_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise UsageError unless all ids are in 0 … vocab_size - 1."""
    low, high = ends_of(ids)
    if low < 0 or high >= vocab_size:
        raise UsageError(f"ids must be in 0 … {vocab_size - 1}, got {low} … {high}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids (B, T); row b begins with `pads[b]` padding ids; `pads` (B,) is None if no row has any."""

    ids: Tensor
    pads: Tensor | None

    def last(self, count: int) -> Batch:
        """The last `count` tokens of each row."""
        cut = max(self.ids.shape[1] - count, 0)
        pads = None if self.pads is None else (self.pads - cut).clamp(min=0)
        pads = None if pads is None or not bool(pads.any()) else pads
        return Batch(self.ids[:, cut:], pads)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has a value in memory for each place of its shape."""
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    return is_plain and not (tensor.is_meta or tensor.is_nested)


def _row(row: object) -> Tensor:
    try:
        found = row if isinstance(row, Tensor) else torch.tensor(row, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{WANTED}, got a row of {type(row).__name__}") from None
    if not is_dense(found):
        raise UsageError(f"{WANTED}, got a row that is nested, sparse, quantized or on meta")
    if found.dim() != 1 or not found.numel() or found.dtype not in INTEGERS:
        raise UsageError(f"{WANTED}, got a row of {found.dtype} {tuple(found.shape)}")
    return found.to("cpu", torch.int64)


def as_batch(ids: Ids, config: GPTConfig, device: torch.device) -> Batch:
    """What to generate from. Raises UsageError for anything but ids of this model's vocabulary."""
    if isinstance(ids, Tensor) and not is_dense(ids):
        raise UsageError(f"{WANTED}, got one that is nested, sparse, quantized or on meta")
    has_rows = ids.dim() == 2 if isinstance(ids, Tensor) else isinstance(ids, Sequence)
    if not has_rows or not len(ids):
        raise UsageError(f"{WANTED}, got {getattr(ids, 'shape', ids)!r:.40}")
    rows = [_row(row) for row in ids]
    lacks = [max(map(len, rows)) - len(row) for row in rows]
    # Padded with its own first id, a row has no id that its text lacks.
    padded = torch.stack([torch.cat([row[:1].expand(n), row]) for n, row in zip(lacks, rows, strict=True)])
    require_ids(padded, config.vocab_size)
    return Batch(padded.to(device), torch.tensor(lacks, device=device) if any(lacks) else None)


def usable_vocabulary(config: GPTConfig, encoding: Encoding | None) -> int:
    """How many ids can be sampled: the encoding's, else GPT-2's where rows only pad to a multiple of 64."""
    if encoding is not None:
        return min(encoding.n_vocab, config.vocab_size)
    is_padded = config.vocab_size > GPT2_VOCABULARY and config.vocab_size % ROWS_PADDED_TO == 0
    return GPT2_VOCABULARY if is_padded else config.vocab_size


def as_stops(stop: Any) -> tuple[Any, ...]:
    """Stop ids and strings, of which one may stand alone."""
    is_many = isinstance(stop, Collection) and not isinstance(stop, str | bytes | Tensor)
    return tuple(stop) if is_many else (stop,)


class Stops:
    """Which rows go on, as tokens come in: a row stops after a stop id, or after a stop string."""

    def __init__(
        self, stop: tuple[int | str, ...], encoding: Tokenizer | None, batch: Batch, vocab_size: int
    ) -> None:
        strings = [each.encode() for each in stop if isinstance(each, str)]
        ids = [each for each in stop if not isinstance(each, str)]
        if strings and encoding is None:
            raise UsageError("stop strings need the encoding that turns tokens into text: pass encoding=")
        self.strings, self.encoding = strings, encoding
        rows, device = len(batch.ids), batch.ids.device
        self.ids = torch.tensor(ids, dtype=torch.int64, device=device)
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        end = (encoding.eot_token if encoding else 0) or 0
        self.fill = torch.full((rows, 1), end if end < vocab_size else 0, device=device)
        self.tails = [b""] * rows
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens up to the stop

    def take(self, token: Tensor) -> Tensor:
        """The tokens drawn (B, 1) → the same; in rows that had stopped, their stop id or the end of text."""
        token = torch.where(self.running[:, None], token, self.fill)
        self.lengths = self.lengths + self.running
        if len(self.ids):
            stopped = torch.isin(token[:, 0], self.ids)
            self.fill = torch.where((stopped & self.running)[:, None], token, self.fill)
            self.running = self.running & ~stopped
        if self.encoding and self.strings:
            drawn = enumerate(token[:, 0].tolist())
            ended = [self._ends(row, self.encoding.decode_single_token_bytes(each)) for row, each in drawn]
            self.running = self.running & ~torch.tensor(ended, device=token.device)
        return token

    def _ends(self, row: int, piece: bytes) -> bool:
        kept = max(map(len, self.strings)) - 1 + len(piece)
        self.tails[row] = (self.tails[row] + piece)[-kept:]
        return any(string in self.tails[row] for string in self.strings)

    @property
    def all_stopped(self) -> bool:
        """Whether every row has stopped; costs no synchronisation if nothing can stop."""
        return bool(len(self.ids) or self.strings) and not bool(self.running.any())


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    lengths = range(max(map(len, stops), default=0) - 1, 0, -1)
    return next((n for n in lengths if n <= len(text) and any(s.startswith(text[-n:]) for s in stops)), 0)


def stream_text(tokens: Iterable[int], encoding: Encoding, stops: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of text, one for each token up to the end of text or a stop string, and what is left then.

    A piece holds whole characters and nothing that may turn out to begin a stop string.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in tokens:
        if token == encoding.eot_token:
            break
        held += decoder.decode(encoding.decode_single_token_bytes(token))
        if ends := [held.find(stop) for stop in stops if stop in held]:
            yield held[: min(ends)]
            return
        ready = len(held) - _held_back(held, stops)
        yield held[:ready]
        held = held[ready:]
    if held := held + decoder.decode(b"", final=True):
        yield held

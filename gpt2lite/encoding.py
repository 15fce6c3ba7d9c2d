"""What the program asks of a tokenizer, whoever computes it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import tiktoken

from gpt2lite.errors import CheckpointError, UsageError

END_OF_TEXT = "<|endoftext|>"
WORDS_AND_SPACES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
UNKNOWN = "\ufffd".encode()
Allowed: TypeAlias = Literal["all"] | AbstractSet[str]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer that belongs to a checkpoint.

    `n_vocab` is its largest id plus one, `eot_token` the id that ends a text, or None. `ids_of(text,
    allowed)` reads the special tokens that are allowed as such and others as plain text; `bytes_of` raises
    KeyError for an id without a token. With `cuts_at_spaces`, a text that is cut before a space or a line
    end gives the same ids as the whole.
    """

    name: str
    n_vocab: int
    eot_token: int | None
    ids_of: Callable[[str, Allowed], list[int]]
    bytes_of: Callable[[int], bytes]
    cuts_at_spaces: bool = True

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are plain text."""
        return self.ids_of(text, frozenset())

    def encode(self, text: str, *, allowed_special: Allowed = frozenset()) -> list[int]:
        """The ids of a text, with these special tokens read as such; others are plain text."""
        return self.ids_of(text, allowed_special)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What a token stands for inside a text: UTF-8, perhaps a part of a character.

        An id that the tokenizer does not have, such as a padding row of the model, is U+FFFD.
        """
        try:
            return self.bytes_of(token)
        except KeyError:
            return UNKNOWN

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; U+FFFD for ids without a token and for bytes that are not UTF-8."""
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode("utf-8", errors="replace")


Encoding: TypeAlias = Tokenizer | tiktoken.Encoding


def as_tokenizer(encoding: tiktoken.Encoding, end: str = END_OF_TEXT) -> Tokenizer:
    """The same encoding; the token `end` ends a text, if there is one of this name."""

    def ids_of(text: str, allowed: Allowed) -> list[int]:
        return encoding.encode(text, allowed_special=allowed, disallowed_special=())

    end_id = encoding.encode_single_token(end) if end in encoding.special_tokens_set else None
    return Tokenizer(encoding.name, encoding.n_vocab, end_id, ids_of, encoding.decode_single_token_bytes)


def end_of_text(encoding: Encoding) -> int:
    """The id that ends a text. Raises UsageError where the tokenizer has none."""
    if encoding.eot_token is None:
        raise UsageError(f"{encoding.name}: this tokenizer has no end-of-text token, which is needed here")
    return encoding.eot_token


def read_encoding(path: Path) -> tiktoken.Encoding:
    """The byte-pair encoding in a `.tiktoken` file: a line a token, its bytes in base64 and its rank.

    `<|endoftext|>` takes the id behind the last rank. Raises CheckpointError for a damaged file.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(path, f"not a tiktoken file of 'base64 rank' lines ({error})") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not lines:
        raise CheckpointError(path, f"{len(lines)} lines, whose ranks must be 0, 1, 2 … each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(path, "lacks some of the 256 single bytes, so not every text can be encoded")
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(
        path.stem, pat_str=WORDS_AND_SPACES, mergeable_ranks=ranks, special_tokens=special
    )

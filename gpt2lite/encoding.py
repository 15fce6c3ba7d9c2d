"""What the program asks of a tokenizer, and GPT-2's kind: byte-level BPE, which tiktoken computes.

vocab.json and merges.txt name the pair that each merge joins; tiktoken knows only the rank of the result.
Both give the same ids for every text if each token, split by the merges before its own, is the pair that its
merge names; `as_encoding` checks that.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from gpt2lite.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
WORDS_AND_SPACES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
UNKNOWN = "\ufffd".encode()
Allowed: TypeAlias = Literal["all"] | AbstractSet[str]

# vocab.json spells a token byte by byte, each as a visible character.
_SEEN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
CHARACTERS = [chr(byte if byte in _SEEN else 256 + _UNSEEN.index(byte)) for byte in range(256)]
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer that belongs to a checkpoint.

    `n_vocab` is its largest id plus one, `eot_token` the id that ends a text, or None. `ids_of(text,
    allowed)` reads the allowed special tokens as such and others as plain text; `bytes_of` raises KeyError
    for an id without a token. With `cuts_at_spaces`, a text that is cut before a space or a line end gives
    the same ids as the whole.
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


Encoding: TypeAlias = "Tokenizer | tiktoken.Encoding"


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


# ---- GPT-2's kind ------------------------------------------------------------------------------------------


def unspelled(token: str) -> bytes:
    """A token of vocab.json as bytes; an added token, which is not spelled, as UTF-8."""
    return bytes(BYTES[c] for c in token) if BYTES.keys() >= set(token) else token.encode()


def _split(token: str, ranks: Mapping[str, int], below: int) -> list[str]:
    """The parts of a token, merged by the ranks that are less than `below`."""
    parts = [*token]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, below), at) for at, (a, b) in enumerate(pairwise(parts)))
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _encoding(name: str, ranks: dict[bytes, int], special: Mapping[str, int]) -> tiktoken.Encoding:
    import tiktoken  # here: who loads a model without text does not need it

    return tiktoken.Encoding(
        name, pat_str=WORDS_AND_SPACES, mergeable_ranks=ranks, special_tokens=dict(special)
    )


def as_encoding(
    name: str, vocab: Mapping[str, int], merges: Sequence[Sequence[str]], special: Mapping[str, int]
) -> tiktoken.Encoding | None:
    """tiktoken's encoding that gives the same ids for every text, or None where it would not.

    Takes half a second for GPT-2's vocabulary. Raises KeyError for a merge that is not in the vocabulary.
    """
    ranks = {a + b: vocab[a + b] for a, b in merges}
    tokens = {token: vocab[token] for token in CHARACTERS if token in vocab} | ranks
    if (
        len(tokens) < 256 + len(merges)
        or [*ranks.values()] != sorted(ranks.values())
        or vocab.keys() - tokens.keys() - special.keys()
        or any(vocab.get(token, id) != id for token, id in special.items())
        or any(b.startswith(a) for a, b in pairwise(sorted(special)))  # tiktoken may take the shorter
        or any(_split(a + b, ranks, ranks[a + b]) != [a, b] for a, b in merges)
    ):
        return None
    return _encoding(name, {unspelled(token): id for token, id in tokens.items()}, special)


def as_lists(encoding: tiktoken.Encoding) -> tuple[dict[str, int], list[list[str]]]:
    """vocab.json and merges of an encoding with GPT-2's rules, special tokens aside."""
    ids = (id for id in range(encoding.n_vocab) if not encoding.is_special_token(id))
    spelled = {"".join(CHARACTERS[byte] for byte in encoding.decode_single_token_bytes(id)): id for id in ids}
    return spelled, [_split(token, spelled, rank) for token, rank in spelled.items() if len(token) > 1]


def read_encoding(path: Path) -> tiktoken.Encoding:
    """The byte-pair encoding in a `.tiktoken` file: per line the base64 of a token's bytes, and its rank.

    `<|endoftext|>` takes the id after the last rank. Raises CheckpointError for a damaged file.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise CheckpointError(path, f"not a tiktoken file of 'base64 rank' lines ({error})") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not lines:
        raise CheckpointError(path, f"the ranks of its {len(lines)} lines must be 0, 1, 2 …, each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(path, "lacks some of the 256 single bytes, so some text could not be encoded")
    return _encoding(path.stem, ranks, {END_OF_TEXT: len(ranks)})

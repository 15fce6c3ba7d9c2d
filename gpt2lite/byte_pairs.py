"""GPT-2's kind of tokenizer, byte-level BPE: as vocab.json and merges.txt write it ↔ as tiktoken computes it.

A merge names a pair; tiktoken knows only the rank of what the pair becomes. Both give the same ids for every
text if each token, split by the merges before its own, is the pair that its merge names; that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import tiktoken

from gpt2lite.encoding import WORDS_AND_SPACES

Text = TypeVar("Text", str, bytes)

# vocab.json spells a token byte by byte, each as a character that can be seen.
_SEEN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
CHARACTERS = [chr(byte if byte in _SEEN else 256 + _UNSEEN.index(byte)) for byte in range(256)]
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def spelled(token: bytes) -> str:
    """Bytes as vocab.json spells them."""
    return "".join(CHARACTERS[byte] for byte in token)


def unspelled(token: str) -> bytes:
    """A token of vocab.json as bytes; an added token, which is not spelled, as UTF-8."""
    return bytes(BYTES[c] for c in token) if BYTES.keys() >= set(token) else token.encode()


def split(token: Text, ranks: Mapping[Text, int], below: int) -> list[Text]:
    """The parts of a token, merged by the ranks that are less than `below`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, below), at) for at, (a, b) in enumerate(pairwise(parts)))
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def as_encoding(
    name: str, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Mapping[str, int]
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
        or any(split(a + b, ranks, ranks[a + b]) != [a, b] for a, b in merges)
    ):
        return None
    by_bytes = {unspelled(token): id for token, id in tokens.items()}
    return tiktoken.Encoding(
        name, pat_str=WORDS_AND_SPACES, mergeable_ranks=by_bytes, special_tokens=dict(special)
    )


def as_lists(encoding: tiktoken.Encoding) -> tuple[dict[str, int], list[list[str]]]:
    """vocab.json and merges of an encoding with GPT-2's rules, special tokens aside."""
    ids = [id for id in range(encoding.n_vocab) if not encoding.is_special_token(id)]
    ranks = {encoding.decode_single_token_bytes(id): id for id in ids}
    pairs = [split(token, ranks, rank) for token, rank in ranks.items() if len(token) > 1]
    return {spelled(token): id for token, id in ranks.items()}, [[*map(spelled, pair)] for pair in pairs]

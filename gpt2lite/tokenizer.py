"""Text ↔ token ids, through tiktoken: the official GPT-2 encoding, or the one beside a checkpoint."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import tiktoken

from gpt2lite.checkpoint import side_file
from gpt2lite.errors import CheckpointError, UsageError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCABULARY = 50257  # rows past it are padding that no text encodes to
WORDS_AND_SPACES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def read_encoding(path: Path) -> tiktoken.Encoding:
    """The byte-pair encoding in a `.tiktoken` file: a line a token, its bytes in base64 and its rank.

    `<|endoftext|>` takes the id behind the last rank. Raises CheckpointError for a damaged file.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path}: not a tiktoken file of 'base64 rank' lines ({error})") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not lines:
        raise CheckpointError(f"{path}: {len(lines)} lines, whose ranks must be 0, 1, 2 … each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(f"{path}: lacks some of the 256 single bytes, so not every text can be encoded")
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(
        path.stem, pat_str=WORDS_AND_SPACES, mergeable_ranks=ranks, special_tokens=special
    )


def gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken's `gpt2`, 50257 ids; fetched once and kept in $TIKTOKEN_CACHE_DIR."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors; ValueError: not the bytes it knows
        raise CheckpointError(
            f"tiktoken could not fetch its gpt2 encoding ({type(error).__name__}). Without a network, set "
            "TIKTOKEN_CACHE_DIR to the cache folder of a machine that has loaded it once."
        ) from error


def tokenizer_for(checkpoint: Path, vocab_size: int) -> tiktoken.Encoding:
    """The encoding for a model: `<stem>.tiktoken` beside its checkpoint if there is one, else GPT-2's.

    Raises UsageError where the model's vocabulary is too small for the encoding.
    """
    beside = side_file(checkpoint, ".tiktoken")
    encoding = read_encoding(beside) if beside.is_file() else None
    if encoding is None and vocab_size < GPT2_VOCABULARY:
        raise UsageError(
            f"{checkpoint}: a vocabulary of {vocab_size} is not GPT-2's {GPT2_VOCABULARY}, and there is no "
            f"{beside.name} beside it. Put its tokenizer there, or call gpt2lite.generate with token ids."
        )
    encoding = encoding or gpt2_encoding()
    if encoding.n_vocab > vocab_size:
        raise UsageError(f"{beside}: {encoding.n_vocab} tokens for a model with a vocabulary of {vocab_size}")
    return encoding

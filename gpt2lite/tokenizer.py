"""Text ↔ token ids, through tiktoken: the official GPT-2 encoding, or the one beside a checkpoint."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from pathlib import Path

import tiktoken

from gpt2lite.checkpoint import side_file
from gpt2lite.errors import CheckpointError, UsageError

END_OF_TEXT = "<|endoftext|>"
# What tiktoken's gpt2 is made of: the name in its cache, the Hub's name of the same bytes, their sha256.
GPT2_FILES = (
    (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "merges.txt",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "vocab.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
)
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
    """tiktoken's `gpt2`, 50257 ids; fetched once, by tiktoken or else from the Hub, and kept in its cache.

    The cache is $TIKTOKEN_CACHE_DIR, else a temporary folder. Raises CheckpointError where neither answers.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' are OSErrors; ValueError: not the bytes it knows
        try:
            _seed_cache_from_hub()
        except (CheckpointError, OSError) as second:
            raise CheckpointError(
                f"tiktoken could not fetch its gpt2 encoding ({type(error).__name__}). Without a network, "
                "set TIKTOKEN_CACHE_DIR to the cache folder of a machine that has loaded it once. "
                f"Nor could the Hub's copy take its place: {second}"
            ) from error
    return tiktoken.get_encoding("gpt2")


def _cache_folder() -> Path:
    """Where tiktoken keeps what it fetches."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    if not named:
        raise CheckpointError("TIKTOKEN_CACHE_DIR is empty, so that nothing is kept.")
    return Path(named)


def _seed_cache_from_hub() -> None:
    """Put the Hub's copies under the names that tiktoken looks for, byte for byte what it would fetch."""
    from gpt2lite.hub import OFFICIAL, fetch_file  # here, since the client takes half a second to import

    folder = _cache_folder()
    for cached_name, hub_name, sha256 in GPT2_FILES:
        content = fetch_file(OFFICIAL["gpt2"], hub_name).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise CheckpointError(f"{hub_name} has sha256 {found[:8]}…, wanted {sha256[:8]}….")
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f"{cached_name}.{os.getpid()}"
        half.write_bytes(content)
        half.replace(folder / cached_name)


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

"""The tokenizer of a checkpoint: the files beside it, GPT-2's own encoding, and the same files for a copy.

The files are called after the checkpoint (`model.tiktoken` or `model.tokenizer.json` beside `model.pth`); or
they lie in its folder under the names that other programs give them, and belong to every checkpoint there.
"""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from gpt2lite.checkpoint import side_file
from gpt2lite.checkpoint.inert_pickle import DescribingUnpickler, describe, shown
from gpt2lite.checkpoint.json_text import json_object, read_json
from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.source import FileState, lies, read_all, source_of
from gpt2lite.checkpoint.writing import replacing
from gpt2lite.dialects.configs import folder_of
from gpt2lite.dialects.peft import find_adapter
from gpt2lite.errors import CheckpointError, GPT2LiteError, UsageError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
HAS_BORDER = re.compile(r"\S[ \n]").search
UNKNOWN = "\ufffd".encode()
Allowed: TypeAlias = Literal["all"] | AbstractSet[str]
Files: TypeAlias = Mapping[str, Place]
Said: TypeAlias = dict[str, Any]  # a JSON object


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer that belongs to a checkpoint.

    `n_vocab` is its largest id plus one, `eot_token` the id that ends a text, or None. `ids_of(text,
    allowed)` reads the allowed special tokens as such and others as plain text; `bytes_of` raises KeyError
    for an id without a token. With `cuts_at_spaces`, a text that is cut before a space or a line end gives
    the same ids as the whole. `bpe` is what computes GPT-2's kind of byte pairs.
    """

    name: str
    n_vocab: int
    eot_token: int | None
    ids_of: Callable[[str, Allowed], list[int]]
    bytes_of: Callable[[int], bytes]
    cuts_at_spaces: bool = True
    bpe: tiktoken.Encoding | None = None

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
        with suppress(KeyError):
            return self.bytes_of(token)
        return UNKNOWN

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; U+FFFD for ids without a token and for bytes that are not UTF-8."""
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode("utf-8", errors="replace")


Encoding: TypeAlias = "Tokenizer | tiktoken.Encoding"


def as_tokenizer(encoding: Encoding, end: str = END_OF_TEXT) -> Tokenizer:
    """The same encoding; of tiktoken's, the token `end` ends a text, if there is one of this name."""
    if isinstance(encoding, Tokenizer):
        return encoding

    def ids_of(text: str, allowed: Allowed) -> list[int]:
        return encoding.encode(text, allowed_special=allowed, disallowed_special=())

    end_id = encoding.encode_single_token(end) if end in encoding.special_tokens_set else None
    # Newer patterns than GPT-2's continue a token across a line end; a special token may hold a space.
    cuts = "\\n" not in encoding._pat_str and not any(map(HAS_BORDER, encoding.special_tokens_set))
    bytes_of = encoding.decode_single_token_bytes
    return Tokenizer(encoding.name, encoding.n_vocab, end_id, ids_of, bytes_of, cuts, encoding)


def text_ids(encoding: Encoding, text: str) -> Tensor:
    """The ids of a text, (T,) int64, with special tokens read as such."""
    return torch.tensor(encoding.encode(text, allowed_special="all"), dtype=torch.int64, device="cpu")


def end_of_text(encoding: Encoding) -> int:
    """The id that ends a text. Raises UsageError where the tokenizer has none."""
    if encoding.eot_token is None:
        raise UsageError(f"{encoding.name}: this tokenizer has no end-of-text token, which is needed here")
    return encoding.eot_token


# ---- byte-level BPE, which tiktoken computes ---------------------------------------------------------------
# vocab.json and merges.txt name the pair that each merge joins; tiktoken knows only the rank of the result.
# Both give the same ids for every text if each token, split by the merges before its own, is the pair that
# its merge names; `as_encoding` checks that.

GPT2_SIZES = (50257, 50304, 50432)  # GPT-2's vocabulary, and padded to multiples of 64, 128 and 256
WORDS_AND_SPACES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# vocab.json spells a token byte by byte, each as a visible character.
_SEEN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
CHARACTERS = [chr(byte if byte in _SEEN else 256 + _UNSEEN.index(byte)) for byte in range(256)]
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


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


def _encoding(name: str, ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    import tiktoken  # here: who loads a model without text does not need it

    return tiktoken.Encoding(name, pat_str=WORDS_AND_SPACES, mergeable_ranks=ranks, special_tokens=special)


def as_encoding(
    name: str, vocab: Mapping[str, int], merges: Sequence[Sequence[str]], special: dict[str, int]
) -> tiktoken.Encoding | None:
    """tiktoken's encoding that gives the same ids for every text, or None where it would not.

    Takes half a second for GPT-2's vocabulary. Raises KeyError for a merge that is not in the vocabulary.
    """
    ranks = {a + b: vocab[a + b] for a, b in merges}
    tokens = {token: vocab[token] for token in CHARACTERS if token in vocab} | ranks
    if (
        len(tokens) < 256 + len(merges)
        or len({*vocab.values(), *special.values()}) < len({*vocab, *special})
        or sum(len(token) ** 2 for token in tokens) > MAX_WORK
        or [*ranks.values()] != sorted(ranks.values())
        or vocab.keys() - tokens.keys() - special.keys()
        or any(vocab.get(token, id) != id for token, id in special.items())
        or any(b.startswith(a) for a, b in pairwise(sorted(special)))  # tiktoken may take the shorter
        or any(_split(a + b, ranks, ranks[a + b]) != [a, b] for a, b in merges)
    ):
        return None
    return _encoding(name, {unspelled(token): id for token, id in tokens.items()}, special)


def read_encoding(path: Place) -> tiktoken.Encoding:
    """The byte-pair encoding in a `.tiktoken` file: per line the base64 of a token's bytes, and its rank.

    `<|endoftext|>` takes the id after the last rank. Raises CheckpointError for a damaged file.
    """
    try:
        lines = [line.split() for line in _bytes(path).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise CheckpointError(path, f"not a tiktoken file of 'base64 rank' lines ({error})") from None
    if sorted(ranks.values()) != list(range(len(lines))) or not lines:
        raise CheckpointError(path, f"the ranks of its {len(lines)} lines must be 0, 1, 2 …, each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(path, "lacks some of the 256 single bytes, so some text could not be encoded")
    return _encoding(path.stem, ranks, {END_OF_TEXT: len(ranks)})


def gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken's `gpt2`, 50257 ids: as tiktoken has or fetches it, else made of the Hub's two lists.

    tiktoken's cache is $TIKTOKEN_CACHE_DIR, else a temporary folder. Raises CheckpointError where neither
    answers.
    """
    import tiktoken  # here, as huggingface_hub: who loads a model without text needs neither

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' are OSErrors; ValueError: not the bytes it knows
        from gpt2lite.hub import OFFICIAL, fetch_file

        try:
            files = {name: fetch_file(OFFICIAL["gpt2"], name) for name in (VOCAB, MERGES)}
            vocab, merges = _json(files, VOCAB), _merges(files[MERGES])
            made = as_encoding("gpt2", vocab, merges, {END_OF_TEXT: 50256})
            if made is None or made.n_vocab != GPT2_SIZES[0]:
                raise CheckpointError(files[VOCAB], "not GPT-2's vocabulary")
        except (CheckpointError, ValueError, KeyError) as second:
            said = f"cannot be fetched from tiktoken ({type(error).__name__}) or the Hub ({second})"
            do = "Without a network, set TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it"
            raise CheckpointError(f"GPT-2's encoding {said}. {do}") from error
        return made


# ---- tokenizer.json, or vocab.json and merges.txt ----------------------------------------------------------

RANKS = "tiktoken"  # beside model.pth: model.tiktoken
TREE, VOCAB, MERGES, META = "tokenizer.json", "vocab.json", "merges.txt", "meta.pkl"
ADDED, SETTINGS = "added_tokens.json", ("special_tokens_map.json", "tokenizer_config.json")
UNREAD = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "bpe_merges.txt")
GENERATION = "generation_config.json"
MAX_BYTES, MAX_META_BYTES = 64 << 20, 16 << 20  # of a tokenizer's files, and of one of characters
MAX_WORK = 20_000_000  # of squares of tokens' lengths: two seconds of splitting; GPT-2's take 3 million
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # of a BPE with byte_fallback
OTHER_RULES = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
FLAGS = ("lstrip", "rstrip", "single_word")
# Of transformers' classes one has GPT-2's rules, two those of tokenizer.json; what others compute is theirs.
OWN, GENERIC = "GPT2Tokenizer", ("PreTrainedTokenizer", "TokenizersBackend")
OTHER_SETTINGS = ("split_special_tokens", "auto_map", "fast_tokenizer_files")
PUTS_AROUND = re.compile(r'"SpecialToken"|(Roberta|Bert)Processing')  # post-processors that add tokens
REWRITE = f"transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes {TREE}"
SAY_SO = f"set tokenizer_class to {GENERIC[0]}Fast in {SETTINGS[1]}"


def _json(files: Files, name: str) -> Any:
    """What a file says, {} where it is not there."""
    return read_json(files[name], most=MAX_BYTES) if name in files else {}


def _bytes(path: Place) -> bytes:
    return read_all(source_of(path), MAX_BYTES)


def _merges(path: Place) -> list[list[str]]:
    """The pairs of a merges.txt."""
    lines = _bytes(path).decode().split("\n")
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


def _ids(vocab: Any) -> dict[str, int]:
    """The ids of a vocabulary, which Unigram writes as a list of tokens and scores."""
    return vocab if isinstance(vocab, dict) else {token: id for id, (token, _) in enumerate(vocab)}


def _named(settings: Said) -> dict[str, Said]:
    """The rows of the special tokens that settings name: {"eos_token": {"content": "<|endoftext|>"}, …}."""
    found = {key: token for key, token in settings.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or ()
        found |= more if isinstance(more, dict) else {str(token): token for token in more}
    rows = {key: {"content": token} if isinstance(token, str) else token for key, token in found.items()}
    return {key: row | {"special": True} for key, row in rows.items() if isinstance(row, dict)}


def _tree(files: Files, settings: Said) -> Said:
    """What tokenizer.json says; where there is none, the same of vocab.json and merges.txt."""
    tree, vocab = _json(files, TREE), _json(files, VOCAB)
    if tree:
        known = {row["content"]: row["id"] for row in tree["added_tokens"]} | _ids(tree["model"]["vocab"])
        if stale := next((token for token, id in vocab.items() if known.get(token) != id), None):
            ids = f"{vocab[stale]} here, {known.get(stale)} in {TREE}"
            raise CheckpointError(files[VOCAB], f"{stale!r} is {ids}; remove the stale file")
        return tree
    if not vocab or MERGES not in files or not all(type(id) is int for id in vocab.values()):
        found = f"cannot be read as a tokenizer from {', '.join(files)}"
        wanted = f"expected {VOCAB} (token to id) with {MERGES}, or {TREE}; {REWRITE}"
        raise CheckpointError(next(iter(files.values())), f"{found}; {wanted}")
    before = BYTE_LEVEL | {"add_prefix_space": bool(settings.get("add_prefix_space"))}
    model = {"type": "BPE", "vocab": vocab, "merges": _merges(files[MERGES])}
    return {"added_tokens": [], "pre_tokenizer": before, "decoder": BYTE_LEVEL, "model": model}


def _class_of(files: Files, settings: Said) -> str | None:
    """The class that transformers reads the files with, without "Fast"; None where nothing says it."""
    beside = next(iter(files.values())).with_name("config.json")
    is_folders = beside.exists() and all(path.name == name for name, path in files.items())
    config = read_json(beside) if is_folders else {}
    by_model = OWN if config.get("model_type") == "gpt2" else None
    said = settings.get("tokenizer_class") or config.get("tokenizer_class") or by_model
    return said and str(said).removesuffix("Fast")


def _has_gpt2_rules(tree: Said) -> bool:
    """Whether its rules are GPT-2's, but perhaps for a space before the text and added tokens."""
    before = {"use_regex": True, **(tree["pre_tokenizer"] or {})}
    return (
        before | {"trim_offsets": True, "add_prefix_space": False} == BYTE_LEVEL
        and (tree["decoder"] or {}).get("type") == "ByteLevel"
        and tree["model"].get("type", "BPE") == "BPE"
        and not any([tree.get("normalizer"), *map(tree["model"].get, OTHER_RULES)])
    )


def _prefixes(tree: Said) -> set[bool]:
    """What a tokenizer's rules say of a space before the text."""
    before = tree["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    return {part["add_prefix_space"] for part in parts if "add_prefix_space" in part}


def _other_rules(kind: str | None, tree: Said, settings: Said, *, has_tree: bool) -> str | None:
    """What transformers would compute otherwise than the rules in `tree`, and what to do."""
    if kind in GENERIC and not has_tree:
        return f"tokenizer_class={kind} needs {TREE}, which is not there; copy it here"
    if asked := next((key for key in OTHER_SETTINGS if settings.get(key)), None):
        return f"{SETTINGS[1]} says {asked}={settings[asked]!r}, which is not supported; remove it"
    if kind not in (None, OWN, *GENERIC):
        return f"tokenizer_class={kind} may have other rules than GPT-2's. {REWRITE}; then {SAY_SO}"
    if kind == OWN and not _has_gpt2_rules(tree):
        return f"its rules are not GPT-2's, which tokenizer_class={OWN} has; if they are right, {SAY_SO}"
    said = settings.get("add_prefix_space", False if kind == OWN else None)
    if said is not None and _prefixes(tree) - {said}:
        return f"{SETTINGS[1]} says add_prefix_space={said}, {TREE} says {not said}"
    return None


def _settings(files: Files) -> tuple[Said, dict[str, Said]]:
    """The settings of both files as one, and the special tokens that they name."""
    told = [_json(files, file) for file in SETTINGS]
    first, second = map(_named, told)
    for key in first.keys() & second.keys():
        if first[key]["content"] != second[key]["content"]:
            both = f"{first[key]['content']!r} here, {second[key]['content']!r} in {SETTINGS[1]}"
            raise CheckpointError(files[SETTINGS[0]], f"{key} is {both}; correct the wrong one")
    return told[0] | told[1], second | first


def _added(name: str, tree: Said, apart: Iterable[Said], named: Collection[Said]) -> dict[str, Said]:
    """The rows of all tokens that are looked up before the merges: in the tree, apart from it, and named."""
    vocab, special = _ids(tree["model"]["vocab"]), {row["content"] for row in named}
    in_vocab = [row | {"id": vocab[row["content"]]} for row in named if row["content"] in vocab]
    rows: dict[str, Said] = {}
    for row in (*tree["added_tokens"], *apart, *in_vocab):
        token, is_special = row["content"], row["content"] in special
        defaults = dict.fromkeys(FLAGS, False) | {"special": is_special, "normalized": not is_special}
        ids = {rows.setdefault(token, defaults | row)["id"], row["id"], vocab.get(token, row["id"])}
        if len(ids) > 1:
            raise CheckpointError(name, f"{token!r} has the ids {sorted(ids)}; correct the wrong one")
    new = sorted(row["id"] for token, row in rows.items() if token not in vocab)
    if new != [*range(len(vocab), len(vocab) + len(new))]:
        wanted = f"transformers numbers them from {len(vocab)} on; correct the ids"
        raise CheckpointError(name, f"its added tokens have the ids {new[:5]} …, but {wanted}")
    if lacking := sorted(special - rows.keys()):
        what = f"lacks {', '.join(map(repr, lacking))}, named in {' or '.join(SETTINGS)}"
        raise CheckpointError(name, f"{what}; remove the name, or {REWRITE}")
    return rows


def _through_tokenizers(name: str, tree: Said, end: str) -> Tokenizer:
    """Any tokenizer.json, computed by the package tokenizers."""
    try:
        import tokenizers
    except ImportError:
        raise CheckpointError(name, "to read it, pip install 'gpt2lite[tokenizers]'") from None
    peer = tokenizers.Tokenizer.from_str(json.dumps(tree))
    peer.no_truncation()
    peer.no_padding()
    is_byte_level = "ByteLevel" in json.dumps(tree["decoder"])

    def ids_of(text: str, allowed: Allowed) -> list[int]:
        peer.encode_special_tokens = not allowed
        ids = list(peer.encode(text, add_special_tokens=False).ids)
        back = peer.decode(ids, skip_special_tokens=False)
        is_exact = is_byte_level and not tree.get("normalizer")  # but for spaces
        if is_exact and "".join(back.split()) != "".join(text.split()):
            raise UsageError(f"{name}: lacks tokens for some of this text; what remains is {back[:99]!r}")
        return ids

    def bytes_of(id: int) -> bytes:
        token = peer.id_to_token(id)
        if token is None:
            raise KeyError(id)
        if is_byte_level:
            return unspelled(token)
        if BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        pair, one = (peer.decode([id] * n, skip_special_tokens=False) for n in (2, 1))
        return str(pair)[len(one) :].encode()  # inside a text, so with the space before it

    n_vocab = max(peer.get_vocab().values()) + 1
    return Tokenizer(name, n_vocab, peer.token_to_id(end), ids_of, bytes_of, cuts_at_spaces=False)


def _from_hub(files: Files) -> Tokenizer:
    name = str(files.get(TREE) or next(iter(files.values())))
    settings, named = _settings(files)
    tree, kind = _tree(files, settings), _class_of(files, settings)
    vocab = _ids(tree["model"]["vocab"])
    if wrong := _other_rules(kind, tree, settings, has_tree=TREE in files):
        raise CheckpointError(name, wrong)
    around = map(settings.get, ("add_bos_token", "add_eos_token"))
    if any(around) or PUTS_AROUND.search(json.dumps(tree.get("post_processor"))):
        warnings.warn(f"{name}: adds special tokens around a text; gpt2lite does not", stacklevel=2)
    end = named.get("eos_token", {"content": END_OF_TEXT})
    by_class = [end] if kind not in GENERIC and END_OF_TEXT in vocab else []
    apart = [{"content": token, "id": id} for token, id in _json(files, ADDED).items()]
    apart += [row | {"id": int(id)} for id, row in settings.get("added_tokens_decoder", {}).items()]
    rows = _added(name, tree, apart, [*named.values(), *by_class])
    tree["added_tokens"] = sorted(rows.values(), key=lambda row: row["id"])
    is_plain = all(row["special"] and not any(map(row.get, FLAGS)) for row in rows.values())
    if is_plain and _has_gpt2_rules(tree) and True not in _prefixes(tree):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in tree["model"]["merges"]]
        ids = {token: row["id"] for token, row in rows.items()}
        if bpe := as_encoding(name, vocab, pairs, ids):
            return as_tokenizer(bpe, end["content"])
    return _through_tokenizers(name, tree, end["content"])


# ---- every kind --------------------------------------------------------------------------------------------


def _from_characters(files: Files) -> Tokenizer:
    """nanoGPT's meta.pkl: one id per character, and no token that ends a text."""
    path = files[META]
    raw = read_all(source_of(path), MAX_META_BYTES)
    found: Any = describe(path, DescribingUnpickler(io.BytesIO(raw), len(raw)))
    itos, ids = found["itos"], found["stoi"]
    # types first: what a pickle nests can take forever to compare or to hash
    if not all(type(id) is int and type(c) is str and len(c) == 1 for id, c in itos.items()):
        raise CheckpointError(path, "expected nanoGPT's table of ids, each with one character")
    if {character: id for id, character in itos.items()} != ids:
        raise CheckpointError(path, "its stoi and its itos disagree")
    n_vocab = max(itos) + 1
    if (said := found.get("vocab_size", n_vocab)) != n_vocab:
        raise CheckpointError(path, f"its vocab_size is {shown(said)}, its table has {n_vocab} ids")

    def ids_of(text: str, allowed: Allowed) -> list[int]:
        if unknown := next((character for character in text if character not in ids), None):
            raise UsageError(f"{path}: has no token for {unknown!r}; leave it out of the text")
        return [ids[character] for character in text]

    return Tokenizer(str(path), n_vocab, None, ids_of, lambda id: itos[id].encode())


# Each kind of tokenizer: the files that only it has, and what reads them.
KINDS: tuple[tuple[frozenset[str], Callable[[Files], Tokenizer]], ...] = (
    (frozenset({RANKS}), lambda files: as_tokenizer(read_encoding(files[RANKS]))),
    (frozenset({TREE, VOCAB, MERGES, ADDED, *SETTINGS, *UNREAD}), _from_hub),
    (frozenset({META}), _from_characters),
)
NAMES = sorted(frozenset().union(*(names for names, _ in KINDS)))


def _own_files(checkpoint: Place) -> dict[str, Place]:
    """The tokenizer's files by their own names: called after the checkpoint, or in its folder."""
    folder = folder_of(checkpoint)
    levels = (
        {name: side_file(checkpoint, f".{name}") for name in NAMES},
        {name: folder / name for name in NAMES if name != RANKS},
        {VOCAB: folder / "encoder.json", MERGES: folder / "vocab.bpe"},  # as OpenAI calls them
    )
    for level in levels:
        if found := {name: path for name, path in level.items() if lies(path)}:
            return found
    return {}


def files_beside(checkpoint: Place) -> dict[str, Place]:
    """The same, else those of the base of an adapter."""
    if found := _own_files(checkpoint):
        return found
    adapter = find_adapter(checkpoint, _fetch)
    return files_beside(adapter.base) if adapter and adapter.base != folder_of(checkpoint) else {}


def _fetch(name: str, revision: str | None) -> Place:
    from gpt2lite.hub import fetch

    return fetch(name, revision=revision)


def _read(files: Files) -> Tokenizer:
    """Raises CheckpointError for files that are damaged, disagree or are of no kind known here."""
    first = next(iter(files.values()))
    (names, read), *others = [(names & files.keys(), read) for names, read in KINDS if names & files.keys()]
    if others:
        both = ", and ".join(" and ".join(sorted(kind)) for kind in (names, others[0][0]))
        raise CheckpointError(first.parent, f"holds two tokenizers, {both}; remove the wrong one")
    try:
        return read(files)
    except GPT2LiteError:
        raise
    except BaseException as error:  # of files that are no tokenizers; Rust's panics are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(first, f"not a valid tokenizer ({type(error).__name__}: {error})") from None


def tokenizer_for(checkpoint: Place, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies beside a checkpoint; where none does and the vocabulary is GPT-2's, GPT-2's.

    Reads `<stem>.tiktoken`, `tokenizer.json`, `vocab.json` with `merges.txt`, and nanoGPT's `meta.pkl`. A
    file that is called after the checkpoint (`model.tokenizer.json`) counts before one in its folder, which
    belongs to every checkpoint there. What does not follow GPT-2's rules needs the package tokenizers. Rows
    of the model past the tokenizer's ids are padding: never sampled, and U+FFFD where they are decoded.

    Raises CheckpointError for files that are damaged, disagree or cannot be read here, and for more tokens
    than the model has rows; UsageError where there is no tokenizer and the vocabulary is not GPT-2's.
    """
    files = files_beside(checkpoint)
    if not files and vocab_size not in GPT2_SIZES:
        said = f"no tokenizer beside it, and a vocabulary of {vocab_size} is not GPT-2's {GPT2_SIZES[0]}"
        names = f"{side_file(checkpoint, f'.{RANKS}').name}, {TREE}, {VOCAB} with {MERGES}, or {META}"
        do = f"Put {names} there, or call gpt2lite.generate with token ids"
        raise UsageError(f"{checkpoint}: {said}. {do}")
    found = _read(files) if files else as_tokenizer(gpt2_encoding())
    # nanoGPT's models have a row per character, or are padded as its comments advise
    is_other = META in files and vocab_size not in (found.n_vocab, -(-found.n_vocab // 64) * 64)
    if found.n_vocab > vocab_size or is_other:
        where = next(iter(files.values()), checkpoint)
        raise CheckpointError(where, f"{found.n_vocab} tokens for a model with a vocabulary of {vocab_size}")
    return found


def _states(files: Files) -> dict[str, FileState]:
    """Of local files; what reads those that lie elsewhere sees for itself that they are what they were."""
    return {str(path): source_of(path).state() for path in files.values() if isinstance(path, Path)}


@dataclass(frozen=True)
class Beside:
    """The tokenizer beside a checkpoint, as it lay there when that was opened; read when it is asked for."""

    checkpoint: Place
    vocab_size: int
    states: Mapping[str, FileState]

    @classmethod
    def of(cls, checkpoint: Place, vocab_size: int, base: Place | None) -> Beside:
        """What lies beside a checkpoint now, or beside the base of an adapter without files of its own.

        Some thirty looks into its folder; nothing is read.
        """
        checkpoint = (base if base and not _own_files(checkpoint) else checkpoint).absolute()
        return cls(checkpoint, vocab_size, _states(files_beside(checkpoint)))

    def _require_unchanged(self) -> None:
        if _states(files_beside(self.checkpoint)) != self.states:
            said = "its tokenizer's files changed since the model was opened; open it again"
            raise CheckpointError(self.checkpoint, said)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises as `tokenizer_for`, and CheckpointError where its files have changed."""
        self._require_unchanged()
        return tokenizer_for(self.checkpoint, self.vocab_size)

    def save(self, checkpoint: Path) -> None:
        """Write its files beside another checkpoint, where those that lie there are not the same."""
        self._require_unchanged()
        files, there = tokenizer_files(self.checkpoint), tokenizer_files(checkpoint)
        if there != files:
            write_beside(checkpoint, files)


# ---- writing -----------------------------------------------------------------------------------------------


def _as_json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode()


def _byte_pairs(bpe: tiktoken.Encoding) -> tuple[dict[str, int], list[str]]:
    """The tokens that are not special, spelled as in vocab.json, and the lines of a merges.txt."""
    special = {bpe.encode_single_token(text) for text in bpe.special_tokens_set}
    ids = (id for id in range(bpe.n_vocab) if id not in special)
    vocab = {"".join(CHARACTERS[byte] for byte in bpe.decode_single_token_bytes(id)): id for id in ids}
    return vocab, [" ".join(_split(token, vocab, rank)) for token, rank in vocab.items() if len(token) > 1]


def _hub_lists(bpe: tiktoken.Encoding) -> dict[str, bytes]:
    """vocab.json, merges.txt and settings, as GPT2Tokenizer.save_pretrained writes them."""
    vocab, merges = _byte_pairs(bpe)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    rules = {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    return {
        VOCAB: _as_json(vocab | {END_OF_TEXT: bpe.eot_token}),
        MERGES: "\n".join(["#version: 0.2", *merges, ""]).encode(),
        SETTINGS[0]: _as_json(names),
        SETTINGS[1]: _as_json({"tokenizer_class": "GPT2Tokenizer", **names, **rules}),
    }


def tokenizer_files(checkpoint: Place, *, in_folder: bool = False) -> dict[str, bytes]:
    """The files of the tokenizer beside a checkpoint, {} where there is none: a few MB.

    In a folder, a .tiktoken file becomes vocab.json and merges.txt, which give the same ids for every text.
    """
    files = files_beside(checkpoint)
    if RANKS in files and in_folder:
        return _hub_lists(read_encoding(files[RANKS]))
    return {name: _bytes(path) for name, path in files.items()}


def write_beside(checkpoint: Path, files: Mapping[str, bytes]) -> None:
    """Write a tokenizer's files, called after a checkpoint; nothing stays of an older tokenizer there.

    Warns where there is nothing to write, and what lies there would be taken for this model's.
    """
    if not files and (there := files_beside(checkpoint)):
        taken = (
            f"this model came without a tokenizer, so {', '.join(map(str, there.values()))} will be its own"
        )
        warnings.warn(f"{checkpoint}: {taken}; remove what belongs to another model", stacklevel=4)
    for name in set(NAMES) - files.keys() if files else ():
        Path(side_file(checkpoint, f".{name}")).unlink(missing_ok=True)
    for name in files.keys() & set(NAMES):
        with replacing(Path(side_file(checkpoint, f".{name}"))) as temporary:
            temporary.write_bytes(files[name])


def gguf_fields(checkpoint: Place, vocab_size: int) -> dict[str, Any]:
    """The tokenizer as llama.cpp keeps it in a model's own file; rows past its ids are marked as unused.

    Raises as `tokenizer_for`, and UsageError for one without an end of text or of another kind than GPT-2's.
    """
    tokenizer = tokenizer_for(checkpoint, vocab_size)
    if (bpe := tokenizer.bpe) is None:
        raise UsageError(f"{tokenizer.name}: no GPT-2's byte pairs, which .gguf files are written with here")
    vocab, merges = _byte_pairs(bpe)
    special = {token: bpe.encode_single_token(token) for token in bpe.special_tokens_set}
    tokens = {id: token for token, id in (vocab | special).items()}
    kinds = dict.fromkeys(vocab.values(), 1) | dict.fromkeys(special.values(), 3)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [tokens.get(id, f"[PAD{id}]") for id in range(vocab_size)],
        "token_type": [kinds.get(id, 5) for id in range(vocab_size)],  # normal, control, unused
        "merges": merges,
        "add_bos_token": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text(tokenizer)),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def hub_files(checkpoint: Place, vocab_size: int) -> dict[str, bytes]:
    """What transformers needs beside weights and config.json to make text: tokenizer, generation_config.json.

    {} where the checkpoint has no tokenizer, with a warning where it should have one. As `tokenizer_files`;
    for GPT-2's vocabulary without any file, GPT-2's own.
    """
    if not files_beside(checkpoint) and vocab_size not in GPT2_SIZES:
        return {}
    try:
        end = tokenizer_for(checkpoint, vocab_size).eot_token
        files = tokenizer_files(checkpoint, in_folder=True) or _hub_lists(gpt2_encoding())
    except CheckpointError as error:
        warnings.warn(f"no tokenizer is written: {error}", stacklevel=2)
        return {}
    if TREE in files:  # else transformers takes the rules of config.json's model for its
        said = {"tokenizer_class": f"{GENERIC[0]}Fast"} | json_object(
            SETTINGS[1], files.get(SETTINGS[1], b"{}")
        )
        files |= {SETTINGS[1]: _as_json(said)}
    if META in files:
        warnings.warn(f"{META} is copied; gpt2lite reads it, transformers does not", stacklevel=2)
    said = folder_of(checkpoint) / GENERATION
    ids = {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}
    return files | {GENERATION: _bytes(said) if said.exists() else _as_json(ids)}

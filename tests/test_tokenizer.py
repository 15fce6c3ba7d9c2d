"""Tokenizers beside checkpoints: read as transformers reads them or refused, and carried along."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import randomise
from test_cli import has_gpt2_encoding
from tokenizers import Tokenizer as Peer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from gpt2lite import CheckpointError, GPTConfig, GPTModel, UsageError, convert
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.tokenizer import GPT2_SIZES, Tokenizer, as_encoding, tokenizer_for, write_beside

pytestmark = pytest.mark.filterwarnings("ignore:nanogpt computes gelu, this model")

TRAINED_ON = "мама мыла раму, и папа читал газету вечером. The cat sat on the mat; it's 12 345!\n\n  eeee"
AWKWARD = (
    TRAINED_ON,
    "",
    "   ",
    "  a  b\n\n\tc   \r\n x ",
    "naïve café ☕ 🤷🏽\u200d♂️ 日本語 ½²٣ ǅİ",
    "we'll they'VE I'm 'tis 3.14 x==y",
    "\u00a0x\u3000y\u2028z\x85\x1c\x00",
    "a<|endoftext|>b <|user|>c<|user|><|user|>",
)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SPECIAL = ["<|endoftext|>", "<|user|>"]


def byte_level(
    size: int = 400,
    alphabet: list[str] = ALPHABET,
    special: list[str] = SPECIAL,
    add_prefix_space: bool = False,
) -> Peer:
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    peer.decoder = decoders.ByteLevel()
    peer.train_from_iterator(
        [TRAINED_ON] * 5,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return peer


def word_pieces() -> Peer:
    peer = Peer(models.WordPiece(unk_token="[UNK]"))
    peer.normalizer, peer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    peer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    peer.train_from_iterator([TRAINED_ON] * 5, trainer)
    return peer


def unigram() -> Peer:
    peer = Peer(models.Unigram())
    peer.pre_tokenizer, peer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    peer.train_from_iterator([TRAINED_ON] * 5, trainer)
    return peer


def fast(peer: Peer, end: str | None = "<|endoftext|>") -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=peer, eos_token=end)


def assert_reads_as(ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase) -> None:
    for text in AWKWARD:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allowed_special="all") == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text


def as_tree(peer: Peer, folder: Path) -> None:
    fast(peer).save_pretrained(folder)


def as_lists(peer: Peer, folder: Path) -> None:
    peer.model.save(str(folder))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|user|>"]}))


def as_old_tree(peer: Peer, folder: Path) -> None:
    """As tokenizers wrote it before 0.20: a merge is one string."""
    tree = json.loads(peer.to_str())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def as_openai(peer: Peer, folder: Path) -> None:
    as_lists(peer, folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder named as checkpoints are given: its files are the checkpoint's."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


# ---- read as transformers reads them -----------------------------------------------------------------------


@pytest.mark.parametrize("write", [as_tree, as_old_tree, as_lists])
def test_every_form_gives_transformers_ids_for_awkward_text(
    write: Callable[[Peer, Path], None], folder: Path
):
    peer = byte_level()
    write(peer, folder)
    found = tokenizer_for(folder, 500)
    assert_reads_as(found, fast(peer))
    assert (found.eot_token, found.cuts_at_spaces) == (0, True)  # GPT-2's rules: no other package is needed
    assert found.n_vocab == peer.get_vocab_size()


def test_openais_names_of_the_two_lists_are_read(folder: Path):
    peer = byte_level(special=["<|endoftext|>"])
    as_openai(peer, folder)
    assert_reads_as(tokenizer_for(folder / "model.ckpt", 500), fast(peer))


@has_gpt2_encoding
def test_gpt2s_own_vocabulary_in_a_folder_is_tiktokens_gpt2(folder: Path, tmp_path: Path):
    GPTModel(GPTConfig(50257, 8, 8, 2, 1, tied_head=True)).save_checkpoint(tmp_path / "gpt2.pth")
    made = convert(tmp_path / "gpt2.pth", tmp_path / "hub", to="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    theirs.save_pretrained(folder)
    own = tokenizer_for(tmp_path / "gpt2.pth", 50257)
    for found in (tokenizer_for(made, 50257), tokenizer_for(folder, 50257)):
        assert_reads_as(found, theirs)
        assert [found.encode_ordinary(text) for text in AWKWARD] == [*map(own.encode_ordinary, AWKWARD)]
    assert (len(theirs), theirs.eos_token_id, theirs("Hello world").input_ids) == (50257, 50256, [15496, 995])


@pytest.mark.parametrize(
    "peer",
    [word_pieces(), unigram(), byte_level(add_prefix_space=True)],
    ids=["word pieces", "unigram", "prefix"],
)
def test_other_rules_are_computed_by_the_package_tokenizers(peer: Peer, folder: Path):
    as_theirs = fast(peer, None)
    as_theirs.save_pretrained(folder)
    found = tokenizer_for(folder, 500)
    for text in AWKWARD:
        ids = found.encode(text, allowed_special="all")
        assert ids == as_theirs(text)["input_ids"]
        assert found.decode(ids).strip() == as_theirs.decode(ids, clean_up_tokenization_spaces=False).strip()


def test_without_that_package_other_rules_are_refused_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    fast(word_pieces(), None).save_pretrained(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'gpt2lite\[tokenizers\]'"):
        tokenizer_for(folder, 500)


def test_ids_in_another_order_than_the_merges_give_transformers_ids(folder: Path):
    tree = json.loads(byte_level().to_str())
    vocab, size = tree["model"]["vocab"], len(tree["model"]["vocab"])
    tree["model"]["vocab"] = {token: id if id < 2 else size + 1 - id for token, id in vocab.items()}
    peer = Peer.from_str(json.dumps(tree))
    as_tree(peer, folder)
    assert_reads_as(tokenizer_for(folder, 500), fast(peer))


@pytest.mark.parametrize(
    "merges",
    [
        [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],  # one token in two ways
        [("b", "c"), ("a", "b"), ("ab", "c")],  # never made, since b and c merge first
    ],
)
def test_merges_that_ranks_cannot_say_are_not_given_to_tiktoken(merges: list[tuple[str, str]]):
    tokens = [*sorted(ALPHABET), *dict.fromkeys(a + b for a, b in merges)]
    assert as_encoding("x", {token: id for id, token in enumerate(tokens)}, merges, {}) is None


def test_added_words_that_begin_alike_are_told_apart(folder: Path):
    peer = byte_level()
    peer.add_tokens(["x1", "x12"])
    as_tree(peer, folder)
    theirs, ours = fast(peer), tokenizer_for(folder, 500)
    for text in ("x1 x12 x123 <|user|>", "ax1x12"):
        assert ours.encode(text, allowed_special="all") == theirs(text)["input_ids"]
    assert peer.token_to_id("x12") in ours.encode_ordinary("x12")


def test_special_tokens_are_plain_text_unless_they_are_allowed(folder: Path):
    as_tree(byte_level(), folder)
    found = tokenizer_for(folder, 500)
    assert found.encode("<|user|>", allowed_special="all") == [1]
    assert 1 not in found.encode_ordinary("<|user|>")
    assert found.encode("<|endoftext|><|user|>", allowed_special={"<|endoftext|>"})[0] == 0
    assert 1 not in found.encode("<|endoftext|><|user|>", allowed_special={"<|endoftext|>"})


def test_the_end_of_text_is_the_one_that_the_settings_name(folder: Path):
    fast(byte_level(special=["<s>", "</s>"]), "</s>").save_pretrained(folder)
    assert tokenizer_for(folder, 500).eot_token == 1


def test_a_text_with_bytes_that_have_no_token_is_refused_and_not_shortened(folder: Path):
    as_tree(byte_level(alphabet=[]), folder)
    found = tokenizer_for(folder, 500)
    assert found.decode(found.encode_ordinary("мама мыла")) == "мама мыла"
    with pytest.raises(UsageError, match="lacks tokens for some of this text"):
        found.encode_ordinary("мама Z")


def test_what_is_called_after_the_checkpoint_is_nearer_than_what_lies_in_its_folder(tmp_path: Path):
    own, shared = byte_level(size=300), byte_level(size=350)
    as_tree(shared, tmp_path)
    (tmp_path / "own.tokenizer.json").write_text(own.to_str())
    assert tokenizer_for(tmp_path / "own.pth", 500).n_vocab == own.get_vocab_size()
    assert tokenizer_for(tmp_path / "other.pth", 500).n_vocab == shared.get_vocab_size()


def test_an_adapter_without_a_tokenizer_has_its_bases(folder: Path, tmp_path: Path):
    peer, adapter = byte_level(), tmp_path / "adapter"
    as_tree(peer, folder)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "../model"}'
    )
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert_reads_as(tokenizer_for(adapter, 50257), fast(peer))
    as_tree(byte_level(size=300), adapter)
    assert tokenizer_for(adapter, 50257).n_vocab < peer.get_vocab_size()


def test_special_tokens_put_around_a_text_are_a_warning(folder: Path):
    as_tree(byte_level(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    with pytest.warns(UserWarning, match="adds special tokens around a text"):
        tokenizer_for(folder, 500)


# ---- the settings beside the lists ------------------------------------------------------------------------


def said(content: str, **flags: bool) -> dict[str, Any]:
    """A token as tokenizer_config.json says it."""
    return {
        "content": content,
        **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False),
    } | flags


def with_rules(**rules: Any) -> Peer:
    peer = byte_level()
    for name, rule in rules.items():
        setattr(peer, name, rule)
    return peer


NEW = byte_level().get_vocab_size()  # the first id that is free
PREFIXED = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
MAP = "special_tokens_map.json"
GENERIC, OWN = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "GPT2Tokenizer"}
ROWS = {
    str(NEW): said("<pad>", special=True),
    str(NEW + 1): said("<mask>", special=True, lstrip=True),
    str(NEW + 2): said("neu", normalized=True),
}
# What writes the tokenizer, its settings, and a file beside them → "" where it is read, or why it is refused.
BESIDE: dict[str, tuple[Peer | None, dict[str, Any], dict[str, Any], str]] = {
    "no class": (None, {}, {}, ""),
    "added": (None, OWN, {"added_tokens.json": {"<pad>": NEW, "neu": NEW + 1}}, ""),
    "rows": (None, OWN | {"added_tokens_decoder": ROWS}, {}, ""),
    "rows of a named token": (None, OWN | {"pad_token": "<pad>", "added_tokens_decoder": ROWS}, {}, ""),
    "flags of a named token": (None, OWN, {MAP: {"mask_token": said("<|user|>", lstrip=True)}}, ""),
    "prefix": (None, OWN | {"add_prefix_space": True}, {}, ""),
    "added to a tree": (byte_level(), GENERIC, {"added_tokens.json": {"<pad>": NEW}}, ""),
    "rows to a tree": (byte_level(), GENERIC | {"added_tokens_decoder": ROWS}, {}, ""),
    "digits": (with_rules(pre_tokenizer=DIGITS), GENERIC, {}, ""),
    "a space in a sequence": (with_rules(pre_tokenizer=PREFIXED), GENERIC, {}, ""),
    "lower case": (with_rules(normalizer=normalizers.Lowercase()), GENERIC, {}, ""),
    "GPT-2's tree": (byte_level(), {}, {}, ""),
    "a pad that is not there": (None, OWN | {"pad_token": "<pad>"}, {}, r"lacks '<pad>', named in"),
    "such a mask": (byte_level(), GENERIC, {MAP: {"mask_token": "<m>"}}, "lacks '<m>'"),
    "others": (None, OWN | {"additional_special_tokens": ["<a>"]}, {}, "lacks '<a>'"),
    "an image": (byte_level(), GENERIC | {"extra_special_tokens": {"image_token": "<i>"}}, {}, "lacks '<i>'"),
    "ids with a gap": (None, OWN, {"added_tokens.json": {"<pad>": NEW + 3}}, f"have the ids .*from {NEW} on"),
    "another id": (None, OWN, {"added_tokens.json": {"<|user|>": 7}}, r"'<\|user\|>' has the ids \[1, 7\]"),
    "two ends": (None, OWN | {"eos_token": "a"}, {MAP: {"eos_token": "b"}}, "eos_token is 'b'"),
    "CLIP": (None, {"tokenizer_class": "CLIPTokenizer"}, {}, "CLIPTokenizer may have other rules"),
    "Roberta": (None, {"tokenizer_class": "RobertaTokenizer"}, {}, "tokenizer_class=RobertaTokenizer may"),
    "Whisper's tree": (byte_level(), {"tokenizer_class": "WhisperTokenizer"}, {}, "WhisperTokenizer may"),
    "Bart by config.json": (None, {}, {"config.json": {"tokenizer_class": "BartTokenizer"}}, "=BartTo"),
    "no tree": (None, GENERIC, {}, "needs tokenizer.json, which is not there"),
    "digits by GPT-2's class": (with_rules(pre_tokenizer=DIGITS), OWN, {}, "rules are not GPT-2's"),
    "digits of no class": (with_rules(pre_tokenizer=DIGITS), {}, {}, "rules are not GPT-2's"),
    "NFKC by GPT-2's class": (with_rules(normalizer=normalizers.NFKC()), OWN, {}, "rules are not GPT-2's"),
    "a space by GPT-2's class": (byte_level(add_prefix_space=True), OWN, {}, "add_prefix_space=False"),
    "no space in a sequence": (
        with_rules(pre_tokenizer=PREFIXED), GENERIC | {"add_prefix_space": False}, {}, "prefix_space=False",
    ),
    "no special tokens": (byte_level(), GENERIC | {"split_special_tokens": True}, {}, "split_special"),
    "its own code": (byte_level(), GENERIC | {"auto_map": {"AutoTokenizer": ["x.Y"]}}, {}, "auto_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_settings_beside_a_tokenizer_are_followed_as_transformers_does_or_refused(case: str, folder: Path):
    peer, settings, beside, message = BESIDE[case]
    if peer:
        (folder / "tokenizer.json").write_text(peer.to_str())
    else:
        byte_level().model.save(str(folder))
    for name, content in ({"config.json": {}, "tokenizer_config.json": settings} | beside).items():
        content |= {"model_type": "gpt2"} if name == "config.json" else {}
        (folder / name).write_text(json.dumps(content))
    if message:
        with pytest.raises(CheckpointError, match=message):
            tokenizer_for(folder, 500)
        return
    found, theirs = tokenizer_for(folder, 500), transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*AWKWARD, "x <pad> y <mask>z neu, Neu a <|user|> b"):
        ids = theirs(text)["input_ids"]
        assert found.encode(text, allowed_special="all") == ids, text
        assert found.decode(ids) == theirs.decode(ids), text


def test_what_a_refused_class_is_told_to_do_gives_its_ids(folder: Path):
    byte_level().model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder)
    changed(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert_reads_as(tokenizer_for(folder, 500), theirs)


@pytest.mark.parametrize("with_settings", [True, False])
def test_transformers_follows_a_converted_tokenizers_own_rules(with_settings: bool, tmp_path: Path):
    peer = with_rules(pre_tokenizer=DIGITS)
    (tmp_path / "model.tokenizer.json").write_text(peer.to_str())
    if with_settings:
        (tmp_path / "model.tokenizer_config.json").write_text('{"eos_token": "<|user|>"}')
    source = GPTModel(GPTConfig(500, 8, 8, 2, 1, tied_head=True)).save_checkpoint(tmp_path / "model.pth")
    made = convert(source, tmp_path / "hub", to="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    assert_reads_as(tokenizer_for(source, 500), theirs)
    assert_reads_as(tokenizer_for(made, 500), theirs)


AROUND = {
    "template": processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
    "roberta": processors.RobertaProcessing(("<|user|>", 1), ("<|endoftext|>", 0)),
    "bert": processors.BertProcessing(("<|user|>", 1), ("<|endoftext|>", 0)),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", AROUND)
def test_a_post_processor_that_adds_tokens_is_a_warning(kind: str, inside: bool, folder: Path):
    around = AROUND[kind]
    peer = with_rules(post_processor=processors.Sequence([around]) if inside else around)
    (folder / "tokenizer.json").write_text(peer.to_str())
    with pytest.warns(UserWarning, match="adds special tokens around a text"):
        tokenizer_for(folder, 500)


# ---- nanoGPT's characters ----------------------------------------------------------------------------------


def write_meta(path: Path, characters: str) -> None:
    """As nanoGPT's data/shakespeare_char/prepare.py."""
    itos = dict(enumerate(characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: id for id, c in itos.items()}}
    path.write_bytes(pickle.dumps(meta))


def test_nanogpts_characters_are_read(folder: Path):
    write_meta(folder / "meta.pkl", "\n abcé")
    found = tokenizer_for(folder / "ckpt.pt", 6)
    assert found.encode_ordinary("abé\n") == [2, 3, 5, 0]
    assert (found.decode([2, 5, 0]), found.eot_token, found.n_vocab) == ("aé\n", None, 6)
    with pytest.raises(UsageError, match="has no token for 'X'"):
        found.encode_ordinary("abX")


def test_a_model_of_characters_writes_and_needs_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = randomise(GPTModel(GPTConfig(6, 16, 8, 2, 1, tied_head=True)))
    model.save_checkpoint(tmp_path / "ckpt.pth")
    write_meta(tmp_path / "meta.pkl", "\n abcé")
    words = ["generate", "--model", str(tmp_path / "ckpt.pth"), "--max-new-tokens", "5", "--prompt"]
    assert main([*words, "ab"]) == 0
    ids = model.generate([[2, 3]], 5)[0].tolist()
    assert capsys.readouterr().out == "".join("\n abcé"[id] for id in ids) + "\n"
    assert main([*words, ""]) == 1
    assert "has no end-of-text token" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [5, 7, 65, 128, 50304])
def test_the_characters_of_another_models_data_are_refused(rows: int, folder: Path):
    write_meta(folder / "meta.pkl", "\n abcé")
    assert tokenizer_for(folder / "ckpt.pt", 64).n_vocab == 6  # padded to a multiple of 64
    with pytest.raises(CheckpointError, match=rf"meta.pkl: 6 tokens for a model with a vocabulary of {rows}"):
        tokenizer_for(folder / "ckpt.pt", rows)


class Canary:
    def __reduce__(self) -> tuple[object, ...]:
        return open, ("ran", "w")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"stoi": {"a": 0}, "itos": {0: "b"}}, "stoi and its itos disagree"),
        ({"stoi": {"ab": 0}, "itos": {0: "ab"}}, "table of ids, each with one character"),
        ({"stoi": {}, "itos": {}}, "not a valid tokenizer"),
        ({"stoi": {"a": 0}}, "not a valid tokenizer"),
        ({"stoi": {"a": 0}, "itos": {0: "a"}, "vocab_size": 65}, "vocab_size is 65, its table has 1 ids"),
        ([1], "not a valid tokenizer"),
        (Canary(), "meta.pkl"),
    ],
)
def test_what_is_no_table_of_characters_is_refused_and_nothing_runs(
    meta: object, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(CheckpointError, match=message):
        tokenizer_for(folder, 500)
    assert {path.name for path in folder.iterdir()} == {"meta.pkl"}


# ---- refused -----------------------------------------------------------------------------------------------


def changed(folder: Path, name: str, **fields: object) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def stale_vocabulary(folder: Path) -> None:
    byte_level(size=300, special=["<|user|>", "<|endoftext|>"]).model.save(str(folder))


CONTRADICTIONS = {
    "another tokenizer beside": (
        lambda folder: write_meta(folder / "meta.pkl", "abc"),
        "holds two tokenizers",
    ),
    "stale vocab.json": (stale_vocabulary, "remove the stale file"),
    "prefix space": (
        lambda folder: changed(folder, "tokenizer_config.json", add_prefix_space=True),
        "says add_prefix_space=True, tokenizer.json says False",
    ),
    "end that is not there": (
        lambda folder: changed(folder, "tokenizer_config.json", eos_token="</s>"),
        "lacks '</s>'",
    ),
    "damaged": (lambda folder: (folder / "tokenizer.json").write_text("<html>"), "not valid JSON"),
    "not an object": (
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        "expected an object|expected vocab.json",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_disagree_or_are_damaged_are_refused(case: str, folder: Path):
    spoil, message = CONTRADICTIONS[case]
    as_tree(byte_level(), folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_for(folder, 500)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", '{"a": 0}'),  # without its merges
        ("merges.txt", "#version: 0.2\na b\n"),
        ("spiece.model", "\n\x0e"),
        ("vocab.txt", "[UNK]\n"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'),
        ("bpe_merges.txt", "[]"),  # the book's BPETokenizerSimple
    ],
)
def test_part_of_a_tokenizer_is_refused_with_what_would_help(name: str, content: str, folder: Path):
    (folder / name).write_text(content)
    with pytest.raises(
        CheckpointError, match=r"cannot be read .* expected .*tokenizer\.json; .*AutoTokenizer"
    ):
        tokenizer_for(folder, 50257)


def test_the_books_list_from_ids_to_tokens_is_not_taken_for_vocab_json(folder: Path):
    (folder / "vocab.json").write_text('{"0": "a", "1": "b"}')
    (folder / "merges.txt").write_text("[]")
    with pytest.raises(CheckpointError, match="token to id"):
        tokenizer_for(folder, 50257)


def test_more_tokens_than_rows_are_an_error_with_both_numbers(folder: Path):
    peer = byte_level()
    as_tree(peer, folder)
    size = peer.get_vocab_size()
    with pytest.raises(CheckpointError, match=f"{size} tokens .* vocabulary of {size - 1}"):
        tokenizer_for(folder, size - 1)


@pytest.mark.parametrize("vocab_size", [50256, 50258, 50259, 50264, 51200, 52000, 100_352])
def test_a_vocabulary_that_is_not_gpt2s_needs_its_tokenizer(vocab_size: int, tmp_path: Path):
    with pytest.raises(UsageError, match=r"not GPT-2's 50257.*tokenizer\.json.*token ids"):
        tokenizer_for(tmp_path / "model.pth", vocab_size)


@pytest.mark.parametrize("multiple", [1, 64, 128, 256])
def test_gpt2s_vocabulary_may_be_padded(multiple: int):
    assert -(-50257 // multiple) * multiple in GPT2_SIZES


# ---- the whole way -----------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(folder: Path) -> tuple[Path, nn.Module, transformers.PreTrainedTokenizerFast]:
    """A model with padding rows and a tokenizer of another language, as transformers writes it."""
    theirs = fast(byte_level())
    config = transformers.GPT2Config(vocab_size=448, n_positions=64, n_embd=16, n_layer=2, n_head=4)
    config.bos_token_id = config.eos_token_id = 0
    model = randomise(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(folder)
    theirs.save_pretrained(folder)
    return folder, model, theirs


def greedy(model: nn.Module, theirs: transformers.PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    ids = theirs(prompt, return_tensors="pt").input_ids
    made = model.generate(
        ids, max_new_tokens=count, do_sample=False, pad_token_id=0, suppress_tokens=[*range(len(theirs), 448)]
    )
    return theirs.decode(made[0], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt", ["мама мыла", "<|user|>мама"])
def test_a_folder_of_another_language_writes_transformers_text(
    prompt: str, hub_folder: tuple, capsys: pytest.CaptureFixture[str]
):
    folder, model, theirs = hub_folder
    assert main(["generate", "--model", str(folder), "--prompt", prompt, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == greedy(model, theirs, prompt, 12).rstrip("\n")


def test_verify_and_decoding_live_with_ids_that_have_no_token(
    hub_folder: tuple, capsys: pytest.CaptureFixture[str]
):
    folder, _, theirs = hub_folder
    text = "мама мыла"
    assert (
        tokenizer_for(folder, 448).decode([447, *theirs(text)["input_ids"], 10**6]) == f"\ufffd{text}\ufffd"
    )
    assert main(["verify", str(folder)]) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("destination", ["copy.pth", "copy.safetensors", "copy"])
@pytest.mark.parametrize("to", ["book", "huggingface", "nanogpt"])
def test_a_conversion_carries_the_tokenizer_along(
    to: str, destination: str, hub_folder: tuple, tmp_path: Path
):
    folder, _, theirs = hub_folder
    made = convert(folder, tmp_path / destination, to=to)
    assert_reads_as(tokenizer_for(made, 448), theirs)


def test_finetuning_keeps_the_tokenizer(hub_folder: tuple, tmp_path: Path):
    folder, _, theirs = hub_folder
    (tmp_path / "text.txt").write_text(TRAINED_ON * 20)
    words = ["--steps", "1", "--batch-size", "1", "--seq-len", "8"]
    out = tmp_path / "out"
    assert (
        main(["finetune", str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(out), *words]) == 0
    )
    assert_reads_as(tokenizer_for(next(out.glob("*.pth")), 448), theirs)


def test_an_older_tokenizer_does_not_stay_beside_what_replaces_its_model(tmp_path: Path):
    (tmp_path / "model.tiktoken").write_bytes(b"of another model")
    write_beside(tmp_path / "model.pth", {"tokenizer.json": b"{}"})
    assert {path.name for path in tmp_path.iterdir()} == {"model.tokenizer.json"}


def test_transformers_reads_the_embedded_models_tokenizer_from_a_converted_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = convert(EMBEDDED, tmp_path / "hub", to="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    assert_reads_as(tokenizer_for(EMBEDDED, 1024), theirs)
    assert_reads_as(tokenizer_for(made, 1024), theirs)
    assert json.loads((made / "config.json").read_text())["eos_token_id"] == theirs.eos_token_id == 1023
    for prompt in ("Once upon a time", "The old man "):
        write = transformers.pipeline("text-generation", str(made), dtype=torch.float32)
        text = write(prompt, max_new_tokens=40, do_sample=False)[0]["generated_text"]
        assert main(["generate", "--prompt", prompt, "--max-new-tokens", "40"]) == 0
        assert capsys.readouterr().out == text + "\n"


@has_gpt2_encoding
def test_a_pipeline_on_a_converted_gpt2_writes_our_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "gpt2.pth"
    randomise(GPTModel(GPTConfig(50257, 32, 8, 2, 1, tied_head=True))).save_checkpoint(path)
    write = transformers.pipeline("text-generation", str(convert(path, tmp_path / "hub", to="huggingface")))
    text = write("Hello, I am", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert main(["generate", "--model", str(path), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_where_gpt2s_encoding_cannot_be_fetched_a_conversion_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unreachable() -> None:
        raise CheckpointError("no network")

    monkeypatch.setattr("gpt2lite.tokenizer.gpt2_encoding", unreachable)
    GPTModel(GPTConfig(50257, 8, 8, 2, 1, tied_head=True)).save_checkpoint(tmp_path / "gpt2.pth")
    with pytest.warns(UserWarning, match="no tokenizer is written: no network"):
        made = convert(tmp_path / "gpt2.pth", tmp_path / "hub", to="huggingface")
    assert {path.name for path in made.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_resume_finds_what_it_reads(bias: bool, tmp_path: Path):
    config = GPTConfig(50, 16, 8, 2, 3, tied_head=True, bias=bias, qkv_bias=bias)
    GPTModel(config).save_checkpoint(tmp_path / "model.pth")
    saved = torch.load(convert(tmp_path / "model.pth", tmp_path / "ckpt.pt", to="nanogpt"), weights_only=True)
    assert (saved["iter_num"], saved["best_val_loss"]) == (0, 1e9)
    parameters = [nn.Parameter(t) for name, t in saved["model"].items() if name != "lm_head.weight"]
    groups = [  # as its configure_optimizers makes them
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    optimizer.load_state_dict(saved["optimizer"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

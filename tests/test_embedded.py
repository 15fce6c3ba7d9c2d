"""The model that ships with the package: what it was made from, how well it predicts, what it says."""

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpt2lite.model
from gpt2lite import generate
from gpt2lite.config import GPTConfig
from gpt2lite.model import GPTModel
from gpt2lite.tokenizer import END_OF_TEXT, read_encoding

DATA = Path(gpt2lite.model.__file__).parent / "data"
SCRIPTS = Path(__file__).parent.parent / "scripts"
TRAINING_TEXT_SHA256 = "6a783572373ef6124277ab0ffc4fae640227cbfcb19e4b6f865d829b91e34226"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model is fastest so, above all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules; they find each other only in their own folder."""
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(
        stories=importlib.import_module("stories"), train=importlib.import_module("train_embedded")
    )
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def training(scripts):
    return list(scripts.stories.stories(**scripts.train.TRAINING_STORIES))


@pytest.fixture(scope="module")
def held_out(scripts):
    return list(scripts.stories.stories(**scripts.train.HELD_OUT_STORIES))


@pytest.fixture(scope="module")
def config():
    return GPTConfig.of(json.loads((DATA / "embedded.json").read_text()))


@pytest.fixture(scope="module")
def encoding():
    return read_encoding(DATA / "embedded.tiktoken")


@pytest.fixture(scope="module")
def model(config):
    model = GPTModel(config)
    model.load_state_dict(torch.load(DATA / "embedded.pth", weights_only=True))
    return model.eval()


def generated(model, encoding, seed):
    """What the model writes after `<|endoftext|>`."""
    start = torch.tensor([[encoding.eot_token]])
    ids = generate(model, start, 120, temperature=0.8, top_k=40, seed=seed)[0].tolist()
    return encoding.decode(ids).replace(END_OF_TEXT, " ")


def words(text):
    return re.findall(r"[^\s.,:!?\"]+", text)


def triples(text):
    found = words(text)
    return list(zip(found, found[1:], found[2:], strict=False))


def share_known(parts, known):
    return sum(part in known for part in parts) / len(parts)


def test_data_files_take_at_most_two_megabytes():
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 2_000_000


def test_weights_are_float16_and_the_tied_head_is_stored_once(config):
    state = torch.load(DATA / "embedded.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert config.tied_head
    assert state["out_head.weight"].data_ptr() == state["tok_emb.weight"].data_ptr()


def test_vocabulary_fills_the_models_embedding(config, encoding):
    assert encoding.n_vocab == config.vocab_size


def test_stories_are_the_ones_that_the_model_was_trained_on(training):
    # a grammar that changes needs `python scripts/train_embedded.py` and the new hash here
    assert hashlib.sha256("\n".join(training).encode()).hexdigest() == TRAINING_TEXT_SHA256


def test_held_out_stories_do_not_occur_in_the_training_text(training, held_out):
    text = "\n".join(training)
    assert len(set(held_out)) == len(held_out)
    assert not [story for story in held_out if story in text]


def test_held_out_bits_per_byte_are_what_the_readme_states(scripts, model, encoding, held_out):
    stated = float(re.search(r"([\d.]+) bits per byte", (DATA / "README.md").read_text())[1])
    assert scripts.train.bits_per_byte(model, encoding, held_out[:80]) == pytest.approx(stated, abs=0.01)


def test_bits_per_byte_of_an_even_guess_are_those_of_the_vocabulary(scripts, config, encoding):
    clueless = GPTModel(config)
    torch.nn.init.zeros_(clueless.tok_emb.weight)  # every logit 0: log2(1024) = 10 bits a token
    text = "Once upon a time"
    expected = 10 * len(encoding.encode(text)) / len(text)
    assert scripts.train.bits_per_byte(clueless, encoding, [text]) == pytest.approx(expected)


def test_generated_words_occur_in_the_training_text(model, encoding, training):
    known = set(words("\n".join(training)))
    texts = [generated(model, encoding, seed) for seed in range(20)]
    assert len(set(texts)) == 20
    assert share_known([word for text in texts for word in words(text)], known) >= 0.9


def test_only_a_trained_model_strings_words_together_as_the_stories_do(model, config, encoding, training):
    known = {triple for story in training for triple in triples(story)}
    torch.manual_seed(0)
    untrained = GPTModel(config).eval()
    assert share_known(triples(generated(model, encoding, seed=0)), known) >= 0.9
    assert share_known(triples(generated(untrained, encoding, seed=0)), known) <= 0.1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Once upon a time",
        "Grüße, 世界! 🦊\u200d🔥",
        "\t\n  \r\n\0",
        "".join(map(chr, range(0x100, 0x900))),
    ],
    ids=["empty", "English", "many scripts", "white space", "two-byte characters"],
)
def test_any_text_survives_the_tokenizer(encoding, text):
    assert encoding.decode(encoding.encode(text)) == text


def test_byte_pairs_join_the_most_frequent_pair_first(scripts):
    tokens = scripts.train.byte_pairs("low low low lower", 260)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert tokens[256:] == [b"ow", b"low", b" low", b"er"]


def test_a_pair_is_joined_from_the_left(scripts):
    assert scripts.train.merged((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a")


def test_stories_of_a_seed_are_always_the_same_ones(scripts):
    two = [list(scripts.stories.stories(seed, 5)) for seed in (7, 7)]
    assert two[0] == two[1] != list(scripts.stories.stories(8, 5))


def test_stories_have_no_unfilled_slots_and_no_loose_spaces(held_out):
    blemish = re.compile(r"[\[\]{}|]| [.,!?]|  | \n|[.!?] [a-z]|\b[Aa] [aeiou]")
    assert not [story for story in held_out if blemish.search(story)]

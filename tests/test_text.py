"""Text in, text out: what a model says in strings is what it says in ids, by its checkpoint's tokenizer."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from test_cli import on_a_terminal

import gpt2lite
from gpt2lite import CheckpointError, GPTConfig, GPTModel, Instruction, Purpose, Recipe, UsageError
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.examples import format_prompt
from gpt2lite.pruning import prune
from gpt2lite.tokenizer import read_encoding, tokenizer_for

TEXTS = ["A boy called Tom. He was brave.", "A girl called Ida", "", "she " * 60]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return gpt2lite.embedded()


@pytest.fixture(scope="module")
def encoding():
    return read_encoding(EMBEDDED.with_suffix(".tiktoken"))


def records(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned, of texts that are cut to 24 tokens, whether he or she comes first."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [{"text": f"{name} was {n} years old.", "label": label}
            for n in range(20) for name, label in (("He", "a man"), ("She", "a woman"))]  # fmt: skip
    path = records(folder / "rows.jsonl", rows)
    words = ("--steps", 8, "--seq-len", 24, "--learning-rate", 1e-3, "--save-every", 100)
    assert (
        main([str(word) for word in ("finetune", "--classify", path, "--out", folder / "run", *words)]) == 0
    )
    return folder / "run" / "model.pth"


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructed")
    rows = [{"instruction": "Say it.", "input": f"{n}", "output": f"It is {n}."} for n in range(20)]
    path = records(folder / "rows.jsonl", rows)
    words = ("--steps", 2, "--save-every", 100)
    flags = ("finetune", "--instructions", path, "--out", folder / "run", *words)
    assert main([str(word) for word in flags]) == 0
    return folder / "run" / "model.pth"


# ---- generating --------------------------------------------------------------------------------------------


def test_a_text_gives_what_its_ids_give(model: GPTModel, encoding):
    ids = model.generate([encoding.encode("Once upon a time")], 30, stop=[encoding.eot_token])[0].tolist()
    assert model.generate("Once upon a time", 30) == encoding.decode(
        [id for id in ids if id != encoding.eot_token]
    )


def test_several_texts_are_each_what_they_are_alone(model: GPTModel):
    texts = ["Anna", "Ben was a friendly", ""]
    assert model.generate(texts, 12) == [model.generate(text, 12) for text in texts]


def test_pieces_of_a_text_are_the_text(model: GPTModel):
    pieces = [*model.generate_tokens("Anna", 20, temperature=1, seed=3)]
    assert len(pieces) == 20
    assert "Anna" + "".join(pieces) == model.generate("Anna", 20, temperature=1, seed=3)


def test_a_prompt_is_read_as_its_file_would_be(model: GPTModel, encoding, tmp_path: Path):
    assert model.generate("\ufeffAnna\r\nwas", 8) == model.generate("Anna\nwas", 8)
    with_end = model.generate("One.<|endoftext|>Two", 8)
    ids = [*encoding.encode("One."), encoding.eot_token, *encoding.encode("Two")]
    new = model.generate([ids], 8)[0][len(ids) :].tolist()
    assert with_end == "One.<|endoftext|>Two" + encoding.decode(new)


def test_a_text_ends_before_a_stop_string_and_the_end_of_text(model: GPTModel):
    whole = model.generate("Anna", 250)
    assert "<|endoftext|>" not in whole
    assert model.generate("Anna", 60, stop=".") == whole[: whole.index(".")]


def test_how_many_tokens_need_not_be_said(model: GPTModel):
    assert model.generate("Anna", stop=".").startswith("Anna")
    assert model.generate([[5] * 250])[0].shape == (256,)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["Anna", [1, 2]], "a list of texts holds a list"),
        ("half \ud800", "prompt: holds '.ud800' at character 5, which is no text"),
        (Instruction("Say it."), "nothing says that this model was trained on instructions"),
        ("word " * 400, "exceed the context of 256"),
    ],
    ids=["mixed", "surrogate", "instruction", "long"],
)
def test_what_is_no_prompt_is_refused(prompt, message: str, model: GPTModel):
    with pytest.raises(UsageError, match=message):
        model.generate(prompt, 5)


def test_pieces_are_of_one_text(model: GPTModel):
    with pytest.raises(UsageError, match="the pieces of one text"):
        model.generate_tokens(["Anna", "Ben"], 5)


def test_a_model_made_by_hand_takes_a_text_only_with_an_encoding(model: GPTModel, encoding):
    own = GPTModel(model.config).eval()
    own.load_state_dict(model.state_dict())
    with pytest.raises(UsageError, match="loaded from no checkpoint, so it has no tokenizer; pass encoding="):
        own.generate("Anna", 5)
    assert own.generate("Anna", 5, encoding=encoding) == model.generate("Anna", 5)
    assert gpt2lite.generate(own, "Anna", 5, encoding=encoding) == model.generate("Anna", 5)


# ---- what the model carries --------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for suffix in (".pth", ".tiktoken", ".json"):
        shutil.copy(EMBEDDED.with_suffix(suffix), tmp_path / f"model{suffix}")
    return tmp_path / "model.pth"


def test_the_tokenizer_is_saved_with_the_model(copied: Path, tmp_path: Path):
    model = GPTModel.from_checkpoint(copied)
    (tmp_path / "new").mkdir()
    saved = model.save_checkpoint(tmp_path / "new" / "other.safetensors")
    assert (tmp_path / "new" / "other.tiktoken").read_bytes() == copied.with_suffix(".tiktoken").read_bytes()
    assert GPTModel.from_checkpoint(saved).generate("Anna", 5) == model.generate("Anna", 5)
    before = sorted(tmp_path.iterdir())
    model.save_checkpoint(copied)
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_that_was_replaced_since_the_model_was_opened_is_not_used(copied: Path, tmp_path: Path):
    model = GPTModel.from_checkpoint(copied)
    copied.with_suffix(".tiktoken").unlink()
    for use in (lambda: model.generate("Anna", 5), lambda: model.save_checkpoint(tmp_path / "new.pth")):
        with pytest.raises(CheckpointError, match="its tokenizer's files changed since the model was opened"):
            use()


def test_a_tokenizer_beside_the_destination_that_is_not_the_models_is_said(copied: Path, tmp_path: Path):
    state = GPTModel.from_checkpoint(copied).state_dict()
    (tmp_path / "plain").mkdir()
    torch.save(state, tmp_path / "plain" / "plain.pth")
    model = GPTModel.from_checkpoint(tmp_path / "plain" / "plain.pth", config={"n_heads": 4})
    said = "model.pth: this model came without a tokenizer, so .*/model.tiktoken will be its own; remove"
    with pytest.warns(UserWarning, match=said):
        model.save_checkpoint(copied)


@pytest.mark.parametrize("write", [gpt2lite.convert, partial(prune, blocks=[0])])
def test_a_tokenizer_in_the_destinations_folder_that_is_not_the_models_is_said(
    write: Callable[..., Path], copied: Path, tmp_path: Path
):
    other, plain = tmp_path / "other", tmp_path / "plain"
    for folder in (other, plain):
        folder.mkdir()
    (other / "vocab.json").write_text("{}")
    shutil.copy(copied, plain / "plain.pth")
    with pytest.warns(UserWarning, match="new.pth: .*without a tokenizer, so .*other/vocab.json will be"):
        write(plain / "plain.pth", other / "new.pth", config={"n_heads": 4})
    write(copied, other / "own.pth")  # its own lie beside it and come first
    assert tokenizer_for(other / "own.pth", 1024).n_vocab == tokenizer_for(copied, 1024).n_vocab


def test_state_and_pickle_of_a_model_are_a_modules_own(copied: Path):
    model, bare = (
        GPTModel.from_checkpoint(copied),
        GPTModel(GPTConfig.of(json.loads(copied.with_suffix(".json").read_text()))),
    )
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert model.__getstate__().keys() == vars(bare).keys()
    assert str(copied.parent).encode() not in pickle.dumps(model)
    again = pickle.loads(pickle.dumps(model))
    assert (again.beside, again.purpose) == (None, Purpose())
    assert torch.equal(again(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2]])))
    assert copy.deepcopy(model).generate("Anna", 5) == model.generate("Anna", 5)


# ---- classifying -------------------------------------------------------------------------------------------


def by_hand(model: GPTModel, encoding, text: str, seq_len: int) -> list[float]:
    ids = encoding.encode_ordinary(text)[:seq_len] or [encoding.eot_token]
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0, -1].softmax(-1).tolist()


def test_a_classifier_says_what_plain_torch_computes(classifier: Path, encoding):
    model = GPTModel.from_checkpoint(classifier, dtype=torch.float32)
    assert model.purpose == Purpose(("a man", "a woman"), 24)
    found = model.classify(TEXTS * 3)
    assert found[0] == model.classify(TEXTS[0]) or found[0].label == model.classify(TEXTS[0]).label
    for text, (label, shares) in zip(TEXTS * 3, found, strict=True):
        assert [*shares.values()] == pytest.approx(by_hand(model, encoding, text, 24), abs=1e-5)
        assert label == max(shares, key=lambda name: shares[name])
    assert found[0].probabilities.keys() == {"a man", "a woman"}
    cut = model.classify("she " * 60), model.classify("she " * 24)
    assert cut[0].probabilities == pytest.approx(cut[1].probabilities, abs=1e-6)


def test_a_classifier_is_transformers_classifier(classifier: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    folder = gpt2lite.convert(classifier, tmp_path / "hub", to="huggingface", dtype=torch.float32)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.id2label == {0: "a man", 1: "a woman"}
    wanted = GPTModel.from_checkpoint(classifier, dtype=torch.float32).classify(TEXTS)
    with torch.inference_mode():
        together = tokenizer([*TEXTS[:2], *TEXTS[3:]], return_tensors="pt", padding=True, truncation=True)
        shares = theirs(**together).logits.softmax(-1).tolist()
    assert together["input_ids"].shape[1] == 24
    for (_, probabilities), each in zip([*wanted[:2], *wanted[3:]], shares, strict=True):
        assert [*probabilities.values()] == pytest.approx(each, abs=1e-5)
    again = GPTModel.from_checkpoint(folder)
    assert again.purpose == Purpose(("a man", "a woman"), 24)
    for one, two in zip(again.classify(TEXTS), wanted, strict=True):
        assert one.probabilities == pytest.approx(two.probabilities, abs=1e-5)


def test_a_head_whose_bias_cannot_go_into_the_norm_is_refused(tmp_path: Path):
    model = randomise(GPTModel(TINY))
    gpt2lite.as_classifier(model, 2)
    model.out_head.weight.data[1] = model.out_head.weight.data[0]
    model.out_head.bias.data = torch.tensor([1.0, 2.0])
    path = model.save_checkpoint(tmp_path / "model.pth", labels=["no", "yes"])
    with pytest.raises(UsageError, match="huggingface's classifiers have no bias, which this one cannot"):
        gpt2lite.convert(path, tmp_path / "hub", to="huggingface")
    assert not (tmp_path / "hub").exists()


def test_what_cannot_classify_says_why(model: GPTModel, encoding):
    with pytest.raises(UsageError, match="this model has no classes; `gpt2lite finetune"):
        model.classify("Anna")
    own = GPTModel(model.config)
    gpt2lite.as_classifier(own, 2)
    with pytest.raises(UsageError, match=r"has 2 classes and 0 names for them; write labels.json"):
        own.classify("Anna", encoding=encoding)
    own.purpose = Purpose(("no", "yes"))
    assert own.classify("Anna", encoding=encoding).label in ("no", "yes")
    with pytest.raises(UsageError, match="wants a text or several, each a str"):
        own.classify(["Anna", 1], encoding=encoding)
    with pytest.raises(UsageError, match="classifier of 2 classes and writes no text"):
        own.generate("Anna", 5)
    gpt2lite.as_classifier(own, 2)
    assert own.purpose == Purpose()


def test_the_command_classifies(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wanted = GPTModel.from_checkpoint(classifier).classify("He was 3 years old.")
    assert main(["classify", str(classifier), "He was 3 years old."]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{wanted.label}  {wanted.probabilities[wanted.label]:.4f}".replace(
        "a man  ", "a man    "
    )
    for path in (
        records(tmp_path / "a.jsonl", [{"text": text} for text in ("He", "She ran")]),
        tmp_path / "a.txt",
    ):
        (tmp_path / "a.txt").write_text("He\n\nShe ran\n")
        assert main(["classify", str(classifier), "--file", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in lines] == ["He", "ran"]
        assert main(["classify", str(classifier), "--file", str(path), "--json"]) == 0
        assert [each["text"] for each in json.loads(capsys.readouterr().out)] == ["He", "She ran"]
    assert main(["classify", str(EMBEDDED), "He"]) == 1
    assert "this model has no classes" in capsys.readouterr().err


def test_classified_texts_are_whole_in_a_pipe_and_a_line_each_on_a_terminal(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = "She ran to the river and back, \x1b[31m" + "over and over again, " * 9 + "until night."
    path = records(tmp_path / "a.jsonl", [{"text": text}])
    assert main(["classify", str(classifier), "--file", str(path)]) == 0
    assert capsys.readouterr().out.rstrip("\n").endswith(text)
    (line,) = on_a_terminal("classify", classifier, "--file", path, "--quiet").splitlines()
    assert len(line) == 80
    assert "\x1b" not in line


# ---- answering ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["7", ""])
def test_an_instruction_is_written_as_in_training(given: str, instructed: Path, encoding):
    model = GPTModel.from_checkpoint(instructed, dtype=torch.float32)
    prompt = encoding.encode_ordinary(format_prompt({"instruction": "Say {input}.", "input": given}))
    new = model.generate([prompt], 20, stop=[encoding.eot_token])[0][len(prompt) :].tolist()
    answer = model.generate(Instruction("Say {input}.", given), 20)
    assert answer == encoding.decode([id for id in new if id != encoding.eot_token])
    assert "".join(model.generate_tokens(Instruction("Say {input}.", given), 20)) == answer


def test_special_tokens_in_an_instruction_are_plain_text(instructed: Path):
    model = GPTModel.from_checkpoint(instructed)
    assert model.generate(Instruction("<|endoftext|>"), 3) != model.generate(Instruction(""), 3)


def test_the_command_answers(instructed: Path, capsys: pytest.CaptureFixture[str]):
    words = ["generate", str(instructed), "--max-new-tokens", "12"]
    wanted = GPTModel.from_checkpoint(instructed, dtype=torch.float16).generate(
        Instruction("Say it.", "3"), 12
    )
    assert main([*words, "--instruction", "Say it.", "--input", "3"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    assert main(["generate", "--instruction", "Say it."]) == 1
    assert "nothing says that this model was trained on instructions" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--input", "3"])
    assert "argument --input: says nothing without --instruction" in capsys.readouterr().err


def test_what_a_model_was_trained_for_goes_wherever_it_goes(instructed: Path, tmp_path: Path):
    purpose = gpt2lite.open_model(instructed).purpose
    assert [text.count("{instruction}") for text in purpose.template] == [1, 1]
    places = [gpt2lite.convert(instructed, tmp_path / name, to=to) for name, to in (
        ("a.pth", "book"), ("b.safetensors", "book"), ("folder", "book"), ("hub", "huggingface"),
    )]  # fmt: skip
    places += [gpt2lite.convert(instructed, tmp_path / "tensors", format="per-tensor")]
    places += [GPTModel.from_checkpoint(instructed).save_checkpoint(tmp_path / "c.pth")]
    places += [next(instructed.parent.glob("step-*.pth"))]
    assert [gpt2lite.open_model(place).purpose for place in places] == [purpose] * len(places)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"seq_len": 0}, "seq_len must be a positive int or None"),
        ({"prompt": "{instruction}"}, "template must be two texts"),
        ({"prompt": "{instruction}", "prompt_input": "{input}"}, "template must be two texts"),
        ({"prompt": 1, "prompt_input": 2}, "template must be two texts"),
        ([1], "not what gpt2lite writes"),
    ],
    ids=str,
)
def test_a_purpose_that_is_none_is_refused(said, message: str, tmp_path: Path):
    torch.save(GPTModel(TINY).state_dict(), tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps(TINY.as_dict() | {"trained_for": said}))
    with pytest.raises(CheckpointError, match=message):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


# ---- tasks -------------------------------------------------------------------------------------------------


def test_the_tasks_are_public_and_take_the_models_own_tokenizer(model: GPTModel, tmp_path: Path, encoding):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a fox. " * 200)
    recipe = Recipe(steps=1, seq_len=16, batch_size=2, warmup_steps=0)
    task = gpt2lite.text_task(text, model, recipe)
    ids = torch.tensor(encoding.encode(text.read_text()))
    assert task.digest != gpt2lite.text_task(ids, model, recipe).digest  # of other widths
    assert torch.equal(task.train(0).ids, gpt2lite.text_task(ids, model, recipe).train(0).ids)
    trained = gpt2lite.finetune(gpt2lite.embedded(), task, tmp_path / "run", recipe)
    assert tokenizer_for(trained, 1024).n_vocab == encoding.n_vocab
    with pytest.raises(UsageError, match="it has no tokenizer"):
        gpt2lite.text_task(text, GPTModel(model.config), recipe)


def test_a_text_where_a_file_is_wanted_is_told_so():
    model, recipe = gpt2lite.embedded(), Recipe(seq_len=16)
    for make in (gpt2lite.text_task, gpt2lite.instruction_task, gpt2lite.classifier_task):
        for text in ("Once upon a time", "Once upon a time there was a fox. " * 200):
            with pytest.raises(UsageError, match=r"Once upon a time.*: no such file; texts and records"):
                make(text, model, recipe)
        with pytest.raises(UsageError, match="wanted a path, got list"):
            make([{"text": "a", "label": "b"}], model, recipe)


def test_a_command_without_a_text_or_with_one_in_the_wrong_place_says_so(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "Once upon a time"]) == 1
    assert "no such file; a text to go on with stands behind --prompt" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text("\n\n")
    assert main(["classify", str(classifier), "--file", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: holds no text to classify" in capsys.readouterr().err

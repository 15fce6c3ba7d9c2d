from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import randomise

from gpt2lite import CheckpointError, GPTConfig, GPTModel, UsageError, devices, save_per_tensor
from gpt2lite.cli import COMMANDS, arguments, main
from gpt2lite.cli.terminal import read_text
from gpt2lite.config import EMBEDDED
from gpt2lite.tokenizer import read_encoding

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
has_gpt2_encoding = pytest.mark.skipif(
    not all(
        os.path.exists(os.path.join(os.environ.get("TIKTOKEN_CACHE_DIR", ""), name)) for name in GPT2_FILES
    ),
    reason="tiktoken's gpt2 files are not in $TIKTOKEN_CACHE_DIR",
)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)


@pytest.fixture
def gpt2_shaped(tmp_path: Path) -> Path:
    """A small model with GPT-2's vocabulary, padded as nanoGPT pads it."""
    path = tmp_path / "model.pth"
    torch.save(randomise(GPTModel(GPTConfig(50304, 64, 16, 2, 2, tied_head=True))).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"n_heads": 2}))
    return path


def test_the_script_without_arguments_writes_words_and_nothing_to_stderr():
    result = run(SCRIPTS / "generate.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Once upon a time")
    assert len(result.stdout.split()) > 30


def test_no_argument_path_needs_no_network():
    blocked = (
        "import socket; socket.socket.connect = lambda *a: (_ for _ in ()).throw(OSError('network used'))"
    )
    result = run("-c", f"{blocked}\nfrom gpt2lite.cli import main\nraise SystemExit(main(['generate']))")
    assert (result.returncode, result.stderr) == (0, "")


def test_without_numpy_nothing_is_said_and_everything_works(tmp_path: Path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    command = [sys.executable, "-m", "gpt2lite", "generate", "--max-new-tokens", "4"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


def test_module_console_script_and_function_print_the_same(capsys: pytest.CaptureFixture[str]):
    words = ["generate", "--max-new-tokens", "8", "--seed", "1", "--temperature", "1", "--top-k", "5"]
    assert main(words) == 0
    assert run("-m", "gpt2lite", *words).stdout == capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["baseline", "sequential", "meta", "mmap", "stream"])
def test_every_strategy_generates_the_same_text(strategy: str, capsys: pytest.CaptureFixture[str]):
    words = ["generate", "--max-new-tokens", "12", "--prompt", "The old"]
    assert main([*words, "--strategy", strategy]) == 0
    first = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == first


@has_gpt2_encoding
def test_a_gpt2_vocabulary_takes_tiktokens_gpt2_and_padding_is_never_sampled(
    gpt2_shaped: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["generate", "--model", str(gpt2_shaped), "--temperature", "1000", "--seed", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("Hello, I am")


@has_gpt2_encoding
def test_gpt2_text_goes_through_the_encoding_and_back():
    from gpt2lite.tokenizer import gpt2_encoding

    assert gpt2_encoding().encode("Hello, I am a language model") == [15496, 11, 314, 716, 257, 3303, 2746]


def test_inspect_says_what_a_file_is_as_text_and_as_json(
    gpt2_shaped: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", str(gpt2_shaped)]) == 0
    text = capsys.readouterr().out
    assert "tok_emb.weight = out_head.weight" in text
    assert main(["inspect", str(gpt2_shaped), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dialect"], found["format"]) == ("book", "torch_zip")
    assert found["config"]["tied_head"]
    assert found["parameters"] == sum(p.numel() for p in GPTModel(GPTConfig.of(found["config"])).parameters())


def test_inspect_names_what_is_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = GPTModel(GPTConfig(10, 8, 8, 2, 1)).state_dict()
    mask = {"trf_blocks.0.att.mask": torch.ones(8, 8).triu(1)}
    path = tmp_path / "model.pth"
    torch.save(
        {"model_state_dict": {**state, **mask, "more": torch.ones(1)}, "optimizer": {"m": torch.ones(2)}},
        path,
    )
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for oddity in (
        "1 stored attention masks",
        "1 tensors beside the model",
        "unknown tensors: model_state_dict.more",
    ):
        assert oddity in text
    assert "the number of heads cannot be read off weights" in text
    assert "n_heads=None  n_layers=1" in text


def test_env_says_what_memory_is_available(capsys: pytest.CaptureFixture[str]):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert 0 < found["host_memory"]["available"] <= found["host_memory"]["total"]
    assert main(["env"]) == 0
    assert "available, limited by" in capsys.readouterr().out


def test_bench_prints_a_row_for_each_strategy_and_keeps_json_and_a_plot(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output, plot, folder = tmp_path / "bench.json", tmp_path / "bench.png", tmp_path / "work"
    folder.mkdir()
    result = run(
        *(SCRIPTS / "benchmark.py", "--strategies", "stream", "per_tensor", "--json", output, "--plot", plot),
        *("--folder", folder),
    )
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("stream", "per_tensor"))]
    assert [row[0] for row in rows] == ["stream", "per_tensor"]
    assert all(row[-1] == "yes" for row in rows)
    assert [r["strategy"] for r in json.loads(output.read_text())["results"]] == ["stream", "per_tensor"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert list(folder.iterdir()) == []


def test_bench_refuses_a_checkpoint_that_does_not_fit_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = randomise(GPTModel(GPTConfig(64, 16, 16, 2, 2)))
    folder = save_per_tensor(model, tmp_path / "parameters")
    (folder / "final_norm.scale.pt").unlink()
    assert main(["bench", str(folder), "--n-heads", "2", "--strategies", "stream"]) == 1
    output = capsys.readouterr()
    assert "final_norm.scale: missing" in output.out + output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "no.pth"], "no.pth: no such file or folder"),
        (["generate", "--model", "no.pth"], "no.pth: no such file or folder"),
        (["generate", "--prompt", "word " * 400], "exceed the context of 256; shorten the prompt, or"),
        (["generate", "--max-new-tokens", "300"], "exceed the context of 256"),
        (["generate", "--max-new-tokens", "-1"], "max_new_tokens must be an int of at least 1, got -1"),
        (["generate", "--temperature", "-1"], "temperature must be 0"),
        (
            ["generate", "--temperature", "nan"],
            "temperature must be 0 (greedy) or a positive number, got nan",
        ),
        (["generate", "--stop", ""], "stop must be token ids in 0 … 1023 and non-empty strings"),
        (["generate", "--device", "cuda:77"], "cuda:77 was asked for"),
        (["generate", "--device", "abc"], "unknown device 'abc'"),
        (["generate", "--strategy", "per_tensor"], "gpt2lite.save_per_tensor"),
        (["bench", "--folder", "no"], "No such file or directory: 'no/"),
        (["bench", "no.pth"], "no.pth: no such file or folder"),
        (["bench", "--json", "model.pth"], "model.pth: expected a file name ending in .json"),
        (
            ["bench", "--json", "no/x.json"],
            "no/x.json: expected a file name ending in .json, in an existing folder",
        ),
        (["bench", "--plot", "x.xyz"], "x.xyz: expected a file name ending in .png"),
        (["generate", "--n-heads", "0"], "n_heads=0 was passed"),
        (["generate", "--seed", "-5", "--temperature", "1"], "seed must be an int in 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("gpt2lite: ")
    assert output.err.count("\n") == 1


def test_a_vocabulary_without_a_tokenizer_says_where_to_put_one(
    pth: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "--model", str(pth), "--n-heads", "4"]) == 1
    assert (
        "no tokenizer beside it, and a vocabulary of 101 is not GPT-2's 50257. Put model.tiktoken"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy it again"),
        (b"aGk= 0\nYQ== 2\n", "must be 0, 1, 2"),
        (b"aGk=\n", "not a tiktoken file"),
        (b"!!! 0\n", "not a tiktoken file"),
        (b"\xff\xfe 0\n", "not a tiktoken file"),
        (b"aGk= 0\n", "lacks some of the 256 single bytes"),
    ],
)
def test_a_damaged_tokenizer_is_one_clear_error(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "model.tiktoken"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_encoding(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_every_argument(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "usage: gpt2lite" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words)
)
def test_help_imports_neither_torch_nor_the_hubs_client(words: list[str]):
    script = f"""
import sys
from gpt2lite.cli import main
try:
    main([*{words}, "--help"])
finally:
    print("imported", *sys.modules.keys() & {{"torch", "huggingface_hub", "tiktoken", "psutil"}})
"""
    result = run("-c", script)
    assert result.stdout.startswith("usage: gpt2lite")
    assert result.stdout.endswith("\nimported\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("gen", {"generate"}), ("convert --to ", {"book", "hf", "nanogpt", "gguf"}), ("plan --q", {"--quiet"})],
)
def test_a_shell_is_told_what_may_follow(typed: str, offered: set[str], tmp_path: Path):
    pytest.importorskip("argcomplete", reason="argcomplete is not installed")
    said, line = tmp_path / "said", f"gpt2lite {typed}"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(said), "IFS": "\n"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    subprocess.run([sys.executable, "-m", "gpt2lite"], env={**os.environ, **asked}, check=True)
    assert offered <= set(said.read_text().split())


@pytest.mark.parametrize("columns", ["80", "40"])
@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_no_wider_than_the_terminal(
    words: list[str], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit, match="0"):
        main(words)
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > int(columns)]
    # What has no space to break at, and the examples, which are to be copied.
    assert not [line for line in wide if columns == "80" or (len(line.split()) == 1 and "=" not in line)]


def test_what_commands_print_is_80_wide(
    gpt2_shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text.txt").write_text("Once upon a time there lived a cat. " * 90)
    run = ["--steps", "1", "--seq-len", "16", "--validate-every", "1"]
    for words in (
        ["inspect", str(EMBEDDED)],
        ["plan"],
        ["plan", "gpt2-xl", "--device", "cuda"],
        ["plan", "--train", "--fit", "1MiB"],
        ["env"],
        ["bench", "--strategies", "mmap", "--folder", str(tmp_path)],
        ["evaluate", "--text", str(tmp_path / "text.txt")],
        ["finetune", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *run],
    ):
        assert main(words) in (0, 1)
        lines = capsys.readouterr().out.replace(str(EMBEDDED), "model.pth").splitlines()
        lines = [line for line in lines if not line.startswith(" " * 7)]  # a sample: whole in a pipe
        assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []


def test_short_names_of_dtypes_and_sizes_are_understood(capsys: pytest.CaptureFixture[str]):
    found = []
    for words in (["bf16", "124M"], ["bfloat16", "gpt2"], ["BF16", "gpt2-small"]):
        assert main(["plan", "--dtype", words[0], "--size", words[1], "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["strategies"])
    assert found[0] == found[1] == found[2]
    assert {GPTConfig.named(name) for name in ("1558M", "1.5b", "gpt2-xl")} == {GPTConfig.named("gpt2-xl")}


def test_a_file_with_a_typo_gets_the_nearest_name(
    gpt2_shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", str(tmp_path / "modle.pth")]) == 1
    assert f"no such file or folder. Did you mean {gpt2_shaped}?" in capsys.readouterr().err
    assert main(["generate", "--prompts", str(tmp_path / "model.pht")]) == 1
    assert f"Did you mean {gpt2_shaped}?" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing-like-it")]) == 1
    assert "Did you mean" not in capsys.readouterr().err


def test_a_model_comes_first_or_behind_model_but_not_twice(capsys: pytest.CaptureFixture[str]):
    words = ["--max-new-tokens", "4"]
    for model in ([], [str(EMBEDDED)], ["--model", str(EMBEDDED)]):
        assert main(["generate", *model, *words]) == 0
        assert main(["generate", *words, *model]) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    assert main(["generate", "a.pth", "--model", "b.pth"]) == 1
    assert "the model is said twice: a.pth and --model b.pth" in capsys.readouterr().err


def on_a_terminal(*words: object, **environment: str) -> str:
    """What a command writes to a terminal of 80 columns, both streams; `environment` is its own, if any."""
    seen, (end, own) = b"", pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**(environment or os.environ), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "gpt2lite", *map(str, words)], stdin=own, stdout=own,
                               stderr=own, env=environment)  # fmt: skip
    os.close(own)
    with suppress(OSError):  # how Linux says that nobody writes any more
        while piece := os.read(end, 1 << 16):
            seen += piece
    os.close(end)
    assert process.wait() == 0
    return seen.decode(errors="replace")


def test_bars_move_on_a_terminal_and_quiet_draws_none(tmp_path: Path):
    words = ("bench", "--strategies", "stream", "mmap", "--folder", tmp_path)
    watched = on_a_terminal(*words)
    assert {"0/2", "1/2"} <= set(re.findall(r"\d/\d", watched))
    assert len(set(re.findall(r"\[(\d\d:\d\d)<", watched))) > 1  # its clock goes on
    assert "measuring" not in on_a_terminal(*words, "--quiet")
    assert "tokens/s" in on_a_terminal("generate", "--max-new-tokens", 8)
    assert "tokens/s" not in on_a_terminal("generate", "--max-new-tokens", 8, "--quiet")
    assert "\x1b[3" not in watched  # no colours


def test_the_device_is_an_accelerator_that_is_mostly_free_else_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    cards = [torch.device("cuda", 0), torch.device("cuda", 1)]
    free = {cards[0]: 10, cards[1]: 70}
    monkeypatch.setattr(devices, "accelerators", lambda: cards)
    monkeypatch.setattr(devices, "free_memory", lambda device: free[device])
    monkeypatch.setattr(devices, "total_memory", lambda device: 80)
    assert devices.name_device("auto") == cards[1]
    free[cards[1]] = 30
    assert devices.name_device("auto") == torch.device("cpu")
    monkeypatch.setattr(devices, "accelerators", list)
    assert devices.name_device("auto") == torch.device("cpu")
    assert main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"


LATE = {"numba", "matplotlib", "huggingface_hub", "tiktoken", "transformers"}


@pytest.mark.parametrize(
    ("use", "at_most"),
    [
        ("import gpt2lite", set()),
        ("import gpt2lite; dir(gpt2lite), gpt2lite.__all__", set()),
        ("from gpt2lite import *", {"torch", "tiktoken"}),
    ],
)
def test_the_package_imports_no_more_than_is_used(use: str, at_most: set[str]):
    result = run("-c", f"import sys\n{use}\nprint(*sys.modules.keys() & { ({'torch'} | LATE)!r})")
    assert result.returncode == 0
    assert set(result.stdout.split()) <= at_most


def test_the_names_in_help_are_the_librarys():
    from gpt2lite.converting import TARGETS, WRITERS
    from gpt2lite.generation import ENGINES
    from gpt2lite.loading.strategies import STRATEGIES
    from gpt2lite.verification import REFERENCES

    tables = (STRATEGIES, ENGINES, WRITERS, REFERENCES)
    said = (arguments.STRATEGIES, arguments.ENGINES, arguments.FORMATS, arguments.REFERENCES)
    assert [tuple(table) for table in tables] == list(said)
    assert list(arguments.DIALECTS.values()) == list(TARGETS)


def test_a_warning_is_one_plain_line_and_what_main_changed_is_restored():
    script = """
import sys, warnings
from gpt2lite import cli
before = warnings.formatwarning, sys.stdout.errors
class Loud:
    def run_env(args):
        warnings.warn("careful", UserWarning)
        assert sys.stdout.errors == "replace"
        raise OSError("over")
sys.modules["gpt2lite.cli.bench"] = Loud
assert cli.main(["env"]) == 1
assert (warnings.formatwarning, sys.stdout.errors) == before
"""
    result = run("-c", script)
    assert (result.returncode, result.stderr) == (0, "gpt2lite: warning: careful\ngpt2lite: over\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generat"], "argument COMMAND: unknown name 'generat'; did you mean generate?"),
        (["bench", "--strategies", "steam"], "unknown name 'steam'; did you mean stream?"),
        (["bench", "--strategies", "fast"], "unknown name 'fast'; choose from baseline, sequential, meta,"),
        (["classify", "model.pth", "two", "words"], "unknown argument words; a text of several words needs"),
        (["generate", "--tempreture", "1"], "unknown argument --tempreture; did you mean --temperature?"),
        (["generate", "--dtype", "fp17"], "unknown name 'fp17'"),
        (["plan", "--size", "gpt2-xxl"], "unknown name 'gpt2-xxl'; did you mean gpt2-xl?"),
        (["plan", "--fit", "8GiB"], "argument --fit: says nothing without --train"),
        (["plan", "--parallel", "tp"], "argument --parallel: says nothing without --ranks"),
        (["generate", "--prompt", "a", "--prompts", "b"], "not allowed with argument --prompt"),
    ],
)
def test_wrong_words_are_a_usage_error(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_bench_leaves_no_file_and_no_process(number: signal.Signals, tmp_path: Path):
    command = [sys.executable, "-m", "gpt2lite", "bench", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert errors.strip() == "gpt2lite: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_without_utf8_is_no_error():
    command = [sys.executable, "-m", "gpt2lite", "generate", "--prompt", "é", "--max-new-tokens", "3"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("?")


def test_bench_compares_half_precision_by_a_wider_measure(tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=200, n_positions=32, n_embd=64, n_head=4, n_layer=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "hub")
    result = run("-m", "gpt2lite", "bench", tmp_path / "hub", "--strategies", "mmap", "--folder", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m gpt2lite generate | head -c 3"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("Onc", "")


# ---- several texts -----------------------------------------------------------------------------------------


def texts_of(output: str) -> list[str]:
    """What stands between the rules."""
    return [text.rstrip("\n") for text in output.split("─" * 40 + "\n")]


def generated(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_prompts_of_a_file_each_get_what_they_get_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = ["Anna", "Ben", "Clara", "Max", "Leo", "Ida", "Otto", "Rosa", "Vera", "Tom"]
    prompts = [f"Once upon a time {name}" for name in names]
    prompts[3] += " and a friend went"
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(prompts) + "\n")
    found = texts_of(generated(capsys, "--prompts", str(path), "--max-new-tokens", "20"))
    alone = [
        generated(capsys, "--prompt", prompt, "--max-new-tokens", "20").rstrip("\n") for prompt in prompts
    ]
    assert found == alone


def test_prompts_come_from_standard_input():
    command = [sys.executable, "-m", "gpt2lite", "generate", "--prompts", "-", "--max-new-tokens", "5"]
    result = subprocess.run(command, input="Anna\nBen was\n", capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    first, second = texts_of(result.stdout)
    assert first.startswith("Anna")
    assert second.startswith("Ben was")


def test_samples_have_seeds_that_follow_each_other(capsys: pytest.CaptureFixture[str]):
    options = ("--temperature", "1", "--max-new-tokens", "12")
    several = texts_of(generated(capsys, *options, "--num-samples", "3", "--seed", "5"))
    alone = [generated(capsys, *options, "--seed", str(seed)).rstrip("\n") for seed in (5, 6, 7)]
    assert several == alone
    assert len(set(several)) == 3


def test_a_stop_string_ends_the_text_before_it(capsys: pytest.CaptureFixture[str]):
    whole = generated(capsys, "--max-new-tokens", "60")
    assert "." in whole
    assert generated(capsys, "--max-new-tokens", "60", "--stop", ".") == whole[: whole.index(".")] + "\n"


def test_a_window_goes_on_past_the_context(capsys: pytest.CaptureFixture[str]):
    words = ("--prompt", "Anna " * 200, "--max-new-tokens", "300")
    assert main(["generate", *words]) == 1
    assert "window" in capsys.readouterr().err
    assert len(generated(capsys, *words, "--window", "64")) > len("Anna " * 200) + 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-samples", "0"), "--num-samples must be at least 1, got 0"),
        (("--num-samples", "2"), "needs a --temperature above 0"),
        (("--prompts", "/dev/null"), "/dev/null: no line with a prompt"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
        (("--top-p", "2", "--temperature", "1"), "top_p"),
        (("--min-p", "-1", "--temperature", "1"), "min_p"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--window", "256"), "window must be an int in 1 … 255"),
        (("--engine", "cuda_graph"), 'engine="cuda_graph" cannot run this model'),
        (("--quantize", "int8", "--strategy", "mmap"), "stream"),
    ],
)
def test_a_wrong_option_of_generate_is_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_text_without_an_end_is_refused_at_its_beginning(tmp_path: Path):
    with pytest.raises(UsageError, match="/dev/zero: holds NUL behind 0 characters, so it is no text"):
        read_text("/dev/zero")
    with pytest.raises(UsageError, match="/dev/urandom: "):
        read_text("/dev/urandom")

"""The conditions of real use: full disks, limits, pipes, signals, settings of the caller's process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from conftest import TINY

import gpt2lite
from gpt2lite import (
    GPTModel,
    Recipe,
    Task,
    TrainingForecast,
    UsageError,
    finetune,
    forecast_training,
    save_per_tensor,
)

PACKAGE = Path(gpt2lite.__file__).parent
HEADS = {"n_heads": 4}
MODULE = (sys.executable, "-m", "gpt2lite")
STORY = "Once upon a time there lived a cat. "


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=500, **options)


def python(program: str, *words: object, **environment: str) -> str:
    """What a program prints in a fresh process that warns of nothing."""
    done = run(sys.executable, "-c", program, *words, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def training(text: Path, out: Path, *more: object) -> list[str]:
    """The words of a short run on a text."""
    words = ("finetune", "--text", text, "--out", out, "--batch-size", 1, "--seq-len", 16, *more)
    return [*MODULE, *map(str, words)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(STORY * 300)
    return path


# ---- disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    run("umount", "-l", disk)


def test_a_full_disk_is_named_with_what_is_missing(small_disk: Path, pth: Path, text: Path):
    text.write_text(STORY * 200_000)
    (small_disk / "full").write_bytes(bytes(900 << 10))
    kept = set(text.parent.iterdir())
    wordy = {"prune": ("--blocks", 0, 1), "convert": ()}
    for command, more in wordy.items():
        done = run(*MODULE, command, pth, small_disk / "new.pth", "--n-heads", 4, *more)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{small_disk}: No space left on device: needs " in done.stderr
        assert "are missing. Free some" in done.stderr
    for words in ([*MODULE, "tokenize", text, small_disk / "new.npy"], training(text, small_disk / "new")):
        done = run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{small_disk}: No space left on device: " in done.stderr
        assert " bytes are free" in done.stderr
    assert (os.listdir(small_disk), set(text.parent.iterdir())) == (["full"], kept)


def test_a_run_that_fills_its_disk_says_so_and_leaves_a_whole_state(small_disk: Path):
    program = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import TINY
from gpt2lite import *
import torch
rows = torch.arange(34).view(2, 17)
task = Task(lambda n: Batch(rows[:, :-1], rows[:, 1:]), [])
try:
    finetune(GPTModel(TINY), task, Path(sys.argv[1]) / "out", Recipe(steps=9, save_every=1, keep=9))
except OSError as error:
    print(error.errno, error)
"""
    number, said = python(program, small_disk, Path(__file__).parent).split(maxsplit=1)
    assert int(number) == errno.ENOSPC
    assert "are missing" in said
    assert str(small_disk / "out") in said
    assert not [*(small_disk / "out").glob(".*")]


def test_the_tokens_of_a_run_go_beside_its_folder_and_leave_nothing(text: Path, small_disk: Path):
    text.write_text(STORY * 200_000)  # more than the temporary folder takes
    out = text.parent / "new" / "out"
    done = run(*training(text, out, "--steps", 1), env=os.environ | {"TMPDIR": str(small_disk)})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert not [path for path in out.iterdir() if path.name.startswith((".", "tmp"))]


def test_a_cache_of_numba_on_a_full_disk_leaves_the_text_to_torch(small_disk: Path):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    words = (*MODULE, "generate", "--engine", "numba", "--max-new-tokens", 4)
    wanted = run(*words[:-3], "torch", *words[-2:])
    with (small_disk / "full").open("wb") as file, pytest.raises(OSError, match="No space"):
        file.write(bytes(2 << 20))
    done = run(*words, env=os.environ | {"NUMBA_CACHE_DIR": str(small_disk)})
    assert (done.returncode, done.stdout) == (0, wanted.stdout)
    assert done.stderr.count("\n") == 1
    assert "torch generates instead" in done.stderr


# ---- limits ------------------------------------------------------------------------------------------------


def test_a_mapped_model_keeps_no_descriptor(model: GPTModel, tmp_path: Path):
    folder = save_per_tensor(model, tmp_path / "tensors")
    assert len([*folder.iterdir()]) > 46
    program = f"""
import os, resource, sys
from gpt2lite import GPTModel
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
model = GPTModel.from_checkpoint(sys.argv[1], strategy="mmap", config={HEADS})
print(len(os.listdir("/proc/self/fd")) - before)
model.generate([[1]], 3)
del model
"""
    assert python(program, folder).split() == ["0"]


def test_without_a_descriptor_left_the_file_is_named(pth: Path):
    program = f"""
import resource, sys
from gpt2lite import GPTModel
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    GPTModel.from_checkpoint(sys.argv[1], strategy="mmap", config={HEADS})
except OSError as error:
    print(error)
"""
    assert f"Too many open files: '{pth}'" in python(program, pth)


UNABLE = {  # what the system refuses to start, as it refuses it, and how memory is measured then
    "processes": ("subprocess.Popen.__init__ = no_process", "every 10 ms by a thread"),
    "both": (
        "subprocess.Popen.__init__, threading.Thread.start = no_process, no_thread",
        "read at the beginning and at the end alone, since no process or thread could be started",
    ),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("unable", UNABLE)
def test_without_processes_or_threads_everything_works_and_says_how(unable: str, pth: Path):
    program = f"""
import subprocess, sys, threading
import torch
from gpt2lite import GPTModel, convert, track_memory
def no_process(*_, **__):
    raise BlockingIOError(11, "Resource temporarily unavailable")
def no_thread(*_):
    raise RuntimeError("can't start new thread")
model = GPTModel.from_checkpoint(sys.argv[1], strategy="stream", config={HEADS})
{UNABLE[unable][0]}
with track_memory() as memory:
    held = torch.ones(20 << 18)
print(memory.method)
print(memory.peak_host_anonymous >> 20 >= 19, "can be missing" in memory.report())
again = GPTModel.from_checkpoint(sys.argv[1], strategy="stream", config={HEADS})
print(all(map(torch.equal, model.state_dict().values(), again.state_dict().values())))
for name in ("new.pth", "new.safetensors"):
    print(convert(sys.argv[1], sys.argv[1] + name, config={HEADS}).stat().st_size > 1000)
"""
    method, *found = python(program, pth).splitlines()
    assert UNABLE[unable][1] in method
    assert found == [f"True {unable == 'both'}", "True", "True", "True"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_where_the_sampling_process_dies_the_report_says_so():
    program = """
import os, signal, time
from pathlib import Path
import torch
from gpt2lite import track_memory
with track_memory() as memory:
    held = torch.ones(20 << 18)
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
print(memory.peak_host_anonymous >> 20 >= 19, len(memory.timeline), "sampled every" in memory.method)
print(memory.report())
"""
    found = python(program)
    assert found.startswith("True 0 False")
    assert "alone, since the helper process that sampled it died: a peak between can be missing" in found


def test_from_a_zip_memory_is_sampled_as_ever(tmp_path: Path):
    archive = tmp_path / "gpt2lite.zip"
    with zipfile.ZipFile(archive, "w") as written:
        for path in PACKAGE.rglob("*"):
            if path.suffix in (".py", ".pyi"):
                written.write(path, path.relative_to(PACKAGE.parent))
    program = """
import gpt2lite
with gpt2lite.track_memory() as memory:
    pass
print(gpt2lite.__file__)
print(memory.method, len(memory.timeline) > 0)
"""
    file, method = python(f"import sys\nsys.path.insert(0, sys.argv[1])\n{program}", archive).splitlines()
    assert str(archive) in file
    assert method.endswith("sampled every 2 ms by a helper process True")


FORKED = """
import os, sys, warnings
import torch
from gpt2lite import GPTModel, UsageError
model = GPTModel.from_checkpoint(sys.argv[1])
wanted = model.generate([[1]], 9, engine=sys.argv[2])[0].tolist()
def write(engine="auto"):
    try:
        print(model.generate([[1]], 9, engine=engine)[0].tolist() == wanted, flush=True)
    except UsageError as error:
        print(error, flush=True)
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from Python 3.12 on
if os.fork():
    os.wait()
else:
    write()
    torch.set_num_threads(1)
    write()
    write("numba")
    os._exit(0)
write(sys.argv[2])
"""


def test_a_forked_child_generates_without_threads_or_says_what_to_do(
    model: GPTModel, engine: str, tmp_path: Path
):
    path = model.save_checkpoint(tmp_path / "model.pth")
    found = python(FORKED, path, engine, OMP_NUM_THREADS="2", NUMBA_NUM_THREADS="2").splitlines()
    assert (found[1], found[3]) == ("True", "True")
    assert "start it by spawn, or call torch.set_num_threads(1) in it first" in found[0]
    assert "cannot run this model: this process was forked from one that generated" in found[2]


# ---- settings of the caller --------------------------------------------------------------------------------

SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_setting_of_the_caller_changes_what_training_is_said_to_take(device: str):
    def predicted() -> TrainingForecast:
        recipe = Recipe(batch_size=2, autocast=True)
        return forecast_training(lambda: GPTModel(TINY), recipe, device, torch.float16)

    wanted = predicted()
    for setting in SETTINGS.values():
        with setting():
            assert predicted() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_a_callers_autocast_computes_and_generates(
    dtype: torch.dtype, precision: torch.dtype, model: GPTModel, engine: str
):
    model = model.to(dtype)
    wanted = model.generate([[1, 2], [3]], 5)
    with torch.autocast("cpu", precision):
        assert model(torch.tensor([[1, 2]])).isfinite().all()
        found = model.generate([[1, 2], [3]], 5)
    assert [len(row) for row in found] == [len(row) for row in wanted]


def test_a_plot_leaves_the_callers_backend(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    program = """
import sys
import matplotlib
from pathlib import Path
matplotlib.use("svg")
from gpt2lite.cli.plots import plot_losses
plot_losses([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}], Path(sys.argv[1]))
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    assert python(program, tmp_path / "loss.png").split() == ["svg", "False"]


# ---- words and files ---------------------------------------------------------------------------------------

PLAIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_prompt_is_read_as_utf8_whatever_the_locale():
    words = (*MODULE, "generate", "--max-new-tokens", "5", "--prompt")
    outputs = [
        run(*words, "Ünd café", env=os.environ | more | {"PYTHONIOENCODING": "utf-8"}) for more in ({}, PLAIN)
    ]
    assert [done.returncode for done in outputs] == [0, 0]
    assert outputs[0].stdout == outputs[1].stdout
    assert outputs[0].stdout.startswith("Ünd café")


def test_prompts_that_are_not_utf8_are_refused_wherever_they_come_from(tmp_path: Path):
    (tmp_path / "prompts").write_bytes(b"caf\xe9\n")
    for source in ("-", str(tmp_path / "prompts")):
        command = [*MODULE, "generate", "--prompts", source]
        done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True)
        assert (done.returncode, done.stdout) == (1, b"")
        assert f"{source}: not UTF-8 at byte 3".encode() in done.stderr
    typed = subprocess.run([*MODULE, "generate", "--prompt", b"caf\xe9"], capture_output=True)
    assert (typed.returncode, typed.stdout) == (1, b"")
    assert b"--prompt: not UTF-8" in typed.stderr


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="this system has no /dev/stdin")
@pytest.mark.parametrize("words", [("inspect",), ("generate", "--model"), ("convert",)])
def test_a_pipe_is_no_checkpoint_and_the_way_round_is_said(words: tuple[str, ...], pth: Path, tmp_path: Path):
    command = [*MODULE, *words, "/dev/stdin", *([str(tmp_path / "new.pth")] if words == ("convert",) else [])]
    done = subprocess.run(command, input=pth.read_bytes(), capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"/dev/stdin: is a FIFO, socket or device" in done.stderr
    assert b"Save it as one" in done.stderr
    with pth.open("rb") as file:
        redirected = subprocess.run([*MODULE, "inspect", "/dev/stdin"], stdin=file, capture_output=True)
    assert redirected.returncode == 0


def test_a_text_from_a_pipe_is_refused_by_its_name(text: Path):
    for words in (
        ["tokenize", "/dev/stdin", "new.npy"],
        ["finetune", "--text", "/dev/stdin", "--out", "new"],
    ):
        done = subprocess.run([*MODULE, *words], input=STORY.encode(), capture_output=True, cwd=text.parent)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"/dev/stdin: is no file; save it as one first" in done.stderr


@pytest.mark.parametrize("strategy", ["baseline", "sequential", "meta", "mmap", "stream"])
def test_a_pickle_that_is_called_safetensors_loads_by_every_strategy(
    strategy: str, pth: Path, model: GPTModel
):
    path = pth.rename(pth.with_suffix(".safetensors"))
    found = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_batches_that_are_pairs_are_refused_before_anything_is_made(model: GPTModel, tmp_path: Path):
    rows = torch.arange(34).view(2, 17)
    with pytest.raises(UsageError, match=r"wanted Batch\(ids, targets\), got tuple"):
        finetune(model, Task(lambda number: (rows[:, :-1], rows[:, 1:]), []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- a reader that goes away -------------------------------------------------------------------------------


def unheard(words: list[str]) -> tuple[int, str]:
    """The exit code and the errors of a command whose output nobody reads."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    return process.returncode, errors


def test_a_run_that_nobody_listens_to_is_finished_and_saved(text: Path, tmp_path: Path):
    words = training(text, tmp_path / "out", "--steps", 4, "--validate-every", 1)
    assert unheard(words) == (0, "")
    assert GPTModel.from_checkpoint(tmp_path / "out" / "model.pth").config.n_layers
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4


def test_other_commands_end_without_a_word_and_work_that_is_lost_is_an_error(pth: Path, tmp_path: Path):
    heads = ["--n-heads", "4"]
    assert unheard([*MODULE, "convert", str(pth), str(tmp_path / "new.pth"), *heads]) == (0, "")
    assert (tmp_path / "new.pth").exists()
    assert unheard([*MODULE, "inspect", str(pth)]) == (0, "")
    assert unheard([*MODULE, "--help"]) == (0, "")
    bench = [*MODULE, "bench", "--strategies", "mmap", "--json", str(tmp_path / "found.json")]
    assert unheard(bench) == (1, "")
    assert json.loads((tmp_path / "found.json").read_text())["results"]


# ---- signals -----------------------------------------------------------------------------------------------

AT_IMPORT = """
import os, runpy, signal, sys
awaited = sys.argv.pop(1)
class Pressing:
    def find_spec(self, name, *_):
        if name == awaited:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressing())
runpy.run_module("gpt2lite", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["gpt2lite.cli.arguments", "torch", "torch.nn", "psutil", "gpt2lite.model"])
def test_ctrl_c_during_the_imports_is_one_line(name: str):
    done = run(sys.executable, "-c", AT_IMPORT, name, "generate")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ngpt2lite: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_what_is_saved_and_how_to_go_on(number: signal.Signals, text: Path):
    out = text.parent / "out"
    words = training(text, out, "--steps", 4000, "--save-every", 100_000, "--validate-every", 100_000)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):  # a step is done
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (128 + number, "")
    (state,) = out.glob("step-*.pth")
    step = int(state.stem.removeprefix("step-"))
    said = f"{state} has step {step} of 4000; to go on, add --resume"
    assert errors == f"\n{said}\n\ngpt2lite: interrupted\n"


IN_A_STEP = """
import os, signal, sys
from gpt2lite.cli import main
import gpt2lite.finetuning.training as training
presses, done = int(sys.argv.pop(1)), []
loss_sum, pressed = training.loss_sum, []
def pressing(*args):
    done.append(None)
    for _ in range(presses if len(done) == 3 else 0):
        pressed.append(None)
        os.kill(os.getpid(), signal.SIGINT)
    return loss_sum(*args)
training.loss_sum = pressing
code = main(sys.argv[1:])
print(code, len(pressed))
"""


@pytest.mark.parametrize(("presses", "step"), [(1, 3), (5, 2)])
def test_a_second_ctrl_c_does_not_wait_for_the_step(presses: int, step: int, text: Path):
    out = text.parent / "out"
    words = training(text, out, "--steps", 400, "--save-every", 100)[len(MODULE) :]
    done = run(sys.executable, "-c", IN_A_STEP, presses, *words)
    assert done.stdout.split() == ["130", f"{min(presses, 2)}"]
    assert [path.name for path in out.glob("step-*")] == [f"step-{step:06}.pth"]
    assert f"has step {step} of 400" in done.stderr

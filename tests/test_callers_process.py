"""The process belongs to the caller: a public function changes nothing global, and no default changes it."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import in_threads, randomise
from torch import nn

from gpt2lite import (
    GPT2LiteError,
    GPTConfig,
    GPTModel,
    convert,
    evaluate,
    forecast,
    load_module,
    open_model,
    save_per_tensor,
)
from gpt2lite.verification import verify

HEADS = {"n_heads": 4}
Work = Callable[[], object]
States = dict[str, object]


class Caller:
    """What a caller has: a model, its checkpoint, ids of a text."""

    def __init__(self, model: GPTModel, pth: Path) -> None:
        self.model, self.pth, self.folder, self.count = model, pth, pth.parent, 0
        self.ids = torch.arange(40, device="cpu") % 31

    def new(self) -> Path:
        """A path that is still free."""
        self.count += 1
        return self.folder / f"new-{threading.get_ident()}-{self.count}"

    def abandoned(self) -> torch.Tensor:
        tokens = self.model.generate_tokens([[1, 2]], 9)
        first = next(tokens)
        del tokens
        return first

    def between_tokens(self) -> States:
        tokens = self.model.generate_tokens([[1, 2]], 9)
        next(tokens)
        return global_state()


def engine_of(name: str) -> Callable[[Caller], object]:
    return lambda caller: caller.model.generate([[1, 2], [3]], 9, engine=name, repetition_penalty=1.2)


FUNCTIONS: dict[str, Callable[[Caller], object]] = {
    "generate": engine_of("torch"),
    "generate, numba": engine_of("numba"),
    "generate, seeded": lambda caller: caller.model.generate([[1, 2]], 9, temperature=1.0, seed=3),
    "generate_tokens": lambda caller: torch.cat(list(caller.model.generate_tokens([[1, 2]], 9)), 1),
    "generate_tokens, abandoned": Caller.abandoned,
    "evaluate": lambda caller: evaluate(caller.model, caller.ids).nats,
    "model": lambda caller: caller.model(caller.ids[None, :9]).detach(),
    "GPTModel": lambda caller: [*GPTModel(caller.model.config).state_dict()],
    "from_checkpoint": lambda caller: GPTModel.from_checkpoint(caller.pth, config=HEADS).state_dict(),
    "from_checkpoint, mmap": lambda caller: GPTModel.from_checkpoint(
        caller.pth, strategy="mmap", config=HEADS
    ).state_dict(),
    "from_checkpoint, int8": lambda caller: GPTModel.from_checkpoint(
        caller.pth, quantize="int8", config=HEADS
    ).state_dict(),
    "open_model": lambda caller: open_model(caller.pth, config=HEADS).config,
    # sequential and baseline do build the model in the default dtype, and say what that costs
    "forecast": lambda caller: forecast(caller.pth, config=HEADS)["stream"],
    "load_module": lambda caller: load_module(lambda: GPTModel(caller.model.config), caller.pth).state_dict(),
    "convert": lambda caller: read_back(convert(caller.pth, caller.new(), to="huggingface", config=HEADS)),
    "save_checkpoint": lambda caller: read_back(
        caller.model.save_checkpoint(caller.new().with_suffix(".pth")), config=None
    ),
    "save_per_tensor": lambda caller: read_back(save_per_tensor(caller.model, caller.new())),
    "verify": lambda caller: (
        verify(
            lambda: GPTModel.from_checkpoint(caller.pth, config=HEADS), open_model(caller.pth, config=HEADS)
        ).passed
    ),
}
DRAWS = {"GPTModel"}  # initial values, from the caller's generator


def read_back(path: Path, config: dict | None = HEADS) -> dict[str, torch.Tensor]:
    return GPTModel.from_checkpoint(path, config=config).state_dict()


FAILURES: dict[str, Callable[[Caller], object]] = {
    "generate": lambda caller: caller.model.generate([[1]], 99),
    "generate, in a layer": lambda caller: broken(caller.model).generate([[1]], 9, engine="torch"),
    "evaluate, in a layer": lambda caller: evaluate(broken(caller.model), caller.ids),
    "from_checkpoint": lambda caller: GPTModel.from_checkpoint(caller.pth, config={"n_heads": 5}),
    "from_checkpoint, while it reads": lambda caller: GPTModel.from_checkpoint(
        caller.pth, config=HEADS, progress=fail
    ),
    "load_module": lambda caller: load_module(lambda: nn.Linear(3, 3), caller.pth),
    "convert": lambda caller: convert(
        caller.pth, caller.new(), to="huggingface", config=HEADS, progress=fail
    ),
    "evaluate, in a callback": lambda caller: evaluate(caller.model, caller.ids, progress=fail),
}


def fail(*_: object) -> None:
    raise OSError("the caller's own")


def broken(model: GPTModel) -> GPTModel:
    model.trf_blocks[1].register_forward_hook(fail)
    return model


@pytest.fixture
def caller(model: GPTModel, pth: Path) -> Caller:
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    count = torch.get_num_threads()
    numba.get_num_threads()  # its first start is what the test asks for, and sets torch's number
    torch.set_num_threads(count)
    return Caller(model, pth)


def global_state() -> States:
    import numba

    names = [name for name in signal.Signals if name not in (signal.SIGKILL, signal.SIGSTOP)]
    return {
        "torch's threads": torch.get_num_threads(),
        "numba's threads": numba.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "random state": torch.random.get_rng_state().tolist(),
        "signal handlers": [signal.getsignal(name) for name in names],
        "environment": dict(os.environ),
        "garbage collector": (gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.get_freeze_count()),
        "folder": os.getcwd(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def changed(before: States, *, draws: bool = False) -> set[str]:
    after = global_state()
    return {name for name in before if before[name] != after[name]} - ({"random state"} if draws else set())


@contextmanager
def two_threads_of_torch() -> Iterator[None]:
    """Another number than numba's, so that one that becomes the other's shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("collecting", [True, False], ids=["gc on", "gc off"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_global_is_changed(caller: Caller, function: str, collecting: bool):
    FUNCTIONS[function](caller)  # what is only set when it is first imported is not the function's
    with two_threads_of_torch():
        if not collecting:
            gc.disable()
        try:
            before = global_state()
            FUNCTIONS[function](caller)
            assert changed(before, draws=function in DRAWS) == set()
        finally:
            gc.enable()


@pytest.mark.parametrize("function", FAILURES)
def test_nothing_global_is_changed_by_a_failure(caller: Caller, function: str):
    with two_threads_of_torch():
        before = global_state()
        with pytest.raises(
            (OSError, GPT2LiteError), match=r"the caller's own|context|n_heads|does not fit|modules that fit"
        ):
            FAILURES[function](caller)
        assert changed(before) == set()


def test_nothing_global_is_changed_between_tokens(caller: Caller):
    before = global_state()
    between = caller.between_tokens()
    assert {name for name in before if before[name] != between[name]} == set()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_global_is_changed_by_two_threads(caller: Caller, function: str):
    with two_threads_of_torch():
        before = global_state()
        in_threads(2, lambda: FUNCTIONS[function](caller))
        assert changed(before, draws=function in DRAWS) == set()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DEFAULTS: dict[str, list[Callable[[], object]]] = {
    "float64": [lambda: default_dtype(torch.float64)],
    "bfloat16": [lambda: default_dtype(torch.bfloat16)],
    "meta": [lambda: default_device("meta")],
    "a device context": [lambda: torch.device("meta")],
    "no_grad": [torch.no_grad],
    "inference_mode": [torch.inference_mode],
    "deterministic": [deterministic],
    "all": [
        lambda: default_dtype(torch.float64),
        lambda: default_device("meta"),
        torch.no_grad,
        deterministic,
    ],
}


def plain(found: object) -> object:
    """What can be compared with ==, dtypes and bits included."""
    if isinstance(found, torch.Tensor):
        return str(found.dtype), str(found.device), found.detach().cpu().tolist()
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    return [plain(each) for each in found] if isinstance(found, list) else found


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_default_changes_a_result(caller: Caller, function: str, default: str):
    wanted = plain(FUNCTIONS[function](caller))
    with ExitStack() as stack:
        for enter in DEFAULTS[default]:
            stack.enter_context(enter())
        before = global_state()
        found = FUNCTIONS[function](caller)
        assert changed(before, draws=function in DRAWS) == set()
    assert plain(found) == wanted


NAIVE = ("baseline", "sequential")  # they build the whole model first, as the article does


@pytest.mark.parametrize("strategy", NAIVE)
def test_the_naive_strategies_do_not_draw(caller: Caller, strategy: str):
    before = global_state()
    GPTModel.from_checkpoint(caller.pth, strategy=strategy, config=HEADS)
    assert changed(before) == set()


@pytest.mark.parametrize("strategy", NAIVE)
def test_the_naive_strategies_load_under_a_meta_default(caller: Caller, strategy: str):
    with default_device("meta"):
        GPTModel.from_checkpoint(caller.pth, strategy=strategy, config=HEADS)


def test_a_model_loaded_in_inference_mode_trains(caller: Caller):
    with torch.inference_mode():
        model = GPTModel.from_checkpoint(caller.pth, config=HEADS)
    model(caller.ids[None, :9]).sum().backward()
    assert model.tok_emb.weight.grad is not None


def test_the_functions_under_test_tell_models_apart(caller: Caller):
    """Or nothing above would fail."""
    other = Caller(randomise(GPTModel(GPTConfig.of(caller.model.config)), seed=1), caller.pth)
    for function in ("generate", "evaluate", "model"):
        assert plain(FUNCTIONS[function](caller)) != plain(FUNCTIONS[function](other))

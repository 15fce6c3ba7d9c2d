"""`load_module` with modules that keep, compute or load things their own way: torch's result or a refusal."""

from __future__ import annotations

import types
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from gpt2lite import CheckpointError, InsufficientMemoryError, UsageError, load_module
from gpt2lite.loading.skeleton import sketch
from gpt2lite.loading.strategies import STRATEGIES

ONE_FILE = [name for name in STRATEGIES if name != "per_tensor"]
BUILT = ("sequential", "baseline")
ALL = ("auto", *ONE_FILE)


@dataclass
class Holder:
    """A plain object with a tensor."""

    pos: Tensor


class Slotted:
    """A plain object without a dict."""

    __slots__ = ("pos",)

    def __init__(self, pos: Tensor) -> None:
        self.pos = pos


class Keeps(nn.Module):
    """Keeps a tensor in a plain attribute, and adds it to what its layer gives."""

    def __init__(self, keep: Callable[[Tensor], Any], find: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.kept, self.find = nn.Linear(3, 3), keep(torch.arange(3.0)), find

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.find(self.kept)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class WithNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(3, 3), torch.linspace(0, 1, 3).numpy()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.from_numpy(self.steps)


class Branches(nn.Module):
    """Reads the value of a tensor, and asks a parameter for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3) if torch.ones(1) > 0 else nn.Identity()
        self.device = self.layer.weight.device

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(3, device=self.device)


class ReadsItsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.ones_(self.layer.weight)
        self.scale = self.layer.weight.sum().item()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


class Aliases(nn.Module):
    """Keeps a view of a parameter that it made with values, after reading a value."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.linspace(0, 1, 3)[1].item()
        weight = nn.Parameter(torch.ones(3))
        self.first = [weight[:1]]
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.first[0] * self.rate


class UnsavedAlias(nn.Module):
    """An unsaved buffer that is a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(3))
        self.register_buffer("alias", weight.data, persistent=False)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.alias


class UnsavedOfAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.ones_(self.layer.weight)
        self.register_buffer("total", self.layer.weight.detach().sum(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.total


class HiddenLayers(nn.Module):
    """Layers in a plain list: no part of the state dict, and all the same computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.more = nn.Linear(3, 3), [nn.LayerNorm(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.more[0](self.layer(x))


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.saved = nn.Buffer(torch.ones(3))
        self.unsaved = nn.Buffer(torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.saved + self.unsaved


class Hooked(nn.Module):
    """Adds a tensor in a forward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.layer.register_forward_hook(partial(self.add, torch.arange(3.0)))

    @staticmethod
    def add(what: Tensor, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + what

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def in_a_closure(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor * 1


KEPT: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "attribute": (lambda t: t, lambda kept: kept),
    "list": (lambda t: [t], lambda kept: kept[0]),
    "dict of tuples": (lambda t: {"a": (t,)}, lambda kept: kept["a"][0]),
    "set": (lambda t: {t}, lambda kept: next(iter(kept))),
    "deque": (lambda t: deque([t]), lambda kept: kept[0]),
    "SimpleNamespace": (lambda t: types.SimpleNamespace(pos=t), lambda kept: kept.pos),
    "partial": (lambda t: partial(torch.add, t), lambda kept: kept(0)),
    "partial by keyword": (lambda t: partial(torch.add, other=t), lambda kept: kept(torch.zeros(3))),
    "dataclass": (Holder, lambda kept: kept.pos),
    "slots": (Slotted, lambda kept: kept.pos),
    "closure": (in_a_closure, lambda kept: kept()),
}


class FirstOfTwo(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(3, 1, batch_first=True)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.att(x, x, x)[0][0])


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 3))


# Of these, what can be filled without building it with memory.
ON_META = {
    *KEPT,
    "weight_norm",
    "spectral_norm",
    "attention and batch norm",
    "WithNumpy",
    "WithBuffer",
    "Hooked",
}
BUILDS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(Keeps, *functions) for name, functions in KEPT.items()},
    "LSTM": partial(Recurrent, nn.LSTM),
    "GRU": partial(Recurrent, nn.GRU),
    "bare LSTM": lambda: FirstOfTwo(nn.LSTM(3, 3)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "orthogonal by cayley": lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "attention and batch norm": Attention,
    "old weight_norm": old_weight_norm,
    **{
        kind.__name__: kind
        for kind in (WithNumpy, Branches, ReadsItsParameter, Aliases, UnsavedAlias, UnsavedOfAParameter)
    },
    **{kind.__name__: kind for kind in (HiddenLayers, WithBuffer, Hooked)},
}


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand(parameter.shape))
    return module


def plain(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """What torch's own `load_state_dict` makes."""
    torch.manual_seed(0)
    module = build()
    module.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path))
    return module.eval()


@torch.no_grad()
def assert_same(module: nn.Module, wanted: nn.Module, x: Tensor) -> None:
    assert torch.equal(module(x), wanted(x))
    state = module.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("name", BUILDS)
def test_a_module_is_loaded_as_plain_torch_does_or_refused_with_a_strategy_that_can(
    name: str, strategy: str, tmp_path: Path
):
    build, path = BUILDS[name], tmp_path / "model.pth"
    torch.save(randomised(build()).state_dict(), path)
    torch.manual_seed(0)
    if strategy in ("auto", *BUILT) or name in ON_META:
        assert_same(load_module(build, path, strategy=strategy), plain(build, path), torch.rand(4, 3, 3))
    else:
        with pytest.raises(UsageError, match=r'cannot be built on meta .* needs strategy="sequential"'):
            load_module(build, path, strategy=strategy)


@pytest.mark.parametrize("strategy", ["auto", "stream", "baseline"])
def test_gradients_reach_what_a_recurrent_layer_computes_with(strategy: str, tmp_path: Path):
    torch.save(nn.LSTM(3, 3).state_dict(), tmp_path / "model.pth")
    if strategy == "stream":
        with pytest.raises(UsageError, match="_flat_weights"):
            load_module(lambda: nn.LSTM(3, 3), tmp_path / "model.pth", strategy=strategy)
        return
    loaded = load_module(lambda: nn.LSTM(3, 3), tmp_path / "model.pth", strategy=strategy)
    assert all(a is b for a, b in zip(loaded._flat_weights, loaded.parameters(), strict=True))


# ---- modules that load themselves --------------------------------------------------------------------------


class PreHook(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self._register_load_state_dict_pre_hook(self.double)

    def double(self, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2


class PublicPreHook(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_load_state_dict_pre_hook(self.double)

    def double(self, _module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[prefix + "weight"].mul_(2)


class PostHook(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_load_state_dict_post_hook(self.double)

    def double(self, *_: object) -> None:
        self.weight.data.mul_(2)


class Renames(nn.Linear):
    """Loads what an older version called `kernel`."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        if prefix + "kernel" in state:
            state[prefix + "weight"] = state.pop(prefix + "kernel")


class Versioned(nn.Linear):
    """Adds 1 to what was saved before version 3."""

    _version = 3

    def __init__(self) -> None:
        super().__init__(3, 3)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, meta: Any, *rest: Any) -> None:
        if meta.get("version", 1) < 3:
            state[prefix + "weight"] = state[prefix + "weight"] + 1
        super()._load_from_state_dict(state, prefix, meta, *rest)


class LoadsAll(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({name: tensor * 2 for name, tensor in state.items()}, *args, **kwargs)


class ExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = 1.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(7.0)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state.item()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


OWN: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (PreHook, PublicPreHook, PostHook, Renames, Versioned, LoadsAll, ExtraState)
}
INSIDE = {
    f"inside, {name}": lambda kind=kind: nn.Sequential(nn.Linear(3, 3), kind(), nn.BatchNorm1d(4))
    for name, kind in OWN.items()
    if name != "LoadsAll"  # torch asks only the outermost module
}
OLDER = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "BatchNorm": lambda: nn.BatchNorm1d(4),
}


def stored_state(name: str, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    module = old_weight_norm() if name == "weight_norm" else build()
    state = randomised(module).state_dict()
    if name == "BatchNorm":
        del state["num_batches_tracked"]
        state._metadata[""]["version"] = 1
    if name == "Renames":
        state["kernel"] = state.pop("weight")
    return state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".legacy.pth"])
@pytest.mark.parametrize("name", [*OWN, *INSIDE, *OLDER])
def test_a_module_that_loads_itself_is_given_to_its_own_load_state_dict(
    name: str, suffix: str, tmp_path: Path
):
    build, path = (OWN | INSIDE | OLDER)[name], tmp_path / f"model{suffix}"
    state = stored_state(name, build)
    if suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in suffix)
    wanted, x = plain(build, path), torch.rand(2, 4, 3)
    for strategy in ("auto", "baseline"):
        assert_same(load_module(build, path, strategy=strategy), wanted, x)
    for strategy in set(ONE_FILE) - {"baseline"}:
        with pytest.raises(UsageError, match=r'a module that loads itself .*"baseline"'):
            load_module(build, path, strategy=strategy)


def test_versions_are_found_behind_a_wrapper_and_a_prefix(tmp_path: Path):
    state = nn.Sequential(Versioned()).state_dict()
    wrapped = type(state)((f"module.{name}", tensor) for name, tensor in state.items())
    wrapped._metadata = {f"module.{name}".rstrip("."): version for name, version in state._metadata.items()}
    torch.save({"model": wrapped, "step": 3}, tmp_path / "model.pth")
    loaded = load_module(lambda: nn.Sequential(Versioned()), tmp_path / "model.pth")
    assert torch.equal(loaded[0].weight, state["0.weight"])


def test_dtype_casts_a_module_that_loads_itself(tmp_path: Path):
    torch.save(PreHook().state_dict(), tmp_path / "model.pth")
    loaded = load_module(PreHook, tmp_path / "model.pth", dtype=torch.bfloat16)
    wanted = PreHook().to(torch.bfloat16)
    wanted.load_state_dict(torch.load(tmp_path / "model.pth"))
    assert torch.equal(loaded.weight, wanted.weight)


def test_what_a_modules_own_loading_refuses_is_a_checkpoint_error(tmp_path: Path):
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match=r"model.pth: load_state_dict of PreHook refuses it: (?s:.*)bias"
    ):
        load_module(PreHook, tmp_path / "model.pth")


def test_a_module_that_loads_itself_is_refused_where_baseline_does_not_fit(tmp_path: Path):
    torch.save(PreHook().state_dict(), tmp_path / "model.pth")
    with pytest.raises(InsufficientMemoryError, match="baseline would take"):
        load_module(PreHook, tmp_path / "model.pth", max_host_memory="50B")


class ExtraDict(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": 7}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


@pytest.mark.parametrize("strategy", ["auto", "baseline", "stream"])
def test_an_extra_state_that_is_no_tensor_is_refused_by_name(strategy: str, tmp_path: Path):
    torch.save(nn.Sequential(ExtraDict()).state_dict(), tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"0._extra_state of the module is no tensor.*use torch.load and"):
        load_module(lambda: nn.Sequential(ExtraDict()), tmp_path / "model.pth", strategy=strategy)


def test_an_averaged_model_loads_into_one_and_into_the_plain_module(tmp_path: Path):
    averaged = AveragedModel(net := nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    averaged.update_parameters(net)
    torch.save(averaged.state_dict(), path := tmp_path / "model.pth")
    build = lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))  # noqa: E731
    assert_same(load_module(build, path), net.eval(), torch.rand(2, 3))
    again = load_module(lambda: AveragedModel(build()), path)
    assert again.n_averaged == 1
    assert torch.equal(again.module[1].weight, net[1].weight)


def test_batch_norm_needs_no_loading_of_its_own(tmp_path: Path):
    build = lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))  # noqa: E731
    torch.save(randomised(build()).state_dict(), tmp_path / "model.pth")
    loaded = load_module(build, tmp_path / "model.pth", strategy="stream")
    assert_same(loaded, plain(build, tmp_path / "model.pth"), torch.rand(2, 3))


class Drawn(nn.Module):
    """An unsaved buffer of random numbers, as random Fourier features have it, drawn after an initialiser."""

    def __init__(self, seed: int | None = None, before: bool = False) -> None:
        super().__init__()
        if seed is not None and not before:
            torch.manual_seed(seed)
        self.layer = nn.Linear(3, 3)
        if seed is not None and before:
            torch.manual_seed(seed)
        self.register_buffer("drawn", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.drawn


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("build", [partial(Drawn, 9), partial(Drawn, 9, before=True), Drawn])
def test_an_unsaved_buffer_that_is_drawn_is_as_torch_draws_it(
    build: Callable[[], nn.Module], strategy: str, tmp_path: Path
):
    torch.save(nn.Sequential(Drawn(1)).state_dict(), path := tmp_path / "model.pth")
    torch.manual_seed(5)
    plain = nn.Sequential(build()).eval()
    plain.load_state_dict(torch.load(path, weights_only=True))
    torch.manual_seed(5)
    able = strategy in (*BUILT, "auto") or getattr(build, "keywords", {}).get("before")
    with nullcontext() if able else pytest.raises(UsageError, match=r"cannot be built on meta \(0.drawn\)"):
        loaded = load_module(lambda: nn.Sequential(build()), path, "cpu", strategy)
        assert torch.equal(loaded(torch.ones(2, 3)), plain(torch.ones(2, 3)))


class DrawnAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drawn = nn.Linear(3, 3), torch.randn(3)


class Unwritten(nn.Module):
    """An unsaved buffer, as a cache of keys and values is one, to which its constructor writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("cache", torch.empty(2, 512, 512), persistent=False)


@pytest.mark.parametrize(("build", "name"), [(DrawnAttribute, "drawn"), (Unwritten, "cache")])
@pytest.mark.parametrize("strategy", ["meta", "mmap", "stream"])
def test_values_that_two_builds_do_not_share_are_named(
    build: Callable[[], nn.Module], name: str, strategy: str, tmp_path: Path
):
    torch.save(build().state_dict(), path := tmp_path / "model.pth")
    with pytest.raises(UsageError, match=rf"cannot be built on meta \({name}\)"):
        load_module(build, path, "cpu", strategy)
    assert torch.equal(load_module(build, path).layer.weight, torch.load(path)["layer.weight"])


# ---- what the process keeps between modules ----------------------------------------------------------------


@cache
def cached_mask(size: int) -> Tensor:
    mask = torch.empty(size, size)
    return mask.fill_(-torch.inf).triu_(1)


CACHE: dict[int, Tensor] = {}


def cached_rope(size: int) -> Tensor:
    if size not in CACHE:
        CACHE[size] = torch.outer(torch.arange(size), 1 / 10 ** torch.linspace(0, 1, size)).cos()
    return CACHE[size]


class Caching(nn.Module):
    """Takes its tables from where every module of the process takes them."""

    def __init__(self, size: int, persistent: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
        for layer in self.layers:
            layer.register_buffer("mask", cached_mask(size), persistent=persistent)
        self.rope = cached_rope(size)
        self.scale = nn.Parameter(cached_rope(size)[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x * self.rope) * self.scale + layer.mask.exp()
        return x


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("persistent", [True, False])
def test_what_a_constructor_caches_stays_real(strategy: str, persistent: bool, tmp_path: Path):
    cached_mask.cache_clear()
    CACHE.clear()
    build = lambda: Caching(600, persistent)  # noqa: E731 (a mask of more than 1 MiB)
    path, x = tmp_path / "model.pth", torch.rand(600, 600)
    torch.save(Caching(600, persistent).state_dict(), path)
    for _ in range(2):
        cached_mask.cache_clear()
        CACHE.clear()
        first, second = (load_module(build, path, strategy=strategy) for _ in range(2))
        assert_same(first, plain(build, path), x)
        assert_same(second, plain(build, path), x)
        assert build()(x).isfinite().all()


class Sets(nn.Module):
    """Goes on with its own name of a parameter once it is registered."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(3))
        self.weight = weight
        self.same = weight
        weight.requires_grad = False
        nn.init.zeros_(weight)


def test_a_parameter_that_is_registered_goes_by_its_first_name_too(tmp_path: Path):
    torch.save(Sets().state_dict(), tmp_path / "model.pth")
    loaded = load_module(Sets, tmp_path / "model.pth", strategy="stream")
    assert loaded.same is loaded.weight
    assert not loaded.weight.requires_grad


class Waits(nn.Module):
    """While it is built, another thread builds, too."""

    other: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        thread = Thread(target=lambda: setattr(Waits, "other", WithBuffer()))
        thread.start()
        thread.join()


def test_other_threads_build_real_modules_meanwhile(tmp_path: Path):
    before = nn.Module.register_parameter, nn.Module.register_buffer
    torch.save(Waits().state_dict(), tmp_path / "model.pth")
    load_module(Waits, tmp_path / "model.pth")
    assert not any(t.is_meta for t in (*Waits.other.parameters(), *Waits.other.buffers()))
    assert (nn.Module.register_parameter, nn.Module.register_buffer) == before


class Masked(nn.Module):
    """An attention layer with the mask that the book saves, 4 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.Parameter(torch.rand(1024, 1024))
        self.register_buffer("mask", torch.ones(1024, 1024).triu(1))


def test_large_tensors_that_a_checkpoint_fills_are_let_go_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
):
    held = []

    def build() -> nn.Module:
        module = nn.Sequential(*[Masked() for _ in range(5)])
        held.append([tensor.is_meta for tensor in module.state_dict().values()].count(False))
        return module

    assert sketch(build).lost == ()
    assert held == [1]


# ---- files that hold more than one module ------------------------------------------------------------------


def linear(value: int) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 3), float(value)), "bias": torch.full((3,), float(value))}


@pytest.mark.parametrize(
    "state",
    [
        {"model": linear(1), "ema": linear(2)},
        {"ema": linear(2), "model": linear(1)},
        {f"{owner}.{name}": t for owner in ("model", "ema") for name, t in linear(len(owner)).items()},
        {"model": {f"module.{name}": t for name, t in linear(1).items()}, "ema": linear(2)},
    ],
)
def test_two_modules_that_fit_are_an_error_that_names_both(state: dict[str, Any], tmp_path: Path):
    torch.save(state, tmp_path / "model.pth")
    fit = r"2 modules that fit, under '(ema|model)[.a-z]*' and '(ema|model)[.a-z]*'. Save the one"
    with pytest.raises(CheckpointError, match=fit):
        load_module(lambda: nn.Linear(3, 3), tmp_path / "model.pth")


@pytest.mark.parametrize("other", [{"ema": "same"}, {"optimizer": {"exp_avg": linear(2)}}])
def test_one_module_that_fits_is_loaded(other: dict[str, Any], tmp_path: Path):
    state = linear(1)
    beside = {"ema": state} if other == {"ema": "same"} else other
    torch.save({**beside, "model": state}, tmp_path / "model.pth")
    loaded = load_module(lambda: nn.Linear(3, 3), tmp_path / "model.pth")
    assert torch.equal(loaded.weight, state["weight"])


# ---- what is set on a tensor, and its dtype ----------------------------------------------------------------


class Doubling(nn.Parameter):
    """A parameter with a method."""

    def twice(self) -> Tensor:
        return 2 * self


class Marked(nn.Module):
    """Scales by what is set on its parameter, before or after it is registered."""

    def __init__(self, what: str) -> None:
        super().__init__()
        made = torch.ones(3) if what.startswith("value") else torch.empty(3)
        self.rate = torch.linspace(0, 1, 3)[1].item() if what.startswith("value") else 1.0
        weight = Doubling(made) if what == "subclass" else nn.Parameter(made)
        weight._no_weight_decay = True
        self.weight = weight
        weight.scale = torch.arange(3.0) if what == "tensor" else 3.0
        if what == "hook":
            weight.register_hook(lambda gradient: gradient * 5)
        if what == "post hook":
            weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.twice() if isinstance(self.weight, Doubling) else self.weight
        return x * weight * self.weight.scale * self.rate


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("what", ["number", "value", "tensor", "subclass", "hook", "post hook"])
def test_what_is_set_on_a_parameter_stays(what: str, strategy: str, tmp_path: Path):
    torch.save({"weight": torch.rand(3)}, path := tmp_path / "model.pth")
    wanted = plain(lambda: Marked(what), path)
    able = strategy in ("auto", *BUILT) or what in ("number", "value", "tensor")
    with nullcontext() if able else pytest.raises(UsageError, match=r"cannot be built on meta \(weight\)"):
        loaded = load_module(lambda: Marked(what), path, strategy=strategy)
        assert loaded.weight._no_weight_decay
        assert type(loaded.weight) is type(wanted.weight)
        for module in (loaded, wanted):
            module(torch.ones(3)).sum().backward()
        torch.testing.assert_close(loaded.weight.grad, wanted.weight.grad, rtol=0, atol=0)
        assert (loaded.weight.grad is None) == (what == "post hook")
        assert_same(loaded, wanted, torch.rand(2, 3))


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.register_buffer("idx", torch.tensor([1, 0, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("code", torch.tensor([1, 0, 1], dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[self.idx] * self.weight[self.mask].sum() * self.code


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("stored", [torch.uint8, torch.bool, torch.int32, torch.float32, torch.float16])
def test_numbers_that_count_take_the_dtype_that_the_module_built(
    stored: torch.dtype, strategy: str, tmp_path: Path
):
    state = Indexed().state_dict() | {"weight": torch.rand(3)}
    state |= {name: state[name].to(stored) for name in ("idx", "mask", "code")}
    torch.save(state, path := tmp_path / "model.pth")
    loaded = load_module(Indexed, path, strategy=strategy)
    assert_same(loaded, plain(Indexed, path), torch.rand(2, 3))
    assert (loaded.idx.dtype, loaded.mask.dtype, loaded.code.dtype) == (torch.int64, torch.bool, torch.int8)

"""A load: the fastest strategy that fits, run and proven, or one error that says what would help."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from gpt2lite.devices import CPU, resolve_device
from gpt2lite.errors import InsufficientMemoryError, UsageError, first_line, is_out_of_memory
from gpt2lite.loading.adapters import merge_adapters, with_adapters
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.options import LoadOptions
from gpt2lite.loading.plan import SMALLEST_RING, LoadPlan, Target
from gpt2lite.loading.skeleton import prove_complete, restore_unsaved_buffers
from gpt2lite.loading.strategies import AUTO, STRATEGIES
from gpt2lite.memory import Budget, find_budget, human


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a strategy would take, with the largest ring that fits, and which memory is too small for it.

    `lacking` says how many bytes of "host", "device" and "virtual" memory would be needed; it is empty where
    the load fits.
    """

    plan: LoadPlan
    forecast: Forecast
    lacking: Mapping[str, int]


def forecasts(plan: LoadPlan) -> dict[str, Forecast]:
    """What each strategy that can do what is planned would take. Milliseconds; allocates nothing."""
    able = {name: row for name, row in STRATEGIES.items() if not row.refuses(plan)}
    return {name: with_adapters(plan, row.forecast(plan)) for name, row in able.items()}


def judge(plan: LoadPlan, name: str, budget: Budget) -> Verdict:
    """Whether a strategy fits, its ring made as small as needed. Raises UsageError where it cannot do it."""
    if why := STRATEGIES[name].refuses(plan):
        raise UsageError(why)
    halves = itertools.takewhile(
        SMALLEST_RING.__le__, (plan.tuning.ring_bytes >> n for n in itertools.count())
    )
    for ring_bytes in [*halves] or [plan.tuning.ring_bytes]:
        fitted = replace(plan, tuning=replace(plan.tuning, ring_bytes=ring_bytes))
        forecast = with_adapters(fitted, STRATEGIES[name].forecast(fitted))
        verdict = Verdict(fitted, forecast, _lacking(fitted, forecast, budget))
        if not verdict.lacking:
            break
    return verdict


def _lacking(plan: LoadPlan, forecast: Forecast, budget: Budget) -> dict[str, int]:
    needed = {"device": forecast.peak_device, "host": forecast.peak_host_anonymous}
    if budget.host.admits(needed["host"]):
        needed["virtual"] = needed["host"]
        if forecast.peak_host_reclaimable or forecast.stays_mapped:  # a file that is mapped is mapped whole
            sources = {span.source for span in plan.spans.values()}
            needed["virtual"] += sum(plan.manifest.files[source].size for source in sources)
    return {place: nbytes for place, nbytes in needed.items() if not budget.of(place).admits(nbytes)}


def choose(plan: LoadPlan, strategy: str, budget: Budget) -> tuple[str, LoadPlan]:
    """The strategy to take and the plan for it.

    "auto" is the first of AUTO that can do what is planned and fits; a strategy that was named may count on
    swap. Raises UsageError for an unknown one and one that cannot do it; InsufficientMemoryError, before
    anything is allocated, where nothing fits.
    """
    if strategy not in ("auto", *STRATEGIES):
        raise UsageError(f"unknown strategy {strategy!r}; choose from auto, {', '.join(STRATEGIES)}")
    if strategy != "auto":
        budget = budget.with_swap()
    names = AUTO if strategy == "auto" else (strategy,)
    refused = {name: why for name in names if (why := STRATEGIES[name].refuses(plan))}
    if len(refused) == len(names):
        raise UsageError(f"{plan.manifest.path}: {'; '.join(dict.fromkeys(refused.values()))}")
    verdicts = {}
    for name in names:
        if name not in refused:
            verdicts[name] = judge(plan, name, budget)
            if not verdicts[name].lacking:
                return name, verdicts[name].plan
    raise _refusal(plan, strategy, budget, verdicts)


def _refusal(
    plan: LoadPlan, strategy: str, budget: Budget, verdicts: Mapping[str, Verdict]
) -> InsufficientMemoryError:
    """What was wanted, what there is, and what would help, a line each."""
    named = "" if strategy == "auto" else f' with strategy="{strategy}"'
    lines = [f"{plan.manifest.path}: will not fit in memory on {plan.device}{named}; nothing was allocated"]
    for name, verdict in verdicts.items():
        needs = (f"{human(nbytes)} of {place} memory" for place, nbytes in verdict.lacking.items())
        lines.append(f"{name} would take {' and '.join(needs)}")
    places = dict.fromkeys(place for verdict in verdicts.values() for place in verdict.lacking)
    lines += [f"available {place} memory: {budget.of(place).said}" for place in places]
    if budget.swap:
        lines.append(f"swap: {human(budget.swap)}, not counted")
    fits = [*helps(plan, strategy, budget)]
    lines += [f"would fit: {change}" for change in fits]
    needed = min(
        (verdict.lacking for verdict in verdicts.values()), key=lambda lacking: sum(lacking.values())
    )
    available = {place: budget.of(place).nbytes or 0 for place in needed}
    return InsufficientMemoryError("\n  ".join(lines), needed=needed, available=available, fits=fits)


def helps(plan: LoadPlan, strategy: str, budget: Budget) -> Iterator[str]:
    """The nearest changes of the arguments with which a load would fit that does not as it is."""
    half, stored = (
        replace(plan, targets=tuple(replace(t, dtype=dtype_of(t)) for t in plan.targets))
        for dtype_of in (_halved, _as_stored)
    )
    changes = {
        (): plan,
        ("dtype=None",): stored,
        ("dtype=torch.bfloat16",): half,
        ('device="cpu"',): replace(plan, device=CPU),
        ('device="cpu"', "dtype=torch.bfloat16"): replace(half, device=CPU),
    }
    enough: list[set[str]] = []
    for change, changed in changes.items():
        is_none = changed == plan and (change or strategy == "auto")
        if is_none or any(set(change) > less for less in enough):
            continue
        plain = replace(changed, tuning=replace(changed.tuning, keep_cached=True, prefetch=False))
        able = (name for name in AUTO if not STRATEGIES[name].refuses(plain))
        if name := next((name for name in able if not judge(plain, name, budget).lacking), None):
            enough.append(set(change))
            tuning = ["tuning=Tuning()"] if STRATEGIES[name].refuses(changed) else []
            yield ", ".join([*change, f'strategy="{name}"', *tuning])


def _as_stored(target: Target) -> torch.dtype:
    return target.dtype if target.is_quantized else target.span.dtype


def _halved(target: Target) -> torch.dtype:
    is_wide = target.dtype.is_floating_point and target.dtype.itemsize > 2
    return torch.bfloat16 if is_wide else target.dtype


@torch.inference_mode(False)  # what is loaded can train, whatever the caller does meanwhile
def load(
    make: Callable[[torch.device], LoadPlan], device: str | torch.device, strategy: str, options: LoadOptions
) -> nn.Module:
    """The module that the plan of `make` fills, proven complete, in eval mode.

    Every mismatch, and insufficient memory, is found before anything is allocated. Raises UsageError for an
    unknown strategy or device, a wrong cap, or options that the strategy cannot do; CheckpointError for a
    checkpoint that does not fit or changes while it is read; InsufficientMemoryError, with nothing left
    allocated, where memory runs out.
    """
    resolved = resolve_device(device)
    budget = find_budget(resolved, options.get("max_host_memory"), options.get("max_device_memory"))
    name, plan = choose(make(resolved), strategy, budget)
    manifest = plan.manifest
    try:
        module = STRATEGIES[name].load(plan)
        if plan.reading.adapters:
            merge_adapters(plan, module)
        restore_unsaved_buffers(module, plan.build, plan.device)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, InsufficientMemoryError) or not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        manifest.check_unchanged()
        targets = () if plan.own_loading else plan.targets  # its loading may change dtypes, too
        dtypes = {name: target.dtype for target in targets for name in target.names}
        return prove_complete(module, dtypes, plan.device)
    # Raised out here, where neither the plan's tensors nor the first error's frames are held any more.
    del plan
    said = f'memory ran out on {device} with strategy="{name}", though the forecast fits'
    raise InsufficientMemoryError(
        f"{manifest.path}: {said}: another process may have taken it ({reason}). Try again."
    )

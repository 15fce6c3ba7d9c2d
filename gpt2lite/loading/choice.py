"""Which strategy a load takes: the fastest whose forecast fits, or one error that says what would help."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from gpt2lite.errors import InsufficientMemoryError, UsageError
from gpt2lite.loading.adapters import with_adapters
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.plan import SMALLEST_RING, LoadPlan, Target
from gpt2lite.loading.strategies import AUTO, BUILT, CPU, STRATEGIES
from gpt2lite.memory import Budget, human


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
    """What each strategy that can read this checkpoint would take. Milliseconds; allocates nothing."""
    found = {}
    for name in STRATEGIES:
        with suppress(UsageError):
            found[name] = _forecast(plan, name)
    return found


def _forecast(plan: LoadPlan, name: str) -> Forecast:
    """Raises UsageError for a strategy that cannot do what is planned."""
    if plan.is_quantized and name != "stream":
        raise UsageError(f'quantize goes with strategy="stream" or "auto", not {name!r}')
    needs = plan.own_loading or plan.lost
    if needs and name not in _automatic(plan):
        why = "loads itself" if plan.own_loading else "must be built with its memory"
        raise UsageError(
            f'strategy="{name}" cannot load this module, which {why} ({", ".join(needs[:5])}); use '
            f'strategy="{_automatic(plan)[0]}" or "auto"'
        )
    return with_adapters(plan, STRATEGIES[name].forecast(plan))


def _automatic(plan: LoadPlan) -> tuple[str, ...]:
    """What auto may take."""
    if plan.is_quantized:
        return AUTO[:1]
    return BUILT[1:] if plan.own_loading else BUILT if plan.lost else AUTO


def _lacking(plan: LoadPlan, forecast: Forecast, budget: Budget) -> dict[str, int]:
    needed = {"device": forecast.peak_device, "host": forecast.peak_host_anonymous}
    if budget.host.admits(needed["host"]):
        needed["virtual"] = needed["host"] + _mapped(plan, forecast)
    return {place: nbytes for place, nbytes in needed.items() if not budget.of(place).admits(nbytes)}


def _mapped(plan: LoadPlan, forecast: Forecast) -> int:
    """Bytes of address space for files: one that is mapped is mapped whole."""
    if not (forecast.peak_host_reclaimable or forecast.stays_mapped):
        return 0
    sources = {span.source for span in plan.spans.values()}
    return sum(state.size for source, state in plan.manifest.files.items() if source in sources)


def judge(plan: LoadPlan, name: str, budget: Budget) -> Verdict:
    """Whether a strategy fits, its ring made as small as needed. Raises UsageError where it cannot run."""
    sizes = _ring_sizes(plan.tuning.ring_bytes)
    largest = _judge_with(plan, name, budget, sizes[0])
    if not largest.lacking:
        return largest
    smallest = _judge_with(plan, name, budget, sizes[-1])
    if smallest.lacking:
        return smallest
    between = (_judge_with(plan, name, budget, ring) for ring in sizes[1:])
    return next(verdict for verdict in between if not verdict.lacking)


def _ring_sizes(largest: int) -> list[int]:
    """The ring that is wanted, and its halves down to the smallest that is worth having."""
    halves = itertools.takewhile(
        lambda size: size >= SMALLEST_RING, (largest >> n for n in itertools.count())
    )
    return [*halves] or [largest]


def _judge_with(plan: LoadPlan, name: str, budget: Budget, ring_bytes: int) -> Verdict:
    plan = replace(plan, tuning=replace(plan.tuning, ring_bytes=ring_bytes))
    forecast = _forecast(plan, name)
    return Verdict(plan, forecast, _lacking(plan, forecast, budget))


def choose(plan: LoadPlan, strategy: str, budget: Budget) -> tuple[str, LoadPlan]:
    """The strategy to take and the plan for it.

    "auto" is the first of AUTO that fits; a strategy that was named may count on swap. Raises UsageError for
    an unknown one, InsufficientMemoryError, before anything is allocated, where nothing fits.
    """
    if strategy != "auto" and strategy not in STRATEGIES:
        raise UsageError(f"no strategy is called {strategy!r}; there are auto, {', '.join(STRATEGIES)}")
    if strategy != "auto":
        budget = budget.with_swap()
    names = _automatic(plan) if strategy == "auto" else (strategy,)
    verdicts = {name: judge(plan, name, budget) for name in names}
    for name, verdict in verdicts.items():
        if not verdict.lacking:
            return name, verdict.plan
    raise InsufficientMemoryError("\n  ".join(_refusal(plan, strategy, budget, verdicts)))


def _refusal(plan: LoadPlan, strategy: str, budget: Budget, verdicts: Mapping[str, Verdict]) -> Iterator[str]:
    """What was wanted, what there is, and what would help, a line each."""
    named = "" if strategy == "auto" else f' with strategy="{strategy}"'
    yield f"{plan.manifest.path}: will not fit in memory on {plan.device}{named}; nothing was allocated"
    for name, verdict in verdicts.items():
        needs = (f"{human(nbytes)} of {place} memory" for place, nbytes in verdict.lacking.items())
        yield f"{name} would take {' and '.join(needs)}"
    for place in dict.fromkeys(place for verdict in verdicts.values() for place in verdict.lacking):
        yield f"{place} memory that can be had: {budget.of(place).said}"
    if budget.swap:
        yield f"swap: {human(budget.swap)}, not counted"
    for change in helps(plan, strategy, budget):
        yield f"would fit: {change}"


def helps(plan: LoadPlan, strategy: str, budget: Budget) -> Iterator[str]:
    """The nearest changes of the arguments with which a load would fit that does not as it is."""
    half = replace(plan, targets=tuple(replace(t, dtype=_halved(t.dtype)) for t in plan.targets))
    changes = {
        (): plan,
        ("dtype=None",): replace(plan, targets=tuple(replace(t, dtype=_as_stored(t)) for t in plan.targets)),
        ("dtype=torch.bfloat16",): half,
        ('device="cpu"',): replace(plan, device=CPU),
        ('device="cpu"', "dtype=torch.bfloat16"): replace(half, device=CPU),
    }
    enough: list[set[str]] = []
    for change, changed in changes.items():
        is_none = changed == plan and (change or strategy == "auto")
        fitting = (name for name in _automatic(changed) if not judge(changed, name, budget).lacking)
        if not is_none and not any(set(change) > less for less in enough) and (name := next(fitting, None)):
            enough.append(set(change))
            refused = plan.tuning.prefetch if name == "stream" else not plan.tuning.keep_cached
            yield ", ".join([*change, f'strategy="{name}"', *["tuning=Tuning()"] * refused])


def _as_stored(target: Target) -> torch.dtype:
    return target.dtype if target.is_quantized else target.span.dtype


def _halved(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.is_floating_point and dtype.itemsize > 2 else dtype

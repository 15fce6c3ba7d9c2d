"""A load: the fastest strategy that fits, run and proven, or one error that says what would help."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.source import in_memory
from gpt2lite.devices import CPU, empty_cache, name_device, resolve_device
from gpt2lite.dialects.reading import Placement
from gpt2lite.errors import InsufficientMemoryError, UsageError, did_you_mean, first_line, is_out_of_memory
from gpt2lite.loading import offload
from gpt2lite.loading.forecast import Forecast, Ledger
from gpt2lite.loading.options import LoadOptions
from gpt2lite.loading.plan import SMALLEST_RING, LoadPlan
from gpt2lite.loading.schedule import Tuning
from gpt2lite.loading.skeleton import prove_complete, restore_unsaved_buffers, saved_tensors, tied_names
from gpt2lite.loading.strategies import AUTO, STRATEGIES
from gpt2lite.memory import Budget, find_budget, human
from gpt2lite.parallel import broadcast, require_mesh, require_same, together

WORKING_BYTES = 1 << 20  # of a sum of LoRA factors, computed rows at a time
HALVES = {torch.float64: torch.bfloat16, torch.float32: torch.bfloat16}


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
    """What each strategy that can carry out the plan would take. Milliseconds; allocates nothing."""
    return {name: _forecast(plan, name) for name, row in STRATEGIES.items() if not row.refuses(plan)}


def _forecast(plan: LoadPlan, name: str, granted: int | None = None) -> Forecast:
    ledger = Ledger(plan.device, granted)
    STRATEGIES[name].forecast(plan, ledger)
    if plan.reading.adapters:
        forecast_merged(plan, ledger)
    if plan.away:
        offload.forecast(plan, ledger)
    return ledger.balance()


def judge(plan: LoadPlan, name: str, budget: Budget) -> Verdict:
    """Whether a strategy fits, its ring made as small as needed. Raises UsageError where it cannot do it."""
    if why := STRATEGIES[name].refuses(plan):
        raise UsageError(why)

    while True:
        forecast = _forecast(plan, name, budget.granted)
        verdict = Verdict(plan, forecast, _lacking(plan, forecast, budget))
        ring_bytes = plan.tuning.ring_bytes // 2
        if not verdict.lacking or ring_bytes < SMALLEST_RING:
            return verdict
        plan = replace(plan, tuning=replace(plan.tuning, ring_bytes=ring_bytes))


def _lacking(plan: LoadPlan, forecast: Forecast, budget: Budget) -> dict[str, int]:
    needed = {"device": forecast.peak_reserved, "host": forecast.peak_host_anonymous}
    if budget.is_shared:
        needed["host"] += needed["device"]
    if budget.host.admits(needed["host"]):
        needed["virtual"] = needed["host"]
        if forecast.peak_host_reclaimable or forecast.stays_mapped:  # a file that is mapped is mapped whole
            sources = {span.source for span in plan.spans.values()}
            needed["virtual"] += sum(
                file.size for source, file in plan.manifest.files.items() if source in sources
            )
    return {place: nbytes for place, nbytes in needed.items() if not budget.of(place).admits(nbytes)}


def choose(
    plan: LoadPlan, strategy: str, budget: Budget, without: Collection[str] = ()
) -> tuple[str, LoadPlan]:
    """The strategy to take and the plan for it.

    "auto" is the first of AUTO (where ranks load the same, "mmap" comes first) that can do what is planned
    and fits, but for those `without` which to do; a strategy that was named may count on swap. Raises
    UsageError for an unknown one and one that cannot do it; InsufficientMemoryError, before anything is
    allocated, where nothing fits.
    """
    if strategy not in ("auto", *STRATEGIES):
        raise UsageError(f"unknown strategy {strategy!r}{did_you_mean(strategy, ('auto', *STRATEGIES))}")
    if strategy != "auto":
        budget = budget.with_swap()
    order = ("mmap", *AUTO) if plan.is_repeated else AUTO  # processes share the pages of a mapped file
    names = tuple(dict.fromkeys(order)) if strategy == "auto" else (strategy,)
    names = tuple(name for name in names if name not in without)
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


def with_offload(plan: LoadPlan, strategy: str, place: str, budget: Budget) -> LoadPlan:
    """The plan with as few blocks left away as fit, and room to compute; as it is where nothing fits.

    "auto" tries the host beside a GPU, then the disk. Raises UsageError for a plan that cannot do it.
    """
    offload.require_able(plan, place)
    if strategy not in ("auto", "stream"):
        raise UsageError(f'offload goes with strategy="stream" or "auto", not {strategy!r}')
    places = ("disk",) if plan.device == CPU else ("host", "disk")
    for where in places if place == "auto" else (place,):
        if found := _smallest(plan, where, budget):
            return found
    return plan


def _smallest(plan: LoadPlan, where: str, budget: Budget) -> LoadPlan | None:
    """`offload.smallest` of what fits; read past the page cache if that cannot hold what is away."""
    to_compute = budget.less("host" if plan.device == CPU else "device", offload.room(plan))
    found = offload.smallest(plan, where, lambda each: not judge(each, "stream", to_compute).lacking)
    cache = find_budget(plan.device).host.nbytes
    if not (found and found.away) or cache is None or offload.bytes_a_pass(found) < cache - found.model_bytes:
        return found
    return replace(found, tuning=replace(found.tuning, keep_cached=False))


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
    if (found := _by_offload(plan, budget)) and plan.manifest.path.exists():
        lines.append(f'would fit: offload="disk" ({offload.takes(found)})')
        fits.append('offload="disk"')
    needed = min((v.lacking for v in verdicts.values()), key=lambda lacking: sum(lacking.values()))
    available = {place: budget.of(place).nbytes or 0 for place in needed}
    return InsufficientMemoryError("\n  ".join(lines), needed=needed, available=available, fits=fits)


def _by_offload(plan: LoadPlan, budget: Budget) -> LoadPlan | None:
    """The plan that fits only with blocks on disk, if it can be done at all and was not asked for."""
    try:
        offload.require_able(plan, "disk")
    except UsageError:
        return None
    found = None if plan.away else _smallest(plan, "disk", budget)
    return found if found and found.away else None


def helps(plan: LoadPlan, strategy: str, budget: Budget) -> Iterator[str]:
    """The smallest changes to the arguments that would make a load fit."""
    half = tuple(replace(t, dtype=HALVES.get(t.dtype, t.dtype)) for t in plan.targets)
    stored = tuple(t if t.is_quantized else replace(t, dtype=t.span.dtype) for t in plan.targets)
    halved = replace(plan, targets=half)
    changes = {
        (): plan,
        ("dtype=None",): replace(plan, targets=stored),
        ("dtype=torch.bfloat16",): halved,
        ('device="cpu"',): replace(plan, device=CPU),
        ('device="cpu"', "dtype=torch.bfloat16"): replace(halved, device=CPU),
    }
    enough: list[set[str]] = []
    for change, changed in changes.items():
        is_none = changed == plan and (change or strategy == "auto")
        if is_none or any(set(change) > less for less in enough):
            continue
        plain = replace(
            changed, tuning=replace(changed.tuning, keep_cached=True, prefetch=False, broadcast=False)
        )
        able = (name for name in AUTO if not STRATEGIES[name].refuses(plain))
        if name := next((name for name in able if not judge(plain, name, budget).lacking), None):
            enough.append(set(change))
            tuning = ["tuning=Tuning()"] if STRATEGIES[name].refuses(changed) else []
            yield ", ".join([*change, f'strategy="{name}"', *tuning])


# ---- low-rank additions, merged into the weights that they add to ------------------------------------
# Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".


@torch.no_grad()
def merge_adapters(plan: LoadPlan, module: nn.Module) -> None:
    """weight += scale × (b @ a) for each, in float32 at least.

    Costs WORKING_BYTES on the device; a mapped weight becomes anonymous memory. Equal to computing both paths
    up to rounding.
    """
    tensors = saved_tensors(module)
    for adapter in plan.reading.adapters:
        assert adapter.scale is not None, "with_lora_alpha comes before a load"
        a, b = (_factor(plan, placement) for placement in (adapter.a, adapter.b))
        rows = max(WORKING_BYTES // (a.shape[1] * a.itemsize), 1)
        if (own := in_memory(tensors[adapter.weight])) is not tensors[adapter.weight]:
            tensors[adapter.weight].data = own
        for weight, b_part in zip(tensors[adapter.weight].split(rows), b.split(rows), strict=True):
            weight.add_(b_part @ a, alpha=adapter.scale)


def _factor(plan: LoadPlan, placement: Placement) -> Tensor:
    stored = placement.read(plan.manifest.tensors[placement.source])
    return stored.to(plan.device, torch.promote_types(stored.dtype, torch.float32))


def forecast_merged(plan: LoadPlan, ledger: Ledger) -> None:
    """What `merge_adapters` adds: mapped weights that become anonymous, and two factors at a time."""
    tensors, adapters = plan.manifest.tensors, plan.reading.adapters
    merged = {adapter.weight for adapter in adapters}
    weights = sum(target.nbytes for target in plan.targets if merged.intersection(target.names))
    copied = min(weights, ledger.stays_mapped)  # the larger sum where it is not known which are mapped
    ledger.host.take(copied)
    ledger.stays_mapped -= copied
    pairs = ((adapter.a, adapter.b) for adapter in adapters)
    factors = max(sum(8 * tensors[p.source].numel for p in pair) for pair in pairs)  # as read, and in float32
    ledger.device.touch(factors + WORKING_BYTES)
    if not ledger.on_cpu:
        ledger.host.touch(factors)


# ---- the load ----------------------------------------------------------------------------------------------


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
    with together(mesh := options.get("mesh")):
        if mesh is not None:
            require_mesh(mesh, name_device(device))
        module = _load(make, device, strategy, options)
    if (options.get("tuning") or Tuning()).broadcast:
        broadcast(tensor for _, tensor in tied_names(saved_tensors(module)))
    return module


def _load(
    make: Callable[[torch.device], LoadPlan], device: str | torch.device, strategy: str, options: LoadOptions
) -> nn.Module:
    resolved, mesh = resolve_device(device), options.get("mesh")
    caps = options.get("max_host_memory"), options.get("max_device_memory")
    ran_out = dict[str, InsufficientMemoryError]()
    while True:
        budget = find_budget(resolved, *caps)
        plan = make(resolved)
        require_same(mesh, "files or options", plan.identity)
        if place := options.get("offload"):
            plan = with_offload(plan, strategy, place, budget)
        try:
            name, plan = choose(plan, strategy, budget, ran_out)
        except (InsufficientMemoryError, UsageError):  # nothing else can do it
            if ran_out:
                break
            raise
        try:
            module = _filled(name, plan)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, InsufficientMemoryError) or not is_out_of_memory(error):
                raise
            ran_out[name] = _ran_out(plan, name, budget, first_line(error))
        else:
            plan.manifest.check_unchanged()
            targets = () if plan.own_loading else plan.targets  # its loading may change dtypes, too
            dtypes = {name: target.dtype for target in targets for name in target.names}
            return prove_complete(module, dtypes, plan.device)
        # Out here, neither the plan's tensors nor the error's frames are held any more.
        del plan
        empty_cache(resolved)
        if strategy != "auto" or mesh is not None or ran_out.keys() >= {*AUTO}:
            break
    raise next(iter(ran_out.values()))


def _ran_out(plan: LoadPlan, name: str, budget: Budget, reason: str) -> InsufficientMemoryError:
    """What the forecast wanted and what there was; another process may have taken it since."""
    forecast = _forecast(plan, name, budget.granted)
    needed = {"host": forecast.peak_host_anonymous, "device": forecast.peak_reserved}
    needed = {place: nbytes for place, nbytes in needed.items() if nbytes}
    said = f'memory ran out on {plan.device} with strategy="{name}", though the forecast fits'
    lines = [f"{plan.manifest.path}: {said}; another process may have taken it ({reason})"]
    lines += [
        f"{human(nbytes)} of {place} memory, of {budget.of(place).said}" for place, nbytes in needed.items()
    ]
    available = {place: budget.of(place).nbytes or 0 for place in needed}
    return InsufficientMemoryError("\n  ".join(lines), needed=needed, available=available)


def _filled(strategy: str, plan: LoadPlan) -> nn.Module:
    """The module; a function of its own, so that the error of one that ran out of memory does not hold it."""
    module = STRATEGIES[strategy].load(plan)
    if plan.reading.adapters and not plan.receives:
        merge_adapters(plan, module)
    restore_unsaved_buffers(module, plan.build, plan.device)
    return offload.attach(plan, module) if plan.away else module

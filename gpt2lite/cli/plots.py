"""Pictures: what each strategy took, and how a loss went. pyplot's backend is left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2lite.benchmarking import Measurement
from gpt2lite.errors import UsageError
from gpt2lite.memory import GIB, MIB

KEPT, TAKEN_BACK, DEVICE, PLANNED = "#0072b2", "#cfe6f5", "#d55e00", "black"  # told apart in grey, too
ANONYMOUS, MAPPED = "host, cannot be reclaimed", "host, mapped file: reclaimable"


def require_matplotlib() -> None:
    """Raise UsageError, which names the extra, before anything long begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'gpt2lite[plot]'") from None


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _share(result: Measurement) -> float:
    """What it held at once on the device or, on the CPU, could not give back, over the model's size."""
    return (result.peak_device or result.peak_host_anonymous) / result.model_bytes


def _panel(axes: Any, result: Measurement, unit: int) -> None:
    """One strategy: host memory over time, the device's peak, what was planned, and when it was ready."""
    seconds, anonymous, mapped = ([*column] for column in zip(*result.timeline, strict=True))
    kept = [value / unit for value in anonymous]
    both = [value + more / unit for value, more in zip(kept, mapped, strict=True)]
    axes.fill_between(seconds, kept, color=KEPT, label=ANONYMOUS)
    axes.fill_between(seconds, kept, both, color=TAKEN_BACK, label=MAPPED)
    if result.peak_device:
        end = [seconds[0], result.seconds_to_load]
        axes.plot(end, [result.peak_device / unit] * 2, color=DEVICE, lw=4, alpha=0.7, label="device, peak")
    planned = {result.forecast["peak_device"], result.forecast["peak_host_anonymous"]} - {0}
    for number, value in enumerate(sorted(planned)):
        label = None if number else "planned peak"
        axes.axhline(value / unit, color=PLANNED, lw=1, ls="--", label=label)
    axes.axhline(result.model_bytes / unit, color="gray", lw=1, ls=":", label="the model's size")
    moments = ((result.seconds_to_load, "v", "ready"), (result.seconds_to_logits, "o", "first logits"))
    for at, mark, label in moments:
        axes.plot(at, 0, mark, color="black", mfc="white", ms=7, clip_on=False, zorder=5, label=label)
    title = f"{result.strategy}: {_share(result):.2f} × the model, {result.seconds_to_load:.3g} s"
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any) -> Iterator[tuple[Any, str]]:
    return zip(*axes.get_legend_handles_labels(), strict=True)


def plot_strategies(measured: Sequence[Measurement], path: Path, subject: str) -> None:
    """Draw one panel a strategy: memory above the imports until the first logits, time on a log scale."""
    columns = min(3, len(measured))
    rows = -(-len(measured) // columns)
    figure = _figure(3.6 * columns, 2.5 * rows + 1)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    name, unit = ("GiB", GIB) if measured[0].model_bytes > GIB / 10 else ("MiB", MIB)
    for axes, result in zip(panels.flat, measured, strict=False):
        _panel(axes, result, unit)
    for axes in panels.flat[len(measured) :]:
        axes.set_axis_off()
    shortest = min(result.seconds_to_load for result in measured)
    panels[0, 0].set(xscale="log", xlim=(shortest / 3, None), ylim=(0, None))
    panels[0, 0].xaxis.set_major_formatter("{x:g}")
    for axes in panels[-1]:
        axes.set_xlabel("seconds from the start")
    figure.supylabel(f"{name} above the imports", fontsize="medium")
    most, least = max(measured, key=_share), min(measured, key=_share)
    finding = f"{most.strategy} takes {_share(most):.2f} × the model, {least.strategy} {_share(least):.2f} ×"
    figure.suptitle(f"{subject}: {finding}", fontweight="bold")
    found = {label: line for axes in panels.flat for line, label in _legend(axes)}
    figure.legend(found.values(), found, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of every step and of every validation. Raises UsageError without matplotlib."""
    require_matplotlib()
    figure = _figure(9, 5)
    axes = figure.subplots()
    for key, label, style in (("loss", "step", "-"), ("validation_loss", "validation", "o-")):
        found = [each for each in metrics if key in each]
        axes.plot([each["step"] + 1 for each in found], [each[key] for each in found], style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per target)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

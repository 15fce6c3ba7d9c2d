"""Pictures: memory over time, loss over steps. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lite.benchmarking import Measurement
from gpt2lite.errors import UsageError
from gpt2lite.memory import GIB


def require_matplotlib() -> None:
    """Raise UsageError, which names the extra, before anything long begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'gpt2lite[plot]'") from None


@contextmanager
def _axes(path: Path, **labels: str) -> Iterator[Any]:
    """Axes to draw on, written to `path` at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    yield axes
    axes.set(**labels)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_timelines(measured: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw anonymous host memory (solid) and mapped files (dotted) until the first logits."""
    labels = {"xlabel": "seconds from the start of the load", "ylabel": "GiB above the imports"}
    with _axes(path, title=title, **labels) as axes:
        for result in measured:
            seconds, anonymous, mapped = zip(*result.timeline, strict=True)
            (line,) = axes.plot(seconds, [n / GIB for n in anonymous], label=result.strategy)
            axes.plot(seconds, [n / GIB for n in mapped], ":", color=line.get_color())
        axes.legend(title="solid: anonymous\ndotted: mapped file")


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of every step and of every validation. Raises UsageError without matplotlib."""
    require_matplotlib()
    with _axes(path, xlabel="step", ylabel="loss (nats per target)") as axes:
        for key, label, style in (("loss", "step", "-"), ("validation_loss", "validation", "o-")):
            found = [each for each in metrics if key in each]
            axes.plot([each["step"] + 1 for each in found], [each[key] for each in found], style, label=label)
        axes.legend()

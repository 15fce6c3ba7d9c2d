"""Pictures: memory over time, loss over steps. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def plot_timelines(measured: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw anonymous host memory (solid) and mapped files (dotted) until the first logits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for result in measured:
        seconds, anonymous, mapped = zip(*result.timeline, strict=True)
        (line,) = axes.plot(seconds, [n / GIB for n in anonymous], label=result.strategy)
        axes.plot(seconds, [n / GIB for n in mapped], ":", color=line.get_color())
    axes.set(xlabel="seconds from the start of the load", ylabel="GiB above the imports", title=title)
    axes.legend(title="solid: anonymous\ndotted: mapped file")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of every step and of every validation. Raises UsageError without matplotlib."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    validated = [each for each in metrics if "validation_loss" in each]
    axes.plot([each["step"] + 1 for each in metrics], [each["loss"] for each in metrics], lw=1, label="step")
    axes.plot(
        [each["step"] + 1 for each in validated],
        [each["validation_loss"] for each in validated],
        "o-",
        label="validation",
    )
    axes.set(xlabel="step", ylabel="loss (nats per target)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""Memory over time, a line for each strategy, as a PNG. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2lite.benchmarking import Measurement
from gpt2lite.errors import UsageError
from gpt2lite.memory import GB


def require_matplotlib() -> None:
    """Raise UsageError, which names the extra, before anything long begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'gpt2lite[plot]'") from None


def plot_timelines(measured: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw anonymous host memory (solid) and mapped files (dotted) until the first logits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for result in measured:
        seconds, anonymous, mapped = zip(*result.timeline, strict=True)
        (line,) = axes.plot(seconds, [n / GB for n in anonymous], label=result.strategy)
        axes.plot(seconds, [n / GB for n in mapped], ":", color=line.get_color())
    axes.set(
        xlabel="seconds from the start of the load", ylabel="GB (1024³ bytes) above the imports", title=title
    )
    axes.legend(title="solid: anonymous\ndotted: mapped file")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

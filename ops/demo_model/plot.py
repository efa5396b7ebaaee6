"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def curves(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw each run's training and held-out losses over the tokens it has read."""
    figure, axes = pyplot.subplots(1, len(runs), figsize=(11, 4.2), constrained_layout=True)
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        millions = [tokens / 1e6 for _, tokens, _ in run["train"]]
        label = "training" if name == "model" else "training (distillation loss)"
        axis.plot(millions, smooth([loss for *_, loss in run["train"]]), color="0.55", linewidth=1, label=label)
        for kind in run["held_out"][0][2]:
            points = [(tokens / 1e6, losses[kind]) for _, tokens, losses in run["held_out"]]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"held out: {kind}")
        axis.set(title=name, xlabel="training tokens (millions)", ylabel="loss (nats per token)")
        axis.set_ylim(0.5, 6)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Return a running mean that forgets exponentially."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(keep * smoothed[-1] + (1 - keep) * value if smoothed else value)
    return smoothed

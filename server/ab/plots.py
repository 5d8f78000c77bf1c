"""Plots of an A/B test: latencies by arm, effects with their intervals, and the queue over time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from quire.core.errors import ConfigError
from quire.server.ab.analysis import Verdict
from quire.server.ab.observations import Observations
from quire.server.ab.run import Experiment

__all__ = ["draw_plots", "import_matplotlib"]

_COLORS = ("#3465a4", "#cc4a14")


def import_matplotlib() -> Any:
    """``matplotlib.pyplot``, without a display. Raises ``ConfigError`` where it is not installed."""
    try:
        importlib.import_module("matplotlib").use("agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise ConfigError("plots need matplotlib; pip install 'quire[ab]', or leave out --out") from None


def draw_plots(
    folder: Path, experiment: Experiment, observations: Observations, verdict: Verdict
) -> list[tuple[str, str]]:
    """Write PNG files; returns their titles and names. Raises ``ConfigError`` where matplotlib is not installed."""
    plt = import_matplotlib()
    names = [f"{arm.letter}: {arm.name}" for arm in experiment.arms]
    plots = [("latencies by arm", "latencies.png"), ("effects of B", "effects.png")]
    _draw_latencies(plt, folder / "latencies.png", observations, names)
    _draw_effects(plt, folder / "effects.png", verdict)
    if experiment.queue_depth:
        _draw_queue(plt, folder / "queue.png", experiment, names)
        plots.append(("requests that wait, over time", "queue.png"))
    return plots


def _draw_latencies(plt: Any, path: Path, observations: Observations, names: list[str]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    columns = (("time to first token", "ttft_s"), ("time per output token", "tpot_s"), ("end-to-end time", "e2e_s"))
    for axis, (title, column) in zip(axes, columns, strict=True):
        values = getattr(observations, column) * 1e3
        for arm, name in enumerate(names):
            chosen = np.sort(values[(observations.arm == arm) & ~np.isnan(values)])
            if len(chosen):
                axis.plot(chosen, np.arange(1, len(chosen) + 1) / len(chosen), color=_COLORS[arm], label=name)
        axis.set(title=title, xlabel="ms", ylim=(0, 1), xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_effects(plt: Any, path: Path, verdict: Verdict) -> None:
    effects = [effect for effect in verdict.effects if effect.metric.is_ratio]
    figure, axis = plt.subplots(figsize=(7, 0.35 * len(effects) + 1.2), layout="constrained")
    for row, effect in enumerate(reversed(effects)):
        color = "#888888" if not effect.is_significant else "#2e7d32" if effect.is_better else "#c62828"
        axis.plot([100 * effect.low, 100 * effect.high], [row, row], color=color, linewidth=2)
        axis.plot(100 * effect.effect, row, "o", color=color)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(effects)), [effect.metric.title for effect in reversed(effects)])
    axis.set(xlabel="effect of B, % (95 % interval); grey: no difference found")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_queue(plt: Any, path: Path, experiment: Experiment, names: list[str]) -> None:
    figure, axis = plt.subplots(figsize=(12, 3), layout="constrained")
    depth = np.array(experiment.queue_depth, float).reshape(-1, 3)
    for arm, name in enumerate(names):
        chosen = depth[:, 2] == arm
        axis.plot(depth[chosen, 0], depth[chosen, 1], ".", markersize=2, color=_COLORS[arm], label=name)
    axis.set(xlabel="s", ylabel="requests that wait")
    axis.legend(loc="upper right", fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""``quire bench serve --plot FILE.png``: a plot of latency against load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError

__all__ = ["LoadPlot", "Plot"]

_PANELS = (("ttft_s", "time to first token"), ("itl_s", "between tokens"), ("e2e_s", "whole request"))


class Plot:
    """A plot to draw. Constructed before anything is measured, so that what is missing is reported early.

    Raises ConfigError if matplotlib is not installed or the file cannot be written.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        if self._file.suffix.lower() != ".png" or not self._file.absolute().parent.is_dir():
            raise ConfigError(f"--plot {file} must be a .png file in a folder that exists")
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigError(
                "--plot needs matplotlib, which is not installed; install it with: pip install 'quire[plot]'"
            ) from None
        self.figure = Figure(layout="constrained")
        FigureCanvasAgg(self.figure)

    def save(self) -> Path:
        """Write the file."""
        self.figure.savefig(self._file, dpi=130)
        return self._file


class LoadPlot(Plot):
    """Latency against load."""

    def draw(self, runs: Sequence[dict[str, Any]]) -> Path:
        """One point for each request rate: medians and 99th percentiles over the output that the server gave."""
        points = sorted(runs, key=lambda run: run["requests_s"])
        self.figure.set_size_inches(12, 4)
        for axes, (key, title) in zip(self.figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            for part, label in (("p50", "median"), ("p99", "99th percentile")):
                measured = [run for run in points if part in run[key]]
                load = [run["requests_s"] for run in measured]
                axes.plot(load, [1000 * run[key][part] for run in measured], marker="o", label=label)
            for run in measured:
                label_text = f"{run['request_rate']:g}/s" if run["request_rate"] else "at once"
                axes.annotate(
                    label_text,
                    (run["requests_s"], 1000 * run[key]["p99"]),
                    (4, -9),
                    textcoords="offset points",
                    fontsize=7,
                )
            axes.set_title(title)
            axes.set_xlabel("requests/s answered (labels: requested rate)")
            axes.set_ylabel("ms")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend()
        first = points[0]
        self.figure.suptitle(f"{first['model']}, {first['input_len']} tokens in, {first['output_len']} out")
        return self.save()

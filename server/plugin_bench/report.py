"""What was measured as a Markdown table, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quire.server.bench.plot import Plot
from quire.server.plugin_bench.end_to_end import EndToEnd
from quire.server.plugin_bench.measurement import Measurement
from quire.server.plugin_bench.timer import Ratio

__all__ = ["BenchPlot", "format_end_to_end", "format_table"]


def format_table(rows: Sequence[Measurement], subject: str) -> str:
    """A line a case and implementation; columns that nothing fills are left out."""
    columns = {
        "case": [row.case for row in rows],
        "implementation": [row.implementation for row in rows],
        "us": ["" if row.microseconds is None else f"{row.microseconds:.2f}" for row in rows],
        "error": ["" if row.error is None else f"{row.error:.1e}" for row in rows],
        "bandwidth": [_format_share(row.bandwidth_share) for row in rows],
        "of the bound": [_format_share(row.bound_share) for row in rows],
        **{
            name.replace("_", " "): [f"{row.figures[name]:.3g}" if name in row.figures else "" for row in rows]
            for name in dict.fromkeys(name for row in rows for name in row.figures)
        },
        f"time of {subject} beside it": ["" if row.ratio is None else _format_ratio(row.ratio) for row in rows],
        "": [f"not run: {row.refused}" if row.refused else row.note for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    widths = [max(len(name), *map(len, cells)) for name, cells in kept.items()]
    lines = [_format_line(list(kept), widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    lines += [_format_line(cells, widths) for cells in zip(*kept.values(), strict=True)]
    return "\n".join(lines)


def format_end_to_end(result: EndToEnd, subject: str) -> str:
    """What the whole engine gains or loses."""
    change, low, high = result.ratio.median - 1, result.ratio.low - 1, result.ratio.high - 1
    verdict = "differs" if result.ratio.differs else "no difference is certain"
    return (
        f"end to end, {result.workload} on {result.model}: {subject} {result.subject_median:,.1f} tokens/s, "
        f"{result.rival} {result.rival_median:,.1f}: {change:+.1%} ({low:+.1%} to {high:+.1%}, "
        f"{len(result.subject_rates)} alternating runs; {verdict})"
    )


class BenchPlot(Plot):
    """Microseconds of every case on every implementation."""

    def draw(self, rows: Sequence[Measurement], title: str) -> Path:
        """Horizontal bars of microseconds, a group a case, a colour an implementation."""
        cases = list(dict.fromkeys(row.case for row in rows))
        names = list(dict.fromkeys(row.implementation for row in rows))
        self.figure.set_size_inches(9, 1.5 + 0.25 * len(cases) * (len(names) + 1))
        axes = self.figure.subplots()
        for number, name in enumerate(names):
            measured = {
                cases.index(row.case) + (number + 0.5) / (len(names) + 1): row.microseconds
                for row in rows
                if row.implementation == name and row.microseconds is not None
            }
            axes.barh(list(measured), list(measured.values()), 1 / (len(names) + 1), label=name)
        axes.set_yticks([place + 0.5 * len(names) / (len(names) + 1) for place in range(len(cases))], cases)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("microseconds")
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
        axes.legend()
        return self.save()


def _format_share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _format_ratio(ratio: Ratio) -> str:
    mark = "" if ratio.differs else " ~"
    return f"x{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}){mark}"


def _format_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

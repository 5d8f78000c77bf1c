"""Results of simulations as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from quire.server.simulate.results import LATENCIES, Objectives, SimulationResult

__all__ = ["format_results"]

_UNKNOWN_SHARE = 0.01
"""Of the device's time: below it the sizes of a few steps are nothing to warn of."""


def format_results(results: Sequence[SimulationResult], objectives: Objectives | None) -> str:
    """A column for each policy, a row for each figure; groups below."""
    figures = [result.summarize(objectives) for result in results]
    rows = [("", [result.policy for result in results])]
    for name, title in LATENCIES.items():
        for part in ("mean", "p50", "p95", "p99"):
            rows.append((f"{title}, {part} ms", [f"{each[f'{name}_{part}_ms']:,.1f}" for each in figures]))
    rows.append(("output tokens/s", [f"{each['output_tokens_per_s']:,.1f}" for each in figures]))
    rows.append(("requests/s", [f"{each['requests_per_s']:,.2f}" for each in figures]))
    rows.append(("served of all requests", [f"{each['served']:,} of {each['requests']:,}" for each in figures]))
    if objectives is not None:
        rows.append(("objectives kept", [f"{each['slo_attainment']:.1%}" for each in figures]))
    rows.append(("prompt tokens found cached", [f"{each['cached_share']:.1%}" for each in figures]))
    rows.append(("preemptions", [f"{each['preemptions']:,}" for each in figures]))
    rows.append(("most requests waiting", [f"{each['most_waiting']:,}" for each in figures]))
    if any("fairness" in each for each in figures):
        rows.append(("fairness between groups (Jain)", [f"{each.get('fairness', 1.0):.3f}" for each in figures]))
    width = max(len(label) for label, _ in rows)
    columns = [max(len(cells[i]) for _, cells in rows) for i in range(len(results))]
    lines = [
        label.ljust(width) + "".join(f"  {cell.rjust(w)}" for cell, w in zip(cells, columns, strict=True))
        for label, cells in rows
    ]
    for result in results:
        speed = result.duration_s / result.wall_s if result.wall_s else 0.0
        lines.append(
            f"{result.policy}: {result.duration_s:,.0f} s simulated in {result.wall_s:.1f} s ({speed:,.0f} x); "
            f"{result.num_steps:,} steps, {result.num_skipped_steps:,} of them equal to the one before and skipped"
        )
        if result.unknown_share > _UNKNOWN_SHARE:
            lines.append(
                f"warning: {result.unknown_share:.0%} of the device's time are steps larger than any of the step model "
                f"({result.known_steps}), whose times are guesses: fit it to a heavier load, or simulate a lighter one"
            )
        num_refused = len(result.times) - int(result.times.is_served.sum())
        if num_refused:
            lines.append(f"warning: {num_refused:,} requests were not served, the first because {result.first_refusal}")
        lines += [f"warning: {text}; the figures are of the policy that took over" for text in result.quarantined]
    return "\n".join(lines)

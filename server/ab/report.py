"""The report of an A/B test: Markdown that can be pasted into a pull request."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quire.core.version import __version__
from quire.server.ab.analysis import MIN_PAIRS, WANTED_EFFECT, Effect, Verdict
from quire.server.ab.run import Experiment

__all__ = ["format_report"]


def format_report(
    experiment: Experiment, verdict: Verdict, primary: str, command: str, plots: Sequence[tuple[str, str]] = ()
) -> str:
    """The whole report. ``plots`` are (title, file)."""
    a, b = experiment.arms
    chosen = verdict.get_effect(primary)
    is_noise_floor = a.name == b.name and not verdict.is_identical
    lines = [f"# A/B: `{a.name}` against `{b.name}`", ""]
    if experiment.interruption is not None:
        lines += [f"> **Partial**: {_describe_rest(experiment, verdict, chosen)}", ""]
    for warning in experiment.warnings:
        lines += [f"> **Unequal arms**: {warning}. What follows compares two engines, not two policies.", ""]
    told = _describe_identity(a.name == b.name, verdict) if verdict.is_identical else _describe_primary(chosen)
    lines += [f"**{verdict.summarize()}**" + (f" {told}" if verdict.is_final else ""), ""]
    if is_noise_floor:
        lines += ["Both arms are the same: what is found here is the noise floor of this setting.", ""]
    lines += _format_table(verdict)
    lines += [
        "",
        "Effects of B beside A with 95 % confidence intervals; p after Holm's correction for "
        f"{len(verdict.effects)} metrics. *Visible*: the smallest effect that 4 of 5 runs of this length would find. "
        f"*For {WANTED_EFFECT:.0%}*: the length that finds {WANTED_EFFECT:.0%} in 9 of 10 runs. **Bold**: differs.",
        "",
        "## What was done",
        "",
        f"- {_DESIGNS[experiment.design]}",
        f"- {verdict.num_pairs} pairs, {experiment.stretch_s:g} s an arm, of which the first {experiment.washout_s:g} s"
        + (" and the last" if experiment.design == "switchback" else "")
        + f" are not measured; {verdict.num_requests:,} requests are.",
        f"- Trace: {experiment.trace}.",
        *(f"- Note: {note}." for note in experiment.notes),
        "- Arms: "
        + ("equal but for the policy" if not experiment.warnings else "**not equal**, see above")
        + ". "
        + ", ".join(f"{key} {value}" for key, value in sorted(a.engine.items()) if value not in (None, ""))
        + ".",
        f"- quire {__version__}: `{command}`",
    ]
    for title, file in plots:
        lines += ["", f"![{title}]({file})"]
    return "\n".join(lines) + "\n"


_DESIGNS = {
    "simulation": "Paired simulation: each stretch of traffic was served by both arms, in virtual time.",
    "replay": "Paired replay: each stretch of traffic was sent to both servers at once.",
    "switchback": "Switchback: one server changed its policy between stretches, in random order within each pair.",
    "split": "Split by request: each request went to one of two servers at random.",
}


def _describe_rest(experiment: Experiment, verdict: Verdict, chosen: Effect) -> str:
    """How far an interrupted test came, and how much longer it would have to run."""
    done, minutes = verdict.num_pairs, verdict.pair_seconds / 60
    text = f"interrupted; {done} of {experiment.planned_pairs} pairs were measured."
    if not verdict.is_final:
        text += f" A verdict needs {MIN_PAIRS}: {(MIN_PAIRS - done) * minutes:,.1f} min more."
    if not chosen.recommended_pairs:
        return text
    needed = f"{chosen.recommended_pairs} pairs find {WANTED_EFFECT:.0%} in {chosen.metric.title}"
    more = (chosen.recommended_pairs - done) * minutes
    source = ", by what these few show" if done < MIN_PAIRS else ""
    return f"{text} {needed}{source}: " + (f"{more:,.1f} min more." if more > 0 else "no more than ran.")


def _describe_identity(is_aa: bool, verdict: Verdict) -> str:
    """Why there is no effect to speak of, and what would show one, or the noise."""
    text = f"All {verdict.num_requests // 2:,} requests took the same time in both, to the digit. "
    if not is_aa:
        return text + (
            "This traffic does not show what these policies do otherwise: play it at a higher `--load`, or give it "
            "what they rank by, such as groups or deadlines."
        )
    return text + (
        "The same policy on the same stretches in virtual time has no noise, whatever the seed. `--design switchback` "
        "has: its arms serve different stretches."
    )


def _describe_primary(effect: Effect) -> str:
    metric = effect.metric
    title = f"{metric.title[0].upper()}{metric.title[1:]}"
    if math.isnan(effect.a) or math.isnan(effect.b):
        return f"{title} was not measured in both arms: no request has one."
    if effect.smallest_effect is None:
        return f"{title} is the same in both arms, in every pair."
    found = "differs" if effect.is_significant else "does not differ measurably"
    return (
        f"{title} {found}: {_percent(effect, effect.effect)} "
        f"[{_percent(effect, effect.low)}, {_percent(effect, effect.high)}]; runs of this length find effects of "
        f"{_visible(effect)} and more."
    )


def _format_table(verdict: Verdict) -> list[str]:
    lines = [
        f"| metric | A | B | effect of B | 95 % interval | p | visible | for {WANTED_EFFECT:.0%} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for effect in verdict.effects:
        text = _percent(effect, effect.effect)
        shown = f"**{text}** ({'better' if effect.is_better else 'worse'})" if effect.is_significant else text
        lines.append(
            f"| {effect.metric.title} | {_value(effect, effect.a)} | {_value(effect, effect.b)} | {shown} | "
            f"{_percent(effect, effect.low)} to {_percent(effect, effect.high)} | {effect.corrected_p:.3f} | "
            f"{_visible(effect)} | {_length(effect, verdict)} |"
        )
    return lines


def _visible(effect: Effect) -> str:
    """The smallest effect; "-" where the arms are equal in every pair, which says nothing of it."""
    return "-" if effect.smallest_effect is None else _percent(effect, effect.smallest_effect).lstrip("+")


def _length(effect: Effect, verdict: Verdict) -> str:
    if not effect.recommended_pairs:
        return "-"
    minutes = effect.recommended_pairs * verdict.pair_seconds / 60
    return f"{effect.recommended_pairs} pairs, {minutes:,.0f} min" if minutes < 600 else f"{minutes / 60:,.0f} h"


def _percent(effect: Effect, value: float) -> str:
    return f"{value:+.1%}" if effect.metric.is_ratio else f"{100 * value:+.1f} points"


def _value(effect: Effect, value: float) -> str:
    if math.isnan(value):
        return "-"
    if not effect.metric.is_ratio:
        return f"{value:.3f}"
    return f"{value:,.0f}" if effect.metric.name == "throughput" else f"{value * 1e3:,.1f} ms"

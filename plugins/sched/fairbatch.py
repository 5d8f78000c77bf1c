"""Batches by slack, between first tokens and further ones.

H. Lyu, B. Liu, M. Wu, H. Chen, "FairBatching: Fairness-Aware Batch Formation for LLM Inference", 2025
(arXiv 2510.14392). Token ``j`` of a request is due at ``arrival + ttft_target + j * tpot_target``. A request that is
ahead of that line can wait a step, so a step goes first to decodes that are about to be late, then to prompts, and last
to the other decodes; and it is no longer than the tightest decode allows, by a model of step times that is learned.

Left out: the paper's estimate of load for a router of several nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.plugins.sched.step_time import StepTimeModel
from quire.sdk import BatchingPolicy, Grants, RequestColumns, RequestInfo, StepReport, StepView, make_default_plan

__all__ = ["FairBatchPolicy"]


class FairBatchPolicy(BatchingPolicy):
    """Arrivals in order, steps by slack."""

    changes_only_at_events = True

    @dataclass(frozen=True)
    class Options:
        """Options of the policy."""

        ttft_target_ms: float = 1000.0
        """Time to first token of requests that name none."""
        tpot_target_ms: float = 50.0
        """Time for each further token of requests that name none."""

        min_prefill_tokens: int = 256
        """Prompt tokens that a step may compute whatever the targets say, so that prompts never stand still."""

        def __post_init__(self) -> None:
            for name in ("ttft_target_ms", "tpot_target_ms", "min_prefill_tokens"):
                if not 0 < getattr(self, name) <= 1e9:
                    raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self._ttft_ns = int(self.options.ttft_target_ms * 1e6)
        self._tpot_ns = int(self.options.tpot_target_ms * 1e6)
        self._times = StepTimeModel()
        self._has_targets = False  # whether any request named one

    def admission_key(self, request: RequestInfo) -> tuple[Any, ...]:
        """When its first token is due."""
        self._has_targets |= request.ttft_target_ns > 0 or request.tpot_target_ns > 0
        return (request.arrival_ns + (request.ttft_target_ns or self._ttft_ns), request.arrival_ns)

    def schedule(self, view: StepView) -> Grants:
        """Urgent decodes, prompts by deadline, other decodes: each while the step's time lasts."""
        running, num_waiting = view.running, min(len(view.waiting), view.num_free_rows)
        remaining, output_len = running.num_remaining_tokens, running.output_len
        decodes, has_prompts = remaining.nonzero()[0], False
        if len(decodes) and (remaining.item(remaining.argmax()) > 1 or not output_len.item(output_len.argmin())):
            num_runnable = len(decodes)
            decodes = ((remaining == 1) & (output_len > 0)).nonzero()[0]  # without the last token of a prompt
            has_prompts = len(decodes) < num_runnable
        num_decodes = len(decodes)
        if not (has_prompts or num_waiting) or not num_decodes or not view.chunked_prefill:
            return make_default_plan(view)  # no request to choose
        slack = self._slack_ns(running, view.now_ns)
        decode_slack = slack if num_decodes == len(remaining) else slack.take(decodes)
        tightest = decode_slack.item(decode_slack.argmin())
        # Who is late already cannot be helped by a short step: it then has the time of one token.
        budget = self._times.fit_tokens(tightest if tightest > 0 else self._tpot_ns, view.token_budget)
        # A decode is urgent if it would be late when it waited for this step and ran in the next.
        urgent_ns = int(2 * self._times.estimate_ns(budget))
        num_urgent = int(np.count_nonzero(decode_slack < urgent_ns)) if tightest < urgent_ns else 0
        budget = min(max(budget, num_urgent + self.options.min_prefill_tokens), view.token_budget)
        arrivals = view.waiting.num_remaining_tokens[:num_waiting]
        num_wanted = int(np.add.reduce(remaining)) if has_prompts else num_decodes
        if num_wanted + sum(arrivals.tolist()) <= budget:
            return make_default_plan(view, min_prefill_tokens=budget)  # nothing is cut, in whatever order
        if 0 < num_urgent < num_decodes:
            is_urgent = decode_slack < urgent_ns
            decodes = np.concatenate((decodes[is_urgent], decodes[~is_urgent]))
        is_prompt = remaining > 0
        is_prompt[decodes] = False
        prompts = is_prompt.nonzero()[0]
        prompts = prompts[slack[prompts].argsort(kind="stable")]
        wanted = np.concatenate((remaining, arrivals))
        arrivals = np.arange(len(remaining), len(wanted))
        order = np.concatenate((decodes[:num_urgent], prompts, arrivals, decodes[num_urgent:]))
        tokens = wanted[order]
        if np.add.reduce(tokens) > budget:
            tokens = np.minimum(np.maximum(budget - (tokens.cumsum() - tokens), 0), tokens)
        return Grants(order, tokens)

    def step_scheduled(self, report: StepReport) -> None:
        """Learn how long steps take."""
        self._times.record_report(report)

    def _slack_ns(self, requests: RequestColumns, now_ns: int) -> NDArray[np.int64]:
        """How long from now the next token of each request is due."""
        ttft: NDArray[np.int64] | int = self._ttft_ns
        tpot: NDArray[np.int64] | int = self._tpot_ns
        if self._has_targets:
            ttft = np.where(requests.ttft_target_ns > 0, requests.ttft_target_ns, ttft)
            tpot = np.where(requests.tpot_target_ns > 0, requests.tpot_target_ns, tpot)
        slack: NDArray[np.int64] = requests.output_len * tpot
        slack += requests.arrival_ns
        slack += ttft - now_ns
        return slack

"""Load on a server: the requests, when each is sent, and the timings of the answers."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quire.core.errors import ConfigError
from quire.server.bench.client import LoadClient, Timing
from quire.server.bench.datasets import read_prompts
from quire.server.bench.workloads import make_random_prompts

__all__ = ["RequestGenerator", "get_model_name", "longest_stall", "run_open_loop", "send_requests"]

CHAT = "/v1/chat/completions"
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "it")


@dataclass(frozen=True, slots=True)
class RequestGenerator:
    """Bodies of requests, sampled one after another from one seed."""

    model: str
    endpoint: str
    input_len: int
    output_len: int
    range_ratio: float
    """Lengths lie within this share of the two above, in both directions."""
    vocab_size: int
    temperature: float
    texts: Sequence[str]
    """Prompts of a data set, taken in turn; empty: random ones."""
    seed: int

    @classmethod
    def from_args(cls, args: argparse.Namespace, model: str) -> RequestGenerator:
        """From the command line. Raises ConfigError."""
        if not 0 <= args.random_range_ratio < 1:
            raise ConfigError(f"--random-range-ratio must be at least 0 and below 1, got {args.random_range_ratio}")
        texts = [prompt for prompt, _ in read_prompts(args.dataset, 1 << 30, args.seed or 0)] if args.dataset else []
        return cls(
            model=model,
            endpoint=args.endpoint,
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=args.random_range_ratio,
            vocab_size=args.vocab_size,
            temperature=args.temperature,
            texts=texts,
            seed=args.seed or 0,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Without end."""
        rng = random.Random(self.seed)
        turn = 0
        while True:
            length, answer = self._sample_length(rng, self.input_len), self._sample_length(rng, self.output_len)
            prompt: Any = self.texts[turn % len(self.texts)] if self.texts else None
            if self.endpoint == CHAT:
                words = prompt or " ".join(rng.choices(_WORDS, k=length))
                yield self._make_body(answer) | {"messages": [{"role": "user", "content": words}]}
            else:
                yield self._make_body(answer) | {
                    "prompt": prompt or make_random_prompts(rng, 1, length, self.vocab_size)[0]
                }
            turn += 1

    def _sample_length(self, rng: random.Random, middle: int) -> int:
        return rng.randint(
            max(1, round(middle * (1 - self.range_ratio))), max(1, round(middle * (1 + self.range_ratio)))
        )

    def _make_body(self, answer: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_tokens": answer,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def get_model_name(client: LoadClient, args: argparse.Namespace) -> str:
    """The requested model, else the first that is served."""
    return str(args.model or (await client.get_json("/v1/models"))["data"][0]["id"])


async def send_requests(
    client: LoadClient,
    requests: RequestGenerator,
    count: int,
    *,
    rate: float = 0.0,
    concurrency: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> tuple[list[Timing], float]:
    """``count`` requests, at ``rate`` a second with Poisson gaps (0: at once), ``concurrency`` at a time; the timings
    and the seconds that all took. The first request is also sent once before, to warm up, and not counted."""
    rng = random.Random(requests.seed)
    bodies = [body for body, _ in zip(iter(requests), range(count), strict=False)]
    gate = asyncio.Semaphore(concurrency or count)

    async def one(body: dict[str, Any], after: float) -> Timing:
        await asyncio.sleep(after)
        async with gate:
            timing = await client.time_stream(requests.endpoint, body)
        done()
        return timing

    await client.time_stream(requests.endpoint, bodies[0] | {"max_tokens": 1})
    delays, at = [], 0.0
    for _ in bodies:
        delays.append(at)
        at += rng.expovariate(rate) if rate else 0.0
    start = time.perf_counter()
    timings = await asyncio.gather(*(one(body, delay) for body, delay in zip(bodies, delays, strict=True)))
    return list(timings), time.perf_counter() - start


async def run_open_loop(
    client: LoadClient, requests: RequestGenerator, rate: float, seconds: float
) -> AsyncIterator[Timing]:
    """Requests at ``rate`` a second with Poisson gaps for ``seconds``, whether or not the server keeps up; yields each
    timing as its answer ends."""
    rng = random.Random(requests.seed)
    finished: asyncio.Queue[Timing] = asyncio.Queue()
    in_flight: set[asyncio.Task[None]] = set()

    async def one(body: dict[str, Any]) -> None:
        finished.put_nowait(await client.time_stream(requests.endpoint, body))

    async def send() -> None:
        due = start = time.perf_counter()
        for body in requests:
            due += rng.expovariate(rate)
            if due - start > seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one(body))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)

    sender = asyncio.create_task(send())
    while not sender.done() or in_flight or not finished.empty():
        try:
            async with asyncio.timeout(0.2):
                timing = await finished.get()
        except TimeoutError:
            continue
        yield timing
    sender.result()


def longest_stall(timings: Sequence[Timing]) -> float:
    """Seconds between two pieces of one answer, at most; 0 if there are none."""
    gaps = (b - a for t in timings for a, b in zip(t.events, t.events[1:], strict=False))
    return max(gaps, default=0.0)

"""The client of load tests."""

import asyncio
import json

from quire.server.bench.client import LoadClient


def test_a_last_token_without_text_is_counted():
    """Of a token that is no whole character, or unknown to the tokenizer, the stream says no more than the reason of
    its end."""
    choices = [("a", None), ("", None), ("", "length")]
    events = [{"choices": [{"text": text, "finish_reason": reason}]} for text, reason in choices]
    events.append({"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 2}})
    parts = [f"data: {json.dumps(event)}\n\n".encode() for event in events]

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for part in (*parts, b"data: [DONE]\n\n"):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    async def ask():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await LoadClient(f"http://127.0.0.1:{port}").time_stream("/v1/completions", {})

    timing = asyncio.run(ask())
    assert timing.error is None and len(timing.events) == timing.output_tokens == 3
    assert timing.events == sorted(timing.events) and timing.events[2] <= timing.total

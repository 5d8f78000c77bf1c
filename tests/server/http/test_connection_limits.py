"""A client that sends headers without end, or half a request, is let go; one that is slow but sound is not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from quire.server.http.connection_limits import ConnectionLimits, LimitedHttpProtocol

Scenario = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


class ImpatientProtocol(LimitedHttpProtocol):
    limits = ConnectionLimits(max_header_bytes=4096, header_timeout_s=0.4, body_timeout_s=0.8)


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes, more = num_bytes + len(message.get("body", b"")), message.get("more_body", False)
    body = str(num_bytes).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def connect(scenario: Scenario) -> None:
    async def run() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(echo_length, http=ImpatientProtocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        await asyncio.wait_for(scenario(reader, writer), 20)
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(run())


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: bytes) -> None:
    with pytest.raises(ConnectionError):
        for _ in range(2000):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)


@pytest.mark.parametrize("piece", [b"x-name: value\r\n" * 64, b"a" * 1000], ids=["many headers", "one header"])
def test_headers_without_end_are_cut_off(piece: bytes) -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + (b"" if b":" in piece else b"x-name: "))
        await flood(reader, writer, piece)

    connect(scenario)


def test_trailers_without_end_are_cut_off() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-name: ")
        await flood(reader, writer, b"a" * 1000)

    connect(scenario)


@pytest.mark.parametrize("sent", [b"", b"POS", HEAD])
def test_half_a_header_has_a_time_limit(sent: bytes) -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 408 ")

    connect(scenario)


def test_half_a_header_on_a_connection_in_use_has_a_time_limit() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: 2\r\n\r\nab" + HEAD)
        answers = await until_closed(reader)
        assert answers.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in answers

    connect(scenario)


def test_half_a_body_has_a_time_limit() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: 5\r\n\r\nab")
        assert await until_closed(reader) == b""

    connect(scenario)


def test_slow_sound_requests_are_served() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):  # together longer than any limit, and idle between requests
            request = HEAD + b"x-padding: " + b"a" * 3000 + b"\r\ntransfer-encoding: chunked\r\n\r\n"
            for piece in (request[:20], request[20:3000], request[3000:]):
                writer.write(piece)
                await asyncio.sleep(0.05)
            for _ in range(3000):  # chunks of one byte
                writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.3)
            writer.write(b"0\r\n\r\n")
            answer = await reader.readuntil(b"3000")
            assert answer.startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.5)

    connect(scenario)

"""Answers from a running server with an OpenAI-compatible API, many requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from quire.core.errors import ConfigError
from quire.server.evaluation import MAX_NEW_TOKENS, format_message

__all__ = ["ChatClient"]

_Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]
_TIMEOUT_S = 600.0


class ChatClient:
    """Asks one server for one model. Raises ConfigError if the server cannot be reached or refuses a question."""

    def __init__(self, url: str, model: str | None, api_key: str | None, concurrency: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url!r} is not a URL such as http://127.0.0.1:8000")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._concurrency = concurrency
        self.model = model or ""
        """The requested model; filled in by the first request if it was empty."""

    def answer_conversations(self, conversations: Sequence[_Conversation]) -> list[str]:
        """The assistant's text for each conversation, in order."""
        try:
            return asyncio.run(self._answer_all(conversations))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self._url} has no OpenAI-compatible API; name a model server with --url") from error

    async def _answer_all(self, conversations: Sequence[_Conversation]) -> list[str]:
        limits = httpx.Limits(max_connections=self._concurrency)
        gate = asyncio.Semaphore(self._concurrency)
        async with httpx.AsyncClient(headers=self._headers, timeout=_TIMEOUT_S, limits=limits) as http:
            await self._choose_model(http)

            async def one(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
                body: dict[str, Any] = {
                    "model": self.model,
                    "messages": messages,
                    "temperature": 0,
                    "max_tokens": MAX_NEW_TOKENS,
                }
                async with gate:
                    answer = await self._send_request(http, "POST", "/v1/chat/completions", body | _tools_field(tools))
                return format_message(answer["choices"][0]["message"])

            return list(await asyncio.gather(*(one(messages, tools) for messages, tools in conversations)))

    async def _choose_model(self, http: httpx.AsyncClient) -> None:
        served = [each["id"] for each in (await self._send_request(http, "GET", "/v1/models"))["data"]]
        if not self.model:
            if not served:
                raise ConfigError(f"{self._url} serves no model; name one with --served-model")
            self.model = served[0]
        elif self.model not in served:
            raise ConfigError(f"--served-model {self.model}: {self._url} serves {', '.join(served) or 'no model'}")

    async def _send_request(self, http: httpx.AsyncClient, method: str, path: str, body: Any = None) -> Any:
        url = self._url + path
        try:
            answer = await http.request(method, url, json=body)
            if answer.status_code == 200:
                return answer.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(f"{url} cannot be reached ({reason}); start a server, or name it with --url") from error
        except ValueError as error:
            raise ConfigError(f"{url} answered with something that is not JSON; is it a model server?") from error
        raise ConfigError(f"{url} answered {answer.status_code}: {answer.text[:300]}")


def _tools_field(tools: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tools": tools} if tools else {}

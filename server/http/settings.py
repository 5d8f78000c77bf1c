"""Settings of the HTTP server, apart from those of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.engine.setting import setting

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Every setting of the HTTP server; the flags of ``quire serve`` are derived from these fields."""

    host: str = setting("127.0.0.1", group="server", help="address to listen on; 0.0.0.0: every network")
    port: int = setting(8000, group="server", help="port to listen on; 0: any free one, which the ready line names")
    api_key: tuple[str, ...] = setting(
        (), group="server", help="key that clients of /v1 must send; may repeat; default: none", metavar="KEY"
    )
    named_api_key: tuple[str, ...] = setting(
        (),
        group="server",
        help="such a key with a name, which is the group of its requests for the scheduling policy; may repeat",
        metavar="NAME=KEY",
    )
    admin_api_key: str | None = setting(
        None,
        group="server",
        help="key for the routes below /admin and those that load adapters, which exist only with it",
        metavar="KEY",
    )
    lora_root: str | None = setting(
        None,
        group="adapters",
        help="folder below which /v1/load_lora_adapter may read adapters; links out of it are refused",
        metavar="DIR",
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        group="server",
        help="origins, such as http://localhost:3000, whose web pages may read answers (CORS); *: any; default: none",
        metavar="ORIGIN",
        several_words=True,
    )
    ssl_certfile: str | None = setting(
        None, group="server", help="certificate chain, in PEM, with which the server speaks TLS", metavar="FILE"
    )
    ssl_keyfile: str | None = setting(
        None, group="server", help="its private key, unless it is in the same file", metavar="FILE"
    )
    ssl_ca_certs: str | None = setting(
        None, group="server", help="certificates, in PEM, that sign those of clients", metavar="FILE"
    )
    ssl_cert_reqs: int = setting(
        0, group="server", help="whether clients need a certificate; 0: no, 1: if they have one, 2: yes", metavar="N"
    )
    ssl_ciphers: str | None = setting(
        None, group="server", help="ciphers of TLS 1.2, as OpenSSL writes them; default: Python's", metavar="LIST"
    )
    root_path: str = setting("", group="server", help="path under which a proxy publishes the server", metavar="PATH")
    default_chat_template_kwargs: str | None = setting(
        None,
        group="server",
        help='variables of the chat template that requests leave out, such as {"enable_thinking": false}',
        metavar="JSON",
    )
    enable_force_include_usage: bool = setting(
        False, group="server", help="end every stream with its usage, whatever its stream_options say"
    )
    shutdown_timeout: float = setting(
        30.0, group="server", help="seconds for requests in flight after SIGTERM", metavar="SECONDS"
    )
    max_request_bytes: int = setting(
        16 * 1024 * 1024, group="server", help="largest request body; a larger one gets 413", metavar="BYTES"
    )
    max_stored_responses: int = setting(
        0,
        group="server",
        help="responses kept in memory for previous_response_id of /v1/responses, the latest; 0: none",
        metavar="N",
    )
    max_stored_response_bytes: int = setting(
        64 * 1024 * 1024, group="server", help="most bytes of all stored responses", metavar="BYTES"
    )
    prometheus_port: int | None = setting(
        None, group="server", help="second port that serves only /metrics", metavar="PORT"
    )
    log_level: str | None = setting(
        None,
        group="logging",
        help="how much to log; also QUIRE_LOG_LEVEL",
        choices=("debug", "info", "warning", "error"),
    )

"""A Hugging Face hub of a few repositories on loopback: the endpoints that ``snapshot_download`` calls."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Repository:
    """Files by revision. A private one wants ``token``; a gated one refuses everyone else by name."""

    revisions: Mapping[str, Mapping[str, bytes]]
    token: str | None = None
    gated: bool = False


@dataclass
class Hub:
    url: str
    requested: list[str] = field(default_factory=list)
    """Paths of the files that were fetched."""


@contextmanager
def serve(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Run until the block ends."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = urlsplit(self.path).path.strip("/").split("/")
            if path[:2] == ["api", "models"]:
                self._api("/".join(path[2:4]), path[4:])
            elif len(path) > 4 and path[2] == "resolve":
                self._file("/".join(path[:2]), path[3], "/".join(path[4:]), body)
            else:
                self._error(404, "EntryNotFound")

        def _api(self, name: str, rest: list[str]) -> None:
            files = self._files(name, rest[1] if len(rest) > 1 else "main")
            if files is None:
                return
            sha = commit(files)
            if rest[:1] == ["tree"]:
                entries = [{"type": "file", "oid": blob(d), "size": len(d), "path": p} for p, d in files.items()]
                self._send(json.dumps(entries).encode(), {})
            else:
                siblings = [{"rfilename": p} for p in files]
                info = {"_id": "0", "id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings}
                self._send(json.dumps(info).encode(), {})

        def _file(self, name: str, revision: str, path: str, body: bool) -> None:
            files = self._files(name, revision)
            if files is None:
                return
            if path not in files:
                return self._error(404, "EntryNotFound")
            if body:
                hub.requested.append(path)
            headers = {"ETag": f'"{blob(files[path])}"', "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
            self._send(files[path], headers, body)

        def _files(self, name: str, revision: str) -> Mapping[str, bytes] | None:
            repository = repositories.get(name)
            allowed = repository and self.headers.get("Authorization") == f"Bearer {repository.token}"
            if repository is None or (repository.token and not repository.gated and not allowed):
                return self._error(401, "RepoNotFound")
            if repository.gated and not allowed:
                return self._error(403, "GatedRepo")
            by_commit = {commit(files): files for files in repository.revisions.values()}
            files = repository.revisions.get(revision) or by_commit.get(revision)
            return self._error(404, "RevisionNotFound") if files is None else files

        def _error(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, headers: Mapping[str, str], body: bool = True) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def commit(files: Mapping[str, bytes]) -> str:
    return hashlib.sha1(b"".join(p.encode() + d for p, d in sorted(files.items()))).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

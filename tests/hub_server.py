"""A server on the loopback that answers as the Hub does: real HTTP, in threads, with faults where asked.

Its files lie on another host (localhost, the Hub being 127.0.0.1), to which it redirects.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from functools import cached_property, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Repo = dict[str, dict[str, bytes]]  # revision → file name → content
CUT = 11 << 20  # behind the client's first whole chunk of 10 MiB, which is all that it resumes from
PIECE = 256 << 10


def commit_of(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


@lru_cache(8)
def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Hub:
    """What the server has, what it refuses, and what it was asked for."""

    def __init__(self, *, latency: float = 0.0, rate: float = 0.0) -> None:
        self.repos: dict[str, Repo] = {}
        self.gated: set[str] = set()
        self.private: dict[str, str] = {}  # repository → the token that opens it
        self.status: int | None = None  # answer everything with it
        self.cuts = 0  # connections still to be cut in the middle of a file
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: list[tuple[str, str | None]] = []  # host, Authorization
        self.sent = 0  # bytes of files
        self.faults: list[Fault] = []  # of the next answers with a range of a file
        self.signed = ""  # what an address of a file must end in now
        self.latency, self.rate = latency, rate  # seconds before an answer; bytes per second of all together
        self.lock, self.free_at = threading.Lock(), 0.0

    def fetched(self) -> set[str]:
        return {
            urlsplit(path).path.rsplit("/", 1)[1]
            for method, path, _ in self.asked
            if method == "GET" and "/cdn/" in path
        }

    def serve(self, context: ssl.SSLContext | None = None) -> None:
        hub = self
        handler = type("Handler", (Handler,), {"hub": hub})
        self.server = Server(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.scheme = "https" if context else "http"
        if context:
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    @cached_property
    def cdn(self) -> str:
        """Another host, as the Hub's is: a redirect to its own host the client follows without a look."""
        return f"{self.scheme}://localhost:{self.server.server_port}/cdn"

    @cached_property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def wait(self, nbytes: int) -> None:
        """Until all connections together may send so many bytes."""
        if self.rate:
            with self.lock:
                begin = max(time.monotonic(), self.free_at)
                self.free_at = begin + nbytes / self.rate
            time.sleep(max(begin - time.monotonic(), 0))


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients hang up, as tests ask them to."""


class Handler(BaseHTTPRequestHandler):
    """`/api/models/R[/revision/V]`, and `/R/resolve/V/F`, which leads to `/cdn/R/V/F` and its byte ranges."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.hub.latency)
        self.hub.asked.append((self.command, self.path, self.headers.get("Range")))
        self.hub.tokens.append((self.headers.get("Host", ""), self.headers.get("Authorization")))
        path = unquote(urlsplit(self.path).path)
        if self.hub.status:
            return self.answer(self.hub.status)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            content = self.hub.repos[match[1]].get(match[2], {}).get(match[3])
            return self.answer(404) if content is None else self.content(content)
        return self.answer(404)

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

    def revision(self, name: str, wanted: str) -> str | None:
        """The revision's name, or None and a refusal."""
        bearer = self.headers.get("Authorization")
        if name not in self.hub.repos or self.hub.private.get(name, bearer) not in (bearer, str(bearer)[7:]):
            self.refuse(404 if bearer else 401, "RepoNotFound")
            return None
        for revision in self.hub.repos[name]:
            if wanted in (revision, commit_of(name, revision)):
                return revision
        return self.refuse(404, "RevisionNotFound")

    def info(self, name: str, wanted: str) -> None:
        if revision := self.revision(name, wanted):
            siblings = [{"rfilename": file} for file in self.hub.repos[name][revision]]
            found = {"id": name, "sha": commit_of(name, revision), "siblings": siblings}
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def resolve(self, name: str, wanted: str, file: str) -> None:
        if not (revision := self.revision(name, wanted)):
            return None
        if name in self.hub.gated:
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        if file not in self.hub.repos[name][revision]:
            return self.refuse(404, "EntryNotFound")
        content = self.hub.repos[name][revision][file]
        return self.answer(
            302,
            Location=f"{self.hub.cdn}/{name}/{revision}/{file}{self.hub.signed}",
            X_Repo_Commit=commit_of(name, revision),
            X_Linked_Etag=f'"{sha256_of(content)}"',
            X_Linked_Size=str(len(content)),
        )

    def content(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        assert asked
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        if self.hub.signed and not self.path.endswith(self.hub.signed):
            return self.answer(403)
        if self.command == "GET" and stop - start > 1 and self.hub.faults:
            fault = self.hub.faults[0]
            if not fault.is_lasting:
                self.hub.faults.pop(0)
            return fault.answer(self, content, start, stop)
        if self.hub.cuts and stop - start > CUT and self.command == "GET":
            self.hub.cuts -= 1
            return self.send(content, start, stop, most=CUT)
        return self.send(content, start, stop)

    def send(self, content: bytes, start: int, stop: int, most: int | None = None, **headers: str) -> None:
        """Answer with a range; with `most` hang up after so many bytes of it."""
        is_ranged = "Range" in self.headers
        if start >= len(content):
            return self.answer(416)
        part = memoryview(content)[start:stop]
        ranged = (
            {"Content_Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"} if is_ranged else {}
        )
        self.send_response(206 if is_ranged else 200)
        known = {"Content_Length": str(len(part)), "ETag": '"x"', "Accept_Ranges": "bytes"}
        for name, value in {**known, **ranged, **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        for begin in range(0, len(part) if self.command == "GET" else 0, PIECE):
            piece = part[:most][begin : begin + PIECE]
            self.hub.wait(len(piece))
            self.wfile.write(piece)
            self.hub.sent += len(piece)
        self.close_connection = self.close_connection or most is not None

    def reset(self) -> None:
        """Hang up without a word, as a broken line does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class Fault:
    """One way in which an answer is wrong; a lasting one is wrong every time."""

    def __init__(self, answer: Callable[[Handler, bytes, int, int], None], *, lasts: bool = False) -> None:
        self.answer, self.is_lasting = answer, lasts


def as_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Any) -> None:
    """The client of this process turned to the server, with an empty cache; no other host can be reached."""
    connect = socket.socket.connect

    def only_loopback(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1"), f"a test wanted to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

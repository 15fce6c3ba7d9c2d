"""Ranges of a file over HTTP: asked for in long runs, every answer checked, taken up where one broke off.

Python's own http.client reads into the caller's memory; proxies, certificates and redirects are urllib's.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import PurePosixPath
from threading import Event
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit

from gpt2lite.checkpoint.remote import (
    INSTEAD,
    Located,
    Patience,
    Remote,
    RemotePath,
    RemoteSource,
    TransientError,
    gave_up,
)
from gpt2lite.checkpoint.source import STEP
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, UsageError, first_line

TIMEOUT = 20.0  # seconds without a byte
CONNECT_TIMEOUT = 10.0
SLOWEST = 1024  # bytes per second over a time-out: what comes slower has stalled
SKIP = 256 << 10  # between two ranges that one request takes together
BUSY = frozenset((408, 425, 429, 500, 502, 503, 504))
MOVED = frozenset((301, 302, 303, 307, 308, 401, 403, 404, 410))  # also how a signed address expires
TRANSPORT = (OSError, HTTPException)
OF_OPENSSL = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # which it reads itself
TRUSTED = (*OF_OPENSSL, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PORTS = {"http": 80, "https": 443}


def pause_of(headers: Mapping[str, str]) -> float:
    """The seconds of a Retry-After, which may also be a date; 0 without one."""
    said = headers.get("Retry-After") or ""
    with suppress(ValueError, TypeError):
        return float(said) if said.isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
    return 0.0


# ---- a connection ------------------------------------------------------------------------------------------


def certificates() -> ssl.SSLContext:
    """What is trusted: what SSL_CERT_FILE and SSL_CERT_DIR say, or what requests and curl are told."""
    told = [name for name in TRUSTED if os.environ.get(name)]
    said = os.environ[told[0]] if told and told[0] not in OF_OPENSSL else None
    is_folder = said is not None and os.path.isdir(said)
    return ssl.create_default_context(cafile=None if is_folder else said, capath=said if is_folder else None)


def _connection(address: str) -> tuple[HTTPConnection, str, dict[str, str]]:
    """A connection for an address, by the environment's proxy, not open yet; its target, and headers."""
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    proxies = {} if urllib.request.proxy_bypass(f"{host}:{port}") else urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    kind = {"http": HTTPConnection, "https": HTTPSConnection}[parts.scheme]
    context = {"context": certificates()} if parts.scheme == "https" else {}
    if not proxy:
        return kind(host, port, timeout=CONNECT_TIMEOUT, **context), target, {}
    via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if via.scheme != "http":
        raise CheckpointError(address, f"the proxy {via.scheme}://{via.hostname} is not of HTTP; {INSTEAD}")
    login = f"{unquote(via.username or '')}:{unquote(via.password or '')}"
    auth = {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"} if via.username else {}
    connection = kind(via.hostname or "", via.port or PORTS["http"], timeout=CONNECT_TIMEOUT, **context)
    if parts.scheme == "http":
        return connection, address, auth
    connection.set_tunnel(host, port, headers=auth)
    return connection, target, {}


def _shown(address: str) -> str:
    """An address without what may be secret in it: its query."""
    return address.partition("?")[0]


def require_as_safe(address: str, found: str, where: object) -> None:
    """Raise CheckpointError where https leads to what is not."""
    if urlsplit(address).scheme == "https" != urlsplit(found).scheme:
        raise CheckpointError(where, f"https leads to {_shown(found)}, which anybody can change on the way")


# ---- reading -----------------------------------------------------------------------------------------------


def _runs(ahead: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges in order, those that are near each other as one."""
    begin = end = -1
    for low, high in ahead:
        if begin >= 0 and end <= low <= end + SKIP:
            end = max(end, high)
            continue
        if begin >= 0:
            yield begin, end
        begin, end = low, high
    if begin >= 0:
        yield begin, end


class HttpReader:
    """Reads a file over one connection at a time; a request is for a whole run of what is to come.

    Raises CheckpointError where the server answers with other bytes than were asked for, where the file is
    not what it was, and where it cannot be reached after all attempts.
    """

    def __init__(self, source: RemoteSource, ahead: Sequence[tuple[int, int]]) -> None:
        self.source, self.runs = source, list(_runs(ahead))
        self.remote, self.name = source.path.remote, str(source.path.inner)
        self.located = source.located
        self.connection: HTTPConnection | None = None
        self.response: HTTPResponse | None = None
        self.came, self.waited = 0, 0.0  # bytes, and seconds in which they were waited for
        self.at = self.end = 0  # the next byte of the answer, and its last plus 1
        self.patience, self.has_moved, self.stopped = Patience(), False, Event()
        self.socket: socket.socket | None = None

    def __enter__(self) -> HttpReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        connection, response = self.connection, self.response
        self.connection = self.response = None
        self.at = self.end = 0
        if response is not None:
            response.close()
        if connection is not None:
            connection.close()

    def stop(self) -> None:
        """Have a read in another thread end at once."""
        self.stopped.set()
        if (found := self.socket) is not None:
            with suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def forget(self, offset: int = 0, nbytes: int = 0) -> None:
        """Do nothing: the system caches none of it."""

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Small ranges from all over the file, a request each."""
        found = [bytearray(nbytes) for _, nbytes in ranges]
        for (offset, _), memory in zip(ranges, found, strict=True):
            self.read_into([memoryview(memory)], offset)
        return [bytes(each) for each in found]

    def read_into(self, memories: Iterable[memoryview], offset: int) -> None:
        """Fill one memory after the other from byte `offset`."""
        for memory in memories:
            while memory:
                count = self._patiently(memory, offset)
                memory, offset = memory[count:], offset + count

    def _patiently(self, memory: memoryview, offset: int) -> int:
        """Some bytes of a file, at least one; a break is a pause, then the same place again."""
        while True:
            try:
                count = self._read_some(memory, offset)
            except ssl.SSLCertVerificationError as error:
                said = f"the certificate of {self.host} is not trusted ({error.verify_message})"
                raise CheckpointError(self.source, f"{said}. Set SSL_CERT_FILE if it should be") from None
            except (TransientError, *TRANSPORT) as error:
                self.close()
                self._wait(error, offset)
            else:
                self.patience.gained(count)
                return count

    @property
    def host(self) -> str:
        """The host that is asked."""
        return urlsplit(self.located.address).hostname or ""

    def _wait(self, error: Exception, offset: int) -> None:
        """Pause before the next attempt, longer each time that nothing came."""
        pause = self.patience.pause_after(error)
        if self.stopped.is_set() or pause is None:
            raise gave_up(self.source, f"cannot be read from byte {offset} at {self.host}", error) from None
        self.has_moved = self.has_moved or getattr(error, "has_moved", False)
        self.stopped.wait(pause)

    def _read_some(self, memory: memoryview, offset: int) -> int:
        if self.has_moved:
            self.located, self.has_moved = self.remote.locate_again(self.name), False
        if self.response is None or not self.at <= offset <= min(self.at + SKIP, self.end - 1):
            self._ask(offset, len(memory))
        while self.at < offset:
            self._take(memoryview(bytearray(min(offset - self.at, STEP))))
        return self._take(memory[: self.end - offset])

    def _take(self, memory: memoryview) -> int:
        """What has come of the answer. Raises TransientError where it ends early or hardly comes."""
        assert self.response is not None
        began = time.monotonic()
        count: int = self.response.fp.readinto1(memory)
        if not count:
            raise TransientError(f"the answer broke off at byte {self.at} of {self.end}")
        self.at += count
        self.came += count
        self.waited += time.monotonic() - began
        if self.waited > TIMEOUT:
            if self.came < SLOWEST * self.waited:
                raise TransientError(f"{self.came} bytes came in {self.waited:.0f} seconds")
            self.came, self.waited = 0, 0.0
        if self.at == self.end:  # all of it: the connection is free
            response, self.response = self.response, None
            response.close()
        return count

    def _ask(self, offset: int, nbytes: int) -> None:
        """Ask for the rest of a run, on a connection that stands if the last answer was taken whole."""
        if self.response is not None:
            self.close()
        ends = (end for begin, end in self.runs if begin <= offset < end)
        end = max(next(ends, 0), min(offset + nbytes, self.located.size))
        if end <= offset:
            raise CheckpointError(self.source, f"ends at byte {self.located.size}; byte {offset} was wanted")
        is_whole = (offset, end) == (0, self.located.size)
        ranged = {} if is_whole else {"Range": f"bytes={offset}-{end - 1}"}
        if self.connection is None:
            self.connection, self.target, self.own = _connection(self.located.address)
        headers = {"Accept-Encoding": "identity", **self.own, **self.located.headers, **ranged}
        if self.stopped.is_set():
            raise TransientError("stopped")
        if self.connection.sock is None:
            self.connection.connect()
        self.socket = self.connection.sock  # which http.client forgets where an answer ends the connection
        self.socket.settimeout(TIMEOUT)
        self.connection.request("GET", self.target, headers=headers)
        self.response = self.connection.getresponse()
        self.came, self.waited = 0, 0.0
        self.at, self.end = offset, self._checked(self.response, offset, end, is_whole=is_whole)

    def _checked(self, response: HTTPResponse, offset: int, end: int, *, is_whole: bool) -> int:
        """The end of the range that an answer holds. Raises unless it is of this file, as it is stored."""
        status, headers = response.status, response.headers
        if status in BUSY:
            said = f"{self.host} answered {status}"
            raise TransientError(said, pause=pause_of(headers))  # type: ignore[arg-type]
        if status in MOVED:
            raise TransientError(f"{self.host} answered {status}", has_moved=True)
        if status == 416:
            raise CheckpointError(self.source, "is shorter than it was; it changed. Load it again.")
        coding = headers.get("Content-Encoding", "identity")
        if status not in (206, 200) or coding != "identity" or response.chunked:
            as_ = ", in chunks" if response.chunked else f", as {coding}" if coding != "identity" else ""
            raise CheckpointError(self.source, f"{self.host} answered {status}{as_}, wanted 206; {INSTEAD}")
        size, length = self.located.size, headers.get("Content-Length")
        if status == 200:
            said = f"answered with all of {length} bytes, not with bytes {offset} to {end - 1} of {size}"
            if not is_whole or length != str(size):
                raise CheckpointError(self.source, f"{self.host} {said}; {INSTEAD}")
            found = size
        else:
            found = self._end_of(headers.get("Content-Range", ""), offset, end)
        if length not in (None, str(found - offset)):
            said = f"answered with {length} bytes for a range of {found - offset}"
            raise CheckpointError(self.source, f"{self.host} {said}; {INSTEAD}")
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        if self.remote.tags.setdefault(self.name, tag) != tag:
            raise CheckpointError(self.source, "changed while it was being read. Load it again.")
        return found

    def _end_of(self, said: str, offset: int, end: int) -> int:
        """The end of a Content-Range, which may come before what was asked for."""
        span, _, total = said.removeprefix("bytes").strip().partition("/")
        first, _, last = span.partition("-")
        if total.isdigit() and int(total) != self.located.size:
            was = f"has {total} bytes, and had {self.located.size}; it changed. Load it again."
            raise CheckpointError(self.source, was)
        if first != str(offset) or not last.isdigit() or not offset <= int(last) < end:
            wanted = f"bytes {offset}-{end - 1}/{self.located.size}"
            raise CheckpointError(
                self.source, f"{self.host} answered with {said[:80]!r}, wanted {wanted}; {INSTEAD}"
            )
        return int(last) + 1


# ---- an address --------------------------------------------------------------------------------------------


def locate(address: str, where: object) -> Located:
    """Follow an address to where it leads, with one request, for a byte.

    Raises CheckpointNotFoundError; CheckpointError for a server that knows no ranges; TransientError.
    """
    said = urllib.request.Request(address, headers={"Range": "bytes=0-0", "Accept-Encoding": "identity"})
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=certificates()))
    try:
        with opener.open(said, timeout=TIMEOUT) as answer:
            status, headers, found = answer.status, answer.headers, answer.url
    except HTTPError as error:
        with error:
            if error.code in BUSY:
                raise TransientError(f"answered {error.code}", pause=pause_of(error.headers)) from None  # type: ignore[arg-type]
            said_here = f"the server answered {error.code} ({error.reason.splitlines()[0]})"
            if error.code in (401, 403, 404, 410):  # some say 403 of what is not there
                do = "; a token goes to hf:// addresses only" if error.code in (401, 403) else ""
                raise CheckpointNotFoundError(where, said_here + do) from None
            raise CheckpointError(where, f"{said_here}; {INSTEAD}") from None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            untrusted = f"the certificate is not trusted ({error.reason.verify_message})"
            raise CheckpointError(where, f"{untrusted}. Set SSL_CERT_FILE if it should be") from None
        raise TransientError(error.reason) from None
    except TRANSPORT as error:
        raise TransientError(first_line(error)) from None
    require_as_safe(address, found, where)
    total = headers.get("Content-Range", "").rpartition("/")[2]
    if status != 206 or not total.isdigit():
        kind = headers.get("Content-Type", "nothing it names")
        said_here = f"the server answered {status} with {kind}, not with a range of bytes"
        raise CheckpointError(where, f"{said_here}; {INSTEAD}")
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    return Located(found, int(total), tag)


def at_address(address: str, beside: Iterable[str]) -> RemotePath:
    """The path of a file at an `https://` address; `beside` are the names that are looked for in its folder.

    A query stays with the file. Raises CheckpointNotFoundError, CheckpointError; UsageError for a password.
    """
    parts = urlsplit(address)
    if parts.username:
        raise UsageError(f"{parts.scheme}://{parts.hostname}{parts.path}: no password in an address, please")
    folder, name = urljoin(_shown(address), "."), unquote(parts.path.rpartition("/")[2])
    if not name:
        raise UsageError(f"{address}: names a folder; pass the address of the file in it")

    def find(other: str) -> Located:
        return locate(address if other == name else urljoin(folder, quote(other)), f"{folder}{other}")

    remote = Remote(folder.rstrip("/"), frozenset((name, *beside)), find, HttpReader)
    remote.tags[name] = remote.located(name).tag

    def look(other: str) -> None:
        with suppress(CheckpointNotFoundError):
            remote.tags[other] = remote.located(other).tag

    with ThreadPoolExecutor(len(remote.names)) as pool:
        list(pool.map(look, remote.names))
    return RemotePath(replace(remote, names=frozenset(remote.known)), PurePosixPath(name))

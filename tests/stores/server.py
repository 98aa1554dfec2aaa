"""Servers on 127.0.0.1: an S3 store and a plain web server that count what they are asked, and fail when told to."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>Please reduce your request rate.</Message></Error>"
FAULTS = ("500", "502", "503", "429", "closed", "cut")
"""Answers of a store in trouble: a status, a connection that is closed at once, or one closed within the answer."""

_Environ = dict[str, Any]
_App = Callable[[_Environ, Callable[..., Any]], Iterable[bytes]]


@dataclass
class Server:
    """A running server: where it is, what it was asked, and how it is to fail."""

    app: _App
    url: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    """Requests by kind: GET, HEAD, PUT, LIST, DELETE, POST (parts of an upload in pieces are PUTs)."""
    failed: Counter[str] = field(default_factory=Counter)
    share: float = 0.0
    """Share of requests that fail."""
    faults: tuple[str, ...] = FAULTS
    hanging_s: float = 0.0
    only: Callable[[_Environ], bool] = lambda environ: True
    """Which requests may fail."""
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self.counts[_kind(environ)] += 1
            fails = self._random.random() < self.share and self.only(environ)
            fault = self._random.choice(self.faults) if fails else ""
            self.failed[fault] += fails
        if not fault:
            return self.app(environ, start_response)
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"].read(length)
        if fault == "hang":
            time.sleep(self.hanging_s)
            fault = "closed"
        if fault == "closed":
            return _closed()
        if fault == "cut":
            start_response("200 OK", [("Content-Length", "1000"), ("ETag", '"0"')])
            return _closed(b"half of ")
        codes = {"503": b"SlowDown", "429": b"TooManyRequests", "500": b"InternalError"}
        body = SLOW_DOWN % codes.get(fault, b"ServiceUnavailable")
        start_response(f"{fault} In Trouble", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    @contextmanager
    def failing(self, share: float, *faults: str, hanging_s: float = 0.0, only: str = "") -> Iterator[None]:
        """Let a seeded share of the requests fail, of those whose path and query contain a text."""
        before = self.share, self.faults, self.only, self.hanging_s
        self._random.seed(0)
        self.failed.clear()
        self.only = lambda environ: only in f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self.share, self.faults, self.hanging_s = share, faults or FAULTS, hanging_s
        try:
            yield
        finally:
            self.share, self.faults, self.only, self.hanging_s = before


def _closed(start: bytes = b"") -> Iterator[bytes]:
    if start:
        yield start
    raise ConnectionAbortedError


def _kind(environ: _Environ) -> str:
    method, query = environ["REQUEST_METHOD"], parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    return "LIST" if method == "GET" and "list-type" in query else method


class Quiet(WSGIRequestHandler):
    """Logs nothing, and keeps connections."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing: the tests tell what went wrong."""

    def connection_dropped(self, error: BaseException, environ: _Environ | None = None) -> None:
        self.close_connection = True


@contextmanager
def serving(app: _App) -> Iterator[Server]:
    """A server of its own threads, for as long as the context lasts."""
    server = Server(app)
    made = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    server.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def s3_app() -> _App:
    return DomainDispatcherApplication(create_backend_app)


def one_by_one(app: _App) -> _App:
    """A store that names one file in each answer when it is asked for a listing."""

    def answer(environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if _kind(environ) == "LIST":
            environ["QUERY_STRING"] += "&max-keys=1"
        return app(environ, start_response)

    return answer


def denying(status: str, code: str, instead_of: _App | None = None, only: str = "") -> _App:
    """A store that refuses all; or, in place of another, requests of files whose method and path contain a text."""

    def answer(environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if instead_of and only not in f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}":
            return instead_of(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<Error><Code>{code}</Code><Message>{code}, says the store</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def files_app(folder: Path) -> _App:
    """A web server of the files below a folder."""

    def answer(environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = folder / environ["PATH_INFO"].lstrip("/")
        if not path.is_file():
            start_response("404 Not Found", [("Content-Length", "0")])
            return []
        data = path.read_bytes()
        headers = [("Content-Length", str(len(data))), ("ETag", f'"{path.stat().st_mtime_ns}"')]
        start_response("200 OK", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [data]

    return answer

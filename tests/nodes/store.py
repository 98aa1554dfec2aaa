"""The store that the nodes share: S3 as its own process sees it, and which node asked it for what."""

from __future__ import annotations

import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from werkzeug.serving import make_server

from tests.stores.server import Quiet, s3_app

NODE = "AWS_SDK_UA_APP_ID"
"""The environment variable by whose value botocore names its process to a store."""


@dataclass(frozen=True)
class Request:
    """One request to the store."""

    method: str
    path: str
    node: str
    """What its process said by `NODE`."""
    address: str
    """The address that it came from."""


class Witness:
    """A WSGI application that notes the requests to the store."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.url = ""
        self._app = s3_app()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = re.search(r"\bapp/(\S+)", environ.get("HTTP_USER_AGENT", ""))
        self.requests.append(
            Request(
                environ["REQUEST_METHOD"], environ["PATH_INFO"], name[1] if name else "", environ.get("REMOTE_ADDR", "")
            )
        )
        return self._app(environ, start_response)

    def objects_by_node(self, method: str, within: str) -> dict[str, set[str]]:
        """For each node the names of the objects whose path contains `within` that it asked for (GET) or made (PUT)."""
        found = defaultdict(set)
        for request in self.requests:
            if request.method == method and within in request.path:
                found[request.node].add(request.path.split(within, 1)[1])
        return dict(found)


@contextmanager
def witnessed(listening: socket.socket) -> Iterator[Witness]:
    """The S3 store of this process on a bound socket, which may belong to another network namespace."""
    witness = Witness()
    host, port = listening.getsockname()
    made = make_server(host, port, witness, threaded=True, request_handler=Quiet, fd=listening.fileno())
    witness.url = f"http://{host}:{port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield witness
    finally:
        made.shutdown()
        thread.join()
        made.server_close()

"""`watched:///folder/file`: local files with the manners of an object store, a log of its use, and faults on demand."""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

from fsspec.implementations.local import LocalFileSystem
from switch import happens, note


class WatchedFileSystem(LocalFileSystem):
    """Writes are whole or not at all, as a PUT is. Reads and writes of whole files are lines in two logs."""

    protocol = "watched"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return super()._strip_protocol(str(path).removeprefix("watched://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"watched://{self._strip_protocol(name)}"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **keywords: Any) -> bytes:
        path = self._strip_protocol(path)
        happens("get", path)
        content = super().cat_file(path, start=start, end=end, **keywords)
        note("reads.log", f"{os.getpid()} {path}")
        return content

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **keywords: Any) -> None:
        path = self._strip_protocol(path)
        happens("put", path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Not a name that could be taken for a file of the store.
        uploaded = os.path.join(os.environ["FAULTS_SWITCHES"], uuid4().hex)
        with open(uploaded, "wb") as file:
            file.write(value)
        try:
            os.link(uploaded, path) if mode == "create" else os.rename(uploaded, path)
        finally:
            if os.path.exists(uploaded):
                os.unlink(uploaded)
        note("writes.log", f"{os.getpid()} {path}")

    def _open(self, path: str, mode: str = "rb", **keywords: Any) -> Any:
        if "w" in mode:
            happens("put", path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return super()._open(path, mode, **keywords)

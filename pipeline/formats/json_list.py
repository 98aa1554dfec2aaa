"""Lists in json files that need not fit into memory: their objects are read, and written, one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from pipeline import storage
from pipeline.records import InputError

CHUNK = 16 << 20
"""Bytes read at a time."""

LONGEST = 1 << 26
"""Bytes of the longest object, which takes up to twenty times as many in memory; a damaged one could be the file."""

BYTE_ORDER_MARK = "\u00ef\u00bb\u00bf"
"""What some programs on Windows put in front of UTF-8, as Latin-1."""

_SPACE = re.compile(r"[ \t\n\r]*")


def scan(url: str) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Every object in the list that a json file is: where its bytes begin in the file, these bytes, and its content.

    InputError names the byte where the file is anything else than one list of objects.
    """
    with storage.open_read(url) as file:
        text = _Text(url, file)
        text.skip(BYTE_ORDER_MARK)
        if (first := text.next()) != "[":
            of_data_set = " (of a COCO data set, its annotations alone)" if first == "{" else ""
            raise text.error(f"a list [...] at the top level{of_data_set}")
        text.at += 1
        if text.next() == "]":
            text.at += 1
        else:
            while True:
                if text.next() != "{":
                    raise text.error("an object {...}")
                yield text.take()
                mark = text.next()
                if mark not in (",", "]"):
                    raise text.error("a comma or the end of the list")
                text.at += 1
                if mark == "]":
                    break
        if text.next():
            raise text.error("the end of the file")


def write(file: IO[bytes], lines: Iterable[str]) -> None:
    """A json list with one already encoded element per line."""
    file.write(b"[")
    for number, line in enumerate(lines):
        file.write((",\n" if number else "\n").encode() + line.encode())
    file.write(b"\n]")


class _Text:
    """The part of a file that is looked at. As Latin-1 every byte is a character, so that places are byte offsets."""

    def __init__(self, url: str, file: IO[bytes]) -> None:
        self.url, self.file = url, file
        self.decode = json.JSONDecoder().raw_decode
        self.text, self.base, self.at = "", 0, 0

    def error(self, expected: str, at: int | None = None) -> InputError:
        at = self.at if at is None else at
        found = f"found {self.text[at : at + 20]!r}" if at < len(self.text) else "the file ends"
        return InputError(f"{self.url}: byte {self.base + at}: expected {expected}, {found}")

    def grow(self) -> bool:
        """Read on, and forget what lies behind; False at the file's end."""
        more = self.file.read(CHUNK)
        self.text = self.text[self.at :] + more.decode("latin-1")
        self.base, self.at = self.base + self.at, 0
        return bool(more)

    def skip(self, prefix: str) -> None:
        """Go past these characters where the text begins with them."""
        self.grow()
        self.at = len(prefix) if self.text.startswith(prefix) else 0

    def next(self) -> str:
        """The next character that is no white space; empty at the file's end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def take(self) -> tuple[int, bytes, dict[str, Any]]:
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                data = self.text[self.at : end]
                content = data.encode("latin-1")
                if not data.isascii():
                    value = json.loads(content)
                break
            except json.JSONDecodeError as error:
                # A literal, number or escape that the chunk cuts is reported where it begins, a string by its message.
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not cut or len(self.text) - self.at > LONGEST:
                    raise self.error(f"json ({error.msg})", error.pos) from None
                if not self.grow():
                    raise self.error("the rest of an object", len(self.text)) from None
            except (ValueError, RecursionError) as error:
                raise self.error(f"json ({type(error).__name__})") from None
        offset = self.base + self.at
        self.at = end
        return offset, content, value

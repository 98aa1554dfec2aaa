"""Seeded damage to valid dumps: to their bytes, and to what the bytes say."""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from typing import Any

NUMBERS = [
    *(b"-1", b"0", b"1", b"31", b"33", b"255", b"65536", b"2147483647", b"2147483648", b"4294967296"),
    *(b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"-9223372036854775809", b"1e309"),
    *(b"-1e309", b"NaN", b"Infinity", b"-Infinity", b"nan", b"inf", b"1e-320", b"0.5", b"1_0", b"007", b"9" * 5000),
]
TEXTS = [
    *("", ".", "..", "../evil.png", "../../evil.png", "a/../../evil.png", "/evil.png", "~/evil.png", "..\\evil.png"),
    *("file:///evil.png", "memory://evil.png", "a::b.png", "a\0b.png", "a\nb.png", "a\x1b[31m.png", "\ud800", "\udcff"),
    *("_ledger/run.json", "_ledger/parts/x.png", "x" * 300, "x" * 5000, "é" * 200, "日本.png", "%2e%2e/evil.png"),
    *("https://user:s3cr3t@host/a.png", "a.png?sig=s3cr3t", "{0.__class__}", "PPYo0", "o" * 40, "0" * 5000, "\u2028"),
]


def numbers(data: bytes, rng: random.Random) -> bytes:
    """One number in text replaced."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return data + rng.choice(NUMBERS)
    spot = rng.choice(found)
    return data[: spot.start()] + rng.choice(NUMBERS) + data[spot.end() :]


def words(data: bytes, rng: random.Random) -> bytes:
    """A hostile text in some place, or instead of a word."""
    text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    found = list(re.finditer(rb"[^\s\",]+", data))
    if not found or rng.random() < 0.3:
        at = rng.randrange(len(data) + 1)
        return data[:at] + text + data[at:]
    spot = rng.choice(found)
    return data[: spot.start()] + text + data[spot.end() :]


def flips(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))) if data else ():
        at = rng.randrange(len(changed))
        changed[at] = rng.choice((changed[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 255))
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:start], data[start:], data[:start] + data[end:]))


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of the data put into another place of it."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[start : min(end, start + 4096)] * rng.choice((1, 1, 2, 20)) + data[at:]


def foreign(data: bytes, rng: random.Random) -> bytes:
    """Line ends, byte order marks and encodings of other systems."""
    return rng.choice(
        (
            data.replace(b"\n", b"\r\n"),
            b"\xef\xbb\xbf" + data,
            data.decode("latin-1").encode("utf-16"),
            data + b"\0" * rng.randrange(9),
            data.replace(b" ", b"\t\x0b "),
        )
    )


BYTES = (flips, flips, cut, splice)
TEXT = (*BYTES, numbers, numbers, words, words, foreign)


def hostile(rng: random.Random, depth: int = 0) -> Any:
    """A value that has no business where it is put."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((-1, 0, 1, 31, 2**31, 2**62, 2**63, 2**64, -(2**63) - 1, 10**40, 10**400))
    if kind == 2:
        return rng.choice((0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324))
    if kind in (3, 4, 5):
        return rng.choice(TEXTS)
    if kind == 6:
        return [hostile(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(TEXTS): hostile(rng, depth + 1) for _ in range(rng.randrange(3))}
    value: Any = []
    for _ in range(rng.choice((10, 100, 300))):
        value = rng.choice(([value], {"a": value}))
    return value


def structure(content: Any, rng: random.Random) -> Any:
    """One place of nested lists and dicts changed, in a copy."""
    content = json.loads(json.dumps(content))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(content)
    if not places:
        return hostile(rng)
    node, key = rng.choice(places)
    what = rng.randrange(5)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, list):
        node.insert(key, node[key])
    elif what == 2:
        other, there = rng.choice(places)
        # What holds the place itself would have no end.
        value = json.dumps(other[there]) if isinstance(other, dict | list) and _has(other, there) else "null"
        node[key] = json.loads(value)
    elif what == 3 and isinstance(node, dict):
        node[rng.choice(TEXTS)] = hostile(rng)
    else:
        node[key] = hostile(rng)
    return content


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def png(data: bytes, rng: random.Random) -> bytes:
    """One chunk of a PNG changed, its checksum right again, so that the damage is looked at."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    what = rng.randrange(6)
    if kind == b"IDAT" and what < 3:
        with_damage = rng.choice(BYTES)(zlib.decompress(content), rng)
        chunks[number] = kind, zlib.compress(with_damage + bytes(rng.choice((0, 0, 1 << 20))))
    elif what == 3:
        del chunks[number]
    elif what == 4:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[number])
    elif what == 5:
        more = rng.choice((b"acTL", b"fcTL", b"fdAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"IHDR", b"gAMA"))
        extra = rng.randbytes(rng.choice((0, 4, 8, 13, 26, 768)))
        chunks.insert(rng.randrange(1, len(chunks) + 1), (more, extra))
    else:
        chunks[number] = kind, flips(content, rng)
    return data[:8] + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )


def mutated(data: bytes, kinds: tuple[Any, ...], rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(kinds)(data, rng)
    return data

"""Mask PNGs, nearly all of whose pixels are empty: decoded and encoded at the cost of the object, not of the frame."""

from __future__ import annotations

import struct
from functools import lru_cache

import cv2
import numpy as np
from zlib_ng import zlib_ng

from pipeline.images import PNG_SIGNATURE, decoded
from pipeline.records import InputError, cut_to_box


def largest_png(width: int, height: int) -> int:
    """Bytes that no PNG of this size needs: 16 bits of four channels not packed at all, and as much again to spare."""
    return 16 * (width + 1) * height + (1 << 20)


def decode_png(url: str, data: bytes, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The object in a mask PNG of any depth, (h, w) bool cut to its bounding box, and the box's (x, y).

    Any non-zero colour is the object; alpha is not looked at. InputError names `url` where the bytes are no whole PNG
    of `width` x `height`.
    """
    if not data.startswith(PNG_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        raise InputError(f"{url}: expected a PNG")
    # Sizes are compared before anything is decoded: a header can promise any number of pixels.
    size = struct.unpack(">II", data[16:24])
    if size != (width, height):
        raise InputError(f"{url}: mask of {size[0]} x {size[1]} pixels, expected {width} x {height} as the image")
    if found := _decode_sub_filtered(data, width, height):
        return found
    mask = decoded(data, cv2.IMREAD_UNCHANGED)
    if mask is None or mask.shape[:2] != (height, width):
        raise InputError(f"{url}: expected a PNG that can be decoded")
    return cut_to_box(mask if mask.ndim == 2 else (mask[:, :, :3] != 0).any(axis=2))


def _decode_sub_filtered(data: bytes, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The object in a PNG as OpenCV writes it by default, some times faster than OpenCV reads it; None for any other.

    All rows of such a gray PNG are differences to the left; only the few that are not empty need to be summed up.
    """
    if data[24:29] != b"\x08\x00\x00\x00\x00":
        return None
    chunks, position = [], 33
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            chunks.append(data[position + 8 : position + 8 + length])
        position += 12 + length
    packed = b"".join(chunks)
    size = height * (1 + width)
    # Deflate packs at most 1032:1, so that this bounds what a hostile file can unfold to; no real mask packs so badly.
    if len(packed) > max(size // 64, 1024):
        return None
    try:
        # The first row's filter tells enough to leave other PNGs to OpenCV without unpacking them twice.
        if zlib_ng.decompressobj().decompress(packed, 1) != b"\x01":
            return None
        # Five times as fast as zlib at the long runs of which empty rows consist.
        raw = zlib_ng.decompress(packed, bufsize=size)
    except zlib_ng.error:
        return None
    if len(raw) != size:
        return None
    table = np.frombuffer(raw, np.uint8).reshape(height, 1 + width)
    if not (table[:, 0] == 1).all():
        return None
    rows = np.flatnonzero(table[:, 1:].max(axis=1))
    if len(rows) == 0:
        return np.zeros((0, 0), bool), (0, 0)
    top = int(rows[0])
    differences = table[top : rows[-1] + 1, 1:]
    columns = np.flatnonzero(differences.any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    pixels = np.cumsum(differences[:, left:right], axis=1, dtype=np.uint8)
    if pixels[:, -1].any():
        # An object at the frame's right edge does not end in a difference.
        pixels = np.concatenate([pixels, np.repeat(pixels[:, -1:], width - right, axis=1)], axis=1)
    mask, (x, y) = cut_to_box(pixels)
    return mask, (left + x, top + y)


def encode_png(mask: np.ndarray, origin: tuple[int, int], width: int, height: int) -> bytes:
    """An 8-bit gray PNG of `width` x `height`, 255 where `mask` (h, w) bool at `origin` (x, y) is set and 0 elsewhere.

    Only the rows of the box are compressed; what the empty rows above and below pack into is known beforehand.
    """
    (left, top), (rows, columns) = origin, mask.shape
    below = height - top - rows
    box = np.zeros((rows, 1 + width), np.uint8)
    np.multiply(mask, np.uint8(255), out=box[:, 1 + left : 1 + left + columns])
    packer = zlib_ng.compressobj(1, zlib_ng.DEFLATED, -15, 9, zlib_ng.Z_RLE)
    packed = packer.compress(box) + packer.flush(zlib_ng.Z_FULL_FLUSH)
    # Adler-32 of a run of n zeros: the low half stays, the high half grows by n times the low one.
    checksum = zlib_ng.adler32(box, 1 | _times(top * (1 + width), 1) << 16)
    low = checksum & 0xFFFF
    checksum = low | ((checksum >> 16) + _times(below * (1 + width), low)) % 65521 << 16
    stream = b"\x78\x01" + _empty_rows(top, width) + packed + _empty_rows(below, width) + b"\x03\x00"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = stream + struct.pack(">I", checksum)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _times(count: int, low: int) -> int:
    return count * low % 65521


def _empty_rows(rows: int, width: int) -> bytes:
    """Raw deflate blocks of that many rows of zeros, put together from powers of two."""
    return b"".join(_empty_block(1 << bit, width) for bit in range(rows.bit_length()) if rows >> bit & 1)


@lru_cache(maxsize=64)
def _empty_block(rows: int, width: int) -> bytes:
    packer = zlib_ng.compressobj(9, zlib_ng.DEFLATED, -15, 9, zlib_ng.Z_RLE)
    # A full flush ends at a byte and forgets what came before, so that blocks can follow each other in any order.
    return packer.compress(bytes(rows * (1 + width))) + packer.flush(zlib_ng.Z_FULL_FLUSH)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib_ng.crc32(kind + data))

"""Values that no program writes: every decoder and reader takes them as what they are, or refuses them in one line."""

import json
import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import rle
from pipeline.formats.cityscapes import CityscapesReader
from pipeline.formats.coco import CocoReader
from pipeline.formats.mask_png import decode_png
from pipeline.formats.parquet import ParquetReader
from pipeline.records import InputError

pytestmark = pytest.mark.slow
WIDTH, HEIGHT = 12, 9
many = settings(max_examples=300, deadline=None, derandomize=True)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
near = st.integers(-3, WIDTH * HEIGHT + 3)
counts = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12) | st.lists(near, max_size=9)
sizes = st.just([HEIGHT, WIDTH]) | anything


def fits(mask, origin):
    (x, y), (height, width) = origin, mask.shape
    assert mask.dtype == bool
    assert 0 <= x <= x + width <= WIDTH
    assert 0 <= y <= y + height <= HEIGHT


def read_all(reader):
    """The instances of every frame that is sound; each other one must have been refused in one line."""
    found = []
    try:
        refs = reader.list_frames({})
    except InputError as error:
        return [str(error)]
    for ref in refs:
        try:
            if ref.error:
                raise InputError(ref.error)
            for instance in reader.read(ref, WIDTH, HEIGHT):
                fits(instance.mask, instance.origin)
                assert type(instance.score) is float
                assert np.isfinite(instance.score)
        except InputError as error:
            found.append(str(error))
    return found


@many
@given(counts | anything, sizes)
def test_run_lengths_are_a_mask_in_the_frame_or_refused(value, size):
    with suppress(InputError):
        mask, origin = rle.decode(value, size, WIDTH, HEIGHT)
        fits(mask, origin)
        again = rle.decode(rle.encode(mask, origin, WIDTH, HEIGHT), [HEIGHT, WIDTH], WIDTH, HEIGHT)
        assert np.array_equal(again[0], mask)
        assert again[1] == origin


@many
@given(anything | st.lists(st.lists(st.floats(-2e6, 2e6) | st.integers(-20, 40), max_size=10), max_size=4))
def test_polygons_are_a_mask_in_the_frame_or_refused(value):
    with suppress(InputError):
        fits(*rle.from_polygons(value, WIDTH, HEIGHT))


def _png(kinds):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in kinds
    )


header = st.builds(
    lambda *fields: struct.pack(">IIBBBBB", *fields),
    *(st.sampled_from((WIDTH, WIDTH, WIDTH, 0, 1 << 31)), st.sampled_from((HEIGHT, HEIGHT, HEIGHT, 1))),
    *(st.sampled_from((1, 2, 4, 8, 8, 16, 7)), st.sampled_from((0, 0, 2, 3, 4, 6, 9)), *[st.integers(0, 1)] * 3),
)
chunk = st.tuples(
    st.sampled_from((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"iCCP", b"IEND", b"IHDR")), st.binary(max_size=60)
)
rows = st.binary(max_size=2 * HEIGHT * (1 + WIDTH)).map(lambda data: (b"IDAT", zlib.compress(data)))


@many
@given(header, st.lists(chunk | rows, max_size=4), st.booleans(), st.binary(max_size=20))
def test_a_png_is_a_mask_in_the_frame_or_refused(first, chunks, ended, rest):
    data = _png([(b"IHDR", first), *chunks, *([(b"IEND", b"")] if ended else [])]) + rest
    with suppress(InputError):
        mask, origin = decode_png("a.png", data, WIDTH, HEIGHT)
        fits(mask, origin)
        assert ended or b"IEND" in data


@many
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_list_of_pngs_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as root:
        for name in ("pred", "images"):
            (Path(root) / name).mkdir()
        (Path(root) / "images/x.png").touch()
        (Path(root) / "pred/x_0.png").write_bytes(cv2.imencode(".png", np.eye(HEIGHT, WIDTH, dtype=np.uint8))[1])
        (Path(root) / "pred/x_pred.txt").write_bytes(b"x_0.png 24 0.5\n" + data)
        assert all(root in error for error in read_all(CityscapesReader(f"{root}/pred", f"{root}/images")))


entry = st.fixed_dictionaries(
    {"image_id": st.integers(0, 2) | anything, "category_id": st.integers(0, 99) | anything},
    optional={
        "segmentation": st.fixed_dictionaries({"size": sizes, "counts": counts | anything}) | anything,
        "score": anything,
        **dict.fromkeys(("status", "reason", "changed_pixels", "confidence", "note"), anything),
    },
)


@many
@given(st.lists(entry | anything, max_size=4) | anything, st.booleans())
def test_any_json_of_results_is_read_or_refused(content, ascii_only):
    with tempfile.TemporaryDirectory() as root:
        text = json.dumps(content, ensure_ascii=ascii_only).encode(errors="surrogatepass")
        (Path(root) / "results.json").write_bytes(text)
        reader = CocoReader(f"{root}/results.json", root, image_pattern="{image_id}.jpg")
        assert all(root in error for error in read_all(reader))


@many
@given(anything)
def test_any_json_as_list_of_images_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "results.json").write_text('[{"image_id": 1, "category_id": 1}]')
        (Path(root) / "images.json").write_text(json.dumps({"images": [content], "categories": content}))
        reader = CocoReader(f"{root}/results.json", root, image_list=f"{root}/images.json")
        assert all(root in error for error in read_all(reader))


row = st.fixed_dictionaries(
    {
        "frame_id": st.text(max_size=5) | st.none(),
        "file_name": st.text(max_size=5) | st.none(),
        "height": st.sampled_from((HEIGHT, HEIGHT, None, -1)),
        "width": st.just(WIDTH),
        "instances": st.none()
        | st.lists(
            st.none()
            | st.fixed_dictionaries(
                {
                    "instance_id": st.text(max_size=5) | st.none(),
                    "category_id": st.integers(-(2**63), 2**63 - 1) | st.none(),
                    "size": st.just([HEIGHT, WIDTH]) | st.none() | st.lists(st.none() | st.integers(0, 99), max_size=3),
                    "counts": st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=9) | st.none(),
                    "score": st.none() | st.floats(),
                }
            ),
            max_size=3,
        ),
    }
)


@many
@given(st.lists(row, max_size=4), st.booleans())
def test_any_values_in_parquet_are_read_or_refused(content, dictionary):
    with tempfile.TemporaryDirectory() as root:
        try:
            table = pa.Table.from_pylist(content)
        except UnicodeEncodeError:
            return
        pq.write_table(table, f"{root}/a.parquet", use_dictionary=dictionary)
        assert all(root in error for error in read_all(ParquetReader(f"{root}/a.parquet", root)))

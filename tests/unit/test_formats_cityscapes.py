"""The Cityscapes folder: names, order and masks come back as they were; every bad line is named."""

import os
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.formats.mask_png import decode_png, encode_png
from pipeline.records import Frame, FrameRef, InputError, Instance, cut_to_box
from tests.conftest import peak_kib

WIDTH, HEIGHT = 48, 32


def blob(seed, width=WIDTH, height=HEIGHT):
    """A full-frame bool mask with one rectangle that has holes."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
    mask[top : top + rng.integers(2, 12), left : left + rng.integers(2, 12)] = True
    return mask & (rng.random((height, width)) < 0.9)


def png(mask, *parameters):
    values = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
    return cv2.imencode(".png", values, list(parameters))[1].tobytes()


def write_dump(root, frames, images="images"):
    """`frames`: path below predictions without ending -> [(png, label, score, mask)]. Images get the city's folder."""
    for base, instances in frames.items():
        folder, _, stem = base.rpartition("/")
        for name, _, _, mask in instances:
            storage.put(storage.join(f"{root}/pred", f"{folder}/{name}" if folder else name), png(mask))
        lines = "".join(f"{name} {label} {score}\n" for name, label, score, _ in instances)
        storage.put(f"{root}/pred/{base}_pred.txt", lines.encode())
        storage.put(f"{root}/{images}/{stem.split('_')[0]}/{stem}.png", png(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
    return CityscapesReader(f"{root}/pred", f"{root}/{images}")


def read_frames(reader, width=WIDTH, height=HEIGHT):
    refs = reader.list_frames()
    assert [ref.error for ref in refs] == [""] * len(refs)
    return [Frame(ref.frame_id, ref.file_name, width, height, list(reader.read(ref, width, height))) for ref in refs]


def convert(reader, writer):
    """The whole way of a dump through a reader and a writer, frames committed two at a time and out of order."""
    refs, frames, parts = reader.list_frames(), read_frames(reader), {}
    for start in reversed(range(0, len(frames), 2)):
        part = writer.commit(frames[start : start + 2])
        parts |= {frame.frame_id: part for frame in frames[start : start + 2]}
    writer.finish(refs, parts)


def masks(frame):
    """Per instance the full-frame mask as bytes, in order."""
    found = []
    for instance in frame.instances:
        mask = np.zeros((frame.height, frame.width), bool)
        (x, y), (height, width) = instance.origin, instance.mask.shape
        mask[y : y + height, x : x + width] = instance.mask
        found.append(mask.tobytes())
    return found


def content(frame):
    return [(i.category_id, i.score, m) for i, m in zip(frame.instances, masks(frame))]


FRAMES = {
    "aachen/aachen_0_1_leftImg8bit": [("b.png", 26, 0.9, blob(1)), ("masks/a.png", 24, 0.1234567890123, blob(2))],
    "bochum/bochum_0_1_leftImg8bit": [],
    "flat_0_1_leftImg8bit": [("one.png", 33, 1.0, blob(3)), ("none.png", 25, 0.5, np.zeros((HEIGHT, WIDTH), bool))],
}


def test_a_dump_comes_back_with_the_same_names_order_and_masks(root):
    reader = write_dump(root, FRAMES)
    convert(reader, CityscapesWriter(f"{root}/out"))
    before, after = read_frames(reader), read_frames(CityscapesReader(f"{root}/out", f"{root}/images"))
    assert [frame.frame_id for frame in after] == list(FRAMES)
    assert [frame.file_name for frame in after] == [
        f"{f.split('/')[-1].split('_')[0]}/{f.split('/')[-1]}.png" for f in FRAMES
    ]
    for old, new, instances in zip(before, after, FRAMES.values()):
        assert [i.instance_id for i in new.instances] == [name for name, *_ in instances]
        assert content(old) == content(new)
        assert masks(new) == [mask.tobytes() for *_, mask in instances]
    assert storage.find(f"{root}/out", ("",)) == storage.find(f"{root}/pred", ("",))


def test_what_is_written_is_gray_with_0_and_255_and_the_listing_comes_last(tmp_path, monkeypatch):
    reader = write_dump(str(tmp_path), FRAMES)
    order = []
    put = storage.put
    monkeypatch.setattr(storage, "put", lambda url, data: (order.append(url), put(url, data)))
    CityscapesWriter(str(tmp_path / "out")).commit(read_frames(reader)[:1])
    assert [url.rsplit("/", 1)[1] for url in order] == ["b.png", "a.png", "aachen_0_1_leftImg8bit_pred.txt"]
    written = cv2.imread(str(tmp_path / "out/aachen/b.png"), cv2.IMREAD_UNCHANGED)
    assert written.dtype == np.uint8
    assert np.array_equal(written, blob(1) * np.uint8(255))
    assert (tmp_path / order[-1]).read_text() == "b.png 26 0.9\nmasks/a.png 24 0.1234567890123\n"


def test_a_repeated_commit_writes_the_same_bytes(tmp_path):
    frames = read_frames(write_dump(str(tmp_path), FRAMES))
    files = []
    for _ in range(2):
        CityscapesWriter(str(tmp_path / "out")).commit(frames)
        files.append({path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()})
    assert files[0] == files[1]


def test_blank_lines_windows_line_ends_and_extra_spaces_are_tolerated(tmp_path):
    reader = write_dump(str(tmp_path), {"x": [("a.png", 26, 0.9, blob(1)), ("b.png", 26, 0.9, blob(2))]})
    (tmp_path / "pred/x_pred.txt").write_bytes(b"\xef\xbb\xbf\r\n  a.png\t26   .5 \r\n\r\nb.png 24 1e-3")
    found = read_frames(reader)[0].instances
    assert [(i.instance_id, i.category_id, i.score) for i in found] == [("a.png", 26, 0.5), ("b.png", 24, 0.001)]


@pytest.mark.parametrize("root_folder", ["", "city/"])
@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".JPG"])
def test_images_are_found_by_name_flat_or_by_city(tmp_path, root_folder, ending):
    (tmp_path / "pred").mkdir()
    (tmp_path / "pred/x_pred.txt").touch()
    (tmp_path / "images" / root_folder).mkdir(parents=True)
    (tmp_path / "images" / f"{root_folder}x{ending}").touch()
    (ref,) = CityscapesReader(str(tmp_path / "pred"), str(tmp_path / "images")).list_frames()
    assert (ref.frame_id, ref.file_name, ref.error) == ("x", f"{root_folder}x{ending}", "")


def test_a_missing_image_is_the_error_of_its_frame_alone(tmp_path):
    reader = write_dump(str(tmp_path), FRAMES)
    (tmp_path / "pred/y_pred.txt").touch()
    *fine, ref = reader.list_frames()
    assert ref.error == f"{tmp_path}/pred/y_pred.txt: expected an image y.png (or .jpg, .jpeg) below {tmp_path}/images"
    assert not any(ref.error for ref in fine)


def test_two_images_of_one_name_are_an_error(tmp_path):
    reader = write_dump(str(tmp_path), {"x": []})
    (tmp_path / "images/x.jpg").touch()
    (ref,) = reader.list_frames()
    assert "expected one image named x" in ref.error
    assert "found x.jpg and x/x.png" in ref.error


def test_two_listings_of_one_name_are_an_error_on_both(tmp_path):
    reader = write_dump(str(tmp_path), {"a/x": [], "b/x": []})
    assert all(
        "expected one x_pred.txt, found a/x_pred.txt and b/x_pred.txt" in ref.error for ref in reader.list_frames()
    )


def test_a_folder_without_listings_or_no_folder_cannot_be_read(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"_pred\.txt in or below this folder"):
        CityscapesReader(str(tmp_path / "images"), str(tmp_path / "images")).list_frames()
    with pytest.raises(InputError, match="expected a folder"):
        CityscapesReader(str(tmp_path / "no"), str(tmp_path / "images")).list_frames()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png 26", r"x_pred.txt:3: expected '<png> <labelID> <score>', got 2 fields"),
        ("a.png 26 0.9 1", r"x_pred.txt:3: expected '<png> <labelID> <score>', got 4 fields"),
        ("a.png car 0.9", r"x_pred.txt:3: expected a whole number as label id, got 'car'"),
        ("a.png 26.0 0.9", r"x_pred.txt:3: expected a whole number as label id"),
        ("a.png 23 0.9", r"x_pred.txt:3: unknown category 23, expected 24 to 33"),
        ("a.png 34 0.9", r"x_pred.txt:3: unknown category 34"),
        ("a.png 26 high", r"x_pred.txt:3: expected a finite number as score, got 'high'"),
        ("a.png 26 nan", r"x_pred.txt:3: expected a finite number as score"),
        ("a.png 26 inf", r"x_pred.txt:3: expected a finite number as score"),
        ("../a.png 26 0.9", r"x_pred.txt:3: '../a.png': expected a path that stays below"),
        ("/etc/a.png 26 0.9", r"x_pred.txt:3: '/etc/a.png': expected a path that stays below"),
        ("file:///a.png 26 0.9", r"x_pred.txt:3: .* expected a path that stays below"),
        ("a::b.png 26 0.9", r"x_pred.txt:3: .* expected a path that stays below"),
        ("./first.png 26 0.9", r"x_pred.txt:3: expected every PNG once, ./first.png is also in line 1"),
        ("gone.png 26 0.9", r"gone.png: no such file"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    reader = write_dump(str(tmp_path), {"x": [("first.png", 26, 1, blob(1)), ("a.png", 26, 1, blob(2))]})
    (tmp_path / "pred/x_pred.txt").write_text(f"first.png 26 1\n\n{line}\n")
    (ref,) = reader.list_frames()
    with pytest.raises(InputError, match=message):
        list(reader.read(ref, WIDTH, HEIGHT))


def test_a_listing_that_is_not_utf8_is_refused(tmp_path):
    reader = write_dump(str(tmp_path), {"x": []})
    (tmp_path / "pred/x_pred.txt").write_bytes("b\xe4r.png 26 1".encode("latin-1"))
    (ref,) = reader.list_frames()
    with pytest.raises(InputError, match=r"x_pred.txt: expected text in UTF-8"):
        list(reader.read(ref, WIDTH, HEIGHT))


def _damaged(mask):
    data = bytearray(png(mask))
    data[len(data) // 2] ^= 0x55
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a PNG"),
        (b"not a png at all, but long enough to hold a header", "expected a PNG"),
        (png(blob(1))[:-30], "can be decoded"),
        (_damaged(blob(1)), "can be decoded"),
        (png(blob(1, 48, 31)), "mask of 48 x 31 pixels, expected 48 x 32"),
        (png(blob(1)).replace(struct.pack(">II", 48, 32), struct.pack(">II", 10**5, 10**5)), "mask of 100000 x 100000"),
    ],
)
def test_a_png_that_is_damaged_or_of_another_size_is_named(data, message):
    with pytest.raises(InputError, match=rf"^somewhere/a\.png: .*{message}"):
        decode_png("somewhere/a.png", data, WIDTH, HEIGHT)


def _packed_bits(mask):
    """A PNG of 1 bit per pixel, as many tools write masks; OpenCV cannot."""
    rows = np.hstack([np.zeros((HEIGHT, 1), np.uint8), np.packbits(mask, axis=1)])
    chunks = b"IHDR" + struct.pack(">IIBBBBB", WIDTH, HEIGHT, 1, 0, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND"
    lengths = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(lengths)


@pytest.mark.parametrize(
    "form",
    [
        lambda mask: png(mask),
        lambda mask: png(mask.astype(np.uint8)),
        lambda mask: png(mask.astype(np.uint16) * 256),
        lambda mask: png(mask[:, :, None] * np.array([1, 0, 0], np.uint8)),
        lambda mask: png(np.dstack([mask * np.uint8(9)] * 3 + [np.full(mask.shape, 255, np.uint8)])),
        lambda mask: png(mask, cv2.IMWRITE_PNG_BILEVEL, 1),
        _packed_bits,
    ],
    ids=["gray", "ones", "16 bit", "faint blue", "opaque alpha", "bilevel", "1 bit"],
)
def test_any_colour_that_is_not_black_is_the_object(form):
    for seed in range(5):
        mask = blob(seed)
        found, origin = decode_png("a.png", form(mask), WIDTH, HEIGHT)
        expected, place = cut_to_box(mask)
        assert origin == place
        assert np.array_equal(found, expected)
        assert found.dtype == bool


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(*[st.integers(0, 40)] * 4), st.integers(0, 99), st.booleans())
def test_pngs_are_read_and_written_as_opencv_does(width, height, corners, seed, noisy):
    mask = np.zeros((height, width), bool)
    top, bottom, left, right = corners
    mask[top:bottom, left:right] = True
    if noisy:
        mask &= np.random.default_rng(seed).random(mask.shape) < 0.7
    crop, origin = cut_to_box(mask)
    written = encode_png(crop, origin, width, height)
    assert np.array_equal(cv2.imdecode(np.frombuffer(written, np.uint8), cv2.IMREAD_UNCHANGED), mask * np.uint8(255))
    for data in (written, png(mask), png(mask * np.uint8(seed + 1))):
        found, place = decode_png("a.png", data, width, height)
        assert place == origin
        assert np.array_equal(found, crop)


def test_frames_of_other_formats_are_named_after_their_images(tmp_path):
    frame = read_frames(write_dump(str(tmp_path), FRAMES))[0]
    for instance, name in zip(frame.instances, ("17", "4")):
        instance.instance_id = name
    frame.frame_id, frame.file_name = "139", "val2017/my photo.jpg"
    CityscapesWriter(str(tmp_path / "out")).commit([frame])
    assert (tmp_path / "out/val2017/my photo_pred.txt").read_text().split() == [
        *("my%20photo_000.png", "26", "0.9"),
        *("my%20photo_001.png", "24", "0.1234567890123"),
    ]
    storage.put(f"{tmp_path}/photos/my photo.jpg", b"")
    (again,) = read_frames(CityscapesReader(str(tmp_path / "out"), str(tmp_path / "photos")))
    assert masks(again) == masks(frame)


def _errors(reader):
    return {ref.frame_id: ref.error for ref in reader.list_frames()}


def test_two_listings_of_one_png_are_an_error_on_both(tmp_path):
    mask = blob(1)
    reader = write_dump(str(tmp_path), {"a": [("c/shared.png", 26, 1, mask)], "b": [("b_0.png", 26, 1, mask)]})
    assert _errors(reader) == {"a": "", "b": ""}
    (tmp_path / "pred/b_pred.txt").write_text("b_0.png 26 1\nc/./shared.png 26 1\n")
    both = "expected every PNG in one list, c/shared.png is in a_pred.txt and b_pred.txt"
    assert _errors(reader) == {name: f"{tmp_path}/pred/{name}_pred.txt: {both}" for name in "ab"}


def test_a_png_named_after_another_image_is_refused_whether_or_not_the_lists_were_compared(tmp_path):
    mask = blob(1)
    reader = write_dump(str(tmp_path), {"a": [("a_0.png", 26, 1, mask)], "b": [("b_0.png", 26, 1, mask)]})
    (tmp_path / "pred/b_pred.txt").write_text("a_0.png 26 1\n")
    first, second = reader.list_frames()
    assert len(list(reader.read(first, WIDTH, HEIGHT))) == 1
    with pytest.raises(InputError, match=r"b_pred.txt:1: a_0.png is named after another image, expected b\*.png"):
        list(reader.read(second, WIDTH, HEIGHT))
    (tmp_path / "pred/unnamed.png").touch()
    message = "a_0.png is named after another image, expected b*.png"
    assert _errors(reader) == {"a": "", "b": f"{tmp_path}/pred/b_pred.txt: {message}"}


def test_images_whose_names_begin_alike_share_no_png(tmp_path):
    mask = blob(1)
    frames = {"x": [("x_1.png", 26, 1, mask)], "x_1": [("x_1_0.png", 26, 1, mask)], "x1": [("x1.png", 26, 1, mask)]}
    reader = write_dump(str(tmp_path), frames)
    assert set(_errors(reader).values()) == {""}
    (tmp_path / "pred/x_pred.txt").write_text("x_1_0.png 26 1\n")
    assert [name for name, error in _errors(reader).items() if "x_1_0.png is in x_1_pred.txt and x_pred" in error] == [
        "x_1",
        "x",
    ]


@pytest.mark.parametrize("linked", ["x_0.png", "x_pred.txt", "city"])
def test_a_link_that_leads_out_of_the_dump_is_refused_and_one_within_is_followed(tmp_path, linked):
    reader = write_dump(str(tmp_path), {"x": [("x_0.png", 26, 1, blob(1))]})
    if linked == "city":
        (tmp_path / "pred/x_pred.txt").write_text("city/x_0.png 26 1\n")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/x_0.png").write_bytes((tmp_path / "pred/x_0.png").read_bytes())
    (tmp_path / "secret/x_pred.txt").write_text("root:x:0 secret\n")
    place = tmp_path / "pred" / linked
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "secret" / linked if linked != "city" else tmp_path / "secret")
    (ref,) = reader.list_frames()
    with pytest.raises(InputError, match=r"found a link to another place") as error:
        list(reader.read(ref, WIDTH, HEIGHT))
    assert "x:0" not in str(error.value)
    (tmp_path / "secret").rename(tmp_path / "pred/kept")
    place.unlink()
    place.symlink_to(f"kept/{linked}" if linked != "city" else "kept")
    if linked != "x_pred.txt":
        assert len(list(reader.read(ref, WIDTH, HEIGHT))) == 1


def test_a_dump_that_is_itself_a_link_is_read(tmp_path):
    write_dump(str(tmp_path), {"x": [("x_0.png", 26, 1, blob(1))]})
    (tmp_path / "link").symlink_to("pred")
    (frame,) = read_frames(CityscapesReader(str(tmp_path / "link"), str(tmp_path / "images")))
    assert len(frame.instances) == 1


def test_a_pipe_a_device_and_a_huge_file_are_refused_without_reading_them(tmp_path):
    reader = write_dump(str(tmp_path), {"x": [("x_0.png", 26, 1, blob(1))]})
    (ref,) = reader.list_frames()
    place = tmp_path / "pred/x_0.png"
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(InputError, match=r"x_0\.png: expected a plain file"):
        list(reader.read(ref, WIDTH, HEIGHT))
    place.unlink()
    with place.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"x_0\.png: expected a file of at most \d+ bytes, found 1099511627776"):
        list(reader.read(ref, WIDTH, HEIGHT))
    os.truncate(tmp_path / "pred/x_pred.txt", 1 << 40)
    with pytest.raises(InputError, match=r"x_pred\.txt: expected a file of at most"):
        list(reader.read(ref, WIDTH, HEIGHT))


def test_nothing_is_written_or_removed_through_a_link_out_of_the_output(tmp_path):
    frames = read_frames(write_dump(str(tmp_path), FRAMES))
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/aachen").symlink_to(tmp_path / "elsewhere")
    writer = CityscapesWriter(str(tmp_path / "out"))
    with pytest.raises(InputError, match="found a link to another place"):
        writer.commit(frames[:1])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    for name in ("aachen_0_1_leftImg8bit_pred.txt", "b.png"):
        (tmp_path / "elsewhere" / name).write_text("b.png 26 1\n")
    with pytest.raises(InputError, match="found a link to another place"):
        writer.withdraw([FrameRef("aachen/aachen_0_1_leftImg8bit", "aachen/aachen_0_1_leftImg8bit.png")], ())
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_frames_are_withdrawn_many_at_once(tmp_path, monkeypatch):
    names = [f"aachen_{number}" for number in range(8)]
    reader = write_dump(str(tmp_path), {f"aachen/{name}": [(f"{name}_0.png", 24, 0.5, blob(0))] for name in names})
    writer = CityscapesWriter(str(tmp_path / "out"))
    writer.commit(read_frames(reader))
    remove, others = storage.remove, threading.Barrier(len(names), timeout=10)

    def when_all_are_there(url):
        if url.endswith("_0.png"):
            others.wait()
        remove(url)

    monkeypatch.setattr(storage, "remove", when_all_are_there)
    writer.withdraw(reader.list_frames(), ())
    assert not list((tmp_path / "out/aachen").iterdir())


def test_a_link_in_the_place_of_an_output_file_is_replaced(tmp_path):
    frames = read_frames(write_dump(str(tmp_path), FRAMES))
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (tmp_path / "out/aachen").mkdir(parents=True)
    (tmp_path / "out/aachen/b.png").symlink_to(victim)
    CityscapesWriter(str(tmp_path / "out")).commit(frames[:1])
    assert victim.read_text() == "as it was"
    assert not (tmp_path / "out/aachen/b.png").is_symlink()


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"a\x1b[31m"])
def test_a_name_that_cannot_be_written_on_a_line_is_the_error_of_its_frame_alone(tmp_path, name):
    reader = write_dump(str(tmp_path), {"x": []})
    for place, ending in (("pred", b"_pred.txt"), ("images", b".png")):
        (tmp_path / place / os.fsdecode(name + ending)).touch()
    errors = _errors(reader)
    assert errors.pop("x") == ""
    ((frame_id, error),) = errors.items()
    assert frame_id.encode().isascii()
    assert error.isprintable()
    assert error.endswith("expected a file name in UTF-8 without control characters")


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_whose_parts_claim_gigabytes_or_that_has_more_than_pixels_takes_no_memory():
    whole = png(blob(1), cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)
    claim = whole[:33] + struct.pack(">I", 3_500_000_000) + whole[37:]
    animation = _chunk(b"acTL", struct.pack(">II", 2, 0)) + _chunk(
        b"fcTL", struct.pack(">IIIIIHHBB", 0, *[1 << 30] * 4, 1, 1, 0, 0)
    )
    before = peak_kib()
    for data in (claim, whole[:-12], whole[:33] + whole[8:]):
        with pytest.raises(InputError, match=r"a\.png: expected a PNG that can be decoded"):
            decode_png("a.png", data, WIDTH, HEIGHT)
    for extra in (animation, _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 24))), _chunk(b"eXIf", b"II*\0")):
        found, origin = decode_png("a.png", whole[:33] + extra + whole[33:] + b"more", WIDTH, HEIGHT)
        assert np.array_equal(found, cut_to_box(blob(1))[0])
        assert origin == cut_to_box(blob(1))[1]
    assert peak_kib() - before < 100 << 10


def test_a_png_whose_name_changed_in_case_alone_is_there_on_file_systems_that_do_not_tell(tmp_path, monkeypatch):
    def found(url):
        folder, _, name = url.rpartition("/")
        return next((f"{folder}/{old}" for old in storage.names(folder, ("",)) if old.lower() == name.lower()), url)

    put, remove = storage.put, storage.remove
    monkeypatch.setattr(storage, "put", lambda url, data: (remove(found(url)), put(url, data)))
    monkeypatch.setattr(storage, "remove", lambda url: remove(found(url)))
    for name in ("x_Car.png", "x_car.png"):
        instance = Instance(name, 26, 1.0, *cut_to_box(blob(1)))
        CityscapesWriter(str(tmp_path)).commit([Frame("x", "x.png", WIDTH, HEIGHT, [instance])])
        assert sorted(os.listdir(tmp_path)) == sorted([name, "x_pred.txt"])

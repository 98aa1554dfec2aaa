"""Thousands of damaged dumps: each is refused in one line that names its file, or read, written and read again.

BPR_FUZZ_INPUTS sets the number of inputs for all readers together, BPR_FUZZ_SEED other ones. A failure names the number
of its input, which makes the same one again.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.formats.coco import CocoReader, CocoWriter
from pipeline.formats.parquet import ParquetReader, ParquetWriter
from pipeline.records import FRAME_SCHEMA, Frame, InputError
from pipeline.redaction import redacted
from tests.conftest import peak_kib
from tests.fuzz import mutations
from tests.unit.test_formats_cityscapes import HEIGHT, WIDTH, blob, content, png
from tests.unit.test_formats_coco import rle_of

INPUTS = int(os.environ.get("BPR_FUZZ_INPUTS", "10080"))
SEED = int(os.environ.get("BPR_FUZZ_SEED", "0"))
BATCHES = 3
SECONDS = 5
MEMORY = 400 << 10
"""KiB by which a batch may raise the process' largest size."""

NAMES = ["a/x", "a/x_1", "y"]


class Hang(BaseException):
    """An input took longer than SECONDS; not an Exception, so that nothing under test catches it."""


@contextmanager
def watched() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    # Native code that hangs does not see the signal.
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


class Cityscapes:
    """A folder with one file changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, bytes] = {}
        for number, name in enumerate(NAMES):
            folder, _, stem = name.rpartition("/")
            prefix = f"{folder}/" if folder else ""
            pngs = [f"{stem}_0.png", f"masks/{stem}_pred_1.png"][: 1 + number % 2]
            self.files |= {f"{prefix}{png_name}": png(blob(seed)) for seed, png_name in enumerate(pngs)}
            self.files[f"{name}_pred.txt"] = "".join(f"{p} {24 + i} 0.{i}5\n" for i, p in enumerate(pngs)).encode()
            (root / "images" / prefix).mkdir(parents=True, exist_ok=True)
            (root / "images" / f"{name}.png").touch()
        for name, data in self.files.items():
            (root / "dump" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "dump" / name).write_bytes(data)
        self.changed = ""

    def reader(self, rng: random.Random) -> CityscapesReader:
        if self.changed:
            (self.root / "dump" / self.changed).write_bytes(self.files[self.changed])
        self.changed = rng.choice(sorted(self.files))
        whole = self.files[self.changed]
        if self.changed.endswith(".png"):
            told = rng.random() < 0.5
            changed = mutations.png(whole, rng) if told else mutations.mutated(whole, mutations.BYTES, rng)
        else:
            changed = mutations.mutated(whole, mutations.TEXT, rng)
        (self.root / "dump" / self.changed).write_bytes(changed)
        return CityscapesReader(f"{self.root}/dump", f"{self.root}/images")


class Coco:
    """A results json, or the list of its images, changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dump").mkdir()
        self.results = [
            {
                "image_id": 1 + number % 3,
                "category_id": 24 + number,
                "segmentation": [
                    rle_of(blob(number)),
                    [[1.5, 1, 20, 2.5, 9, 20, 3, 9], [30, 4, 40, 4, 40, 12]],
                    {"size": [HEIGHT, WIDTH], "counts": [100, 20, 12, 20, HEIGHT * WIDTH - 152]},
                ][number % 3],
                "score": 0.25 * number,
                "note": ["é", {"a": 1}],
            }
            for number in range(6)
        ]
        self.results[1] |= {"status": "refined", "reason": "", "changed_pixels": 3, "confidence": 0.5}
        self.images = {
            "images": [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate(NAMES, 1)],
            "categories": [{"id": 24 + number} for number in range(6)],
        }

    def reader(self, rng: random.Random) -> CocoReader:
        name = rng.choice(("results.json", "results.json", "images.json"))
        for file, good in (("results.json", self.results), ("images.json", self.images)):
            if file != name:
                data = json.dumps(good).encode()
            elif rng.random() < 0.5:
                data = json.dumps(mutations.structure(good, rng), ensure_ascii=True).encode()
            else:
                text = json.dumps(good, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
                data = mutations.mutated(text.encode(), mutations.TEXT, rng)
            (self.root / "dump" / file).write_bytes(data)
        pattern = rng.choice((None, None, None, "{image_id:06d}.jpg", "{image_id}.jpg"))
        listed = {"image_pattern": pattern} if pattern else {"image_list": f"{self.root}/dump/images.json"}
        return CocoReader(f"{self.root}/dump/results.json", f"{self.root}/images", **listed)


class Parquet:
    """A Parquet file whose bytes, or whose values and types, are changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dump").mkdir()
        self.rows = [
            {
                "frame_id": name,
                "file_name": f"{name}.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "instances": [
                    {"instance_id": str(seed), "category_id": 24, "score": 0.5, **rle_of(blob(seed))}
                    for seed in range(number)
                ],
            }
            for number, name in enumerate(NAMES)
        ]

    def reader(self, rng: random.Random) -> ParquetReader:
        rows = self.rows
        schema = FRAME_SCHEMA if rng.random() < 0.5 else None
        told = rng.random() < 0.5
        if told:
            rows = mutations.structure(rows, rng)
        how = {
            "row_group_size": rng.choice((1, 2, 3)),
            "use_dictionary": rng.random() < 0.5,
            "compression": rng.choice(("none", "snappy", "zstd")),
            "data_page_version": rng.choice(("1.0", "2.0")),
            "write_page_checksum": rng.random() < 0.3,
        }
        buffer = pa.BufferOutputStream()
        try:
            pq.write_table(pa.Table.from_pylist(rows, schema), buffer, **how)
        except Exception:  # values that no Parquet file can have: damage the bytes of a good one instead
            told, buffer = False, pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(self.rows, FRAME_SCHEMA), buffer, **how)
        data = buffer.getvalue().to_pybytes()
        if not told:
            footer = int.from_bytes(data[-8:-4], "little") + 8
            if rng.random() < 0.5:
                data = data[:-footer] + mutations.mutated(data[-footer:-8], mutations.BYTES, rng) + data[-8:]
            else:
                data = mutations.mutated(data, mutations.BYTES, rng)
        (self.root / "dump/part.parquet").write_bytes(data)
        return ParquetReader(f"{self.root}/dump", f"{self.root}/images")


WRITERS = {
    "cityscapes": (CityscapesWriter, lambda out, images: CityscapesReader(out, images)),
    "coco": (
        CocoWriter,
        lambda out, images: CocoReader(f"{out}/refined.json", images, image_list=f"{out}/images.json"),
    ),
    "parquet": (ParquetWriter, lambda out, images: ParquetReader(out, images)),
}


def check(dump: Cityscapes | Coco | Parquet, form: str, rng: random.Random, place: Path) -> str:
    """Read, write and read again one damaged dump; says what became of it."""
    root = str(dump.root)

    def one_line(message: str) -> None:
        assert root in message
        assert message.isprintable()
        assert redacted(message) == message

    try:
        reader = dump.reader(rng)
        refs = reader.list_frames({} if rng.random() < 0.5 else None)
    except InputError as error:
        one_line(str(error))
        return "refused"
    frames, wrong = [], 0
    for ref in refs:
        try:
            if ref.error:
                raise InputError(ref.error)
            frames.append(Frame(ref.frame_id, ref.file_name, WIDTH, HEIGHT, list(reader.read(ref, WIDTH, HEIGHT))))
            reader.identity(ref, frames[-1].instances)
        except InputError as error:
            one_line(str(error))
            wrong += 1
    # Writing costs most of the time, and what it is given is nearly always the same.
    if frames and rng.random() < 0.4:
        target = rng.choice(("same", "same", *WRITERS))
        # What other forms may hold and Cityscapes may not is `ReaderForCityscapes`'s.
        target = form if target == "same" or (target == "cityscapes" and form != "cityscapes") else target
        make, again = WRITERS[target]
        out = place / "out"
        writer = make(str(out))
        part = writer.commit(frames)
        writer.finish(refs, {frame.frame_id: part for frame in frames})
        if target != "coco":
            back = again(str(out), f"{root}/images")
            found = {
                ref.frame_id: Frame(ref.frame_id, "", WIDTH, HEIGHT, list(back.read(ref, WIDTH, HEIGHT)))
                for ref in back.list_frames()
            }
            assert {f.frame_id: content(f) for f in frames} == {i: content(f) for i, f in found.items()}
        else:
            assert len(json.loads((out / "refined.json").read_text())) == sum(len(f.instances) for f in frames)
        for folder, _, names in os.walk(out, topdown=False):
            for name in names:
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)
    return "partly" if wrong and frames else "read" if frames else "refused"


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize(("form", "make"), [("cityscapes", Cityscapes), ("coco", Coco), ("parquet", Parquet)])
def test_a_damaged_dump_is_refused_in_one_line_or_comes_back(tmp_path, form, make, batch):
    (tmp_path / "in").mkdir()
    dump = make(tmp_path / "in")
    outcomes: dict[str, int] = {}
    above = set(os.listdir(tmp_path.parent))
    largest = peak_kib()
    for number in range(INPUTS // BATCHES // 3):
        name = f"{SEED}/{form}/{batch}/{number}"
        try:
            with watched():
                outcome = check(dump, form, random.Random(name), tmp_path)
        except (Exception, Hang) as error:
            raise AssertionError(f"input {name}: {type(error).__name__}: {error}") from error
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert set(os.listdir(tmp_path)) == {"in"}, name
        assert set(os.listdir(tmp_path / "in")) <= {"dump", "images"}, name
        assert set(os.listdir(tmp_path.parent)) == above, name
    assert peak_kib() - largest < MEMORY
    # Damage that is always noticed, or never, would show nothing.
    fine = outcomes.get("read", 0)
    assert INPUTS // 300 < fine < sum(outcomes.values()) - INPUTS // 300, outcomes

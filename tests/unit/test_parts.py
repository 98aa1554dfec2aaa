"""Parts: read back in any order, each few times and several at once."""

import threading
from collections import Counter

import numpy as np
import pytest

from pipeline import storage
from pipeline.formats import parts
from pipeline.formats.coco import CocoWriter
from pipeline.formats.parquet import ParquetReader, ParquetWriter
from pipeline.records import Frame, FrameRef, Instance


def _frame(frame_id):
    mask = np.ones((2, 2), bool)
    return Frame(frame_id, f"{frame_id}.jpg", 8, 8, [Instance("0", 1, 1.0, mask, extra={"image_id": frame_id})])


@pytest.fixture
def nights(tmp_path):
    """80 frames, of which every night another 4 changed that lie far apart: frame ids, the part of each."""
    frame_ids = [f"{number:02d}" for number in range(80)]
    held = {}
    for night in range(20):
        part = parts.commit(str(tmp_path), [_frame(frame_id) for frame_id in frame_ids[night::20]])
        held.update(dict.fromkeys(frame_ids[night::20], part))
    return frame_ids, held


@pytest.fixture
def read(monkeypatch):
    """How often each file was read."""
    counts: Counter[str] = Counter()
    reading = storage.read_if_there

    def noted(url, *args):
        counts[url] += 1
        return reading(url, *args)

    monkeypatch.setattr(storage, "read_if_there", noted)
    return counts


@pytest.mark.parametrize("writer", [ParquetWriter, CocoWriter])
def test_parts_of_many_nights_are_read_once_for_many_frames(tmp_path, nights, read, monkeypatch, writer):
    monkeypatch.setattr(parts, "KEPT_OPEN", 2)
    monkeypatch.setattr(parts, "TOGETHER", 40)
    frame_ids, held = nights
    writer(str(tmp_path)).finish([FrameRef(frame_id, f"{frame_id}.jpg") for frame_id in frame_ids], held)
    assert len(read) == 20
    assert sum(read.values()) == 40
    if writer is ParquetWriter:
        listed = ParquetReader(f"{tmp_path}/part-00000.parquet", "").list_frames()
        assert [ref.frame_id for ref in listed] == frame_ids


@pytest.mark.parametrize("positions", [True, False])
def test_parts_are_read_side_by_side(tmp_path, nights, monkeypatch, positions):
    frame_ids, held = nights
    meeting = threading.Barrier(4, timeout=20)
    reading = storage.read_if_there

    def together(url, *args):
        meeting.wait()
        return reading(url, *args)

    monkeypatch.setattr(storage, "read_if_there", together)
    refs = [FrameRef(frame_id, "", positions=(place,) * positions) for place, frame_id in enumerate(frame_ids)]
    assert CocoWriter(str(tmp_path)).finish(refs, held)


def test_parts_of_no_frame_are_removed_many_at_once(tmp_path, monkeypatch, nights):
    _, held = nights
    kept = {*held.values()} - {*sorted(held.values())[:32]}
    remove, others = storage.remove, threading.Barrier(len({*held.values()}) - len(kept), timeout=10)

    def when_all_are_there(url):
        others.wait()
        remove(url)

    monkeypatch.setattr(storage, "remove", when_all_are_there)
    parts.sweep(str(tmp_path), kept)
    assert {f"{parts.FOLDER}/{path.name}" for path in (tmp_path / parts.FOLDER).iterdir()} == kept

import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipeline.flow.columns import packed, pickled, unpacked, unpickled, work_columns, works_in
from pipeline.records import Frame, InputError
from pipeline.work import Work

SHAPES = [((64, 64, 4), np.uint8), ((66, 66, 4), np.uint8), ((31, 31), np.uint16)]
COUNTS = [(3, 1, 2), (0, 2, 0), (0,), (0, 0), (5,)]


def _parts(counts, shape, dtype):
    rng = np.random.default_rng(0)
    return [rng.integers(0, np.iinfo(dtype).max, (n, *shape), dtype, endpoint=True) for n in counts]


def _expect(column, parts):
    found = unpacked(column, parts[0].shape[1:], parts[0].dtype)
    assert len(found) == len(parts)
    for one, other in zip(found, parts):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)


def _address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_arrays_come_out_of_a_column_as_they_went_in(counts, shape, dtype):
    parts = _parts(counts, shape, dtype)
    column = packed(parts)
    assert (column.type, len(column), column.null_count) == (pa.large_binary(), len(parts), 0)
    column.validate(full=True)
    _expect(column, parts)


@pytest.mark.parametrize("counts", COUNTS)
def test_however_rows_were_sliced_and_put_together_on_the_way(counts):
    parts = _parts(counts, (64, 64, 4), np.uint8)
    table = pa.table({"patches": packed(parts)})
    twice = pa.concat_tables([table, table])
    _expect(twice["patches"], parts * 2)
    _expect(twice.combine_chunks()["patches"], parts * 2)
    for rows in (twice, twice.combine_chunks()):
        _expect(rows.slice(1)["patches"], (parts * 2)[1:])
        _expect(rows.slice(1).slice(0, 1)["patches"], (parts * 2)[1:2])
    _expect(pickle.loads(pickle.dumps(twice.slice(1)))["patches"], (parts * 2)[1:])


def test_nothing_is_copied():
    parts = _parts((2, 3), (64, 64, 4), np.uint8)
    views = [parts[1][:1], parts[1][1:]]
    for array, found in zip(parts + views, unpacked(packed(parts + views), (64, 64, 4), np.uint8)):
        assert _address(found) == _address(array)


def test_an_array_in_several_pieces_is_copied_once():
    turned = _parts((2,), (8, 8), np.uint16)[0][:, :, ::-1]
    _expect(packed([turned]), [turned])


def test_what_cannot_be_written_to_stays_so():
    (part,) = _parts((2,), (8, 8), np.uint16)
    part.flags.writeable = False
    (found,) = unpacked(packed([part]), (8, 8), np.uint16)
    assert not found.flags.writeable


def test_the_values_of_a_pickled_column_come_back_in_any_slice():
    values = [{"a": 1}, "", None, [np.int64(3)]]
    table = pa.table({"work": pickled(values)})
    assert unpickled(table["work"]) == values
    assert unpickled(pa.concat_tables([table.slice(2), table])["work"]) == values[2:] + values


def _works(*names):
    works = [Work(name, Frame(name, f"{name}.png", 8, 8, []), [np.ones((2, 4), np.int32)]) for name in names]
    for work in works:
        work.seal()
    return works


def test_what_is_sealed_passes_by_those_who_do_not_open_it():
    first = pa.table(work_columns(_works("a", "b")))
    works = unpickled(first["work"])
    assert [(work.frame_id, work.sealed) for work in works] == [("a", b""), ("b", b"")]
    works[1].refined_at = 3.0
    second = pa.table(work_columns(works, first["sealed"]))
    back = works_in(second)
    for work in back:
        work.open()
    assert [(work.frame.frame_id, work.patches, work.refined_at) for work in back] == [("a", 2, 0.0), ("b", 2, 3.0)]


def test_a_frame_set_aside_on_the_way_stays_without_what_was_sealed():
    table = pa.table(work_columns(_works("a", "b")))
    works = unpickled(table["work"])
    works[0].set_aside(InputError("a.png: refining it killed its process"))
    aside, other = works_in(pa.table(work_columns(works, table["sealed"])))
    assert (aside.sealed, aside.error) == (b"", "a.png: refining it killed its process")
    assert other.sealed


def test_an_opened_frame_is_sent_as_it_is():
    works = _works("a", "b")
    works[1].open()
    works[1].frame.instances.append("refined")
    sealed, opened = works_in(pa.table(work_columns(works)))
    assert (sealed.frame, opened.frame.instances, opened.sealed) == (None, ["refined"], b"")

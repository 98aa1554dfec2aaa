"""Parquet dumps: one schema that others read, the same bytes every time, and every wrong column is named."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.formats import parquet
from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.formats.coco import CocoReader, CocoWriter
from pipeline.formats.parquet import ParquetReader, ParquetWriter
from pipeline.records import FRAME_SCHEMA, InputError
from tests.conftest import peak_kib
from tests.unit.test_formats_cityscapes import FRAMES, HEIGHT, WIDTH, blob, content, convert, read_frames, write_dump
from tests.unit.test_formats_coco import INTERLEAVED, reader_of, rle_of


def row(frame_id="a", instances=1, **other):
    made = [
        {"instance_id": str(seed), "category_id": 26, "size": [HEIGHT, WIDTH], "counts": rle_of(blob(seed))["counts"]}
        for seed in range(instances)
    ]
    return {
        "frame_id": frame_id,
        "file_name": f"{frame_id}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "instances": made,
    } | other


def reader_of_rows(folder, rows, name="dump.parquet", **how):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name, **how)
    return ParquetReader(str(folder / name), str(folder / "images"))


def test_a_cityscapes_dump_becomes_parquet_and_the_same_cityscapes_again(root):
    first = write_dump(root, FRAMES)
    convert(first, ParquetWriter(f"{root}/out"))
    second = ParquetReader(f"{root}/out", f"{root}/images")
    convert(second, CityscapesWriter(f"{root}/again"))
    third = CityscapesReader(f"{root}/again", f"{root}/images")
    for old, middle, new in zip(read_frames(first), read_frames(second), read_frames(third), strict=True):
        assert old.frame_id == middle.frame_id == new.frame_id
        assert old.file_name == middle.file_name == new.file_name
        assert [i.instance_id for i in old.instances] == [i.instance_id for i in new.instances]
        assert content(old) == content(middle) == content(new)
    assert storage.find(f"{root}/again", ("",)) == storage.find(f"{root}/pred", ("",))


def test_a_coco_dump_becomes_parquet_and_coco_again(root):
    first = reader_of(root, INTERLEAVED)
    convert(first, ParquetWriter(f"{root}/middle"))
    second = ParquetReader(f"{root}/middle", f"{root}/images")
    convert(second, CocoWriter(f"{root}/out"))
    third = CocoReader(f"{root}/out/refined.json", f"{root}/images", image_list=f"{root}/out/images.json")
    for old, middle, new in zip(read_frames(first), read_frames(second), read_frames(third), strict=True):
        assert old.frame_id == middle.frame_id
        assert old.file_name == middle.file_name == new.file_name
        assert content(old) == content(middle) == content(new)


def test_files_have_the_schema_and_a_bounded_number_of_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "FRAMES_PER_FILE", 3)
    monkeypatch.setattr(parquet, "FRAMES_PER_GROUP", 2)
    reader = reader_of_rows(tmp_path / "in", [row(str(number), number % 3) for number in range(7)])
    (tmp_path / "out").mkdir()
    for number in (3, 4, 9):  # of a longer dump, and of somebody else
        (tmp_path / f"out/part-0000{number}.parquet").touch()
    convert(reader, ParquetWriter(str(tmp_path / "out")))
    *files, other = sorted((tmp_path / "out").glob("*.parquet"))
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert other.name == "part-00009.parquet"
    other.unlink()
    assert [pq.read_table(file).num_rows for file in files] == [3, 3, 1]
    for file in files:
        assert pq.read_schema(file).equals(FRAME_SCHEMA)
        assert pq.ParquetFile(file).metadata.row_group(0).num_rows <= 2
        assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
    again = ParquetReader(str(tmp_path / "out"), "")
    assert [ref.frame_id for ref in again.list_frames()] == [str(number) for number in range(7)]
    for old, new in zip(read_frames(reader), read_frames(again), strict=True):
        assert content(old) == content(new)
    assert pq.read_table(files[0])["instances"].to_pylist()[1] == [
        {
            **row(instances=1)["instances"][0],
            "score": 1.0,
            "bbox": read_frames(reader)[1].instances[0].bbox,
            "area": blob(0).sum(),
            "status": "kept",
            "reason": "",
            "changed_pixels": 0,
            "confidence": 1.0,
        }
    ]


def test_the_bytes_do_not_depend_on_how_frames_lay_in_parts(tmp_path):
    reader, written = reader_of_rows(tmp_path / "in", [row(str(n), n % 3) for n in range(6)]), []
    for size in (1, 4):
        writer, frames = ParquetWriter(str(tmp_path / f"out{size}")), read_frames(reader)
        groups = [frames[start : start + size] for start in reversed(range(0, 6, size))]
        writer.finish(reader.list_frames(), {f.frame_id: writer.commit(group) for group in groups for f in group})
        written.append((tmp_path / f"out{size}/part-00000.parquet").read_bytes())
    assert written[0] == written[1]


def test_frames_set_aside_are_left_out_and_no_frame_at_all_is_an_empty_file(tmp_path):
    reader, writer = (
        reader_of_rows(tmp_path / "in", [row("a"), row("b"), row("c")]),
        ParquetWriter(str(tmp_path / "out")),
    )
    frames = read_frames(reader)
    writer.finish(reader.list_frames(), {"c": writer.commit(frames[2:]), "a": writer.commit(frames[:1])})
    assert [ref.frame_id for ref in ParquetReader(str(tmp_path / "out"), "").list_frames()] == ["a", "c"]
    writer.finish(reader.list_frames(), {})
    assert ParquetReader(str(tmp_path / "out"), "").list_frames() == []


def test_a_repeated_commit_writes_the_same_part(tmp_path):
    writer, frames = ParquetWriter(str(tmp_path)), read_frames(reader_of_rows(tmp_path / "in", [row("a"), row("b/c")]))
    path = writer.commit(frames)
    before = (tmp_path / path).read_bytes()
    assert path.startswith("_ledger/parts/")
    assert writer.commit(frames) == path
    assert (tmp_path / path).read_bytes() == before
    assert writer.commit(frames[:1]) != path


def test_optional_fields_are_read_where_they_are_and_other_columns_passed_over(tmp_path):
    rich = row("a")
    rich["instances"][0] |= {"score": 0.25, "status": "refined", "reason": "far_pieces", "changed_pixels": 3}
    rich["instances"][0] |= {"confidence": 0.5, "mood": "fine"}
    plain = row("b", more=[1, 2])
    read = [read_frames(reader_of_rows(tmp_path, [each]))[0].instances[0] for each in (rich, plain)]
    assert [(i.score, i.status, i.reason, i.changed_pixels, i.confidence) for i in read] == [
        (0.25, "refined", "far_pieces", 3, 0.5),
        (1, "kept", "", 0, 1),
    ]


def test_a_folder_is_read_file_by_file_without_its_ledger(tmp_path):
    for name, frame_id in (("b.parquet", "1"), ("a.parquet", "2"), ("c.parquet", "3")):
        reader_of_rows(tmp_path, [row(frame_id)], name)
    reader_of_rows(tmp_path / "_ledger", [row("4")])
    reader_of_rows(tmp_path / ".trash", [row("5")])
    assert [ref.frame_id for ref in ParquetReader(str(tmp_path), "").list_frames()] == ["2", "1", "3"]


def test_frames_are_found_in_any_row_group(tmp_path):
    reader = reader_of_rows(tmp_path, [row(str(n), n) for n in range(7)], row_group_size=2)
    assert [len(frame.instances) for frame in read_frames(reader)] == list(range(7))


def test_a_file_written_anew_is_read_anew(tmp_path):
    assert len(read_frames(reader_of_rows(tmp_path, [row("a", 1)]))[0].instances) == 1
    assert len(read_frames(reader_of_rows(tmp_path, [row("a", 2)]))[0].instances) == 2


def test_a_frame_id_that_occurs_twice_is_an_error_on_both(tmp_path):
    refs = reader_of_rows(tmp_path, [row("a"), row("b"), row("a")]).list_frames()
    assert [bool(ref.error) for ref in refs] == [True, False, True]
    assert refs[0].error == f"{tmp_path}/dump.parquet: expected every frame_id once, a occurs more often"


def _instances(**other):
    return {"instances": [row()["instances"][0] | other]}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"frame_id": 5}, "column frame_id has int64, expected text"),
        ({"height": "5"}, "column height has string, expected whole numbers"),
        ({"instances": [1]}, r"column instances has list<.*>, expected lists of structs"),
        (_instances(counts=5), r"column instances\.counts has int64, expected text"),
        (_instances(size=["5"]), r"column instances\.size has list<.*string>, expected lists of whole numbers"),
        (_instances(score="high"), r"column instances\.score has string, expected numbers"),
        (_instances(changed_pixels=0.5), r"column instances\.changed_pixels has double, expected whole numbers"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, other, message):
    with pytest.raises(InputError, match=rf"dump\.parquet: {message}"):
        reader_of_rows(tmp_path, [row() | other]).list_frames()


@pytest.mark.parametrize("column", ["frame_id", "file_name", "height", "width", "instances"])
def test_a_missing_column_is_named(tmp_path, column):
    with pytest.raises(InputError, match=rf"dump\.parquet: column {column} is missing"):
        reader_of_rows(tmp_path, [{key: value for key, value in row().items() if key != column}]).list_frames()


@pytest.mark.parametrize("field", ["instance_id", "category_id", "size", "counts"])
def test_a_missing_field_of_instances_is_named(tmp_path, field):
    instance = {key: value for key, value in row()["instances"][0].items() if key != field}
    with pytest.raises(InputError, match=rf"dump\.parquet: column instances\.{field} is missing"):
        reader_of_rows(tmp_path, [row(instances=0) | {"instances": [instance]}]).list_frames()


def test_what_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"a\.parquet: expected a Parquet file"):
        ParquetReader(str(tmp_path), "").list_frames()
    with pytest.raises(InputError, match=r"b\.parquet: no such file"):
        ParquetReader(str(tmp_path / "b.parquet"), "").list_frames()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected \.parquet files"):
        ParquetReader(str(tmp_path / "empty"), "").list_frames()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"height": HEIGHT + 1}, r"height and width \(33, 48\), expected \(32, 48\) as the image"),
        (_instances(size=[WIDTH, HEIGHT]), r"instance 0: mask size \[48, 32\], expected"),
        (_instances(counts="0"), "instance 0: RLE counts that cover 0 pixels"),
        (_instances(score=float("inf")), "instance 0: expected a finite number as score"),
        (_instances(instance_id=None), "instance 0: expected values in instance_id"),
    ],
)
def test_a_bad_row_is_named_with_its_frame_and_instance(tmp_path, other, message):
    reader = reader_of_rows(tmp_path, [row("fine"), row("a") | other])
    refs = reader.list_frames()
    assert len(list(reader.read(refs[0], WIDTH, HEIGHT))) == 1
    with pytest.raises(InputError, match=rf"dump\.parquet: frame a: {message}"):
        list(reader.read(refs[1], WIDTH, HEIGHT))


def test_text_that_all_rows_share_is_in_memory_once(tmp_path):
    count, made = 3000, row()["instances"][0]
    counts = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), ["x" * 10**6])
    others = {name: pa.array([made[name]] * count) for name in ("instance_id", "category_id", "size")}
    instances = pa.StructArray.from_arrays([*others.values(), counts], [*others, "counts"])
    columns = {name: [value] for name, value in row().items()}
    table = pa.table(columns | {"instances": pa.ListArray.from_arrays([0, count], instances)})
    # Without the Arrow schema a reader sees plain text.
    pq.write_table(table, tmp_path / "dump.parquet", store_schema=False)
    reader = ParquetReader(str(tmp_path / "dump.parquet"), str(tmp_path))
    before = peak_kib()
    (ref,) = reader.list_frames()
    with pytest.raises(InputError, match="RLE counts of length 1000000"):
        list(reader.read(ref, WIDTH, HEIGHT))
    assert peak_kib() - before < 100 << 10


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_text_in_encodings_without_a_dictionary_is_read(tmp_path, encoding):
    columns = {"frame_id": encoding, "instances.list.element.counts": encoding}
    reader = reader_of_rows(tmp_path, [row("a"), row("b", 2)], use_dictionary=False, column_encoding=columns)
    assert [len(frame.instances) for frame in read_frames(reader)] == [1, 2]


def test_columns_that_are_dictionaries_of_text_are_text(tmp_path):
    table = pa.Table.from_pylist([row("a"), row("b", 2)])
    for name in ("frame_id", "file_name"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].dictionary_encode())
    pq.write_table(table, tmp_path / "dump.parquet")
    assert [f.frame_id for f in read_frames(ParquetReader(str(tmp_path / "dump.parquet"), str(tmp_path)))] == ["a", "b"]


def test_a_row_group_larger_than_memory_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 100)
    with pytest.raises(InputError, match=r"dump\.parquet: row group 0 takes \d+ bytes, expected at most 100; write it"):
        reader_of_rows(tmp_path, [row("a")]).list_frames()


def test_text_that_is_no_utf8_is_the_error_of_its_frame(tmp_path):
    reader = reader_of_rows(tmp_path, [row("a"), row("b", 0)], use_dictionary=False, compression="none")
    place = tmp_path / "dump.parquet"
    counts = row()["instances"][0]["counts"].encode()
    place.write_bytes(place.read_bytes().replace(counts, b"\xff" * len(counts)))
    first, second = reader.list_frames()
    with pytest.raises(InputError, match=r"dump\.parquet: frame a: instance 0: expected text in UTF-8"):
        list(reader.read(first, WIDTH, HEIGHT))
    assert list(reader.read(second, WIDTH, HEIGHT)) == []

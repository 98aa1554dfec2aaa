"""COCO results: order and other keys are kept, whatever the size of the file; every bad entry is named."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline import storage
from pipeline.formats import coco, json_list, parts
from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.formats.coco import CocoReader, CocoWriter
from pipeline.formats.for_cityscapes import ReaderForCityscapes
from pipeline.records import InputError
from tests.unit.test_formats_cityscapes import (
    FRAMES,
    HEIGHT,
    WIDTH,
    blob,
    content,
    convert,
    masks,
    read_frames,
    write_dump,
)

PATTERN = "{image_id:012d}.jpg"


def rle_of(mask, plain=False):
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    if plain:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [2]])))
        found = np.diff(edges, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": found}


def entry(image_id, seed=0, category=26, **other):
    segmentation = rle_of(blob(seed), plain=seed % 2 == 1)
    return {
        "image_id": image_id,
        "category_id": category,
        "segmentation": segmentation,
        "score": 0.5 + seed / 64,
    } | other


def write_json(url, content):
    storage.put(url, content if isinstance(content, bytes) else json.dumps(content).encode())
    return url


def reader_of(root, content, **how):
    return CocoReader(
        write_json(f"{root}/results.json", content), f"{root}/images", **how or {"image_pattern": PATTERN}
    )


def refined(root):
    return json.loads(storage.read(f"{root}/out/refined.json"))


VERDICT = {"status": "kept", "reason": "", "changed_pixels": 0, "confidence": 1.0}

INTERLEAVED = [entry(image_id, seed) for seed, image_id in enumerate([7, 3, 7, 11, 3, 7, 2**40, 11])]


def test_images_come_in_the_order_of_their_first_entry_with_the_places_of_all(root):
    refs = reader_of(root, INTERLEAVED).list_frames()
    assert [ref.frame_id for ref in refs] == ["7", "3", "11", str(2**40)]
    assert [ref.positions for ref in refs] == [(0, 2, 5), (1, 4), (3, 7), (6,)]
    assert refs[0].file_name == "000000000007.jpg"


def test_interleaved_entries_come_back_in_the_order_of_the_input(root, monkeypatch):
    monkeypatch.setattr(coco, "WINDOW", 3)
    monkeypatch.setattr(coco, "NEARBY", 0)
    monkeypatch.setattr(parts, "KEPT_OPEN", 1)
    convert(reader_of(root, INTERLEAVED), CocoWriter(f"{root}/out"))
    found = refined(root)
    for seed, (old, new) in enumerate(zip(INTERLEAVED, found, strict=True)):
        assert list(new) == ["image_id", "category_id", "segmentation", "bbox", "area", "score", *VERDICT]
        assert {key: new[key] for key in VERDICT} == VERDICT
        assert (new["image_id"], new["category_id"], new["score"]) == (old["image_id"], 26, old["score"])
        assert new["segmentation"] == rle_of(blob(seed))
        assert new["bbox"] == coco_mask.toBbox(new["segmentation"]).tolist()
        assert new["area"] == blob(seed).sum()
    lines = storage.read(f"{root}/out/refined.json").decode().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == found
    assert not storage.exists(f"{root}/out/images.json")


def test_other_keys_are_kept_and_a_missing_score_stays_missing(tmp_path):
    other = {"id": 2**60, "iscrowd": 0, "note": "naïve \U0001f600", "nested": {"a": [1.5, None]}, "bbox": [0, 0, 1, 1]}
    scoreless = entry(1, 1)
    del scoreless["score"]
    text = json.dumps([entry(1, 0, **other), scoreless], ensure_ascii=False).encode()
    reader = reader_of(tmp_path, text)
    assert [i.score for i in read_frames(reader)[0].instances] == [0.5, 1.0]
    convert(reader, CocoWriter(f"{tmp_path}/out"))
    first, second = refined(tmp_path)
    assert {key: first[key] for key in other if key != "bbox"} == {k: v for k, v in other.items() if k != "bbox"}
    assert first["bbox"] != other["bbox"]
    assert "score" not in second


def test_what_became_of_an_instance_is_written_and_read_again(tmp_path):
    reader, writer = (
        reader_of(tmp_path, [entry(1, 0), entry(1, 1, status=5, confidence="high")]),
        CocoWriter(str(tmp_path / "out")),
    )
    (frame,) = read_frames(reader)
    verdict = {"status": "rejected", "reason": "iou", "changed_pixels": 12, "confidence": 0.1234567}
    for key, value in verdict.items():
        setattr(frame.instances[0], key, value)
    writer.finish(reader.list_frames(), {"1": writer.commit([frame])})
    written = refined(tmp_path)
    assert {key: written[0][key] for key in VERDICT} == verdict | {"confidence": 0.1235}
    assert {key: written[1][key] for key in VERDICT} == VERDICT
    (again,) = read_frames(CocoReader(f"{tmp_path}/out/refined.json", "images", image_pattern=PATTERN))
    assert {key: getattr(again.instances[0], key) for key in VERDICT} == verdict | {"confidence": 0.1235}
    assert not {*VERDICT} & {*again.instances[0].extra}


def test_pycocotools_loads_what_was_written(tmp_path):
    convert(reader_of(tmp_path, INTERLEAVED), CocoWriter(f"{tmp_path}/out"))
    truth = COCO()
    truth.dataset = {"images": [{"id": image_id} for image_id in (7, 3, 11, 2**40)], "categories": [{"id": 26}]}
    truth.createIndex()
    loaded = truth.loadRes(f"{tmp_path}/out/refined.json").anns
    assert [loaded[number + 1]["segmentation"] for number in range(8)] == [rle_of(blob(seed)) for seed in range(8)]


def test_text_ids_stay_text_in_any_alphabet(tmp_path):
    ids = ["0042", "größe", "日本", "esc\u00e9"]
    text = json.dumps([entry(image_id) for image_id in ids[:3]], ensure_ascii=False)[:-1] + ", "
    reader = reader_of(tmp_path, (text + json.dumps(entry(ids[3])) + "]").encode(), image_pattern="{image_id}.png")
    assert [ref.file_name for ref in reader.list_frames()] == [f"{image_id}.png" for image_id in ids]
    convert(reader, CocoWriter(f"{tmp_path}/out"))
    assert [found["image_id"] for found in refined(tmp_path)] == ids


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_entries_are_found_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    things = [entry(i, i, note='é\\"}]{[\n', x=[-1.5e-7, True, None, {}]) for i in range(6)]
    for indent in (None, 2):
        text = json.dumps(things, ensure_ascii=False, indent=indent).encode()
        url = write_json(f"{tmp_path}/{indent}.json", b" \r\n" + text + b"\n")
        found = list(json_list.scan(url))
        assert [value for *_, value in found] == things
        assert [storage.read(url, at, at + len(data)) for at, data, _ in found] == [data for _, data, _ in found]


def test_polygons_and_lists_of_counts_become_compressed_rle(tmp_path):
    polygon = [[3.0, 3.0, 20.0, 4.5, 12.0, 18.7], [30, 20, 40, 20, 40, 30]]
    things = [entry(1, segmentation=polygon), entry(1, segmentation=rle_of(blob(5), plain=True))]
    convert(reader_of(tmp_path, things), CocoWriter(f"{tmp_path}/out"))
    official = coco_mask.merge(coco_mask.frPyObjects(polygon, HEIGHT, WIDTH))
    assert [found["segmentation"]["counts"] for found in refined(tmp_path)] == [
        official["counts"].decode(),
        rle_of(blob(5))["counts"],
    ]


def test_an_image_list_gives_names_and_categories(tmp_path):
    images = [{"id": 3, "file_name": "c/three.jpg", "height": 1, "width": 1}, {"id": 7, "file_name": "7.jpg"}]
    listed = write_json(f"{tmp_path}/list.json", {"images": images, "categories": [{"id": 26, "name": "car"}]})
    things = [entry(3), entry(7), entry(9), entry(7, 1, category=27)]
    refs = reader_of(tmp_path, things, image_list=listed).list_frames()
    assert [ref.file_name for ref in refs] == ["c/three.jpg", "7.jpg", ""]
    assert refs[0].error == ""
    assert refs[1].error.startswith(f"{tmp_path}/results.json: entry 3: unknown category 27")
    assert refs[2].error == f"{tmp_path}/results.json: entry 2: image_id 9, expected one that {listed} lists"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected json"),
        ([], "images"),
        ({"images": [{"id": 1}]}, "images"),
        ({"images": 5}, "images"),
        ({"images": [{"id": 1, "file_name": 5}]}, "text as file_name"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "every image id once"),
    ],
)
def test_an_image_list_of_another_form_is_refused(tmp_path, content, message):
    listed = write_json(f"{tmp_path}/list.json", content)
    with pytest.raises(InputError, match=rf"list\.json: .*{message}"):
        reader_of(tmp_path, [entry(1)], image_list=listed).list_frames()


def test_either_a_list_or_a_pattern_is_needed():
    for how in ({}, {"image_list": "a", "image_pattern": "b"}):
        with pytest.raises(InputError, match=r"expected either image_list \(a json .*\) or image_pattern"):
            CocoReader("results.json", "images", **how)


def test_an_id_that_the_pattern_cannot_take_is_the_error_of_its_image(tmp_path):
    bad, fine = reader_of(tmp_path, [entry("a"), entry(1)]).list_frames()
    assert bad.error.startswith(
        f"{tmp_path}/results.json: entry 0: image_id 'a', expected one that the pattern {PATTERN}"
    )
    assert fine.error == ""


@pytest.mark.parametrize("image_id", [True, 1.0, None, [1], {}, "a\nb", "\ud800"])
def test_an_image_id_that_is_no_id_is_named_with_its_entry(tmp_path, image_id):
    with pytest.raises(InputError, match=r"results\.json: entry 1: expected a whole number or text as image_id"):
        reader_of(tmp_path, [entry(1), entry(image_id)]).list_frames()


def test_an_image_id_of_any_length_is_not_taken(tmp_path):
    with pytest.raises(InputError, match=r"entry 1: expected an image_id of at most 1000 characters"):
        reader_of(tmp_path, [entry("a" * 1000), entry("a" * 1001)]).list_frames()


def test_a_missing_image_id_or_one_of_both_kinds_is_named_with_its_entry(tmp_path):
    with pytest.raises(InputError, match=r"entry 0: expected a whole number or text as image_id, found None"):
        reader_of(tmp_path, [{"category_id": 1}]).list_frames()
    with pytest.raises(InputError, match=r"entry 1: image_id '1', expected numbers or text throughout"):
        reader_of(tmp_path, [entry(1), entry("1")]).list_frames()


WHOLE = json.dumps([entry(1, 0), entry(2, 2)]).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"byte 0: expected a list \[...\] at the top level, the file ends"),
        (b'{"annotations": []}', r"byte 0: expected a list .* \(of a COCO data set, its annotations alone\), found '{"),
        (b"[1, 2]", r"byte 1: expected an object"),
        (b"[", r"byte 1: expected an object {...}, the file ends"),
        (WHOLE[:-1], rf"byte {len(WHOLE) - 1}: expected a comma or the end of the list, the file ends"),
        (WHOLE[:-20], rf"byte {len(WHOLE) - 20}: expected the rest of an object, the file ends"),
        (WHOLE[:60], r"byte 60: expected the rest of an object"),
        (WHOLE[:-1] + b",]", rf"byte {len(WHOLE)}: expected an object {{...}}, found '\]'"),
        (WHOLE + b"x", rf"byte {len(WHOLE)}: expected the end of the file, found 'x'"),
        (b'[{"image_id" 1, "note": "long enough"}]', r"byte 13: expected json"),
        (b"[" + b'{"a":' * 100_000, r"byte 1: expected json \(RecursionError\)"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", r"byte 1: expected json"),
        (b'[{"a": "\xff\xfe"}]', r"byte 1: expected json"),
    ],
)
def test_a_malformed_or_truncated_file_is_named_with_the_byte(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"results\.json: {message}"):
        reader_of(tmp_path, text).list_frames()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no\.json: no such file"):
        CocoReader(f"{tmp_path}/no.json", "images", image_pattern=PATTERN).list_frames()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"segmentation": {"size": [HEIGHT + 1, WIDTH], "counts": "0"}}, r"mask size \[33, 48\], expected"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}}, "cover 10 pixels, expected 32 x 48 = 1536"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1546, -10]}}, "below 0"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "oooo"}}, "end within a run length"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "string or a list"),
        ({"segmentation": {"counts": "0"}}, "mask size None"),
        ({"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}}, "mask size"),
        ({"segmentation": [[1, 2, 3, 4]]}, "at least 3 points"),
        ({"segmentation": None}, "expected RLE or a list of polygons"),
        ({"score": "high"}, "expected a finite number as score"),
        ({"score": float("nan")}, "expected a finite number as score"),
        ({"score": None}, "expected a finite number as score"),
        ({"score": 10**400}, "expected a finite number as score"),
        ({"category_id": None}, "expected a whole number as category_id"),
        ({"category_id": 2**70}, "expected a whole number as category_id"),
    ],
)
def test_a_bad_entry_is_named_with_its_number(tmp_path, other, message):
    reader = reader_of(tmp_path, [entry(2), entry(1), entry(1) | other])
    refs = reader.list_frames()
    assert len(list(reader.read(refs[0], WIDTH, HEIGHT))) == 1
    with pytest.raises(InputError, match=rf"results\.json: entry 2: .*{message}"):
        list(reader.read(refs[1], WIDTH, HEIGHT))


def test_an_entry_without_polygons_has_a_mask_without_pixels(tmp_path):
    reader = reader_of(tmp_path, [entry(1), entry(1) | {"segmentation": []}])
    first, second = reader.read(reader.list_frames()[0], WIDTH, HEIGHT)
    assert (first.area > 0, second.area, second.mask.shape) == (True, 0, (0, 0))


def test_a_file_that_changed_after_it_was_listed_is_noticed(tmp_path):
    reader = reader_of(tmp_path, [entry(1), entry(2)])
    refs = reader.list_frames()
    write_json(reader.predictions, [entry(1, note="now longer"), entry(2)])
    with pytest.raises(InputError, match="the file has changed"):
        list(reader.read(refs[1], WIDTH, HEIGHT))


def test_images_set_aside_are_left_out_and_the_others_keep_their_order(tmp_path):
    reader, writer = reader_of(tmp_path, INTERLEAVED), CocoWriter(f"{tmp_path}/out")
    refs, frames = reader.list_frames(), read_frames(reader)
    writer.finish(refs, {frame.frame_id: writer.commit([frame]) for frame in (frames[2], frames[0])})
    assert [found["image_id"] for found in refined(tmp_path)] == [7, 7, 11, 7, 11]


def test_an_empty_list_stays_an_empty_list(tmp_path):
    convert(reader_of(tmp_path, []), CocoWriter(f"{tmp_path}/out"))
    assert refined(tmp_path) == []


def test_the_output_does_not_depend_on_how_frames_lay_in_parts(tmp_path):
    reader, written = reader_of(tmp_path, INTERLEAVED), []
    for size in (1, 4):
        writer, frames = CocoWriter(f"{tmp_path}/out{size}"), read_frames(reader)
        groups = [frames[start : start + size] for start in range(0, 4, size)]
        writer.finish(reader.list_frames(), {f.frame_id: writer.commit(group) for group in groups for f in group})
        written.append(storage.read(f"{tmp_path}/out{size}/refined.json"))
    assert written[0] == written[1]


def test_a_cityscapes_dump_becomes_coco_and_cityscapes_again(root):
    first = write_dump(root, FRAMES)
    convert(first, CocoWriter(f"{root}/out"))
    listed = json.loads(storage.read(f"{root}/out/images.json"))
    assert [image["id"] for image in listed["images"]] == [1, 2, 3]
    assert listed["images"][0]["file_name"] == "aachen/aachen_0_1_leftImg8bit.png"
    assert [category["id"] for category in listed["categories"]] == [24, 25, 26, 33]
    assert [found["file_name"] for found in refined(root)][-1] == "flat/flat_0_1_leftImg8bit.png"
    second = CocoReader(f"{root}/out/refined.json", f"{root}/images", image_list=f"{root}/out/images.json")
    convert(second, CityscapesWriter(f"{root}/again"))
    third = CityscapesReader(f"{root}/again", f"{root}/images")
    # COCO has no place for an image without instances.
    kept = [frame for frame in read_frames(first) if frame.instances]
    for old, middle, new in zip(kept, read_frames(second), read_frames(third), strict=True):
        assert old.file_name == middle.file_name == new.file_name
        assert content(old) == content(middle) == content(new)


def test_masks_of_a_frame_equal_pycocotools(tmp_path):
    (frame,) = read_frames(reader_of(tmp_path, [entry(1, seed) for seed in range(6)]))
    assert masks(frame) == [blob(seed).tobytes() for seed in range(6)]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    reader = reader_of(str(tmp_path), INTERLEAVED)
    place = tmp_path / reader.predictions.rpartition("/")[2]
    before = [content(frame) for frame in read_frames(reader)]
    place.write_bytes(b"\xef\xbb\xbf" + place.read_bytes())
    assert [content(frame) for frame in read_frames(reader)] == before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"note": json.loads("[" * 300 + "]" * 300)}, "expected at most 64 lists and objects within each other"),
        ({"confidence": 10**400}, "expected numbers that an earlier run wrote"),
        ({"changed_pixels": 2**63}, "expected numbers that an earlier run wrote"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "0" * 10**6}}, "RLE counts of length 1000000"),
        ({"segmentation": [[1, 1, 1, 1, 1, 1]] * 10001}, "polygons with an outline of more than 1000000 pixels"),
    ],
    ids=["deep", "huge confidence", "huge changed_pixels", "empty runs", "many polygons"],
)
def test_an_entry_that_could_not_be_written_or_would_fill_the_memory_is_refused(tmp_path, entry, message):
    whole = {"image_id": 1, "category_id": 26, "segmentation": rle_of(blob(1)), **entry}
    (tmp_path / "results.json").write_text(json.dumps([whole]))
    reader = CocoReader(f"{tmp_path}/results.json", str(tmp_path), image_pattern="{image_id}.jpg")
    (ref,) = reader.list_frames()
    with pytest.raises(InputError, match=rf"results\.json: entry 0: {message}"):
        list(reader.read(ref, WIDTH, HEIGHT))


def test_half_a_character_in_a_file_name_is_the_error_of_its_frame(tmp_path):
    (tmp_path / "results.json").write_text('[{"image_id": 1, "category_id": 1}]')
    (tmp_path / "images.json").write_text('{"images": [{"id": 1, "file_name": "a\\ud800.jpg"}]}')
    reader = CocoReader(f"{tmp_path}/results.json", str(tmp_path), image_list=f"{tmp_path}/images.json")
    (ref,) = reader.list_frames({})
    assert "expected a file name without control characters or half of a character" in ref.error


def test_a_category_that_cityscapes_does_not_know_is_refused_where_the_output_is_such_a_folder(tmp_path):
    results = [
        {"image_id": image, "category_id": category, "segmentation": rle_of(blob(1))}
        for image, category in ((1, 26), (1, 1), (2, 33))
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    reader = ReaderForCityscapes(CocoReader(f"{tmp_path}/results.json", str(tmp_path), image_pattern="{image_id}.jpg"))
    first, second = reader.list_frames()
    with pytest.raises(
        InputError, match=r"1\.jpg: instance 1: category 1, expected a label id of Cityscapes, 24 to 33"
    ):
        list(reader.read(first, WIDTH, HEIGHT))
    assert [instance.category_id for instance in reader.read(second, WIDTH, HEIGHT)] == [33]

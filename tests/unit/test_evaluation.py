import contextlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.evaluation import COARSE, REFINED, EvaluateConfig, evaluate
from pipeline.evaluation_results import NO_VERDICTS, results, text
from pipeline.ground_truth import CityscapesTruth
from pipeline.metrics.cityscapes_ap import CityscapesMatches, cityscapes_ap, match_frame
from pipeline.records import FRAME_SCHEMA, InputError
from tests.scenes import random_street, write_street
from tests.truths import encode, make_truth, predict, true_mask


@pytest.fixture
def truth(tmp_path):
    return make_truth(tmp_path / "data", frames=5)


@pytest.fixture
def refined(truth):
    """Results in the order of `predict`'s: objects moved by one pixel instead of three; the last one got worse."""
    entries = json.loads(predict(truth).read_text())
    for number, entry in enumerate(entries):
        if number % 2 == 0:
            shift = 12 if entry["image_id"] == 5 else 1
            entry["segmentation"] = encode(np.roll(true_mask(truth, entry["image_id"]), shift, axis=1))
    path = truth.with_name("refined.json")
    path.write_text(json.dumps(entries))
    return path


def _evaluate(truth, **settings):
    config = EvaluateConfig(images=str(truth.parent / "images"), **{"local": True, **settings})
    return results(evaluate(config, log=lambda line: None))


def _official(truth, predicted):
    run = _official_run(truth, predicted)
    with contextlib.redirect_stdout(io.StringIO()):
        run.summarize()
    return run.stats


def _official_run(truth, predicted, most=100):
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(str(truth))
        run = COCOeval(official, official.loadRes(str(predicted)), "segm")
        run.params.maxDets = [1, 10, most]
        run.evaluate()
        run.accumulate()
    return run


def test_mask_ap_of_both_dumps_is_what_pycocotools_says(truth, refined):
    found = _evaluate(
        truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined), frames_per_block=2
    )
    for name, path in ((COARSE, truth.with_name("predicted.json")), (REFINED, refined)):
        official = _official(truth, path)
        for measure, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), official):
            ours = found.overall[name][measure]
            assert (-1 if math.isnan(ours) else ours) == value
    assert found.overall[REFINED]["AF"] > found.overall[COARSE]["AF"]
    assert found.overall[REFINED]["boundary AP"] > found.overall[COARSE]["boundary AP"]


def test_predictions_beyond_the_best_hundred_of_a_frame_are_told_and_count_where_asked(truth):
    coarse = predict(truth)
    entries = json.loads(coarse.read_text())
    line = encode(np.eye(*true_mask(truth, 1).shape, dtype=np.uint8))
    stray = [entries[0] | {"segmentation": line, "score": 2.0}] * 150
    coarse.write_text(json.dumps([*entries, *stray]))
    settings = {"ground_truth": str(truth), "coarse": str(coarse)}
    few, all_of_them = _evaluate(truth, **settings), _evaluate(truth, **settings, max_detections=1000)
    beyond = 50 + sum((one["image_id"], one["category_id"]) == (1, entries[0]["category_id"]) for one in entries)
    assert [note for note in few.notes if "--max-detections" in note and f"coarse: {beyond} predictions" in note]
    assert all_of_them.notes == []
    precision = _official_run(truth, coarse, most=1000).eval["precision"][..., 0, -1]
    assert math.isclose(all_of_them.overall[COARSE]["AP"], precision[precision > -1].mean())
    assert few.overall[COARSE]["AP"] < all_of_them.overall[COARSE]["AP"]
    assert few.overall[COARSE]["AF"] != all_of_them.overall[COARSE]["AF"]


def test_classes_of_one_name_are_told_apart_by_their_ids(truth):
    content = json.loads(truth.read_text())
    content["categories"][1]["name"] = "thing"
    content["annotations"][2]["category_id"] = 2
    truth.write_text(json.dumps(content))
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)))
    assert set(found.per_class) == {"thing (1)", "thing (2)"}


def test_in_the_table_a_class_has_one_row_in_line_with_the_others_whatever_its_name_is(truth, refined):
    content = json.loads(truth.read_text())
    content["categories"][0]["name"] = "\x1b[31m a name of two\nlines " + 40 * "and long "
    truth.write_text(json.dumps(content))
    lines = text(_evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined)))
    rows = [line for line in lines.splitlines() if re.search("per class|what changed|a name of two", line)]
    assert [row.startswith(r"\x1b[31m a name of two\nlines and long") for row in rows[1::2]] == [True] * 4
    assert {len(head) - len(row) for head, row in zip(rows[::2], rows[1::2])} == {0}


def test_sizes_are_those_of_masks_whatever_boxes_a_file_gives(truth):
    plain = predict(truth)
    boxed = truth.with_name("boxed.json")
    # Certain and stray, small by its mask and medium by its box, by which pycocotools would sort it.
    entries = [entry | {"score": 1.2 - entry["score"]} for entry in json.loads(plain.read_text())]
    plain.write_text(json.dumps(entries))
    boxed.write_text(json.dumps([entry | {"bbox": [0, 0, 50, 50]} for entry in entries]))
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(plain), refined=str(boxed))
    assert _official(truth, plain)[4] > _official(truth, boxed)[4]
    overall = found.as_json()["overall"]
    assert overall[COARSE] == overall[REFINED]


def test_a_prediction_of_a_category_that_the_ground_truth_lacks_does_not_cost_the_others_of_its_image(truth):
    coarse = predict(truth)
    entries = json.loads(coarse.read_text())
    expected = _evaluate(truth, ground_truth=str(truth), coarse=str(coarse))
    coarse.write_text(json.dumps([*entries, entries[0] | {"category_id": 1234}]))
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(coarse))
    assert found.aside == {}
    assert found.as_json()["overall"] == expected.as_json()["overall"]
    assert any("1 predictions" in note and "categor" in note for note in found.notes)


def test_frames_of_videos_that_share_their_names_are_told_apart_by_their_folders(truth, refined):
    settings = {"coarse": str(predict(truth)), "refined": str(refined)}
    plain = _evaluate(truth, ground_truth=str(truth), **settings)
    content = json.loads(truth.read_text())
    for image in content["images"]:
        video = truth.parent / "images" / f"video{image['id']}"
        video.mkdir()
        (truth.parent / "images" / image["file_name"]).rename(video / "00000.png")
        image["file_name"] = f"video{image['id']}/00000.png"
    truth.write_text(json.dumps(content))
    # As text, since what there is none of is NaN.
    assert str(_evaluate(truth, ground_truth=str(truth), **settings).overall) == str(plain.overall)
    assert str(_evaluate(truth, image_list=str(truth), **settings).changes) == str(plain.changes)
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]
    one = truth.with_name("one.json")
    one.write_text(json.dumps(content))
    found = _evaluate(truth, ground_truth=str(one), image_list=str(truth), **settings)
    assert (found.frames, found.aside) == (1, {})
    assert math.isclose(found.overall["refined"]["AP50"], 1)


def test_an_image_id_that_is_not_listed_is_not_taken_for_the_image_whose_name_is_that_number(truth):
    content = json.loads(truth.read_text())
    image = content["images"][0]
    (truth.parent / "images" / image["file_name"]).rename(truth.parent / "images" / "77.png")
    image["file_name"] = "77.png"
    truth.write_text(json.dumps(content))
    coarse = predict(truth)
    entries = json.loads(coarse.read_text())
    for kept in (entries, [entry for entry in entries if entry["image_id"] != image["id"]]):
        coarse.write_text(json.dumps(kept))
        expected = _evaluate(truth, ground_truth=str(truth), coarse=str(coarse))
        coarse.write_text(json.dumps([*kept, entries[0] | {"image_id": 77}]))
        found = _evaluate(truth, ground_truth=str(truth), coarse=str(coarse))
        assert found.aside == {}
        assert found.as_json()["overall"] == expected.as_json()["overall"]
        assert "coarse: 1 images that the ground truth lacks" in found.notes


def test_a_ground_truth_of_lvis_that_names_images_by_address_alone_lists_those_of_the_predictions(truth):
    (truth.parent / "images" / "val2017").mkdir()
    content = json.loads(truth.read_text())
    expected = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)))
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    truth.write_text(json.dumps(content))
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)))
    assert found.as_json()["overall"] == expected.as_json()["overall"]


@pytest.mark.parametrize("lvis", [False, True])
def test_an_empty_prediction_is_wrong_by_cocos_rules_and_not_there_by_those_of_lvis(truth, lvis):
    content = json.loads(truth.read_text())
    if lvis:
        content["categories"] = [category | {"frequency": "c"} for category in content["categories"]]
        truth.write_text(json.dumps(content))
    coarse = predict(truth)
    before = _evaluate(truth, ground_truth=str(truth), coarse=str(coarse))
    empty = {"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": encode(np.zeros((160, 200), np.uint8))}
    coarse.write_text(json.dumps([*json.loads(coarse.read_text()), empty]))
    after = _evaluate(truth, ground_truth=str(truth), coarse=str(coarse))
    assert before.kind == after.kind == ("lvis" if lvis else "coco")
    assert (after.overall[COARSE]["AP"] == before.overall[COARSE]["AP"]) == lvis


def test_a_form_that_is_given_is_that_of_the_coarse_dump_alone(truth, refined):
    expected = _evaluate(truth, coarse=str(predict(truth)), refined=str(refined), image_list=str(truth))
    frames = []
    for image in json.loads(truth.read_text())["images"]:
        entries = [e | e["segmentation"] for e in json.loads(refined.read_text()) if e["image_id"] == image["id"]]
        instances = [one | {"instance_id": str(number)} for number, one in enumerate(entries)]
        frames.append(image | {"frame_id": str(image["id"]), "instances": instances})
    table = refined.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(frames, FRAME_SCHEMA), table)
    settings = {"coarse": str(predict(truth)), "image_list": str(truth), "format": "coco"}
    assert _evaluate(truth, refined=str(table), **settings).changes == expected.changes


def test_it_is_told_how_many_instances_got_better_and_worse(truth, refined):
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined))
    assert found.better == 4 / 5
    assert found.worse == 1 / 5
    assert "80.0% better, 20.0% worse" in text(found)


def test_the_galleries_name_the_largest_gains_and_losses(truth, refined):
    config = EvaluateConfig(
        images=str(truth.parent / "images"),
        ground_truth=str(truth),
        coarse=str(predict(truth)),
        refined=str(refined),
        gallery=2,
        local=True,
    )
    notable = evaluate(config, log=lambda line: None).tally.notable
    assert [one.item.key for one in notable["largest losses"]] == ["frame4"]
    assert len(notable["largest gains"]) == 2
    values = [one.value for one in notable["largest gains"]]
    assert values == sorted(values, reverse=True)


def test_the_oracle_grows_with_its_reach(truth):
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), oracle=True)
    names = [COARSE, "right within 1 px", "right within 2 px", "right within 3 px", "all right"]
    aps = [found.overall[name]["AP"] for name in names]
    assert aps == sorted(aps)
    assert aps[0] < aps[-1] == 1.0


def test_without_ground_truth_it_is_told_what_changed(truth, refined):
    found = _evaluate(truth, coarse=str(predict(truth)), refined=str(refined), image_list=str(truth))
    assert found.overall == {}
    assert found.changes["all"]["instances"] == 10
    assert found.changes["all"]["changed instances"] == 0.5
    assert found.changes["all"]["gradient after"] > found.changes["all"]["gradient before"]
    assert "what changed" in text(found)
    assert "contours in pixels per instance; gradients of the image along them in grey levels per pixel" in text(found)
    assert "thing" in found.changes  # as the image list calls it


def _compared(truth, refined, **settings):
    config = EvaluateConfig(
        images=str(truth.parent / "images"),
        coarse=str(predict(truth)),
        refined=str(refined),
        image_list=str(truth),
        local=True,
        **settings,
    )
    outcome = evaluate(config, log=lambda line: None)
    return outcome.tally.notable, results(outcome)


def test_changed_pixels_are_counted_where_the_form_of_the_dump_has_no_room_for_their_number(truth, refined):
    notable, found = _compared(truth, refined)
    assert set(notable) == {"largest changes"}
    assert len(notable["largest changes"]) == 5
    for one in notable["largest changes"]:
        mask = true_mask(truth, int(one.item.key.removeprefix("frame")) + 1)
        shift = 12 if one.item.key == "frame4" else 1
        pixels = np.count_nonzero(np.roll(mask, 3, axis=1) != np.roll(mask, shift, axis=1))
        assert f"{pixels:,} px changed" in one.note
        assert "confidence" not in one.note
    assert found.notes == [NO_VERDICTS]
    assert NO_VERDICTS in text(found)


def test_a_rejected_instance_tells_why_and_how_certain_the_network_was(truth, refined):
    entries = json.loads(refined.read_text())
    entries[0] |= {"status": "rejected", "reason": "uncertain", "changed_pixels": 0, "confidence": 0.4}
    entries[2] |= {"status": "refined", "reason": "", "changed_pixels": 7, "confidence": 0.8}
    refined.write_text(json.dumps(entries))
    notable, found = _compared(truth, refined)
    (one,) = notable["rejected"]
    assert "less confidence than --guard.min-confidence; confidence along the boundary 0.40" in one.note
    (one,) = notable["least certain"]
    assert one.note.endswith("px changed, confidence along the boundary 0.80")
    assert found.notes == []


def test_without_ground_truth_an_image_that_one_dump_lacks_is_set_aside_by_that_dumps_name(truth, refined):
    entries = [entry for entry in json.loads(refined.read_text()) if entry["image_id"] != 2]
    refined.write_text(json.dumps(entries))
    _, found = _compared(truth, refined)
    assert found.aside == {"frame1": "frame1.png: the refined dump lacks it, and there is no ground truth"}
    assert found.frames == 4


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(truth, refined):
    with pytest.raises(InputError, match=r"truth\.json: expected a folder to write to, found a file"):
        _compared(truth, "nowhere.json", output=str(truth))
    _, found = _compared(truth, refined, output=str(truth.parent))
    assert found.frames == 5


def test_shares_of_what_changed_are_told_in_percent(truth, refined):
    lines = text(_evaluate(truth, coarse=str(predict(truth)), refined=str(refined), image_list=str(truth))).splitlines()
    (row,) = [line.split() for line in lines if line.startswith("all ")]
    assert row[1:3] == ["10", "50.0%"]
    assert row[3].endswith("%")
    assert "." not in row[4] + row[5]


def test_images_that_a_dump_lacks_are_told_and_count_as_missed(truth, refined):
    entries = [entry for entry in json.loads(refined.read_text()) if entry["image_id"] != 2]
    refined.write_text(json.dumps(entries))
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined))
    assert "refined: 1 images of the other dump are missing" in found.notes
    whole = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)))
    assert found.overall[COARSE]["AP"] == whole.overall[COARSE]["AP"]
    assert found.overall[REFINED]["AP50"] < 0.9


def test_an_image_that_cannot_be_measured_is_set_aside_by_name_and_counts_in_no_dump(truth, refined):
    entries = json.loads(refined.read_text())
    entries[2]["segmentation"]["counts"] = "!"
    refined.write_text(json.dumps(entries))
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined))
    assert list(found.aside) == ["frame1"]
    assert "refined.json: entry 2" in found.aside["frame1"]
    assert found.frames == 4
    assert any("1 images could not be measured" in note for note in found.notes)


def test_of_many_images_that_were_set_aside_the_table_names_five_and_counts_the_others(truth, refined):
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined))
    found = replace(found, aside={f"frame{i}": "broken" for i in range(7)})
    assert [line for line in text(found).splitlines() if line.startswith("set aside")] == [
        *(f"set aside    frame{i}: broken" for i in range(5)),
        "set aside    ... 2 more",
    ]


def test_an_image_on_which_a_measure_fails_is_set_aside_in_one_line_without_secrets(truth, monkeypatch):
    def fail(*_):
        raise RuntimeError("no answer\nfrom https://host/a?sig=s3cr3t")

    monkeypatch.setattr("pipeline.evaluation.boundary_f_frame", fail)
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)))
    assert found.aside["frame1"] == "frame1.png: RuntimeError: no answer from https://host/a?***"


def test_the_json_has_every_number_and_no_nan(truth, refined):
    found = _evaluate(truth, ground_truth=str(truth), coarse=str(predict(truth)), refined=str(refined))
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert plain["overall"]["refined"]["AP"] == found.overall["refined"]["AP"]
    assert plain["overall"]["refined"]["APs"] is None
    assert sum(plain["iou_change"]["instances"]) == 5


def test_partial_results_merge_in_any_order(truth, refined):
    settings = {"ground_truth": str(truth), "coarse": str(predict(truth)), "refined": str(refined)}
    one, many = (_evaluate(truth, **settings, frames_per_block=size) for size in (64, 1))
    assert one.as_json() | {"wall_s": 0} == many.as_json() | {"wall_s": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "coarse and refined are both missing"),
        ({"coarse": "a"}, "ground_truth is missing"),
        ({"refined": "a", "ground_truth": "b", "oracle": True}, "oracle needs"),
        ({"coarse": "a", "ground_truth": "b", "tolerance_px": 0}, "tolerance_px is 0"),
        ({"coarse": "a", "ground_truth": "b", "limit": 0}, "limit is 0: expected at least 1"),
        ({"coarse": "a", "ground_truth": "b", "max_detections": 0}, "max_detections is 0: expected at least 1"),
        ({"coarse": "a", "ground_truth": "b", "frames_per_block": 0}, "frames_per_block is 0: expected at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EvaluateConfig(images="i", **settings)


def test_dumps_of_another_data_set_are_refused(truth, tmp_path):
    (tmp_path / "other").mkdir()
    other = make_truth(tmp_path / "other" / "data")
    other.write_text(other.read_text().replace("frame", "picture"))
    with pytest.raises(InputError, match="are they of one data set"):
        _evaluate(truth, ground_truth=str(other), coarse=str(predict(truth)), image_list=str(truth))


def test_cityscapes_ap_of_a_dump_is_that_of_its_frames_together(tmp_path):
    streets = [random_street(seed) for seed in range(5)]
    for folder in ("truth", "images", "dump"):
        (tmp_path / folder).mkdir()
    for i, (ids, _, frame) in enumerate(streets):
        _, id_image = write_street(tmp_path / "dump", f"ulm_{i}", ids, frame)
        Path(id_image).rename(tmp_path / "truth" / Path(id_image).name)
        cv2.imwrite(str(tmp_path / "images" / f"ulm_{i}.png"), np.zeros((*ids.shape, 3), np.uint8))
    config = EvaluateConfig(
        images=str(tmp_path / "images"),
        ground_truth=str(tmp_path / "truth"),
        coarse=str(tmp_path / "dump"),
        refined=str(tmp_path / "dump"),
        frames_per_block=2,
        local=True,
    )
    found = results(evaluate(config, log=lambda line: None))
    truth = CityscapesTruth(config.ground_truth, config.images)
    frames = [truth.read(ref) for ref in truth.list_frames().refs]
    matches = CityscapesMatches.merge(match_frame(one, frame) for one, (_, _, frame) in zip(frames, streets))
    expected = cityscapes_ap(matches)
    assert found.kind == "cityscapes"
    assert found.overall[COARSE]["AP"] == expected.numbers()["AP"] == found.overall[REFINED]["AP"]
    assert found.overall[COARSE]["AP50"] > 0
    assert found.per_class["car"][COARSE]["AP"] == expected.numbers(26)["AP"]
    assert found.changes["all"]["changed pixels"] == 0

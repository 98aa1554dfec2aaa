import json
from collections import Counter

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools.mask import decode

from pipeline import patch_dataset, preparation
from pipeline.patch_dataset import PATCH_SCHEMA, unpack
from pipeline.preparation import prepare
from pipeline.records import InputError
from pipeline.training_patches import PrepareConfig
from tests.truths import encode, make_truth, predict, true_mask


@pytest.fixture
def truth(tmp_path):
    return make_truth(tmp_path / "data")


def _prepare(truth, output, **settings):
    config = PrepareConfig(
        ground_truth=str(truth),
        images=str(truth.parent / "images"),
        output=str(output),
        **{"local": True, "val_share": 0.0, **settings},
    )
    return prepare(config, log=lambda line: None)


def _rows(output, columns=None):
    rows = [row for path in sorted(output.glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    rows.sort(key=lambda row: (row["frame_id"], row["instance_id"], row["visit"], row["box"]))
    return [{name: row[name] for name in columns} if columns else row for row in rows]


def test_patches_of_predictions_show_image_prediction_and_truth_at_their_box(truth, tmp_path):
    prepared = _prepare(truth, tmp_path / "out", predictions=str(predict(truth)))
    assert prepared.card["instances"] == 4
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == prepared.card
    for path in (tmp_path / "out" / "train").glob("*.parquet"):
        table = pq.read_table(path)
        assert table.schema == PATCH_SCHEMA
        for row, patch in zip(table.to_pylist(), unpack(table)):
            number = int(row["frame_id"].removeprefix("frame"))
            image = cv2.imread(str(truth.parent / "images" / f"frame{number}.png"))[..., ::-1]
            target = true_mask(truth, number + 1)
            x1, y1, x2, y2 = row["box"]
            assert np.array_equal(patch[..., :3], image[y1:y2, x1:x2])
            assert np.array_equal(patch[..., 4], target[y1:y2, x1:x2])
            assert np.array_equal(patch[..., 3], np.roll(target, 3, axis=1)[y1:y2, x1:x2])
            assert row["origin"] == "prediction"
            assert 0.5 < row["iou"] < 1


def test_predictions_without_a_truth_of_their_class_are_left_out(truth, tmp_path):
    prepared = _prepare(truth, tmp_path / "out", predictions=str(predict(truth, category=2)))
    assert prepared.card["patches"] == {"train": 0, "val": 0}
    assert "nothing cut  every object is a crowd (iscrowd), or has no prediction of its class" in str(prepared)
    assert "nothing cut" not in str(_prepare(truth, tmp_path / "other", predictions=str(predict(truth))))


def test_predictions_that_overlap_their_truth_by_half_or_less_are_left_out_and_counted(truth, tmp_path):
    prepared = _prepare(truth, tmp_path / "out", predictions=str(predict(truth, shift=60)))
    assert prepared.card["instances"] == 0
    assert "unmatched    8 of 8 predictions overlap no object of their class by half" in str(prepared)
    strays = _prepare(truth, tmp_path / "other", predictions=str(predict(truth)))
    assert "unmatched    4 of 8 predictions" in str(strays)
    assert "unmatched" not in str(_prepare(truth, tmp_path / "made"))


def test_images_without_predictions_are_counted_not_skipped_silently(truth, tmp_path):
    results = predict(truth)
    results.write_text(json.dumps([e for e in json.loads(results.read_text()) if e["image_id"] != 2]))
    prepared = _prepare(truth, tmp_path / "out", predictions=str(results))
    assert prepared.unpaired == "1 images without predictions, 0 without ground truth"
    assert "unpaired     1 images" in str(prepared)


def test_ground_truth_alone_is_cut_under_a_new_coarse_mask_at_each_visit(truth, tmp_path):
    _prepare(truth, tmp_path / "out", visits=3, scale=(0.8, 1.2), failure="wobble")
    rows = _rows(tmp_path / "out")
    assert {row["visit"] for row in rows} == {0, 1, 2}
    assert {row["origin"] for row in rows} == {"wobble"}
    assert len({(row["frame_id"], row["iou"]) for row in rows}) == 12


def test_predicted_and_generated_masks_can_be_mixed(truth, tmp_path):
    prepared = _prepare(truth, tmp_path / "out", predictions=str(predict(truth)), coarsened=0.5, seed=1)
    assert set(prepared.card["patches_by_origin"]) == {"prediction", "mixed"}


def test_objects_of_other_images_are_laid_over(truth, tmp_path):
    _prepare(truth, tmp_path / "out", composite=1.0, visits=2)
    named = {row["instance_id"] for row in _rows(tmp_path / "out")}
    assert any("/" in name for name in named)


def test_the_same_input_and_seed_give_the_same_rows_however_the_work_is_divided(truth, tmp_path):
    settings = {"visits": 2, "composite": 0.5, "patches_per_object": 3, "max_instances": 3, "val_share": 0.5}
    _prepare(truth, tmp_path / "a", **settings)
    _prepare(truth, tmp_path / "b", **settings, frames_per_block=1)
    _prepare(truth, tmp_path / "c", **settings, seed=1)
    assert _rows(tmp_path / "a") == _rows(tmp_path / "b")
    assert _rows(tmp_path / "a") != _rows(tmp_path / "c")


def test_a_limit_on_instances_draws_without_replacement(truth, tmp_path):
    prepared = _prepare(truth, tmp_path / "out", max_instances=3)
    assert prepared.card["instances"] == 3
    assert len({row["frame_id"] for row in _rows(tmp_path / "out")}) == 3


def test_a_limit_on_patches_holds_for_each_object_and_visit(truth, tmp_path):
    _prepare(truth, tmp_path / "out", patches_per_object=2, visits=2)
    counts = Counter((row["frame_id"], row["visit"]) for row in _rows(tmp_path / "out"))
    assert set(counts.values()) == {2}


def test_an_image_is_in_one_split_only(truth, tmp_path):
    _prepare(truth, tmp_path / "out", val_share=0.5, visits=2)
    splits = {}
    for path in (tmp_path / "out").glob("*/*.parquet"):
        for row in pq.read_table(path, columns=["frame_id", "split"]).to_pylist():
            assert row["split"] == path.parent.name
            assert splits.setdefault(row["frame_id"], row["split"]) == row["split"]
    assert set(splits.values()) == {"train", "val"}


def test_padding_widens_the_patches(truth, tmp_path):
    assert _prepare(truth, tmp_path / "out", padding=16).card["side_px"] == 96
    assert {row["side"] for row in _rows(tmp_path / "out")} == {96}


def test_frames_with_a_fault_are_set_aside_and_the_others_are_cut(truth, tmp_path):
    images = truth.parent / "images"
    (images / "frame1.png").unlink()
    cv2.imwrite(str(images / "frame2.png"), np.zeros((9, 9, 3), np.uint8))
    prepared = _prepare(truth, tmp_path / "out")
    assert prepared.frames == 2
    assert "frame1.png" in prepared.aside["frame1"]
    assert "9 x 9 px, expected 200 x 160" in prepared.aside["frame2"]
    content = json.loads(truth.read_text())
    content["images"] = content["images"][2:]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] > 2]
    truth.write_text(json.dumps(content))
    assert set(_prepare(truth, tmp_path / "out").aside) == {"frame2"}


def test_an_interrupted_run_is_completed_and_leaves_no_row_twice(truth, tmp_path, monkeypatch):
    _prepare(truth, tmp_path / "whole", frames_per_block=1)

    def fails_in_the_third_block(blocks, work, *, local):
        yield from map(work, blocks[:2])
        work(blocks[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "map_blocks", fails_in_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        _prepare(truth, tmp_path / "out", frames_per_block=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "train").iterdir())) == 3
    prepared = _prepare(truth, tmp_path / "out", frames_per_block=2)
    assert prepared.done_before == 2
    assert _rows(tmp_path / "out") == _rows(tmp_path / "whole")


def test_shards_that_a_killed_run_has_left_are_not_taken_for_those_of_the_next(truth, tmp_path, monkeypatch):
    def is_killed_before_the_ledger_knows(blocks, work, *, local):
        work(blocks[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "map_blocks", is_killed_before_the_ledger_knows)
    with pytest.raises(KeyboardInterrupt):
        _prepare(truth, tmp_path / "out", val_share=0.5)
    monkeypatch.undo()
    images = {
        int(row["frame_id"].removeprefix("frame")) + 1 for row in _rows(tmp_path / "out") if row["split"] == "val"
    }
    content = json.loads(truth.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in images]
    truth.write_text(json.dumps(content))
    assert _prepare(truth, tmp_path / "out", val_share=0.5).card["patches"]["val"] == 0
    _prepare(truth, tmp_path / "fresh", val_share=0.5)
    assert _rows(tmp_path / "out") == _rows(tmp_path / "fresh")


def test_files_of_others_in_the_output_are_left_alone(truth, tmp_path):
    others = [tmp_path / "out" / name for name in ("frames.parquet", "train/own.parquet", "older/train/a-000.parquet")]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("of somebody else")
    _prepare(truth, tmp_path / "out")
    assert [other.read_text() for other in others] == ["of somebody else"] * 3


def test_an_output_that_holds_the_predictions_is_refused(truth, tmp_path):
    with pytest.raises(InputError, match="expected an output apart from"):
        _prepare(truth, truth.parent, predictions=str(predict(truth)))


@pytest.fixture
def with_another(truth, tmp_path):
    """Prepares with a prediction of another image, of a given file name, beside the others."""

    def prepared(file_name: str):
        results = predict(truth)
        images = json.loads(truth.read_text())["images"]
        listed = tmp_path / "images.json"
        listed.write_text(json.dumps({"images": [*images, {"id": 99, "file_name": file_name}]}))
        results.write_text(json.dumps([*(e := json.loads(results.read_text())), e[0] | {"image_id": 99}]))
        return _prepare(truth, tmp_path / "out", predictions=str(results), image_list=str(listed))

    return prepared


def test_two_frames_of_one_image_are_refused(with_another):
    with pytest.raises(InputError, match="two frames are called frame0: 1, 99"):
        with_another("frame0.png")


def test_a_prediction_of_an_image_of_the_same_name_in_another_folder_is_told_apart(with_another):
    done = with_another("b/frame0.png")
    assert (done.frames, done.aside, done.unpaired) == (4, {}, "0 images without predictions, 1 without ground truth")


def test_what_has_changed_is_cut_again_and_what_is_gone_is_taken_out(truth, tmp_path):
    settings = {"composite": 0.5, "visits": 2, "frames_per_block": 2}
    assert _prepare(truth, tmp_path / "out", **settings).frames == 4
    image = truth.parent / "images" / "frame0.png"
    cv2.imwrite(str(image), cv2.imread(str(image))[::-1])
    content = json.loads(truth.read_text())
    content["images"] = content["images"][:3]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 4]
    for annotation in content["annotations"][2:4]:
        annotation["segmentation"] = encode(np.roll(decode(annotation["segmentation"]), 20, axis=0))
    truth.write_text(json.dumps(content))
    again = _prepare(truth, tmp_path / "out", **settings)
    assert (again.removed, again.frames + again.done_before) == (1, 3)
    _prepare(truth, tmp_path / "fresh", **settings)
    assert _rows(tmp_path / "out") == _rows(tmp_path / "fresh")
    assert again.card["instances"] == len({(row["frame_id"], row["instance_id"]) for row in _rows(tmp_path / "fresh")})
    assert _prepare(truth, tmp_path / "out", **settings).frames == 0


def test_objects_that_have_become_smaller_leave_none_of_the_patches_that_they_had(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_dataset, "SHARD_ROWS", 8)
    _prepare(truth, tmp_path / "out")
    before = len(list((tmp_path / "out" / "train").iterdir()))
    small = np.zeros((160, 200), np.uint8)
    small[60:100, 60:100] = 1
    content = json.loads(truth.read_text())
    for annotation in content["annotations"][::2]:
        annotation["segmentation"] = encode(small)
    truth.write_text(json.dumps(content))
    _prepare(truth, tmp_path / "out")
    _prepare(truth, tmp_path / "fresh")
    assert 0 < len(list((tmp_path / "out" / "train").iterdir())) < before
    assert _rows(tmp_path / "out") == _rows(tmp_path / "fresh")


def test_only_frames_that_share_a_shard_with_what_has_changed_are_cut_again(truth, tmp_path):
    predictions = predict(truth)
    _prepare(truth, tmp_path / "out", predictions=str(predictions), frames_per_block=2)
    entries = json.loads(predictions.read_text())
    entries[0]["segmentation"] = encode(np.roll(decode(entries[0]["segmentation"]), 1, axis=1))
    predictions.write_text(json.dumps(entries))
    again = _prepare(truth, tmp_path / "out", predictions=str(predictions), frames_per_block=2)
    assert (again.frames, again.changed, again.removed, again.done_before) == (2, 2, 0, 2)
    assert "2 cut now (2 of them again), 2 before" in str(again)


def test_frames_whose_predictions_have_other_places_in_the_json_than_before_are_cut_again(truth, tmp_path):
    predictions = predict(truth)
    settings = {"predictions": str(predictions), "coarsened": 0.5, "frames_per_block": 1}
    _prepare(truth, tmp_path / "out", **settings)
    entries = json.loads(predictions.read_text())
    predictions.write_text(json.dumps([entry for entry in entries if entry["image_id"] != 2]))
    again = _prepare(truth, tmp_path / "out", **settings)
    assert (again.changed, again.removed, again.done_before) == (2, 1, 1)
    _prepare(truth, tmp_path / "fresh", **settings)
    assert _rows(tmp_path / "out") == _rows(tmp_path / "fresh")


def test_a_limit_on_instances_holds_for_the_set_whatever_was_cut_before(truth, tmp_path):
    settings = {"max_instances": 2}
    _prepare(truth, tmp_path / "out", limit=2, **settings)
    _prepare(truth, tmp_path / "out", **settings)
    _prepare(truth, tmp_path / "fresh", **settings)
    assert _rows(tmp_path / "out") == _rows(tmp_path / "fresh")
    assert _prepare(truth, tmp_path / "out", limit=2, **settings).card["instances"] == 2


def test_what_was_cut_before_stays_under_a_later_limit(truth, tmp_path):
    for limit, frames, done_before, instances in ((1, 1, 0, 1), (None, 3, 1, 4), (1, 0, 4, 4)):
        limited = _prepare(truth, tmp_path / "out", limit=limit)
        assert (limited.frames, limited.done_before, limited.card["instances"]) == (frames, done_before, instances)


def test_predictions_of_a_category_that_the_ground_truth_lacks_are_left_out_not_their_images(truth, tmp_path):
    predictions = predict(truth)
    entries = json.loads(predictions.read_text())
    predictions.write_text(json.dumps([*entries, entries[0] | {"category_id": 1234}]))
    prepared = _prepare(truth, tmp_path / "out", predictions=str(predictions))
    assert (prepared.aside, prepared.card["instances"]) == ({}, 4)


def test_other_settings_on_the_same_output_are_refused(truth, tmp_path):
    _prepare(truth, tmp_path / "out")
    with pytest.raises(InputError, match=r"made with nms_threshold = 0\.25, not 0\.3; choose another output$"):
        _prepare(truth, tmp_path / "out", nms_threshold=0.3)


@pytest.mark.parametrize(
    "settings",
    [{"visits": 0}, {"val_share": 2}, {"scale": (0, 1)}, {"failure": "burn"}, {"coarsened": 0.5}, {"max_instances": 0}],
)
def test_settings_without_meaning_are_refused(truth, tmp_path, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        _prepare(truth, tmp_path / "out", **settings)


def test_another_frame_in_a_cityscapes_folder_leaves_the_others_as_they_were_cut(tmp_path):
    for folder in ("truth", "images", "dump"):
        (tmp_path / folder).mkdir()
    config = PrepareConfig(
        ground_truth=str(tmp_path / "truth"),
        images=str(tmp_path / "images"),
        predictions=str(tmp_path / "dump"),
        output=str(tmp_path / "out"),
        frames_per_block=1,
        local=True,
    )

    def predict_frame(name, png):
        ids = np.zeros((120, 160), np.uint16)
        ids[30:90, 40:110] = 26001
        cv2.imwrite(str(tmp_path / "truth" / f"{name}_gtFine_instanceIds.png"), ids)
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), np.zeros((120, 160, 3), np.uint8))
        cv2.imwrite(str(tmp_path / "dump" / png), (ids != 0).astype(np.uint8) * 255)
        (tmp_path / "dump" / f"{name}_pred.txt").write_text(f"{png} 26 0.9")

    predict_frame("a", "a_0.png")
    predict_frame("b", "mask.png")
    assert prepare(config, log=lambda line: None).frames == 2
    predict_frame("c", "c_0.png")
    again = prepare(config, log=lambda line: None)
    # Any of the files may be the one that b names.
    assert (again.frames, again.changed, again.done_before) == (2, 1, 1)
    cv2.imwrite(str(tmp_path / "dump" / "a_0.png"), np.full((120, 160), 255, np.uint8))
    assert prepare(config, log=lambda line: None).changed == 2


@pytest.mark.parametrize("settings", [{"failure": "grow"}, {"visits": 8}, {"scale": (0.5, 1.0)}, {"composite": 0.1}])
def test_settings_of_generated_masks_are_refused_where_all_masks_are_predicted(truth, tmp_path, settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} is .*, of generated masks: expected no predictions"):
        _prepare(truth, tmp_path / "out", predictions=str(predict(truth)), **settings)
    assert _prepare(truth, tmp_path / "out", predictions=str(predict(truth)), coarsened=1.0, **settings).frames == 4


def test_cityscapes_predictions_are_matched_with_instance_ids_by_the_images_name(tmp_path):
    for folder in ("truth/ulm", "images", "dump"):
        (tmp_path / folder).mkdir(parents=True)
    ids = np.full((120, 160), 7, np.uint16)
    ids[30:90, 40:110] = 26001
    ids[95:118, 10:150] = 24
    cv2.imwrite(str(tmp_path / "truth" / "ulm" / "ulm_0_0_gtFine_instanceIds.png"), ids)
    cv2.imwrite(str(tmp_path / "images" / "ulm_0_0_leftImg8bit.png"), np.zeros((120, 160, 3), np.uint8))
    lines = []
    for k, (label, mask) in enumerate(((26, ids == 26001), (24, ids == 24), (33, ids == 26001))):
        name = f"ulm_0_0_leftImg8bit_{k}.png"
        cv2.imwrite(str(tmp_path / "dump" / name), np.roll(mask, 2, axis=0).astype(np.uint8) * 255)
        lines.append(f"{name} {label} 0.9")
    (tmp_path / "dump" / "ulm_0_0_leftImg8bit_pred.txt").write_text("\n".join(lines))
    config = PrepareConfig(
        ground_truth=str(tmp_path / "truth"),
        images=str(tmp_path / "images"),
        predictions=str(tmp_path / "dump"),
        output=str(tmp_path / "out"),
        val_share=0,
        local=True,
    )
    card = prepare(config, log=lambda line: None).card
    # Neither the group nor the prediction of another class has a target.
    assert card["instances"] == 1
    assert list(card["patches_by_class"]) == ["car"]
    assert {row["frame_id"] for row in _rows(tmp_path / "out")} == {"ulm_0_0"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 100_000}, "patch_size is 100000 and padding 0: expected at most 4096 px"),
        ({"padding": 2048}, "patch_size is 64 and padding 2048: expected at most 4096 px"),
        ({"scale": (1.0, float("inf"))}, "expected the smallest and the largest factor, above 0 and at most 16"),
        ({"frames_per_block": 0}, "frames_per_block is 0: expected at least 1, at most 512"),
    ],
)
def test_patches_that_no_memory_holds_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(ground_truth="g", images="i", output="o", **settings)

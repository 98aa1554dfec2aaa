import json
import re
import sys

import cv2
import pytest

from jobs import grade as job
from pipeline.grading import MEASURES, grade, samples, table
from pipeline.records import InputError
from tests.truths import make_truth, true_mask


@pytest.fixture
def truth(tmp_path):
    return make_truth(tmp_path / "data", frames=3)


def _grade(truth, refine, kinds=("grow", "wobble"), aside=None, **settings):
    images = str(truth.parent / "images")
    found = samples(str(truth), images, kinds, [] if aside is None else aside, **settings)
    return list(grade(found, refine))


def test_a_refiner_that_does_nothing_leaves_every_score(truth):
    grades = _grade(truth, lambda image, masks: masks)
    assert len(grades) == 6
    assert all(one.coarse == one.refined and not one.worse and not one.changed for one in grades)
    assert all(0.5 < one.coarse[0] < 1 for one in grades)


def test_a_perfect_refiner_scores_one_everywhere(truth):
    by_size = {true_mask(truth, i + 1).sum(): true_mask(truth, i + 1) for i in range(3)}

    def perfect(image, masks):
        bright = (image[..., 0] >= 140).astype(masks.dtype)
        best = min(by_size.values(), key=lambda mask: (mask != bright).sum())
        return best[None]

    grades = _grade(truth, perfect)
    assert all(one.refined == (1.0,) * len(MEASURES) for one in grades)
    assert "1.0000" in table(grades).splitlines()[-1]


def test_a_refiner_that_destroys_masks_is_seen_in_the_share_of_worse_objects(truth):
    grades = _grade(truth, lambda image, masks: masks * 0)
    assert all(one.worse and one.changed for one in grades)
    assert table(grades).splitlines()[-1].endswith("100.0%")


def test_in_the_table_a_category_has_one_row_in_line_with_the_others_whatever_its_name_is(truth):
    content = json.loads(truth.read_text())
    content["categories"][0]["name"] = "a name of two\nlines " + 40 * "and long "
    truth.write_text(json.dumps(content))
    head, row, total = table(_grade(truth, lambda image, masks: masks), by="category").splitlines()
    assert row.startswith(r"a name of two\nlines and long")
    assert len(head) == len(row) == len(total)


def test_coarse_masks_depend_on_seed_object_and_kind_alone(truth):
    def keep(image, masks):
        return masks

    assert _grade(truth, keep) == _grade(truth, keep)
    assert _grade(truth, keep, kinds=("wobble",)) == [one for one in _grade(truth, keep) if one.kind == "wobble"]
    assert _grade(truth, keep) != _grade(truth, keep, seed=1)


def test_a_truth_without_objects_is_refused(tmp_path):
    empty = make_truth(tmp_path / "empty", frames=0)
    with pytest.raises(InputError, match="no object"):
        _grade(empty, lambda image, masks: masks)


def _spoil(truth):
    """The first image is missing, the second's annotation is no mask, and the third is of another size."""
    images = truth.parent / "images"
    (images / "frame0.png").unlink()
    content = json.loads(truth.read_text())
    content["annotations"][2]["segmentation"]["counts"] = "rubbish"
    truth.write_text(json.dumps(content))
    cv2.imwrite(str(images / "frame2.png"), cv2.imread(str(images / "frame2.png"))[:-1])


def test_images_with_a_fault_are_set_aside_and_the_others_graded(tmp_path):
    truth, aside = make_truth(tmp_path / "data"), []
    _spoil(truth)
    grades = _grade(truth, lambda image, masks: masks, aside=aside)
    assert {one.key for one in grades} == {"frame3"}
    assert [reason.partition(":")[0] for reason in aside] == ["frame0", "frame1", "frame2"]
    assert "frame0.png: no such file" in aside[0]
    assert "annotation 11 of frame1.png" in aside[1]
    assert "200 x 159 px, expected 200 x 160 as the ground truth" in aside[2]


@pytest.fixture
def run(monkeypatch, checkpoint_path):
    """The exit status of the job on a ground truth, with seeded weights."""

    def call(truth, *flags):
        given = ["--ground-truth", truth, "--images", truth.parent / "images", "--checkpoint", checkpoint_path]
        monkeypatch.setattr(sys, "argv", ["grade", *map(str, [*given, "--kinds", "grow", *flags])])
        return job.main()

    return call


def test_the_job_names_what_it_set_aside_and_fails_where_nothing_is_left(run, tmp_path, capsys):
    truth = make_truth(tmp_path / "data")
    _spoil(truth)
    assert run(truth, "--output", tmp_path / "grades.json") == 0
    printed = capsys.readouterr().out
    assert printed.count("set aside    frame") == 3
    assert "3 images were set aside and count in no number" in printed
    assert re.search(r"^\d+ of \d+ masks came out as they went in$", printed, re.MULTILINE)
    assert {one["key"] for one in json.loads((tmp_path / "grades.json").read_text())} == {"frame3"}
    (truth.parent / "images" / "frame3.png").unlink()
    assert run(truth) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: all 4 images with objects were set aside, the first as frame0: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output", "--pareto"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(run, truth, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(job, "grade", None)
    monkeypatch.setattr(job, "samples", None)
    (tmp_path / "file").touch()
    assert run(truth, flag, tmp_path / "file" / "out") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_bytes() == b""


def test_an_output_in_place_of_the_ground_truth_is_refused(run, tmp_path, capsys):
    truth = make_truth(tmp_path / "data", frames=1)
    before = truth.read_bytes()
    assert run(truth, "--output", truth) == 1
    truth = truth.rename(truth.with_name("pareto.json"))
    assert run(truth, "--pareto", truth.parent) == 1
    assert capsys.readouterr().err.count("expected an output apart from") == 2
    assert truth.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--every", "0"], "every is 0: expected at least 1"),
        (["--iterations", "-2"], "iterations is -2: expected at least 1"),
        (["--seed", "-1"], "seed is -1: expected at least 0"),
        (["--kinds"], "kinds is empty: expected at least one"),
        (["--kinds", "burn"], "kinds is 'burn': expected mixed, mask_head"),
        (["--nms-threshold", "nan"], "nms_threshold is nan: expected a number between 0 and 1"),
        (["--nms-threshold", "5"], "nms_threshold is 5.0: expected a number between 0 and 1"),
    ],
)
def test_settings_without_meaning_are_named(run, truth, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(truth, *flags)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())

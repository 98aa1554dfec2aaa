"""The demo's dump is a valid Cityscapes dump of real photographs, with masks that are coarse but not wrong."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage", reason="the demo's photographs come with scikit-image")

from jobs import demo
from pipeline import demo_dump
from pipeline.demo_dump import PHOTOGRAPHS, Photograph
from pipeline.formats.cityscapes import LABEL_IDS, CityscapesReader
from pipeline.records import InputError

by_photograph = pytest.mark.parametrize("photo", PHOTOGRAPHS, ids=lambda photo: photo.name)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    demo_dump.write_dump(str(root))
    return root


@by_photograph
def test_photographs_come_from_the_wheel_not_the_network(photo: Photograph, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    image = demo_dump.photograph(photo.name)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert min(image.shape[:2]) > 64


def test_without_scikit_image_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"scikit-image is not installed.*\.\[report\]"):
        demo_dump.photograph("astronaut")


@by_photograph
def test_every_outline_lies_in_its_photograph(photo: Photograph) -> None:
    height, width = demo_dump.photograph(photo.name).shape[:2]
    for instance in photo.instances:
        points = demo_dump.outline_points(instance.outline)
        assert len(points) >= 5
        assert (points >= 0).all()
        assert (points < (width, height)).all()


@by_photograph
def test_masks_are_neither_empty_nor_the_whole_frame(photo: Photograph) -> None:
    for mask in demo_dump.coarse_masks(photo):
        assert mask.dtype == bool
        assert 500 < np.count_nonzero(mask) < 0.9 * mask.size


@by_photograph
def test_a_coarse_mask_follows_its_outline_roughly(photo: Photograph) -> None:
    for instance, mask in zip(photo.instances, demo_dump.coarse_masks(photo)):
        points = demo_dump.outline_points(instance.outline)
        rows, columns = np.nonzero(mask)
        centre, extent = (points.min(axis=0) + points.max(axis=0)) / 2, np.ptp(points, axis=0)
        assert (np.abs([columns.mean(), rows.mean()] - centre) < 0.25 * extent).all()
        assert (np.abs([np.ptp(columns), np.ptp(rows)] - extent) <= 2 + 0.12 * extent).all()


def test_the_coins_are_many_and_do_not_cover_one_another() -> None:
    coins = demo_dump.coarse_masks(PHOTOGRAPHS[-1])
    assert len(coins) == 24
    assert np.sum(coins, axis=0).max() == 1


def test_the_dump_is_read_back_as_it_was_drawn(dump: Path) -> None:
    reader = CityscapesReader(str(dump / "coarse"), str(dump / "images"))
    refs = {ref.frame_id: ref for ref in reader.list_frames()}
    assert set(refs) == {photo.name for photo in PHOTOGRAPHS}
    for photo in PHOTOGRAPHS:
        assert refs[photo.name].error == ""
        height, width = demo_dump.photograph(photo.name).shape[:2]
        instances = list(reader.read(refs[photo.name], width, height))
        assert [one.instance_id for one in instances] == [f"{photo.name}_{i}.png" for i in range(len(photo.instances))]
        assert all(one.category_id in LABEL_IDS and 0 < one.score < 1 for one in instances)
        assert [one.area for one in instances] == [int(mask.sum()) for mask in demo_dump.coarse_masks(photo)]


def test_writing_again_changes_nothing_but_forgets_the_last_run(tmp_path: Path) -> None:
    demo_dump.write_dump(str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    ledger = tmp_path / "refined" / "_ledger"
    ledger.mkdir(parents=True)
    (ledger / "run.json").write_text("{}")
    kept = tmp_path / "refined" / "astronaut_pred.txt"
    kept.write_text("")
    demo_dump.write_dump(str(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path != kept} == before
    assert kept.exists()
    assert not list(ledger.iterdir())


def test_report_frames_pair_each_coarse_mask_with_its_refined_one(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(dump / "images")
    (tmp_path / "coarse").symlink_to(dump / "coarse")
    (tmp_path / "refined").symlink_to(dump / "coarse")
    frames = list(demo_dump.report_frames(str(tmp_path)))
    assert [frame.name for frame in frames] == [photo.name for photo in PHOTOGRAPHS]
    for frame, photo in zip(frames, PHOTOGRAPHS):
        assert frame.caption == photo.credit
        assert [one.label for one in frame.instances] == [drawn.label for drawn in photo.instances]
        assert all(one.coarse.bbox == one.refined.bbox for one in frame.instances)


def test_a_frame_that_was_set_aside_is_left_out_of_the_report(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "coarse").symlink_to(dump / "coarse")
    (tmp_path / "images").symlink_to(dump / "images")
    (tmp_path / "refined").mkdir()
    for path in (dump / "coarse").glob("rocket*"):
        (tmp_path / "refined" / path.name).write_bytes(path.read_bytes())
    assert [frame.name for frame in demo_dump.report_frames(str(tmp_path))] == ["rocket"]


def test_an_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["demo.py", "--local", "--output", f"{tmp_path}/file"])
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"{tmp_path}/file" in error

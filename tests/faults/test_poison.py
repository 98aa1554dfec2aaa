"""An input that its process does not survive is found and set aside, and all others are refined."""

import cv2
import pytest

from pipeline import dump as forms
from pipeline import flow
from pipeline.ledger import Ledger
from pipeline.limits import LimitsConfig
from pipeline.run import run as refine_dump
from tests.dumps import make_dump, tree
from tests.poison import PoisonedReader, load_poisoned

PLACEMENTS = ["local", "spread", "fused"]


@pytest.fixture(params=[pytest.param("local"), *(pytest.param(p, marks=pytest.mark.slow) for p in PLACEMENTS[1:])])
def placed(request):
    """Settings by which the stages run in this process, as Ray operators, or in one Ray actor."""
    if request.param == "local":
        return {"local": True}
    request.getfixturevalue("cluster")
    return {"placement": request.param}


def _run(config):
    return refine_dump(config, log=lambda _: None)


def _poisoned(monkeypatch, **frames):
    monkeypatch.setattr(forms, "reader", lambda predictions, images, *_: PoisonedReader(predictions, images, **frames))


def _expect(tmp_path, summary, dump, checkpoint_path, monkeypatch, aside):
    """All frames but those set aside have the bytes of an undisturbed run without them."""
    assert set(summary.quarantined) == set(aside)
    assert summary.frames == 9 - len(aside)
    for frame_id in aside:
        for path in (dump.root / "cityscapes").glob(f"{frame_id}_*"):
            path.unlink()
    _run(dump.config("cityscapes", tmp_path / "clean", checkpoint_path, local=True, frames_per_block=4))
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")
    assert set(Ledger(str(tmp_path / "out")).aside) == set()


def test_a_frame_that_kills_its_reader_is_set_aside(placed, tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=9)
    with monkeypatch.context() as patch:
        _poisoned(patch, kills=("frame_002", "frame_007"))
        config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, frames_per_block=4, **placed)
        summary = _run(config)
    assert "frame_002.png: reading it killed its process (SIGSEGV)" in summary.quarantined["frame_002"]
    _expect(tmp_path, summary, dump, checkpoint_path, monkeypatch, ["frame_002", "frame_007"])


def test_a_frame_that_takes_for_ever_is_set_aside(placed, tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=9)
    with monkeypatch.context() as patch:
        _poisoned(patch, hangs=("frame_004",))
        limits = LimitsConfig(seconds=4)
        config = dump.config(
            "cityscapes", tmp_path / "out", checkpoint_path, frames_per_block=4, limits=limits, **placed
        )
        summary = _run(config)
    assert "frame_004.png: reading it took longer than 4 s" in summary.quarantined["frame_004"]
    _expect(tmp_path, summary, dump, checkpoint_path, monkeypatch, ["frame_004"])


def test_a_frame_that_fills_the_memory_is_set_aside(placed, tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=9)
    with monkeypatch.context() as patch:
        _poisoned(patch, fills=("frame_000",))
        limits = LimitsConfig(memory_gb=0.5)
        config = dump.config(
            "cityscapes", tmp_path / "out", checkpoint_path, frames_per_block=4, limits=limits, **placed
        )
        summary = _run(config)
    _expect(tmp_path, summary, dump, checkpoint_path, monkeypatch, ["frame_000"])


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["spread", "fused"])
def test_a_frame_that_kills_the_network_is_set_aside(cluster, placement, tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=9)
    path = str(dump.root / "images" / "frame_000.png")
    image = cv2.imread(path)
    image[:] = (255, 2, 1)
    cv2.imwrite(path, image)
    monkeypatch.setattr(flow, "load_refiner", load_poisoned)
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, frames_per_block=4, placement=placement)
    summary = _run(config)
    assert "frame_000.png: refining it killed its process (SIGKILL" in summary.quarantined["frame_000"]
    assert summary.frames == 8

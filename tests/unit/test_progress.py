from dataclasses import replace

import pytest

from pipeline import progress
from pipeline.progress import Progress
from pipeline.work import Receipt


def _receipt(frame_id, error="", patches=10, refined_at=0.0):
    return Receipt(frame_id, error, "", 3, 2, 0 if error else patches, {"extract": 0.5, "refine": 1.0}, refined_at)


def _progress(monkeypatch, times, **settings):
    """Progress whose clock shows the given times one after the other."""
    clock = iter(times)
    monkeypatch.setattr(progress.time, "time", lambda: next(clock))
    lines = []
    return Progress(**{"total": 6, "done_before": 4, "log": lines.append} | settings), lines


def test_the_line_has_rate_and_frames_set_aside_and_once_blocks_follow_each_other_an_eta(monkeypatch):
    shown, lines = _progress(monkeypatch, [0.0, 30.0, 41.0, 42.0])
    shown.live = False
    shown.update([_receipt("a", refined_at=20.0), _receipt("b", error="broken", refined_at=20.0)])
    shown.update([_receipt("c"), _receipt("d")])
    assert lines[0] == "refine 2/6  0.1 frames/s  set aside 1"
    assert lines[1] == "refine 4/6  0.1 frames/s  set aside 1  eta 21s"
    shown.update([_receipt("e"), _receipt("f")])
    assert lines[2] == "refine 6/6  0.2 frames/s  set aside 1  eta 0s"


def test_the_summary_counts_frames_instances_patches_and_seconds_per_stage(monkeypatch):
    shown, _ = _progress(monkeypatch, [0.0, 10.0, 12.0], total=3)
    first = replace(_receipt("a", refined_at=10.0), arithmetic="cpu openvino bf16")
    shown.update([first, _receipt("b", error="broken", refined_at=10.0)])
    shown.update([replace(_receipt("c", patches=50), arithmetic="cpu openvino fp32")])
    summary = shown.summary("out", {"b": "b.png: broken"}, wall_s=13.0)
    assert (summary.frames, summary.done_before, summary.instances, summary.patches) == (2, 4, 9, 60)
    assert summary.patches_per_s == pytest.approx(25)
    text = str(summary)
    assert "60 (25.0/s after start-up)" in text
    assert "extract 1.5  refine 3.0" in text
    assert "network      cpu openvino bf16, cpu openvino fp32" in text
    assert "set aside    b: b.png: broken" in text
    assert "out/_ledger/quarantine.csv" in text


def test_the_summary_says_how_many_instances_were_kept_and_rejected_and_why(monkeypatch):
    shown, _ = _progress(monkeypatch, [0.0, 10.0], total=2)
    first, second = {"too_small": 1, "iou": 1, "far_pieces": 2}, {"iou": 1, "uncertain": 3, "no_boundary": 1}
    shown.update([replace(_receipt(name), reasons=reasons) for name, reasons in (("a", first), ("b", second))])
    summary = shown.summary("out", {}, 11.0)
    assert summary.reasons == {"too_small": 1, "iou": 2, "far_pieces": 2, "uncertain": 3, "no_boundary": 1}
    expected = "6, 4 refined (2 far_pieces), 2 kept (1 no_boundary, 1 too_small), 5 rejected (3 uncertain, 2 iou)"
    assert f"instances    {expected}" in str(summary)


def test_a_single_block_has_no_rate(monkeypatch):
    shown, _ = _progress(monkeypatch, [0.0, 10.0], total=1)
    shown.update([_receipt("a")])
    assert "after start-up" not in str(shown.summary("out", {}, 11.0))

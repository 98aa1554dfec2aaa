"""Runs over a dump that has grown and partly changed, against a run over the whole of it from the start."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import flow, storage
from pipeline.config import RefineConfig
from pipeline.records import InputError
from pipeline.run import run
from tests.dumps import make_dump, tree
from tests.poison import Blur

FORMS = ("cityscapes", "coco", "parquet")


@pytest.fixture
def refined(monkeypatch):
    """The frames that the network has seen, by image, since the list was last cleared."""
    monkeypatch.setattr(flow, "load_refiner", lambda *_: Blur())
    seen = []
    original = flow.run_local

    def run_local(plan):
        seen.extend(ref.file_name for ref in plan.refs)
        return original(plan)

    monkeypatch.setattr(flow, "run_local", run_local)
    return seen


@pytest.fixture
def dump(tmp_path):
    return make_dump(tmp_path / "dump", frames=7)


def _config(dump, form, output, checkpoint, **settings) -> RefineConfig:
    return dump.config(form, output, checkpoint, local=True, **settings)


def _run(config, log=lambda _: None):
    return run(config, log=log)


def _die_before_the_receipt(config, monkeypatch):
    """A run that is interrupted when its first block is written but not yet in the ledger."""
    original = flow.run_local

    def dies(plan):
        next(original(plan))
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(flow, "run_local", dies)
        with pytest.raises(KeyboardInterrupt):
            _run(config)


def _counts(summary):
    return summary.new, summary.changed, summary.removed, summary.unchanged


def _entries(dump, change):
    """Rewrite the frames of the dump in all forms but images: `change` gives a frame's masks anew, None removes it."""
    root = dump.root
    results = json.loads((root / "results.json").read_text())
    table = pq.read_table(root / "frames.parquet")
    rows = table.to_pylist()
    kept_results, kept_rows = [], []
    for number, row in enumerate(rows):
        entries = [entry for entry in results if entry["image_id"] == number + 10]
        count = change(number, len(entries))
        pred = root / "cityscapes" / f"frame_{number:03d}_pred.txt"
        if count is None:
            pred.unlink(missing_ok=True)
            continue
        kept_results += entries[:count]
        kept_rows.append(row | {"instances": row["instances"][:count]})
        lines = pred.read_text().splitlines(keepends=True)
        if len(lines) > count:
            pred.write_text("".join(lines[:count]))
    (root / "results.json").write_text(json.dumps(kept_results))
    pq.write_table(pa.Table.from_pylist(kept_rows, table.schema), root / "frames.parquet")


@pytest.mark.parametrize("output_form", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_new_and_changed_frames_are_refined_to_the_bytes_of_a_whole_run(
    tmp_path, dump, checkpoint_path, refined, form, output_form
):
    later = (dump.root / "results.json").read_bytes(), (dump.root / "frames.parquet").read_bytes()
    pred = dump.root / "cityscapes" / "frame_006_pred.txt"
    listed = pred.read_text()
    # The night before: frame 6 is not there yet.
    _entries(dump, lambda number, count: None if number == 6 else count)
    settings = {"output_format": output_form, "prune": True}
    first = _run(_config(dump, form, tmp_path / "out", checkpoint_path, **settings))
    frames = 5 if form == "coco" else 6  # a results json has no frames without instances
    assert _counts(first) == (frames, 0, 0, 0)
    (dump.root / "results.json").write_bytes(later[0])
    (dump.root / "frames.parquet").write_bytes(later[1])
    pred.write_text(listed)
    # Tonight frame 0 has fewer instances, frame 2 another image, and frame 4 has gone.
    _entries(dump, lambda number, count: 1 if number == 0 else None if number == 4 else count)
    image = dump.root / "images" / "frame_002.png"
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    refined.clear()
    lines = []
    second = _run(_config(dump, form, tmp_path / "out", checkpoint_path, **settings), lines.append)
    assert _counts(second) == (1, 2, 1, frames - 3)
    assert sorted(refined) == ["frame_000.png", "frame_002.png", "frame_006.png"]
    assert lines[0] == f"dump         1 new, 2 changed, 1 removed (outputs as well), {frames - 3} unchanged"
    _run(_config(dump, form, tmp_path / "whole", checkpoint_path, output_format=output_form))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    third = _run(_config(dump, form, tmp_path / "out", checkpoint_path, **settings))
    assert _counts(third) == (0, 0, 0, frames)
    assert len(refined) == 3 + frames


@pytest.mark.parametrize("form", FORMS)
def test_an_update_that_dies_between_outputs_and_ledger_is_completed_to_the_bytes_of_a_whole_run(
    tmp_path, dump, checkpoint_path, refined, form, monkeypatch
):
    config = _config(dump, form, tmp_path / "out", checkpoint_path, frames_per_block=1)
    _run(config)
    _entries(dump, lambda number, count: min(count, 1))
    _die_before_the_receipt(config, monkeypatch)
    summary = _run(config)
    assert summary.changed > 2
    _run(_config(dump, form, tmp_path / "whole", checkpoint_path))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_update_that_was_interrupted_and_then_undone_leaves_nothing_of_it(
    tmp_path, dump, checkpoint_path, refined, monkeypatch
):
    config = _config(dump, "cityscapes", tmp_path / "out", checkpoint_path, frames_per_block=1)
    _run(config)
    before = tree(tmp_path / "out")
    pred = dump.root / "cityscapes" / "frame_000_pred.txt"
    content, status = pred.read_text(), pred.stat()
    pred.write_text(content.splitlines()[0])
    _die_before_the_receipt(config, monkeypatch)
    assert tree(tmp_path / "out") != before
    pred.write_text(content)
    os.utime(pred, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _counts(_run(config)) == (0, 1, 0, 6)
    assert tree(tmp_path / "out") == before


def test_a_mask_that_changed_behind_the_same_list_is_noticed_whatever_its_name(
    tmp_path, dump, checkpoint_path, refined
):
    folder = dump.root / "cityscapes"
    (folder / "frame_000_0.png").rename(folder / "0_000.mask")
    pred = folder / "frame_000_pred.txt"
    pred.write_text(pred.read_text().replace("frame_000_0.png", "0_000.mask"))
    config = _config(dump, "cityscapes", tmp_path / "out", checkpoint_path)
    _run(config)
    assert _counts(_run(config)) == (0, 0, 0, 7)
    for name, image in (("frame_002_0.png", "frame_002.png"), ("0_000.mask", "frame_000.png")):
        refined.clear()
        mask = cv2.imdecode(np.fromfile(folder / name, np.uint8), cv2.IMREAD_UNCHANGED)
        (folder / name).write_bytes(cv2.imencode(".png", np.roll(mask, 5, 1))[1].tobytes())
        _run(config)
        # Whether frame 0 depends on the other masks cannot be told without reading it.
        assert {*refined} == {image, "frame_000.png"}


def test_outputs_of_frames_that_disappeared_stay_until_they_are_pruned(tmp_path, dump, checkpoint_path, refined):
    _run(_config(dump, "cityscapes", tmp_path / "out", checkpoint_path))
    before = tree(tmp_path / "out")
    (dump.root / "cityscapes" / "frame_002_pred.txt").unlink()
    kept = _run(_config(dump, "cityscapes", tmp_path / "out", checkpoint_path))
    assert _counts(kept) == (0, 0, 1, 6)
    assert tree(tmp_path / "out") == before
    pruned = _run(_config(dump, "cityscapes", tmp_path / "out", checkpoint_path, prune=True))
    assert _counts(pruned) == (0, 0, 1, 6)
    assert set(before) - set(tree(tmp_path / "out")) == {"frame_002_0.png", "frame_002_pred.txt"}
    assert _counts(_run(_config(dump, "cityscapes", tmp_path / "out", checkpoint_path))) == (0, 0, 0, 6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_a_changed_frame_that_is_set_aside_leaves_no_old_output(tmp_path, dump, checkpoint_path, refined, form, fault):
    _run(_config(dump, form, tmp_path / "out", checkpoint_path, output_format="cityscapes"))
    assert (tmp_path / "out" / "frame_000_pred.txt").exists()
    image = dump.root / "images" / "frame_000.png"
    image.unlink() if fault == "missing" else image.write_bytes(b"rubbish")
    summary = _run(_config(dump, form, tmp_path / "out", checkpoint_path, output_format="cityscapes"))
    assert (summary.changed, len(summary.quarantined)) == (1, 1)
    assert not [name for name in tree(tmp_path / "out") if name.startswith("frame_000")]


def test_an_image_with_another_name_takes_its_outputs_along(tmp_path, dump, checkpoint_path, refined):
    settings = {"output_format": "cityscapes"}
    _run(_config(dump, "coco", tmp_path / "out", checkpoint_path, **settings))
    listing = json.loads((dump.root / "images.json").read_text())
    listing["images"][0]["file_name"] = "first.png"
    (dump.root / "images.json").write_text(json.dumps(listing))
    (dump.root / "images" / "frame_000.png").rename(dump.root / "images" / "first.png")
    assert _counts(_run(_config(dump, "coco", tmp_path / "out", checkpoint_path, **settings))) == (0, 1, 0, 5)
    _run(_config(dump, "coco", tmp_path / "whole", checkpoint_path, **settings))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("form", FORMS)
def test_a_restart_under_other_settings_ends_with_the_bytes_of_a_fresh_run(
    tmp_path, dump, checkpoint_path, refined, form
):
    _run(_config(dump, form, tmp_path / "out", checkpoint_path))
    _entries(dump, lambda number, count: None if number == 0 else count)
    other = {"nms_threshold": 0.3}
    with pytest.raises(InputError, match=r"made with nms_threshold = .*--restart"):
        _run(_config(dump, form, tmp_path / "out", checkpoint_path, **other))
    _run(_config(dump, form, tmp_path / "out", checkpoint_path, restart=True, **other))
    _run(_config(dump, form, tmp_path / "whole", checkpoint_path, **other))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    again = _run(_config(dump, form, tmp_path / "out", checkpoint_path, **other))
    assert again.new == again.changed == 0


def test_a_restart_that_was_killed_may_be_finished_without_asking_for_it_again(
    tmp_path, dump, checkpoint_path, refined, monkeypatch
):
    _run(_config(dump, "cityscapes", tmp_path / "out", checkpoint_path))
    _entries(dump, lambda number, count: None if number == 0 else count)
    config = _config(dump, "cityscapes", tmp_path / "out", checkpoint_path, nms_threshold=0.3)
    remove = storage.remove

    def ends_before_the_first_mask(url):
        if url.endswith(".png"):
            raise KeyboardInterrupt
        remove(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", ends_before_the_first_mask)
        with pytest.raises(KeyboardInterrupt):
            _run(replace(config, restart=True))
    _run(config)
    _run(replace(config, output=str(tmp_path / "whole")))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_row_that_moved_in_its_parquet_file_has_not_changed_and_is_not_read_again(
    tmp_path, dump, checkpoint_path, refined, monkeypatch
):
    config = _config(dump, "parquet", tmp_path / "out", checkpoint_path)
    _run(config)
    table = pq.read_table(dump.root / "frames.parquet")
    pq.write_table(table.take([6, 0, 1, 2, 3, 4, 5]), dump.root / "frames.parquet", row_group_size=3)
    assert _counts(_run(config)) == (0, 0, 0, 7)
    ids = pq.read_table(tmp_path / "out" / "part-00000.parquet")["frame_id"].to_pylist()
    assert ids == [f"frame_{number:03d}" for number in (6, 0, 1, 2, 3, 4, 5)]
    monkeypatch.setattr("pipeline.formats.parquet.json", None)
    assert _counts(_run(config)) == (0, 0, 0, 7)


@pytest.mark.parametrize(
    ("form", "name"), [("coco", "refined.json"), ("coco", "images.json"), ("parquet", "part-00003.parquet")]
)
def test_a_file_of_the_final_output_that_was_deleted_is_made_again(
    tmp_path, dump, checkpoint_path, refined, monkeypatch, form, name
):
    monkeypatch.setattr("pipeline.formats.parquet.FRAMES_PER_FILE", 2)
    config = _config(dump, "cityscapes", tmp_path / "out", checkpoint_path, output_format=form)
    _run(config)
    before = tree(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    _run(config)
    assert tree(tmp_path / "out") == before


def test_parts_that_no_frame_is_in_any_more_are_swept(tmp_path, dump, checkpoint_path, refined):
    config = _config(dump, "parquet", tmp_path / "out", checkpoint_path, frames_per_block=1)
    _run(config)
    folder = tmp_path / "out" / "_ledger" / "parts"
    (folder / "0123456789abcdef.parquet").write_bytes(b"of a killed run")
    _entries(dump, lambda number, count: 1 if number == 0 else count)
    _run(config)
    assert len(list(folder.iterdir())) == 7


def test_the_latest_run_is_described_beside_the_ledger(tmp_path, dump, checkpoint_path, refined):
    _run(_config(dump, "parquet", tmp_path / "out", checkpoint_path, limit=2))
    (record,) = (tmp_path / "out" / "_ledger" / "runs").iterdir()
    facts = json.loads(record.read_text())
    assert (facts["frames_in_dump"], facts["frames"], facts["new"], facts["todo"]) == (7, 2, 2, 2)
    assert facts["started"] > 1e9
    assert not (tmp_path / "out" / "_ledger" / "lease.json").exists()


def test_a_second_run_on_an_output_stops_with_one_line(tmp_path, dump, checkpoint_path, refined, monkeypatch):
    config = _config(dump, "coco", tmp_path / "out", checkpoint_path)
    original, refused = flow.run_local, []

    def meanwhile(plan):
        with pytest.raises(InputError) as error:
            _run(config)
        refused.append(str(error.value))
        yield from original(plan)

    monkeypatch.setattr(flow, "run_local", meanwhile)
    assert _run(config).frames == 6
    assert "is writing this output (last heartbeat" in refused[0]


def test_a_run_with_nothing_to_do_loads_neither_torch_nor_ray(tmp_path, dump, checkpoint_path, refined):
    config = _config(dump, "cityscapes", tmp_path / "out", checkpoint_path)
    _run(config)
    code = (
        "import sys; from jobs.refine import main; sys.argv[1:] = sys.argv[1:]; status = main();"
        "assert not {'torch', 'ray'} & set(sys.modules); sys.exit(status)"
    )
    flags = [f"--{name}={getattr(config, name)}" for name in ("predictions", "images", "output", "checkpoint")]
    command = [sys.executable, "-c", code, *flags, "--guard.no-enabled"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert "0 new, 0 changed, 0 removed, 7 unchanged" in done.stdout


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("why", ["images away", "predictions away", "restart"])
def test_files_that_a_run_took_back_before_it_ended_are_made_again(
    tmp_path, dump, checkpoint_path, refined, monkeypatch, why, end
):
    config = _config(dump, "cityscapes", tmp_path / "out", checkpoint_path)
    _run(config)
    whole = tree(tmp_path / "out")
    # What a mount or a copy shows for a moment.
    folder, away = dump.root / ("images" if why == "images away" else "cityscapes"), dump.root / "away"
    if why == "restart":
        again = replace(config, restart=True, limit=2)
    else:
        shutil.copytree(folder, away)
        for path in [*folder.glob("frame_00[1-5]*")]:
            path.unlink()
        again = replace(config, prune=True)
    removed, remove = [], storage.remove

    def ends_on_the_way(url):
        remove(url)
        removed.append(url)
        if len(removed) == 4:
            raise end("in between")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", ends_on_the_way)
        with pytest.raises(end):
            _run(again)
    if why != "restart":
        shutil.rmtree(folder)
        shutil.copytree(away, folder)
    _run(config)
    assert tree(tmp_path / "out") == whole


def _with_ledger(output):
    """Every file but the records of runs, which have names of their own."""
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.parent.name != "runs"}


def test_a_run_whose_output_another_has_taken_over_writes_nothing_more(
    tmp_path, dump, checkpoint_path, refined, monkeypatch
):
    config = _config(dump, "coco", tmp_path / "out", checkpoint_path, frames_per_block=2)
    lease = tmp_path / "out" / "_ledger" / "lease.json"
    original, seen = flow.run_local, []

    def taken_over(plan):
        yield from original(plan)
        # By a run on a machine of the same clock, before a heartbeat of this one could tell.
        lease.write_text(json.dumps(json.loads(lease.read_text()) | {"run_id": "another"}))
        seen.append(_with_ledger(tmp_path / "out"))

    monkeypatch.setattr(flow, "run_local", taken_over)
    with pytest.raises(InputError, match="run another on host"):
        _run(config)
    assert _with_ledger(tmp_path / "out") == seen[0]
    assert not (tmp_path / "out" / "refined.json").exists()
    assert json.loads(lease.read_text())["run_id"] == "another"


def test_all_parts_that_are_lost_are_made_again_by_the_next_run(tmp_path, dump, checkpoint_path, refined):
    config = _config(dump, "parquet", tmp_path / "out", checkpoint_path, frames_per_block=1)
    _run(config)
    whole = (tmp_path / "out" / "part-00000.parquet").read_bytes()
    parts = sorted((tmp_path / "out" / "_ledger" / "parts").iterdir())
    parts[0].write_bytes(b"torn")
    for part in parts[2:]:
        part.unlink()
    (tmp_path / "out" / "part-00000.parquet").unlink()
    with pytest.raises(InputError, match=f"refines the {len(parts) - 1} frames of {len(parts) - 1} such parts again"):
        _run(config)
    assert _run(config).frames == len(parts) - 1
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == whole


def test_a_ledger_that_cannot_be_read_keeps_its_list_of_frames_set_aside(tmp_path, dump, checkpoint_path, refined):
    config = _config(dump, "coco", tmp_path / "out", checkpoint_path)
    (dump.root / "images" / "frame_001.png").write_bytes(b"")
    _run(config)
    aside = (tmp_path / "out" / "_ledger" / "quarantine.csv").read_bytes()
    (tmp_path / "out" / "_ledger" / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json: expected json as an earlier run wrote it"):
        _run(config)
    assert (tmp_path / "out" / "_ledger" / "quarantine.csv").read_bytes() == aside


def test_a_final_output_that_was_about_to_become_empty_does_so_in_the_next_run(
    tmp_path, dump, checkpoint_path, refined, monkeypatch
):
    config = _config(dump, "coco", tmp_path / "out", checkpoint_path)
    _run(config)
    for image in (dump.root / "images").iterdir():
        image.unlink()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.formats.coco.CocoWriter.finish", dies)
        with pytest.raises(KeyboardInterrupt):
            _run(config)
    _run(config)
    assert json.loads((tmp_path / "out" / "refined.json").read_text()) == []


def test_a_restart_makes_a_damaged_final_output_anew(tmp_path, dump, checkpoint_path, refined):
    config = _config(dump, "coco", tmp_path / "out", checkpoint_path)
    _run(config)
    whole = tree(tmp_path / "out")
    (tmp_path / "out" / "refined.json").write_text("[")
    _run(replace(config, restart=True))
    assert tree(tmp_path / "out") == whole


def test_parts_behind_a_store_that_fails_are_not_taken_for_lost(tmp_path, dump, checkpoint_path, refined, monkeypatch):
    config = _config(dump, "parquet", tmp_path / "out", checkpoint_path)
    _run(config)
    whole = tree(tmp_path / "out")
    (tmp_path / "out" / "part-00000.parquet").unlink()
    original = storage.read_if_there

    def fails(url, *span):
        if "/parts/" in url:
            raise InputError(f"{url}: cannot be read (the store is away)")
        return original(url, *span)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_if_there", fails)
        with pytest.raises(InputError, match=r"parts/\w+\.parquet: cannot be read \(the store is away\)$"):
            _run(config)
    assert _counts(_run(config)) == (0, 0, 0, 7)
    assert tree(tmp_path / "out") == whole

import json
import sys

import pytest

from jobs import refine as job
from pipeline import flow
from pipeline.records import InputError
from pipeline.run import run as refine_dump
from tests.dumps import make_dump
from tests.poison import Blur


@pytest.fixture
def config(tmp_path, checkpoint_path, monkeypatch):
    """Of six frames, one without a readable image, in this process."""
    monkeypatch.setattr(flow, "load_refiner", lambda *_: Blur())
    dump = make_dump(tmp_path / "dump", frames=6)
    (dump.root / "images" / "frame_003.png").write_bytes(b"no")

    def of(**settings):
        return dump.config("cityscapes", tmp_path / "out", checkpoint_path, local=True, **settings)

    return of


def _records(tmp_path):
    paths = sorted((tmp_path / "out" / "_ledger" / "runs").iterdir())
    return [json.loads(path.read_text()) for path in paths]


def _stopped_after_one_block(monkeypatch, error):
    original = flow.run_local

    def stopped(plan):
        yield next(original(plan))
        raise error

    monkeypatch.setattr(flow, "run_local", stopped)


def test_the_record_has_what_the_summary_has(config, tmp_path):
    summary = refine_dump(config(), log=lambda _: None)
    (record,) = _records(tmp_path)
    assert (record["outcome"], record["reason"]) == ("finished", "")
    assert 0 <= record["ended"] - record["started"] <= summary.wall_s + 1
    assert (record["frames_refined"], record["frames_set_aside"]) == (summary.frames, 1) == (5, 1)
    assert (record["instances"], record["instances_refined"]) == (summary.instances, summary.refined)
    assert (record["patches"], record["seconds"]) == (summary.patches, summary.seconds)
    assert {*record["seconds"]} == {"extract", "wait", "refine", "assemble", "commit"}
    assert record["arithmetic"] == [Blur.arithmetic]
    assert record["place"] == {"placement": "local"}
    assert record["settings"]["patch_size"] == 64
    assert {"python", "ray", "torch"} <= {*record["versions"]}


def test_bytes_are_those_of_the_files_read_and_written(config, tmp_path):
    refine_dump(config(), log=lambda _: None)
    (record,) = _records(tmp_path)
    images = sum(path.stat().st_size for path in (tmp_path / "dump" / "images").iterdir())
    # The list of a frame's instances is read more than once.
    masks = sum(path.stat().st_size for path in (tmp_path / "dump" / "cityscapes").iterdir() if "_003" not in path.stem)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.is_file())
    assert images + masks <= record["bytes_read"] < 1.5 * (images + masks)
    assert record["bytes_written"] == written


def test_the_share_of_the_batches_that_patches_fill_is_kept(config, tmp_path):
    summary = refine_dump(config(), log=lambda _: None)
    (record,) = _records(tmp_path)
    places = summary.patches / record["batch_fill"]
    assert places == pytest.approx(round(places))
    assert places % Blur.batch_size == pytest.approx(0)
    assert 0.5 < record["batch_fill"] <= 1


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", ""),
        (SystemExit(143), "interrupted", ""),
        (OSError(28, "No space left on device"), "failed", "[Errno 28] No space left on device"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_the_record_tells_what_ended_a_run_early(config, tmp_path, monkeypatch, error, outcome, reason):
    _stopped_after_one_block(monkeypatch, error)
    with pytest.raises(type(error)):
        refine_dump(config(), log=lambda _: None)
    (record,) = _records(tmp_path)
    assert (record["outcome"], record["reason"]) == (outcome, reason)
    assert (record["frames_refined"], record["todo"]) == (2, 6)


def test_a_run_that_goes_on_is_recorded_as_running(config, tmp_path, monkeypatch):
    original, seen = flow.run_local, []

    def looked_at(plan):
        seen.extend(_records(tmp_path))
        yield from original(plan)

    monkeypatch.setattr(flow, "run_local", looked_at)
    refine_dump(config(), log=lambda _: None)
    assert [record["outcome"] for record in seen] == ["running"]
    assert "frames_refined" not in seen[0]


def test_every_run_on_an_output_has_its_own_record(config, tmp_path):
    for _ in range(2):
        refine_dump(config(), log=lambda _: None)
    first, second = _records(tmp_path)
    assert (first["todo"], second["todo"], second["unchanged"]) == (6, 1, 5)
    assert first["run_id"] != second["run_id"]


def test_a_run_that_is_refused_leaves_no_record(config, tmp_path):
    refine_dump(config(), log=lambda _: None)
    with pytest.raises(InputError, match="made with"):
        refine_dump(config(nms_threshold=0.1), log=lambda _: None)
    assert len(_records(tmp_path)) == 1


def test_the_log_of_a_run_in_json_is_one_object_a_line_from_start_to_end(config, tmp_path):
    lines = []
    refine_dump(config(log_format="json"), log=lines.append)
    told = [json.loads(line) for line in lines]
    assert [line["event"] for line in told] == ["start", "set_aside", "progress", "finished"]
    (record,) = _records(tmp_path)
    assert {line["run_id"] for line in told} == {record["run_id"]}
    assert told[1]["frame_id"] == "frame_003"
    assert (told[2]["frames"], told[2]["of"], told[2]["set_aside"]) == (6, 6, 1)
    assert (told[3]["frames"], told[3]["quarantined"]) == (5, 1)


def test_a_run_that_never_began_says_so_in_json(config, tmp_path):
    lines = []
    (tmp_path / "dump" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError):
        refine_dump(config(log_format="json"), log=lines.append)
    (line,) = map(json.loads, lines)
    assert (line["event"], line["run_id"]) == ("failed", "")
    assert "images: expected a folder" in line["reason"]


@pytest.mark.parametrize("sound", [True, False])
def test_the_job_prints_nothing_but_json_where_that_is_asked_for(config, monkeypatch, capsys, sound):
    made = config()
    names = ("predictions", "images", "output", "checkpoint")
    flags = [f"--{name}={getattr(made, name) if sound or name != 'images' else 'nowhere'}" for name in names]
    monkeypatch.setattr(sys, "argv", ["jobs/refine.py", *flags, "--local", "--log-format=json"])
    assert job.main() == (0 if sound else 1)
    out, error = capsys.readouterr()
    assert error == ""
    assert json.loads(out.splitlines()[-1])["event"] == ("finished" if sound else "failed")
    assert all(json.loads(line) for line in out.splitlines())

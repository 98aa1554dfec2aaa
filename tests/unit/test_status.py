import json
import sys

import pytest

from jobs import status as job
from pipeline import flow, storage
from pipeline.ledger import Ledger
from pipeline.records import InputError
from pipeline.run import run as refine_dump
from pipeline.stages import Receipt
from pipeline.status import read_status
from tests.dumps import make_dump

NOW = 1_800_000_000.0


def _receipt(frame_id, came=NOW, error="", instances=2, refined=1, reasons=None):
    seconds = {} if error else {"extract": 0.5, "refine": 1.5}
    return Receipt(frame_id, error, "", instances, refined, 10, seconds, came, reasons or {})


def _segment(output, receipts, written=NOW):
    """Receipts as a run has written them at the Unix time `written`."""
    ledger = Ledger(str(output))
    if not storage.exists(f"{ledger.root}/run.json"):
        storage.put(f"{ledger.root}/run.json", b"{}")
    names = {*storage.find(ledger.root, (".jsonl",))}
    ledger.record(receipts)
    ledger.flush()
    (new,) = {*storage.find(ledger.root, (".jsonl",))} - names
    storage.put(f"{ledger.root}/{int(written * 1e9):020d}.jsonl", storage.read(f"{ledger.root}/{new}"))
    storage.remove(f"{ledger.root}/{new}")


def test_frames_and_instances_are_counted_over_all_segments(tmp_path):
    _segment(tmp_path, [_receipt("a", reasons={"too_small": 1}), _receipt("b", reasons={"uncertain": 1})], NOW - 9)
    _segment(tmp_path, [_receipt("c", error="broken", came=0, instances=0, refined=0)], NOW - 5)
    status = read_status(str(tmp_path), now=NOW)
    assert (status.done, status.set_aside, status.left) == (2, 1, None)
    assert (status.instances, status.refined, status.patches) == (4, 2, 30)
    assert status.reasons == {"too_small": 1, "uncertain": 1}
    assert status.seconds_per_frame == {"extract": 0.5, "refine": 1.5}
    assert "4, 2 refined, 1 kept (1 too_small), 1 rejected (1 uncertain)" in str(status)


def test_a_frame_refined_after_it_was_set_aside_counts_once_as_done(tmp_path):
    _segment(tmp_path, [_receipt("a", error="broken", instances=0, refined=0), _receipt("b")], NOW - 9)
    _segment(tmp_path, [_receipt("a")], NOW - 5)
    status = read_status(str(tmp_path), now=NOW)
    assert (status.done, status.set_aside, status.instances) == (2, 0, 4)
    assert status.last_errors == []


def test_the_errors_that_came_last_are_shown_first(tmp_path):
    _segment(tmp_path, [_receipt(str(number), error=f"fault {number}") for number in range(8)])
    _segment(tmp_path, [_receipt("2", error="fault 2 again")], NOW + 1)
    status = read_status(str(tmp_path), now=NOW + 2)
    assert [frame_id for frame_id, _ in status.last_errors] == ["2", "7", "6", "5", "4"]
    assert status.last_errors[0] == ("2", "fault 2 again")
    assert "... 3 more" in str(status)


def test_rates_leave_out_the_first_block_and_the_time_between_two_runs(tmp_path):
    first = [_receipt(f"a{i}", NOW - 7200 + (i // 2) * 10) for i in range(10)]
    second = [_receipt(f"b{i}", NOW - 40 + (i // 2) * 5 + 1e-5 * (i % 2)) for i in range(10)]
    _segment(tmp_path, [*first, *second])
    status = read_status(str(tmp_path), now=NOW)
    assert status.recent_frames_per_s == pytest.approx(8 / 20, rel=1e-3)
    assert status.frames_per_s == pytest.approx(16 / 60, rel=1e-3)


def test_a_single_block_has_no_rate(tmp_path):
    _segment(tmp_path, [_receipt(str(i), NOW + 1e-5 * i) for i in range(8)])
    status = read_status(str(tmp_path), now=NOW)
    assert status.frames_per_s is status.recent_frames_per_s is None
    assert "none in the last 5 min, none overall" in str(status)


def test_a_run_seems_alive_while_its_newest_segment_is_young(tmp_path):
    _segment(tmp_path, [_receipt("a")], NOW)
    assert read_status(str(tmp_path), now=NOW + 60).alive
    later = read_status(str(tmp_path), now=NOW + 3 * 3600)
    assert not later.alive
    assert later.last_sign_s == pytest.approx(3 * 3600)
    assert "no run seems to be going on, last sign 3.0 h ago" in str(later)


def test_a_lease_that_is_renewed_is_a_sign_of_life(tmp_path):
    _segment(tmp_path, [_receipt("a")], NOW)
    (tmp_path / "_ledger" / "lease.json").write_text(json.dumps({"heartbeat": NOW + 3590}))
    status = read_status(str(tmp_path), now=NOW + 3600)
    assert status.alive
    assert status.last_sign_s == pytest.approx(10)


def test_a_run_without_a_frame_yet_says_so(tmp_path):
    storage.put(f"{tmp_path}/_ledger/run.json", b"{}")
    status = read_status(str(tmp_path), now=NOW)
    assert (status.done, status.last_sign_s, status.alive) == (0, None, False)
    assert "no frame has come yet" in str(status)


def test_what_is_left_and_for_how_long_is_known_once_the_dump_is_listed(tmp_path):
    dump = make_dump(tmp_path / "dump", frames=6)
    run = {
        "predictions": f"{dump.root}/cityscapes",
        "images": f"{dump.root}/images",
        "format": "cityscapes",
        "image_list": None,
        "image_pattern": None,
    }
    storage.put(f"{tmp_path}/out/_ledger/run.json", json.dumps(run).encode())
    _segment(
        tmp_path / "out", [_receipt("frame_000", NOW - 10), _receipt("frame_001", NOW), _receipt("gone", error="x")]
    )
    status = read_status(str(tmp_path / "out"), list_dump=True, now=NOW)
    assert (status.done, status.set_aside, status.left) == (2, 0, 4)
    assert status.eta_s == pytest.approx(4 / status.recent_frames_per_s)
    assert read_status(str(tmp_path / "out"), list_dump=True, now=NOW + 999).eta_s is None


def test_an_interrupted_and_a_finished_run_are_told_as_they_are(tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=4)
    (dump.root / "images" / "frame_000.png").unlink()
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, local=True)
    original = flow.run_local

    def interrupted(plan):
        yield next(original(plan))
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "run_local", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refine_dump(config, log=lambda _: None)
    status = read_status(str(tmp_path / "out"), list_dump=True)
    assert (status.done, status.set_aside, status.left, status.alive) == (2, 1, 1, True)
    assert "frame_000.png" in status.last_errors[0][1]
    monkeypatch.setattr(flow, "run_local", original)
    summary = refine_dump(config, log=lambda _: None)
    status = read_status(str(tmp_path / "out"), list_dump=True)
    assert (status.done, status.set_aside, status.left) == (summary.frames + summary.done_before, 1, 0)
    assert set(status.seconds_per_frame) == {"extract", "refine", "assemble", "commit"}
    assert str(status).startswith("state        all frames are done or set aside\n")


def test_an_output_in_a_store_is_read_as_a_folder_is():
    output = "memory://status/out"
    _segment(output, [_receipt("a"), _receipt("b", error="broken")], NOW - 3)
    status = read_status(output, now=NOW)
    assert (status.done, status.set_aside, status.last_sign_s) == (1, 1, pytest.approx(3))


@pytest.mark.parametrize("name", ["run.json", "lease.json"])
def test_a_damaged_file_of_the_ledger_is_named(tmp_path, name):
    _segment(tmp_path, [_receipt("a")])
    (tmp_path / "_ledger" / name).write_text("[")
    with pytest.raises(InputError, match=rf"_ledger/{name}: expected json as a run writes it"):
        read_status(str(tmp_path), list_dump=True, now=NOW)


def test_listing_the_dump_of_another_job_is_refused(tmp_path):
    _segment(tmp_path, [_receipt("a")])
    with pytest.raises(InputError, match=r"run\.json: expected the settings of a refinement, 'predictions' is missing"):
        read_status(str(tmp_path), list_dump=True, now=NOW)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the job in this process: exit status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["jobs/status.py", *map(str, arguments)])
        return job.main(), *capsys.readouterr()

    return call


def test_the_job_prints_lines_or_json(run, tmp_path):
    _segment(tmp_path, [_receipt("a")])
    status, out, error = run(tmp_path)
    assert (status, error) == (0, "")
    assert "frames       1 done, 0 set aside\n" in out
    status, out, _ = run(tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["done"] == 1


def test_a_folder_without_a_ledger_is_one_error_line(run, tmp_path):
    status, out, error = run(tmp_path)
    assert (status, out) == (1, "")
    assert error == f"error: {tmp_path}: expected the output of a run, there is no _ledger/run.json\n"


def test_a_damaged_segment_is_one_error_line_that_names_it(run, tmp_path):
    _segment(tmp_path, [_receipt("a")])
    (segment,) = (tmp_path / "_ledger").glob("*.jsonl")
    segment.write_text("{")
    status, out, error = run(tmp_path)
    assert (status, out) == (1, "")
    assert error.startswith(f"error: {segment}: ")
    assert error.count("\n") == 1

import json
import sys

import pytest

from jobs import status as job
from pipeline import flow, storage
from pipeline.ledger import Ledger
from pipeline.records import InputError
from pipeline.run import run as refine_dump
from pipeline.status import StatusReader
from pipeline.work import Receipt
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
    first, second = {"far_pieces": 1, "iou": 1}, {"uncertain": 2}
    _segment(tmp_path, [_receipt("a", reasons=first), _receipt("b", reasons=second)], NOW - 9)
    _segment(tmp_path, [_receipt("c", error="broken", came=0, instances=0, refined=0)], NOW - 5)
    status = StatusReader(str(tmp_path)).read(NOW)
    assert (status.done, status.set_aside, status.left) == (2, 1, None)
    assert (status.instances, status.refined, status.patches) == (4, 2, 30)
    assert status.reasons == {"far_pieces": 1, "iou": 1, "uncertain": 2}
    assert status.seconds_per_frame == {"extract": 0.5, "refine": 1.5}
    assert "4, 2 refined (1 far_pieces), 0 kept, 3 rejected (2 uncertain, 1 iou)" in str(status)


def test_a_frame_refined_after_it_was_set_aside_counts_once_as_done(tmp_path):
    _segment(tmp_path, [_receipt("a", error="broken", instances=0, refined=0), _receipt("b")], NOW - 9)
    _segment(tmp_path, [_receipt("a")], NOW - 5)
    status = StatusReader(str(tmp_path)).read(NOW)
    assert (status.done, status.set_aside, status.instances) == (2, 0, 4)
    assert status.last_errors == []


def test_the_errors_that_came_last_are_shown_first(tmp_path):
    _segment(tmp_path, [_receipt(str(number), error=f"fault {number}") for number in range(8)])
    _segment(tmp_path, [_receipt("2", error="fault 2 again")], NOW + 1)
    status = StatusReader(str(tmp_path)).read(NOW + 2)
    assert [frame_id for frame_id, _ in status.last_errors] == ["2", "7", "6", "5", "4"]
    assert status.last_errors[0] == ("2", "fault 2 again")
    assert "... 3 more" in str(status)


def test_rates_leave_out_the_first_block_and_the_time_between_two_runs(tmp_path):
    first = [_receipt(f"a{i}", NOW - 7200 + (i // 2) * 10) for i in range(10)]
    second = [_receipt(f"b{i}", NOW - 40 + (i // 2) * 5 + 1e-5 * (i % 2)) for i in range(10)]
    _segment(tmp_path, [*first, *second])
    status = StatusReader(str(tmp_path)).read(NOW)
    assert status.recent_frames_per_s == pytest.approx(8 / 20, rel=1e-3)
    assert status.frames_per_s == pytest.approx(16 / 60, rel=1e-3)


def test_a_single_block_has_no_rate(tmp_path):
    _segment(tmp_path, [_receipt(str(i), NOW + 1e-5 * i) for i in range(8)])
    status = StatusReader(str(tmp_path)).read(NOW)
    assert status.frames_per_s is status.recent_frames_per_s is None
    assert "none in the last 5 min, none overall" in str(status)


def test_a_run_seems_alive_while_its_newest_segment_is_young(tmp_path):
    _segment(tmp_path, [_receipt("a")], NOW)
    assert StatusReader(str(tmp_path)).read(NOW + 60).alive
    later = StatusReader(str(tmp_path)).read(NOW + 3 * 3600)
    assert not later.alive
    assert later.last_sign_s == pytest.approx(3 * 3600)
    assert "no run seems to be going on, last sign 3.0 h ago" in str(later)


def test_a_lease_that_is_renewed_is_a_sign_of_life(tmp_path):
    _segment(tmp_path, [_receipt("a")], NOW)
    (tmp_path / "_ledger" / "lease.json").write_text(json.dumps({"heartbeat": NOW + 3590}))
    status = StatusReader(str(tmp_path)).read(NOW + 3600)
    assert status.alive
    assert status.last_sign_s == pytest.approx(10)


def test_a_run_without_a_frame_yet_says_so(tmp_path):
    storage.put(f"{tmp_path}/_ledger/run.json", b"{}")
    status = StatusReader(str(tmp_path)).read(NOW)
    assert (status.done, status.last_sign_s, status.alive) == (0, None, False)
    assert "no frame has come yet" in str(status)


def _record(output, **facts):
    """The record of a run of 6 frames that began 60 s ago, as the run has written it."""
    known = {"run_id": "abc", "started": NOW - 60, "todo": 6, "outcome": "running", **facts}
    storage.put(f"{output}/_ledger/runs/{known['started']:.0f}-abc.json", json.dumps(known).encode())


def test_what_is_left_and_for_how_long_is_known_by_the_record_of_the_run(tmp_path):
    _segment(tmp_path, [_receipt("old", NOW - 90), _receipt("again", error="broken")], NOW - 90)
    _record(tmp_path)
    _segment(tmp_path, [_receipt("a", NOW - 10), _receipt("again", NOW), _receipt("b", error="broken")])
    status = StatusReader(str(tmp_path)).read(NOW)
    assert (status.done, status.set_aside, status.left, status.outcome) == (3, 1, 3, "running")
    assert status.eta_s == pytest.approx(3 / status.recent_frames_per_s)
    assert str(status).startswith(
        "state        run abc running, last sign 0 s ago\nframes       3 done, 1 set aside, 3 left"
    )
    assert "running  3 done  1 set aside  3 left" in status.line


def test_a_run_without_a_sign_for_long_has_died(tmp_path):
    _record(tmp_path)
    _segment(tmp_path, [_receipt("a")])
    status = StatusReader(str(tmp_path)).read(NOW + 999)
    assert (status.outcome, status.alive, status.left, status.eta_s) == ("died", False, 5, None)


def test_a_run_that_failed_says_why(tmp_path):
    _segment(tmp_path, [_receipt("a")])
    _record(tmp_path, outcome="failed", reason="disk full", ended=NOW + 50)
    status = StatusReader(str(tmp_path)).read(NOW + 60)
    assert (status.outcome, status.reason, status.alive, status.last_sign_s) == ("failed", "disk full", False, 10)
    assert "run abc failed, last sign 10 s ago: disk full" in str(status)


def test_of_several_runs_the_latest_is_told(tmp_path):
    _segment(tmp_path, [_receipt("a")])
    _record(tmp_path, started=NOW - 500, outcome="interrupted", todo=50)
    _record(tmp_path, outcome="finished", todo=1)
    status = StatusReader(str(tmp_path)).read(NOW)
    assert (status.outcome, status.left) == ("finished", 0)


def test_a_reader_reads_each_segment_once(tmp_path, monkeypatch):
    _record(tmp_path)
    _segment(tmp_path, [_receipt("a"), _receipt("b", error="broken")], NOW - 9)
    reader, read, original = StatusReader(str(tmp_path)), [], storage.read
    assert reader.read(NOW).left == 4
    monkeypatch.setattr(storage, "read", lambda url, *range: read.append(url) or original(url, *range))
    _segment(tmp_path, [_receipt("b"), _receipt("c")], NOW - 3)
    read.clear()
    status = reader.read(NOW)
    assert len([url for url in read if url.endswith(".jsonl")]) == 1
    assert status == StatusReader(str(tmp_path)).read(NOW)
    assert (status.done, status.set_aside, status.patches) == (3, 0, 30)


def test_a_reader_forgets_frames_that_another_run_has_withdrawn(tmp_path):
    _record(tmp_path)
    _segment(tmp_path, [_receipt("a"), _receipt("b")], NOW - 9)
    reader = StatusReader(str(tmp_path))
    assert reader.read(NOW).done == 2
    name = f"{int((NOW - 5) * 1e9):020d}.withdrawn.json"
    storage.put(f"{tmp_path}/_ledger/{name}", json.dumps({"changed": ["a"], "removed": []}).encode())
    assert reader.read(NOW).done == 1


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
    status = StatusReader(str(tmp_path / "out")).read()
    assert (status.done, status.set_aside, status.left, status.outcome) == (2, 1, 1, "interrupted")
    assert "frame_000.png" in status.last_errors[0][1]
    monkeypatch.setattr(flow, "run_local", original)
    summary = refine_dump(config, log=lambda _: None)
    status = StatusReader(str(tmp_path / "out")).read()
    assert (status.done, status.set_aside, status.left) == (summary.frames + summary.done_before, 1, 0)
    assert set(status.seconds_per_frame) == {"extract", "refine", "assemble", "commit"}
    assert status.outcome == "finished"


def test_an_output_in_a_store_is_read_as_a_folder_is():
    output = "memory://status/out"
    _segment(output, [_receipt("a"), _receipt("b", error="broken")], NOW - 3)
    status = StatusReader(output).read(NOW)
    assert (status.done, status.set_aside, status.last_sign_s) == (1, 1, pytest.approx(3))


@pytest.mark.parametrize("name", ["lease.json", "runs/1.json"])
def test_a_damaged_file_of_the_ledger_is_named(tmp_path, name):
    _segment(tmp_path, [_receipt("a")])
    storage.put(f"{tmp_path}/_ledger/{name}", b"[")
    with pytest.raises(InputError, match=rf"_ledger/{name}: expected json as a run writes it"):
        StatusReader(str(tmp_path)).read(NOW)


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


def test_a_line_that_a_power_loss_has_torn_is_a_frame_less(run, tmp_path):
    _segment(tmp_path, [_receipt("a"), _receipt("b")])
    (segment,) = (tmp_path / "_ledger").glob("*.jsonl")
    segment.write_text(segment.read_text()[:-9])
    status, out, error = run(tmp_path)
    assert (status, error) == (0, "")
    assert "frames       1 done, 0 set aside\n" in out


def _times_pass(monkeypatch, *events):
    """What happens while the job waits for its next look, one after the other."""
    coming = iter(events)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: next(coming)())


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """A run of two frames that does one a look, and then ends as told."""
    monkeypatch.setattr("pipeline.status.time.time", lambda: NOW)

    def end(outcome):
        _record(tmp_path, todo=2)
        _times_pass(
            monkeypatch,
            lambda: _segment(tmp_path, [_receipt("a", NOW - 10)], NOW - 10),
            lambda: _segment(tmp_path, [_receipt("b", NOW)], NOW),
            lambda: _record(tmp_path, todo=2, outcome=outcome),
        )

    storage.put(f"{tmp_path}/_ledger/run.json", b"{}")
    return end


def test_watching_ends_with_the_run(run, tmp_path, going_on):
    going_on("finished")
    status, out, _ = run(tmp_path, "--watch")
    lines = out.splitlines()
    assert status == 0
    assert [line.split("  ", 1)[1] for line in lines[:3]] == [
        "running  0 done  0 set aside  2 left  none frames/s",
        "running  1 done  0 set aside  1 left  none frames/s",
        "running  2 done  0 set aside  0 left  0.10 frames/s",
    ]
    assert lines[3] == "state        run abc finished, last sign 0 s ago"


def test_watching_a_run_that_fails_is_told_by_the_exit_status(run, tmp_path, going_on):
    going_on("failed")
    assert run(tmp_path, "--watch")[0] == 1


def test_programs_watch_one_object_a_line(run, tmp_path, going_on):
    going_on("finished")
    _, out, _ = run(tmp_path, "--watch", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert [(look["outcome"], look["left"]) for look in told] == [
        ("running", 2),
        ("running", 1),
        ("running", 0),
        ("finished", 0),
    ]


def test_on_a_terminal_every_look_is_painted_over_the_one_before(run, tmp_path, going_on, monkeypatch):
    going_on("finished")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = run(tmp_path, "--watch")
    looks = out.split("\033[")
    # Back to the first of the lines painted before, then away with them.
    assert [look for look in looks if look.endswith("F")] == ["5F", "6F", "6F"]
    assert out.count("state        run abc running") == 3

import json
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.ledger import Ledger, read_receipts
from pipeline.records import InputError
from pipeline.status import StatusReader
from pipeline.work import Receipt


def _receipt(frame_id, error="", part=""):
    return Receipt(frame_id, error, part, 1, 1, 5, {}, 0.0)


def _reopened(output, fingerprint=None):
    ledger = Ledger(str(output))
    ledger.open(fingerprint or {"weights": "abc"})
    return ledger


@pytest.fixture
def ledger(tmp_path):
    return _reopened(tmp_path)


def test_what_was_recorded_is_known_to_the_next_run(tmp_path, ledger):
    ledger.record([_receipt("a", part="p1"), _receipt("b", error="broken")])
    ledger.close()
    again = _reopened(tmp_path)
    assert again.parts == {"a": "p1"}
    assert again.aside == {"b": "broken"}


def test_a_frame_set_aside_and_refined_later_leaves_the_quarantine_table(tmp_path, ledger):
    ledger.record([_receipt("b", error='said "no", twice')])
    ledger.close()
    table = Path(ledger.root, "quarantine.csv")
    assert table.read_text() == 'frame_id,error\nb,"said ""no"", twice"\n'
    again = _reopened(tmp_path)
    again.record([_receipt("b")])
    again.close()
    assert not table.exists()
    assert _reopened(tmp_path).parts == {"b": ""}


def test_receipts_reach_storage_in_segments_that_are_never_rewritten(ledger):
    ledger.record([_receipt("a")])
    assert not list(Path(ledger.root).glob("*.jsonl"))
    ledger.flush()
    (first,) = Path(ledger.root).glob("*.jsonl")
    content = first.read_text()
    ledger.record([_receipt("b")])
    ledger.flush()
    assert first.read_text() == content
    assert len(list(Path(ledger.root).glob("*.jsonl"))) == 2
    assert json.loads(content)["patches"] == 5


def test_receipts_reach_storage_also_while_a_run_waits_for_more(tmp_path, ledger, monkeypatch):
    monkeypatch.setattr("pipeline.ledger.FLUSH_SECONDS", 3600)
    ledger.record([_receipt("a"), _receipt("b")])
    monkeypatch.setattr("pipeline.ledger.FLUSH_SECONDS", 0.01)
    with ledger.flushed():
        end = time.monotonic() + 30
        while len(list(read_receipts(ledger.output))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert [entry["frame_id"] for entry in read_receipts(ledger.output)] == ["a", "b"]


def test_a_run_that_lost_its_output_writes_no_receipt_while_it_waits(ledger, monkeypatch):
    monkeypatch.setattr("pipeline.ledger.FLUSH_SECONDS", 3600)
    checked = threading.Event()

    def lost():
        checked.set()
        raise InputError("another run has taken the output over")

    ledger.confirm = lost
    ledger.record([_receipt("a")])
    monkeypatch.setattr("pipeline.ledger.FLUSH_SECONDS", 0.01)
    with ledger.flushed():
        assert checked.wait(30)
    with pytest.raises(InputError, match="taken the output over"):
        ledger.close()
    assert not list(read_receipts(ledger.output))


def test_a_store_that_fails_while_a_run_waits_fails_the_run_itself(ledger, monkeypatch):
    def full(url, data):
        raise OSError("no space left")

    monkeypatch.setattr("pipeline.ledger.FLUSH_SECONDS", 3600)
    ledger.record([_receipt("a")])
    monkeypatch.setattr("pipeline.ledger.FLUSH_SECONDS", 1e-6)
    monkeypatch.setattr("pipeline.storage.put", full)
    with ledger.flushed(), pytest.raises(OSError, match="no space left"):
        ledger.record([_receipt("b")])
    monkeypatch.undo()
    ledger.flush()
    assert [entry["frame_id"] for entry in read_receipts(ledger.output)] == ["a", "b"]


def test_another_fingerprint_names_the_first_difference(tmp_path, ledger):
    ledger.record([_receipt("a")])
    ledger.close()
    with pytest.raises(InputError, match="made with weights = 'abc', not 'xyz'"):
        _reopened(tmp_path, {"weights": "xyz"})


def test_frames_taken_back_are_not_finished_until_they_are_refined_again(tmp_path, ledger):
    ledger.record([_receipt("a"), _receipt("b"), _receipt("c")])
    ledger.flush()
    ledger.withdraw(["a", "b"], ["c"])
    ledger.record([_receipt("b", part="anew")])
    ledger.close()
    again = _reopened(tmp_path)
    assert again.parts == {"b": "anew"}
    assert again.withdrawn == {"a"}
    assert [receipt["frame_id"] for receipt in read_receipts(str(tmp_path))] == ["b"]
    assert set(again.file_names({"a", "b", "c"})) == {"a", "b", "c"}


def test_a_frame_that_is_set_aside_is_not_finished_any_more(tmp_path, ledger):
    ledger.record([_receipt("a"), _receipt("a", error="broken")])
    ledger.close()
    again = _reopened(tmp_path)
    assert again.parts == again.identities == {}
    assert again.aside == {"a": "broken"}


def test_what_is_written_later_counts_even_if_the_clock_goes_back(tmp_path, ledger, monkeypatch):
    ledger.record([_receipt("a", part="first")])
    ledger.close()
    monkeypatch.setattr("pipeline.ledger.time.time_ns", lambda: 1)
    again = _reopened(tmp_path)
    again.withdraw(["a"], [])
    assert _reopened(tmp_path).parts == {}
    again.record([_receipt("a", part="second")])
    again.close()
    assert _reopened(tmp_path).parts == {"a": "second"}


def test_a_restart_takes_frames_back_even_if_the_clock_goes_back(tmp_path, ledger, monkeypatch):
    ledger.record([_receipt("a", part="first")])
    ledger.close()
    monkeypatch.setattr("pipeline.ledger.time.time_ns", lambda: 1)
    again = Ledger(str(tmp_path))
    again.load({}, restart=True)
    again.withdraw(["a"], [])
    assert _reopened(tmp_path).parts == {}


def test_the_identity_of_a_frame_is_known_to_the_next_run_also_when_it_was_renewed(tmp_path, ledger):
    ledger.record([replace(_receipt(name), identity=f"{name}.1@here") for name in "abc"])
    ledger.renew({"a": "a.1@there", "b": "b.1@there"})
    ledger.record([replace(_receipt("b"), identity="b.2@here")])
    ledger.close()
    again = _reopened(tmp_path)
    assert again.identities == {"a": "a.1@there", "b": "b.2@here", "c": "c.1@here"}
    again.renew({"a": "a.1@elsewhere"})
    assert _reopened(tmp_path).identities["a"] == "a.1@elsewhere"


def test_a_restart_forgets_everything_also_under_other_settings(tmp_path, ledger):
    ledger.record([_receipt("a"), _receipt("b", error="broken")])
    ledger.withdraw(["a"], [])
    ledger.record([_receipt("a")])
    ledger.close()
    again = Ledger(str(tmp_path))
    again.load({"weights": "xyz"}, restart=True)
    assert set(again.parts) == {"a"}
    again.start({"weights": "xyz"})
    assert again.parts == again.aside == {}
    assert not list(read_receipts(str(tmp_path)))
    assert _reopened(tmp_path, {"weights": "xyz"}).parts == {}


def test_the_many_parts_below_a_ledger_are_not_listed_to_read_it(tmp_path, ledger, monkeypatch):
    storage.put(f"{tmp_path}/_ledger/parts/one.parquet", b"1")
    ledger.record([_receipt("a"), _receipt("b")])
    ledger.flush()
    ledger.withdraw(["a"], [])
    ledger.close()
    listed = []
    listing = LocalFileSystem.ls

    def noted(self, path, *args, **options):
        listed.append(Path(path).name)
        return listing(self, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", noted)
    assert _reopened(tmp_path).parts.keys() == {"b"}
    assert StatusReader(str(tmp_path)).read().done == 1
    assert "_ledger" in listed
    assert "parts" not in listed


@pytest.fixture
def many(ledger, monkeypatch):
    """What a ledger says that has three times as many segments as are put together."""
    monkeypatch.setattr("pipeline.ledger.MERGED_FROM", 4)
    for night in range(3):
        for number in range(4):
            ledger.record([_receipt(f"{night}{number}", part=f"{night}"), _receipt("again", part=f"{night}{number}")])
            ledger.flush()
        ledger.withdraw([f"{night}0"], [f"{night}1"])
    ledger.record([_receipt("00", part="late"), _receipt("22", error="broken")])
    ledger.close()
    return _said(ledger.output)


def _said(output):
    ledger = Ledger(output)
    ledger.load({"weights": "abc"})
    return StatusReader(output).read().done, ledger.parts, ledger.aside, ledger.withdrawn, [*read_receipts(output)]


def _segments(output):
    return sorted(path.name for path in Path(output, "_ledger").glob("*.jsonl"))


def test_many_segments_are_put_together_and_say_what_they_said(ledger, many):
    _reopened(ledger.output)
    # Frames were withdrawn in between.
    assert len(_segments(ledger.output)) == 4
    assert _said(ledger.output) == many
    _reopened(ledger.output)
    assert _said(ledger.output) == many


def test_segments_are_put_together_in_pieces_that_fit_the_memory(ledger, many, monkeypatch):
    monkeypatch.setattr("pipeline.ledger.MERGED_BYTES", 1000)
    _reopened(ledger.output)
    assert len(_segments(ledger.output)) == 7
    assert _said(ledger.output) == many


@pytest.mark.parametrize("call", range(17))
def test_a_run_that_is_killed_while_it_puts_segments_together_loses_none(ledger, many, monkeypatch, call):
    monkeypatch.setattr("pipeline.storage.at_once", lambda remove, names: [remove(name) for name in sorted(names)])
    before, calls = _segments(ledger.output), count()

    def killed(change):
        def until(*arguments):
            if next(calls) == call:
                raise KeyboardInterrupt
            change(*arguments)

        return until

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", killed(storage.put))
        patch.setattr(storage, "remove", killed(storage.remove))
        with pytest.raises(KeyboardInterrupt):
            _reopened(ledger.output)
    assert (_segments(ledger.output) == before) == (call == 0)
    assert _said(ledger.output) == many
    _reopened(ledger.output)
    assert _said(ledger.output) == many
    assert not {*_segments(ledger.output)} & {*before[:-1]}


def test_a_segment_that_was_cut_short_spoils_none_that_it_is_put_together_with(ledger, many):
    path = Path(ledger.root, _segments(ledger.output)[1])
    path.write_bytes(path.read_bytes()[:-20])
    expected = _said(ledger.output)
    _reopened(ledger.output)
    assert _said(ledger.output) == expected != many


def test_a_reader_is_not_disturbed_by_segments_that_are_put_together_meanwhile(ledger, many, monkeypatch):
    reading, starts = storage.read, count()

    def late(url, *range):
        if url.endswith(".jsonl") and not next(starts):
            _reopened(ledger.output)
        return reading(url, *range)

    reader = StatusReader(ledger.output)
    monkeypatch.setattr(storage, "read", late)
    assert reader.read().done == many[0]
    assert reader.read().done == many[0]


def test_files_that_say_which_frames_were_withdrawn_are_read_many_at_once_and_once(ledger, monkeypatch):
    ledger.record([_receipt(str(number)) for number in range(8)])
    ledger.flush()
    for number in range(8):
        ledger.withdraw([str(number)], [])
    ledger.close()
    others, read, reading = threading.Barrier(8, timeout=10), [], storage.read

    def when_all_are_there(url):
        if url.endswith(".withdrawn.json"):
            read.append(url)
            others.wait()
        return reading(url)

    monkeypatch.setattr(storage, "read", when_all_are_there)
    assert _reopened(ledger.output).withdrawn == {str(number) for number in range(8)}
    assert len(read) == 8

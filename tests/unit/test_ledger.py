import json
import threading
import time
from dataclasses import replace
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

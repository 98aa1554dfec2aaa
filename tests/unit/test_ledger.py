import json
from pathlib import Path

import pytest

from pipeline.ledger import Ledger
from pipeline.records import InputError
from pipeline.stages import Receipt


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


def test_another_fingerprint_names_the_first_difference(tmp_path, ledger):
    ledger.record([_receipt("a")])
    ledger.close()
    with pytest.raises(InputError, match="made with weights = 'abc', not 'xyz'"):
        _reopened(tmp_path, {"weights": "xyz"})

import json
from contextlib import closing
from datetime import UTC, datetime

import pytest

from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.records import InputError
from pipeline.run_log import ALL_ASIDE, RunLog
from pipeline.status import StatusReader
from pipeline.work import Receipt


def _aside(*names, error="x.png: broken"):
    return [Receipt(name, error, "", 0, 0, 0, {}, 0.0) for name in names]


def _log(form):
    lines = []
    log = RunLog(form, lines.append)
    log.run_id = "abc"
    return log, lines


def test_a_json_line_has_time_level_run_id_and_event():
    log, lines = _log("json")
    log.event("progress", frames=3)
    line = json.loads(lines[0])
    assert abs((datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))).total_seconds()) < 60
    assert line == {"level": "info", "run_id": "abc", "event": "progress", "frames": 3}


def test_text_has_no_lines_for_events():
    log, lines = _log("text")
    log.event("progress", frames=3)
    assert lines == []


def test_a_frame_set_aside_is_named_with_its_reason_as_it_happens():
    for form in ("text", "json"):
        log, lines = _log(form)
        log.set_aside([*_aside("fine", error=""), *_aside("bad", error="s3://key:secret@bucket/bad.png: broken")])
        (line,) = lines
        if form == "text":
            assert line == "set aside bad: s3://***@bucket/bad.png: broken"
        else:
            told = json.loads(line)
            assert (told["event"], told["level"], told["frame_id"]) == ("set_aside", "warning", "bad")
            assert told["reason"] == "s3://***@bucket/bad.png: broken"


def test_a_name_takes_one_line_and_moves_no_cursor_wherever_it_is_told(tmp_path):
    name = "a\nset aside b: forged\x1b[2K"
    log, lines = _log("text")
    log.set_aside(_aside(name))
    with closing(Ledger(str(tmp_path))) as ledger:
        ledger.open({})
        ledger.record(_aside(name))
    summary = Progress(1, 0, lines.append).summary(str(tmp_path), {name: "x.png: broken"}, 1.0)
    for told in (*lines, str(summary), str(StatusReader(str(tmp_path)).read())):
        assert r"a\nset aside b: forged\x1b[2K: x.png: broken" in told
        assert "\nset aside b" not in told


def test_of_very_many_frames_set_aside_few_are_named():
    log, lines = _log("json")
    for number in range(1, 5001):
        log.set_aside(_aside(str(number)))
    told = [json.loads(line)["set_aside"] for line in lines]
    assert told == [*range(1, ALL_ASIDE + 1), 32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize(
    ("error", "event", "reason"),
    [
        (InputError("a.json: expected a list"), "failed", "a.json: expected a list"),
        (ZeroDivisionError("by\n zero"), "failed", "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(143), "interrupted", None),
    ],
)
def test_the_last_line_says_what_ended_a_run(error, event, reason):
    log, lines = _log("json")
    with pytest.raises(type(error)), log.telling_the_end():
        raise error
    told = json.loads(lines[0])
    assert (told["event"], told.get("reason")) == (event, reason)

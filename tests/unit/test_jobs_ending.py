import os
import subprocess
import sys

import pytest

from jobs import ended
from model.backend import UnsupportedError
from model.bundled import CheckpointError
from pipeline.records import InputError
from tests.docs.pages import ROOT


def _raising(error):
    def job():
        raise error

    return job


def test_a_job_ends_with_the_status_that_it_returns(capsys):
    assert ended(lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


def test_a_job_that_is_started_without_a_standard_output_ends_as_it_does_with_one(monkeypatch):
    """As by some schedulers, or with `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert ended(lambda: 3) == 3


@pytest.mark.parametrize("kind", [InputError, CheckpointError, UnsupportedError, OSError])
def test_what_was_expected_is_one_line_without_secrets(kind, capsys):
    assert ended(_raising(kind("https://host/a?sig=s3cr3t: expected an image"))) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: https://host/a?")
    assert said.endswith(": expected an image\n")
    assert "s3cr3t" not in said


def test_ctrl_c_is_one_line_and_130(capsys):
    assert ended(_raising(KeyboardInterrupt()), interrupted="interrupted; nothing was written") == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_any_other_exception_is_a_fault_of_the_program_and_keeps_its_traceback_unless_the_job_knows_it():
    with pytest.raises(ZeroDivisionError):
        ended(lambda: 1 // 0)
    assert ended(lambda: 1 // 0, ZeroDivisionError) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("job", ["status", "refine"])
def test_a_reader_that_stops_reading_ends_a_job_without_a_word(job, unbuffered, tmp_path):
    """As with `| head -1`."""
    program = f"""
import sys
from jobs import {job}
{job}.run = {job}._status = lambda *_: print("much") or "more"
sys.argv += ["--predictions=p", "--images=i", "--output=o"]
sys.exit({job}.main())
"""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_connection_that_broke_is_an_error_like_others(capsys):
    assert ended(_raising(BrokenPipeError("s3://bucket: broken pipe"))) == 1
    assert capsys.readouterr().err == "error: s3://bucket: broken pipe\n"

import pytest

from jobs import ended
from model.backend import UnsupportedError
from model.bundled import CheckpointError
from pipeline.records import InputError


def _raising(error):
    def job():
        raise error

    return job


def test_a_job_ends_with_the_status_that_it_returns(capsys):
    assert ended(lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


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

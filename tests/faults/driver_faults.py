"""Faults of the driver: killed, interrupted, stopped, started twice, under another clock."""

from __future__ import annotations

import os
import signal

from tests.faults.bench import COMMITTED, Bench
from tests.faults.trial import Outcome, Trial, undisturbed

RESULT = {"coco": "refined.json", "parquet": "part-00000.parquet"}
"""The file in which the parts of a run are folded at its end."""


def sigkill(bench: Bench, form: str) -> Outcome:
    """Twice: while a worker is about to name a file, and then again, or in the fold at the end where there is one."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "SIGKILL of the driver, twice", form, placement="spread" if form == "coco" else "auto")
    _kill_while_writing(trial, signal.SIGKILL, COMMITTED[form], 7 if form == "cityscapes" else 4)
    if form in RESULT:
        _kill_while_writing(trial, signal.SIGKILL, RESULT[form], 1)
    else:
        _kill_while_writing(trial, signal.SIGKILL, COMMITTED[form], 7)
    trial.complete()
    return trial.finish()


def sigterm(bench: Bench, form: str) -> Outcome:
    """As a preempted machine or a scheduler stops a job."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "SIGTERM of the driver", form)
    status = _kill_while_writing(trial, signal.SIGTERM, COMMITTED[form], 4)
    assert status == 128 + signal.SIGTERM, status
    trial.complete()
    return trial.finish()


def control_c(bench: Bench, form: str) -> Outcome:
    """As a terminal sends it: to the job and to all processes of its group."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "Ctrl-C", form)
    with trial.holding(COMMITTED[form], 7):
        job = trial.start()
        trial.await_finished(job)
        trial.await_held(job)
        os.killpg(job.process.pid, signal.SIGINT)
        status = job.wait()
        trial.mark()
    assert status == 130, (status, job.said())
    assert "interrupted; the same command goes on from here" in job.said()
    assert "Traceback" not in job.said(), job.said()
    assert not (left := trial.await_silence()), left
    trial.complete()
    return trial.finish()


def two_runs_at_once(bench: Bench, form: str) -> Outcome:
    """The second is refused while the first lives, and takes over at once when it has been killed."""
    undisturbed(bench, form, local=True)
    trial = Trial(bench, "two runs at once, the first killed", form, local=True)
    with trial.holding(COMMITTED[form], 4):
        first = trial.start()
        trial.await_held(first)
        second = trial.start()
        assert second.wait() == 1
        said = second.said()
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        assert f"pid {first.process.pid}, is writing this output" in said
        first.kill()
        first.wait()
        trial.mark()
    trial.complete()
    return trial.finish()


def clock_ahead(bench: Bench, form: str) -> Outcome:
    """The first machine's clock was an hour ahead: its lease and its segments are from the future of the second's."""
    undisturbed(bench, form, local=True)
    trial = Trial(bench, "clock an hour ahead, then right", form, local=True)
    _kill_while_writing(trial, signal.SIGKILL, COMMITTED[form], 4, FAULTS_CLOCK_S="3600")
    trial.complete()
    return trial.finish()


def _kill_while_writing(trial: Trial, number: int, ending: str, nth: int, **env: str) -> int:
    """Run until the nth file of this ending is about to get its name, and the ledger knows more than it did; signal."""
    before = len(trial.finished()) if trial.runs else 0
    with trial.holding(ending, nth):
        job = trial.start(**env)
        trial.await_finished(job, before)
        trial.await_held(job)
        status = trial.stop(job, number)
    assert not (left := trial.await_silence()), left
    return status

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from pipeline import lease, storage
from pipeline.lease import DEAD_SECONDS, Lease
from pipeline.records import InputError


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path, monkeypatch):
    """An output on a local disk, and one on a store that cannot replace a file on a condition."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid4().hex}/out"


def _held(output, age=0.0, **holder):
    """The lease of another run as it lies on storage."""
    content = {"run_id": "other", "host": "elsewhere", "pid": 7, "heartbeat": time.time() - age, **holder}
    storage.put(f"{output}/_ledger/lease.json", json.dumps(content).encode())


def _holder(output):
    return json.loads(storage.read(f"{output}/_ledger/lease.json"))


def test_a_second_run_is_told_who_holds_the_output(output):
    with Lease(output) as first, pytest.raises(InputError) as refused, Lease(output):
        pass
    message = str(refused.value)
    assert "\n" not in message
    assert f"lease.json: run {first.run_id} on host {os.uname().nodename}, pid {os.getpid()}" in message
    assert "last heartbeat 0 s ago" in message


def test_a_lease_is_given_back_at_the_end_also_of_a_run_that_failed(output):
    with pytest.raises(ZeroDivisionError), Lease(output):
        raise ZeroDivisionError
    assert not storage.exists(f"{output}/_ledger/lease.json")
    with Lease(output) as second:
        assert not second.taken_over


@pytest.mark.parametrize("age", [DEAD_SECONDS + 1, -3600])
def test_the_lease_of_a_run_without_a_heartbeat_is_taken_over_also_where_its_clock_was_ahead(output, monkeypatch, age):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    _held(output, age=age)
    with Lease(output) as mine:
        assert _holder(output)["run_id"] == mine.run_id
        assert mine.taken_over


@pytest.mark.parametrize("host", ["elsewhere", os.uname().nodename])
@pytest.mark.parametrize("age", [2 * DEAD_SECONDS, -3600])
def test_a_run_whose_clock_differs_is_not_taken_for_dead(output, monkeypatch, age, host):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    _held(output, age=age, host=host)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: _held(output, age=age - 1, host=host))
    with pytest.raises(InputError, match=f"run other on host {host}, pid 7"), Lease(output):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a pid is")
def test_a_process_that_died_on_this_machine_is_taken_over_at_once(tmp_path):
    code = f"import os; from pipeline.lease import Lease; Lease({str(tmp_path)!r}).__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert _holder(tmp_path)["heartbeat"] > time.time() - DEAD_SECONDS
    with Lease(str(tmp_path)) as mine:
        assert _holder(tmp_path)["run_id"] == mine.run_id


@pytest.mark.parametrize("before", ["nobody", "a dead run"])
def test_of_many_that_start_at_once_one_gets_the_lease(tmp_path, monkeypatch, before):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    if before == "a dead run":
        _held(tmp_path, age=DEAD_SECONDS + 1)

    def start(_):
        try:
            return Lease(str(tmp_path)).__enter__()
        except InputError:
            return None

    with ThreadPoolExecutor(8) as threads:
        holders = [found for found in threads.map(start, range(8)) if found]
    assert len(holders) == 1
    holders[0].__exit__(None, None, None)


def _checked_for_a_while(held):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        held.check()
        time.sleep(0.02)


def test_the_heartbeat_goes_on_while_the_run_works(output, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    with Lease(output):
        first = _holder(output)["heartbeat"]
        deadline = time.monotonic() + 5
        while _holder(output)["heartbeat"] == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _holder(output)["heartbeat"] > first


def test_a_run_that_was_taken_over_stops_and_leaves_the_lease_alone(output, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    with Lease(output) as mine:
        mine.check()
        _held(output)
        with pytest.raises(InputError, match="run other on host elsewhere, pid 7, is writing this output"):
            _checked_for_a_while(mine)
    assert _holder(output)["run_id"] == "other"


@pytest.mark.parametrize("noticed", ["by its heartbeat", "by a look"])
def test_a_run_that_slept_while_another_took_over_and_ended_stops(output, monkeypatch, noticed):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02 if noticed == "by its heartbeat" else 60)
    with Lease(output) as mine:
        storage.remove(f"{output}/_ledger/lease.json")
        with pytest.raises(InputError, match="another run has had this output meanwhile"):
            _checked_for_a_while(mine) if noticed == "by its heartbeat" else mine.confirm()
        assert not storage.exists(f"{output}/_ledger/lease.json")


def test_a_run_that_finds_itself_taken_over_writes_no_more_even_when_the_other_has_ended(output):
    with Lease(output) as mine:
        mine.confirm()
        _held(output)
        with pytest.raises(InputError, match="run other on host elsewhere, pid 7, is writing this output"):
            mine.confirm()
        storage.remove(mine.url)
        for asked in (mine.check, mine.confirm):
            with pytest.raises(InputError, match="run other on host elsewhere"):
                asked()


def test_a_damaged_lease_is_replaced(output):
    storage.put(f"{output}/_ledger/lease.json", b'{"run_id": "x", "ho')
    with Lease(output) as mine:
        assert _holder(output)["run_id"] == mine.run_id

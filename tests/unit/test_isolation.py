import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline import isolation
from pipeline.isolation import ChildError, Isolated, OverdueError, isolated


@pytest.fixture
def child():
    child = Isolated()
    yield child
    child.close()


@dataclass
class _Parcel:
    name: str
    arrays: dict[str, np.ndarray]


_KEPT = np.zeros(100_000, np.uint8)


def _kept(add):
    _KEPT[:] += add
    return _KEPT


def _returned(value):
    return value


def _noise(*shape):
    return np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)


def _descriptors():
    return len(os.listdir("/dev/fd"))


def _killed(number, *_):
    os.kill(os.getpid(), number)


def _killed_once(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_child_has_the_modules_of_its_parent_and_not_those_of_the_working_directory(child, tmp_path, monkeypatch):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    assert child.call(_returned, 1) == 1


def test_a_call_returns_what_the_function_returns_from_another_process(child):
    assert child.call(os.getpid) not in (os.getpid(), 0)
    assert np.array_equal(child.call(np.add, np.arange(3), 1), [1, 2, 3])


def test_calls_share_one_child(child):
    assert child.call(os.getpid) == child.call(os.getpid)


def test_an_exception_is_raised_here_as_it_was_there(child):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        child.call(open, "nowhere")
    assert child.call(abs, -1) == 1


def test_a_crash_is_told_by_its_signal_and_the_next_call_has_a_new_child(child):
    with pytest.raises(ChildError, match=r"killed its process \(SIGSEGV\)"):
        child.call(_killed, signal.SIGSEGV)
    with pytest.raises(ChildError, match="as when memory runs out"):
        child.call(_killed, signal.SIGKILL)
    with pytest.raises(ChildError, match="ended its process with status 0"):
        child.call(os._exit, 0)
    assert child.call(abs, -1) == 1


def test_a_call_whose_child_somebody_else_has_killed_is_done_again(child, tmp_path):
    assert child.call(_killed_once, str(tmp_path / "marker")) == "alive"


def test_a_call_that_takes_too_long_is_given_up_and_its_process_ended(child):
    pid = child.call(os.getpid)
    with pytest.raises(OverdueError, match=r"took longer than 0\.2 s"):
        child.call(time.sleep, 60, seconds=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert child.call(abs, -1, seconds=60) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_call_that_takes_more_memory_than_allowed_fails_alone():
    child = Isolated(memory_bytes=300 << 20)
    try:
        with pytest.raises(ChildError, match="ran out of memory"):
            child.call(np.ones, 1 << 30)
        assert child.call(np.ones, 1 << 20).sum() == 1 << 20
    finally:
        child.close()


def test_ctrl_c_and_a_request_to_stop_are_left_to_the_parent(child):
    pid = child.call(os.getpid)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert child.call(os.getpid) == pid


def test_a_borrowed_child_is_kept_for_the_next_who_asks_for_its_limit():
    with isolated(1 << 30) as first:
        pid = first.call(os.getpid)
        with isolated(1 << 30) as second:
            assert second is not first
    with isolated(1 << 30) as again:
        assert again.call(os.getpid) in (pid, second.call(os.getpid))
    first.close()
    second.close()


def test_who_borrows_a_child_gets_none_that_was_started_in_another_environment(monkeypatch):
    with isolated(5 << 30) as child:
        assert child.call(os.getenv, "AWS_SESSION_TOKEN") is None
    monkeypatch.setenv("AWS_SESSION_TOKEN", "new")
    with isolated(5 << 30) as child:
        assert child.call(os.getenv, "AWS_SESSION_TOKEN") == "new"


@pytest.mark.parametrize(
    "array",
    [
        _noise(118, 64, 64, 4),
        _noise(3, 1_000_001).view("V1"),
        _noise(1000, 64, 128).view(np.uint16),
        _noise(700, 900).T,
        _noise(700, 900)[::3, 5:],
        np.zeros((0, 64, 64, 4), np.uint8),
        np.array(3.5),
    ],
    ids=["patches", "odd size", "several pieces", "transposed", "not contiguous", "empty", "scalar"],
)
def test_arrays_travel_both_ways_and_can_be_written_to(child, array):
    got = child.call(_returned, array)
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)
    got[...] = got


def test_more_arrays_than_one_system_call_takes_arrive_in_their_order(child):
    arrays = [np.full(i % 70, i, np.int64) for i in range(5000)]
    arrays[77] = np.arange(1 << 19)
    got = child.call(_returned, arrays)
    assert len(got) == len(arrays)
    assert all(map(np.array_equal, got, arrays))


def test_arrays_travel_within_other_values(child):
    parcel = _Parcel("frame", {"patches": _noise(10, 64, 64, 4), "none": np.zeros(0), "box": np.arange(4)})
    first, second = child.call(_returned, [parcel, parcel])
    assert first is second
    assert first.name == "frame"
    assert first.arrays.keys() == parcel.arrays.keys()
    assert all(np.array_equal(first.arrays[key], array) for key, array in parcel.arrays.items())


def test_an_answer_stays_as_it_was_whatever_comes_after_it(child):
    first = child.call(_kept, 1)
    second = child.call(_kept, 1)
    second[:5] = 9
    third = child.call(_kept, 1)
    assert [set(first), set(second[5:]), set(third)] == [{1}, {2}, {3}]


def test_calls_side_by_side_do_not_mix_up_their_arrays():
    children, wrong = [Isolated(), Isolated()], []

    def call_often(number):
        for i in range(20):
            sent = np.full(300_000 + i, 100 * number + i, np.uint8)
            if not np.array_equal(children[number].call(_returned, sent), sent):
                wrong.append((number, i))

    threads = [threading.Thread(target=call_often, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in children:
        each.close()
    assert not wrong


def test_signals_do_not_break_arrays_that_are_on_their_way(child):
    array = _noise(30 << 20)
    child.call(abs, -1)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        got = child.call(_returned, array)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.array_equal(got, array)


def test_a_child_that_is_killed_while_it_is_sent_arrays_is_replaced(child):
    array, pid = _noise(30 << 20), child.call(os.getpid)
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    assert np.array_equal(child.call(_returned, array), array)
    killer.join()
    assert child.call(os.getpid) != pid


def test_a_child_that_is_killed_while_it_sends_arrays_is_replaced(child, monkeypatch):
    array, pid, wait = _noise(30 << 20), child.call(os.getpid), isolation.wait
    victims = [pid]

    def wait_and_kill(sockets, seconds):
        ready = wait(sockets, seconds)
        while victims:
            os.kill(victims.pop(), signal.SIGKILL)
        return ready

    monkeypatch.setattr(isolation, "wait", wait_and_kill)
    assert np.array_equal(child.call(_returned, array), array)
    assert child.call(os.getpid) != pid


def test_no_descriptor_stays_open(child):
    child.call(abs, -1)
    before, theirs = _descriptors(), child.call(_descriptors)
    kept = [child.call(_returned, _noise(1 << 20)) for _ in range(5)]
    assert (_descriptors(), child.call(_descriptors)) == (before, theirs)
    with pytest.raises(ChildError):
        child.call(_killed, signal.SIGKILL, *kept)
    with pytest.raises(OverdueError):
        child.call(time.sleep, 60, seconds=0.1)
    with pytest.raises(AttributeError, match="local object"):
        child.call(_returned, [*kept, lambda: None])
    assert child.call(abs, -1) == 1
    assert (_descriptors(), child.call(_descriptors)) == (before, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_arguments_that_do_not_fit_the_memory_of_a_child_end_it():
    child = Isolated(memory_bytes=300 << 20)
    try:
        with pytest.raises(ChildError, match="ended its process with status 1"):
            child.call(np.size, np.zeros(400 << 20, np.uint8))
        assert child.call(np.size, np.zeros(200 << 20, np.uint8)) == 200 << 20
    finally:
        child.close()


def test_a_default_timeout_of_sockets_is_none_of_its_concern():
    socket.setdefaulttimeout(1e-3)
    child = Isolated()
    try:
        assert child.call(abs, -1) == 1
    finally:
        socket.setdefaulttimeout(None)
        child.close()

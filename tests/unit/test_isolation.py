import os
import signal
import sys
import time

import numpy as np
import pytest

from pipeline.isolation import ChildError, Isolated, OverdueError, isolated


@pytest.fixture
def child():
    child = Isolated()
    yield child
    child.close()


def _killed(number):
    os.kill(os.getpid(), number)


def _killed_once(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


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
    with pytest.raises(ChildError, match="ended its process with status 3"):
        child.call(os._exit, 3)
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
        with pytest.raises(MemoryError):
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

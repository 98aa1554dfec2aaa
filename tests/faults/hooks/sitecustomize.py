"""Runs first in every Python process of a job under test: faults are switched on and off there by files.

Python imports a module of this name at start-up; `tests.faults.bench` puts this folder on PYTHONPATH for the jobs it
starts, and for nothing else.
"""

import os
import time

if os.environ.get("FAULTS_SWITCHES"):
    import fsspec
    from switch import happens, note

    fsspec.register_implementation("watched", "watched.WatchedFileSystem")

    _replace = os.replace

    def replace(source, target, **keywords):
        """`os.replace`, by which local files get their names; the fault comes before the name."""
        happens("replace", os.fspath(target))
        _replace(source, target, **keywords)
        note("writes.log", f"{os.getpid()} {os.fspath(target)}")

    os.replace = replace

    if skew := float(os.environ.get("FAULTS_CLOCK_S", 0)):
        _time, _time_ns = time.time, time.time_ns
        time.time = lambda: _time() + skew
        time.time_ns = lambda: _time_ns() + int(skew * 1e9)

"""The processes of a bench, told by their working directory: what they are, what they do, what is left of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

SLOW_TO_END = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own: of a killed cluster they try for a minute to report to it before they end."""


def below(root: Path) -> list[int]:
    """Pids of all processes, zombies left out, whose working directory is this folder or lies below it."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with suppress(OSError):
                folder = os.readlink(f"/proc/{entry.name}/cwd").removesuffix(" (deleted)")
                if folder == str(root) or folder.startswith(f"{root}/"):
                    found.append(int(entry.name))
    return sorted(found)


def title(pid: int) -> str:
    """The command line; empty where the process has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def parent(pid: int) -> int:
    """0 where the process has ended."""
    return int(_status(pid)[1]) if _status(pid) else 0


def cpu_s(pid: int) -> float:
    """Seconds of processor time used so far; 0 where the process has ended."""
    fields = _status(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0


def private_bytes(pid: int) -> int:
    """Resident memory that is no other's: the object store is mapped into every worker, and counts for none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def is_raylet(pid: int) -> bool:
    return title(pid).split(" ")[0].endswith("/raylet/raylet")


def raylet_of(pid: int) -> int:
    """The raylet whose worker this is, or whose worker's helper; 0 where there is none."""
    while pid > 1 and not is_raylet(pid):
        pid = parent(pid)
    return pid if pid > 1 else 0


def is_network(pid: int) -> bool:
    """Whether it is a Ray worker that has loaded a network: nothing but the refining actors needs torch."""
    if not title(pid).startswith("ray::") or not is_raylet(parent(pid)):
        return False
    with suppress(OSError):
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    return False


def end(pids: Iterable[int]) -> None:
    """Kill processes and wait until they are gone."""
    pids = [pid for pid in pids if pid != os.getpid()]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(_status(pid) and _status(pid)[0] != "Z" for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def _status(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []

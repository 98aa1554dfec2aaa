"""Machines made of Linux namespaces: their own addresses, processes and disk; they share the network and nothing else.

All of them hang on one switch, a namespace of its own, so that nothing of this machine's network is touched. What runs
on them ends with the process that made them, however that ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

SWITCH_ADDRESS = "10.77.0.1"

_IS_ROOT = os.geteuid() == 0

_OF_A_MACHINE = ["--net", "--mount", "--uts", "--ipc", "--pid"]

_SWITCH = f"""
ip link set lo up && ip link add bridge0 type bridge && ip address add {SWITCH_ADDRESS}/24 dev bridge0 &&
ip link set bridge0 up && echo up && read end
"""

_CABLE = """
ip link add port$1 type veth peer name eth0 netns "$2" && ip link set port$1 master bridge0 && ip link set port$1 up
"""

# A disk of its own at the place that the jobs write to; nothing else of the file system can be written. By its own name
# and by the way that leads out a machine's programs find out its address. Other names it has no server to ask for, and
# none to wait for in vain.
_MACHINE = """
mount -t tmpfs tmpfs "$1" && mkdir -p "$1/$2/home" "$1/$2/tmp" && mount -t tmpfs tmpfs /dev/shm &&
hostname "$2" && printf '127.0.0.1 localhost\\n%s %s\\n' "$3" "$2" > "$1/$2/hosts" &&
mount --bind "$1/$2/hosts" /etc/hosts && : > "$1/$2/servers" &&
{ [ ! -e /etc/resolv.conf ] || mount --bind "$1/$2/servers" /etc/resolv.conf; } &&
mount -o remount,bind,ro / && ip link set lo up && echo up && read cabled &&
ip address add "$3/24" dev eth0 && ip link set eth0 up && ip route add default via "$4" && echo up && read end
"""

_LISTEN = """
import socket, sys
with socket.socket(fileno=0) as asked, socket.socket() as listening:
    listening.bind((sys.argv[1], 0))
    listening.listen(64)
    socket.send_fds(asked, [b"here"], [listening.fileno()])
"""


@dataclass(frozen=True)
class Machine:
    """A place to run commands."""

    name: str
    address: str
    disk: Path
    """What lies below is this machine's own; it has the folders `<name>/home` and `<name>/tmp`."""
    process: subprocess.Popen[str]

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` there, in the folder of its disk."""
        return [*_entering(self.process, _OF_A_MACHINE), "sh", "-c", 'cd "$0" && exec "$@"', str(self.disk), *words]

    def files(self) -> list[Path]:
        """All files on its disk, below `<name>`."""
        words = ["find", self.name, "-mindepth", "2", "-type", "f", "-print0"]
        found = subprocess.run(self.command(words), capture_output=True, text=True, check=True)
        return [Path(name) for name in found.stdout.split("\0") if name]


def why_not() -> str:
    """Why there can be no such machines here; empty where there can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount") if not shutil.which(tool)]
    if missing:
        return f"without {', '.join(missing)}"
    tried = subprocess.run([*_unshare(), "sh", "-c", _SWITCH], input="end\n", capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces are not permitted: {tried.stderr.strip() or tried.returncode}"


@contextmanager
def machines(disk: Path, names: Sequence[str]) -> Iterator[tuple[socket.socket, list[Machine]]]:
    """Machines with these names and a disk of their own at `disk`, and a listening socket that all of them reach."""
    with ExitStack() as stack:
        switch = _start(stack, [*_unshare(), "sh", "-c", _SWITCH])
        made = []
        for number, name in enumerate(names, start=2):
            address = f"10.77.0.{number}"
            told = ["sh", "-c", _MACHINE, "sh", str(disk), name, address, SWITCH_ADDRESS]
            apart = ["unshare", *_OF_A_MACHINE, "--fork", "--mount-proc", "--kill-child"]
            process = _start(stack, [*_entering(switch), *apart, *told])
            cable = ["sh", "-c", _CABLE, "sh", str(number), str(_inside(process))]
            subprocess.run([*_entering(switch), *cable], check=True)
            _say(process, "cabled")
            made.append(Machine(name, address, disk, process))
        yield stack.enter_context(_listening(switch)), made


def _unshare() -> list[str]:
    # As root of a user namespace everyone may do the rest, where the system lets them.
    as_root = [] if _IS_ROOT else ["--user", "--map-root-user"]
    return ["unshare", *as_root, "--net", "--fork", "--kill-child"]


def _entering(process: subprocess.Popen[str], kinds: Sequence[str] = ("--net",)) -> list[str]:
    as_root = [] if _IS_ROOT else ["--user", "--preserve-credentials"]
    return ["nsenter", "--target", str(_inside(process)), *as_root, *kinds]


def _inside(process: subprocess.Popen[str]) -> int:
    """The first process within the namespaces that an `unshare` has made."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _start(stack: ExitStack, command: Sequence[str]) -> subprocess.Popen[str]:
    """A process that says `up` when it is ready, and ends with its standard input."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(_stop, process)
    _await_up(process)
    return process


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    _await_up(process)


def _await_up(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", f"{process.args} ended with {process.wait()}"


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)


@contextmanager
def _listening(switch: subprocess.Popen[str]) -> Iterator[socket.socket]:
    """A socket of this process that listens at the switch's address."""
    here, there = socket.socketpair()
    with here, there:
        command = [*_entering(switch), sys.executable, "-c", _LISTEN, SWITCH_ADDRESS]
        subprocess.run(command, stdin=there, check=True)
        _, (descriptor,), _, _ = socket.recv_fds(here, 16, 1)
    with socket.socket(fileno=descriptor) as listening:
        yield listening

"""A head of Ray as `ray start --head` makes it, on free ports, with a token and folders of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 120
"""How long a loaded machine may take to start the head."""

UNDRAINED = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
"""Lets `ray start --block` end at SIGTERM, which it would wait half a minute with for its node to be idle."""


@dataclass(frozen=True)
class Head:
    """Where a head listens, and the environment its clients need."""

    address: str
    environment: dict[str, str]
    folder: Path

    def submit(self, script: str, *flags: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a bash script as a job in the checkout's package, wait for it, and return what the submission said."""
        path = self.folder / "job.sh"
        path.write_text(script)
        command = [RAY, "job", "submit", f"--address={self.address}", "--working-dir=.", *flags]
        return subprocess.run(
            [*command, "--", "bash", "-eu", str(path)],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )


@contextmanager
def started_head() -> Iterator[Head]:
    """Start a head with two CPUs, wait until it takes jobs, and end its processes afterwards, and no others."""
    # A short path: the sockets below it may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="bpr"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        # A job's `python` is the one on the PATH of the head.
        "PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Where Ray looks for a running head first: not where others on this machine may have theirs.
        "RAY_TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        **UNDRAINED,
    }
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names))))
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
    with open(folder / "start.log", "w") as log:
        process = subprocess.Popen(
            [*command, *(f"--{name}={port}" for name, port in ports.items())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", environment, folder)
    try:
        _wait_until_ready(head, process, folder / "start.log")
        yield head
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        listing = subprocess.run(
            [RAY, "job", "list", f"--address={head.address}"], env=head.environment, capture_output=True
        )
        if listing.returncode == 0:
            return
        time.sleep(1)
    raise RuntimeError(f"the head did not start:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With --block the head's processes end with the command; what is left of its session is killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""Processes that begin as a fork of this one: in the machine, loading all modules again takes half a minute each time.

They are processes like any other, with the program's own `main`, arguments, output and exit code; only the loading of
modules is shared. `Popen` and `run` stand in for those of `subprocess` in `tests/cluster.py`.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired
CompletedProcess = subprocess.CompletedProcess
SLOWER = 10  # than the machine that the deadlines of tests/cluster.py are for


class Popen:
    """`python -m module argument…`, forked."""

    def __init__(self, command: Sequence[str], *, stdout, stderr, stdin=None, env=None) -> None:
        assert command[:2] == [sys.executable, "-m"], command
        self.args = command
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(command[2], command[3:], stdout.fileno(), stderr.fileno())

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 3600) * SLOWER
        while self.poll() is None:
            if time.monotonic() > until:
                raise TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.05)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[str], *, timeout: float, **_options) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Popen(command, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(command, code, out.read().decode(), err.read().decode())


def _become(module: str, arguments: Sequence[str], out: int, err: int) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
        sys.argv = [module, *arguments]
        code = importlib.import_module(module).main() or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001  # the end of a process: it is told where its errors go
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

"""Runs the hooks of one order: `hookwatch.py`, a process of its own that outlives the agent.

The first line of its standard input is a JSON object that says what to run. It runs each `before` in turn; then it
waits, until its input says so, closes (the agent is dead), or the deadline passes; then it runs each `after` whose
`before` was begun, the last first. An `after` always runs: also when a `before` fails, hangs, or is killed in between.
With `recover` it runs the `after`s alone.

* What is to be run stands in a file first (`record`), and the file goes once every `after` has succeeded. Whoever finds
  it later runs them again; a lock on it tells that this process is still at it.
* An `after` that fails is tried again while its time lasts. A `before` dies with this process, an `after` does not.
* What a program prints is told by its end alone. A program that leaves a process behind, with its output open, is not
  waited for.
* It answers with JSON lines, and never blocks on whoever should read them; what nobody reads goes to stderr.

It is started by its path with `-I -S`: it needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

OUTPUT_CHARS_MAX = 1000
OUTPUT_BYTES_KEPT = 4096
AFTER_TRIES_MAX = 3
AFTER_PAUSE_S = 0.2
LOCK_POLL_S = 0.05
SPEC_BYTES_MAX = 1 << 20
PR_SET_PDEATHSIG = 1

Hook = dict[str, Any]


def say(what: str, **about: object) -> None:
    line = json.dumps({"said": what, **about}).encode() + b"\n"
    try:
        if os.write(1, line) == len(line):
            return
    except OSError:
        pass
    with suppress(OSError):
        os.write(2, line)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Program:
    """One program while it runs, and the end of what it prints."""

    def __init__(self, hook: Hook, phase: str) -> None:
        self.process = subprocess.Popen(
            hook[phase],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**hook["env"], "RESILVER_PHASE": phase},
            start_new_session=True,
            preexec_fn=die_with_parent if phase == "before" else None,  # noqa: PLW1509 - there are no threads here
            user=hook["uid"],
            group=hook["gid"],
            extra_groups=hook["groups"],
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.tail = b""

    def ended(self, limit_s: float, *, while_open: bool) -> str:
        """Waits for its end; empty if it succeeded, else why not. `while_open`: killed if our input closes."""
        until = time.monotonic() + limit_s
        pidfd = os.pidfd_open(self.process.pid)
        watched = [pidfd, self.output.fileno(), *([0] if while_open else [])]
        why = ""
        try:
            while not why:
                readable, _, _ = select.select(watched, [], [], max(0.0, until - time.monotonic()))
                if self.output.fileno() in readable and not self.read():
                    watched.remove(self.output.fileno())
                if pidfd in readable:
                    break
                if while_open and 0 in readable and not os.read(0, 1):
                    why = "was ended, because the agent has gone"
                elif time.monotonic() >= until:
                    why = f"did not end within {limit_s:.3g} s"
        finally:
            os.close(pidfd)
            if why:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        while self.read():
            pass
        code = self.process.returncode
        return why or (f"ended with {code}" if code > 0 else f"was killed by signal {-code}" if code else "")

    def read(self) -> bool:
        """Takes what there is now; False if there is nothing, or nothing more to come."""
        try:
            part = os.read(self.output.fileno(), OUTPUT_BYTES_KEPT)
        except OSError:
            return False
        self.tail = (self.tail + part)[-OUTPUT_BYTES_KEPT:]
        return bool(part)


def run(hook: Hook, phase: str, limit_s: float) -> str:
    """Runs one program and tells of it; why it failed, empty if it did not."""
    begun = time.monotonic()
    output = ""
    try:
        program = Program(hook, phase)
    except (OSError, subprocess.SubprocessError) as error:
        why = f"could not be started: {error}"
    else:
        why = program.ended(limit_s, while_open=phase == "before")
        output = program.tail.decode(errors="replace")[-OUTPUT_CHARS_MAX:]
        program.output.close()
    took_s = round(time.monotonic() - begun, 3)
    say("ran", volume=hook["volume"], phase=phase, seconds=took_s, why=why, output=output)
    return why


def run_after(hook: Hook) -> str:
    until = time.monotonic() + hook["timeout_s"]
    why = ""
    for _ in range(AFTER_TRIES_MAX):
        why = run(hook, "after", max(AFTER_PAUSE_S, until - time.monotonic()))
        if not why or time.monotonic() + AFTER_PAUSE_S >= until:
            break
        time.sleep(AFTER_PAUSE_S)  # what failed is tried again, within the limit
    return why


def hold(hooks: list[Hook], until: float, begun: list[Hook]) -> None:
    """Runs each `before`, and returns when what they hold is to be let go."""
    for hook in hooks:
        begun.append(hook)
        if not hook["before"]:
            continue
        left = until - time.monotonic()
        why = run(hook, "before", left) if left > 0 else "had no time left: those before it have taken it all"
        if why:
            say("failed", volume=hook["volume"], why=f"{hook['before'][0]} {why}")
            return
    say("rest")
    while (left := until - time.monotonic()) > 0:
        readable, _, _ = select.select([0], [], [], left)
        if readable:
            if os.read(0, 1):
                say("held")
            return
    say("late")


def locked(path: str, limit_s: float) -> bool:
    """Takes the lock of the record; False if there is none any more: another process has done it all."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_POLL_S)  # flock itself has no deadline
        else:
            break
    return os.fstat(fd).st_nlink > 0


def done(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108 - pathlib takes longer to load than all this takes to run
        fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)  # noqa: PTH120 - as above
        os.fsync(fd)
        os.close(fd)


def first_line() -> bytes:
    """Byte by byte, so that nothing after it is taken."""
    line = bytearray()
    while len(line) < SPEC_BYTES_MAX and (byte := os.read(0, 1)) != b"\n":
        if not byte:
            return b""
        line += byte
    return bytes(line)


def main() -> int:
    """Exit code 0: every `after` that was due has succeeded; 1: one has not, and the record stays."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(1, False)
    line = first_line()
    if not line:
        return 1  # the agent died before it had said what to do: nothing was held, and its next start finds the record
    spec = json.loads(line)
    hooks: list[Hook] = spec["hooks"]
    if not locked(spec["record"], spec["lock_max_s"]):
        say("done", failed={})
        return 0
    begun = list(hooks) if spec["recover"] else []
    if not spec["recover"]:
        hold(hooks, time.monotonic() + spec["deadline_s"], begun)
    failed = {}
    for hook in reversed(begun):
        why = run_after(hook) if hook["after"] else ""
        if why:
            failed[hook["volume"]] = f"{hook['after'][0]} {why}"
    if not failed:
        done(spec["record"])
    say("done", failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

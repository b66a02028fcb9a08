"""Hooks around a consistency point: programs of the operator's that bring whatever writes to rest, and let it go again.

* They are run by a process of their own (`hookwatch.py`), so that `after` runs also when the agent is killed. If that
  process is killed too, what was begun stands in state_dir, and `leftovers.py` runs `after` until it has succeeded. So
  an `after` may run twice, and without a `before`.
* What was held until the deadline was not held: `release` says so, and no snapshot of that order may count.
* Programs are lists of words, never for a shell. They get a small environment, and nothing of the agent's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from agent import hookwatch
from agent.disk.durable import Json, disk_errors, make_own_dir, write_json
from resilver.config import Hooks
from resilver.errors import Refused, ResilverError

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ANSWER_MAX_S: Final = 15.0
LOCK_MARGIN_S: Final = 5.0
_LINE_BYTES_MAX: Final = 1 << 16
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_log = structlog.get_logger(__name__)
_under_way: Final[set[Path]] = set()
_lock: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class Hooked:
    """One volume of an order, with its hooks and the CP that is to be taken."""

    volume: str
    hooks: Hooks
    cp: str = ""


class HookWatch:
    """The hooks of one order while they are under way. Not for several threads at once."""

    def __init__(self, process: subprocess.Popen[bytes], record: Path, last_s: float) -> None:
        self._process = process
        self._record = record
        self._last_s = last_s
        self._left = bytearray()
        self._done: Json | None = None

    @classmethod
    def begin(cls, directory: Path, node: str, group: str, those: Sequence[Hooked]) -> HookWatch:
        """Runs each `before`, in this order. HOOK_FAILED if one of them fails: then every `after` has run."""
        deadline_s = min(each.hooks.timeout_s for each in those)
        spec = _spec(directory / f"{uuid.uuid4()}.json", node, group, those)
        with disk_errors(directory):
            make_own_dir(directory)
        record = Path(spec["record"])
        with _lock:
            _under_way.add(record)
        try:
            write_json(record, spec)
            watch = cls._started({**spec, "deadline_s": deadline_s, "recover": False})
        except BaseException:
            _ended(record)
            raise
        answer = watch.next(deadline_s + ANSWER_MAX_S)
        if answer is not None and answer["said"] == "rest":
            return watch
        watch.end()
        if answer is None or answer["said"] != "failed":
            raise _refused("the process that runs the hooks ended before they did", volume=those[0].volume)
        raise _refused(f"`before` of {answer['volume']}: {answer['why']}", volume=answer["volume"])

    @classmethod
    def recover(cls, spec: Json) -> HookWatch:
        """Runs each `after` of a record that was left behind."""
        return cls._started({**spec, "recover": True, "deadline_s": 0.0})

    @classmethod
    def _started(cls, spec: Json) -> HookWatch:
        last_s = sum(hook["timeout_s"] for hook in spec["hooks"])
        # Another may be at it: it holds until its own deadline at most, and then runs every `after`.
        lock_max_s = 2 * last_s + LOCK_MARGIN_S if spec["recover"] else LOCK_MARGIN_S
        spec = {**spec, "lock_max_s": lock_max_s}
        command = [sys.executable, "-I", "-S", hookwatch.__file__]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", bufsize=0, start_new_session=True
            )
        except OSError as error:
            raise _refused(f"the process that runs the hooks could not be started: {error}") from error
        watch = cls(process, Path(spec["record"]), last_s + lock_max_s)
        watch._tell(json.dumps(spec).encode() + b"\n")
        return watch

    def release(self) -> None:
        """Ends what is held. HOOK_FAILED if the deadline had passed: then nothing that was done within counts."""
        self._tell(b".")
        answer = self.next(ANSWER_MAX_S)
        if answer is None or answer["said"] != "held":
            raise _refused("the deadline had passed before the snapshot was finished: what `before` held was let go")

    def end(self) -> dict[str, str]:
        """Waits until every `after` has ended: why those failed that did, by volume. The first call alone waits."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if self._done is None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            until = time.monotonic() + self._last_s + ANSWER_MAX_S
            answer: Json | None = {}
            while answer is not None and answer.get("said") != "done":
                answer = self.next(until - time.monotonic())
            self._done = answer if answer is not None else {"failed": {"": "they have not ended yet"}}
            process.stdout.close()
            # One that has not ended by now goes on by itself; it is reaped at the next start of a process.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ANSWER_MAX_S if answer is not None else 0)
            _ended(self._record)
        failed: dict[str, str] = self._done["failed"]
        return failed

    def _tell(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: its answer will be missing
            self._process.stdin.write(data)

    def next(self, timeout_s: float) -> Json | None:
        """The next line that is no news of a program; None at its end, or if none comes in time."""
        until = time.monotonic() + timeout_s
        while (line := self._line(until)) is not None:
            said: Json = json.loads(line)
            if said["said"] != "ran":
                return said
            _log_run(said)
        return None

    def _line(self, until: float) -> bytes | None:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._left:
            readable, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            part = os.read(fd, _LINE_BYTES_MAX) if readable else b""
            if not part:
                return None
            self._left += part
        line, _, rest = self._left.partition(b"\n")
        self._left = bytearray(rest)
        return bytes(line)


def _ended(record: Path) -> None:
    with _lock:
        _under_way.discard(record)


def under_way(record: Path) -> bool:
    """Whether it is of an order of this process that has not ended."""
    with _lock:
        return record in _under_way


def program_fault(words: Sequence[str]) -> str:
    """Why a program must not be run; empty if it may be. Whoever can write to it is as mighty as the agent."""
    path = Path(words[0])
    try:
        found = path.stat()
    except OSError as error:
        return f"{path}: {(error.strerror or str(error)).lower()}"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is no file"
    if not found.st_mode & 0o111:
        return f"{path} is not executable"
    real = path.resolve()
    # Also where links to it lie: whoever can replace one of them chooses the program.
    for place in dict.fromkeys((real, *real.parents, *path.absolute().parents)):
        at = place.stat()
        if at.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to user {at.st_uid}: it must belong to root, or to the user that runs the agent"
        sticky = stat.S_ISDIR(at.st_mode) and at.st_mode & stat.S_ISVTX
        if at.st_mode & _OTHERS_MAY_WRITE and not sticky:
            return f"{place} can be written to by others than its owner"
    return ""


def user_fault(name: str) -> str:
    """Why hooks cannot be run as that user; empty if they can."""
    if not name:
        return ""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return f"no user is named {name!r}"
    if os.geteuid() not in (0, found.pw_uid):
        return f"only root may run programs as {name}"
    return ""


def _spec(record: Path, node: str, group: str, those: Sequence[Hooked]) -> Json:
    for each in those:
        faults = [program_fault(words) for words in (each.hooks.before, each.hooks.after) if words]
        fault = next(filter(None, [user_fault(each.hooks.user), *faults]), "")
        if fault:
            raise _refused(f"a hook of {each.volume} may not be run: {fault}", volume=each.volume)
    return {"record": str(record), "hooks": [_hook(node, group, each) for each in those]}


def _hook(node: str, group: str, hooked: Hooked) -> Json:
    hooks = hooked.hooks
    user = pwd.getpwnam(hooks.user) if hooks.user else _myself()
    env = {
        "PATH": PATH,
        "LC_ALL": "C",
        "HOME": user.pw_dir if user is not None else "/",
        "USER": user.pw_name if user is not None else str(os.geteuid()),
        "RESILVER_VOLUME": hooked.volume,
        "RESILVER_NODE": node,
        "RESILVER_CP": hooked.cp,
        "RESILVER_GROUP": group,
    }
    run_as: Json = {"uid": None, "gid": None, "groups": None}
    if user is not None and user.pw_uid != os.geteuid():
        run_as = {"uid": user.pw_uid, "gid": user.pw_gid, "groups": os.getgrouplist(user.pw_name, user.pw_gid)}
    words = {"before": list(hooks.before), "after": list(hooks.after)}
    return {"volume": hooked.volume, **words, "timeout_s": hooks.timeout_s, "env": env, **run_as}


def _myself() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError:
        return None


def _log_run(said: dict[str, Any]) -> None:
    about = {key: said[key] for key in ("volume", "phase", "seconds", "output")}
    if said["why"]:
        _log.error("a hook failed", why=said["why"], **about)
    else:
        _log.info("a hook has run", **about)


def _refused(why: str, *, volume: str = "") -> ResilverError:
    return Refused("HOOK_FAILED", f"no consistency point was taken: {why}", **({"volume": volume} if volume else {}))

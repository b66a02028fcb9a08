"""What a target is: a function that takes any bytes, and raises for nothing but a defect.

The property is the same for all of them. What is not understood is refused with the errors that the function under
test documents, and a target lets only those pass; everything else that comes out of it, an assertion of its own too, is
a defect. Where there is an encoder, what was read is written and read again, and has to be the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from agent.disk.durable import sealed

SCRATCH: Final = "RESILVER_FUZZ_SCRATCH"
CORPORA: Final = Path(__file__).parent / "corpora"
INPUT_BYTES_MAX: Final = 64 << 10

Run = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Target:
    """`form` says how inputs are changed: `json` keeps it JSON half of the time, `bytes` and `text` do not ask."""

    name: str
    run: Run
    form: str = "bytes"

    @property
    def corpus(self) -> Path:
        return CORPORA / self.name

    def seeds(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.corpus.iterdir()) if path.is_file()]


TARGETS: Final[dict[str, Target]] = {}


def target(name: str, form: str = "bytes") -> Callable[[Run], Run]:
    """Registers a function under that name."""

    def register(run: Run) -> Run:
        assert name not in TARGETS, f"two targets are called {name}"
        TARGETS[name] = Target(name, run, form)
        return run

    return register


@cache
def _scratch(process: int) -> Path:
    """A directory in memory for this process, or within the one that whoever started it will remove."""
    if given := os.environ.get(SCRATCH):
        return Path(given)
    shared = Path("/dev/shm")  # noqa: S108 - the directory within it is private
    return Path(
        tempfile.mkdtemp(prefix=f"resilver-fuzz-{process}-", dir=shared if os.access(shared, os.W_OK) else None)
    )


def scratch() -> Path:
    return _scratch(os.getpid())


def sweep() -> None:
    """At the end of whoever uses a scratch of its own."""
    shutil.rmtree(scratch(), ignore_errors=True)
    _scratch.cache_clear()


@contextlib.contextmanager
def fresh(name: str) -> Iterator[Path]:
    """An empty directory of that name, gone after the block."""
    directory = scratch() / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def as_json(data: bytes) -> Any:
    """The value that the bytes are, None if they are no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def put(path: Path, data: bytes) -> bool:
    """Writes the bytes as a sealed value, with a digest that fits; False if they are no JSON object.

    So a target is not held up by the digest, which whoever writes the file can compute as well.
    """
    value = as_json(data)
    if not isinstance(value, dict):
        return False
    try:
        path.write_bytes(sealed(value))
    except (ValueError, RecursionError):  # numbers of thousands of digits, half characters, too deep
        return False
    return True


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, to see that nothing was changed."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}

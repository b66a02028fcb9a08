"""Small files that survive a crash, and damage that is told from absence."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.disk.durable import append_log, disk_error, fsync_dir, make_dir, read_json, read_log, remove_file, write_json
from resilver.errors import Damaged, Refused

VALUE = {"name": "vm1", "n": 3, "list": [1, 2.5, None, True], "ü": {"x": "y"}}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def test_a_value_comes_back(tmp_path):
    path = tmp_path / "value.json"
    assert read_json(path) is None
    write_json(path, VALUE)
    assert read_json(path) == VALUE
    write_json(path, {})
    assert read_json(path) == {}
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    remove_file(path)
    remove_file(path)
    assert read_json(path) is None


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=st.dictionaries(st.text(), anything))
def test_any_value_comes_back(tmp_path, value):
    write_json(tmp_path / "v", value)
    assert read_json(tmp_path / "v") == value


def test_every_bit_and_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"id": "s1", "n": 7})
    raw = path.read_bytes()
    for length in range(len(raw) - 1):
        path.write_bytes(raw[:length])
        if raw[:length].strip() == raw.strip():
            continue
        with pytest.raises(Damaged, match="value"):
            read_json(path)
    for at in range(len(raw)):
        for bit in (0, 3, 6):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            path.write_bytes(bytes(changed))
            with contextlib.suppress(Damaged):
                assert read_json(path) == {"id": "s1", "n": 7}, "only white space may change without a word"


def test_a_log_grows_and_forgets_a_torn_end(tmp_path):
    path = tmp_path / "log"
    assert read_log(path) == []
    for number in range(3):
        append_log(path, {"n": number})
    whole = path.read_bytes()
    for torn in (b"{", b'{"format": 1}', b"\0" * 700, whole[:50], b"garbage\n"):
        path.write_bytes(whole + torn)
        assert [value["n"] for value in read_log(path)] == [0, 1, 2]
    append_log(path, {"n": 3})
    assert [value["n"] for value in read_log(path)] == [0, 1, 2, 3]
    assert path.stat().st_mode & 0o777 == 0o600


def test_damage_within_a_log_is_no_torn_end(tmp_path):
    path = tmp_path / "log"
    for number in range(3):
        append_log(path, {"n": number})
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(bytes(raw))
    for attempt in (lambda: read_log(path), lambda: append_log(path, {"n": 9})):
        with pytest.raises(Damaged, match="log"):
            attempt()
    assert path.read_bytes() == bytes(raw)


def test_a_failed_write_leaves_the_old_value(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, VALUE)

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused) as refused:
        write_json(path, {})
    assert refused.value.reason == "NO_SPACE"
    monkeypatch.undo()
    assert read_json(path) == VALUE
    assert list(tmp_path.iterdir()) == [path]


def test_directories_are_private(tmp_path):
    make_dir(tmp_path / "a" / "b")
    make_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    fsync_dir(tmp_path / "a")
    with pytest.raises(Damaged, match="nowhere"):
        write_json(tmp_path / "nowhere" / "v", {})


def test_errors_of_the_disk():
    assert disk_error(OSError(errno.ENOSPC, "x"), "/p").reason == "NO_SPACE"
    assert disk_error(OSError(errno.EDQUOT, "x"), "/p").reason == "NO_SPACE"
    assert disk_error(OSError(errno.EIO, "Input/output error"), "/p").message == "/p: Input/output error"

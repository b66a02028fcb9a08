"""What was read of a replica's records is not read again, and nothing that changes is missed for that."""

from __future__ import annotations

import os
import shutil

import pytest

from agent.backends import image_kept, image_layout, mandate
from agent.backends.base import NewSnapshot
from agent.backends.image import ImageBackend
from resilver.errors import Damaged
from resilver.lineage import ConsistencyPoint
from resilver.volume import Grant, VolumeRecord

COUNT = 30


def take(backend, number):
    parent = f"s{number - 1}" if number else ""
    backend.take_snapshot(NewSnapshot(f"s{number}", "V", ConsistencyPoint(1, number + 1), parent, "e1", number + 1))


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """A volume with a long lineage, of which everything has been read, and how many records are read from then on."""
    monkeypatch.setattr(image_kept, "FRESH_NS", -1)  # a test changes nothing twice within a tick of the clock
    (tmp_path / "vm1.img").write_bytes(os.urandom(4096))
    made = ImageBackend("vm1", tmp_path / "vm1.img", tmp_path / "kept", reserve_min_bytes=0)
    made.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))
    for number in range(COUNT):
        take(made, number)
    assert len(made.examine().lineage) == COUNT
    read = []
    load = image_layout.load_stored

    def load_stored(directory):
        read.append(directory.name)
        return load(directory)

    monkeypatch.setattr(image_layout, "load_stored", load_stored)
    made.read = read
    return made


def test_what_has_not_changed_is_not_read_again(backend):
    first = backend.examine(compare_live=False)
    assert backend.examine(compare_live=False).lineage is first.lineage
    assert backend.read == []
    take(backend, COUNT)
    assert len(backend.examine().lineage) == COUNT + 1
    assert set(backend.read) <= {f"s{COUNT}", f"s{COUNT - 1}"}, "the new one, and the tip before"


def test_what_has_changed_is_read(backend, tmp_path):
    (tmp_path / "kept/s3/data").unlink()
    assert [one.id for one in backend.examine().lineage if not one.present] == ["s3"]
    shutil.rmtree(tmp_path / "kept/s0")
    assert len(backend.examine().lineage) == COUNT - 1
    assert backend.read == []
    record = tmp_path / "kept/s5/record.json"
    record.write_bytes(record.read_bytes().replace(b"s4", b"s3"))
    with pytest.raises(Damaged, match=r"s5/record\.json"):
        backend.examine()
    assert backend.read == ["s5"]


def test_record_and_grant_are_read_when_they_are_others(backend, tmp_path, monkeypatch):
    backend.examine()
    read = []
    whole = mandate.read_json
    monkeypatch.setattr(mandate, "read_json", lambda path: read.append(path.name) or whole(path))
    found = backend.examine()
    assert (found.record.epoch, found.grant) == (1, None)
    assert "volume.json" not in read
    backend.save_record(VolumeRecord("vm1", "V", 2, "e2", "a"))
    backend.save_grant(Grant("V", 2, "e2"))
    for _ in range(2):
        found = backend.examine()
        assert (found.record.epoch, found.grant) == (2, Grant("V", 2, "e2"))
    assert read.count("volume.json") == 1
    backend.save_grant(None)
    assert backend.examine().grant is None
    (tmp_path / "kept/volume.json").write_text("{}")
    with pytest.raises(Damaged, match=r"volume\.json"):
        backend.examine()

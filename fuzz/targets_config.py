"""What operators write: configurations with what they include, addresses, stores, names."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fuzz.target import fresh, target
from resilver.address import parse_address
from resilver.config import load_agent_config, load_coordinator_config, parse_store
from resilver.errors import Invalid
from resilver.inspection import dump, load
from resilver.names import parse_name

_INCLUDES = 'cluster = "c"\ncoordinators = ["127.0.0.1:1"]\ninclude = ["part.toml"]\n'


@target("agent_toml", form="text")
def agent_toml(data: bytes) -> None:
    """agent.toml, and the same as a file that it includes."""
    with fresh("config") as directory:
        path = directory / "agent.toml"
        path.write_bytes(data)
        if b"**" not in data and b"/" not in data.partition(b"include")[2].partition(b"\n")[0]:
            # What an operator asks to be looked for in the whole file system is looked for there.
            with contextlib.suppress(Invalid):
                load_agent_config(path)
        path.write_text(_INCLUDES)
        (directory / "part.toml").write_bytes(data)
        with contextlib.suppress(Invalid):
            load_agent_config(path)


@target("coordinator_toml", form="text")
def coordinator_toml(data: bytes) -> None:
    with fresh("config") as directory:
        path = directory / "coordinator.toml"
        path.write_bytes(data)
        with contextlib.suppress(Invalid):
            load_coordinator_config(path)


@target("words", form="text")
def words(data: bytes) -> None:
    """Single texts: ValueError says what would be right."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError):
        address = parse_address(text)
        assert parse_address(str(address)) == address
    with contextlib.suppress(ValueError):
        where = parse_store(text)
        assert isinstance(where, Path) or where
    with contextlib.suppress(ValueError):
        name = parse_name(text)
        assert parse_name(str(name)) == name


@target("inspection", form="json")
def inspection(data: bytes) -> None:
    """What `resilver inspect -o json` prints; ValueError for anything else."""
    with contextlib.suppress(ValueError):
        found = load(data)
        assert load(dump(found).encode()) == found

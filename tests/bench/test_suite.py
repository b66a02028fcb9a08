"""`make bench` at a tiny size, so that it is there when it is wanted; its figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.suite import bars, report
from tests.loopfs import needs_root

MEMORY = Path("/dev/shm")  # the suite makes a private directory in it
TINY = ("--mib", "8", "--rounds", "1", "--place", str(MEMORY if MEMORY.is_dir() else "/tmp"))


def ran(out: Path, *words: str) -> dict[str, Any]:
    """What the suite's JSON says after a run: every competitor with its runs, or with why there are none."""
    command = [sys.executable, "-m", "bench.suite", *TINY, "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((out / report.RAW).read_text())
    page = (out / report.PAGE).read_text()
    for each in found.values():
        assert f"## {each['title']}" in page
        assert all(bool(entry["runs"]) is not bool(entry["missing"]) for entry in each["entries"])
        assert all(f"| {entry['name']} | " in page for entry in each["entries"])
    return found


@needs_root
@pytest.mark.timeout(240)
def test_us_and_some_others(tmp_path: Path) -> None:
    who = ("limit", "resilver", "daemon", "cold")
    found = ran(tmp_path, "--only", "selecting", "--only", "delta", *(word for one in who for word in ("--who", one)))
    names = {entry["name"] for each in found.values() for entry in each["entries"] if entry["runs"]}
    assert names == {bars.LIMIT, bars.OURS, bars.WHOLE, bars.RSYNC[1], "8 MiB, cold", "128 MiB, cold"}
    ours = bars.entry_of(found["delta"], bars.OURS)
    assert ours is not None
    assert 1 <= bars.wires(found["delta"], ours)[0] < 10
    assert {bar.what for bar in bars.bars(found) if bar.found is not None} >= {
        "Selecting, cold",
        "Delta: over the limit, read-back and all",
        "Peak memory of an agent in all of it",
    }


@needs_root
@pytest.mark.timeout(900)
def test_every_case_and_everybody(tmp_path: Path) -> None:
    found = ran(tmp_path)
    stories = [run for name in bars.STORIES for entry in found[name]["entries"] for run in entry["runs"]]
    assert len(stories) == 5
    assert sum(run["parts"]["killed_at_bytes"] > 0 for run in stories) == 3
    ours = [entry for each in found.values() for entry in each["entries"] if entry["name"] in {bars.OURS, bars.WHOLE}]
    assert len(ours) == 4
    assert all(entry["runs"] for entry in ours)


def entry(name: str, *seconds: float, **parts: float) -> dict[str, Any]:
    run = {"cpu_s": 1.0, "peak_bytes": 100 << 20, "wire_bytes": 1005, "read_bytes": 0, "parts": parts}
    return {
        "name": name,
        "how": "",
        "missing": "",
        "runs": [{**run, "round": n, "time_s": s} for n, s in enumerate(seconds)],
    }


def case(name: str, *entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"name": name, "changed_bytes": 1000, "entries": list(entries)}}


def rows(known: dict[str, Any]) -> dict[str, bars.Bar]:
    return {bar.what: bar for bar in bars.bars(known)}


def test_bars_compare_round_by_round() -> None:
    # The third round was slow for both: the medians alone would say 1.0.
    known = case("delta", entry(bars.LIMIT, 1.0, 2.0, 9.0), entry(bars.OURS, 1.4, 2.8, 12.6))
    bar = rows(known)["Delta: over the limit, read-back and all"]
    assert (bar.found, bar.met) == ("1.4 (1.4 … 1.4)", True)
    assert not rows(case("delta", entry(bars.LIMIT, 1.0), entry(bars.OURS, 1.6)))[bar.what].met


def test_what_was_not_measured_is_not_reached() -> None:
    unmeasured = rows({})
    assert not any(bar.met for bar in unmeasured.values())
    assert "not measured" in unmeasured["Two capped sources: rate over one's"].row
    one_alone = rows(case("sources", entry(bars.ONE, 1.0, rate_bytes_per_s=50.0, resent_bytes=0.0)))
    assert one_alone["Two capped sources: rate over one's"].found is None


def test_of_two_sources_the_rate_counts() -> None:
    known = case(
        "sources",
        entry(bars.ONE, 9.0, rate_bytes_per_s=50.0, resent_bytes=0),
        entry(bars.TWO, 8.0, rate_bytes_per_s=95.0, resent_bytes=0),
        entry(bars.ONE_DIES, 8.0, rate_bytes_per_s=60.0, resent_bytes=float(17 << 20)),
    )
    found = rows(known)
    assert found["Two capped sources: rate over one's"].met
    assert not found["One of two killed at half: sent again"].met

"""What was found, as a page, as JSON and as plots.

The JSON holds every run of every case; page and plots are made from it alone. The least and the most stand beside each
median: a ratio whose spreads overlap says little.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.suite.bars import LIMIT, MIB, OURS, STORIES, Found, bars, entry_of, ratios, times

PAGE: Final = "suite.md"
RAW: Final = "suite.json"
_HASH_SALT: Final = "resilver"  # so that the same figures give the same file

HEAD: Final = """# Us and the others

Made by `make bench`, which anybody can run as root on Debian: us and the others on the same change, in the same run, in
turn, several times. Absolute times are of one machine; the ratios are what to keep. `suite.json` has every run.

A process that a daemon would have at hand has started before the clock does, and the target stands at the base. The
clock stops when the target's file system has been synced, for everybody. *Over the limit* and *over ours* are medians
of the ratios of each round. CPU is that of all processes, without what the kernel does in threads of its own; peak
memory is that of the largest process; the wire is the loopback interface of a network namespace of the suite's own,
headers and all, where nothing else is said; what was read is what the loop devices gave. *The limit* is two processes
that were told the ranges beforehand and do nothing but copy them: no digests, no journal, nothing read back. It writes
each range into its place; ours shares small ones into theirs on XFS, which costs less, so it may be below the limit.

## What is to be reached

| | wanted | found, and its least and most | reached |
| --- | --- | --- | --- |
"""


def machine() -> Found:
    """Where this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "date": dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d"),
        "processor": f"{len(os.sched_getaffinity(0))} cores of {model}",
        "memory_mib": int(Path("/proc/meminfo").read_text().split()[1]) // 1024,
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 1),
    }


def middle(entry: Found, what: str) -> float:
    return float(median(run[what] for run in entry["runs"]))


Column = tuple[str, Callable[[Found, Found], str]]


def _ratio(name: str) -> Callable[[Found, Found], str]:
    def cell(case: Found, entry: Found) -> str:
        found = ratios(entry, entry_of(case, name))
        return f"{median(found):.2f}" if found else ""

    return cell


def _part(name: str, unit: float, text: str) -> Callable[[Found, Found], str]:
    return lambda _case, entry: text.format(max(run["parts"].get(name, 0.0) for run in entry["runs"]) / unit)


def _wire(case: Found, entry: Found) -> str:
    wire = middle(entry, "wire_bytes")
    return f"{wire / case['changed_bytes']:.4f}" if wire >= 0 else "not counted"


def _read(_case: Found, entry: Found) -> str:
    read = middle(entry, "read_bytes")
    return f"{read / MIB:,.0f} MiB" if read >= 0 else "not counted"


TIMES: Final[tuple[Column, ...]] = (
    ("median", lambda _case, entry: f"{median(times(entry)):.3f} s"),
    ("least … most", lambda _case, entry: f"{min(times(entry)):.3f} … {max(times(entry)):.3f}"),
    ("runs", lambda _case, entry: str(len(entry["runs"]))),
)
COMPARED: Final[tuple[Column, ...]] = (("over the limit", _ratio(LIMIT)), ("over ours", _ratio(OURS)))
TOLD: Final[tuple[Column, ...]] = (
    (
        "rate",
        lambda _case, entry: f"{median(run['parts']['rate_bytes_per_s'] for run in entry['runs']) / 1e6:.1f} MB/s",
    ),
    ("killed after", _part("killed_at_bytes", MIB, "{:.0f} MiB")),
    ("sent again, most", _part("resent_bytes", MIB, "{:.2f} MiB")),
)
WIRE: Final[tuple[Column, ...]] = (("wire / changed", _wire),)
COSTS: Final[tuple[Column, ...]] = (
    ("CPU", lambda _case, entry: f"{middle(entry, 'cpu_s'):.2f} s"),
    ("peak memory", lambda _case, entry: f"{max(run['peak_bytes'] for run in entry['runs']) / MIB:.0f} MiB"),
    ("read from disk", _read),
)


def columns(case: Found) -> tuple[Column, ...]:
    """What there is to say in such a case."""
    if case["name"] in STORIES:
        return (*TIMES, *TOLD, *WIRE, *COSTS)
    if case["name"] == "selecting":
        return (*TIMES, *COSTS)
    return (*TIMES, *COMPARED, *WIRE, *COSTS)


def table(case: Found) -> str:
    """One case's competitors, a row each."""
    shown = columns(case)
    rows = [f"| | {' | '.join(title for title, _ in shown)} |", f"|{' --- |' * (len(shown) + 1)}"]
    for entry in case["entries"]:
        cells = [cell(case, entry) for _, cell in shown] if entry["runs"] else [entry["missing"].replace("\n", " ")]
        rows.append(f"| {' | '.join([entry['name'], *cells])} |{' |' * (len(shown) - len(cells))}")
    return "\n".join(rows)


def parts(case: Found) -> str:
    """Our own runs, part by part."""
    entry = entry_of(case, OURS)
    if entry is None:
        return ""
    each = {name: median(run["parts"][name] for run in entry["runs"]) for name in ("transfer_s", "readback_s")}
    said = f"Of ours the transfer took {each['transfer_s']:.3f} s and the read-back {each['readback_s']:.3f} s"
    bound = entry_of(case, LIMIT)
    if bound is None:
        return f"{said}."
    return f"{said}: the transfer alone is {each['transfer_s'] / median(times(bound)):.2f} times the limit."


def section(case: Found) -> str:
    here = case["machine"]
    facts = "; ".join(
        f"{name.replace('_', ' ')}: {found:,}" if isinstance(found, int) else f"{name}: {found}"
        for name, found in case["facts"].items()
    )
    where = f"{here['date']}, {here['processor']}, {here['memory_mib']:,} MiB, Linux {here['kernel']}"
    words = [
        f"## {case['title']}",
        case["about"],
        table(case),
        parts(case),
        f"({facts})" if facts else "",
        f"{where}, a load of {here['load']:g} at the end.",
        f"![{case['title']}](suite-{case['name']}.svg)" if case["plotted"] else "",
        "\n".join(f"* **{entry['name']}**: {entry['how']}" for entry in case["entries"]),
    ]
    return "\n\n".join(word for word in words if word)


def page(known: dict[str, Found]) -> str:
    reached = HEAD + "\n".join(bar.row for bar in bars(known))
    return "\n\n".join([reached, *(section(case) for case in known.values())]) + "\n"


def save(out: Path, case: Found, order: list[str]) -> None:
    """Puts a case among those that are there, and makes page and plot anew."""
    raw = out / RAW
    known: dict[str, Found] = json.loads(raw.read_text()) if raw.exists() else {}
    case["machine"] = machine()
    case["plotted"] = plot(out / f"suite-{case['name']}.svg", case)
    known[case["name"]] = case
    known = {name: known[name] for name in order if name in known}
    raw.write_text(json.dumps(known, indent=1) + "\n")
    (out / PAGE).write_text(page(known))


def plot(path: Path, case: Found) -> bool:
    """Medians as bars with their spread; False if matplotlib is not here."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  only the suite's own environment has it
    except ImportError:
        return False
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = _HASH_SALT
    from matplotlib import pyplot as plt  # noqa: PLC0415

    shown = [entry for entry in case["entries"] if entry["runs"]][::-1]
    middles = [median(times(entry)) for entry in shown]
    below = [found - min(times(entry)) for found, entry in zip(middles, shown, strict=True)]
    above = [max(times(entry)) - found for found, entry in zip(middles, shown, strict=True)]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(shown) + 1.4))
    colours = ["#2a6fbb" if "resilver" in entry["name"] else "#9a9a9a" for entry in shown]
    names: Any = [entry["name"] for entry in shown]
    bars_drawn = axes.barh(names, middles, xerr=[below, above], color=colours, capsize=3)
    axes.set_xscale("log")
    axes.set_xlim(right=max(map(max, map(times, shown))) * 3)
    axes.set_xlabel("seconds: median, and from the least to the most")
    axes.set_title(case["title"])
    axes.bar_label(bars_drawn, labels=[f"{found:.2f} s" for found in middles], padding=6)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
    return True

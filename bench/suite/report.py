"""What was found, as a page, as JSON and as plots.

The JSON holds every run of every case; page and plots are made from it alone. Medians are compared, and the least and
the most stand beside them: a ratio whose spreads overlap says little.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Any, Final

MIB: Final = 1 << 20
PAGE: Final = "suite.md"
RAW: Final = "suite.json"
LIMIT: Final = "the limit"
OURS: Final = "resilver, transfer and read-back"

Found = dict[str, Any]


def machine() -> Found:
    """Where this was measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    total = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    now = dt.datetime.now(tz=dt.UTC)
    return {
        "date": now.strftime("%Y-%m-%d"),
        "processor": f"{len(os.sched_getaffinity(0))} cores of {model}",
        "memory_mib": total,
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
    }


def times(entry: Found) -> list[float]:
    return [run["time_s"] for run in entry["runs"]]


def middle(entry: Found, what: str) -> float:
    return float(median(run[what] for run in entry["runs"]))


def by_name(case: Found, name: str) -> Found | None:
    return next((entry for entry in case["entries"] if entry["name"] == name and entry["runs"]), None)


COLUMNS: Final = (
    *("", "median", "least … most", "runs", "over the limit", "over ours"),
    *("wire / changed", "CPU", "peak memory", "read from disk"),
)


def table(case: Found) -> str:
    """One case's competitors, a row each."""
    rows = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    bounds = [by_name(case, name) for name in (LIMIT, OURS)]
    rows += [row(case, entry, bounds) for entry in case["entries"]]
    return "\n".join(rows)


def row(case: Found, entry: Found, bounds: list[Found | None]) -> str:
    if not entry["runs"]:
        return f"| {entry['name']} | {entry['missing']} |{' |' * (len(COLUMNS) - 2)}"
    took = times(entry)
    ratios = [f"{median(took) / median(times(bound)):.2f}" if bound else "" for bound in bounds]
    wire, read = middle(entry, "wire_bytes"), middle(entry, "read_bytes")
    cells = (
        entry["name"],
        f"{median(took):.3f} s",
        f"{min(took):.3f} … {max(took):.3f}",
        str(len(took)),
        *ratios,
        f"{wire / case['changed_bytes']:.4f}" if wire >= 0 else "not counted",
        f"{middle(entry, 'cpu_s'):.2f} s",
        f"{max(run['peak_bytes'] for run in entry['runs']) / MIB:.0f} MiB",
        f"{read / MIB:,.0f} MiB" if read >= 0 else "not counted",
    )
    return f"| {' | '.join(cells)} |"


def parts(case: Found) -> str:
    """Our own runs, part by part."""
    entry = by_name(case, OURS)
    if entry is None:
        return ""
    each = {name: median(run["parts"][name] for run in entry["runs"]) for name in ("transfer_s", "readback_s")}
    said = f"Of ours the transfer took {each['transfer_s']:.3f} s and the read-back {each['readback_s']:.3f} s"
    bound = by_name(case, LIMIT)
    if bound is None:
        return f"{said}."
    return f"{said}: the transfer alone is {each['transfer_s'] / median(times(bound)):.2f} times the limit."


def section(case: Found) -> str:
    words = [f"## {case['title']}", case["about"], table(case), parts(case)]
    here = case["machine"]
    words.append(
        f"{here['date']}, {here['processor']}, {here['memory_mib']:,} MiB, Linux {here['kernel']}, "
        f"a load of {here['load_before']:.1f} before it began."
    )
    words.append(f"![{case['title']}](suite-{case['name']}.svg)" if case["plotted"] else "")
    words.append("\n".join(f"* **{entry['name']}**: {entry['how']}" for entry in case["entries"]))
    return "\n\n".join(word for word in words if word)


def save(out: Path, case: Found) -> None:
    """Puts a case among those that are there, and makes page and plot anew."""
    raw = out / RAW
    known: dict[str, Found] = json.loads(raw.read_text()) if raw.exists() else {}
    case["machine"] = machine()
    case["plotted"] = plot(out / f"suite-{case['name']}.svg", case)
    known[case["name"]] = case
    raw.write_text(json.dumps(known, indent=1) + "\n")
    (out / PAGE).write_text(page(known))


def page(known: dict[str, Found]) -> str:
    return "\n\n".join([HEAD, *(section(case) for case in known.values())]) + "\n"


HEAD: Final = """# Us and the others

Made by `make bench`: us and the others on the same change, in the same run, in turn. Absolute times are of one machine;
the ratios are what to keep. `suite.json` has every run."""


def plot(path: Path, case: Found) -> bool:
    """Medians as bars with their spread; False if matplotlib is not here."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  only the suite's own environment has it
    except ImportError:
        return False
    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    shown = [entry for entry in case["entries"] if entry["runs"]][::-1]
    mpl.rcParams["svg.hashsalt"] = "resilver"
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(shown) + 1.2))
    middles = [median(times(entry)) for entry in shown]
    spread = [
        [found - min(times(entry)) for found, entry in zip(middles, shown, strict=True)],
        [max(times(entry)) - found for found, entry in zip(middles, shown, strict=True)],
    ]
    colours = ["#2a6fbb" if "resilver" in entry["name"] else "#999999" for entry in shown]
    bars = axes.barh([entry["name"] for entry in shown], middles, xerr=spread, color=colours, capsize=3)
    axes.set_xscale("log")
    axes.set_xlabel("seconds, median; the line is from the least to the most")
    axes.set_title(case["title"])
    axes.bar_label(bars, labels=[f"{found:.2f} s" for found in middles], padding=6)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
    return True

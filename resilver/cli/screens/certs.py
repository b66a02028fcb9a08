"""Certificates: one row for each, and one in full."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.text import Text

from resilver import ca
from resilver.ca_show import ENDED, ENDING, GOOD, UNUSABLE
from resilver.cli.screens.layout import table
from resilver.cli.words import listing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from rich.table import Table

    from resilver.ca_show import Seen

_STYLES = {GOOD: "green", ENDING: "yellow", ENDED: "bold red", UNUSABLE: "bold red"}
_SHORT_CHARS = 23
"""Eight bytes of a fingerprint tell certificates of one cluster apart."""


def certificates(items: Sequence[Seen], now: datetime, within: timedelta) -> Table:
    rows = table("ROLE", "NAME", "STATE", "ENDS", "LEFT", "HOSTS", "SHA-256", "PATH", wrap=("HOSTS", "PATH"))
    for seen in items:
        hosts = ca.hosts_of(seen.cert)
        rows.add_row(
            _role(seen),
            Text(_name(seen), style="bold"),
            _state(seen, now, within),
            f"{seen.until:%Y-%m-%d}",
            f"{seen.days_left(now)}d",
            listing([*hosts.dns, *map(str, hosts.ip)]),
            ca.fingerprint(seen.cert)[:_SHORT_CHARS],
            str(seen.path),
        )
    return rows


def certificate(seen: Seen, now: datetime, within: timedelta) -> Table:
    """One in full, fingerprints whole."""
    rows = table("CERTIFICATE", str(seen.path), wrap=(str(seen.path),))
    hosts = ca.hosts_of(seen.cert)
    rows.add_row("role", _role(seen))
    rows.add_row("name", Text(_name(seen), style="bold"))
    rows.add_row("says", str(seen.name) if seen.name else "-")
    rows.add_row("hosts", listing([*hosts.dns, *map(str, hosts.ip)]))
    rows.add_row("state", _state(seen, now, within))
    rows.add_row("begins", _moment(seen.cert.not_valid_before_utc))
    rows.add_row("ends", f"{_moment(seen.until)}  ({seen.days_left(now)} days left)")
    rows.add_row("issuer", seen.cert.issuer.rfc4514_string())
    rows.add_row("serial", f"{seen.cert.serial_number:X}")
    rows.add_row("SHA-256", ca.fingerprint(seen.cert))
    rows.add_row("of the key", ca.key_fingerprint(seen.cert))
    return rows


def plain(seen: Seen, now: datetime, within: timedelta) -> dict[str, Any]:
    """The same as JSON, in the spelling of the rest."""
    hosts = ca.hosts_of(seen.cert)
    return {
        "role": _role(seen),
        "name": _name(seen) if seen.name or seen.authority else None,
        "cluster": seen.name.cluster if seen.name else _cluster(seen),
        "uri": str(seen.name) if seen.name else None,
        "state": seen.state(now, within),
        "problems": list(seen.problems),
        "begin_time": _rfc3339(seen.cert.not_valid_before_utc),
        "end_time": _rfc3339(seen.until),
        "days_left": seen.days_left(now),
        "dns": list(hosts.dns),
        "ip": [str(one) for one in hosts.ip],
        "serial": f"{seen.cert.serial_number:X}",
        "sha256": ca.fingerprint(seen.cert),
        "key_sha256": ca.key_fingerprint(seen.cert),
        "path": str(seen.path),
    }


def _role(seen: Seen) -> str:
    if seen.authority:
        return "authority"
    return seen.name.role.value if seen.name else "-"


def _name(seen: Seen) -> str:
    if seen.authority:
        return _cluster(seen) or seen.cert.subject.rfc4514_string()
    return seen.name.name if seen.name else "-"


def _cluster(seen: Seen) -> str | None:
    """The one cluster that an authority signs for; of any other authority there is none."""
    return ca.constrained_to(seen.cert)


def _state(seen: Seen, now: datetime, within: timedelta) -> Text:
    state = seen.state(now, within)
    return Text(state, style=_STYLES[state])


def _moment(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%SZ")


def _rfc3339(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

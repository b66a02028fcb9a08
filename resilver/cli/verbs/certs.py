"""`resilver certs init|issue|renew|show`: a small authority, on the machine where its directory lies. Asks nobody.

`show` ends with 0 if every certificate is good, 5 if some end soon, 3 if one has ended or cannot be used: a line of
cron is enough to be warned.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from resilver import ca, ca_files, ca_show
from resilver.cli.options import SPAN, Verb, Verbs
from resilver.cli.output import EXIT_PARTLY
from resilver.cli.screens import certs as screens
from resilver.cli.session import Session, pass_session
from resilver.config_rules import NAME_RULE
from resilver.errors import Invalid, Refused
from resilver.names import Name, Role

DIRECTORY_DEFAULT: Final = "/etc/resilver/ca"
WITHIN_S: Final = 14 * 86_400.0
"""Less than the 30 days before the end at which the documented line of cron renews: what that line did not do."""

C = TypeVar("C", bound=Callable[..., Any])


def _directory(command: C) -> C:
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=DIRECTORY_DEFAULT,
        envvar="RESILVER_CA_DIR",
        help=f"Where the authority lies. [env RESILVER_CA_DIR; default {DIRECTORY_DEFAULT}]",
    )(command)


def _hosts(command: C) -> C:
    # Not ours: they ask for the party's own name, and a machine may move.
    ip, dns = "An address that other programs dial", "A host name that other programs dial"
    command = click.option("--ip", multiple=True, metavar="ADDRESS", help=f"{ip}; may be repeated.")(command)
    return click.option("--dns", multiple=True, metavar="HOST", help=f"{dns}; may be repeated.")(command)


_ROLE: Final = click.Choice([role.value for role in Role])


@click.group(cls=Verbs)
def certs() -> None:
    """A small authority, and the certificates of a cluster."""


@certs.command("init", cls=Verb)
@click.option("--cluster", required=True, metavar="NAME", help="The cluster that it signs for, and no other.")
@click.option("--days", type=int, default=ca.AUTHORITY_DAYS, help=f"How long it lasts. [{ca.AUTHORITY_DAYS}]")
@click.option(
    "--also-trust",
    "others",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Authorities that the cluster trusts beside it, such as the one before it.",
)
@_directory
@pass_session
def init(session: Session, cluster: str, days: int, others: tuple[Path, ...], directory: Path) -> int:
    """Make an authority for a cluster. One that is there is never replaced."""
    trusted = tuple(cert for path in others for cert in ca_files.read_certs(path))
    made = ca_files.create(directory, ca.make_authority(cluster, ca.utc_now(), days=days), trusted)
    seen = _seen(made.directory / ca_files.CA_CERT, made.own)
    if session.output.json:
        session.output.emit({"authority": _plain(seen), "directory": str(directory)})
        return 0
    session.output.say(f"made the authority of {cluster} in {directory}, until {seen.until:%Y-%m-%d}")
    session.output.say(f"keep {directory / ca_files.CA_KEY} where nobody else reads it, and a copy off this machine")
    return 0


@certs.command("issue", cls=Verb)
@click.argument("role", type=_ROLE)
@click.argument("name")
@_hosts
@click.option("--days", type=int, default=ca.LEAF_DAYS, help=f"How long it lasts. [{ca.LEAF_DAYS}]")
@_directory
@pass_session
def issue(
    session: Session, *, role: str, name: str, dns: tuple[str, ...], ip: tuple[str, ...], days: int, directory: Path
) -> int:
    """Issue a certificate and its key to a party that has none yet."""
    hosts = ca.parse_hosts(dns, ip)
    with ca_files.locked(directory):
        authority = ca_files.load(directory)
        party = _name(authority, role, name)
        signed = ca.sign(authority.own, party, hosts, ca.utc_now(), days=days)
        place = ca_files.issue(authority, party, signed)
    seen = _seen(place / ca_files.CERT, signed)
    if session.output.json:
        session.output.emit({"certificate": _plain(seen)})
        return 0
    session.output.say(f"issued {_line(seen)}")
    session.output.say("copy that directory to its machine, mode and all, and name its files in [tls]")
    return 0


@certs.command("renew", cls=Verb, short_help="Replace certificates by new ones of the same name.")
@click.argument("role", type=_ROLE, required=False)
@click.argument("name", required=False)
@click.option("--all", "everybody", is_flag=True, help="Everybody who was issued one.")
@click.option("--within", type=SPAN, help="Only those that end within this time, such as 30d.")
@click.option("--keep-key", is_flag=True, help="Sign the same key again; otherwise each has a new one.")
@_hosts
@click.option("--days", type=int, help="How long it lasts. [as long as the one before]")
@_directory
@pass_session
def renew(
    session: Session,
    *,
    role: str | None,
    name: str | None,
    everybody: bool,
    within: float | None,
    keep_key: bool,
    dns: tuple[str, ...],
    ip: tuple[str, ...],
    days: int | None,
    directory: Path,
) -> int:
    """Replace certificates by new ones of the same name: a party's, or everybody's.

    The hosts stay as well, unless some are given.
    """
    hosts = ca.parse_hosts(dns, ip)
    if everybody == bool(role and name):
        raise Invalid("INVALID_FIELD", "name one party (ROLE NAME), or give --all, not both")
    if everybody and hosts:
        raise Invalid("INVALID_FIELD", "--dns and --ip are one party's: name it")
    renewed = []
    with ca_files.locked(directory):
        authority = ca_files.load(directory)
        wanted = ca_files.parties(authority) if everybody else [(Role(role), name or "")]
        for one in wanted:
            party = _name(authority, one[0].value, one[1])
            old = ca_files.party(authority, party)
            if within is not None and old.cert.not_valid_after_utc - ca.utc_now() >= timedelta(seconds=within):
                continue
            signed = ca.sign(
                authority.own,
                party,
                hosts or ca.hosts_of(old.cert),
                ca.utc_now(),
                days=days or _days(old),
                key=old.key if keep_key else None,
            )
            renewed.append(_seen(ca_files.renew(authority, party, signed) / ca_files.CERT, signed))
    if session.output.json:
        session.output.emit({"certificates": [_plain(seen) for seen in renewed]})
        return 0
    for seen in renewed:
        session.output.say(f"renewed {_line(seen)}")
    if not renewed:
        session.output.say("nothing to renew")
    return 0


@certs.command("show", cls=Verb)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[PATH]…")
@click.option("--within", type=SPAN, default=WITHIN_S, help="Warn of those that end within this time. [14d]")
@_directory
@pass_session
def show(session: Session, paths: tuple[Path, ...], within: float, directory: Path) -> int:
    """Show certificates, when they end, and what is wrong with them.

    PATH is a certificate, a directory with one as a daemon is given it, or an authority's directory; without one, the
    authority of this machine. Ends with 5 if some end soon, 3 if one has ended or cannot be used.
    """
    now, soon = ca.utc_now(), timedelta(seconds=within)
    found = [seen for path in paths or (directory,) for seen in ca_show.look(path, now)]
    if session.output.json:
        session.output.emit({"certificates": [screens.plain(seen, now, soon) for seen in found]})
    elif len(found) == 1:
        session.output.show(screens.certificate(found[0], now, soon))
    else:
        session.output.show(screens.certificates(found, now, soon))
    if not session.output.json:
        for seen in found:
            for problem in seen.problems:
                session.output.note(f"{seen.path}: {problem}")
    states = {seen.state(now, soon) for seen in found}
    if states & {ca_show.ENDED, ca_show.UNUSABLE}:
        return Refused.exit_code
    return EXIT_PARTLY if ca_show.ENDING in states else 0


def _name(authority: ca_files.Authority, role: str, name: str) -> Name:
    try:
        return Name(authority.cluster, Role(role), name)
    except ValueError as error:
        raise Invalid("INVALID_FIELD", f"NAME: {name[:80]!r} cannot be used: {NAME_RULE}", field="name") from error


def _days(old: ca.Signed) -> int:
    lasted = old.cert.not_valid_after_utc - old.cert.not_valid_before_utc - ca.BACKDATED
    return max(1, round(lasted / timedelta(days=1)))


def _seen(path: Path, signed: ca.Signed) -> ca_show.Seen:
    name = None if ca.is_authority(signed.cert) else ca.name_of(signed.cert)
    return ca_show.Seen(path, signed.cert, name)


def _plain(seen: ca_show.Seen) -> dict[str, Any]:
    return screens.plain(seen, ca.utc_now(), timedelta(seconds=WITHIN_S))


def _line(seen: ca_show.Seen) -> str:
    assert seen.name is not None, "what was signed names a party"
    hosts = ca.hosts_of(seen.cert)
    at = ", ".join([*hosts.dns, *map(str, hosts.ip)])
    return (
        f"{seen.name.role.value} {seen.name.name} of {seen.name.cluster} until {seen.until:%Y-%m-%d}"
        f"{f', at {at}' if at else ''}: {seen.path.parent}"
    )

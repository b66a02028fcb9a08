"""What single values of a configuration must fulfil, as pairs of a key and what would be right.

A rule yields its faults and never raises, so that the files' loaders decide what to do with the first one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from resilver.address import Address, parse_address

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
NAME_RULE: Final = "a name is 1 to 63 letters, digits, '.', '_' or '-', and starts with a letter or a digit"
AUTO: Final = "auto"
_CLEAR: Final = "plaintext is for loopback: set {without}, use 127.0.0.1 or [::1], or set insecure = true"

Fault = tuple[str, str]


def name_faults(**names: str) -> Iterator[Fault]:
    for field, name in names.items():
        if NAME.fullmatch(name) is None:
            yield field, f"{name!r} is no name: {NAME_RULE}"


def dial_faults(field: str, address: Address) -> Iterator[Fault]:
    if not address.host or not address.port:
        yield field, f"{str(address)!r} cannot be dialled: it needs a host and a port, such as 127.0.0.1:7400"


def advertise_faults(field: str, text: str) -> Iterator[Fault]:
    if text == AUTO:
        return
    try:
        address = parse_address(text)
    except ValueError as error:
        yield field, f'{error}; or "auto"'
        return
    yield from dial_faults(field, address)
    if address.every_interface:
        yield field, f'{text!r} is every interface: name the one that others dial, or write "auto"'


def absolute_faults(field: str, path: Path) -> Iterator[Fault]:
    if not path.is_absolute():
        yield field, f"{str(path)!r} is a relative path: write it from the root, such as /srv/{path.name or 'vm1.img'}"


def clash_faults(**listens: Address) -> Iterator[Fault]:
    earlier: dict[str, Address] = {}
    for field, address in listens.items():
        for other, taken in earlier.items():
            if address.clashes_with(taken):
                yield field, f"{address} is taken by {other} = {str(taken)!r}: give each its own port"
        earlier[field] = address


def clear_faults(addresses: dict[str, Address], *, allowed: bool, without: str = "[tls]") -> Iterator[Fault]:
    for field, address in addresses.items():
        if not allowed and not address.loopback:
            yield field, f"{address} is not loopback: {_CLEAR.format(without=without)}"


def tls_faults(ca: str, cert: str, key: str, *, insecure: bool) -> Iterator[Fault]:
    files = {"ca": ca, "cert": cert, "key": key}
    for field, path in files.items():
        if path:
            yield from absolute_faults(f"tls.{field}", Path(path))
        elif any(files.values()):
            yield f"tls.{field}", "is missing: TLS wants ca, cert and key together"
    if insecure and any(files.values()):
        yield "insecure", "is for a cluster without TLS: take insecure = true out, or [tls]"

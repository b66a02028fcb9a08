"""Where to listen and whom to dial: `host:port`, `[::1]:7400`, or `:7400` for every interface.

Names are resolved at each dial, never here.
"""

from __future__ import annotations

import re
from typing import Final, final

PORT_MAX: Final = 65535
_FORM: Final = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]*(?:%\w+)?)\]|(?P<host>[^\[\]:/\s]*))(?::(?P<port>[0-9]{1,5}))?")


@final
class Address:
    """Where to listen or whom to dial. An empty host is every interface; port 0 is any free one.

    Written by hand because msgspec would read a dataclass as a table, and an address is a text.
    """

    __slots__ = ("host", "port")
    host: str
    port: int

    def __init__(self, host: str, port: int) -> None:
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "port", port)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Address is frozen: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and (self.host, self.port) == (other.host, other.port)

    def __hash__(self) -> int:
        return hash((self.host, self.port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    @property
    def every_interface(self) -> bool:
        return self.host in {"", "::", "0.0.0.0"}  # noqa: S104 - compared, not bound

    @property
    def loopback(self) -> bool:
        """Whether nothing but this machine can be meant; names other than localhost are not resolved to find out."""
        return self.host in {"localhost", "::1"} or re.fullmatch(r"127(\.[0-9]{1,3}){3}", self.host) is not None

    def clashes_with(self, other: Address) -> bool:
        """Whether both cannot be listened on at once."""
        shared = self.host == other.host or self.every_interface or other.every_interface
        return self.port != 0 and self.port == other.port and shared


def parse_address(text: str, *, default_port: int | None = None) -> Address:
    """Reads `host:port`, `[::1]:7400` or `:7400`; raises ValueError with what would be right."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no address: write host:port, [::1]:7400 or :7400")
    host = match["six"] if match["six"] is not None else match["host"]
    if match["port"] is None and (default_port is None or not host):
        raise ValueError(f"{text!r} has no port: write {text or 'host'}:7400 with the port that is meant")
    port = int(match["port"]) if match["port"] is not None else int(default_port or 0)
    if port > PORT_MAX:
        raise ValueError(f"{text!r} has port {port}: ports go up to {PORT_MAX}")
    return Address(host, port)

"""Who a party is: what the subject alternative name of its certificate says.

`resilver://<cluster>/<role>/<name>`, with the roles of `Role`: a node is one agent, a coordinator is one of those who
may lead, an operator may change things, a viewer only reads. A certificate has exactly one such name; the DNS names
and addresses beside it are for the dialler, who checks the host, and say nothing of what its holder may do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from resilver.config_rules import NAME, NAME_RULE

SCHEME: Final = "resilver"
_FORM: Final = re.compile(rf"{SCHEME}://(?P<cluster>[^/]*)/(?P<role>[^/]*)/(?P<name>[^/]*)")


class Role(Enum):
    """What a certificate lets its holder do."""

    NODE = "node"
    COORDINATOR = "coordinator"
    OPERATOR = "operator"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class Name:
    """One party of one cluster. Raises ValueError for a cluster or a name that is no name."""

    cluster: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        for what, text in (("cluster", self.cluster), ("name", self.name)):
            if NAME.fullmatch(text) is None:
                raise ValueError(f"{what} {text!r} is no name: {NAME_RULE}")

    def __str__(self) -> str:
        return f"{SCHEME}://{self.cluster}/{self.role.value}/{self.name}"


def parse_name(uri: str) -> Name:
    """`resilver://prod/node/a` as a Name; ValueError for everything else, whatever comes close."""
    found = _FORM.fullmatch(uri)
    if found is None:
        raise ValueError(f"{uri!r} is no name of a party: it is written {SCHEME}://<cluster>/<role>/<name>")
    try:
        role = Role(found["role"])
    except ValueError:
        roles = ", ".join(role.value for role in Role)
        raise ValueError(f"{uri!r} has the role {found['role']!r}, which is none of {roles}") from None
    return Name(found["cluster"], role, found["name"])


def only_name(alternative_names: Iterable[str]) -> Name:
    """The one name of a party among a certificate's subject alternative names.

    Raises ValueError if there is none or more than one: a certificate that says two things of its holder says nothing.
    """
    found = [one for one in alternative_names if one.lower().startswith(f"{SCHEME}:")]
    if not found:
        raise ValueError(f"the certificate names no party: it needs one URI {SCHEME}://<cluster>/<role>/<name>")
    if len(found) > 1:
        raise ValueError(f"the certificate names more than one party: {', '.join(sorted(found))}")
    return parse_name(found[0])

"""What a certificate of this cluster must say, and by what name a dialler knows that it has reached the right one.

Everybody has one key, one certificate and the CA's certificate as PEM files. The certificate of a party, as `resilver
certs issue` writes it and as one brought along must be:

=============== ============================================== ======================================= ==============
role            URI in the subject alternative name, just one  DNS name beside it                      extended usage
=============== ============================================== ======================================= ==============
a coordinator   `resilver://<cluster>/coordinator/<name>`      `coordinator.<c>.resilver.internal`     server, client
a node          `resilver://<cluster>/node/<node>`             `<n>.node.<c>.resilver.internal`        server, client
an operator     `resilver://<cluster>/operator/<name>`         none                                    client
a viewer        `resilver://<cluster>/viewer/<name>`           none                                    client
=============== ============================================== ======================================= ==============

* `<c>` and `<n>` are `label(cluster)` and `label(node)`: the name itself where it is made of `a` to `z`, `0` to `9` and
  `-`. Every other character becomes `_` and its two hex digits (`host1.example` is `host1_2eexample`), and a label that
  would pass 63 characters is `__` and the first 40 hex digits of the name's SHA-256. Two names never have one label,
  however DNS takes upper case. `server_name(name)` answers the whole DNS name.
* The URI is what *servers* look at, in each call and on each connection of the block stream; it alone says what its
  holder may do. The DNS name is what gRPC's *diallers* look at, in the handshake: gRPC for Python checks nothing else
  of a server, and shows its caller no certificate. That is why who is dialled by gRPC has both, and why a CA must give
  a name below `resilver.internal` to nobody but whom the URI names, and never one with `*`.
* Hosts' names and addresses in a certificate are allowed and mean nothing: who is dialled is checked by its name, and
  may move. `resilver.internal` is looked up nowhere.
* Key usage, where it is given, has digital signature. The certificate of an operator or a viewer must not have the
  extended usage of a server. `cert` may hold intermediate certificates after the party's own; `ca` may hold several
  CAs, which is how one is replaced by another.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from resilver.names import Name, Role

SUFFIX: Final = "resilver.internal"
LABEL_CHARS_MAX: Final = 63

_ESCAPED: Final = re.compile(r"[^a-z0-9-]")


def label(name: str) -> str:
    """A name as one label of DNS; two names never have the same."""
    escaped = _ESCAPED.sub(lambda found: f"_{ord(found[0]):02x}", name)
    if len(escaped) <= LABEL_CHARS_MAX:
        return escaped
    return f"__{hashlib.sha256(name.encode()).hexdigest()[:40]}"


def server_name(name: Name) -> str:
    """The DNS name that is in the certificate of whoever is dialled; of coordinators any will do. ValueError else."""
    if name.role is Role.NODE:
        return f"{label(name.name)}.node.{label(name.cluster)}.{SUFFIX}"
    if name.role is Role.COORDINATOR:
        return f"coordinator.{label(name.cluster)}.{SUFFIX}"
    raise ValueError(f"nobody dials {name}")

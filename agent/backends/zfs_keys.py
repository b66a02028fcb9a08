"""What is encrypted stays encrypted: streams are plain, so where they go is looked at before one is asked for.

* A live copy whose key is not loaded may be one that its node was never to read: `zfs send -w` brought it there.
  Nothing is received for it.
* A delta becomes a clone of its base, and is encrypted as that is. A full copy is as what stands above it: it is
  refused where the live copy is encrypted and that is not.
* Beside an encrypted live copy, under one that is not, no stream is spooled.

A live copy that is plain, or none, is its operator's word that this node may have plain data.
"""

from __future__ import annotations

from agent.backends.zfs_layout import Layout
from agent.disk import zfs
from resilver.errors import Refused


def check(layout: Layout, base: str) -> None:
    """Refused as NOT_SUPPORTED if receiving onto that base, or a full copy, would lay open what is encrypted here."""
    head = zfs.look(layout.live)
    if head is None or not head.encrypted:
        return
    if head.locked:
        raise Refused("NOT_SUPPORTED", f"{locked(layout)}; zfs load-key {layout.live}, if this node may read it")
    if not base and not _is_encrypted(layout.group):
        said = (
            f"{layout.live} is encrypted, and {layout.group}, where a full copy is received, is not: it would be plain"
        )
        raise Refused("NOT_SUPPORTED", f"{said}; move the volume under an encrypted dataset, or rename {layout.live}")


def locked(layout: Layout) -> str:
    said = f"{layout.live} is encrypted and its key is not loaded"
    return f"{said}: only plain streams are sent, so nothing is received for it"


def may_spool(layout: Layout) -> bool:
    """Whether plain data may lie in the records: a live copy that is encrypted wants them to be so too."""
    head = zfs.look(layout.live)
    return head is None or not head.encrypted or _is_encrypted(layout.records)


def _is_encrypted(name: str) -> bool:
    found = zfs.look(name)
    return found is not None and found.encrypted

"""Mounting and unmounting file systems of ZFS, by `zfs`, or by `mount` where `zfs` leaves that to /etc/fstab."""

from __future__ import annotations

from typing import Final

from agent.disk import zfs

# `-i`: `mount.zfs` lets a file system be mounted where its property says, and nowhere else.
MOUNT_AND_UNMOUNT: Final = 'mount -i -t zfs -o ro,nodev,nosuid,noexec -- "$1" "$2" && umount -- "$2"'


def unmount(name: str) -> bool:
    """Unmounts a file system; False if somebody uses it, which nobody but the kernel can say for sure."""
    try:
        zfs.run("zfs", "unmount", name)
    except zfs.ZfsError as error:
        if "not currently mounted" in error.text or error.absent:
            return True
        if "legacy mountpoint" in error.text:
            return _unmount_legacy(name)
        if "busy" in error.text:
            return False
        raise
    return True


def _unmount_legacy(name: str) -> bool:
    """Where `zfs` leaves mounting to /etc/fstab, so does unmounting."""
    try:
        zfs.run("umount", "-t", "zfs", name)
    except zfs.ZfsError as error:
        if "busy" in error.text:
            return False
        if "not mounted" not in error.text and "no mount point" not in error.text:
            raise
    return True


def mount_legacy(name: str, point: str, options: str) -> None:
    """Mounts a file system that `zfs` leaves to /etc/fstab.

    Without `ro` among the options it is writable, whatever its property `readonly` says.
    """
    zfs.patient("mount", "-t", "zfs", *(["-o", options] if options else []), "--", name, point)


def replay(name: str, point: str) -> None:
    """Mounts a file system for a moment, read-only and where nobody else sees it, at a directory that is there.

    What was synced before a power cut may stand in the intent log alone: neither a snapshot nor `written` tells of it
    before the file system is mounted again.
    """
    # Slave: the copies that the namespace has of all other mounts go when those do, and keep nobody's in use.
    if zfs.features().written:  # zfs-fuse takes no snapshot before that is done
        zfs.run("unshare", "-m", "--propagation", "slave", "sh", "-c", MOUNT_AND_UNMOUNT, "sh", name, point)


def mount(name: str) -> None:
    """Mounts a file system; mounted already is fine."""
    try:
        zfs.patient("zfs", "mount", name)
    except zfs.ZfsError as error:
        if "already mounted" not in error.text:
            raise

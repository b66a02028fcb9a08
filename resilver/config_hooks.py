"""What runs before and after a consistency point, and which volumes are taken together, as agent.toml says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Protocol

from msgspec import Meta, Struct

from resilver.config_rules import Fault, name_faults

GROUP_VOLUMES_MAX: Final = 16

Words = Annotated[tuple[str, ...], Meta(max_length=64)]


class Hooks(Struct, frozen=True, kw_only=True):
    """`[volumes.hooks]`: programs with their arguments, never through a shell.

    `timeout_s` is how long what `before` holds may be held, and how long `after` may run. `freezes`: nothing writes to
    the volume between the two. `user` is who runs them, empty for the agent's own.
    """

    before: Words = ()
    after: Words = ()
    timeout_s: Annotated[float, Meta(ge=0.1, le=60)] = 10.0
    freezes: bool = False
    user: str = ""

    @property
    def any(self) -> bool:
        return bool(self.before or self.after)


NO_HOOKS: Final = Hooks()


class Volume(Protocol):
    """What the rules look at."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def hooks(self) -> Hooks: ...


def hook_faults(volumes: Iterable[Volume]) -> Iterator[Fault]:
    """What is wrong with the hooks and groups of a node's volumes, as a matter of the file alone."""
    those = list(volumes)
    counts = Counter(volume.group for volume in those if volume.group)
    holding = {volume.group for volume in those if volume.group and volume.hooks.before}
    for index, volume in enumerate(those):
        at = f"volumes[{index}]"
        if volume.group:
            yield from name_faults(**{f"{at}.group": volume.group})
        if counts[volume.group] > GROUP_VOLUMES_MAX:
            yield f"{at}.group", f"{volume.group!r} has {counts[volume.group]} volumes; at most {GROUP_VOLUMES_MAX}"
        for key in ("before", "after"):
            yield from _program_faults(f"{at}.hooks.{key}", getattr(volume.hooks, key))
        if volume.hooks.freezes and not volume.hooks.before and volume.group not in holding:
            said = "says that nothing writes after `before`, but neither this volume nor its group has a `before`"
            yield f"{at}.hooks.freezes", said


def _program_faults(field: str, words: tuple[str, ...]) -> Iterator[Fault]:
    if not words:
        return
    if not words[0].startswith("/"):
        yield field, f"{words[0]!r} is no path from the root: write it whole, such as /etc/resilver/hooks/freeze"
    if any("\0" in word for word in words):
        yield field, "has a NUL character in it"

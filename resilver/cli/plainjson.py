"""Answers of the API as the plain JSON that scripts read: one converter, driven by the message descriptors.

The rules, which hold for every message alike:

* keys are the proto's own snake_case names; `NAMES` holds the few that differ;
* numbers are numbers, also 64-bit ones; a Duration is seconds, and its key ends in `_seconds`;
* a Timestamp is RFC 3339 in UTC; a consistency point is `"3-42"`;
* an enum is its name without the prefix; its `_UNSPECIFIED` is null;
* what is absent is null: an unset message, an unset optional number, an empty id or name, the CP `0-0`.
  Sentences (`SENTENCES`) stay strings, and lists stay lists.

The same tables are what docs/reference/json.md describes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor import FieldDescriptor

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message

    # A union of the pure and the compiled one in some versions of the types, so it is named nowhere else.
    Field = Any

NAMES: Final[Mapping[tuple[str, str], str]] = {
    ("ReplicaPlan", "copy_bytes"): "bytes",
    ("Loss", "lost_cps"): "cps",
}
"""(message, proto field) -> key."""

SENTENCES: Final = frozenset({"message", "note", "reason", "rule", "text", "verdict", "why"})
"""String fields that stay "" when they are empty."""

LIFTED: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "Resync": (("plan", "action"),),
    "VolumeRefusal": (
        ("refusal", "reasons"),
        ("refusal", "message"),
        ("refusal", "missing_nodes"),
        ("refusal", "candidates"),
        ("refusal", "losses"),
        ("refusal", "next_command"),
    ),
}
"""message -> (inner message, its key) that also stands on the outside."""

DROPPED: Final = frozenset({("VolumeRefusal", "refusal")})
"""Fields whose lifted keys say it all."""


def plain(message: Message) -> dict[str, Any]:
    """The JSON object of a message."""
    name = message.DESCRIPTOR.name
    result = {key_of(field): _value(message, field) for field in message.DESCRIPTOR.fields}
    for inner, key in LIFTED.get(name, ()):
        result[key] = (result[inner] or {}).get(key)
    for _, field in (pair for pair in DROPPED if pair[0] == name):
        del result[field]
    return result


def plain_list(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [plain(message) for message in messages]


def key_of(field: Field) -> str:
    """The key under which a field stands."""
    renamed = NAMES.get((field.containing_type.name, field.name))
    if renamed is not None:
        return renamed
    name: str = field.name
    if _is_message(field) and field.message_type.name == "Duration":
        return name.removesuffix("_duration") + "_seconds"
    return name


def _value(message: Message, field: Field) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_single(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(field, value)


def _single(field: Field, value: Any) -> Any:
    if _is_message(field):
        convert: Callable[[Any], Any] = _MESSAGES.get(field.message_type.name, plain)
        return convert(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return enum_word(field.enum_type, value) or None
    if value == "" and field.name not in SENTENCES:
        return None
    return value


def _is_message(field: Field) -> bool:
    return bool(field.type == FieldDescriptor.TYPE_MESSAGE)


@functools.cache
def enum_word(enum: EnumDescriptor, number: int) -> str:
    """An enum's name without its prefix; "" for unspecified, the number as text for one of a newer peer."""
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    word = value.name.removeprefix(prefix)
    return "" if word == "UNSPECIFIED" else word


def word(message: Message, field: str) -> str:
    """The word of an enum field of a message, e.g. `word(replica, "state")` -> "IN_SYNC"."""
    enum = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert enum is not None, f"{field} is no enum"
    return enum_word(enum, getattr(message, field))


def cp_text(cp: Any) -> str | None:
    """A ConsistencyPoint message as `"3-42"`; None for none."""
    return f"{cp.epoch}-{cp.sequence}" if cp.epoch or cp.sequence else None


_MESSAGES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "ConsistencyPoint": cp_text,
    "Timestamp": lambda value: value.ToJsonString(),
    "Duration": lambda value: value.seconds + value.nanos / 1e9,
}

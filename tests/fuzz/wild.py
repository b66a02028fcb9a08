"""Random messages by their descriptors: any field, any enum, texts that are too long, numbers at every edge."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

DEPTH_MAX = 6
TEXTS = (
    "", "a", "vm1", "..", "../../etc/shadow", "/", "//", "/nowhere/x", "a/b", "a\0b", "\u2028", "é" * 70, "x" * 128,
    "x" * 5000, "3-42", "0-0", "99999999999999999999-9", "-1", "*", "%s%n", "a b", ".hidden", "stage", "\U0001f600",
)  # fmt: skip
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Wild:
    """`known` are values that mean something, by a field's name; `never` are never put there."""

    def __init__(self, seed: object, known: Mapping[str, Sequence[Any]]) -> None:
        self.chance = random.Random(str(seed))
        self._known = known

    def message(self, kind: type[Message], *, sense: float = 0.7) -> Message:
        """A message of that kind; `sense` is how often a field has a value that means something."""
        made = kind()
        self._fill(made, sense, 0)
        return made

    def _fill(self, message: Message, sense: float, depth: int) -> None:
        chosen: set[str] = set()
        for field in message.DESCRIPTOR.fields:
            of = field.containing_oneof.name if field.containing_oneof is not None else ""
            leaves_out = 1 - sense if field.name in self._known or sense > 0.97 else 0.25
            if self.chance.random() < leaves_out or depth > DEPTH_MAX or (of and of in chosen):
                continue
            if of:
                chosen.add(of)
            if field.is_repeated:
                count = self.chance.choice((0, 1, 1, 2, 3, 3, 300 if self.chance.random() < 0.1 else 2))
                for _ in range(count):
                    self._add(message, field, sense, depth)
            elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                getattr(message, field.name).SetInParent()
                self._fill(getattr(message, field.name), sense, depth + 1)
            else:
                setattr(message, field.name, self._value(field, sense))

    def _add(self, message: Message, field: FieldDescriptor, sense: float, depth: int) -> None:
        row = getattr(message, field.name)
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            self._fill(row.add(), sense, depth + 1)
        else:
            row.append(self._value(field, sense))

    def _value(self, field: FieldDescriptor, sense: float) -> Any:
        known = self._known.get(field.name)
        if known is not None and (self.chance.random() < sense or field.name == "term"):
            return self.chance.choice(list(known))
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self.chance.random() < 0.5
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return self.chance.choice([*(one.number for one in field.enum_type.values), -1, 99, 2**31 - 1])
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.chance.randbytes(self.chance.choice((0, 1, 32, 4096)))
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return self.chance.choice(TEXTS)
        if field.cpp_type in _BITS:
            least, most = _BITS[field.cpp_type]
            edges = (least, most, 0, 1, 2, 1000, most // 2, most - 1, 4096)
            return self.chance.choice(edges)
        return self.chance.choice((0.0, -1.0, 1e308, float("inf"), float("nan")))

"""Changes to an input, by a seed: bits, pieces and numbers of bytes; keys and values of JSON."""

from __future__ import annotations

import json
import random
from typing import Any, Final

from fuzz.target import INPUT_BYTES_MAX, Target, as_json

_NUMBERS: Final = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_TEXTS: Final = (
    "", "..", "../../etc/passwd", "/", "a/b", ".", "a\0b", "\x0c", "\u2028", "\ud800", "é" * 40, "x" * 5000, "0-0",
    "3-42", "99999999999999999999-1", "-1", "1e999", "nan", "stage", "record.json", "0" * 5000, "\n", "a\tb", "{", "[[",
)  # fmt: skip
_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"), [],
    {}, [[]], [None], {"a": {}}, *_TEXTS,
)  # fmt: skip


def mutated(target: Target, data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to four changes to an input; `others` lend pieces."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = as_json(data) if target.form == "json" and chance.random() < 0.8 else None
        data = _text(_changed(value, chance)) if isinstance(value, dict | list) else _bytes(data, others, chance)
    return data[:INPUT_BYTES_MAX]


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(value: Any, chance: random.Random) -> Any:
    """Another value in one place of it."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        kind = chance.randrange(12)
        if kind == 0:
            return {name: each for name, each in value.items() if name != key}
        if kind == 1:
            return {**value, chance.choice(_TEXTS) or key: value[key]}
        if kind == 2:
            return {**value, key: value[chance.choice(sorted(value))]}
        return {**value, key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        kind = chance.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + value[at:] * 3
        return [*value[:at], _changed(value[at], chance), *value[at + 1 :]]
    if isinstance(value, str) and value and chance.random() < 0.4:
        at = chance.randrange(len(value))
        return value[:at] + chance.choice("\0/.-:0Z\u2028\ud8ff ") + value[at + chance.randrange(2) :]
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.4:
        return value + chance.choice((-1, 1, 2**32, -(2**33)))
    return chance.choice(_VALUES)


def _bytes(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(9)
    if kind == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + chance.randrange(1, 17) :]
    if kind == 3:
        return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
    if kind == 4:
        size = chance.choice((1, 2, 4, 8))
        number = chance.choice(_NUMBERS) & ((1 << 8 * size) - 1)
        return data[:at] + number.to_bytes(size, chance.choice(("little", "big"))) + data[at + size :]
    if kind == 5:
        end = min(len(data), at + chance.randrange(1, 65))
        return data[:end] + data[at:end] * chance.randrange(1, 4) + data[end:]
    if kind == 6 and others:
        other = chance.choice(others)
        begin = chance.randrange(len(other) + 1)
        return data[:at] + other[begin : begin + chance.randrange(1, 257)] + data[at:]
    if kind == 7:
        return data[:at] + chance.choice(_TEXTS).encode(errors="surrogatepass") + data[at:]
    end = at + chance.randrange(1, 9)
    return data[:at] + chance.randbytes(len(data[at:end])) + data[end:]

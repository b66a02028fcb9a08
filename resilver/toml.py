"""A TOML file into a frozen msgspec class, or one sentence that says what is wrong and what would be right.

Knows nothing of what the keys mean: `config.py` brings the classes and a decoder for their own types. Every failure
is `Invalid("CONFIG_INVALID")`, opens with the file's name, and names the key in `metadata["field"]`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from resilver.errors import Invalid

FILE_BYTES_MAX: Final = 4 << 20

Loaded = TypeVar("Loaded", bound=Struct)

_WORDS: Final[Mapping[str, str]] = {
    "int": "a whole number",
    "float": "a number",
    "str": 'a text in "quotes"',
    "bool": "true or false",
    "array": "a list in [brackets]",
    "object": "a table",
}


def invalid(file: Path, field: str, message: str) -> Invalid:
    """The error for a key of a file; an empty field is the file as a whole."""
    return Invalid("CONFIG_INVALID", f"{file}: {field}: {message}" if field else f"{file}: {message}", field=field)


def nearest(word: str, known: Iterable[str]) -> str:
    """The most similar of the known words, empty if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def read_toml(file: Path) -> dict[str, Any]:
    """The file's tables as they stand; raises Invalid for what cannot be read or is no TOML."""
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
    except IsADirectoryError as error:
        raise invalid(file, "", "is a directory; name the TOML file itself") from error
    except OSError as error:
        why = f"cannot be read ({error.strerror}); name a TOML file that this user can read"
        raise invalid(file, "", why) from error
    if len(data) > FILE_BYTES_MAX:
        raise invalid(file, "", f"is larger than {FILE_BYTES_MAX} bytes; this is no configuration file")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise invalid(file, "", f"is not UTF-8 text at byte {error.start}") from error
    except ValueError as error:  # also a number of thousands of digits
        raise invalid(file, "", f"is not valid TOML: {error}") from error
    except RecursionError as error:
        raise invalid(file, "", "is nested too deeply") from error


def convert(
    file: Path,
    raw: Mapping[str, Any],
    top: type[Loaded],
    decode: Callable[[type, Any], Any],
    choices: Mapping[str, Iterable[str]],
) -> Loaded:
    """The tables as `top`; unknown keys are refused first. `choices` lists the values of keys that have few."""
    _refuse_unknown(file, raw, top)
    try:
        return msgspec.convert(dict(raw), top, dec_hook=decode)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise invalid(file, *_sentence(field, message, choices)) from error


def _sentence(field: str, message: str, choices: Mapping[str, Iterable[str]]) -> tuple[str, str]:
    """The words of msgspec in ours: the key, and what it should have been."""
    missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
    if missing is not None:
        return f"{field}.{missing[1]}".lstrip("."), "is missing, and has no default"
    key = field.rpartition(".")[2]
    if message.startswith("Invalid enum value") and key in choices:
        return field, f"{message.removeprefix('Invalid enum value ')} is none of {', '.join(choices[key])}"
    wrong = re.fullmatch(r"Expected `(\w+)`, got `(\w+)`", message)
    if wrong is not None:
        return field, f"should be {_WORDS.get(wrong[1], wrong[1])}, and is {_WORDS.get(wrong[2], wrong[2])}"
    bound = re.fullmatch(r"Expected `(?:int|float)` (\S+) (\S+)", message)
    if bound is not None:
        return field, f"should be {bound[1]} {bound[2]}"
    return field, message


def _refuse_unknown(file: Path, raw: Mapping[str, Any], top: type[Struct]) -> None:
    for path, table, present in _tables("", raw, top):
        keys = keys_of(table)
        for name in present:
            if name in keys:
                continue
            field = f"{path}.{name}" if path else name
            if path and name in keys_of(top):
                raise invalid(file, field, f"unknown key; {name!r} stands at the top of the file, before any [table]")
            near = nearest(name, keys)
            hint = f"did you mean {near!r}?" if near else f"known here: {', '.join(keys)}"
            raise invalid(file, field, f"unknown key; {hint}")


def keys_of(table: type[Struct]) -> tuple[str, ...]:
    """The keys that a table may have: all fields but `stated`, which the loader itself fills in."""
    return tuple(name for name in table.__struct_fields__ if name != "stated")


def _tables(
    path: str, raw: Mapping[str, Any], table: type[Struct]
) -> Iterator[tuple[str, type[Struct], Mapping[str, Any]]]:
    """Each table of the file with its dotted name and class. Wrong types are left for msgspec to refuse."""
    yield path, table, raw
    for field in msgspec.structs.fields(table):
        at = f"{path}.{field.name}" if path else field.name
        value = raw.get(field.name)
        inner, many = _table_type(field.type)
        if inner is None:
            continue
        if many and isinstance(value, list):
            for index, row in enumerate(value):
                if isinstance(row, dict):
                    yield from _tables(f"{at}[{index}]", row, inner)
        elif not many and isinstance(value, dict):
            yield from _tables(at, value, inner)


def _table_type(annotation: Any) -> tuple[type[Struct] | None, bool]:
    """The Struct that a field holds, and whether it holds many of them."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        return annotation, False
    arguments = getattr(annotation, "__args__", ())
    if arguments and isinstance(arguments[0], type) and issubclass(arguments[0], Struct):
        return arguments[0], True
    return None, False

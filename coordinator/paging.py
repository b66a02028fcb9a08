"""Pages of long lists, after AIP-158.

The rules:

* A page ends after `page_size` items, or sooner so that no message passes 1 MiB; an empty token means the end.
* A token belongs to one method and one request: with another filter it is `PAGE_TOKEN_INVALID`.
* A token names the last item of its page by that item's key, and the next page begins after it: items that come or go
  in between shift nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from google.protobuf.message import Message

from resilver.errors import Invalid
from resilver.fields import invalid

PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1000
MESSAGE_BYTES_MAX: Final = 1 << 20
PAGE_BYTES_MAX: Final = 900 << 10
_TOKEN_CHARS_MAX: Final = 4096

T = TypeVar("T")
P = TypeVar("P")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Page(Generic[P]):
    """What goes into the answer."""

    messages: tuple[P, ...]
    next_page_token: str


def page(request: Message, items: Iterable[T], key: Callable[[T], str], convert: Callable[[T], M]) -> Page[M]:
    """The page that the request asks for, of items ordered by `key`, which no two of them share."""
    return page_of(request, items, key, convert, lambda message: message.ByteSize() + 8)


def page_of(
    request: Message, items: Iterable[T], key: Callable[[T], str], convert: Callable[[T], P], size: Callable[[P], int]
) -> Page[P]:
    """The same of messages in any form, of which `size` tells how many bytes they take in the answer."""
    size_max = _page_size(request)
    bound = digest_of(request)
    after = _after(request, bound)
    keyed = ((key(item), item) for item in items)
    rest = sorted((pair for pair in keyed if after is None or pair[0] > after), key=lambda pair: pair[0])
    messages: list[P] = []
    page_bytes, last = 0, ""
    for name, item in rest[:size_max]:
        message = convert(item)
        page_bytes += size(message)
        if messages and page_bytes > PAGE_BYTES_MAX:
            break
        messages.append(message)
        last = name
    token = _token(bound, last) if len(messages) < len(rest) else ""
    return Page(tuple(messages), token)


def chunks(messages: Iterable[M], bytes_max: int = PAGE_BYTES_MAX) -> Iterable[list[M]]:
    """The same messages in lists that each fit one message of a stream; none for none."""
    held: list[M] = []
    held_bytes = 0
    for message in messages:
        size = message.ByteSize() + 8
        if held and held_bytes + size > bytes_max:
            yield held
            held, held_bytes = [], 0
        held.append(message)
        held_bytes += size
    if held:
        yield held


def _page_size(request: Message) -> int:
    size: int = getattr(request, "page_size")  # noqa: B009 - a field of the generated class, unknown to Message
    if size > PAGE_SIZE_MAX:
        raise invalid("page_size", f"is {size}; at most {PAGE_SIZE_MAX} is allowed, and 0 means {PAGE_SIZE_DEFAULT}")
    return size or PAGE_SIZE_DEFAULT


def digest_of(request: Message) -> str:
    """Of everything in the request but where in the list it asks."""
    asked = type(request)()
    asked.CopyFrom(request)
    asked.ClearField("page_size")
    asked.ClearField("page_token")
    whole = type(request).__name__.encode() + b"\0" + asked.SerializeToString(deterministic=True)
    return hashlib.sha256(whole).hexdigest()[:16]


def _token(bound: str, last: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([bound, last]).encode()).decode().rstrip("=")


def _after(request: Message, bound: str) -> str | None:
    """The key after which the page begins; None for the first."""
    token: str = getattr(request, "page_token")  # noqa: B009 - as above
    if not token:
        return None
    try:
        if len(token) > _TOKEN_CHARS_MAX:
            raise _bad_token()
        padded = token.encode() + b"=" * (-len(token) % 4)
        mine, last = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise _bad_token() from error
    if mine != bound or not isinstance(last, str):
        raise _bad_token()
    return last


def token_gone() -> Invalid:
    """For a token of an answer that is not kept any longer."""
    return Invalid(
        "PAGE_TOKEN_INVALID", "page_token is of an answer that is not kept any more: ask anew", field="page_token"
    )


def _bad_token() -> Invalid:
    return Invalid(
        "PAGE_TOKEN_INVALID",
        "page_token belongs to another request: pass on next_page_token as it came, with the same filter, "
        "or leave it out to begin again",
        field="page_token",
    )

"""Pages come whole, in order and in bounds, whatever changes in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.paging import PAGE_BYTES_MAX, chunks, page
from resilver.errors import Invalid
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2


def event(name: str, message: str = "") -> volume_pb2.Event:
    return volume_pb2.Event(type=name, message=message)


def walk(items, size, make=event, change=lambda items: None):
    """All names, page by page, and how many pages it took."""
    names, token, count = [], "", 0
    while True:
        found = page(api.ListEventsRequest(page_size=size, page_token=token), items, str, make)
        names += [message.type for message in found.messages]
        token, count = found.next_page_token, count + 1
        change(items)
        if not token:
            return names, count


@given(st.sets(st.text("abc", min_size=1), max_size=40), st.integers(1, 50))
def test_every_item_comes_once_and_in_order(items, size):
    names, count = walk(set(items), size)
    assert names == sorted(items)
    assert count == max(1, -(-len(items) // size))


def test_what_comes_and_goes_shifts_nothing():
    items = {f"v{number:02d}" for number in range(10)}

    def change(items):
        items.discard("v00")
        items.add("a-new-one-before-all")

    names, _ = walk(items, 3, change=change)
    assert names == [f"v{number:02d}" for number in range(10)]


def test_a_page_stays_below_the_bound_of_a_message():
    names, count = walk({f"v{number:03d}" for number in range(50)}, 0, lambda name: event(name, "x" * 100_000))
    assert len(names) == 50
    assert count == 6


def test_an_item_larger_than_a_page_still_comes():
    names, count = walk({"a", "b"}, 0, lambda name: event(name, "x" * (PAGE_BYTES_MAX + 1)))
    assert (names, count) == (["a", "b"], 2)


def test_zero_is_a_hundred_and_more_than_a_thousand_is_refused():
    items = {f"{number:04d}" for number in range(150)}
    assert len(page(api.ListEventsRequest(), items, str, event).messages) == 100
    with pytest.raises(Invalid) as caught:
        page(api.ListEventsRequest(page_size=1001), items, str, event)
    assert caught.value.metadata["field"] == "page_size"


@pytest.mark.parametrize("token", ["x", "!!!", "e30", "WzEsMl0", "AAAA" * 3000, "\N{SNOWMAN}"])
def test_a_token_that_was_not_given_is_refused(token):
    with pytest.raises(Invalid) as caught:
        page(api.ListEventsRequest(page_token=token), {"a"}, str, event)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


def test_a_token_belongs_to_its_request():
    token = page(api.ListEventsRequest(page_size=1), {"a", "b"}, str, event).next_page_token
    other_size = api.ListEventsRequest(page_size=7, page_token=token)
    assert [message.type for message in page(other_size, {"a", "b"}, str, event).messages] == ["b"]
    for request in (api.ListEventsRequest(volume="vm1", page_token=token), api.ListNodesRequest(page_token=token)):
        with pytest.raises(Invalid) as caught:
            page(request, {"a", "b"}, str, event)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


def test_chunks_hold_everything_in_order():
    messages = [event(str(number), "x" * 300) for number in range(20)]
    parts = list(chunks(messages, bytes_max=1000))
    assert [message for part in parts for message in part] == messages
    assert max(len(part) for part in parts) == 3
    assert list(chunks([])) == []

"""The names by which a dialler knows whom it has reached."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilver.config_rules import NAME
from resilver.names import Name, Role
from resilver.tls import label, server_name

NAMES = st.one_of(
    st.from_regex(NAME, fullmatch=True), st.text("aA._-", min_size=1, max_size=63).map(lambda s: "x" + s[1:])
)


def test_ordinary_names_stay_what_they_are() -> None:
    assert server_name(Name("prod", Role.NODE, "storage-1")) == "storage-1.node.prod.resilver.internal"
    assert server_name(Name("prod", Role.COORDINATOR, "c1")) == "coordinator.prod.resilver.internal"
    assert server_name(Name("Prod", Role.NODE, "h1.ex")) == "h1_2eex.node._50rod.resilver.internal"


@settings(max_examples=50)
@given(NAMES, NAMES)
def test_two_names_never_share_a_label_however_dns_reads_them(one: str, other: str) -> None:
    assert (label(one).lower() == label(other).lower()) is (one == other)
    assert len(label(one)) <= 63
    assert "." not in label(one)
    assert "*" not in label(one)


@pytest.mark.parametrize("role", [Role.OPERATOR, Role.VIEWER])
def test_nobody_dials_an_operator(role: Role) -> None:
    with pytest.raises(ValueError, match="nobody dials"):
        server_name(Name("prod", role, "anna"))

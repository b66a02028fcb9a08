import pytest

from resilver.names import Name, Role, only_name, parse_name


@pytest.mark.parametrize("role", list(Role))
def test_a_name_is_read_as_it_is_written(role):
    name = Name("prod", role, "db-1.example")
    assert str(name) == f"resilver://prod/{role.value}/db-1.example"
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "resilver://prod/node",
        "resilver://prod/node/",
        "resilver:///node/a",
        "resilver://prod/node/a/",
        "resilver://prod/node/a/b",
        "resilver://prod/node/..",
        "resilver://prod/node/a%2fb",
        "resilver://prod/node/a\n",
        "resilver://prod/NODE/a",
        "resilver://prod/root/a",
        "resilver://user@prod/node/a",
        "resilver://prod:1/node/a",
        "Resilver://prod/node/a",
        "resilver://prod/node/a?x",
        "resilver://prod/node/a#x",
        "resilver://prod/node/ä",
        "spiffe://prod/node/a",
        f"resilver://prod/node/{'a' * 64}",
    ],
)
def test_what_comes_close_is_no_name(uri):
    with pytest.raises(ValueError, match=r"name|role"):
        parse_name(uri)


def test_a_certificate_names_one_party():
    assert only_name(["DNS:a.example", "resilver://prod/node/a", "10.0.0.1"]) == Name("prod", Role.NODE, "a")
    with pytest.raises(ValueError, match="names no party"):
        only_name(["a.example", "spiffe://prod/node/a"])
    with pytest.raises(ValueError, match="more than one party"):
        only_name(["resilver://prod/node/a", "resilver://prod/operator/a"])
    with pytest.raises(ValueError, match="more than one party"):
        only_name(["resilver://prod/node/a", "RESILVER://prod/operator/a"])

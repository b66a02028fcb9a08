"""`resilver certs`: what it prints, makes and ends with. It asks nobody, so nothing here has a coordinator."""

import json
import ssl
import stat
from datetime import timedelta

import pytest

from resilver import ca, ca_files
from resilver.cli.main import main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("RESILVER_CA_DIR", str(tmp_path / "ca"))
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments):
        capsys.readouterr()
        code = main(["certs", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def made(run):
    assert run("init", "--cluster", "prod")[0] == 0
    return run


def later(monkeypatch, days):
    now = ca.utc_now()
    monkeypatch.setattr(ca, "utc_now", lambda: now + timedelta(days=days))


def test_from_nothing_to_a_certificate(run, tmp_path):
    code, out, err = run("init", "--cluster", "prod")
    assert (code, err) == (0, "")
    assert "made the authority of prod" in out
    code, out, _ = run("issue", "node", "a", "--dns", "a.example.org", "--ip", "10.0.0.11")
    assert code == 0
    assert out.startswith("issued node a of prod until ")
    assert "at a.example.org, 10.0.0.11" in out
    place = tmp_path / "ca" / "node" / "a"
    assert sorted(one.name for one in place.iterdir()) == ["ca.crt", "tls.crt", "tls.key"]
    assert stat.S_IMODE((place / "tls.key").stat().st_mode) == 0o600
    ssl.create_default_context(cafile=place / "ca.crt").load_cert_chain(place / "tls.crt", place / "tls.key")
    code, out, _ = run("show")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:5] == ["ROLE", "NAME", "STATE", "ENDS", "LEFT"]
    assert rows[1][:3] == ["authority", "prod", "GOOD"]
    assert rows[2][:3] == ["node", "a", "GOOD"]


def test_json(made):
    code, out, _ = made("issue", "operator", "jo", "-o", "json")
    one = json.loads(out)["certificate"]
    assert code == 0
    assert one["uri"] == "resilver://prod/operator/jo"
    assert (one["role"], one["name"], one["cluster"], one["state"]) == ("operator", "jo", "prod", "GOOD")
    assert one["days_left"] in (89, 90)
    code, out, _ = made("show", "-o", "json")
    assert [each["role"] for each in json.loads(out)["certificates"]] == ["authority", "operator"]
    code, out, _ = made("show", one["path"])
    assert code == 0
    assert one["sha256"] in out
    assert one["key_sha256"] in out
    assert "resilver://prod/operator/jo" in out


@pytest.mark.parametrize(("days", "code", "word"), [(0, 0, "GOOD"), (80, 5, "ENDING"), (91, 3, "ENDED")])
def test_show_ends_as_cron_wants(made, monkeypatch, days, code, word):
    made("issue", "node", "a")
    later(monkeypatch, days)
    found, out, _ = made("show")
    assert found == code
    assert word in out


def test_show_says_what_is_wrong(made, tmp_path):
    made("issue", "node", "a")
    (tmp_path / "ca" / "node" / "a" / "tls.key").chmod(0o644)
    code, out, err = made("show", str(tmp_path / "ca" / "node" / "a"))
    assert code == 3
    assert "UNUSABLE" in out
    assert "chmod 600" in err


@pytest.mark.parametrize("keep", [True, False])
def test_renew_keeps_name_hosts_length_and_if_asked_the_key(made, monkeypatch, tmp_path, keep):
    made("issue", "node", "a", "--dns", "a.example.org", "--days", "40")
    place = tmp_path / "ca" / "node" / "a"
    before, key = ca_files.read_certs(place / "tls.crt")[0], (place / "tls.key").read_bytes()
    later(monkeypatch, 20)
    code, out, _ = made("renew", "node", "a", *(["--keep-key"] if keep else []))
    assert code == 0
    assert out.startswith("renewed node a of prod")
    after = ca_files.read_certs(place / "tls.crt")[0]
    assert after.serial_number != before.serial_number
    assert ca.name_of(after) == ca.name_of(before)
    assert ca.hosts_of(after) == ca.hosts_of(before)
    # Of the clock of this machine some seconds have passed, beside the days.
    assert timedelta(0) <= after.not_valid_after_utc - before.not_valid_after_utc - timedelta(days=20) < timedelta(1)
    assert ((place / "tls.key").read_bytes() == key) is keep
    assert made("renew", "node", "a", "--ip", "10.0.0.1")[0] == 0
    assert [str(one) for one in ca.hosts_of(ca_files.read_certs(place / "tls.crt")[0]).ip] == ["10.0.0.1"]


def test_renew_all_that_end_soon(made, monkeypatch):
    made("issue", "node", "a")
    made("issue", "node", "b", "--days", "200")
    later(monkeypatch, 70)
    code, out, _ = made("renew", "--all", "--within", "30d")
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == ["a"]
    assert made("renew", "--all", "--within", "30d")[1] == "nothing to renew\n"
    assert len(made("renew", "--all")[1].splitlines()) == 2


def test_one_authority_follows_another(made, tmp_path):
    """The parties of both trust both, as the page on certificates has it done."""
    made("issue", "node", "a")
    old, new = tmp_path / "ca", tmp_path / "next"
    assert made("init", "--cluster", "prod", "--dir", str(new), "--also-trust", str(old / "ca.crt"))[0] == 0
    with (old / "ca.crt").open("ab") as file:
        file.write(ca.cert_pem(ca_files.load(new).own.cert))
    assert made("renew", "--all")[0] == 0
    assert made("issue", "node", "a", "--dir", str(new))[0] == 0
    trusted = [ca_files.read_certs(one / "node" / "a" / "ca.crt") for one in (old, new)]
    assert len(trusted[0]) == 2
    assert set(trusted[0]) == set(trusted[1])
    for one in (old, new):
        code, out, _ = made("show", str(one / "node" / "a"))
        assert (code, "GOOD" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["issue", "node", "a b"], "NAME: 'a b' cannot be used: a name is 1 to 63"),
        (["issue", "viewer", "v", "--dns", "x"], "viewers only dial"),
        (["issue", "node", "a", "--days", "1000"], "--days: 1000 cannot be: a certificate lasts"),
        (["issue", "node", "a", "--ip", "x"], "--ip"),
        (["issue", "king", "a"], "king"),
        (["renew", "node", "nobody"], "certs issue node nobody"),
        (["renew"], "--all"),
        (["renew", "node", "a", "--all"], "not both"),
        (["renew", "--all", "--dns", "x"], "name it"),
        (["init", "--cluster", "prod"], "is not empty"),
        (["init", "--cluster", "10.0.0.1", "--dir", "/nowhere/ca"], "--cluster"),
        (["show", "/nowhere"], "/nowhere"),
        (["issue", "node", "a", "--dir", "/nowhere"], "certs init"),
    ],
)
def test_what_is_wrong_ends_with_2_and_changes_nothing(made, tmp_path, arguments, words):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = made(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before

"""The page on certificates: its recipe makes what it says, and its manifests ask for the right names."""

import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from resilver import ca, ca_show
from resilver.names import Role, parse_name
from resilver.tls import server_name

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "certificates.md").read_text()
MANIFESTS = re.search(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1].split("---\n")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("operator", [False, True], ids=["node", "operator"])
def test_the_recipe_for_openssl(tmp_path, operator):
    script = re.search(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    if operator:
        assert ",DNS:$dns" in script
        script = script.replace(",DNS:$dns", "").replace("serverAuth,", "").replace("role=node", "role=operator")
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, check=True, timeout=30, capture_output=True)
    now = ca.utc_now()
    (seen,) = ca_show.look(tmp_path, now)
    assert seen.problems == ()
    assert seen.state(now, timedelta(days=1)) == "GOOD"
    assert str(seen.name) == f"resilver://prod/{'operator' if operator else 'node'}/a"
    assert ca.cluster_of(ca_show.look(tmp_path / "ca.crt", now)[0].cert) == "prod"


def test_the_manifests_ask_for_what_a_party_must_be_called():
    asked = [one for one in MANIFESTS if "uris:" in one]
    roles = set()
    for manifest in asked:
        name = parse_name(re.search(r'uris: \["(.*?)"\]', manifest)[1])
        dns = re.findall(r'dnsNames: \["(.*?)"\]', manifest)
        server = name.role in ca.SERVERS
        assert dns == ([server_name(name)] if server else [])
        assert ("server auth" in manifest) is server
        roles.add(name.role)
    assert roles >= {Role.NODE, Role.COORDINATOR, Role.OPERATOR}


def test_names_are_written_as_the_page_says():
    assert "`db1_2eexample.node.prod.resilver.internal`" in PAGE
    assert server_name(parse_name("resilver://prod/node/db1.example")) == "db1_2eexample.node.prod.resilver.internal"

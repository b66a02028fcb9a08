"""The two TOML files: defaults, resolution, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilver.config import Address, load_agent_config, load_coordinator_config, parse_address, parse_store
from resilver.config_reload import RELOADABLE_AGENT, changed_keys, reload_of
from resilver.errors import Invalid

AGENT = """
node = "a"
cluster = "demo"
coordinators = ["127.0.0.1:7400"]
listen = "127.0.0.1:7411"
stream_listen = "127.0.0.1:7421"
state_dir = "/var/lib/resilver/a"
include = []
{more}
[[volumes]]
name = "vm1"
backend = "image"
path = "/srv/a/vm1.img"
{volume}
"""

COORDINATOR = """
name = "c1"
cluster = "demo"
listen = "127.0.0.1:7400"
store = "etcd://127.0.0.1:2379"
lease_ttl_s = 10
{more}
"""


@pytest.fixture
def agent(tmp_path):
    def load(more="", volume="", text=AGENT):
        file = tmp_path / "agent.toml"
        file.write_text(text.replace("{more}", more).replace("{volume}", volume))
        return load_agent_config(file)

    return load


@pytest.fixture
def coordinator(tmp_path):
    def load(more="", text=COORDINATOR):
        file = tmp_path / "coordinator.toml"
        file.write_text(text.replace("{more}", more))
        return load_coordinator_config(file)

    return load


def test_the_least_agent_file(agent):
    config = agent()
    assert config.listen == Address("127.0.0.1", 7411)
    assert config.coordinators == (Address("127.0.0.1", 7400),)
    assert (config.limits.receive_max_count, config.limits.send_max_count, config.limits.disk_threads) == (2, 4, 4)
    assert (config.space.reserve_ratio, config.space.reserve_min_bytes) == (0.05, 1 << 30)
    (volume,) = config.volumes
    assert volume.snapshot_dir == Path("/srv/a/.resilver/vm1")
    assert (volume.priority, volume.keep_last) == (0, 16)
    assert "metrics_listen" not in config.stated
    assert "listen" in config.stated


def test_the_least_coordinator_file(coordinator):
    config = coordinator()
    assert (config.heartbeat_s, config.node_timeout_s, config.examine_timeout_s, config.resyncs_max) == (2, 10, 10, 16)
    assert config.etcd.timeout_s == 2
    assert config.advertised(7400) == Address("127.0.0.1", 7400)


def test_a_default_store_and_advertised_name(coordinator):
    config = coordinator(text='name = "c1"\ncluster = "demo"\ninsecure = true\nadvertise = "c1.example:7400"')
    assert parse_store(config.store) == Path("/var/lib/resilver/store.db")
    assert config.advertised(7400) == Address("c1.example", 7400)
    assert config.listen.every_interface


def test_included_files_add_volumes(tmp_path, agent):
    beside = tmp_path / "more[1]"
    beside.mkdir()
    (beside / "b.toml").write_text('[[volumes]]\nname = "db1"\nbackend = "image"\npath = "/srv/a/db1.img"')
    (beside / "a.toml").write_text('[[volumes]]\nname = "db0"\nbackend = "image"\npath = "/srv/a/db0.img"')
    text = AGENT.replace("include = []", 'include = ["more*/*.toml"]')
    assert [volume.name for volume in agent(text=text).volumes] == ["vm1", "db0", "db1"]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7400", Address("127.0.0.1", 7400)),
        ("[::1]:7400", Address("::1", 7400)),
        ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1)),
        (":7400", Address("", 7400)),
        ("[::]:0", Address("::", 0)),
        ("node-1.example:65535", Address("node-1.example", 65535)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "host", "::1:7400", "host:", "host:x", "host:65536", "http://host:1", "a b:1", "[::1]"]
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=r"write|ports go up to"):
        parse_address(text)


@pytest.mark.parametrize(
    ("more", "volume", "field", "says"),
    [
        ('coordinator = ["a:1"]', "", "coordinator", "did you mean 'coordinators'?"),
        ("[limits]\ndisk_thread = 3", "", "limits.disk_thread", "did you mean 'disk_threads'?"),
        ("[limits]\nwhatever = 3", "", "limits.whatever", "known here: receive_max_bytes_s"),
        ("[tls]\ninsecure = true", "", "tls.insecure", "stands at the top of the file"),
        ("", "keep = 3", "volumes[0].keep", "did you mean 'keep_last'?"),
        ("", 'priority = "high"', "volumes[0].priority", 'should be a whole number, and is a text in "quotes"'),
        ("", "keep_last = 0", "volumes[0].keep_last", "should be >= 1"),
        ("", 'snapshot_dir = "snaps"', "volumes[0].snapshot_dir", "is a relative path"),
        ("", 'snapshot_dir = "/srv/a/vm1.img"', "volumes[0].snapshot_dir", "the same place as the path of 'vm1'"),
        ('log_level = "loud"', "", "log_level", "'loud' is none of debug, info, warning, error"),
        ("[limits]\ndisk_threads = 1.5", "", "limits.disk_threads", "should be a whole number, and is a number"),
        ("[limits]\nreceive_max_bytes_s = 1000", "", "limits.receive_max_bytes_s", "at least 65536 bytes a second"),
        ('[limits]\nio_priority = "low"', "", "limits.io_priority", "'low' is none of normal, idle"),
        ("[space]\nreserve_ratio = 2.0", "", "space.reserve_ratio", "should be <= 0.9"),
        ('metrics_listen = "127.0.0.1"', "", "metrics_listen", "has no port"),
        ("metrics_listen = 7403", "", "metrics_listen", 'should be a text in "quotes"'),
        ('metrics_listen = "[::]:7411"', "", "metrics_listen", "taken by listen"),
        ('advertise = "[::]:7411"', "", "advertise", "is every interface"),
        ('advertise = "here"', "", "advertise", 'or "auto"'),
        ('[tls]\ncert = "/etc/c.pem"', "", "tls.ca", "ca, cert and key together"),
        ('[tls]\nca = "c.pem"', "", "tls.ca", "relative path"),
        ('insecure = true\n[tls]\nca = "/c"\ncert = "/d"\nkey = "/k"', "", "insecure", "take insecure = true out"),
        ("", '[[volumes]]\nname = "vm1"\nbackend = "image"\npath = "/srv/x"', "volumes[1].name", "another volume"),
        ("", '[[volumes]]\nname = "v2"\nbackend = "image"\npath = "/srv/./a/vm1.img"', "volumes[1].path", "same place"),
        ("", '[[volumes]]\nname = "-x"\nbackend = "image"\npath = "/srv/x"', "volumes[1].name", "1 to 63 letters"),
        ("", '[[volumes]]\nname = "vm2"\npath = "/srv/x"', "volumes[1].backend", "is missing, and has no default"),
        ("", 'group = "-"', "volumes[0].group", "1 to 63 letters"),
        ("", "[volumes.hooks]\nbefor = []", "volumes[0].hooks.befor", "did you mean 'before'?"),
        ("", '[volumes.hooks]\nbefore = "/bin/x"', "volumes[0].hooks.before", "should be a list"),
        ("", '[volumes.hooks]\nafter = ["thaw"]', "volumes[0].hooks.after", "no path from the root"),
        ("", "[volumes.hooks]\ntimeout_s = 61", "volumes[0].hooks.timeout_s", "should be <= 60"),
        ("", "[volumes.hooks]\nfreezes = true", "volumes[0].hooks.freezes", "nor its group has a `before`"),
    ],
)  # fmt: skip
def test_what_an_agent_file_is_refused_for(agent, more, volume, field, says):
    with pytest.raises(Invalid) as caught:
        agent(more, volume)
    assert caught.value.reason == "CONFIG_INVALID"
    assert caught.value.metadata["field"] == field
    assert says in caught.value.message
    assert "agent.toml" in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        ('cluster = "demo"', "", "cluster", "is missing"),
        ('cluster = "demo"', 'cluster = ""', "cluster", "1 to 63"),
        ('["127.0.0.1:7400"]', "[]", "coordinators", "name at least one"),
        ('["127.0.0.1:7400"]', '"127.0.0.1:7400"', "coordinators", "should be a list"),
        ('["127.0.0.1:7400"]', '[":7400"]', "coordinators[0]", "cannot be dialled"),
        ('["127.0.0.1:7400"]', '["c1:7400"]', "coordinators[0]", "insecure = true"),
        ('"127.0.0.1:7411"', '"[::]:7411"', "listen", "insecure = true"),
        ('"127.0.0.1:7421"', '"localhost:7421"', None, ""),
        ('"127.0.0.1:7421"', '"127.0.0.1:7411"', "stream_listen", "taken by listen"),
        ("include = []", 'include = ["none.toml"]', "include", "does not exist"),
        ('"/var/lib/resilver/a"', '"lib"', "state_dir", "relative path"),
    ],
)
def test_what_a_changed_line_is_refused_for(agent, old, new, field, says):
    text = AGENT.replace(old, new)
    if field is None:
        agent(text=text)
        return
    with pytest.raises(Invalid) as caught:
        agent(text=text)
    assert caught.value.metadata["field"] == field
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        ("etcd://127.0.0.1:2379", "redis://127.0.0.1:2379", "store", "is no store"),
        ("etcd://127.0.0.1:2379", "sqlite://store.db", "store", "no absolute path"),
        ("etcd://127.0.0.1:2379", "etcd://", "store", "is no store"),
        ("etcd://127.0.0.1:2379", "etcd://h1:2379", "store", "insecure = true"),
        ("lease_ttl_s = 10", "lease_ttl_s = 1", "lease_ttl_s", "should be >= 2"),
        ("lease_ttl_s = 10", "lease_ttl_s = 2", "etcd.timeout_s", "shorter than lease_ttl_s"),
        ("lease_ttl_s = 10", "heartbeat_s = 10", "node_timeout_s", "longer than heartbeat_s"),
        ("lease_ttl_s = 10", 'etcd = {username = "u"}', "etcd.password_file", "together"),
        ("lease_ttl_s = 10", 'etcd = {cert = "u"}', "etcd.cert", "together"),
        ("lease_ttl_s = 10", "etcd = 3", "etcd", "should be a table"),
        ("lease_ttl_s = 10", "lease_ttl = 3", "lease_ttl", "did you mean 'lease_ttl_s'?"),
    ],
)
def test_what_a_coordinator_file_is_refused_for(coordinator, old, new, field, says):
    with pytest.raises(Invalid) as caught:
        coordinator(text=COORDINATOR.replace(old, new))
    assert caught.value.metadata["field"] == field
    assert says in caught.value.message


def in_group(name: str, more: str = "") -> str:
    return f'[[volumes]]\nname = "{name}"\nbackend = "image"\npath = "/srv/{name}.img"\ngroup = "db"\n{more}\n'


def test_hooks_and_groups(agent):
    held = in_group("v1", '[volumes.hooks]\nbefore = ["/bin/freeze", "x"]\ntimeout_s = 2') + in_group(
        "v2", "[volumes.hooks]\nfreezes = true"
    )
    plain, first, second = agent(volume=held).volumes
    assert (plain.group, plain.hooks.any, plain.hooks.timeout_s) == ("", False, 10.0)
    assert (first.group, first.hooks.before, first.hooks.timeout_s) == ("db", ("/bin/freeze", "x"), 2.0)
    assert second.hooks.freezes
    assert not second.hooks.any
    with pytest.raises(Invalid, match="has 17 volumes; at most 16"):
        agent(volume="".join(in_group(f"v{number}") for number in range(17)))
    assert changed_keys(agent(volume=held), agent(volume=held.replace("= 2", "= 3"))) == {"volumes.hooks"}


def test_two_links_to_one_file_are_one_path(tmp_path, agent):
    (tmp_path / "one.img").touch()
    (tmp_path / "two.img").symlink_to(tmp_path / "one.img")
    rows = "".join(
        f'[[volumes]]\nname = "{name}"\nbackend = "image"\npath = "{tmp_path}/{name}.img"\n' for name in ("one", "two")
    )
    with pytest.raises(Invalid, match="the same place as the path of 'one'"):
        agent(volume=rows)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a = ", "is not valid TOML"), (b"\xff\xfe", "is not UTF-8"), (b" " * ((4 << 20) + 1), "is larger than")],
)
def test_what_is_no_file_to_read(tmp_path, content, says):
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(Invalid, match=says):
        load_agent_config(file)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(Invalid, match="No such file"):
        load_agent_config(tmp_path / "none.toml")
    with pytest.raises(Invalid, match="is a directory"):
        load_coordinator_config(tmp_path)


def test_store_urls():
    assert parse_store("etcd://h1:2379,h2,[::1]:3") == (Address("h1", 2379), Address("h2", 2379), Address("::1", 3))
    assert parse_store("sqlite:///x/y.db") == Path("/x/y.db")


def test_a_reload_is_taken_whole_or_not(agent):
    old = agent()
    new = agent('log_level = "debug"\n[limits]\nsend_max_count = 9', "keep_last = 3")
    assert reload_of(old, new) == {"log_level", "limits.send_max_count", "volumes.keep_last"}
    assert reload_of(old, old) == frozenset()
    other = agent('log_level = "debug"\nadvertise = "127.0.0.1:1"')
    with pytest.raises(Invalid, match="advertise cannot be changed while running"):
        reload_of(old, other)
    assert changed_keys(old, agent(volume='[[volumes]]\nname = "b"\nbackend = "image"\npath = "/b"')) == {"volumes"}


def test_every_reloadable_key_exists(agent):
    config = agent()
    for key in RELOADABLE_AGENT:
        table, _, name = key.rpartition(".")
        owner = config if not table else getattr(config, table)
        assert hasattr(owner[0] if isinstance(owner, tuple) else owner, name), key

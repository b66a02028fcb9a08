"""Logs as lines that a machine reads, metrics that can be fetched and stopped."""

from __future__ import annotations

import json
import logging
import urllib.request

import pytest
import structlog
from prometheus_client import Counter

from resilver import telemetry
from resilver.config import Address
from resilver.errors import Invalid

COUNTER = Counter("resilver_test_things", "Things.")


@pytest.fixture
def logs():
    root = logging.getLogger()
    before, level = root.handlers, root.level
    yield telemetry.configure_logs
    root.handlers = before
    root.setLevel(level)
    structlog.reset_defaults()


def test_lines_are_json_with_what_was_bound(logs, capsys):
    logs("info", "auto")
    with telemetry.bound(volume="vm1"):
        structlog.get_logger("resilver.x").info("done", bytes=3)
        logging.getLogger("grpc").warning("from a library")
        structlog.get_logger("resilver.x").debug("too small")
    structlog.get_logger("resilver.x").info("after")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["done", "from a library", "after"]
    assert {"volume": "vm1", "bytes": 3, "level": "info", "logger": "resilver.x"}.items() <= lines[0].items()
    assert lines[1]["volume"] == "vm1"
    assert "volume" not in lines[2]


def test_an_exception_is_one_line_of_json(logs, capsys):
    logs("info", "json")
    try:
        int("x")
    except ValueError:
        structlog.get_logger("x").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["exception"][0]["exc_type"] == "ValueError"


def test_the_level_can_be_changed_while_running(logs, capsys):
    logs("error", "console")
    log = structlog.get_logger("x")
    log.info("first")
    telemetry.set_level("info")
    log.info("second")
    text = capsys.readouterr().err
    assert "first" not in text
    assert "second" in text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", ""])
def test_metrics_are_served_until_stopped(host):
    metrics = telemetry.start_metrics(Address(host, 0))
    shown = Address(host or "127.0.0.1", metrics.port)
    with urllib.request.urlopen(f"http://{shown}/metrics", timeout=5) as answer:
        assert b"resilver_test_things_total 0.0" in answer.read()
    metrics.stop()
    again = telemetry.start_metrics(Address(host, metrics.port))
    assert again.port == metrics.port
    again.stop()


def test_a_taken_port_is_an_error_if_it_was_asked_for():
    metrics = telemetry.start_metrics(Address("127.0.0.1", 0))
    taken = Address("127.0.0.1", metrics.port)
    with pytest.raises(Invalid, match="Address already in use"):
        telemetry.start_metrics(taken)
    assert telemetry.start_metrics(taken, required=False) is None
    metrics.stop()
    with pytest.raises(Invalid, match="cannot listen"):
        telemetry.start_metrics(Address("192.0.2.1", 0), required=False)

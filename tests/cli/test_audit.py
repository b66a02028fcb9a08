"""`resilver audit`: a line for each order, oldest first."""

import json

from resilver.v1 import coordinator_pb2 as api
from tests.cli import sample

JO = "resilver://prod/operator/jo"


def entries():
    return [
        api.AuditEntry(
            sequence=3,
            create_time=sample.at(20),
            method="StartResync",
            principal="10.0.0.9",
            address="10.0.0.9",
            request='{"all":true}',
            result=api.AUDIT_RESULT_UNKNOWN,
            attempt_count=1,
            last_time=sample.at(20),
        ),
        api.AuditEntry(
            sequence=2,
            create_time=sample.at(10),
            end_time=sample.at(11),
            method="UpdateNode",
            principal="resilver://prod/viewer/wall",
            address="10.0.0.7",
            node="b",
            result=api.AUDIT_RESULT_REFUSED,
            reason="ROLE_NOT_ALLOWED",
            message="a viewer may not do this",
            attempt_count=40,
            last_time=sample.at(60),
        ),
        api.AuditEntry(
            sequence=1,
            create_time=sample.at(0),
            end_time=sample.at(1),
            method="ElectPrimary",
            principal=JO,
            address="10.0.0.5",
            volumes=["db1"],
            request='{"accept_loss_nodes":["b"],"volume":"db1"}',
            result=api.AUDIT_RESULT_DONE,
            message="a is primary in epoch 5",
            attempt_count=1,
            last_time=sample.at(0),
        ),
    ]


def test_the_screen(run, table, golden):
    table["ListAuditEntries"] = api.ListAuditEntriesResponse(entries=entries())
    code, out, err = run("audit")
    assert (code, err) == (0, "")
    golden("audit.txt", out)


def test_json_has_all_of_it(run, table):
    table["ListAuditEntries"] = api.ListAuditEntriesResponse(entries=entries())
    found = json.loads(run("audit", "-o", "json")[1])["audit"]
    assert [one["sequence"] for one in found] == [1, 2, 3]
    assert (found[0]["result"], found[0]["request"]) == ("DONE", '{"accept_loss_nodes":["b"],"volume":"db1"}')
    assert (found[2]["end_time"], found[2]["reason"], found[2]["attempt_count"]) == (None, "", 1)


def test_what_is_asked_for(run, table, coordinator):
    table["ListAuditEntries"] = api.ListAuditEntriesResponse()
    assert run("audit", "--volume", "db1", "--by", JO, "--refused") == (0, "no such orders\n", "")
    (asked,) = coordinator.answers.of("ListAuditEntries")
    assert (asked.volume, asked.principal, asked.result) == ("db1", JO, api.AUDIT_RESULT_REFUSED)
    assert run("audit")[1] == "no orders yet\n"

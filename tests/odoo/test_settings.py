"""What is configured, as a real Odoo takes it."""

import re

import pytest
import requests

from stack import ports
from stack.postgres import PASSWORD, USER
from stack.stack import Stack
from tests.support import addonlog

MARK = "S3CR3T"


@pytest.fixture(params=["14.0", "19.0"])
def start(request):
    """Return a function that makes a stack of a threaded Odoo; the other modes read their settings the same way."""
    return lambda **arguments: Stack(request.param, **arguments)


def check_that_the_bus_works(stack):
    with stack.client() as client:
        addonlog.wait_until_confirmed(stack)
        stack.send("tests", "hello")
        # Up to 15.0 a message that comes between two polls has to wait for the next.
        stack.send("tests", "hello again")
        client.wait_for("hello", 10)


def listeners(stack):
    return [row for row in stack.direct_connections() if row.application_name == "odoo-listener-%d" % stack.odoo.pid]


def check_that_it_polls_and_connects_nowhere(stack):
    """Wait for messages to arrive all the same; return what the log has of ERROR on options."""
    with stack.client(listening=False) as client:
        addonlog.wait_for_record(stack, "can't listen on database postgres: ")
        addonlog.wait_for_record(stack, "nothing listens on database postgres: looking into bus_bus every 1 s instead")
        for message in "hello", "hello again":
            stack.send("tests", message)
            client.wait_for(message, 10)
    health = requests.get(stack.odoo.event_url + "/bus_alt_connection/health", timeout=20)
    assert health.status_code == 200
    assert {key: health.json()[key] for key in ("mode", "status", "listening", "confirmed")} == {
        "mode": "polling",
        "status": "degraded",
        "listening": False,
        "confirmed": False,
    }
    assert not [row for row in stack.direct_connections() if row.application_name.startswith("odoo-listener")]
    # Nor was there one for a moment: its name is in what the server logs of it.
    assert "odoo-listener" not in stack.server.log_since(0)
    # Once in all, if it is not said at the start already.
    (listening,) = (one for one in addonlog.records(stack) if one.message.startswith("can't listen"))
    assert MARK not in listening.message
    return [one.message for one in addonlog.records(stack) if one.level == "ERROR" and one != listening]


def right(stack, **others):
    """Where PostgreSQL is, and what else is to be configured."""
    values = {"DB_HOST": stack.server.host, "DB_PORT": stack.server.port, "POLL_INTERVAL": 1, **others}
    return {"IMDISPATCHER_" + name: str(value) for name, value in values.items()}


def test_odoo_names_each_wrong_option_once_and_polls(start):
    wrong = {
        "IMDISPATCHER_DB_HOST": "postgresql://odoo:%s@127.0.0.1" % MARK,
        "IMDISPATCHER_DB_SSLMODE": "disabled",
        "IMDISPATCHER_DB_CONNECT_TIMEOUT": "10 s",
        "IMDISPATCHER_DB_PASSWD": MARK,
        "IMDISPATCHER_DB_USERNAME": "odoo",
        "IMDISPATCHER_CHECK_INTERVAL": "soon",
        "ODOO_IMDISPATCHER_DB_PROT": "5432",
        # Of libpq 18, which is newer than that of Odoo's psycopg2.
        "IMDISPATCHER_DB_OAUTH_ISSUER": "a",
    }
    # Without a pooler: what is left of these settings would lead to the server itself.
    with start(pooler=False, environment={"IMDISPATCHER_POLL_INTERVAL": "1", **wrong}) as stack:
        errors = check_that_it_polls_and_connects_nowhere(stack)
        assert sorted(re.match(r"\w+", error)[0] for error in errors) == sorted(wrong)
        assert MARK not in stack.odoo.log()
        # At the start, before anybody listens.
        listened = stack.odoo.log().index("can't listen on database")
        assert all(stack.odoo.log().index(error) < listened for error in errors)


def test_a_misspelt_sslmode_gives_no_connection_rather_than_an_unprotected_one(start):
    def environment(stack):
        return right(stack, DB_SSLMODE="verify_full", DB_PASSWORD=PASSWORD)

    with start(environment=environment) as stack:
        (error,) = check_that_it_polls_and_connects_nowhere(stack)
        assert error.startswith("IMDISPATCHER_DB_SSLMODE is not an sslmode. Did you mean verify-full?")
        assert PASSWORD not in stack.odoo.log()


def test_what_libpq_refuses_is_told_in_its_words(start):
    with start(environment=lambda stack: right(stack, DB_TARGET_SESSION_ATTRS="primry")) as stack:
        assert check_that_it_polls_and_connects_nowhere(stack) == []
        (error,) = (one.message for one in addonlog.records(stack) if one.level == "ERROR")
        assert error.startswith("can't listen on database postgres: ")
        assert re.search('invalid target_session_attrs value: "primry"', error)


def test_wrong_intervals_alone_do_not_keep_it_from_connecting(start):
    wrong = {"CHECK_INTERVAL": "soon", "POLL_INTERVAL": "-1"}
    with start(environment=lambda stack: right(stack, **wrong)) as stack:
        check_that_the_bus_works(stack)
        assert len(listeners(stack)) == 1
        errors = sorted(one.message for one in addonlog.troubles(stack))
        assert [re.match(r"\w+", error)[0] for error in errors] == ["IMDISPATCHER_" + name for name in sorted(wrong)]


def test_passwords_of_pooler_and_server_may_differ(start):
    def environment(stack):
        values = {"HOST": stack.server.host, "PORT": stack.server.port, "USER": USER, "PASSWORD": PASSWORD}
        return {"ODOO_IMDISPATCHER_DB_" + name: str(value) for name, value in values.items()}

    other = {"user": "pooled", "password": "pooled-s3cret"}
    with start(pooler_options=other, environment=environment) as stack:
        check_that_the_bus_works(stack)
        assert [row.usename for row in listeners(stack)] == [USER]
        assert addonlog.troubles(stack) == []
        assert PASSWORD not in stack.odoo.log()
        assert other["password"] not in stack.odoo.log()


def test_of_several_hosts_one_has_to_live(start):
    dead = ports.take_port()

    def environment(stack):
        return {
            "IMDISPATCHER_DB_HOST": "127.0.0.1,127.0.0.1",
            "IMDISPATCHER_DB_PORT": "%d,%d" % (dead, stack.server.port),
        }

    try:
        with start(environment=environment) as stack:
            check_that_the_bus_works(stack)
            assert len(listeners(stack)) == 1
            assert addonlog.troubles(stack) == []
            live = "127.0.0.1:%d " % stack.server.port
            assert live in addonlog.wait_until_confirmed(stack).message
    finally:
        ports.release_port(dead)

"""What is configured, as a real Odoo takes it."""

import re

import pytest

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


def test_odoo_names_each_wrong_option_once_and_the_bus_works(start):
    wrong = {
        "IMDISPATCHER_DB_HOST": "postgresql://odoo:%s@127.0.0.1" % MARK,
        "IMDISPATCHER_DB_PORT": "54x2",
        "IMDISPATCHER_DB_SSLMODE": "disabled",
        "IMDISPATCHER_DB_CONNECT_TIMEOUT": "10 s",
        "IMDISPATCHER_DB_PASSWD": MARK,
        "IMDISPATCHER_DB_USERNAME": "odoo",
        "IMDISPATCHER_CHECK_INTERVAL": "soon",
        "ODOO_IMDISPATCHER_DB_PROT": "5432",
        # Of libpq 18, which is newer than that of Odoo's psycopg2.
        "IMDISPATCHER_DB_OAUTH_ISSUER": "a",
    }
    # Without a pooler: what is left of these settings leads to the server itself.
    with start(pooler=False, environment=wrong) as stack:
        check_that_the_bus_works(stack)
        errors = [one.message for one in addonlog.records(stack) if one.level == "ERROR"]
        assert sorted(re.match(r"\w+", error)[0] for error in errors) == sorted(wrong)
        assert MARK not in stack.odoo.log()


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

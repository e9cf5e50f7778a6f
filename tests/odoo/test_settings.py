"""What is configured, as a real Odoo takes it. Threaded only: the other modes read their settings the same way."""

import re

import pytest

from stack import ports
from stack.odoo import Odoo
from stack.postgres import PASSWORD, USER
from tests.support import addonlog, traffic

MARK = "S3CR3T"
OWN_NOTIFY = "CREATE FUNCTION own_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT pg_notify($1, $2)'"

pytestmark = pytest.mark.variants("14.0-threaded", "19.0-threaded")


def check_that_it_polls_and_connects_nowhere(stack):
    """Wait for messages to arrive all the same; return what the log has of ERROR on options."""
    with stack.client(listening=False) as client:
        addonlog.wait_for_record(stack, "can't listen on database postgres: ")
        addonlog.wait_for_record(stack, "nothing listens on database postgres: looking into bus_bus every 1 s instead")
        for message in "hello", "hello again":
            stack.send("tests", message)
            client.wait_for(message, 10)
    says = stack.odoo.health()
    assert (says["mode"], says["status"]) == ("polling", "degraded")
    # Nor was there a connection for a moment: its name is in what the server logs of it.
    assert "odoo-listener" not in stack.server.log_since(0)
    # Once in all, if it is not said at the start already.
    (listening,) = (one for one in addonlog.records(stack) if one.message.startswith("can't listen"))
    return [one.message for one in addonlog.records(stack) if one.level == "ERROR" and one != listening]


def test_odoo_names_each_wrong_option_once_connects_nowhere_and_polls(new_stack):
    def environment(stack):
        return {"IMDISPATCHER_DB_HOST": stack.server.host, "IMDISPATCHER_DB_PORT": str(stack.server.port), **wrong}

    wrong = {
        # It would lead to a connection without the protection that was asked for.
        "IMDISPATCHER_DB_SSLMODE": "verify_full",
        "IMDISPATCHER_DB_CONNECT_TIMEOUT": "10 s",
        "IMDISPATCHER_DB_PASSWD": MARK,
        "IMDISPATCHER_CHECK_INTERVAL": "soon",
        "ODOO_IMDISPATCHER_DB_PROT": "5432",
        # Of libpq 18, which is newer than that of Odoo's psycopg2.
        "IMDISPATCHER_DB_OAUTH_ISSUER": "a",
    }
    variables = {"IMDISPATCHER_POLL_INTERVAL": "1"}
    stack = new_stack(jobs=False, environment=lambda stack: {**variables, **environment(stack)})
    errors = check_that_it_polls_and_connects_nowhere(stack)
    assert sorted(re.match(r"\w+", error)[0] for error in errors) == sorted(wrong)
    assert any(error.startswith("IMDISPATCHER_DB_SSLMODE is not an sslmode. Did you mean ") for error in errors)
    assert MARK not in stack.odoo.log()
    # At the start, before anybody listens.
    listened = stack.odoo.log().index("can't listen on database")
    assert all(stack.odoo.log().index(error) < listened for error in errors)


def test_odoo_serves_and_is_told_what_to_set_if_nothing_is_configured(new_stack):
    stack = new_stack(jobs=False, direct=False, environment={"IMDISPATCHER_POLL_INTERVAL": "1"})
    with stack.client(listening=False) as client:
        stack.send("tests", "hello")
        # By polling, since a LISTEN would be deaf.
        client.wait_for("hello", 20)
    (found,) = (one for one in addonlog.records(stack) if one.level == "WARNING" and "is set" in one.message)
    assert {"IMDISPATCHER_DB_HOST", "IMDISPATCHER_DB_PORT"} <= set(re.findall(r"\w+", found.message))
    deaf = "can't listen on database postgres: %s:%s is a pooler" % (stack.pooler.host, stack.pooler.port)
    addonlog.wait_for_record(stack, re.escape(deaf))
    assert [one.level for one in addonlog.records(stack)].count("ERROR") == 1


class _OdooByConf(Odoo):
    """All that it is told of the addon stands in odoo.conf; of two hosts the first is down."""

    def prepare(self):
        server = self.database_server.server
        self.dead = ports.take_port()
        self.conf.update(
            server_wide_modules=self.load,
            imdispatcher_db_host="%s,%s" % (server.host, server.host),
            imdispatcher_db_port="%s,%s" % (self.dead, server.port),
            imdispatcher_db_user=USER,
            imdispatcher_db_password=PASSWORD,
            imdispatcher_check_interval="soon",
        )
        super().prepare()

    def command(self):
        command = super().command()
        at = command.index("--load")
        return command[:at] + command[at + 2 :]

    def close(self):
        super().close()
        ports.release_port(self.dead)


def test_odoo_conf_alone_will_do_with_a_host_that_is_down_and_an_account_and_a_function_of_ones_own(
    new_stack, monkeypatch
):
    def environment(stack):
        stack.server.execute(OWN_NOTIFY)
        return {"ODOO_NOTIFY_FUNCTION": "own_notify"}

    monkeypatch.setattr("stack.stack.Odoo", _OdooByConf)
    pooled = {"user": "pooled", "password": "pooled-s3cret"}
    stack = new_stack(jobs=False, direct=False, pooler_options=pooled, environment=environment)
    with stack.client() as client:
        live = "at %s:%d " % (stack.server.host, stack.server.port)
        assert live in addonlog.wait_until_confirmed(stack).message
        stack.send("tests", "hello")
        # Up to 15.0 a message that comes between two polls has to wait for the next.
        stack.send("tests", "hello again")
        client.wait_for("hello", 10)
        assert [row.usename for row in stack.direct_connections()] == [USER]
    checks = [one.text for one in traffic.statements(stack) if "'bus_alt_connection_" in one.text and not one.listens]
    assert checks
    assert all("own_notify" in text for text in checks)
    # An interval that is wrong does not keep it from connecting.
    (error,) = addonlog.troubles(stack)
    assert error.message.startswith("imdispatcher_check_interval is not a number")
    assert PASSWORD not in stack.odoo.log()
    assert pooled["password"] not in stack.odoo.log()

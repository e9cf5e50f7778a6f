"""What is configured, as a real Odoo takes it. One Odoo is started anew for each configuration."""

import re
import subprocess

import pytest

from stack import ports
from stack.stack import Stack
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.certificates import make_certificate
from tests.support.secrets import ENCODED_PASSWORD, LISTENER_PASSWORD, POOLER_PASSWORD, WRONG_PASSWORD, leaks
from tests.support.traffic import statements

ROLES = (
    "CREATE ROLE listener LOGIN PASSWORD %s;"
    " CREATE FUNCTION own_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT pg_notify($1, $2)'"
)
# Not what a wrong POLL_INTERVAL would lead to.
POLLING = {"IMDISPATCHER_POLL_INTERVAL": "1"}
POLLS = "nothing listens on database postgres: polling bus_bus every 1 s instead"
WRONG = {
    # It would lead to a connection without the protection that was asked for.
    "IMDISPATCHER_DB_SSLMODE": "verify_full",
    "IMDISPATCHER_DB_CONNECT_TIMEOUT": "10 s",
    "IMDISPATCHER_DB_PASSWD": WRONG_PASSWORD,
    "IMDISPATCHER_DB_DBNAME": "postgresql://odoo:%s@127.0.0.1/x" % ENCODED_PASSWORD,
    "IMDISPATCHER_CHECK_INTERVAL": "soon",
    "ODOO_IMDISPATCHER_DB_PROT": "5432",
    # A keyword of libpq 18, which is newer than the libpq of Odoo's psycopg2.
    "IMDISPATCHER_DB_OAUTH_ISSUER": "a",
}

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-threaded")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The server's certificate and key, and another certificate for its host."""
    return {name: make_certificate(tmp_path_factory.mktemp(name), "localhost") for name in ("ours", "another")}


@pytest.fixture(scope="module")
def stack(variant, certificates):
    """A stack with one account for the pooler and another for listeners, and a server with a certificate."""

    def environment(stack):
        stack.server.execute(ROLES, (LISTENER_PASSWORD,))
        for path in certificates["ours"]:
            # PostgreSQL does not read a key that others might.
            owner = ["-o", stack.server.run_as] if stack.server.run_as else []
            subprocess.run(["install", "-m", "600", *owner, path, stack.server.data / path.name], check=True)
        stack.server.settings.update(ssl="on", ssl_cert_file="server.crt", ssl_key_file="server.key")
        stack.server.reload()
        return directly(stack, **WRONG)

    options = ["--log-handler=odoo.addons.bus_alt_connection:DEBUG"]
    pooled = {"user": "pooled", "password": POOLER_PASSWORD}
    # With a dbfilter, Odoo 14.0 does not answer while the pooler is down, see test_health.
    conf = {"dbfilter": None}
    with Stack(
        *variant, environment=environment, conf=conf, jobs=False, options=options, pooler_options=pooled
    ) as stack:
        yield stack


def directly(stack, **variables):
    return {
        "IMDISPATCHER_DB_HOST": stack.server.host,
        "IMDISPATCHER_DB_PORT": str(stack.server.port),
        "IMDISPATCHER_DB_USER": "listener",
        "IMDISPATCHER_DB_PASSWORD": LISTENER_PASSWORD,
        **POLLING,
        **variables,
    }


def check_that_it_polls(stack, mark, why):
    """Wait until it is told why nothing listens; messages arrive all the same."""
    with stack.client(listening=False) as client:
        wait_for_record(stack, "can't listen on database postgres: " + why, mark)
        wait_for_record(stack, POLLS, mark)
        for message in ("hello", "hello again"):
            stack.send("tests", message)
            client.wait_for(message, 10)
    says = stack.odoo.health()
    assert (says["mode"], says["status"]) == ("polling", "degraded")


def said(stack, mark, level):
    """Return what the process that listens has said after a mark in the log."""
    return [one.message for one in records(stack, mark, bus_pid(stack)) if one.level == level]


def test_odoo_names_each_wrong_option_once_connects_nowhere_and_polls(stack):
    server_mark = stack.server.log_mark() if stack.odoo.variables != directly(stack, **WRONG) else 0
    mark = stack.odoo.run_with(directly(stack, **WRONG))
    check_that_it_polls(stack, mark, "some options are wrong. Correct those that Odoo logged as ERROR")
    # Nor was there a connection for a moment: its name is in what the server logs of it.
    assert "odoo-listener" not in stack.server.log_since(server_mark)
    # At the start, before anybody listens.
    *errors, _listening = said(stack, mark, "ERROR")
    assert sorted(re.match(r"\w+", error)[0] for error in errors) == sorted(WRONG)
    assert any(error.startswith("IMDISPATCHER_DB_SSLMODE is not an sslmode. Did you mean ") for error in errors)


def test_odoo_serves_and_is_told_what_to_set_if_nothing_is_configured(stack):
    mark = stack.odoo.run_with(POLLING)
    # By polling, since a LISTEN would be deaf.
    check_that_it_polls(stack, mark, "%s:%s is a pooler" % (stack.pooler.host, stack.pooler.port))
    (unset,) = (message for message in said(stack, mark, "WARNING") if "is set" in message)
    assert {"IMDISPATCHER_DB_HOST", "IMDISPATCHER_DB_PORT"} <= set(re.findall(r"\w+", unset))
    assert len(said(stack, mark, "ERROR")) == 1


def test_listeners_take_a_certificate_that_is_right_and_no_other(stack, certificates):
    place = {"IMDISPATCHER_DB_HOST": "localhost", "IMDISPATCHER_DB_HOSTADDR": stack.server.host}

    def run_with(name):
        trusted = {"IMDISPATCHER_DB_SSLMODE": "verify-full", "IMDISPATCHER_DB_SSLROOTCERT": str(certificates[name][0])}
        return stack.odoo.run_with(directly(stack, **place, **trusted))

    mark = run_with("ours")
    with stack.client() as client:
        assert " at localhost:%s " % stack.server.port in wait_until_confirmed(stack, mark).message
        stack.send("tests", "hello")
        client.wait_for("hello")
        query = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'listener'"
        assert {row.ssl for row in stack.server.execute(query)} == {True}

    mark = run_with("another")
    check_that_it_polls(stack, mark, "localhost:%s: .*certificate verify failed" % stack.server.port)
    assert not stack.direct_connections()


def test_odoo_conf_alone_will_do_with_a_host_that_is_down_and_an_account_and_a_function_of_ones_own(stack, monkeypatch):
    dead = ports.take_port()
    stack.odoo.stop()
    stack.odoo.conf.update(
        server_wide_modules=stack.odoo.load,
        imdispatcher_db_host="%s,%s" % (stack.server.host, stack.server.host),
        imdispatcher_db_port="%s,%s" % (dead, stack.server.port),
        imdispatcher_db_user="listener",
        imdispatcher_db_password=LISTENER_PASSWORD,
        imdispatcher_poll_interval="1",
        imdispatcher_check_interval="soon",
    )
    stack.odoo.variables = {"ODOO_NOTIFY_FUNCTION": "own_notify"}
    command = stack.odoo.command()
    at = command.index("--load")
    monkeypatch.setattr(stack.odoo, "command", lambda: command[:at] + command[at + 2 :])
    mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
    stack.odoo.start()
    with stack.client() as client:
        assert " at %s:%d " % (stack.server.host, stack.server.port) in wait_until_confirmed(stack, mark).message
        stack.send("tests", "hello")
        # Up to 15.0 a message that comes between two polls has to wait for the next.
        stack.send("tests", "hello again")
        client.wait_for("hello", 10)
        assert [row.usename for row in stack.direct_connections()] == ["listener"]
    checks = [one for one in statements(stack, server_mark) if "'bus_alt_connection_" in one.text and not one.listens]
    assert checks
    assert all("own_notify" in one.text for one in checks)
    # An interval that is wrong does not keep it from connecting.
    (error,) = troubles(stack, mark, bus_pid(stack))
    assert error.message.startswith("imdispatcher_check_interval is not a number")
    ports.release_port(dead)


def test_no_password_is_told_anywhere(stack):
    """In the log of all that the tests above have set off, and of the rest that can go wrong."""
    mark = stack.odoo.run_with(directly(stack, IMDISPATCHER_DB_PASSWORD=WRONG_PASSWORD))
    check_that_it_polls(stack, mark, '.*password authentication failed for user "listener"')
    stack.pooler.stop()
    stack.odoo.wait_for_log("DEBUG .*: 127.0.0.1:%d: .*Connection refused" % stack.pooler.port, mark)
    assert not leaks(str(stack.odoo.health()))
    assert not leaks(stack.odoo.log())

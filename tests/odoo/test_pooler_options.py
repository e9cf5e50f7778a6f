"""Options of PgBouncer that operators set: with each of them messages arrive, and the log has no complaint."""

import contextlib
import re
import shutil
import time

import psycopg2
import pytest
from psycopg2.extras import wait_select

from stack.pgbouncer import ADMIN, ADMIN_PASSWORD
from stack.postgres import SUPERUSER, SUPERUSER_PASSWORD
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import records, wait_for_record, wait_until_confirmed
from tests.support.certificates import make_authority, make_certificate
from tests.support.flow import flowing
from tests.support.outage import LOST, direct_way_closed

#: seconds until what is tried again and again is there: generous, for a busy machine
SOON = 15
#: for the line of a database: one client has all of its pool
POOL_OF_ONE = "pool_size=1 reserve_pool=0"

# Under gevent the addon's waiting for the pooler is another than in threads.
pytestmark = pytest.mark.variants("19.0-prefork")


@pytest.fixture(scope="module")
def stack(variant):
    # With the shortest interval a check goes through the pooler every second or two; without polling all that arrives
    # was pushed, or caught up with. Nobody but the bus listens.
    environment = {"IMDISPATCHER_CHECK_INTERVAL": "3", "IMDISPATCHER_POLL_INTERVAL": "0"}
    conf = {"max_cron_threads": 0}
    with Stack(*variant, environment=environment, conf=conf, jobs=False, proxy=True) as stack:
        with stack.client():
            wait_until_confirmed(stack)
            yield stack


def pooler_with(stack, settings=None, **databases):
    """Start the pooler again, with these options of ``[pgbouncer]`` and of databases, and no others; return it."""
    stack.pooler.settings, stack.pooler.databases = settings or {}, databases
    stack.pooler.restart()
    # A check that has failed meanwhile is nobody's fault.
    wait_for_check(stack)
    return stack.pooler


def version(pooler):
    """Return that of PgBouncer, as a tuple of numbers."""
    return tuple(map(int, re.findall(r"\d+", pooler.show("version")[0]["version"])))


def wait_for_check(stack):
    """Wait until another check has passed."""
    began = time.monotonic()

    def checked():
        return stack.odoo.health(SOON)["seconds_since_check"] < time.monotonic() - began

    wait_until(checked, SOON, "a check", 0.1, stack.odoo.log_tail)


def hold(pooler, database):
    """Return a connection that has one of the pool's server connections until it is closed."""
    connection = pooler.connect(database, application_name="tests")
    connection.cursor().execute("SELECT 1")
    return connection


def assert_that_all_is_well(stack):
    """What is sent is pushed and, after an outage, caught up with, each once; the log has the outage, and no more."""
    mark = stack.odoo.log_mark()
    with stack.client(["well"]) as client:
        stack.send("well", "pushed")
        client.wait_for("pushed")
        with direct_way_closed(stack):
            stack.send("well", "missed")
        client.wait_for("missed", SOON)
        wait_until_confirmed(stack, mark)
        stack.send("well", "pushed again")
        client.wait_for("pushed again")
        wait_for_check(stack)
        assert client.messages == ["pushed", "missed", "pushed again"]
    assert said(stack, mark) == [("WARNING", LOST), ("INFO", "listening again")]


def said(stack, since):
    """Return level and beginning of what the addon has said."""
    return [(one.level, re.match(LOST + "|listening again|.*", one.message)[0]) for one in records(stack, since)]


def test_a_limit_for_idle_clients(stack):
    pooler = pooler_with(stack, {"client_idle_timeout": 0.5})
    mark = pooler.log_mark()
    assert_that_all_is_well(stack)
    pooler.wait_for_log("client_idle_timeout", mark)


def test_server_connections_that_do_not_live_long(stack):
    pooler = pooler_with(stack, {"server_lifetime": 0.5})
    mark = pooler.log_mark()
    assert_that_all_is_well(stack)
    pooler.wait_for_log("server lifetime over", mark)


def test_prepared_statements_of_clients(stack):
    if version(stack.pooler) < (1, 21):
        pytest.skip("this PgBouncer has no max_prepared_statements")
    pooler_with(stack, {"max_prepared_statements": 100})
    assert_that_all_is_well(stack)


def test_no_startup_parameter_to_ignore(stack):
    pooler = pooler_with(stack, {"ignore_startup_parameters": ""})
    with pytest.raises(psycopg2.OperationalError, match="unsupported startup parameter"):
        pooler.connect(options="-c geqo=off")
    assert_that_all_is_well(stack)


def test_passwords_that_the_pooler_asks_the_server_for(stack):
    users = stack.pooler.folder / "users-of-its-own"
    users.write_text('"%s" "%s"\n"%s" "%s"\n' % (SUPERUSER, SUPERUSER_PASSWORD, ADMIN, ADMIN_PASSWORD))
    users.chmod(0o644)
    mark = stack.server.log_mark()
    pooler_with(stack, {"auth_file": users, "auth_user": SUPERUSER})
    assert_that_all_is_well(stack)
    assert re.search("FROM pg_(shadow|authid) WHERE", stack.server.log_since(mark))


def test_nobody_without_tls(stack, tmp_path):
    certificate, key = make_certificate(stack.pooler.folder, make_authority(tmp_path, "ours"), "localhost")
    if stack.pooler.run_as:
        shutil.chown(key, stack.pooler.run_as)
    pooler = pooler_with(
        stack, {"client_tls_sslmode": "require", "client_tls_cert_file": certificate, "client_tls_key_file": key}
    )
    with pytest.raises(psycopg2.OperationalError, match="SSL required"):
        pooler.connect(sslmode="disable")
    assert_that_all_is_well(stack)


def test_one_connection_for_all_that_is_sent(stack):
    pooler = pooler_with(stack, postgres=POOL_OF_ONE)
    with stack.client(["flow"]) as client, flowing(stack, client, "flow"):
        assert_that_all_is_well(stack)
    assert max(row["sv_active"] + row["sv_idle"] for row in pooler.show("pools") if row["database"] == "postgres") == 1


def test_a_notice_that_one_waits(stack):
    if version(stack.pooler) < (1, 25):
        pytest.skip("this PgBouncer has no query_wait_notify")
    pooler = pooler_with(stack, {"query_wait_notify": 1}, postgres=POOL_OF_ONE)
    with contextlib.closing(pooler.connect(async_=1)) as first, contextlib.closing(hold(pooler, "postgres")):
        wait_select(first)
        cursor = first.cursor()
        cursor.execute("SELECT 1")
        wait_until(lambda: first.poll() and first.notices, SOON, "a notice", 0.05)
    wait_for_check(stack)
    mark = stack.odoo.log_mark()
    with contextlib.closing(hold(pooler, "postgres")):
        # Only the first in the queue is told, after two seconds.
        stack.proxy.cut()
        wait_for_record(stack, LOST, mark)
        wait_until(lambda: longest_wait(pooler, "postgres") > 1, SOON, "the check to be told", 0.05)
    wait_until_confirmed(stack, mark)
    assert said(stack, mark) == [("WARNING", LOST), ("INFO", "listening again")]


def longest_wait(pooler, database):
    """Return how many whole seconds the first in the queue has waited for a server connection."""
    return max(row["maxwait"] for row in pooler.show("pools") if row["database"] == database)


def test_no_server_connection_in_time_to_send(stack):
    """A check that can't be sent says nothing about the listener."""
    pooler = pooler_with(stack, {"query_wait_timeout": 1}, postgres=POOL_OF_ONE)
    mark, pooler_mark, backend = stack.odoo.log_mark(), pooler.log_mark(), stack.wait_for_listen()
    with stack.client(["held"]) as client:
        with contextlib.closing(hold(pooler, "postgres")):
            pooler.wait_for_log("postgres/.*query_wait_timeout", pooler_mark)
            # The log has it once a minute: another test may have caused it.
            wait_until(lambda: stack.odoo.health()["problem"], 10, "health to say that nothing is sent", 0.2)
            with contextlib.closing(stack.sender(direct=True)) as sender:
                sender.send("held", "pushed")
            client.wait_for("pushed")
        wait_for_check(stack)
    sending = "can't tell whether the listener of database postgres hears: sending fails: "
    assert [one for one in records(stack, mark) if not one.message.startswith(sending)] == []
    assert stack.wait_for_listen() == backend


def test_no_server_connection_in_time_to_look_for_what_was_missed(stack):
    """It is looked for until it can be."""
    with stack.client(["held"]) as client:
        pooler = pooler_with(stack, {"query_wait_timeout": 1, "default_pool_size": 1, "reserve_pool_size": 0})
        mark, pooler_mark = stack.odoo.log_mark(), pooler.log_mark()
        with contextlib.closing(hold(pooler, stack.database)):
            with direct_way_closed(stack), contextlib.closing(stack.sender(direct=True)) as sender:
                sender.send("held", "missed")
            wait_until_confirmed(stack, mark)
            pooler.wait_for_log("%s/.*query_wait_timeout" % stack.database, pooler_mark)
        client.wait_for("missed", SOON)
    assert said(stack, mark) == [("WARNING", LOST), ("INFO", "listening again")]

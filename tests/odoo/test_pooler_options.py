"""Options of PgBouncer that operators set: with all of them messages arrive, and the log has no complaint."""

import contextlib
import re
import time

import pytest

from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import records, wait_until_confirmed
from tests.support.outage import LOST, direct_way_closed

#: seconds until what is tried again and again is there: generous, for a busy machine
SOON = 15
SENDING_FAILS = "can't check the listener of database postgres, since sending a notification fails: "

# Under gevent the addon's waiting for the pooler is another than in threads.
pytestmark = [pytest.mark.rest, pytest.mark.variants("19.0-prefork")]


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


def pooler_with(stack, settings, **databases):
    """Start the pooler again, with these options of ``[pgbouncer]`` and of databases; return it."""
    stack.pooler.settings, stack.pooler.databases = settings, databases
    stack.pooler.restart()
    # A check that has failed meanwhile is nobody's fault.
    wait_for_check(stack)
    return stack.pooler


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


def said(stack, since):
    """Return level and beginning of what the addon has said."""
    return [(one.level, re.match(LOST + "|listening again|.*", one.message)[0]) for one in records(stack, since)]


def test_short_lives_and_small_pools_are_no_trouble(stack):
    options = {"client_idle_timeout": 0.5, "server_lifetime": 0.5, "ignore_startup_parameters": ""}
    version = tuple(map(int, re.findall(r"\d+", stack.pooler.show("version")[0]["version"])))
    if version >= (1, 21):
        options["max_prepared_statements"] = 100
    # One server connection for all that is sent.
    pooler = pooler_with(stack, options, postgres="pool_size=1 reserve_pool=0")
    mark, pooler_mark = stack.odoo.log_mark(), pooler.log_mark()
    with stack.client(["well"]) as client:
        stack.send("well", "pushed")
        client.wait_for("pushed")
        with direct_way_closed(stack):
            stack.send("well", "missed")
        client.wait_for("missed", SOON)
        wait_until_confirmed(stack, mark)
        wait_for_check(stack)
        assert client.messages == ["pushed", "missed"]
    pooler.wait_for_log("client_idle_timeout", pooler_mark)
    pooler.wait_for_log("server lifetime over", pooler_mark)
    assert said(stack, mark) == [("WARNING", LOST), ("INFO", "listening again")]


def test_without_a_server_connection_the_listener_is_kept_and_what_was_missed_is_looked_for_until_there_is_one(stack):
    with stack.client(["held"]) as client:
        options = {"query_wait_timeout": 1, "default_pool_size": 1, "reserve_pool_size": 0}
        pooler = pooler_with(stack, options, postgres="pool_size=1 reserve_pool=0")
        mark, pooler_mark, backend = stack.odoo.log_mark(), pooler.log_mark(), stack.wait_for_listen()
        with contextlib.closing(hold(pooler, "postgres")):
            pooler.wait_for_log("postgres/.*query_wait_timeout", pooler_mark)
            # The log has it once a minute: another test may have caused it.
            wait_until(lambda: stack.odoo.health()["problem"], 10, "health to say that nothing is sent", 0.2)
            with contextlib.closing(stack.sender(direct=True)) as sender:
                sender.send("held", "pushed")
            client.wait_for("pushed")
        wait_for_check(stack)
        assert [one for one in records(stack, mark) if not one.message.startswith(SENDING_FAILS)] == []
        assert stack.wait_for_listen() == backend

        mark, pooler_mark = stack.odoo.log_mark(), pooler.log_mark()
        with contextlib.closing(hold(pooler, stack.database)):
            with direct_way_closed(stack), contextlib.closing(stack.sender(direct=True)) as sender:
                sender.send("held", "missed")
            wait_until_confirmed(stack, mark)
            pooler.wait_for_log("%s/.*query_wait_timeout" % stack.database, pooler_mark)
        client.wait_for("missed", SOON)
    assert said(stack, mark) == [("WARNING", LOST), ("INFO", "listening again")]

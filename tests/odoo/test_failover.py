"""Two PostgreSQL, streaming replication: the primary dies, the standby takes over."""

import contextlib
import time

import psycopg2
import pytest

from stack.database import DATABASE
from stack.stack import Stack
from stack.waiting import wait_until


@contextlib.contextmanager
def replicated_stack(series, workers, **more):
    """Yield a stack with ``standby``, to which its proxy leads, and listeners that try that one first."""
    with contextlib.ExitStack() as exits:

        def environment(stack):
            stack.standby = stack.server.standby()
            exits.callback(stack.standby.close)
            stack.standby.start()
            stack.proxy.target = (stack.standby.host, stack.standby.port)
            hosts = [(stack.proxy.host, stack.proxy.port), (stack.server.host, stack.server.port)]
            return {
                "IMDISPATCHER_DB_HOST": ",".join(host for host, _ in hosts),
                "IMDISPATCHER_DB_PORT": ",".join(str(port) for _, port in hosts),
                **more,
            }

        yield exits.enter_context(Stack(series, workers, environment=environment, jobs=False, proxy=True))


def replicated(stack):
    return stack.server.execute(
        "SELECT replay_lsn >= pg_current_wal_lsn() AS done FROM pg_stat_replication WHERE state = 'streaming'"
    )


def send(sender, message):
    """Send once, although the pooler may still have connections to the server that is gone."""

    def done(action, *arguments):
        try:
            action(*arguments)
        except psycopg2.Error:
            return False
        return True

    wait_until(lambda: done(sender.insert, "tests", message), 20, "the pooler to insert", 0.2)
    payload = '[["%s","tests"]]' % DATABASE
    wait_until(lambda: done(sender.notify, payload), 20, "the pooler to notify", 0.2)


@pytest.mark.variants("14.0-prefork", "19.0-threaded", "19.0-prefork")
def test_after_a_failover_the_bus_pushes_again_and_nothing_is_lost(variant):
    # With read-write libpq tells a standby, without it the listener does.
    more = {} if variant[1] else {"IMDISPATCHER_DB_TARGET_SESSION_ATTRS": "read-write"}
    with replicated_stack(*variant, **more) as stack:
        client = stack.client()
        # The standby is asked first, and passed over.
        primary = "%s:%s" % (stack.server.host, stack.server.port)
        stack.odoo.wait_for_log("listening on .*imbus at %s " % primary)
        assert stack.proxy.accepted
        odoo = stack.odoo.pid
        processes = stack.odoo.processes()

        stack.send("tests", "before")
        client.wait_for("before")
        wait_until(lambda: [row.done for row in replicated(stack)] == [True], 10, "the standby to catch up")

        mark = stack.odoo.log_mark()
        stack.server.kill()
        # So that it is promoted, and sent to, before anybody can listen there.
        stack.proxy.refuse()
        stack.standby.promote()
        stack.pooler.server = stack.standby
        stack.pooler.reload()
        stack.proxy.cut()
        sent = ["meanwhile %d" % number for number in range(5)]
        with contextlib.closing(stack.sender()) as sender:
            for message in sent:
                send(sender, message)
        began = time.monotonic()
        stack.proxy.forward()
        standby = "%s:%s" % (stack.proxy.host, stack.proxy.port)
        stack.odoo.wait_for_log("INFO .*listening again on .*imbus at %s " % standby, mark, 20)
        # The longest delay between two attempts, and a busy machine.
        assert time.monotonic() - began < 12
        client.wait_for(sent[-1], 10)

        stack.send("tests", "after")
        client.wait_for("after")
        assert client.messages == ["before", *sent, "after"]
        # Nothing was restarted.
        assert stack.odoo.pid == odoo
        assert stack.odoo.processes().gevent == processes.gevent
        ours = [line for line in stack.odoo.log_since(mark).splitlines() if "bus_alt_connection" in line]
        assert not [line for line in ours if "Traceback" in line or "internal error" in line]

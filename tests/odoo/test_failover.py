"""Two PostgreSQL, streaming replication: the primary dies, the standby takes over."""

import contextlib
import time

import pytest

from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, troubles


@pytest.fixture
def stack(variant):
    """A stack with ``standby``, to which its proxy leads, and listeners that try that one first."""
    with contextlib.ExitStack() as exits:

        def environment(stack):
            stack.standby = exits.enter_context(stack.server.standby())
            stack.proxy.target = (stack.standby.host, stack.standby.port)
            return {
                "IMDISPATCHER_DB_HOST": "%s,%s" % (stack.proxy.host, stack.server.host),
                "IMDISPATCHER_DB_PORT": "%s,%s" % (stack.proxy.port, stack.server.port),
            }

        yield exits.enter_context(Stack(*variant, environment=environment, jobs=False, proxy=True))


def is_replicated(stack):
    query = "SELECT replay_lsn >= pg_current_wal_lsn() FROM pg_stat_replication WHERE state = 'streaming'"
    return stack.server.value(query)


@pytest.mark.variants("14.0-prefork", "19.0-prefork")
def test_after_a_failover_the_bus_pushes_again_and_nothing_is_lost(stack):
    client = stack.client()
    # The standby is asked first, and passed over.
    stack.odoo.wait_for_log("listening on .*imbus at %s:%s " % (stack.server.host, stack.server.port))
    assert stack.proxy.accepted
    processes = stack.odoo.processes()
    stack.send("tests", "before")
    client.wait_for("before")
    wait_until(lambda: is_replicated(stack), 10, "the standby to catch up")

    mark = stack.odoo.log_mark()
    stack.server.kill()
    # So that it is promoted, and sent to, before anybody can listen there.
    stack.proxy.refuse()
    assert stack.standby.value("SELECT pg_promote()")  # it accepts writes by now
    stack.pooler.server = stack.standby
    stack.pooler.restart()
    stack.proxy.cut()
    sent = ["meanwhile %d" % number for number in range(5)]
    with contextlib.closing(stack.sender()) as sender:
        for message in sent:
            sender.send("tests", message)
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
    assert stack.odoo.processes().gevent == processes.gevent
    # On a busy machine it polls meanwhile.
    assert all(one.message.startswith(("lost the", "nothing listens")) for one in troubles(stack, mark, bus_pid(stack)))

"""The listener hears itself, or the log says why not; and it is not blamed for what others have done."""

import re
import time

import pytest

from stack.postgres import PostgreSQL
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.traffic import statements

INTERVAL = 2
SOON = 15

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-prefork")


@pytest.fixture(scope="module")
def stack(variant):
    environment = {"IMDISPATCHER_CHECK_INTERVAL": str(INTERVAL), "IMDISPATCHER_POLL_INTERVAL": "1"}
    # With a filter Odoo 14.0 has no answer while the pooler is away, see test_health.
    with Stack(*variant, environment=environment, conf={"dbfilter": None}, proxy=True, jobs=False) as stack:
        yield stack


@pytest.fixture(scope="module")
def other_server():
    with PostgreSQL() as server:
        yield server


WRONG = {
    "other server": "is another server than the one that Odoo sends to; set IMDISPATCHER_DB_HOST and",
    "pooler": "is a pooler that does not keep the connection for us; set IMDISPATCHER_DB_HOST and",
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_direct_way_is_told_and_messages_arrive_nevertheless(stack, client, other_server, place):
    mark = stack.odoo.log_mark()
    wrong = stack.pooler if place == "pooler" else other_server
    right = stack.proxy.target
    stack.proxy.target = (wrong.host, wrong.port)
    stack.proxy.cut()
    try:
        address = "%s:%s" % (stack.proxy.host, stack.proxy.port)
        pattern = "can't listen on database postgres: %s %s" % (re.escape(address), WRONG[place])
        wait_for_record(stack, pattern, mark)
        wait_for_record(stack, "nothing listens on database postgres: looking into bus_bus every 1 s", mark)
        for number in range(3):
            stack.send(client.channel, number)
        client.wait_for(2, SOON)
    finally:
        stack.proxy.target = right
        stack.proxy.cut()
    wait_until_confirmed(stack, mark)
    wait_for_record(stack, "the listener of database postgres has taken over from polling", mark)
    stack.send(client.channel, "pushed")
    client.wait_for("pushed")
    assert client.messages == [0, 1, 2, "pushed"]
    # Tried again and again, but told once.
    assert [found.level for found in troubles(stack, mark, bus_pid(stack))].count("ERROR") == 1
    assert "Traceback" not in stack.odoo.log_since(mark)


@pytest.mark.matrix
def test_a_pooler_that_is_down_is_not_the_listeners_fault(stack, client):
    mark, server_mark, pid = stack.odoo.log_mark(), stack.server.log_mark(), stack.wait_for_listen()
    stack.pooler.stop()
    wait_for_record(stack, "can't tell whether the listener of database postgres hears: sending fails: ", mark)
    time.sleep(3)  # it tries again, and says nothing more
    stack.pooler.start()
    wait_until(lambda: stack.odoo.health()["status"] == "pass", SOON, "a check that passes", 0.2, stack.odoo.log_tail)
    stack.send(client.channel, "after")
    client.wait_for("after", SOON)
    assert [found.level for found in records(stack, mark, bus_pid(stack))] == ["WARNING"]
    assert not [one for one in statements(stack, server_mark) if one.listens]
    assert stack.wait_for_listen() == pid

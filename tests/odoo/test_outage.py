"""The direct connection is lost and comes back: Odoo's loop notices nothing, and no message is missed."""

import itertools
import re
import time

import pytest

from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.actions import ScheduledAction
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.flow import flowing
from tests.support.outage import LOST, direct_way_closed

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-threaded", "19.0-prefork")

#: seconds until what was sent in an outage is there; the addon itself waits up to 5 before it tries again
SOON = 10


@pytest.fixture(scope="module")
def stack(variant):
    # Without polling: what arrives here was pushed, or caught up with.
    with Stack(*variant, environment={"IMDISPATCHER_POLL_INTERVAL": "0"}, jobs=False, proxy=True) as stack:
        yield stack


@pytest.mark.matrix
def test_ten_lost_connections_cost_no_message(stack, client):
    begin = stack.odoo.log_mark()
    pid = stack.wait_for_listen()
    with flowing(stack, client, client.channel):
        for _ in range(10):
            mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
            stack.server.execute("SELECT pg_terminate_backend(%s)", (pid,))
            pid = stack.wait_for_listen(since=server_mark)
            wait_until_confirmed(stack, mark)
    lost = LOST + "FATAL:  terminating connection due to administrator command "
    found = [(one.level, one.message[: len(lost)]) for one in troubles(stack, begin, bus_pid(stack))]
    assert found == [("WARNING", lost)] * 10
    assert "Traceback" not in stack.odoo.log_since(begin)


@pytest.mark.matrix
def test_a_message_sent_in_an_outage_arrives_after_it_once_and_the_outage_is_told_once(stack, client):
    began, begin = time.monotonic(), stack.odoo.log_mark()
    with direct_way_closed(stack):
        stack.send(client.channel, "alone")
        time.sleep(3)  # nothing is said meanwhile, though it tries again and again
    client.wait_for("alone", SOON)
    wait_for_record(stack, "listening again on .*imbus", begin)
    lasted = time.monotonic() - began
    # Lines are written half a second late, so the first may still be about the time before.
    told = records(stack, begin, bus_pid(stack))
    first, last = itertools.dropwhile(lambda record: record.level == "INFO", told)
    assert (first.level, last.level) == ("WARNING", "INFO")
    place = "%s:%s" % (stack.proxy.host, stack.proxy.port)
    assert re.match(LOST + r".+ \(it was backend pid \d+ at %s\); trying again$" % place, first.message)
    took, attempts = re.search(r"; the outage took ([\d.]+) s and (\d+) attempt\(s\)\. Since", last.message).groups()
    assert 3 < float(took) <= lasted + 0.01
    # Few after the losses of other tests, many after a quiet time.
    assert 1 <= int(attempts) < 15
    stack.send(client.channel, "after")
    client.wait_for("after")
    assert client.messages == ["alone", "after"]
    assert "Traceback" not in stack.odoo.log_since(begin)


@pytest.mark.matrix
def test_a_crash_of_postgresql_is_survived(stack, client):
    begin = stack.odoo.log_mark()
    stack.server.kill()
    wait_for_record(stack, LOST, begin)
    stack.server.start()
    wait_until_confirmed(stack, begin)
    for message in ("one", "two"):
        stack.send(client.channel, message)
        client.wait_for(message)
    assert client.messages == ["one", "two"]
    assert [found.level for found in troubles(stack, begin, bus_pid(stack))] == ["WARNING"]


@pytest.mark.matrix
@pytest.mark.variants(since=15)  # up to 14.0 nothing can be triggered
def test_a_job_triggered_in_an_outage_runs_right_after_it(stack, client):
    action, workers = ScheduledAction(stack), stack.odoo.processes().cron
    with direct_way_closed(stack):
        action.trigger()
        with pytest.raises(TimeoutError):
            wait_until(action.has_run, 2)
    # Without a notification Odoo looks for work once a minute.
    wait_until(action.has_run, SOON, "the job to run at once", 0.05, stack.odoo.log_tail)
    # No thread and no worker of cron has died of it, as stock ones do.
    assert stack.odoo.processes().cron == workers
    action.trigger()
    wait_until(lambda: action.has_run(2), SOON, "the job to run again", 0.05, stack.odoo.log_tail)


def test_what_was_sent_before_the_very_first_listen_arrives(stack):
    stack.odoo.stop()
    stack.proxy.refuse()
    try:
        mark = stack.odoo.log_mark()
        stack.odoo.start()
        client = stack.client(["first"], listening=False)
        wait_for_record(stack, "can't listen on database postgres: ", mark)
        stack.send("first", "early")
        with pytest.raises(TimeoutError):
            client.wait_for("early", 1)  # or it has another way, and nothing is proved
    finally:
        stack.proxy.forward()
    client.wait_for("early", SOON)
    stack.send("first", "later")
    client.wait_for("later")
    assert client.messages == ["early", "later"]

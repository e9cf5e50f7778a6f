"""The direct connection is lost and comes back: Odoo's loop notices nothing, and no message is missed."""

import contextlib
import itertools
import re
import threading
import time

import pytest

from bus_alt_connection.listener import LONGEST_DELAY
from stack.stack import Stack
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.descriptors import out_of_descriptors
from tests.support.flow import flowing
from tests.support.outage import LOST, direct_way_closed

#: seconds until what was sent in an outage is there; the addon itself waits up to 5 before it tries again
SOON = 10

pytestmark = pytest.mark.variants(spare=["14.0-threaded"])


@pytest.fixture(scope="module")
def stack(variant):
    # Without polling: what arrives here was pushed, or caught up with.
    with Stack(*variant, environment={"IMDISPATCHER_POLL_INTERVAL": "0"}, jobs=False, proxy=True) as stack:
        yield stack


@pytest.fixture
def client(stack, request):
    """A client with a channel of its own, served by a listener that has heard itself."""
    if not stack.odoo.running:
        stack.odoo.start()
    with stack.client([request.node.name]) as client:
        client.channel = request.node.name
        wait_until_confirmed(stack)
        yield client


@pytest.mark.matrix
def test_twenty_lost_connections_cost_no_message(stack, client):
    begin = stack.odoo.log_mark()
    pid = stack.wait_for_listen()
    with flowing(stack, client, client.channel):
        for _ in range(20):
            mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
            stack.server.execute("SELECT pg_terminate_backend(%s)", (pid,))
            pid = stack.wait_for_listen(since=server_mark)
            wait_until_confirmed(stack, mark)
    lost = LOST + "FATAL:  terminating connection due to administrator command "
    found = [(one.level, one.message[: len(lost)]) for one in troubles(stack, begin, bus_pid(stack))]
    assert found == [("WARNING", lost)] * 20
    assert "Traceback" not in stack.odoo.log_since(begin)


@pytest.mark.matrix
def test_a_lone_message_sent_in_an_outage_arrives_soon_after_it(stack, client):
    with direct_way_closed(stack):
        stack.send(client.channel, "alone")
    client.wait_for("alone", SOON)
    assert client.messages == ["alone"]


def test_an_outage_is_told_once_when_it_begins_and_once_when_it_ends(stack, client):
    began = time.monotonic()
    begin = stack.odoo.log_mark()
    with direct_way_closed(stack):
        time.sleep(3)  # nothing is said meanwhile, though it tries again and again
    wait_for_record(stack, "listening again on .*imbus", begin)
    lasted = time.monotonic() - began
    # Lines are written half a second late, so the first may still be about the time before.
    told = records(stack, begin, bus_pid(stack))
    first, last = itertools.dropwhile(lambda record: record.level == "INFO", told)
    assert (first.level, last.level) == ("WARNING", "INFO")
    place = "%s:%s" % (stack.proxy.host, stack.proxy.port)
    assert re.match(LOST + r".+ \(it was backend pid \d+ at %s\); trying again until it works$" % place, first.message)
    took, attempts = re.search(r"; it took ([\d.]+) s and (\d+) attempt\(s\)$", last.message).groups()
    assert 3 < float(took) <= lasted
    # Few after the losses of other tests, many after a quiet time.
    assert 1 <= int(attempts) < 15
    assert "Traceback" not in stack.odoo.log_since(begin)


def test_after_a_long_session_the_first_attempt_is_made_at_once_again(stack, client):
    mark = stack.odoo.log_mark()
    with direct_way_closed(stack):
        time.sleep(1)  # some attempts
    wait_until_confirmed(stack, mark)
    for _ in range(2):
        # A shorter one proves nothing: whoever cuts each of them would be asked without a pause.
        time.sleep(LONGEST_DELAY + 0.1)
        mark = stack.odoo.log_mark()
        stack.proxy.cut()
        again = wait_until_confirmed(stack, mark)
        took, attempts = re.search(r"; it took ([\d.]+) s and (\d+) attempt\(s\)$", again.message).groups()
        assert float(took) < 2
        assert int(attempts) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("end", ["stop", "crash"])
def test_a_time_without_postgresql_is_survived(stack, client, end):
    begin = stack.odoo.log_mark()
    if end == "stop":
        stack.server.stop()
        wait_for_record(stack, LOST + "FATAL:  terminating connection due to administrator command ", begin)
        time.sleep(2)
    else:
        stack.server.kill()
        wait_for_record(stack, LOST, begin)
    stack.server.start()
    wait_until_confirmed(stack, begin)
    for message in ("one", "two"):
        stack.send(client.channel, message)
        client.wait_for(message)
    assert client.messages == ["one", "two"]
    said = [(found.level, found.message) for found in records(stack, begin, bus_pid(stack))]
    assert [level for level, _ in said] == ["WARNING", "INFO"], said


def undisturbed(stack, mark, server_mark):
    """Whether nothing was said of the bus since, nor by it. The cron worker may still be on its way back."""
    listens = re.search(r'(?i)\blisten "?imbus\b', stack.server.log_since(server_mark))
    return not listens and records(stack, mark, bus_pid(stack)) == []


@pytest.mark.matrix
def test_a_restart_of_the_pooler_leaves_the_listener_alone(stack, client):
    mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
    stack.pooler.restart()
    stack.send(client.channel, "after the restart")
    client.wait_for("after the restart", SOON)
    assert undisturbed(stack, mark, server_mark)


def test_a_pause_of_the_pooler_leaves_the_listener_alone(stack, client):
    mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
    stack.pooler.pause()
    sending = threading.Thread(target=stack.send, args=(client.channel, "sent in the pause"))
    sending.start()
    time.sleep(2)
    assert client.messages == []
    stack.pooler.resume()
    client.wait_for("sent in the pause", SOON)
    sending.join()
    assert undisturbed(stack, mark, server_mark)


@pytest.fixture(scope="module")
def usual_stop(stack):
    """Seconds that Odoo takes to stop when all is well."""
    if not stack.odoo.running:
        stack.odoo.start()
    with stack.client(["stop"]):
        wait_until_confirmed(stack)
        return seconds_to_stop(stack)


def seconds_to_stop(stack):
    began = time.monotonic()
    assert stack.odoo.stop() == 0
    return time.monotonic() - began


def test_what_was_sent_before_the_very_first_listen_arrives(stack, usual_stop):
    stack.odoo.stop()  # if that fixture has not just done so
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
    client.close()


@pytest.mark.parametrize("down", ["direct way", "everything"])
def test_odoo_stops_in_an_outage_as_it_does_otherwise(stack, usual_stop, client, down):
    if down == "everything" and stack.series == "14.0":
        pytest.skip("a cron worker of 14.0 waits for the pooler to answer, without the addon as well")
    mark = stack.odoo.log_mark()
    with contextlib.ExitStack() as outage:
        if down == "direct way":
            outage.enter_context(direct_way_closed(stack))
        else:
            stack.server.stop()
            outage.callback(stack.server.start)
            wait_for_record(stack, LOST, mark)
        # From here on it waits most of the time, for its next attempt.
        time.sleep(0.5)
        assert seconds_to_stop(stack) < usual_stop + 3 + stack.odoo.stop_jitter
    assert {found.level for found in troubles(stack, mark)} == {"WARNING"}
    log = stack.odoo.log_since(mark)
    assert not re.search(r"(Exception|Error) in thread|internal error|failed with", log)
    # Without its own connections Odoo has tracebacks of its own.
    assert down == "everything" or "Traceback" not in log


@pytest.mark.parametrize("variant", ["19.0-threaded"], indirect=True, scope="module")
def test_a_stopping_server_does_not_connect_again(stack, client):
    mark = stack.odoo.log_mark()
    connected = stack.proxy.accepted
    stopping = threading.Thread(target=stack.odoo.stop)
    stopping.start()
    stack.odoo.wait_for_log("Initiating shutdown", mark)
    stack.proxy.cut()
    stopping.join()
    assert stack.proxy.accepted == connected
    assert "lost the listener" in stack.odoo.log_since(mark), "it was over too soon, nothing is proved"


@contextlib.contextmanager
def cut_at_the_first_notification(stack):
    """Lose each direct connection once it has carried a notification, which is that of the listener to itself."""
    begin, done = stack.server.log_mark(), threading.Event()

    def sent():
        return len(re.findall(r"statement: .*notify.*'bus_alt_connection_", stack.server.log_since(begin)))

    def cut():
        before = 0
        while not done.wait(0.02):
            now = sent()
            if now > before:
                before = now
                done.wait(0.05)  # the log tells that it began; to arrive and to be counted as heard it takes a few ms
                stack.proxy.cut()

    cutting = threading.Thread(target=cut, daemon=True)
    cutting.start()
    try:
        yield
    finally:
        done.set()
        cutting.join()


@pytest.mark.parametrize("variant", ["19.0-threaded"], indirect=True, scope="module")
def test_a_path_that_cuts_at_the_first_notification_meets_no_storm(stack, client):
    mark, connected = stack.odoo.log_mark(), stack.proxy.accepted
    with cut_at_the_first_notification(stack):
        stack.proxy.cut()
        time.sleep(10)
        connections, lines = stack.proxy.accepted - connected, records(stack, mark)
    assert len([line for line in lines if re.match(LOST, line.message)]) > 2, "it was not cut, nothing is proved"
    assert connections <= 20
    # One about the loss of each, and one if it worked before.
    assert len(lines) <= 2 * connections + 1
    # One that came last may have been spared.
    stack.proxy.cut()
    mark = stack.odoo.log_mark()
    wait_until_confirmed(stack, mark, 15)
    stack.send(client.channel, "after")
    client.wait_for("after", SOON)


@pytest.fixture
def stopped(stack):
    """Have ``client`` start Odoo anew."""
    stack.odoo.stop()


# Odoo itself does not survive it at its look at its own memory, once a minute: it has to have been started just before.
@pytest.mark.parametrize("variant", ["19.0-threaded"], indirect=True, scope="module")
def test_a_loss_while_no_file_can_be_opened_is_survived(stack, stopped, client):
    pid = stack.wait_for_listen()
    mark, connected = stack.odoo.log_mark(), stack.proxy.accepted
    with out_of_descriptors(stack.odoo.pid):
        stack.server.execute("SELECT pg_terminate_backend(%s)", (pid,))
        wait_for_record(stack, LOST, mark)
        stack.send(client.channel, "meanwhile")
        time.sleep(2)  # some attempts, of which nothing is said, and no server hears of them
        assert stack.proxy.accepted == connected, "it could connect, nothing is proved"
    again = wait_for_record(stack, r"listening again on .* (\d+) attempt\(s\)$", mark)
    assert int(again[1]) > 1
    client.wait_for("meanwhile", SOON)
    stack.send(client.channel, "after")
    client.wait_for("after")
    assert client.messages == ["meanwhile", "after"]
    assert "internal error" not in stack.odoo.log_since(mark)
    assert "Exception in thread" not in stack.odoo.log_since(mark)

"""Nothing listens: the dispatcher is fed from bus_bus, and messages arrive late, but they arrive."""

import contextlib
import json
import re
import time

import pytest
import requests

from stack import clients
from stack.sender import MESSAGE_TYPE
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.flow import flowing
from tests.support.traffic import statements

#: seconds until what is looked for every second is there: generous, for a busy machine
SOON = 15
BEGINS = (
    "nothing listens on database postgres: looking into bus_bus every 1 s instead,"
    " so that notifications arrive late but arrive"
)
TAKEN_OVER = "the listener of database postgres has taken over from polling"

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-prefork", "19.0-threaded")


@pytest.fixture(scope="module")
def stack(variant):
    with Stack(*variant, environment={"IMDISPATCHER_POLL_INTERVAL": "1"}, proxy=True) as stack:
        yield stack


@pytest.fixture
def client(stack, request):
    """A client with a channel of its own, of a bus that is polled for."""
    close_the_direct_way(stack)
    mark = stack.server.log_mark()
    with subscribed(stack, request.node.name) as client:
        wait_for_ticks(stack, 1, mark)
        yield client


def close_the_direct_way(stack):
    stack.proxy.refuse()
    stack.proxy.cut()


@contextlib.contextmanager
def subscribed(stack, channel):
    """A client that does not wait for a LISTEN."""
    with stack.client([channel], listening=False) as client:
        client.channel = channel
        yield client


def on_bus_bus(stack, since):
    """Return the statements on bus_bus that were not the tests' own."""
    found = [one.text for one in statements(stack, since) if re.search(r"\bbus_bus\b", one.text)]
    return [text for text in found if not text.lstrip().startswith("INSERT")]


def ticks(stack, since):
    return [text for text in on_bus_bus(stack, since) if "txid_current_snapshot()" in text]


def wait_for_ticks(stack, count, since):
    wait_until(lambda: len(ticks(stack, since)) >= count, SOON, "%d looks" % count, 0.1, stack.odoo.log_tail)


def send_one_by_one(stack, client, count):
    for number in range(count):
        stack.send(client.channel, number)
        time.sleep(0.1)
    client.wait_for(count - 1, SOON)
    assert client.messages == list(range(count))


def test_twenty_messages_arrive_each_once(stack, client):
    send_one_by_one(stack, client, 20)
    answer = requests.get(stack.odoo.event_url + "/bus_alt_connection/health", timeout=10)
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")


def test_it_begins_and_ends_with_a_line_in_the_log_each_and_nothing_lost_or_doubled(stack, client):
    with flowing(stack, client, client.channel, 0.03, SOON):
        mark = stack.odoo.log_mark()
        stack.proxy.forward()
        wait_for_record(stack, TAKEN_OVER, mark)
        wait_until_confirmed(stack, mark)
        mark = stack.odoo.log_mark()
        close_the_direct_way(stack)
        wait_for_record(stack, BEGINS, mark)
        wait_for_ticks(stack, 3, stack.server.log_mark())
        stack.proxy.forward()
        wait_for_record(stack, TAKEN_OVER, mark)
        wait_until_confirmed(stack, mark)
    said = [(found.level, found.message) for found in records(stack, mark, bus_pid(stack))]
    expected = [
        ("WARNING", "lost the listener of database postgres: "),
        ("WARNING", BEGINS),
        # A line about the connection comes half a second later than it happened.
        ("INFO", TAKEN_OVER),
        ("INFO", "listening again on "),
    ]
    assert [(level, message[: len(text)]) for (level, message), (_, text) in zip(said, expected)] == expected
    assert len(said) == len(expected)


def test_rows_committed_late_are_found(stack, client):
    with contextlib.closing(late_row(stack, client.channel, "late")) as plain:
        with contextlib.closing(
            late_row(stack, client.channel, "late, in a savepoint", "SAVEPOINT inner_one")
        ) as inner:
            # Rows with higher ids come, and are known after some looks.
            for number in range(3):
                stack.send("another", number)
            wait_for_ticks(stack, 3, stack.server.log_mark())
            assert client.messages == []
            inner.commit()
            plain.commit()
    client.wait_for_count(2, SOON)
    assert sorted(client.messages) == ["late", "late, in a savepoint"]


def late_row(stack, channel, message, *before):
    """Return a connection with an open transaction that has written a message, hours ago by its date."""
    channel = stack.sender().channel(channel)
    if isinstance(channel, list):
        message = {"type": MESSAGE_TYPE, "payload": message}
    connection = stack.server.connect(stack.database, application_name="tests")
    with connection.cursor() as cr:
        for statement in before:
            cr.execute(statement)
        cr.execute(
            "INSERT INTO bus_bus (channel, message, create_date) VALUES (%s, %s, now() - interval '3 hours')",
            [json.dumps(value, separators=(",", ":")) for value in (channel, message)],
        )
    return connection


@pytest.fixture
def quick_clients(monkeypatch):
    """Have all clients share one session: logging in is what takes long."""
    sessions = {}
    log_in = clients._log_in

    def once(http_url, *args):
        if http_url not in sessions:
            sessions[http_url] = log_in(http_url, *args)
        return sessions[http_url]

    monkeypatch.setattr(clients, "_log_in", once)


@pytest.mark.parametrize("variant", ["14.0-prefork", "19.0-prefork"], indirect=True, scope="module")
def test_many_clients_cost_no_more_queries_than_one(stack, client, quick_clients):
    count = 200 if stack.series == "19.0" else 50
    with contextlib.ExitStack() as exits:
        many = [exits.enter_context(subscribed(stack, "many")) for _ in range(count)]
        stack.send("many", "for all")
        for one in many:
            one.wait_for("for all", SOON)
        stack.send(client.channel, "for one")
        client.wait_for("for one", SOON)
        # Long polls are back by then.
        wait_for_ticks(stack, 2, stack.server.log_mark())

        began, mark = time.monotonic(), stack.server.log_mark()
        wait_for_ticks(stack, 4, mark)
        assert len(ticks(stack, mark)) <= time.monotonic() - began + 1
        # Before each look-up the table is found, and locked.
        assert len(on_bus_bus(stack, mark)) <= 3 * (time.monotonic() - began + 1)
        assert all(one.messages == ["for all"] for one in many)


# With a stack of its own ------------------------------------------------------


def test_with_nothing_configured_but_a_pooler_messages_arrive():
    environment = {"IMDISPATCHER_POLL_INTERVAL": "1", "IMDISPATCHER_CHECK_INTERVAL": "2"}
    with Stack("19.0", 0, direct=False, environment=environment) as stack:
        with subscribed(stack, "tests") as client:
            wait_for_record(stack, BEGINS)
            send_one_by_one(stack, client, 20)
        assert "Traceback" not in stack.odoo.log()
        errors = {found.message for found in troubles(stack) if found.level == "ERROR"}
        assert len(errors) == 1
        assert "%s:%s is a pooler" % (stack.pooler.host, stack.pooler.port) in errors.pop()


def test_polling_can_be_switched_off():
    with Stack("19.0", environment={"IMDISPATCHER_POLL_INTERVAL": "0"}, proxy=True) as stack:
        close_the_direct_way(stack)
        with subscribed(stack, "tests") as client:
            mark = stack.server.log_mark()
            stack.send("tests", "alone")
            with pytest.raises(TimeoutError):
                client.wait_for("alone", 4)
            assert on_bus_bus(stack, mark) == []
            stack.proxy.forward()
            client.wait_for("alone", SOON)
        assert not [found for found in records(stack) if "bus_bus" in found.message]

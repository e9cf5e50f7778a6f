"""What log and health check say of a listener that does not hear, and polling, by which messages arrive then."""

import re

import pytest
import requests

from stack.odoo import series_number
from stack.postgres import PostgreSQL
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.flow import flowing

COUNTERS = "notifications_received notifications_dropped notifications_caught_up outages outage_seconds".split()
NO_LISTENER = {
    "mode": None,
    "status": "pass",
    "problem": None,
    "listening": False,
    "confirmed": False,
    "seconds_since_check": None,
    "round_trip_ms": None,
    "reconnects": 0,
    "counters": dict.fromkeys(COUNTERS, 0),
}
NOT_SENT = "notifications can't be sent through the pooled connection"
#: seconds until what is looked for every second is there: generous, for a busy machine
SOON = 15
BEGINS = (
    "nothing listens on database postgres: polling bus_bus every 1 s instead;"
    " notifications arrive late, but none is lost"
)
TAKEN_OVER = "the listener of database postgres has taken over from polling"
IS_ANOTHER = "is not the server that Odoo sends to; set IMDISPATCHER_DB_HOST and"

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-prefork")


@pytest.fixture(scope="module")
def stack(variant):
    # With a filter Odoo 14.0 asks PostgreSQL which databases there are, ahead of every request without a session: while
    # it can't it answers nothing at all but 500.
    conf = {"dbfilter": None}
    environment = {"IMDISPATCHER_POLL_INTERVAL": "1", "IMDISPATCHER_CHECK_INTERVAL": "3"}
    with Stack(*variant, environment=environment, conf=conf, jobs=False, proxy=True) as stack:
        yield stack


@pytest.fixture
def other_server():
    with PostgreSQL() as server:
        yield server


def ask(url):
    """Return what the health check says; its status code says the same."""
    answer = requests.get(url + "/bus_alt_connection/health", timeout=20)
    assert answer.headers["Cache-Control"] == "no-store"
    says = answer.json()
    assert answer.status_code == (503 if says["status"] == "fail" else 200)
    return says


def wait_for_answer(stack, **wanted):
    """Wait until the process that listens says this, and return all that it says then."""

    def given():
        says = ask(stack.odoo.event_url)
        return wanted.items() <= says.items() and says

    return wait_until(given, 20, "%s" % wanted, 0.2, stack.odoo.log_tail)


def probe_without_traces(stack):
    def sessions():
        return sum(path.is_file() for path in (stack.odoo.folder / "data" / "sessions").rglob("*"))

    for url in {stack.odoo.http_url, stack.odoo.event_url}:
        before = sessions()
        for _ in range(20):
            ask(url)
        assert sessions() <= before + 1, "a session is kept for each probe"


@pytest.mark.matrix
def test_health_passes_where_nobody_listens_and_where_the_listener_is_well(stack):
    if stack.odoo.workers:
        # Neither the HTTP workers nor, before the first client, the gevent process.
        assert ask(stack.odoo.http_url) == ask(stack.odoo.event_url) == NO_LISTENER
    elif series_number(stack.series) < 15:
        assert ask(stack.odoo.http_url) == NO_LISTENER
    with stack.client():
        says = wait_for_answer(stack, status="pass", mode="listening", listening=True, confirmed=True)
        assert 0 <= says["seconds_since_check"] < 60
        assert 0 < says["round_trip_ms"] < 5000
        probe_without_traces(stack)


def test_a_wrong_direct_way_is_told_and_messages_arrive_nevertheless(stack, client, other_server):
    mark = stack.odoo.log_mark()
    right = stack.proxy.target
    stack.proxy.target = (other_server.host, other_server.port)
    stack.proxy.cut()
    try:
        address = "%s:%s" % (stack.proxy.host, stack.proxy.port)
        pattern = "can't listen on database postgres: %s %s" % (re.escape(address), IS_ANOTHER)
        wait_for_record(stack, pattern, mark)
        wait_for_record(stack, BEGINS, mark)
        for number in range(3):
            stack.send(client.channel, number)
        client.wait_for(2, SOON)
    finally:
        stack.proxy.target = right
        stack.proxy.cut()
    wait_until_confirmed(stack, mark)
    wait_for_record(stack, TAKEN_OVER, mark)
    assert client.messages == [0, 1, 2]
    # Tried again and again, but told once.
    assert [found.level for found in troubles(stack, mark, bus_pid(stack))].count("ERROR") == 1
    assert "Traceback" not in stack.odoo.log_since(mark)


def test_polling_begins_and_ends_with_a_line_in_the_log_each_and_nothing_is_lost_or_doubled(stack, client):
    with flowing(stack, client, client.channel, 0.03, SOON):
        mark = stack.odoo.log_mark()
        stack.proxy.refuse()
        stack.proxy.cut()
        wait_for_record(stack, BEGINS, mark)
        before = len(client.messages)
        client.wait_for_count(before + 50, SOON)
        stack.proxy.forward()
        wait_until_confirmed(stack, mark)
        wait_for_record(stack, TAKEN_OVER, mark)
    said = [(found.level, found.message) for found in records(stack, mark, bus_pid(stack))]
    expected = [
        ("WARNING", "lost the listener of database postgres: "),
        ("WARNING", BEGINS),
        ("INFO", "listening again on "),
        ("INFO", TAKEN_OVER),
    ]
    assert [(level, message[: len(text)]) for (level, message), (_, text) in zip(said, expected)] == expected
    assert len(said) == len(expected)


@pytest.mark.matrix
def test_health_degrades_while_polling_fails_without_any_way_recovers_and_blames_the_right_one(stack, client):
    stack.proxy.refuse()
    stack.proxy.cut()
    wait_for_answer(stack, mode="polling", status="degraded", listening=False, confirmed=False)
    stack.pooler.stop()
    wait_for_answer(stack, mode="deaf", status="fail", listening=False)
    stack.pooler.start()
    wait_for_answer(stack, mode="polling")
    stack.proxy.forward()
    says = wait_for_answer(stack, status="pass", mode="listening", confirmed=True)
    assert says["reconnects"] >= 1 and says["counters"]["outages"] >= 1

    mark, backend = stack.odoo.log_mark(), stack.wait_for_listen()
    stack.pooler.stop()
    wait_for_answer(stack, status="degraded", mode="listening", problem=NOT_SENT, confirmed=True)
    stack.pooler.start()
    wait_for_answer(stack, status="pass")
    # The listener is not blamed for the pooler.
    sending_fails = "can't check the listener of database postgres, since sending a notification fails: "
    assert [one for one in troubles(stack, mark) if not one.message.startswith(sending_fails)] == []
    assert stack.wait_for_listen() == backend
    stack.send(client.channel, "after")
    client.wait_for("after", SOON)


@pytest.mark.variants("19.0-prefork")
def test_health_needs_no_database(stack):
    # From now on with several, so that Odoo can not know which one is meant.
    stack.server.execute("CREATE DATABASE another OWNER %s" % stack.server.user)
    stack.odoo.stop()
    stack.odoo.conf["db_name"] = None
    stack.odoo.start()
    for url in {stack.odoo.http_url, stack.odoo.event_url}:
        selector = requests.get(url + "/web/login", allow_redirects=False, timeout=20)
        assert "/web/database/selector" in selector.headers["Location"]
        assert ask(url)["status"] == "pass"
    probe_without_traces(stack)

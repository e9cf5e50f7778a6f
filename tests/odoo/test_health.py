"""What the health check says of how notifications arrive, and polling, by which they do while nothing listens."""

import contextlib
import re

import pytest
import requests

from stack.odoo import series_number
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, wait_for_record, wait_until_confirmed
from tests.support.flow import flowing
from tests.support.traffic import statements

NOT_SENT = "nothing can be sent through the connection of Odoo's other cursors"
#: what may be said in words in each mode: neither hosts nor accounts nor databases
PROBLEMS = {
    "listening": {None, NOT_SENT, "the last check of the listener is older than the check interval"},
    "polling": {"nothing listens, so notifications arrive late"},
    "deaf": {"notifications do not arrive"},
    None: {None},
}
NO_LISTENER = {
    "mode": None,
    "status": "pass",
    "problem": None,
    "listening": False,
    "confirmed": False,
    "seconds_since_check": None,
    "round_trip_ms": None,
    "reconnects": 0,
    "counters": {
        "notifications_received": 0,
        "notifications_dropped": 0,
        "notifications_caught_up": 0,
        "outages": 0,
        "outage_seconds": 0,
    },
}
#: seconds until what is looked for every second is there: generous, for a busy machine
SOON = 15
BEGINS = (
    "nothing listens on database postgres: looking into bus_bus every 1 s instead,"
    " so that notifications arrive late but arrive"
)
TAKEN_OVER = "the listener of database postgres has taken over from polling"


@pytest.fixture(scope="module")
def stack(variant):
    # With a filter Odoo 14.0 asks PostgreSQL which databases there are, ahead of every request without a session: while
    # it can't it answers nothing at all but 500.
    conf = {"dbfilter": None}
    environment = {"IMDISPATCHER_POLL_INTERVAL": "1", "IMDISPATCHER_CHECK_INTERVAL": "3"}
    with Stack(*variant, environment=environment, conf=conf, jobs=False, proxy=True) as stack:
        yield stack


def ask(url, **options):
    """Return the status code and what the answer says, which is nothing but what it may say."""
    answer = requests.get(url + "/bus_alt_connection/health", timeout=20, **options)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    says = answer.json()
    assert set(says) == set(NO_LISTENER)
    assert says["problem"] in PROBLEMS[says["mode"]]
    usual = "degraded" if says["problem"] else "pass"
    assert says["status"] == {"polling": "degraded", "deaf": "fail"}.get(says["mode"], usual)
    assert answer.status_code == (503 if says["status"] == "fail" else 200)
    texts = {"mode", "status", "problem"}
    assert not any(isinstance(value, str) for key, value in says.items() if key not in texts)
    return says


def wait_for_answer(stack, **wanted):
    """Wait until the process that listens says this, and return all that it says then."""

    def given():
        says = ask(stack.odoo.event_url)
        return wanted.items() <= says.items() and says

    return wait_until(given, 20, "%s" % wanted, 0.2, stack.odoo.log_tail)


def sessions(stack):
    """Return the number of files that sessions are kept in."""
    return sum(path.is_file() for path in (stack.odoo.folder / "data" / "sessions").rglob("*"))


def probe_without_traces(stack):
    for url in {stack.odoo.http_url, stack.odoo.event_url}:
        before = sessions(stack)
        for _ in range(20):
            ask(url)
        assert sessions(stack) <= before + 1, "a session is kept for each probe"


def ticks(stack, since):
    return [one for one in statements(stack, since) if re.search(r"txid_current_snapshot.*\bbus_bus\b", one.text)]


def wait_for_ticks(stack, count, since):
    wait_until(lambda: len(ticks(stack, since)) >= count, SOON, "%d looks" % count, 0.1, stack.odoo.log_tail)


@pytest.mark.matrix
def test_health_passes_where_nobody_listens_and_where_the_listener_is_well(stack):
    if stack.odoo.workers:
        # Neither the HTTP workers nor, before the first client, the gevent process.
        assert ask(stack.odoo.http_url) == ask(stack.odoo.event_url) == NO_LISTENER
    elif series_number(stack.series) < 15:
        assert ask(stack.odoo.http_url) == NO_LISTENER
    with stack.client():
        says = wait_for_answer(stack, status="pass", listening=True, confirmed=True)
        assert 0 <= says["seconds_since_check"] < 60
        assert 0 < says["round_trip_ms"] < 5000
        probe_without_traces(stack)


def test_polling_begins_and_ends_with_a_line_in_the_log_each_and_nothing_is_lost_or_doubled(stack):
    with stack.client(["flow"]) as client:
        wait_until_confirmed(stack)
        with flowing(stack, client, "flow", 0.03, SOON):
            mark = stack.odoo.log_mark()
            stack.proxy.refuse()
            stack.proxy.cut()
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


@pytest.mark.matrix
def test_health_degrades_while_polling_fails_without_any_way_and_recovers(stack):
    with stack.client():
        wait_for_answer(stack, status="pass", listening=True)
        mark = stack.odoo.log_mark()
        stack.proxy.refuse()
        stack.proxy.cut()
        wait_for_answer(stack, mode="polling", listening=False, confirmed=False)
        # That is also said before polling began: here it works.
        stack.odoo.wait_for_log("looking into bus_bus every 1 s", mark)
        stack.pooler.stop()
        wait_for_answer(stack, mode="deaf", listening=False)

        stack.pooler.start()
        wait_for_answer(stack, mode="polling")
        stack.proxy.forward()
        says = wait_for_answer(stack, status="pass", mode="listening", confirmed=True)
        assert says["reconnects"] >= 1 and says["counters"]["outages"] >= 1

        stack.pooler.stop()
        wait_for_answer(stack, status="degraded", mode="listening", problem=NOT_SENT, confirmed=True)
        stack.pooler.start()
        wait_for_answer(stack, status="pass")


@pytest.mark.rest
@pytest.mark.variants("19.0-prefork")
def test_health_needs_no_database(stack):
    # From now on with several, so that Odoo can not know which one is meant.
    with contextlib.closing(stack.server.connect(user=stack.server.user, password=stack.server.password)) as connection:
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE another")
    stack.odoo.stop()
    stack.odoo.conf["db_name"] = None
    stack.odoo.start()
    for url in {stack.odoo.http_url, stack.odoo.event_url}:
        selector = requests.get(url + "/web/login", allow_redirects=False, timeout=20)
        assert "/web/database/selector" in selector.headers["Location"]
        assert ask(url)["status"] == "pass"
    probe_without_traces(stack)

"""``GET /bus_alt_connection/health``, which anybody may ask."""

import contextlib

import pytest
import requests

from bus_alt_connection.supervisor import CHECK_TIMEOUT
from stack.odoo import series_number
from stack.stack import Stack
from stack.waiting import wait_until

KEYS = {"mode", "status", "problem", "listening", "confirmed", "seconds_since_check", "round_trip_ms", "reconnects"}
NOT_SENT = "nothing can be sent through the connection of Odoo's other cursors"
NOT_CHECKED = "the last check of the listener is older than the check interval"
PROBLEMS = {
    "listening": {None, NOT_SENT, NOT_CHECKED},
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
}


@pytest.fixture(scope="module")
def stack(variant):
    series, workers = variant
    # With a filter Odoo 14.0 asks PostgreSQL which databases there are, ahead of every request without a session: while
    # it can't it answers nothing at all but 500.
    conf = {"dbfilter": None}
    environment = {"IMDISPATCHER_POLL_INTERVAL": "1"}
    with Stack(series, workers, environment=environment, conf=conf, proxy=True) as stack:
        yield stack


def ask(url, **options):
    """Return the status code and what the answer says, which is nothing but what it may say."""
    answer = requests.get(url + "/bus_alt_connection/health", timeout=20, **options)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    says = answer.json()
    # Neither hosts nor accounts nor databases: there is no text but one of these.
    assert set(says) == KEYS
    assert says["problem"] in PROBLEMS[says["mode"]]
    usual = "degraded" if says["problem"] else "pass"
    assert says["status"] == {"polling": "degraded", "deaf": "fail"}.get(says["mode"], usual)
    assert {type(value) for key, value in says.items() if key not in ("mode", "status", "problem")} <= {
        bool,
        int,
        float,
        type(None),
    }
    return answer.status_code, says


def wait_for_answer(stack, code, status, deadline=15):
    """Wait until the process that listens gives this answer; return all that it says then."""

    def given():
        found, says = ask(stack.odoo.event_url)
        return (found, says["status"]) == (code, status) and says

    return wait_until(given, deadline, "%s %s" % (code, status), 0.2, stack.odoo.log_tail)


def sessions(stack):
    """Return the number of files that sessions are kept in."""
    return sum(path.is_file() for path in (stack.odoo.folder / "data" / "sessions").rglob("*"))


def probe_without_traces(stack):
    for url in {stack.odoo.http_url, stack.odoo.event_url}:
        before = sessions(stack)
        for _ in range(20):
            ask(url)
        assert sessions(stack) <= before + 1, "a session is kept for each probe"


@pytest.mark.matrix
def test_a_process_without_a_listener_passes(stack):
    if stack.odoo.workers:
        # Neither the HTTP workers nor, before the first client, the gevent process.
        assert ask(stack.odoo.http_url) == (200, NO_LISTENER)
        assert ask(stack.odoo.event_url) == (200, NO_LISTENER)
    elif series_number(stack.series) < 15:
        assert ask(stack.odoo.http_url) == (200, NO_LISTENER)
    else:
        # Its cron thread listens already, in this one process.
        assert wait_for_answer(stack, 200, "pass")["listening"]


@pytest.mark.matrix
def test_the_process_that_listens_passes_and_says_how_it_is(stack):
    with stack.client():
        stack.odoo.wait_for_log("listening on .*imbus")
        code, says = ask(stack.odoo.event_url)
        assert code == 200
        assert (says["status"], says["listening"], says["confirmed"], says["reconnects"]) == ("pass", True, True, 0)
        assert 0 <= says["seconds_since_check"] < 60
        assert 0 < says["round_trip_ms"] < 5000
        if stack.odoo.workers:
            assert ask(stack.odoo.http_url) == (200, NO_LISTENER)


def test_twenty_probes_leave_no_sessions_behind(stack):
    probe_without_traces(stack)


@pytest.mark.matrix
def test_it_degrades_while_polling_fails_without_any_way_and_recovers(stack):
    with stack.client():
        wait_for_answer(stack, 200, "pass")
        stack.proxy.refuse()
        stack.proxy.cut()
        says = wait_for_answer(stack, 200, "degraded")
        assert not says["listening"]
        assert not says["confirmed"]
        # "degraded" is also said before polling began: here it works.
        stack.odoo.wait_for_log("looking into bus_bus every 1 s")

        stack.pooler.stop()
        says = wait_for_answer(stack, 503, "fail")
        assert not says["listening"]

        stack.pooler.start()
        wait_for_answer(stack, 200, "degraded")
        stack.proxy.forward()
        says = wait_for_answer(stack, 200, "pass")
        assert says["listening"]
        assert says["confirmed"]
        assert says["reconnects"] == 1


def test_it_fails_while_polling_is_off_and_needs_no_database(stack):
    # From now on with several databases, so that Odoo can not know which one is meant.
    with contextlib.closing(stack.server.connect(user=stack.server.user, password=stack.server.password)) as connection:
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE another")
    stack.odoo.kill()
    stack.odoo.conf["db_name"] = None
    stack.odoo.variables["IMDISPATCHER_POLL_INTERVAL"] = "0"
    stack.proxy.refuse()
    stack.odoo.start()
    for url in {stack.odoo.http_url, stack.odoo.event_url}:
        selector = requests.get(url + "/web/login", allow_redirects=False, timeout=20)
        assert "/web/database/selector" in selector.headers["Location"]

    with stack.client(listening=False):
        wait_for_answer(stack, 503, "fail")
        stack.proxy.forward()
        says = wait_for_answer(stack, 200, "pass")
        assert says["listening"]
        assert says["confirmed"]
        probe_without_traces(stack)


# With a stack of its own: the pooler's absence is all that ever happens to it.
def test_without_polling_it_passes_by_itself_once_the_pooler_is_back():
    environment = {"IMDISPATCHER_POLL_INTERVAL": "0"}
    with Stack("19.0", environment=environment, jobs=False, proxy=True) as stack, stack.client():
        wait_for_answer(stack, 200, "pass")
        stack.pooler.stop()
        stack.proxy.cut()
        # It listens again, but nothing can be sent to find out whether it hears.
        says = wait_for_answer(stack, 503, "fail")
        assert says["listening"]
        assert not says["confirmed"]

        stack.pooler.start()
        says = wait_for_answer(stack, 200, "pass", 20)
        assert (says["mode"], says["listening"], says["confirmed"]) == ("listening", True, True)


def test_it_degrades_within_the_interval_while_nothing_can_be_sent():
    interval = 3
    environment = {"IMDISPATCHER_CHECK_INTERVAL": str(interval)}
    # With a filter Odoo asks for a list of databases before it answers, see above, and that by way of postgres.
    with Stack("19.0", environment=environment, conf={"dbfilter": None}, jobs=False) as stack, stack.client():
        wait_for_answer(stack, 200, "pass")
        stack.pooler.stop()
        says = wait_for_answer(stack, 200, "degraded", interval)
        assert (says["mode"], says["problem"], says["confirmed"]) == ("listening", NOT_SENT, True)

        stack.pooler.start()
        wait_for_answer(stack, 200, "pass")
        # What is sent hangs, and the attempt is given up.
        stack.pooler.admin("PAUSE postgres")
        says = wait_for_answer(stack, 200, "degraded", interval + CHECK_TIMEOUT + 1)
        assert (says["mode"], says["confirmed"]) == ("listening", True)

        stack.pooler.admin("RESUME postgres")
        wait_for_answer(stack, 200, "pass")

"""The listener hears itself, or the log says why not; and it is not blamed for what others have done."""

import contextlib
import re
import select
import time

import pytest
import requests

from stack import ports
from stack.postgres import PostgreSQL
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.traffic import statements
from tests.support.variants import VARIANTS

INTERVAL = 2
SOON = 15
ENVIRONMENT = {"IMDISPATCHER_CHECK_INTERVAL": str(INTERVAL), "IMDISPATCHER_POLL_INTERVAL": "1"}

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-threaded")


@pytest.fixture(scope="module")
def stack(variant):
    with Stack(*variant, environment=ENVIRONMENT, proxy=True) as stack:
        yield stack


@pytest.fixture
def client(stack, request):
    """A client with a channel of its own, served by a listener that has heard itself."""
    with stack.client([request.node.name]) as client:
        client.channel = request.node.name
        wait_until_confirmed(stack)
        yield client


def checks(stack, since):
    """Return the statements by which listeners have sent to themselves, by their channel.

    At first each session has one of its own, later that of all listeners.
    """
    found = {}
    for one in statements(stack, since):
        match = re.search(r"notify.*'(bus_alt_connection(?:_[0-9a-f]{32})?)'", one.text, re.IGNORECASE)
        if match:
            found.setdefault(match[1], []).append(one)
    return found


def wait_for_checks(stack, count, since):
    def found():
        return sum(map(len, checks(stack, since).values())) >= count

    wait_until(found, SOON, "%d checks" % count, 0.1, stack.odoo.log_tail)


def test_checks_recur_and_nobody_else_hears_of_them(stack, client):
    with contextlib.closing(stack.server.connect(application_name="tests")) as foreign:
        foreign.autocommit = True
        foreign.cursor().execute("LISTEN imbus; LISTEN cron_trigger")
        mark, began = stack.server.log_mark(), time.monotonic()
        wait_for_checks(stack, 3, mark)
        of_all = checks(stack, mark)
        for found in of_all.values():
            # The next is sent early enough to know when the interval is over.
            assert len(found) <= (time.monotonic() - began) / (INTERVAL / 2) + 1
            # It is what Odoo sends on, and how, that is checked.
            assert {(one.pooled, one.database) for one in found} == {(True, "postgres")}
        foreign.poll()
        assert foreign.notifies == []
        stack.send("another", "message")
        assert select.select([foreign], [], [], SOON)[0]
        foreign.poll()
        assert {notification.channel for notification in foreign.notifies} == {"imbus"}


def test_the_log_says_that_the_bus_listens_when_it_was_heard(stack, client):
    begin = stack.odoo.log_mark()
    stack.proxy.cut()
    message = wait_until_confirmed(stack, begin).message
    place = re.escape("%s:%s" % (stack.proxy.host, stack.proxy.port))
    channels = "imbus" if stack.odoo.workers else "cron_trigger, imbus"
    match = re.match(
        r"listening again on %s at %s \(database postgres, backend pid (\d+)\), confirmed in ([\d.]+) ms; it took"
        % (channels, place),
        message,
    )
    assert match, message
    assert int(match[1]) == stack.wait_for_listen()
    assert 0 < float(match[2]) < 1000 * INTERVAL
    # Once, not at each check.
    wait_for_checks(stack, 2, stack.server.log_mark())
    assert [found.level for found in records(stack, begin, bus_pid(stack))] == ["WARNING", "INFO"]


@pytest.fixture(scope="module")
def other_server():
    with PostgreSQL() as server:
        yield server


@pytest.mark.parametrize("place", ["pooler", "other server"])
def test_a_wrong_host_is_told_and_messages_arrive_nevertheless(stack, client, other_server, place):
    mark = stack.odoo.log_mark()
    wrong, why = {
        "pooler": (stack.pooler, "is a pooler that does not keep the connection for us"),
        "other server": (other_server, "is another server than the one that Odoo sends to"),
    }[place]
    right = stack.proxy.target
    stack.proxy.target = (wrong.host, wrong.port)
    stack.proxy.cut()
    try:
        address = "%s:%s" % (stack.proxy.host, stack.proxy.port)
        pattern = "can't listen on database postgres: %s %s; set IMDISPATCHER_DB_HOST and" % (address, why)
        wait_for_record(stack, re.escape(pattern), mark)
        wait_for_record(stack, "nothing listens on database postgres: looking into bus_bus every 1 s", mark)
        for number in range(3):
            stack.send(client.channel, number)
        client.wait_for(2, SOON)
        requests.get(stack.odoo.http_url + "/web/login", timeout=30).raise_for_status()
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


def test_a_pooler_that_is_down_is_not_the_listeners_fault(stack, client):
    mark, server_mark, pid = stack.odoo.log_mark(), stack.server.log_mark(), stack.wait_for_listen()
    stack.pooler.stop()
    try:
        wait_for_record(stack, "can't tell whether the listener of database postgres hears: sending fails: ", mark)
        time.sleep(3)  # it tries again, and says nothing more
    finally:
        stack.pooler.start()
    _not_blamed(stack, client, mark, server_mark, pid)


@pytest.fixture
def restarted(stack):
    """Odoo anew: it logs the same problem once a minute, and another test may have caused it just before."""
    stack.odoo.stop()
    stack.odoo.start()


@pytest.mark.parametrize("variant", ["14.0-prefork"], indirect=True, scope="module")
def test_a_pooler_that_is_paused_is_not_the_listeners_fault(stack, restarted, client):
    mark, server_mark, pid = stack.odoo.log_mark(), stack.server.log_mark(), stack.wait_for_listen()
    stack.pooler.pause()
    try:
        wait_for_record(stack, "can't tell whether the listener of database postgres hears: sending fails: ", mark)
    finally:
        stack.pooler.resume()
    _not_blamed(stack, client, mark, server_mark, pid)


def _not_blamed(stack, client, mark, server_mark, pid):
    wait_for_checks(stack, 2, stack.server.log_mark())
    stack.send(client.channel, "after")
    client.wait_for("after", SOON)
    assert [found.level for found in records(stack, mark, bus_pid(stack))] == ["WARNING"]
    assert not [one for one in statements(stack, server_mark) if one.listens]
    assert stack.wait_for_listen() == pid


def test_idle_session_timeout_does_not_cut_the_listener(stack, client):
    if stack.server.value("SHOW server_version_num") < "140000":
        pytest.skip("this PostgreSQL has no idle_session_timeout")
    mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
    stack.server.settings["idle_session_timeout"] = "500ms"
    stack.server.reload()
    try:
        stack.proxy.cut()
        wait_until_confirmed(stack, mark)
        pid = stack.wait_for_listen(since=server_mark)
        quiet = stack.odoo.log_mark()
        # The server does cut others.
        with contextlib.closing(stack.server.connect()) as other:
            assert select.select([other], [], [], SOON)[0]
        time.sleep(2)
        stack.send(client.channel, "after")
        client.wait_for("after", SOON)
        assert records(stack, quiet, bus_pid(stack)) == []
        assert stack.wait_for_listen(since=server_mark) == pid
    finally:
        del stack.server.settings["idle_session_timeout"]
        stack.server.reload()


# With a stack of its own ------------------------------------------------------


def test_zero_switches_the_check_off_but_for_the_first():
    environment = {"IMDISPATCHER_CHECK_INTERVAL": "0"}
    with Stack("19.0", environment=environment, proxy=True) as stack, stack.client():
        wait_until_confirmed(stack)
        assert len(checks(stack, 0)) == 1
        mark = stack.server.log_mark()
        time.sleep(4)
        assert checks(stack, mark) == {}


@contextlib.contextmanager
def standby_of(stack):
    with stack.server.standby() as standby:
        yield {"IMDISPATCHER_DB_PORT": str(standby.port)}


@contextlib.contextmanager
def nobody(stack):
    port = ports.take_port()
    yield {"IMDISPATCHER_DB_PORT": str(port)}
    ports.release_port(port)


@contextlib.contextmanager
def wrong_password(stack):
    yield {"IMDISPATCHER_DB_PORT": str(stack.server.port), "IMDISPATCHER_DB_PASSWORD": "mistyped-s3cret"}


@contextlib.contextmanager
def wrong_database(stack):
    stack.pooler.databases = {"postgres": "dbname=template1"}
    stack.pooler.reload()
    yield {"IMDISPATCHER_DB_PORT": str(stack.server.port)}


@pytest.mark.parametrize(
    ("variant", "place", "why"),
    [
        ("19.0-prefork", standby_of, r"127\.0\.0\.1:\d+: is a standby, and only a primary takes LISTEN; trying again"),
        ("14.0-prefork", nobody, r"127\.0\.0\.1:\d+: .*[Cc]onnection refused.*; trying again until it works$"),
        ("19.0-threaded", wrong_password, r'127\.0\.0\.1:\d+: .*password authentication failed for user "odoo"'),
        ("14.0-prefork", wrong_database, "it listens on database postgres, but Odoo sends on template1$"),
    ],
    ids=["a standby", "a port that nobody listens at", "a wrong password", "another database"],
)
def test_what_is_wrong_from_the_start_is_told_and_messages_arrive_nevertheless(variant, place, why):
    with contextlib.ExitStack() as exits:

        def environment(stack):
            return {**ENVIRONMENT, **exits.enter_context(place(stack))}

        with Stack(*VARIANTS[variant], environment=environment) as stack:
            with stack.client(listening=False) as client:
                wait_for_record(stack, "can't listen on database postgres: " + why)
                stack.send("tests", "late")
                client.wait_for("late", SOON)
            assert [found.level for found in troubles(stack, 0, bus_pid(stack))].count("ERROR") == 1
            log = stack.odoo.log()
        assert "Traceback" not in log
        assert "s3cret" not in log

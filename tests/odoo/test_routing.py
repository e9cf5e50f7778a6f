"""Who is taken past the pooler, and who is not."""

import contextlib
import re

import pytest
import requests

from stack.builds import find_build
from stack.odoo import default_load, series_number
from stack.stack import ADDON, Stack
from stack.waiting import wait_until
from tests.support import addonlog, traffic
from tests.support.actions import ScheduledAction, send
from tests.support.flow import receive_all
from tests.support.payloads import HOSTILE

# An addon that knows nothing of ours: see there for what it does.
OTHER = "other_listeners"
OTHER_ADDONS = ADDON / "tests" / "support" / "addons"


@pytest.fixture(scope="module")
def stack(variant):
    """A stack with our addon and the one of other listeners."""
    series, workers = variant
    addons_path = [*find_build(series).addons_paths, ADDON, OTHER_ADDONS]
    with Stack(
        series,
        workers,
        jobs=False,
        load="%s,bus_alt_connection,%s" % (default_load(series), OTHER),
        conf={"addons_path": ",".join(map(str, addons_path))},
    ) as stack:
        yield stack


@pytest.mark.matrix
def test_what_odoo_sends_through_the_pooler_arrives_in_order_and_each_once(stack, client):
    messages = ["hello %d" % number for number in range(5)]
    send(stack.odoo, client.channel, messages)
    receive_all(stack, client, client.channel, messages)


@pytest.mark.matrix
@pytest.mark.variants(since=15)  # up to 14.0 nothing can be triggered
def test_a_triggered_action_runs_at_once(stack):
    action = ScheduledAction(stack)
    action.trigger()
    # Without a notification Odoo looks for work once a minute.
    wait_until(action.has_run, 10, "the action to run", tail=stack.odoo.log_tail)


@pytest.mark.matrix
def test_the_listener_of_another_addon_is_direct_hears_and_is_told_of_a_loss_by_psycopg2s_error(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "by_itself") as backend:
        assert backend in _direct_backends(stack)
        stack.odoo.wait_for_log("by_itself: the encoding is UTF8", mark)
        stack.server.execute("SELECT pg_terminate_backend(%s)", (backend,))
        # It begins anew.
        stack.odoo.wait_for_log("by_itself ended with OperationalError(.*\\n)*.*by_itself: the encoding is UTF8", mark)
        for message in ("one", "two"):
            _notify(stack, "by_itself", message)
        stack.odoo.wait_for_log("by_itself received two", mark)
    assert re.findall("by_itself received (.*?) *$", stack.odoo.log_since(mark), re.MULTILINE) == ["one", "two"]


@pytest.mark.matrix
def test_what_the_orm_writes_on_a_listening_cursor_is_there_and_its_hooks_run(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "by_itself"):
        stack.odoo.wait_for_log("by_itself: the encoding is UTF8", mark)
    assert _first_partner(stack) == "by_itself: committed"
    query = "SELECT phone_code FROM res_country ORDER BY id LIMIT 1"
    assert stack.server.value(query, dbname=stack.database) == 4711
    said = re.findall("by_itself: (.*?) *$", stack.odoo.log_since(mark), re.MULTILINE)
    same = "the cursor of the environment is the same"
    committed, given_up = ["hook postcommit"], ["hook postrollback"]
    if series_number(stack.series) >= 14:
        committed, given_up = ["hook precommit", *committed], ["hook prerollback", *given_up]
    expected = [same, "found by_itself: committed", *committed, same, "found by_itself: given up", *given_up]
    assert said == [*expected, "the encoding is UTF8"]


@pytest.mark.matrix
def test_a_listener_that_is_handed_its_cursor_hears_and_writes(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "handed_on") as backend:
        assert backend in _direct_backends(stack)
        _notify(stack, "handed_on", "a message")
        stack.odoo.wait_for_log("handed_on received a message", mark)
        assert _first_partner(stack) == "handed on"
    pattern = r"_listen \(\S+ways.py:\d+\) executes LISTEN on a cursor that _open \(\S+ways.py:\d+\) opened"
    (record,) = [one for one in addonlog.records(stack, mark) if "executes LISTEN" in one.message]
    assert re.match(pattern, record.message) and record.level == "INFO"


@pytest.mark.matrix
def test_whatever_is_sent_on_imbus_the_bus_goes_on(stack, client):
    begin = stack.odoo.log_mark()
    sender = stack.sender(direct=True)
    # The first is the one that the log shows.
    sender.notify("\x1b[31mé\nfaked line\u202e" + "y" * 5000)
    for payload in HOSTILE.values():
        sender.notify(payload)
    sender.close()
    stack.send(client.channel, "after the garbage")
    client.wait_for("after the garbage")

    addonlog.wait_for_record(stack, "dropped a notification", begin)
    log = stack.odoo.log_since(begin)
    assert not re.search("Traceback|ERROR|CRITICAL", log), log
    ((_pid, level, message),) = addonlog.troubles(stack, begin)
    assert level == "WARNING"
    assert re.match(r"dropped a notification .*, sent by backend pid \d+ on channel imbus: ", message)
    assert re.search(r": '\\x1b\[31m\\xe9\\nfaked line\\u202ey+'$", message)
    assert len(message) < 300


@pytest.mark.matrix
def test_no_listen_took_the_pooler_and_nothing_else_was_direct(stack):
    # By the log of all that the tests above have set off.
    said = traffic.statements(stack)
    listens = [one for one in said if one.listens]
    # The bus listens since the first of them. On servers that were started anew for this test nothing would be proven.
    assert [one for one in listens if "imbus" in one.text]
    assert [one for one in listens if one.pooled] == []
    # Nor is anything else direct, such as what Odoo does to send, or for a job: only what the session asks of itself.
    own = r"SELECT pg_catalog\.|SELECT name, source FROM pg_catalog\.pg_settings|BEGIN|COMMIT|ROLLBACK"
    other = [one for one in said if not one.pooled and not one.listens]
    assert [one for one in other if not re.match(own, one.text)] == []


@pytest.mark.variants("19.0-prefork")
def test_without_the_addon_nothing_arrives_and_triggered_actions_wait(new_stack):
    stack = new_stack(addon=None)
    action = ScheduledAction(stack)
    with stack.client() as client:
        stack.send("tests", "hello")
        action.trigger()
        with pytest.raises(TimeoutError):
            wait_until(lambda: client.messages or action.has_run(), 5, "anything")
    listens = [one for one in traffic.statements(stack) if one.listens]
    assert listens
    assert all(one.pooled for one in listens)


def _first_partner(stack):
    """Return the name of the first partner, as the server has it."""
    return stack.server.value("SELECT name FROM res_partner WHERE active ORDER BY id LIMIT 1", dbname=stack.database)


def _direct_backends(stack):
    return {row.pid for row in stack.direct_connections()}


def _notify(stack, channel, payload):
    with contextlib.closing(stack.pooler.connect(stack.database, application_name="tests")) as pooled:
        with pooled, pooled.cursor() as cr:
            cr.execute("SELECT pg_notify(%s, %s)", (channel, payload))


@contextlib.contextmanager
def _other_listener(stack, way):
    """Have the other addon listen in one of its ways; gives the process id of the backend that does."""
    mark = stack.server.log_mark()
    url = "%s/%s/listen" % (stack.odoo.http_url, OTHER)
    requests.get(url, {"way": way, "database": stack.database}, timeout=30).raise_for_status()
    try:
        yield stack.wait_for_listen(way, mark)
    finally:
        _notify(stack, way, "end")

    def has_ended():
        return stack.database not in {row.datname for row in stack.direct_connections()}

    wait_until(has_ended, 10, "the connection of the listener to end")

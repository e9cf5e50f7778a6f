"""Who is taken past the pooler, and who is not."""

import contextlib
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from stack.builds import find_build
from stack.odoo import default_load, series_number
from stack.stack import ADDON, Stack
from stack.waiting import wait_until
from tests.support import addonlog, traffic
from tests.support.actions import ScheduledAction
from tests.support.machine import Machine
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
        conf={"addons_path": ",".join(map(str, addons_path)), "max_cron_threads": 2},
        # At a check they see who else listens.
        environment={"IMDISPATCHER_CHECK_INTERVAL": "3"},
    ) as stack:
        yield stack


@pytest.mark.matrix
def test_what_odoo_sends_through_the_pooler_arrives_in_order_and_each_once(stack):
    messages = list(range(20))
    mark = stack.server.log_mark()
    with stack.client() as client:
        _warm_up(stack, client)
        for message in [*messages, "the last"]:
            _ask(stack, "send", channel="tests", message=message)
        _receive(stack, client, "the last")
        assert client.messages == ["the first", *map(str, messages), "the last"]
    said = [one for one in traffic.statements(stack, mark) if "imbus" in one.text and not one.listens]
    assert len(said) > len(messages)
    assert all(one.pooled for one in said)


@pytest.mark.matrix
def test_nobody_is_direct_but_one_of_the_listeners(stack):
    with stack.client(), ThreadPoolExecutor(4) as pool:
        expected = ["odoo-listener-%d" % Machine(stack).settle()]
        ports = [pool.submit(_ask, stack, "ask", seconds=0.3) for _ in range(8)]
        ports += [pool.submit(_ask, stack, "ask_system") for _ in range(8)]
        seen = []
        while not all(port.done() for port in ports):
            seen.append([row.application_name for row in stack.direct_connections()])
        assert seen
        assert [names for names in seen if names != expected] == []
        assert {int(port.result()) for port in ports} <= stack.pooler.server_ports()


@pytest.mark.matrix
@pytest.mark.variants(since=15)  # up to 14.0 nothing can be triggered
def test_a_triggered_action_runs_at_once_and_on_the_pooler(stack):
    action = ScheduledAction(stack)
    mark = stack.server.log_mark()
    action.trigger()
    # Without a notification Odoo looks for work once a minute.
    wait_until(action.has_run, 10, "the action to run", tail=stack.odoo.log_tail)
    said = traffic.statements(stack, mark)
    assert [one.pooled for one in said if action.token in one.text] == [True]
    # What Odoo does for a job it does on the pooler too: to find, lock and mark it, and to trigger it.
    work = [one for one in said if "ir_cron" in one.text]
    triggers = [one for one in said if re.search("(?i)notify.*cron_trigger", one.text)]
    assert work and triggers
    assert all(one.pooled for one in work + triggers)


@pytest.mark.matrix
def test_the_log_tells_where_listeners_go_and_where_they_listen(stack):
    with stack.client():
        leader = Machine(stack).settle()
        (row,) = stack.direct_connections()
        place = "%s:%s" % (stack.server.host, stack.server.port)
        through = "through process %d at" % leader
        expected = {
            (pid, ", ".join(sorted(channels)), "at" if pid == leader else through, place, row.pid)
            for pid, channels in _channels_by_process(stack).items()
        }

        def told():
            pattern = re.compile(
                r"listening on (.+?) ((?:through process \d+ )?at) (\S+) \(database postgres, backend pid (\d+)\),"
                r" confirmed in [\d.]+ ms"
            )
            found = [(one.pid, pattern.match(one.message)) for one in addonlog.records(stack) if one.level == "INFO"]
            return {(pid, *match.groups()[:3], int(match[4])) for pid, match in found if match}

        wait_until(lambda: expected <= told(), 10, "%s in the log" % expected, tail=stack.odoo.log_tail)
    line = "listeners go to %s, all other cursors to %s:%s" % (place, stack.pooler.host, stack.pooler.port)
    starts = [one.pid for one in addonlog.records(stack) if one.message.startswith(line)]
    processes = stack.odoo.processes()
    # All others are forks of the first.
    assert sorted(starts) == sorted([processes.main] + ([processes.gevent] if processes.gevent else []))


@pytest.mark.matrix
def test_the_listener_of_another_addon_is_direct_and_hears(stack):
    ways = {"formatted": "postgres", "composed": "postgres", "by_registry": stack.database}
    if series_number(stack.series) >= 17:
        ways["with_tools_sql"] = "postgres"
    for way, database in ways.items():
        with _other_listener(stack, way, database) as backend:
            assert backend in _direct_backends(stack)
            for message in ("one", "two"):
                _notify(stack, database, way, message)
            stack.odoo.wait_for_log("%s received two" % way)
            assert re.findall("%s received (.*?) *$" % way, stack.odoo.log(), re.MULTILINE) == ["one", "two"]


@pytest.mark.matrix
def test_the_listener_of_another_addon_is_told_of_a_loss_by_psycopg2s_error(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "wanting_more", "postgres"):
        # Our feed has no such thing: it is that of an ordinary connection.
        stack.odoo.wait_for_log("wanting_more encodes in UTF8", mark)
        again = stack.odoo.log_mark()
        stack.server.execute("SELECT pg_terminate_backend(%s)", (stack.wait_for_listen("wanting_more"),))
        # It begins anew.
        stack.odoo.wait_for_log("wanting_more ended with OperationalError", again)
        stack.odoo.wait_for_log("wanting_more encodes in UTF8", again)
        addonlog.wait_for_record(stack, "lost the listener", again)
        _notify(stack, "postgres", "wanting_more", "one")
        stack.odoo.wait_for_log("wanting_more received one", mark)


@pytest.mark.matrix
def test_what_the_orm_writes_on_a_listening_cursor_is_there_and_its_hooks_run(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "writing", stack.database):
        _notify(stack, stack.database, "writing", "a message")
        stack.odoo.wait_for_log("writing received a message", mark)
        assert _first_partner(stack) == "writing: committed"
        query = "SELECT phone_code FROM res_country ORDER BY id LIMIT 1"
        assert stack.server.value(query, dbname=stack.database) == 4711
    said = re.findall("writing: (.*?) *$", stack.odoo.log_since(mark), re.MULTILINE)
    same = "the cursor of the environment is the same"
    committed, given_up = ["hook postcommit"], ["hook postrollback"]
    if series_number(stack.series) >= 14:
        committed, given_up = ["hook precommit", *committed], ["hook prerollback", *given_up]
    assert said == [same, "found writing: committed", *committed, same, "found writing: given up", *given_up]


@pytest.mark.matrix
def test_a_listener_that_is_handed_its_cursor_hears_and_writes(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "handed_on", stack.database) as backend:
        assert backend in _direct_backends(stack)
        _notify(stack, stack.database, "handed_on", "a message")
        stack.odoo.wait_for_log("handed_on received a message", mark)
        assert _first_partner(stack) == "handed on"
    pattern = r"_listen \(\S+ways.py:\d+\) executes LISTEN on a cursor that _open \(\S+ways.py:\d+\) opened"
    (record,) = [one for one in addonlog.records(stack, mark) if "executes LISTEN" in one.message]
    assert re.match(pattern, record.message) and record.level == "INFO"


@pytest.mark.matrix
def test_whatever_is_sent_on_imbus_the_bus_goes_on(stack):
    client = stack.client(["payload"])
    addonlog.wait_until_confirmed(stack)
    begin = stack.odoo.log_mark()
    sender = stack.sender(direct=True)
    # The first is the one that the log shows.
    sender.notify("\x1b[31mé\nfaked line\u202e" + "y" * 5000)
    for payload in HOSTILE.values():
        sender.notify(payload)
    stack.send("payload", "after the garbage")
    client.wait_for("after the garbage")
    for payload in _random_payloads(3000):
        sender.notify(payload)
    client.subscribe(["payload"], stack.last_id())
    stack.send("payload", "after much garbage")
    client.wait_for("after much garbage")
    sender.close()

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
    # Of the session itself: which one it is, and its settings.
    own = r"SELECT pg_catalog\.|SELECT name, source FROM pg_catalog\.pg_settings|BEGIN|COMMIT|ROLLBACK"
    other = [one for one in said if not one.pooled and not one.listens]
    assert [one for one in other if not re.match(own, one.text)] == []


@pytest.mark.rest
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


def _random_payloads(count):
    """Yield payloads that are put together from pieces of JSON, always the same."""
    generator = random.Random(count)
    pieces = '[ [[ ] ]] { } : , " "a" "\\u0000" "\\ud800" 1 1e999 NaN null'.split()
    for _ in range(count):
        yield "[%s]" % "".join(generator.choices(pieces, k=generator.randrange(12)))


def _channels_by_process(stack):
    """Return the channels that each listening process of Odoo's listens on, by process id."""
    with_cron = series_number(stack.series) >= 15
    processes = stack.odoo.processes()
    if not processes.gevent:
        return {processes.main: {"imbus", "cron_trigger"} if with_cron else {"imbus"}}
    return {processes.gevent: {"imbus"}, **{pid: {"cron_trigger"} for pid in processes.cron if with_cron}}


def _first_partner(stack):
    """Return the name of the first partner, as the server has it."""
    return stack.server.value("SELECT name FROM res_partner WHERE active ORDER BY id LIMIT 1", dbname=stack.database)


def _direct_backends(stack):
    return {row.pid for row in stack.direct_connections()}


def _warm_up(stack, client):
    # With its first look into the database a websocket may miss what comes meanwhile: until Odoo has the session in a
    # cache it is the query for that which takes the snapshot, and what is notified then counts as seen to.
    stack.send("tests", "the first")
    _receive(stack, client, "the first", notify_again=True)


def _receive(stack, client, message, deadline=15, notify_again=False):
    """Wait until the client has got a message."""
    with contextlib.closing(stack.sender()) as sender:
        end = time.monotonic() + deadline
        while True:
            try:
                return client.wait_for(message, 1)
            except TimeoutError:
                if time.monotonic() > end:
                    raise
            if notify_again or series_number(stack.series) < 16:
                # What comes between two polls waits for the next NOTIFY, see LongPollClient.
                sender.notify(json.dumps([sender.channel("tests")]))


def _ask(stack, what, **params):
    """Have the other addon do something; see its controllers."""
    answer = requests.get("%s/%s/%s" % (stack.odoo.http_url, OTHER, what), params, timeout=30)
    answer.raise_for_status()
    return answer.text


def _notify(stack, database, channel, payload):
    with contextlib.closing(stack.pooler.connect(database, application_name="tests")) as pooled, pooled.cursor() as cr:
        cr.execute("SELECT pg_notify(%s, %s)", (channel, payload))
        pooled.commit()


@contextlib.contextmanager
def _other_listener(stack, way, database):
    """Have the other addon listen in one of its ways; gives the process id of the backend that does."""
    mark = stack.server.log_mark()
    _ask(stack, "listen", way=way, database=database)
    try:
        yield stack.wait_for_listen(way, mark)
    finally:
        _notify(stack, database, way, "end")
    odoos = {"odoo-listener-%d" % pid for pid in _channels_by_process(stack)}
    wait_until(
        lambda: len(rows := stack.direct_connections()) <= len(odoos)
        and {(row.application_name, row.datname) for row in rows} <= {(name, "postgres") for name in odoos},
        10,
        "the connection of the listener to end",
    )

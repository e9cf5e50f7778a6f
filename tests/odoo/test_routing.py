"""Who is taken past the pooler, and who is not."""

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from stack.builds import find_build, run_python
from stack.odoo import Odoo, default_load, series_number
from stack.stack import ADDON, Stack
from stack.waiting import wait_until
from tests.support import addonlog, traffic
from tests.support.machine import Machine

# An addon that knows nothing of ours: see there for what it does.
OTHER = "other_listeners"
OTHER_ADDONS = ADDON / "tests" / "support" / "addons"

MESSAGES = list(range(20))

# At a check they see who else listens.
SETTLING_SOON = {"IMDISPATCHER_CHECK_INTERVAL": "3"}

WAYS = [
    "literal",
    "in_lower_case",
    "put_together",
    "formatted",
    "formatted_in_quotes",
    "with_parameters",
    "composed",
    "with_tools_sql",
    "by_registry",
    "in_a_nested_function",
]


@pytest.fixture(scope="module")
def stack(variant):
    """A stack with our addon and the one of other listeners."""
    series, workers = variant
    addons_path = [*find_build(series).addons_paths, ADDON, OTHER_ADDONS]
    with Stack(
        series,
        workers,
        load="%s,bus_alt_connection,%s" % (default_load(series), OTHER),
        conf={"addons_path": ",".join(map(str, addons_path)), "max_cron_threads": 2},
        environment=SETTLING_SOON,
    ) as stack:
        yield stack


def test_without_the_addon_no_notification_arrives(new_stack):
    stack = new_stack(addon=None)
    with stack.client() as client:
        _send_all(stack)
        with pytest.raises(TimeoutError):
            _receive(stack, client, "the last", deadline=3)
        assert client.messages == []
    said = traffic.statements(stack)
    assert any(one.listens for one in said)
    assert all(one.pooled for one in said)


@pytest.mark.matrix
def test_with_the_addon_all_notifications_arrive_in_order_and_each_once(stack):
    with stack.client() as client:
        _warm_up(stack, client)
        _send_all(stack)
        _receive(stack, client, "the last")
        assert client.messages == ["the first", *MESSAGES, "the last"]


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
def test_odoos_own_notify_takes_the_pooler(stack):
    with stack.client(["own"]) as client:
        mark = stack.server.log_mark()
        _ask(stack, "send", channel="own", message="hello")
        said = [one for one in traffic.statements(stack, mark) if "imbus" in one.text and "own" in one.text]
        assert len(said) == 1
        assert said[0].pooled
        _receive(stack, client, "hello", channel="own")


@pytest.mark.matrix
def test_the_log_has_one_line_per_start_of_odoo(stack):
    line = "listeners go to %s:%s, all other cursors to %s:%s" % (
        stack.server.host,
        stack.server.port,
        stack.pooler.host,
        stack.pooler.port,
    )
    found = [one for one in addonlog.records(stack) if "listeners go to" in one.message]
    assert sorted(one.pid for one in found) == _starts(stack)
    # What is no record of the log, a remark of Odoo's on stderr, seems part of the one before.
    assert {(one.level, one.message.splitlines()[0].rstrip()) for one in found} == {("INFO", line)}


@pytest.mark.matrix
def test_the_log_tells_who_listens_where(stack):
    with stack.client():
        leader = Machine(stack).settle()
        (row,) = stack.direct_connections()
        place = "%s:%s" % (stack.server.host, stack.server.port)
        expected = {
            (
                pid,
                ", ".join(sorted(channels)),
                "at" if pid == leader else "through process %d at" % leader,
                place,
                row.pid,
            )
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


@pytest.mark.matrix
@pytest.mark.parametrize("way", WAYS)
def test_the_listener_of_another_addon_is_direct_and_hears(stack, way):
    if way == "with_tools_sql" and series_number(stack.series) < 17:
        pytest.skip("Odoo has it since 17.0")
    database = stack.database if way == "by_registry" else "postgres"
    with _other_listener(stack, way, database) as backend:
        assert backend in _direct_backends(stack)
        for message in ("one", "two"):
            _notify(stack, database, way, message)
        stack.odoo.wait_for_log("%s received two" % way)
        assert re.findall("%s received (.*?) *$" % way, stack.odoo.log(), re.MULTILINE) == ["one", "two"]


@pytest.mark.matrix
def test_who_wants_more_of_its_cursor_gets_it_of_an_ordinary_one(stack):
    mark = stack.odoo.log_mark()
    with _other_listener(stack, "wanting_more", "postgres"):
        # Ours has no such thing.
        stack.odoo.wait_for_log("wanting_more encodes in UTF8", mark)
        lost = stack.wait_for_listen("wanting_more")
        assert lost in _direct_backends(stack)
        again = stack.odoo.log_mark()
        stack.server.execute("SELECT pg_terminate_backend(%s)", (lost,))
        # It is told, and begins anew.
        stack.odoo.wait_for_log("wanting_more ended with OperationalError", again)
        stack.odoo.wait_for_log("wanting_more encodes in UTF8", again)
        addonlog.wait_for_record(stack, "lost the listener", again)
        _notify(stack, "postgres", "wanting_more", "one")
        stack.odoo.wait_for_log("wanting_more received one", mark)
    # Of each that has listened by way of that connection.
    found = addonlog.troubles(stack, mark)
    assert {one.level for one in found} == {"WARNING"}
    assert len(found) == len({one.pid for one in found})


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
def test_a_cursor_that_was_not_closed_names_the_function_that_opened_it(stack):
    mark = stack.odoo.log_mark()
    _ask(stack, "listen", way="forget", database=stack.database)

    def told():
        return re.findall(r"Cursor was created at \S*?(\w+\.py):\d+", stack.odoo.log_since(mark))

    wait_until(lambda: len(told()) >= 2, 10, "both cursors to be complained of", tail=stack.odoo.log_tail)
    assert told() == ["ways.py", "ways.py"]


@pytest.mark.matrix
@pytest.mark.variants(spare=["14.0-threaded", "19.0-threaded", "19.0-prefork"])
def test_scheduled_actions_run_by_the_timer_where_nothing_triggers_them(stack):
    if series_number(stack.series) >= 15:
        pytest.skip("from 15.0 on they are triggered, see test_cron")

    def results():
        return [one for one in traffic.statements(stack) if re.match("UPDATE ir_cron SET nextcall", one.text)]

    # Of a new database some are due at once, and every minute or so it looks for them.
    wait_until(results, 90, "the results of a scheduled action", 0.5, stack.odoo.log_tail)
    assert all(one.pooled for one in results())


@pytest.mark.matrix
def test_the_log_complains_of_nothing_but_what_the_tests_did(stack):
    lost = re.compile(
        "lost the listener of database postgres: (FATAL:  terminating connection due to administrator command "
        r"|process \d+, through which it listened, has lost its connection )"
    )
    assert [one.message for one in addonlog.troubles(stack) if not lost.match(one.message)] == []


@pytest.mark.matrix
def test_no_listen_took_the_pooler_and_nothing_else_was_direct(stack):
    # By the log of all that the tests above have set off.
    said = traffic.statements(stack)
    listens = [one for one in said if one.listens]
    assert listens
    assert [one for one in listens if one.pooled] == []
    # Of the session itself: which one it is, and its settings.
    own = r"SELECT pg_catalog\.|SELECT name, source FROM pg_catalog\.pg_settings|BEGIN|COMMIT|ROLLBACK"
    other = [one for one in said if not one.pooled and not one.listens]
    assert [one for one in other if not re.match(own, one.text)] == []


def test_odoo_serves_and_is_told_what_to_set_if_nothing_is_configured(new_stack):
    stack = new_stack(direct=False, environment={"IMDISPATCHER_POLL_INTERVAL": "0.5"})
    with stack.client(listening=False) as client:
        stack.send("tests", "hello")
        # By polling, since a LISTEN would be deaf.
        client.wait_for("hello", 20)
    found = [one for one in addonlog.records(stack) if one.level == "WARNING" and "is set" in one.message]
    assert sorted(one.pid for one in found) == _starts(stack)
    for one in found:
        assert {"IMDISPATCHER_DB_HOST", "IMDISPATCHER_DB_PORT"} <= set(re.findall(r"\w+", one.message))


def test_odoo_conf_alone_will_do(new_stack, monkeypatch):
    monkeypatch.setattr("stack.stack.Odoo", _OdooByConf)
    stack = new_stack(direct=False)
    with stack.client() as client:
        _send_all(stack)
        _receive(stack, client, "the last")
        Machine(stack).settle()


class _OdooByConf(Odoo):
    """All that it is told of the addon stands in odoo.conf."""

    def prepare(self):
        server = self.database_server.server
        self.conf.update(
            server_wide_modules=self.load,
            imdispatcher_db_host=server.host,
            imdispatcher_db_port=server.port,
            imdispatcher_check_interval=3,
        )
        super().prepare()

    def command(self):
        command = super().command()
        at = command.index("--load")
        return command[:at] + command[at + 2 :]


@pytest.mark.matrix
@pytest.mark.variants(spare=["14.0-prefork", "19.0-prefork"])
def test_only_post_load_patches_and_only_once(variant, tmp_path):
    build = find_build(variant[0])
    script = """
        import json
        import sys

        import odoo.service.server  # 19.1 finds it there before it can load an addon
        from odoo import sql_db
        from odoo.modules.module import initialize_sys_path, load_openerp_module
        from odoo.tools import config

        config.parse_config(["--addons-path", sys.argv[1], "--data-dir", sys.argv[2]])
        initialize_sys_path()
        seen = [sql_db.Connection.cursor]
        import odoo.addons.bus_alt_connection

        seen.append(sql_db.Connection.cursor)
        for _ in range(2):
            odoo.addons.bus_alt_connection.post_load()
            seen.append(sql_db.Connection.cursor)
        load_openerp_module("bus_alt_connection")
        seen.append(sql_db.Connection.cursor)
        bus = "odoo.addons.bus" in sys.modules
        print(json.dumps({"cursors": [seen.index(one) for one in seen], "bus": bus}))
    """
    found = run_python(
        build, script, ",".join(map(str, [*build.addons_paths, ADDON])), tmp_path, IMDISPATCHER_DB_HOST="db-01"
    )
    # Before, after the import, after each of three times that it was loaded.
    assert found["cursors"] == [0, 0, 2, 2, 2]
    assert not found["bus"]


def _starts(stack):
    """Return the ids of the processes that have loaded the addon themselves; all others are forks of the first."""
    processes = stack.odoo.processes()
    return sorted([processes.main] + ([processes.gevent] if processes.gevent else []))


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


def _send_all(stack):
    with contextlib.closing(stack.sender()) as sender:
        for message in [*MESSAGES, "the last"]:
            sender.send("tests", message)


def _warm_up(stack, client):
    # With its first look into the database a websocket may miss what comes meanwhile: until Odoo has the session in a
    # cache it is the query for that which takes the snapshot, and what is notified then counts as seen to.
    stack.send("tests", "the first")
    _receive(stack, client, "the first", notify_again=True)


def _receive(stack, client, message, channel="tests", deadline=15, notify_again=False):
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
                sender.notify(json.dumps([sender.channel(channel)]))


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

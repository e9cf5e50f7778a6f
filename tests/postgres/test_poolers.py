"""What the listener and the check make of poolers that are not like PgBouncer, in front of a real server."""

import os
import re
import subprocess
import sys
import threading

import pytest

from bus_alt_connection import connection, settings, supervisor
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.listener import DirectSession, Listener
from bus_alt_connection.log import CONFIRMED, UNHEARD
from stack.poolers import Odyssey, Pgpool, PinningOdyssey
from stack.postgres import PASSWORD, USER, libpq_parameters
from stack.stack import ADDON
from tests.support.poolerlike import PoolerLike
from tests.support.realpoolers import skip_without
from tests.unit.fakes import Events, FakeFeed

CHECK = ADDON / "bus_alt_connection" / "check.py"


@pytest.fixture
def listen(monkeypatch):
    """Return a function that starts listener and supervisor: ``listen(to, through)`` gives feed and events."""
    monkeypatch.setattr(supervisor, "CHECK_TIMEOUT", 1.0)
    listeners, threads, feeds = [], [], []

    def listen(to, through):
        feed, events = FakeFeed("imbus"), Events()

        def pooled(database):
            return connection.opening(libpq_parameters(through, database))

        def direct(_listener):
            return DirectSession(libpq_parameters(to))

        listener = Listener("postgres", direct, lambda: False, events, 19)
        listener.add(feed)
        options = settings.read({}, {})
        watcher = supervisor.Supervisor(listener, pooled, Databases(), Backlog(pooled), options)
        listeners.append(listener)
        feeds.append(feed)  # weakly held by the listener
        for one in (watcher, listener):
            threads.append(threading.Thread(target=one.run, daemon=True))
            threads[-1].start()
        return feed, events

    yield listen
    for listener in listeners:
        listener.close()
    for thread in threads:
        thread.join(10)


@pytest.fixture
def check(tmp_path):
    """Return a function that runs the check and returns exit code and verdict: ``check(through, to)``."""

    def check(through, to):
        conf = tmp_path / "odoo.conf"
        options = {"db_host": through.host, "db_port": through.port, "db_user": USER, "db_password": PASSWORD}
        conf.write_text("[options]\n" + "".join("%s = %s\n" % option for option in options.items()))
        foreign = re.compile("PG|IMDISPATCHER_|ODOO_|OPENERP_|HOME$")
        variables = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        variables.update(IMDISPATCHER_DB_HOST=to.host, IMDISPATCHER_DB_PORT=str(to.port), HOME=str(tmp_path))
        command = [sys.executable, CHECK, "-c", conf]
        done = subprocess.run(command, env=variables, stdout=-1, stderr=-2, text=True, timeout=60)
        print(done.stdout)
        return done.returncode, done.stdout.strip().splitlines()[-1]

    return check


# One that hands on the server's pid


def test_a_pooler_that_hands_on_the_pid_is_told_from_the_server(server):
    with PoolerLike(server) as pgagroal:
        assert connection.keeps_session(libpq_parameters(pgagroal)) is False
    assert connection.keeps_session(libpq_parameters(server)) is True


def test_the_log_calls_a_pooler_that_hands_on_the_pid_a_pooler(server, pooler, listen):
    with PoolerLike(server) as pgagroal:
        events = listen(pgagroal, pooler)[1]
        assert "is a pooler that does not keep the connection" in events.wait_for(UNHEARD).reason


def test_the_log_calls_it_a_pooler_if_odoo_sends_through_it_as_well(server, listen):
    with PoolerLike(server) as pgagroal:
        events = listen(pgagroal, pgagroal)[1]
        assert "is a pooler that does not keep the connection" in events.wait_for(UNHEARD).reason


def test_past_a_pooler_that_hands_on_the_pid_listeners_hear(server, listen):
    with PoolerLike(server) as pgagroal:
        feed, events = listen(server, pgagroal)
        events.expect(CONFIRMED)
        server.execute("NOTIFY imbus, '[\"a\"]'")
        assert feed.get() == ("imbus", '["a"]')


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_check_does_not_send_away_who_has_a_pooler_that_hands_on_the_pid(server, check, size):
    with PoolerLike(server, size) as pgagroal:
        assert check(pgagroal, server) == (0, "OK: listeners hear what Odoo sends")


def test_the_check_says_so_if_the_listeners_go_to_it(server, check):
    with PoolerLike(server) as pgagroal:
        code, verdict = check(pgagroal, pgagroal)
        assert code == 1 and "NOT OK" in verdict


# One that keeps LISTEN


def test_a_pooler_that_keeps_listen_will_do(server, pooler, listen):
    with PoolerLike(server, size=4, hands_on_pid=False, pins=True) as odyssey:
        mark = server.log_mark()
        feed, events = listen(odyssey, pooler)
        session = events.expect(CONFIRMED).session
        assert session.facts.pooled and session.confirmed == {"imbus"}
        server.execute("NOTIFY imbus, '[\"a\"]'")
        assert feed.get() == ("imbus", '["a"]')
        # Others may get that server connection when we are gone.
        assert "idle_session_timeout" not in server.log_since(mark)


def test_a_pooler_that_heeds_but_the_first_of_several_statements_will_do(server, pooler, listen):
    with PoolerLike(server, size=4, hands_on_pid=False, pins=True, first_only=True) as pgdog:
        feed, events = listen(pgdog, pooler)
        events.expect(CONFIRMED)
        server.execute("NOTIFY imbus, '[\"a\"]'")
        assert feed.get() == ("imbus", '["a"]')


def test_the_check_takes_a_pooler_that_keeps_listen(server, pooler, check):
    with PoolerLike(server, size=4, hands_on_pid=False, pins=True) as odyssey:
        assert check(pooler, odyssey)[0] == 0


# Real ones


@pytest.mark.parametrize(
    ("pooler", "without_way_past"),
    [
        (Odyssey, "NOT OK: 1 error(s)"),
        (PinningOdyssey, "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"),
        # It hands on the pid as well, so there is no telling it from a server.
        (Pgpool, "OK; but Odoo uses no pooler, or one that keeps sessions, so it needs no addon to listen"),
    ],
)
def test_the_check_says_of_a_real_pooler_what_it_is_good_for(server, check, pooler, without_way_past):
    skip_without(pooler)
    with pooler(server) as other:
        assert check(other, server)[0] == 0
        code, verdict = check(other, other)
        assert verdict == without_way_past
        assert code == (0 if verdict.startswith("OK") else 1)


# And the server itself


def test_a_session_is_prepared_for_a_long_life_only_once_it_was_heard(server, pooler, listen):
    mark = server.log_mark()
    session = DirectSession(libpq_parameters(server))
    session.listen(frozenset(["imbus"]), lambda *_warning: None)
    session.close()
    assert "idle_session_timeout" not in server.log_since(mark)
    events = listen(server, pooler)[1]
    events.expect(CONFIRMED)
    server.wait_for_log(r"set_config\('idle_session_timeout', '0', false\)", mark)

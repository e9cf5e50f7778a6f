"""What a server, a database's encoding or a full feed refuses costs no session, no storm and no flood of lines."""

import threading
import time

import psycopg2
import pytest

from bus_alt_connection import connection, log, settings
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.listener import DirectSession
from bus_alt_connection.log import CONFIRMED
from bus_alt_connection.supervisor import Supervisor
from tests.unit.fakes import FakeFeed
from tests.unit.test_connect import FakeLibpq, libpq, names  # noqa: F401

_FACTS = (1, False, "postgres", "15.3", 5)


@pytest.fixture
def session(names, libpq, monkeypatch):  # noqa: F811
    """Return a function that connects to a server which answers statements by ``answer(statement)``."""
    monkeypatch.setattr(log, "_last", {})
    names.update(a=["192.0.2.1"])

    def connect(answer):
        def answer_all(statement):
            return [_FACTS] if "pg_is_in_recovery" in statement else answer(statement)

        libpq(lambda parameters: FakeLibpq(answer=answer_all))
        return connection.connect({"host": "a"}, DirectSession)

    return connect


@pytest.fixture
def warned():
    return []


@pytest.fixture
def warn(warned):
    return lambda *arguments: warned.append(arguments)


class _Denied(psycopg2.ProgrammingError):
    pgcode = "42501"


class _NoSuchCharacter(psycopg2.DataError):
    pgcode = "22P05"


def test_a_name_that_psycopg2_can_not_encode_costs_a_warning_and_no_session(session, warn, warned):
    def answer(statement):
        # As psycopg2 does for a database in SQL_ASCII.
        statement.encode("ascii")
        return []

    listening = session(answer)
    listening.listen(frozenset(["imbus", "\u00fc"]), warn)
    assert len(warned) == 1 and "LISTEN imbus" in listening._cnx.statements


def test_a_name_that_the_server_refuses_is_warned_of_once_and_others_are_unlistened(session, warn, warned):
    listening = session(lambda statement: _NoSuchCharacter("none") if "bad" in statement else [])
    for number in range(3):
        listening.listen(frozenset(["imbus", "bad", "check%d" % number]), warn)
    assert len(warned) == 1
    assert 'UNLISTEN "check0"' in listening._cnx.statements


def test_a_role_that_may_not_change_settings_keeps_its_session(session):
    listening = session(lambda statement: _Denied("permission denied") if "pg_settings" in statement else [])
    listening.settle()
    assert listening._cnx.statements[-1].startswith("LISTEN") or not listening.channels


def test_an_address_shows_no_password_even_if_it_is_a_uri():
    assert "s3cret" not in settings.address({"host": "postgres://odoo:s3cret@db/x"})


@pytest.fixture
def running(fake, events, listen, options):
    """Return the listener of ``feed``, whose supervisor runs, and that feed."""
    fake.rows["x"] = []
    feed = FakeFeed("imbus")
    listener = listen(feed)
    supervisor = Supervisor(listener, fake.opening, Databases(["x"]), Backlog(fake.opening), options)
    thread = threading.Thread(target=supervisor.run, daemon=True)
    thread.start()
    yield listener, feed
    listener.close()
    thread.join(10)


def test_a_full_feed_causes_no_storm_of_logins(fake, events, running):
    _listener, feed = running
    events.expect(CONFIRMED)
    feed.full = True
    before = len(fake.logins)
    fake.now = time.monotonic()
    fake.write("x", '"one"')
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert len(fake.logins) - before < 10
        time.sleep(0.05)
    feed.full = False


def test_an_end_in_order_during_a_check_is_no_trouble(fake, events, running, logged):
    listener, _feed = running
    events.expect(CONFIRMED)
    fake.silent.add("pooler")
    listener.listen(_feed, frozenset(["imbus", "more"]))
    deadline = time.monotonic() + 5
    before = len(fake.logins)
    while len(fake.logins) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    listener.close()
    assert not logged("can't tell")

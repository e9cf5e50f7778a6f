"""A listener keeps one session for all its feeds, and replaces it whatever happens to it."""

import gc
import threading
import types

import psycopg2
import pytest
from psycopg2 import extensions
from psycopg2.extensions import Notify

from bus_alt_connection import connection, tasks
from bus_alt_connection import listener as listener_module
from bus_alt_connection.listener import (
    IMMEDIATE_RECONNECTS,
    LONGEST_DELAY,
    SECONDS_PER_RECONNECT,
    Backoff,
    DirectSession,
    Listener,
)
from bus_alt_connection.log import LOST, UNHEARD
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from tests.unit.fakes import FakeFeed, FakeSession, connected


@pytest.fixture
def feed():
    return FakeFeed("imbus")


# Life -----------------------------------------------------------------------------------------------------------------


def test_each_feed_gets_what_is_sent_on_its_channels_and_odoo_can_read(fake, listen, logged):
    bus, cron = FakeFeed("imbus"), FakeFeed("cron_trigger")
    listener = listen(bus, cron)
    connected(listener)
    assert listener.session.channels == {"imbus", "cron_trigger", HEARTBEAT_CHANNEL, listener.session.check_channel}
    fake.notify("imbus", "no JSON")
    fake.notify("cron_trigger", "x")
    fake.notify("imbus", '["a"]')
    assert (bus.get(), cron.get()) == (("imbus", '["a"]'), ("cron_trigger", "x"))
    assert bus.all() == cron.all() == [] and len(logged("can't read")) == 1
    listener.listen(bus, frozenset(["imbus", "more"]))
    assert listener.wait_for_listen(bus, 5)
    fake.notify("more", "a")
    assert bus.get() == ("more", "a")
    assert listener.counters["notifications_received"] == 4
    listener.remove(cron)
    assert listener.wait(lambda: "cron_trigger" not in listener.session.channels, 5)


def test_what_a_feed_of_cron_has_no_room_for_is_logged_and_not_looked_up(listen, logged):
    cron = FakeFeed("cron_trigger")
    cron.full = True
    listener = listen(cron)
    for _ in range(2):
        assert not listener.deliver([Notify(7, "cron_trigger", "x")])
    assert len(logged("the listener on cron_trigger does not fetch")) == 1 and listener.dropped == 0


@pytest.mark.parametrize("kind, reason", [(LOST, "server closed the connection unexpectedly"), (UNHEARD, "nothing")])
def test_a_session_that_is_lost_or_given_up_is_replaced_and_that_is_an_event(fake, events, listen, feed, kind, reason):
    listener = listen(feed)
    lost = connected(listener)
    if kind == LOST:
        fake.cut()
    else:
        listener.replace(lost, kind, reason)
    event = events.expect(kind)
    assert (event.session, event.reason, lost.closed) == (lost, reason, True)
    kept = connected(listener, lost)
    # Too late for these.
    listener.replace(lost, UNHEARD, "late")
    listener.confirm(lost, frozenset(["imbus"]), 0.001)
    fake.notify("imbus", '["a"]')
    assert feed.get() == ("imbus", '["a"]')
    assert listener.session is kept and kept.confirmed is None and fake.connects == 2


def test_through_a_pooler_it_listens_only_to_the_check_before_that_is_confirmed(fake, listen, feed):
    fake.pooled = True
    listener = listen(feed)
    connected(listener)
    assert listener.session.channels == {listener.session.check_channel}
    listener.confirm(listener.session, frozenset(), 0.001)
    assert listener.wait_for_listen(feed, 5)
    assert listener.session.channels == {"imbus", HEARTBEAT_CHANNEL, listener.session.check_channel}


def test_a_token_counts_for_the_session_that_received_it(fake, events, listen, feed):
    listener = listen(feed)
    first = connected(listener)
    listener.expect("token")
    fake.notify(first.check_channel, "token")
    assert listener.wait_for_token(first, 5)
    listener.expect("another")
    fake.notify(first.check_channel, "token")
    assert not listener.wait_for_token(first, 0.01)
    fake.cut()
    events.expect(LOST)
    second = connected(listener)
    fake.notify(second.check_channel, "another")
    assert listener.wait_for_token(second, 5) and not listener.wait_for_token(first, 5)


def test_a_token_counts_that_is_read_late_and_behind_other_notifications(fake, listen, feed):
    """As after this process was stopped: all of it is there already when the time is over."""
    listener = listen(feed)
    session = connected(listener)
    parts = [[Notify(7, "imbus", '["a"]')], [Notify(7, session.check_channel, "token")]]
    first_is_read, go_on, over_by_then = threading.Event(), threading.Event(), []

    def receive():
        if len(parts) == 1:
            first_is_read.set()
            go_on.wait(5)
        # There is more to read.
        session._waker.wake()
        return parts.pop(0) if parts else FakeSession.receive(session)

    def wait(condition, seconds):
        if seconds:
            first_is_read.wait(5)
            over_by_then.append(condition())
            go_on.set()
            listener.wait(condition, 5)
        return condition()

    fake.settle()
    session.receive = receive
    listener.expect("token")
    assert listener.wait_for_token(session, 0.0, wait) and over_by_then == [False]


def test_it_ends_with_its_last_feed_which_may_be_garbage_collected(fake, events):
    listener = Listener("postgres", fake.connect, lambda: False, events)
    feeds, another = [FakeFeed("imbus")], FakeFeed("cron_trigger")
    listener.add(feeds[0])
    listener.add(another)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    connected(listener)
    fake.listeners.append(listener)
    listener.remove(another)
    # Its thread has done what that woke it up for.
    fake.settle()
    assert not listener.has_ended()
    feeds.clear()
    gc.collect()
    thread.join(5)
    assert not thread.is_alive() and not listener.add(another) and not fake.sessions


def test_a_bug_does_not_end_it(fake, events, listen, feed, logged, monkeypatch):
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.05)
    errors = [KeyError("a bug"), psycopg2.OperationalError("refused")]

    def connect(_listener):
        if errors:
            raise errors.pop()
        return fake.connect()

    def report(_events, _event):
        raise KeyError("a bug in the journal")

    monkeypatch.setattr(type(events), "__call__", report)
    connected(listen(feed, connect=connect))
    assert logged("internal error", "'a bug'") and logged("internal error", "'a bug in the journal'")


# The back-off ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """The time that the back-off sees: ``now[0]``, monotonic seconds."""
    now = [1000.0]
    monkeypatch.setattr(listener_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_lost_sessions_are_replaced_at_once_while_the_budget_lasts(now):
    backoff = Backoff()
    waits = [backoff.after(0.05, 0.05) for _ in range(IMMEDIATE_RECONNECTS + 1)]
    assert waits[:-1] == [0] * IMMEDIATE_RECONNECTS and waits[-1] > 0
    now[0] += SECONDS_PER_RECONNECT
    assert backoff.after(0.05, 0.05) == 0 < backoff.after(0.05, 0.05)
    # A session that outlived the longest delay is none of them, and the delays begin anew.
    assert backoff.after(LONGEST_DELAY + 0.1, 5.1) == 0
    assert 0 < backoff.after(0.05, 0.0) <= 0.1


@pytest.mark.parametrize("part, chosen", [(0.5, min), (1.0, max)])
def test_the_delay_doubles_up_to_5_s_at_random_and_an_attempt_is_part_of_it(monkeypatch, part, chosen):
    monkeypatch.setattr(listener_module.random, "uniform", lambda *limits: chosen(limits))
    backoff = Backoff()
    delays = [backoff.after(None, 0.0) for _ in range(8)]
    assert delays == pytest.approx([part * each for each in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0)])
    assert backoff.after(None, 2.0) == 5.0 * part - 2.0
    # The server worked: it may restart several times.
    assert backoff.after(3.0, 3.0) == 0
    assert backoff.after(None, 0.0) == pytest.approx(0.1 * part)


# LISTEN on a server ---------------------------------------------------------------------------------------------------


class ServersError(psycopg2.OperationalError):
    """As psycopg2 raises it, which lets nobody set a code of the server's."""

    def __init__(self, text, pgcode=None):
        super().__init__(text)
        self._pgcode = pgcode

    pgcode = property(lambda self: self._pgcode)


GONE = ServersError('could not access status of transaction 1\nDETAIL:  Could not open file "pg_xact/0000"', "58P01")
TIDY_UP = "SELECT pg_catalog.pg_notification_queue_usage()"


class FakeConnection:
    """A connection of psycopg2 that notes what it was asked, and raises what ``refuse(statement)`` returns, if any."""

    description = None

    def __init__(self, refuse):
        self.refuse, self.asked, self.notices = refuse, [], []
        self.cursor = lambda: self
        self.poll = lambda: extensions.POLL_OK

    def execute(self, query, values=None):
        self.asked.append(query)
        error = self.refuse(query)
        if error:
            raise error


def direct_session(refuse=lambda query: None, pooled=False):
    session = DirectSession.__new__(DirectSession)
    session.parameters, session.server_version = {"password": "s3cret"}, 150000
    session._cnx = FakeConnection(refuse)
    session.facts = connection.Facts("db-01:5432", 7, pooled, False, "postgres", "15.3", 5)
    return session


def listen_on(session, *channels):
    session.listen(frozenset(channels), listener_module._logger.warning)


def test_listen_is_one_statement_but_several_through_a_pooler(logged):
    session = direct_session()
    listen_on(session, "imbus", 'a"b')
    listen_on(session, "cron_trigger", "imbus")
    assert session._cnx.asked == ['LISTEN "a""b"; LISTEN imbus', 'LISTEN cron_trigger; LISTEN imbus; UNLISTEN "a""b"']
    errors = [GONE]
    session = direct_session(lambda query: errors.pop() if query == "LISTEN imbus" and errors else None, pooled=True)
    listen_on(session, "cron_trigger", "imbus")
    listen_on(session, "imbus")
    repeated = [TIDY_UP, "LISTEN imbus"]
    assert session._cnx.asked[:4] == ["LISTEN cron_trigger", "LISTEN imbus", *repeated]
    assert session._cnx.asked[4:] == ["LISTEN imbus", "UNLISTEN cron_trigger"]
    assert session.channels == {"imbus"}
    # A queue that begins before the commit log was tidied up.
    (line,) = logged("kept LISTEN from working")
    assert "could not access status of transaction 1" in line and "update the server" in line


def test_a_channel_that_is_about_to_go_is_not_in_force():
    session, seen = direct_session(), []
    listen_on(session, "a", "b")
    session.execute = lambda statement: seen.append(session.channels)
    listen_on(session, "b", "c")
    assert seen == [{"b"}] and session.channels == {"b", "c"}


@pytest.mark.parametrize("code, statements", [(None, 1), ("42501", 1), ("58P01", 3)])
def test_an_error_of_listen_that_does_not_go_away_ends_the_session(code, statements):
    error = ServersError("no way for s3cret\nHINT: none", code)
    session = direct_session(lambda query: error if query.startswith("LISTEN") else None)
    with pytest.raises(psycopg2.OperationalError) as raised:
        listen_on(session, "imbus")
    assert str(raised.value) == "no way for ***" and raised.value.sqlstate == code
    assert len(session._cnx.asked) == statements and session.channels == frozenset()


def test_a_name_that_is_refused_is_warned_of_once_and_costs_no_session(logged):
    def refuse(query):
        # psycopg2 itself refuses it so, if the database's encoding is SQL_ASCII.
        query.encode("ascii")
        return ServersError("none", "22P05") if "bad" in query else None

    session = direct_session(refuse)
    for number in range(3):
        listen_on(session, "imbus", "bad", "\u00fc", "check%d" % number)
    assert len(logged("refuses to listen")) == 2
    assert {"LISTEN imbus", 'UNLISTEN "check0"'} <= set(session._cnx.asked)


def test_a_role_that_may_not_change_settings_keeps_its_session():
    session = direct_session(lambda query: ServersError("no right", "42501") if "pg_settings" in query else None)
    listen_on(session, "imbus")
    session.settle()
    # pg_stat_activity shows the last statement.
    assert session._cnx.asked[-1] == "LISTEN imbus"


def test_a_path_that_gives_no_answer_is_tried_only_once(monkeypatch):
    """Or a silent path would be noticed later than the check interval promises."""
    attempts = []

    def opening(parameters, *_arguments):
        attempts.append(parameters)
        yield from ()
        raise psycopg2.OperationalError("no answer in 1 s")

    monkeypatch.setattr(connection, "opening", opening)
    kind, reason = tasks.finish(direct_session().explaining(None, 0.0, False))
    assert (kind, "nothing arrives" in reason, len(attempts)) == (LOST, True, 1)


@pytest.mark.parametrize(
    "confirmed, another, sender, keeps, blamed",
    [
        (None, [5], 5, True, "is a pooler"),
        (None, [5, 5], 6, True, "is not the server"),
        (None, [5, 5], 6, False, "is a pooler"),
        # A balancer has given each connection another server.
        (None, [6, 8], 7, True, "is not the server"),
        # The server was replaced after the first look, or is being replaced.
        (None, [5, 6], 6, True, None),
        (frozenset(), [6, 6], 7, True, None),
    ],
)
def test_the_advice_names_what_is_wrong(monkeypatch, confirmed, another, sender, keeps, blamed):
    session = direct_session(pooled=another[-1] == 5)
    session.confirmed = confirmed

    def ending_with(value):
        yield from ()
        return value

    *there, here = (session.facts._replace(started=started) for started in [*another, sender])
    opened = types.SimpleNamespace(examining=lambda: ending_with(there.pop(0)), close=lambda: None)
    monkeypatch.setattr(connection, "opening", lambda *_arguments: ending_with(opened))
    monkeypatch.setattr(connection, "keeping_session", lambda _parameters: ending_with(keeps))
    kind, reason = tasks.finish(session.explaining(lambda: ending_with(here), 0.0, False))
    assert (kind == UNHEARD and blamed in reason) if blamed else kind == LOST

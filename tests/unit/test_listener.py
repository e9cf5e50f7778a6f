"""A listener keeps one session for all its feeds, and is back after whatever happens to that."""

import errno
import gc
import threading
import time
import types

import psycopg2
import pytest
from psycopg2 import extensions

from bus_alt_connection import connection, tasks
from bus_alt_connection import listener as listener_module
from bus_alt_connection.listener import (
    IMMEDIATE_RECONNECTS,
    SECONDS_PER_RECONNECT,
    Backoff,
    DirectSession,
    Listener,
)
from bus_alt_connection.log import CONFIRMED, FAILED, LOST, UNHEARD
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from tests.unit.fakes import FakeFeed, connected, noted


def confirmed(listener, channels=("imbus",)):
    """Have the session confirmed, as the supervisor does; return it."""
    session = listener.session
    listener.confirm(session, frozenset(channels), 0.001)
    return session


# Life


def test_notifications_come_to_the_feeds_of_their_channel(fake, events, listen):
    bus, cron = FakeFeed("imbus"), FakeFeed("cron_trigger")
    listener = listen(bus, cron)
    connected(listener)
    assert listener.session.channels == {"imbus", "cron_trigger", HEARTBEAT_CHANNEL, listener.session.check_channel}
    fake.notify("cron_trigger", "x")
    fake.notify("imbus", '["a"]')
    assert bus.get() == ("imbus", '["a"]')
    assert cron.all() == [("cron_trigger", "x")]


def test_a_channel_that_comes_later_is_in_force_soon(fake, events, listen):
    feed = FakeFeed("imbus")
    listener = listen(feed)
    connected(listener)
    listener.listen(feed, feed.channels | {"more"})
    listener.wait_for_listen(feed, 5)
    fake.notify("more", "a")
    assert feed.get() == ("more", "a")
    listener.listen(feed, feed.channels - {"more"})
    assert listener.wait(lambda: "more" not in listener.session.channels, 5)


@pytest.mark.parametrize("what", ["cut", "replace"])
def test_a_lost_session_is_replaced(fake, events, listen, what):
    feed = FakeFeed("imbus")
    listener = listen(feed)
    lost = connected(listener)
    if what == "cut":
        fake.cut()
        event = events.expect(LOST)
        assert event.reason == "server closed the connection unexpectedly"
    else:
        listener.replace(lost, UNHEARD, "nothing comes")
        event = events.expect(UNHEARD)
        assert event.reason == "nothing comes"
    assert event.session is lost and lost.closed
    connected(listener, lost)
    assert fake.connects == 2
    fake.notify("imbus", '["a"]')
    assert feed.get() == ("imbus", '["a"]')


def test_a_session_that_is_gone_is_not_replaced_again(fake, events, listen):
    listener = listen(FakeFeed("imbus"))
    lost = connected(listener)
    fake.cut()
    events.expect(LOST)
    kept = connected(listener, lost)
    listener.replace(lost, UNHEARD, "late")
    listener.confirm(lost, frozenset(["imbus"]), 0.001)
    fake.notify("imbus", "[]")
    assert listener.session is kept and kept.confirmed is None


def test_it_is_tried_until_it_works(fake, events, listen):
    fake.refuse()
    listener = listen(FakeFeed("imbus"))
    events.expect(FAILED, FAILED)
    assert listener.failed
    fake.forward()
    connected(listener)
    assert not listener.failed


def test_what_is_confirmed_is_told_once(fake, events, listen):
    listener = listen(FakeFeed("imbus"))
    session = connected(listener)
    assert listener.deaf_since is not None
    for _ in range(3):
        confirmed(listener)
    assert events.expect(CONFIRMED).session is session
    assert session.confirmed == {"imbus"}
    assert listener.deaf_since is None
    fake.cut()
    events.expect(LOST)
    assert listener.deaf_since is not None


def test_channels_that_are_confirmed_later_are_told_again(events, listen):
    feed = FakeFeed("imbus")
    listener = listen(feed)
    connected(listener)
    confirmed(listener)
    events.expect(CONFIRMED)
    listener.listen(feed, feed.channels | {"more"})
    listener.wait_for_listen(feed, 5)
    confirmed(listener, ("imbus", "more"))
    assert events.expect(CONFIRMED).session.confirmed == {"imbus", "more"}


def test_behind_a_pooler_nothing_but_the_check_is_listened_to_before_it_is_confirmed(fake, events, listen):
    fake.pooled = True
    feed = FakeFeed("imbus")
    listener = listen(feed)
    connected(listener)
    assert listener.session.channels == {listener.session.check_channel}
    confirmed(listener, ())
    listener.wait_for_listen(feed, 5)
    assert listener.session.channels == {"imbus", HEARTBEAT_CHANNEL, listener.session.check_channel}


def test_it_ends_with_its_last_feed(fake, events, listen):
    feeds = FakeFeed("imbus"), FakeFeed("cron_trigger")
    listener = listen(*feeds)
    session = connected(listener)
    listener.remove(feeds[0])
    assert not listener.closed
    listener.remove(feeds[1])
    assert listener.closed and not listener.add(feeds[0])
    deadline = time.monotonic() + 5
    while not session.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert session.closed and fake.connects == 1


def test_it_ends_while_it_waits(fake, events, listen):
    fake.refuse()
    listener = listen(FakeFeed("imbus"))
    for _ in range(4):
        events.expect(FAILED)
    (thread,) = (one for one in threading.enumerate() if one.name.startswith("bus_alt_connection.listener"))
    listener.close()
    thread.join(0.5)
    assert not thread.is_alive()


def test_it_connects_no_more_once_odoo_is_stopping(fake, events, listen):
    stopping = []
    feed = FakeFeed("imbus")
    listener = listen(feed, stopping=lambda: stopping)
    (thread,) = (one for one in threading.enumerate() if one.name.startswith("bus_alt_connection.listener"))
    connected(listener)
    stopping.append(1)
    fake.cut()
    thread.join(5)
    assert not thread.is_alive() and listener.closed and fake.connects == 1


# Faults


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_it_outlives_a_want_of_descriptors(fake, events, listen, monkeypatch, number):
    listener = listen(FakeFeed("imbus"))
    connected(listener)
    confirmed(listener)
    # From here on it has a selector.
    noted(listener)
    selector = listener_module.selectors.DefaultSelector

    def exhausted():
        raise OSError(number, "Too many open files")

    monkeypatch.setattr(listener_module.selectors, "DefaultSelector", exhausted)
    fake.cut()
    assert "closed the connection" in events.wait_for(LOST).reason
    assert "Too many open files" in events.wait_for(LOST).reason
    monkeypatch.setattr(listener_module.selectors, "DefaultSelector", selector)
    connected(listener)
    fake.notify("imbus", "[]")
    assert not listener.closed


@pytest.mark.parametrize(
    "error", [psycopg2.OperationalError("is a standby"), OSError(errno.EMFILE, "Too many open files")]
)
def test_what_keeps_it_from_connecting_is_an_event(fake, events, listen, error):
    errors = [error]

    def connect(_listener=None):
        if errors:
            raise errors.pop()
        return fake.connect()

    listener = listen(FakeFeed("imbus"), connect=connect)
    assert events.expect(FAILED).reason == str(error)
    connected(listener)


@pytest.mark.parametrize("where", ["connect", "tell"])
def test_a_bug_does_not_end_it(fake, events, listen, logged, monkeypatch, where):
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.05)
    feed, bugs = FakeFeed("imbus"), [KeyError("a bug")] * 3

    def fail(event=None):
        if bugs:
            raise bugs.pop()

    def connect(_listener=None):
        if where == "connect":
            fail()
        return fake.connect()

    if where == "tell":
        events.also = fail
        fake.refuse()
    listener = listen(feed, connect=connect)
    listener.wait(lambda: not bugs, 5)
    fake.forward()
    connected(listener)
    assert logged("internal error", "a bug")


def test_a_path_that_cuts_at_the_first_notification_is_not_stormed(fake, events, listen):
    listener = listen(FakeFeed("imbus"))

    def cut(event):
        if event.kind == CONFIRMED:
            fake.cut()

    events.also = cut
    end, session = time.monotonic() + 1.0, None
    while time.monotonic() < end:
        # The check is heard right away.
        session = connected(listener, session)
        confirmed(listener)
    # The first, the budget, and one each after 0.05 to 0.1, 0.1 to 0.2, 0.2 to 0.4, 0.4 to 0.8 and 0.8 to 1.6 s.
    assert 2 < fake.connects <= 1 + IMMEDIATE_RECONNECTS + 5


@pytest.fixture
def clock(monkeypatch):
    """Return the time that the listener sees: ``now``, monotonic seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(listener_module, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("lasting", [0.0, 0.02, 0.5, 4.9])
def test_in_10_s_there_are_at_most_20_connects_to_a_path_that_cuts_every_session(clock, lasting):
    for _ in range(100):
        backoff, begin, connects = Backoff(), clock.now, 0
        while clock.now < begin + 10:
            connects += 1
            clock.now += lasting
            clock.now += backoff.after(lasting, lasting)
        assert connects <= 20


def test_of_ten_losses_in_a_row_most_are_replaced_at_once(clock):
    backoff, waits = Backoff(), []
    for _ in range(10):
        clock.now += 0.05
        waits.append(backoff.after(0.05, 0.05))
    assert waits[:IMMEDIATE_RECONNECTS] == [0] * IMMEDIATE_RECONNECTS and waits[-1] > 0
    clock.now += 10 * SECONDS_PER_RECONNECT
    assert backoff.after(0.05, 0.05) == 0


def test_the_delay_doubles_up_to_5_s_and_differs_each_time():
    delays = []
    for _ in range(200):
        backoff = Backoff()
        delays.append([backoff.after(None, 0.0) for _ in range(20)])
    for number, longest in ((0, 0.1), (1, 0.2), (2, 0.4), (5, 3.2), (6, 5), (19, 5)):
        nth = [one[number] for one in delays]
        assert longest / 2 <= min(nth) < longest * 0.6
        assert longest * 0.9 < max(nth) <= longest


def test_a_session_that_outlived_the_longest_delay_costs_no_budget(clock):
    backoff = Backoff()
    for _ in range(100):
        assert backoff.after(5.1, 5.1) == 0
    for _ in range(20):
        backoff.after(0.1, 0.1)
    assert backoff.after(0.0, 0.0) >= 2.5
    assert backoff.after(5.1, 5.1) == 0
    assert backoff.after(None, 0.0) <= 0.1


def test_what_an_attempt_takes_is_part_of_the_delay():
    """It is an interval between connects: who waited for a dead host until the deadline has waited enough."""
    backoff = Backoff()
    delays = [backoff.after(None, 3.0) for _ in range(20)]
    assert delays[:5] == [0] * 5
    assert all(delay <= 2 for delay in delays) and any(delays)


def test_a_token_that_is_already_there_counts(fake, events, listen):
    """As when something keeps gevent's loop busy: the time is over before anybody looks at the socket."""
    busy = threading.Event()
    feed = FakeFeed("imbus")
    feed.put = lambda notifications: busy.wait(5)
    listener = listen(feed)
    session = connected(listener)
    listener.expect("token")
    fake.notify("imbus", '["a"]')
    fake.notify(session.check_channel, "token")
    threading.Timer(0.3, busy.set).start()
    assert listener.wait_for_token(session, 0.1)


def test_a_token_counts_for_its_session_only(fake, events, listen):
    listener = listen(FakeFeed("imbus"))
    first = connected(listener)
    listener.expect("token")
    fake.notify(first.check_channel, "token")
    assert listener.wait_for_token(first, 5)
    listener.expect("another")
    fake.notify(first.check_channel, "token")
    assert not listener.wait_for_token(first, 0.05)
    fake.cut()
    events.expect(LOST)
    second = connected(listener)
    listener.expect("other")
    fake.notify(second.check_channel, "other")
    began = time.monotonic()
    assert not listener.wait_for_token(first, 5)
    assert time.monotonic() - began < 1


def test_nobody_waits_for_who_is_told(fake, events, listen):
    """Feeds must be served by other threads meanwhile."""
    feed, blocked = FakeFeed("imbus"), []

    def tell(event):
        other = threading.Thread(target=lambda: listener.wake(), daemon=True)
        other.start()
        other.join(1)
        blocked.append(other.is_alive() and event.kind)

    events.also = tell
    listener = listen(feed)
    connected(listener)
    confirmed(listener)
    events.expect(CONFIRMED)
    listener.replace(listener.session, UNHEARD, "nothing comes")
    events.expect(UNHEARD)
    connected(listener)
    fake.refuse()
    fake.cut()
    events.expect(LOST, FAILED)
    assert not any(blocked)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_feed_that_was_forgotten_ends_the_listener(fake, events):
    feed = FakeFeed("imbus")
    listener = Listener("postgres", fake.connect, lambda: False, events)
    listener.add(feed)
    del feed
    gc.collect()
    assert listener.closed
    listener.run()
    assert not fake.connects


# LISTEN on a server


class ServersError(psycopg2.OperationalError):
    """What psycopg2 raises; there it can't be made with a code of the server's."""

    def __init__(self, text, pgcode=None):
        super().__init__(text)
        self._pgcode = pgcode

    pgcode = property(lambda self: self._pgcode)


class FakeConnection:
    """As of psycopg2; ``errors``: those of the next LISTENs, None: of none."""

    def __init__(self, errors):
        self.errors, self.asked = list(errors), []
        self.notices, self.description = [], None
        self.cursor = lambda: self
        self.poll = lambda: extensions.POLL_OK

    def execute(self, query, values=None):
        self.asked.append(query)
        error = self.errors.pop(0) if self.errors and query.startswith("LISTEN") else None
        if error:
            raise error


def direct_session(*errors, pooled=False):
    session = DirectSession.__new__(DirectSession)
    session.parameters, session._cnx = {"password": "s3cret"}, FakeConnection(errors)
    session.facts = types.SimpleNamespace(pooled=pooled)
    return session


warn = listener_module._logger.warning


GONE = 'could not access status of transaction 1\nDETAIL:  Could not open file "pg_xact/0000": No such file'


def test_a_path_that_gives_no_answer_is_tried_only_once(monkeypatch):
    """Or it would be noticed later than the check interval promises."""
    attempts = []

    def opening(parameters, *_arguments):
        attempts.append(parameters)
        yield from ()
        raise psycopg2.OperationalError("no answer in 1 s")

    monkeypatch.setattr(connection, "opening", opening)
    session = direct_session()
    session.facts = connection.Facts("db-01:5432", 7, False, False, "postgres", "15.3", 5)
    kind, reason = tasks.finish(session.explaining(None, False))
    assert (kind, "is silent" in reason, len(attempts)) == (LOST, True, 1)


def test_listen_is_said_in_one_statement(logged):
    session = direct_session()
    session.listen(frozenset(["imbus", 'a"b']), warn)
    session.listen(frozenset(["cron_trigger", "imbus"]), warn)
    assert session._cnx.asked == ['LISTEN "a""b"; LISTEN imbus', 'LISTEN cron_trigger; LISTEN imbus; UNLISTEN "a""b"']
    assert session.channels == {"cron_trigger", "imbus"}
    assert not logged()


def test_through_a_pooler_each_is_said_by_itself(logged):
    session = direct_session(None, ServersError(GONE, "58P01"), pooled=True)
    session.listen(frozenset(["cron_trigger", "imbus"]), warn)
    tidied_up = ["SELECT pg_catalog.pg_notification_queue_usage()", "LISTEN imbus"]
    assert session._cnx.asked == ["LISTEN cron_trigger", "LISTEN imbus", *tidied_up]
    session.listen(frozenset(["imbus"]), warn)
    assert session._cnx.asked[4:] == ["LISTEN imbus", "UNLISTEN cron_trigger"]
    assert session.channels == {"imbus"}
    assert len(logged()) == 1


def test_a_queue_that_begins_before_the_commit_log_is_tidied_up(logged):
    session = direct_session(ServersError(GONE, "58P01"))
    session.listen(frozenset(["imbus"]), warn)
    assert session._cnx.asked == ["LISTEN imbus", "SELECT pg_catalog.pg_notification_queue_usage()", "LISTEN imbus"]
    assert session.channels == {"imbus"}
    (line,) = logged("kept LISTEN from working")
    assert "could not access status of transaction 1" in line and "update the server" in line
    # And no more of it.
    session.listen(frozenset(["imbus", "more"]), warn)
    assert len(session._cnx.asked) == 4 and len(logged("kept LISTEN")) == 1


@pytest.mark.parametrize("code", [None, "58P02", "42501", "57P01"])
def test_any_other_error_of_listen_is_the_end_of_the_session(logged, code):
    session = direct_session(ServersError("no way for s3cret\nHINT: none", code))
    with pytest.raises(psycopg2.OperationalError) as raised:
        session.listen(frozenset(["imbus"]), warn)
    assert str(raised.value) == "no way for ***" and raised.value.sqlstate == code
    assert session._cnx.asked == ["LISTEN imbus"] and session.channels == frozenset()
    assert not logged()


def test_so_is_one_that_tidying_up_does_not_mend():
    session = direct_session(ServersError(GONE, "58P01"), ServersError(GONE, "58P01"))
    with pytest.raises(psycopg2.OperationalError):
        session.listen(frozenset(["imbus"]), warn)
    assert len(session._cnx.asked) == 3 and session.channels == frozenset()

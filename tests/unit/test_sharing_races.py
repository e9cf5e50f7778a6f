"""What goes wrong between a leader and its followers, and what comes of it."""

import contextlib
import json
import socket
import threading
import time
import types
import uuid

import psycopg2
import pytest

from bus_alt_connection import sharing as sharing_module
from bus_alt_connection.listener import DirectSession
from bus_alt_connection.log import MOVED
from bus_alt_connection.sharing import FollowerSession, Sharing
from stack.waiting import wait_until
from tests.unit.fakes import Events, FakeFeed, connected


def _message(*parts):
    return json.dumps(parts).encode()


@pytest.fixture(autouse=True)
def short_silence(monkeypatch):
    monkeypatch.setattr(sharing_module, "HEARTBEAT", 0.2)
    monkeypatch.setattr(sharing_module, "SILENCE", 0.6)


@pytest.fixture
def parameters():
    """Of listeners that share with nobody else."""
    return {"host": "db-01", "dbname": "postgres", "fallback_application_name": uuid.uuid4().hex}


@pytest.fixture
def share(fake, listen, parameters):
    """Return a function that starts a listener that shares, for feeds; ``sharing`` is its `Sharing`."""

    def share(*feeds, began=lambda: None):
        sharing = Sharing(fake.connect, lambda: parameters, True, False)
        ready = threading.Event()

        def connect(listener):
            ready.wait(5)
            return sharing.connect(listener)

        listener = listen(*feeds, connect=connect, at_end=sharing.close)
        listener.sharing, listener.journal = sharing, Events()
        began()
        ready.set()
        return listener

    return share


@pytest.fixture
def leader(share):
    listener = share(FakeFeed("imbus"))
    connected(listener)
    return listener


@pytest.fixture
def feed():
    return FakeFeed("imbus", "mine")


@pytest.fixture
def follower(leader, share, feed):
    listener = share(feed)
    assert connected(listener).leader_pid
    return listener


def test_many_notifications_at_once_cost_no_follower_its_session(fake, leader, follower, feed):
    session = follower.session
    with fake._lock:
        for number in range(5000):
            fake.notify("imbus", '["db","%s-%d"]' % ("x" * 40, number))
    for number in range(5000):
        assert feed.get() == ("imbus", '["db","%s-%d"]' % ("x" * 40, number))
    assert follower.session is session


def test_long_notifications_cost_no_follower_its_session(fake, leader, follower, feed):
    session, payload = follower.session, '["%s"]' % (7900 * "x")
    with fake._lock:
        for _ in range(50):
            fake.notify("imbus", payload)
    for _ in range(50):
        assert feed.get() == ("imbus", payload)
    assert follower.session is session


def test_a_follower_that_reads_nothing_is_let_go(fake, leader, follower, feed, parameters):
    stopped = FollowerSession(leader.sharing._name(2), 1, 1.0)
    stopped.listen(frozenset(["imbus"]), None)
    begin = time.monotonic()
    for number in range(2000):
        payload = '["%d%s"]' % (number, 7000 * "x")
        fake.notify("imbus", payload)
        assert feed.get() == ("imbus", payload)
    assert time.monotonic() - begin < 10
    with pytest.raises(psycopg2.OperationalError):
        while True:
            stopped.receive()
    stopped.close()


def test_a_leader_that_ends_in_order_is_no_outage(leader, follower):
    session = follower.session
    leader.remove(next(feed for feed in leader._all_feeds() if feed.local))
    connected(follower, after=session)
    assert follower.journal._events.get(timeout=5).kind == MOVED


def test_a_leader_that_does_not_listen_for_its_followers_is_not_asked_twice(fake, leader, share, monkeypatch):
    stuck, session = threading.Event(), leader.session
    monkeypatch.setattr(session, "listen", lambda channels, warn: stuck.wait(20))
    listener = share(FakeFeed("imbus"))
    try:
        assert listener.wait(lambda: listener.session, 5), "no session"
        assert listener.session.leader_pid is None
    finally:
        stuck.set()


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_who_can_not_be_a_leader_listens_by_itself(share, monkeypatch, error):
    def fail(*_args):
        raise error("out of threads, or of descriptors")

    if error is OSError:
        selectors = types.SimpleNamespace(DefaultSelector=fail, EVENT_READ=1)
        monkeypatch.setattr(sharing_module, "selectors", selectors)
    listener = share(
        FakeFeed("imbus"), began=lambda: error is OSError or monkeypatch.setattr(threading.Thread, "start", fail)
    )
    connected(listener)
    assert listener.session.leader_pid is None
    assert listener.sharing._leader is None


def test_what_is_about_to_be_unlistened_is_not_in_force():
    session, seen = DirectSession.__new__(DirectSession), []
    session.facts = types.SimpleNamespace(pooled=False)
    session.execute = lambda statement: seen.append((statement, session.channels))
    session.listen(frozenset(["a", "b"]), None)
    session.listen(frozenset(["b", "c"]), None)
    assert seen[-1][1] == {"b"}
    assert session.channels == {"b", "c"}


def test_what_a_follower_listens_on_anew_is_in_force_when_the_leader_says_so_again(parameters):
    name = "\0" + uuid.uuid4().hex
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as server:
        server.bind(name)
        server.listen(1)
        facts = ["db-01:5432", 7, False, False, "postgres", "15.3", 5]
        answers = iter([[[facts, ["a", "x"]], []]])

        def serve():
            with contextlib.closing(server.accept()[0]) as one:
                one.send(_message([facts, []], []))
                while one.recv(4096):
                    with contextlib.suppress(StopIteration):
                        one.send(_message(*next(answers)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        follower = FollowerSession(name, 1, 1.0)
        follower.listen(frozenset(["a", "x"]), None)
        follower.listen(frozenset(["a"]), None)
        with pytest.raises(psycopg2.OperationalError):
            follower.listen(frozenset(["a", "x"]), None)
        follower.close()
        thread.join(5)


def test_a_feed_hears_what_a_follower_heard_already_once_it_is_told_so(fake, leader, follower):
    new, session = FakeFeed(), leader.session
    follower.wait_for_listen(follower._all_feeds()[0], 5)
    leader.add(new)
    receive = session.receive

    def receive_late():
        # Between a select and this somebody else listens.
        if not new.channels:
            leader.listen(new, frozenset(["mine"]))
            leader.wait_for_listen(new, 5)
            fake.notify("mine", "x")
        return receive()

    session.receive = receive_late
    fake.notify("imbus", '["a"]')
    assert new.get() == ("mine", "x")


@pytest.mark.parametrize("state", [{"a": 1}, [5, []], ["x"], 5])
def test_a_leader_that_talks_nonsense_is_none(fake, share, parameters, state):
    name = Sharing(None, lambda: parameters, True, False)._name(2)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as server:
        server.bind(name)
        server.listen(5)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with contextlib.closing(server.accept()[0]) as one:
                        one.send(_message(state, []))
                        one.recv(4096)

        threading.Thread(target=serve, daemon=True).start()
        listener = share(FakeFeed("imbus"))
        assert connected(listener).leader_pid is None
        server.shutdown(socket.SHUT_RDWR)


def test_a_leader_keeps_nothing_of_a_follower_that_is_gone(leader, follower):
    follower.close()
    wait_until(lambda: all(feed.local for feed in leader._all_feeds()), 5)


def test_followers_of_a_leader_that_has_forked_are_let_go_as_well(leader, follower):
    session, copies = follower.session, [each.socket.dup() for each in leader._all_feeds() if not each.local]
    leader.sharing.close()
    connected(follower, after=session)
    for one in copies:
        one.close()

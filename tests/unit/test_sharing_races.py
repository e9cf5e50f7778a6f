"""What goes wrong between a host and its guests, and what comes of it."""

import contextlib
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
from bus_alt_connection.sharing import GuestSession, Sharing
from stack.waiting import wait_until
from tests.unit.fakes import Events, FakeFeed, connected


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

        def connect():
            ready.wait(5)
            return sharing.connect()

        listener = sharing.listener = listen(*feeds, connect=connect)
        listener.sharing, listener.events = sharing, Events()
        listener._tell = listener.events
        began()
        ready.set()
        return listener

    return share


@pytest.fixture
def host(share):
    listener = share(FakeFeed("imbus"))
    connected(listener)
    return listener


@pytest.fixture
def feed():
    return FakeFeed("imbus", "mine")


@pytest.fixture
def guest(host, share, feed):
    listener = share(feed)
    assert connected(listener).host_kind == 1
    return listener


def test_many_notifications_at_once_cost_no_guest_its_session(fake, host, guest, feed):
    session = guest.session
    with fake._lock:
        for number in range(5000):
            fake.notify("imbus", '["db","%s-%d"]' % ("x" * 40, number))
    for number in range(5000):
        assert feed.get() == ("imbus", '["db","%s-%d"]' % ("x" * 40, number))
    assert guest.session is session


def test_long_notifications_cost_no_guest_its_session(fake, host, guest, feed):
    session, payload = guest.session, '["%s"]' % (7900 * "x")
    with fake._lock:
        for _ in range(50):
            fake.notify("imbus", payload)
    for _ in range(50):
        assert feed.get() == ("imbus", payload)
    assert guest.session is session


def test_a_guest_that_reads_nothing_is_let_go(fake, host, guest, feed, parameters):
    stopped = GuestSession(host.sharing._name("plain"), 1, 1.0)
    stopped.listen(frozenset(["imbus"]))
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


def test_a_host_that_ends_in_order_is_no_outage(host, guest):
    session = guest.session
    host.remove(host._all_feeds()[0])
    connected(guest, after=session)
    assert guest.events._events.get(timeout=5).kind == MOVED


def test_no_host_remains_of_a_listener_that_has_ended(fake, share, supervise):
    feed = FakeFeed("imbus")
    listener = share(feed)
    session = connected(listener)
    # It could not have the name.
    listener.sharing._host.close()
    listener.sharing._host = None
    supervisor = supervise(listener)
    supervisor._better = listener.sharing.better
    thread = [one for one in threading.enumerate() if one.name == "bus_alt_connection.listener"]
    listener.remove(feed)
    for one in thread:
        one.join(5)
    listener.sharing.better(session)
    supervisor.run()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as other:
        other.settimeout(2)
        with pytest.raises(ConnectionError):
            other.connect(listener.sharing._name("plain"))


def test_a_host_that_does_not_listen_for_its_guests_is_not_asked_twice(fake, host, share, monkeypatch):
    stuck, session = threading.Event(), host.session
    monkeypatch.setattr(session, "listen", lambda channels: stuck.wait(20))
    listener = share(FakeFeed("imbus"))
    try:
        assert listener.wait(lambda: listener.session, 5), "no session"
        assert listener.session.host_kind is None
    finally:
        stuck.set()


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_who_can_not_be_a_host_listens_by_itself(share, monkeypatch, error):
    def fail(*_args):
        raise error("out of threads, or of descriptors")

    if error is OSError:
        selectors = types.SimpleNamespace(DefaultSelector=fail, EVENT_READ=1)
        monkeypatch.setattr(sharing_module, "selectors", selectors)
    listener = share(
        FakeFeed("imbus"), began=lambda: error is OSError or monkeypatch.setattr(threading.Thread, "start", fail)
    )
    connected(listener)
    assert listener.session.host_kind is None
    assert listener.sharing._host is None


def test_what_is_about_to_be_unlistened_is_not_in_force():
    session, seen = DirectSession.__new__(DirectSession), []
    session.facts = types.SimpleNamespace(pooled=False)
    session.execute = lambda statement: seen.append((statement, session.channels))
    session.listen(frozenset(["a", "b"]))
    session.listen(frozenset(["b", "c"]))
    assert seen[-1][1] == {"b"}
    assert session.channels == {"b", "c"}


def test_what_a_guest_listens_on_anew_is_in_force_when_the_host_says_so_again(parameters):
    name = "\0" + uuid.uuid4().hex
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as server:
        server.bind(name)
        server.listen(1)
        facts = ["db-01:5432", 7, False, False, "postgres", "15.3", 5]
        answers = iter([[[facts, ["a", "x"]], []]])

        def serve():
            with contextlib.closing(server.accept()[0]) as one:
                one.send(sharing_module._message([facts, []], []))
                while one.recv(4096):
                    with contextlib.suppress(StopIteration):
                        one.send(sharing_module._message(*next(answers)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        guest = GuestSession(name, 1, 1.0)
        guest.listen(frozenset(["a", "x"]))
        guest.listen(frozenset(["a"]))
        with pytest.raises(psycopg2.OperationalError):
            guest.listen(frozenset(["a", "x"]))
        guest.close()
        thread.join(5)


def test_a_feed_hears_what_a_guest_heard_already_once_it_is_told_so(fake, host, guest):
    new, session = FakeFeed(), host.session
    guest.wait_for_listen(guest._all_feeds()[0], 5)
    host.add(new)
    receive = session.receive

    def receive_late():
        # Between a select and this somebody else listens.
        if not new.channels:
            host.listen(new, frozenset(["mine"]))
            host.wait_for_listen(new, 5)
            fake.notify("mine", "x")
        return receive()

    session.receive = receive_late
    fake.notify("imbus", '["a"]')
    assert new.get() == ("mine", "x")


@pytest.mark.parametrize("state", [{"a": 1}, [5, []], ["x"], 5])
def test_a_host_that_talks_nonsense_is_none(fake, share, parameters, state):
    name = Sharing(None, lambda: parameters, True, False)._name("plain")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as server:
        server.bind(name)
        server.listen(5)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with contextlib.closing(server.accept()[0]) as one:
                        one.send(sharing_module._message(state, []))
                        one.recv(4096)

        threading.Thread(target=serve, daemon=True).start()
        listener = share(FakeFeed("imbus"))
        assert connected(listener).host_kind is None
        server.shutdown(socket.SHUT_RDWR)


def test_a_host_keeps_nothing_of_a_guest_that_is_gone(host, guest):
    guest.close()
    wait_until(lambda: not host.relay._wanted, 5)
    host.relay.inform()
    assert (host.relay._wanted, host.relay._told) == ({}, {})


def test_guests_of_a_host_that_has_forked_are_let_go_as_well(host, guest):
    session, copies = guest.session, [one.dup() for one in host.relay._wanted]
    host.relay.close()
    connected(guest, after=session)
    for one in copies:
        one.close()

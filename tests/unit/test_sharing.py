"""The listeners of a machine share the session of one of them, in milliseconds: all of them in one process."""

import contextlib
import errno
import functools
import gc
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import psycopg2
import pytest

from bus_alt_connection import listener as listener_module
from bus_alt_connection import log, sharing
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.listener import Listener
from bus_alt_connection.log import CONFIRMED, DEAF, FAILED, LOST, MOVED, OutageLog
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from bus_alt_connection.sharing import Sharing
from bus_alt_connection.supervisor import LISTENING, POLLING, SHARED, Supervisor
from stack.waiting import wait_until
from tests.unit.conftest import _end
from tests.unit.fakes import Events, FakeFeed, connected

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets without files are Linux's")

SECRET = "s3cret"


#: waits until what it is given is true, when called; returns it
expect = functools.partial(wait_until, deadline=5, interval=0.005)

# What neither a host nor a guest says.
_NONSENSE = [b"", b"\xff\xfe", b"no JSON", b"[" * 10000, b"null", b"5"]


class Process:
    """A listening process: what the addon has in one, with another way to connect.

    :ivar directs: how often it connected by itself
    """

    def __init__(self, fake, parameters, channels, evented=False, share=True, direct=None, tell=None):
        self.directs, self.events, self.feed = 0, Events(), FakeFeed(*channels)
        self._direct = direct or fake.connect
        self.sharing = Sharing(self.connect, lambda: parameters, share, evented)
        self.listener = Listener("postgres", self.sharing.connect, lambda: False, tell or self.events, 19)
        self.sharing.listener = self.listener
        self.listener.add(self.feed)
        self._thread = threading.Thread(target=self.listener.run, name="bus_alt_connection.listener", daemon=True)

    def connect(self):
        self.directs += 1
        return self._direct()

    def start(self):
        self._thread.start()
        return self

    @property
    def session(self):
        return self.listener.session

    @property
    def is_guest(self):
        return self.session is not None and self.session.host_kind is not None

    @property
    def in_force(self):
        """Whether it has a session with all that it wants."""
        session = self.session
        return session is not None and self.feed.channels <= session.channels

    def better(self):
        """As its supervisor does after a check; return whether it moves."""
        session = self.session
        self.listener.confirm(session, self.listener.in_force[1], 0.001)
        found = self.sharing.better(session)
        if found:
            self.listener.replace(session, MOVED, "there is a better one")
        return found

    def end(self):
        self.listener.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Who does not answer is waited for in milliseconds."""
    monkeypatch.setattr(sharing, "PATIENCE", 0.2)


@pytest.fixture
def parameters():
    """What all processes of a test would connect with, and nobody else."""
    return {"host": "db-01", "user": "odoo", "dbname": "postgres", "password": SECRET, "options": uuid.uuid4().hex}


@pytest.fixture
def process(fake, parameters):
    """Return a function that starts a :class:`Process`."""
    started = []

    def process(*channels, **named):
        one = Process(fake, named.pop("parameters", parameters), channels or ("imbus",), **named)
        started.append(one)
        return one.start()

    yield process
    _end(one.listener for one in started)


@pytest.fixture
def name(parameters):
    """Return a function that gives the name of the host, by kind."""
    return lambda kind="plain": Sharing(None, lambda: parameters, True, False)._name(kind)


@pytest.fixture
def bound(name):
    """Return a function that binds the name of a host to a socket of ours, which is returned."""
    with contextlib.ExitStack() as stack:

        def bind(kind="plain"):
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            server.bind(name(kind))
            server.listen(16)
            server.settimeout(5)
            return server

        yield bind


@pytest.fixture
def client(name):
    """Return a function that connects to the host, as no guest would."""
    with contextlib.ExitStack() as stack:

        def client(*messages):
            one = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            one.settimeout(5)
            one.connect(name())
            for message in messages:
                one.send(message)
            return one

        yield client


def is_let_go(client):
    """Return whether the host has hung up; wait for it."""
    with contextlib.suppress(ConnectionError):
        while client.recv(1 << 20):
            pass
    return True


def settled(*processes):
    """Wait until all have what they want in force; return those with a connection of their own."""
    expect(lambda: all(one.in_force for one in processes))
    return [one for one in processes if not one.is_guest]


def in_an_outage(fake, process):
    """Return a process that is host, and a list of three that are its guests; their server has just gone."""
    host = process("imbus")
    connected(host.listener)
    guests = [process("imbus") for _ in range(3)]
    settled(host, *guests)
    fake.refuse()
    fake.cut()
    return host, guests


def fails_for(process, seconds):
    """Wait until a process has tried to connect in vain for so long."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        process.events.expect(FAILED)


def hear(fake, *processes):
    """See that each hears what is sent, once."""
    token = '["%s"]' % uuid.uuid4().hex
    fake.notify("imbus", token)
    for one in processes:
        assert one.feed.get() == ("imbus", token)
    assert [one.feed.all() for one in processes] == [[]] * len(processes)


# One for all ----------------------------------------------------------------------------------------------------------


def test_the_second_listens_through_the_first(fake, process):
    first = process("imbus")
    connected(first.listener)
    second = process("imbus", "cron_trigger")
    assert settled(first, second) == [first]
    assert (fake.connects, first.directs, second.directs) == (1, 1, 0)
    assert {"imbus", "cron_trigger", HEARTBEAT_CHANNEL, second.session.check_channel} <= fake.sessions[0].channels
    assert second.session.facts._replace(address="db-01:5432") == first.session.facts
    assert second.session.facts.address == "process %d at db-01:5432" % os.getpid()


def test_a_guest_is_given_what_is_sent_on_its_channels_in_order_and_once(fake, process):
    first = process("imbus")
    connected(first.listener)
    bus, cron = process("imbus"), process("cron_trigger")
    settled(first, bus, cron)
    for number in range(200):
        fake.notify("imbus", '["%d"]' % number)
        fake.notify("cron_trigger", "db%d" % number)
    expect(lambda: bus.feed.arrived.qsize() >= 200 and cron.feed.arrived.qsize() >= 200)
    assert bus.feed.all() == first.feed.all() == [("imbus", '["%d"]' % number) for number in range(200)]
    assert cron.feed.all() == [("cron_trigger", "db%d" % number) for number in range(200)]


def test_a_burst_comes_through(fake, process):
    """What came while the host was kept from looking comes in one piece, and guests that do read are not let go."""
    first = process("more")
    connected(first.listener)
    second = process("more")
    settled(first, second)
    kept, payload = second.session, "\u00e9" * 40
    with fake._lock:
        for number in range(1200):
            fake.notify("more", "%d%s" % (number, payload))
    expect(lambda: second.feed.arrived.qsize() >= 1200)
    assert second.feed.all() == [("more", "%d%s" % (number, payload)) for number in range(1200)]
    assert second.session is kept


def test_a_burst_that_is_too_large_costs_a_guest_its_session_but_no_connection(fake, process):
    first = process("imbus")
    connected(first.listener)
    second = process("imbus")
    settled(first, second)
    lost = second.session
    with fake._lock:
        for number in range(1000):
            fake.notify("imbus", '["%d%s"]' % (number, "a" * 7000))
    second.events.wait_for(MOVED)
    connected(second.listener, lost)
    settled(first, second)
    assert second.is_guest and fake.connects == 1
    expect(lambda: first.feed.arrived.qsize() == 1000)
    first.feed.all(), second.feed.all()
    hear(fake, first, second)


def test_a_channel_is_in_force_once_a_guest_is_told_so(fake, process):
    first = process("imbus")
    connected(first.listener)
    second = process("imbus")
    settled(first, second)
    for number in range(50):
        channel = "more_%d" % number
        second.listener.listen(second.feed, frozenset([channel]))
        second.listener.wait_for_listen(second.feed, 5)
        fake.notify(channel, "x")
        assert second.feed.get() == (channel, "x")


def test_what_only_a_guest_wants_is_no_concern_of_the_hosts(fake, process):
    first = process("imbus")
    connected(first.listener)
    settled(first, process("cron_trigger"))
    assert first.listener.in_force[1] == {"imbus"}
    first.listener.take_gained()
    third = process("more")
    settled(first, third)
    fake.notify("more", "x")
    assert third.feed.get() == ("more", "x")
    assert first.feed.all() == [] and first.listener.gained == frozenset()


def test_the_channels_of_a_guest_go_with_it(fake, process):
    first = process("imbus")
    connected(first.listener)
    second, third = process("cron_trigger"), process("more", "cron_trigger")
    settled(first, second, third)
    check = second.session.check_channel
    second.end()
    (session,) = fake.sessions
    expect(lambda: check not in session.channels)
    assert {"imbus", "more", "cron_trigger"} <= session.channels
    third.end()
    expect(lambda: session.channels == {"imbus", HEARTBEAT_CHANNEL, session.check_channel})
    hear(fake, first)


def test_a_guest_that_wants_less_gets_less(fake, process):
    first = process("imbus")
    connected(first.listener)
    second = process("imbus", "cron_trigger")
    settled(first, second)
    second.listener.listen(second.feed, frozenset(["imbus"]))
    expect(lambda: "cron_trigger" not in fake.sessions[0].channels)
    fake.notify("cron_trigger", "x")
    hear(fake, first, second)


def test_many_settle_on_one(fake, process):
    processes = [process("imbus") for _ in range(12)]
    assert len(settled(*processes)) == 1
    assert fake.connects == 1
    hear(fake, *processes)


def test_processes_that_start_at_once_share_though_the_name_is_bound_before_it_can_be_reached(
    fake, process, monkeypatch
):
    """Who comes between the two steps of the host is refused."""
    listen = socket.socket.listen

    def listen_late(self, *args):
        if self.family == socket.AF_UNIX:
            time.sleep(0.02)
        listen(self, *args)

    monkeypatch.setattr(socket.socket, "listen", listen_late)
    processes = [process("imbus") for _ in range(4)]
    assert len(settled(*processes)) == 1
    assert fake.connects == 1


@pytest.mark.parametrize("evented", [False, True])
def test_when_the_host_ends_the_others_settle_on_another(fake, process, evented):
    first = process("imbus", evented=evented)
    connected(first.listener)
    others = [process("imbus", evented=evented) for _ in range(4)]
    settled(first, *others)
    first.end()
    for one in others:
        one.events.wait_for(MOVED)
    expect(lambda: all(one.in_force for one in others))
    assert len(settled(*others)) == 1
    assert fake.connects == 2
    hear(fake, *others)


def test_all_hosts_of_a_series_are_replaced(fake, process):
    processes = [process("imbus") for _ in range(6)]
    for number in range(1, 6):
        (host,) = settled(*processes)
        processes.remove(host)
        left = [one.session for one in processes]
        host.end()
        expect(lambda left=left: not {one.session for one in processes} & {None, *left})
        settled(*processes)
        assert fake.connects == 1 + number
    hear(fake, *processes)


# Evented processes are the better hosts -------------------------------------------------------------------------------


def test_plain_ones_move_to_an_evented_one(fake, process):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    assert not host.better() and not guest.better()
    evented = process("imbus", evented=True)
    connected(evented.listener)
    assert not evented.is_guest and fake.connects == 2
    # The guest first, then the host.
    assert guest.better()
    assert guest.events.after(CONFIRMED).kind == MOVED
    expect(lambda: guest.in_force and guest.session.host_kind == 0)
    assert host.better()
    host.events.wait_for(MOVED)
    expect(lambda: host.in_force and host.session.host_kind == 0)
    assert fake.connects == 2 and len(fake.sessions) == 1
    hear(fake, evented, host, guest)
    assert not any(one.better() for one in (evented, host, guest))


def test_guests_of_a_plain_host_go_where_it_goes(fake, process):
    host = process("imbus")
    connected(host.listener)
    guests = [process("imbus") for _ in range(3)]
    settled(host, *guests)
    evented = process("imbus", evented=True)
    connected(evented.listener)
    assert host.better()
    # None of them takes it for an outage.
    for one in (host, *guests):
        assert one.events.after(CONFIRMED).kind == MOVED
    expect(lambda: all(one.in_force and one.session.host_kind == 0 for one in (host, *guests)))
    assert fake.connects == 2 and len(fake.sessions) == 1
    hear(fake, evented, host, *guests)
    expect(lambda: len(_ours()) == 1)


def test_an_evented_one_never_joins_a_plain_one(fake, process):
    plain = process("imbus")
    connected(plain.listener)
    evented, second = process("imbus", evented=True), None
    connected(evented.listener)
    assert not evented.better() and not evented.is_guest
    second = process("imbus", evented=True)
    settled(evented, second)
    assert second.session.host_kind == 0
    evented.end()
    expect(lambda: second.session and not second.is_guest)
    assert not second.better() and not second.is_guest


def test_when_the_evented_one_ends_plain_ones_settle_on_one_of_them(fake, process):
    evented = process("imbus", evented=True)
    connected(evented.listener)
    plain = [process("imbus") for _ in range(3)]
    settled(evented, *plain)
    assert fake.connects == 1
    evented.end()
    for one in plain:
        one.events.wait_for(MOVED)
    assert len(settled(*plain)) == 1
    assert fake.connects == 2
    # And one that has been host before is so again.
    again = process("imbus", evented=True)
    connected(again.listener)
    (host,) = [one for one in plain if not one.is_guest]
    assert host.better()
    expect(lambda: all(one.in_force and one.session.host_kind == 0 for one in plain))
    again.end()
    for one in plain:
        one.events.wait_for(MOVED)
    expect(lambda: all(one.in_force for one in plain) and [one.is_guest for one in plain].count(False) == 1)
    assert fake.connects == 4
    hear(fake, *plain)


# Outages --------------------------------------------------------------------------------------------------------------


def test_after_an_outage_only_the_host_connects(fake, process):
    host, guests = in_an_outage(fake, process)
    for one in (host, *guests):
        event = one.events.expect(LOST)
        assert event.session is not None
        assert ("has lost its connection" in event.reason) == (one is not host)
        assert not one.listener.session and one.listener.deaf_since
    host.events.expect(FAILED, FAILED)
    fake.forward()
    assert settled(host, *guests) == [host]
    assert [one.directs for one in guests] == [0, 0, 0]
    hear(fake, host, *guests)
    # And what is in force is that of the new session.
    assert all(one.session.check_channel in host.session.channels for one in guests)


def test_a_guest_is_told_of_a_loss_that_is_over_at_once(fake, process):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    before = guest.session
    fake.cut()
    host.events.expect(LOST)
    guest.events.expect(LOST)
    connected(guest.listener, before)
    settled(host, guest)
    assert guest.is_guest and fake.connects == 2
    assert guest.session.facts.backend_pid == host.session.facts.backend_pid != before.facts.backend_pid


def test_who_comes_in_an_outage_waits_with_the_others(fake, process):
    host = process("imbus")
    connected(host.listener)
    fake.refuse()
    fake.cut()
    host.events.expect(LOST, FAILED)
    guest = process("imbus")
    host.events.expect(FAILED)
    fake.forward()
    settled(host, guest)
    assert guest.is_guest and guest.directs == 0


def test_after_a_long_outage_as_well(fake, process, monkeypatch):
    monkeypatch.setattr(sharing, "LONGEST_DELAY", 0.4)
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.2)
    host, guests = in_an_outage(fake, process)
    host.events.expect(LOST)
    # As 20 s are with the real delays.
    fails_for(host, 4 * sharing.LONGEST_DELAY)
    fake.forward()
    settled(host, *guests)
    assert [one.directs for one in guests] == [0, 0, 0]


def test_who_waits_with_a_host_goes_where_it_goes(fake, process, monkeypatch):
    """Which has found a better one meanwhile, as that has a session."""
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.2)
    plain, guests = in_an_outage(fake, process)
    expect(lambda: all(one.sharing._lock.locked() and not one.is_guest for one in guests))
    evented = process("imbus", evented=True)
    fails_for(evented, 2 * sharing.PATIENCE)
    fake.forward()
    assert settled(evented, plain, *guests) == [evented]
    assert [one.directs for one in guests] == [0, 0, 0]
    hear(fake, evented, plain, *guests)


def test_nobody_looks_for_a_better_one_while_it_connects(fake, process):
    """It would wait for as long, and its supervisor with it."""
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    fake.refuse()
    fake.cut()
    before = guest.session or host.session
    guest.events.expect(LOST)
    expect(guest.sharing._lock.locked)
    began = time.monotonic()
    assert guest.sharing.better(before) is False
    assert time.monotonic() - began < 2
    fake.forward()
    settled(host, guest)


def test_a_host_that_is_long_without_session_keeps_nobody_from_one(fake, process, monkeypatch):
    monkeypatch.setattr(sharing, "LONGEST_DELAY", 0.05)
    refuses = []

    def direct():
        if refuses:
            raise psycopg2.OperationalError("refused")
        return fake.connect()

    host = process("imbus", direct=direct)
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    refuses.append(1)
    fake.cut()
    guest.events.expect(LOST)
    expect(lambda: guest.in_force and not guest.is_guest)
    assert guest.directs == 1 and not host.session
    fake.notify("imbus", '["a"]')
    assert guest.feed.get() == ("imbus", '["a"]')
    # Nobody is asked to join a host that has no session.
    assert not guest.better()
    refuses.clear()
    settled(host, guest)
    assert guest.better()
    assert guest.events.after(CONFIRMED).kind == MOVED
    expect(lambda: guest.in_force and guest.is_guest)
    hear(fake, host, guest)


# Hosts that do not answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evented", [False, True])
def test_a_silent_host_keeps_nobody_from_a_session(fake, process, bound, evented):
    server, began = bound("evented" if evented else "plain"), time.monotonic()
    one = process("imbus", evented=evented)
    connected(one.listener)
    assert sharing.PATIENCE <= time.monotonic() - began < sharing.PATIENCE + 1
    assert (fake.connects, one.is_guest) == (1, False)
    assert not one.better() and one.directs == 1
    # Once it is gone one who looks again takes its place.
    server.close()
    assert not one.better() and one.directs == 1
    second = process("imbus", evented=evented)
    settled(one, second)
    assert second.is_guest and fake.connects == 1
    hear(fake, one, second)


def test_a_silent_evented_host_does_not_keep_plain_ones_from_sharing(fake, process, bound):
    bound("evented")
    first = process("imbus")
    connected(first.listener)
    second = process("imbus")
    settled(first, second)
    assert second.session.host_kind == 1 and fake.connects == 1


def test_who_connected_by_itself_joins_a_host_that_answers_again(fake, process, monkeypatch):
    accept, stopped = sharing.Host._accept, threading.Event()
    stopped.set()
    monkeypatch.setattr(sharing.Host, "_accept", lambda *args: stopped.wait(5) and accept(*args))
    host = process("imbus")
    connected(host.listener)
    stopped.clear()
    other = process("imbus")
    connected(other.listener)
    assert not other.is_guest and fake.connects == 2
    assert not other.better()
    stopped.set()
    assert expect(other.better)
    assert other.events.after(CONFIRMED).kind == MOVED
    expect(lambda: other.in_force and other.is_guest)
    hear(fake, host, other)


def test_a_host_that_answers_but_does_not_listen_keeps_nobody_from_a_session(fake, process, monkeypatch):
    """As when a log that hangs blocks the thread that would say LISTEN."""
    host = process("imbus")
    connected(host.listener)
    go = threading.Event()
    host.events.also = lambda event: go.wait(10)
    host.listener.confirm(host.session, frozenset(["imbus"]), 0.001)
    try:
        guest = process("imbus")
        expect(lambda: guest.in_force)
        assert not guest.is_guest
    finally:
        go.set()
    assert expect(guest.better)
    expect(lambda: guest.in_force and guest.is_guest)
    hear(fake, host, guest)


def test_a_guest_whose_host_no_longer_hands_on_is_back_after_its_check(fake, process, monkeypatch):
    """As when the host is stopped by a signal: its kernel takes the guest's connection all the same."""
    stopped = threading.Event()
    stopped.set()
    accept, hear_, put, inform = (getattr(sharing.Host, one) for one in ("_accept", "_hear", "put", "inform"))
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    for name, method in (("_accept", accept), ("_hear", hear_), ("put", put), ("inform", inform)):
        monkeypatch.setattr(sharing.Host, name, lambda *args, method=method: stopped.wait(10) and method(*args))
    stopped.clear()
    try:
        session = guest.session
        guest.listener.expect("token")
        fake.notify(session.check_channel, "token")
        assert not guest.listener.hears(session, 0.1)
        guest.listener.replace(session, DEAF, "the path is silent")
        expect(lambda: guest.in_force and not guest.is_guest)
    finally:
        stopped.set()
    assert expect(guest.better)


_FACTS = ["db-01:5432", 100, False, False, "postgres", "15.3", 1000000]


@pytest.mark.parametrize("gone", ["silent", "reset"])
def test_a_host_that_is_gone_as_a_guest_speaks_is_no_outage(fake, process, bound, gone):
    server, go, answers = bound(), threading.Event(), [True]

    def serve():
        with server.accept()[0] as guest:
            guest.send(json.dumps([[_FACTS, []], []]).encode())
            while answers:
                names = json.loads(guest.recv(1 << 20))
                guest.send(json.dumps([[_FACTS, names], []]).encode())
                if "imbus" in names:
                    answers.clear()
            go.wait(5)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    one = process("imbus", "more")
    expect(lambda: one.in_force)
    assert one.is_guest
    if gone == "silent":
        one.listener.listen(one.feed, frozenset(["imbus", "another"]))
    else:
        # That needs no answer, and what nobody reads makes the end of the host an error.
        one.listener.listen(one.feed, frozenset(["imbus"]))
        expect(lambda: one.session.channels == {"imbus", HEARTBEAT_CHANNEL, one.session.check_channel})
        go.set()
    assert "process %d, through which it listened, " % os.getpid() in one.events.expect(MOVED).reason
    expect(lambda: one.in_force)
    assert not one.is_guest
    go.set()
    thread.join(5)


@pytest.mark.parametrize(
    "said",
    [
        *_NONSENSE,
        b'"ab"',
        b"[]",
        b"{}",
        b'{"a": 1, "b": 2}',
        b"[1, 2, 3]",
        b"[5, []]",
        b'["ab", []]',
        b'[{"a": 1}, []]',
        b"[[5], []]",
        b"[[null], []]",
        b"[[null, 5], []]",
        b"[[[1, 2], []], []]",
        b"[[[], [[]]], []]",
        b"[null, 5]",
        b"[null, [5]]",
        b"[null, [[1]]]",
        b'[null, [[1, "a", "b", "c"]]]',
        json.dumps([[_FACTS, 5], []]).encode(),
        json.dumps([[_FACTS, [[]]], []]).encode(),
        json.dumps([[_FACTS, []], [[1, "imbus", 5]]]).encode(),
        json.dumps([[_FACTS, ["imbus"]], []]).encode(),
        json.dumps([[list(range(7)), []], []]).encode(),
    ],
)
def test_garbage_from_who_is_bound_there_keeps_nobody_from_a_session(fake, process, bound, said):
    server, ended = bound(), threading.Event()

    def serve():
        with contextlib.suppress(OSError):
            while not ended.is_set():
                connected, _address = server.accept()
                with connected, contextlib.suppress(ConnectionError):
                    connected.send(said)
                    connected.settimeout(1)
                    while connected.recv(1 << 20):
                        pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    one = process("imbus")
    expect(lambda: one.in_force)
    assert not one.is_guest
    hear(fake, one)
    ended.set()
    one.end()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
        last.connect(server.getsockname())
    thread.join(5)
    assert not thread.is_alive()


# What comes to a host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        *_NONSENSE,
        b'"imbus"',
        b'{"imbus": 1}',
        b"[5]",
        b"[null]",
        b'[["imbus"]]',
        b'[""]',
        b'["more", ""]',
        json.dumps(["a" * 64]).encode(),
        json.dumps(["\u00e9" * 32]).encode(),
        b'["a\\u0000b"]',
        b'["\\ud800"]',
        b'["more", NaN]',
    ],
)
def test_garbage_costs_only_who_sends_it(fake, process, client, logged, said):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    sessions = host.session, guest.session
    assert is_let_go(client(said))
    hear(fake, host, guest)
    # Also later, from who was a guest before.
    one = client(b'["more"]')
    expect(lambda: "more" in host.session.channels)
    one.send(said)
    assert is_let_go(one)
    expect(lambda: "more" not in host.session.channels)
    assert (host.session, guest.session) == sessions and fake.connects == 1
    hear(fake, host, guest)
    settled(host, guest, process("cron_trigger"))
    assert not logged("internal error")


def test_what_is_too_long_costs_only_who_sends_it(fake, process, client):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    one = client()
    size = 1 << 21
    with pytest.raises(OSError):
        while True:
            # As much as the system takes; root may send more.
            one.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), 2 * size)
            one.send(b'["' + b"a" * size + b'"]')
            is_let_go(one)
            size *= 2
    hear(fake, host, guest)
    assert fake.connects == 1


def test_the_longest_name_is_taken(fake, process, client):
    host = process("imbus")
    connected(host.listener)
    longest = "\u00e9" * 31 + "a"
    guest = process(longest)
    settled(host, guest)
    fake.notify(longest, "x")
    assert guest.feed.get() == (longest, "x")


def test_who_connects_and_says_nothing_is_no_harm(fake, process, client):
    host = process("imbus")
    connected(host.listener)
    silent = [client() for _ in range(20)]
    guest = process("imbus")
    settled(host, guest)
    hear(fake, host, guest)
    # It was told of the session, but of nothing that was sent.
    for one in silent:
        one.settimeout(0)
        said = []
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(json.loads(one.recv(1 << 20)))
        assert said and all(notifications == [] for _state, notifications in said)


def test_a_guest_is_not_woken_for_what_others_do(fake, process, client):
    host = process("imbus")
    connected(host.listener)
    one = client(b'["more"]')
    while json.loads(one.recv(1 << 20))[0][1] != ["more"]:
        pass
    for _ in range(5):
        guest = process("imbus", "cron_trigger")
        settled(host, guest)
        hear(fake, host, guest)
        guest.end()
        expect(lambda: "cron_trigger" not in host.session.channels)
    one.settimeout(0)
    with pytest.raises(BlockingIOError):
        one.recv(1 << 20)


def test_only_who_listens_warns_of_what_can_not_be_read(fake, process, logged, monkeypatch):
    monkeypatch.setattr(log, "rarely", lambda what: True)
    host = process("more")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    fake.notify("imbus", "no JSON")
    fake.notify("more", "x")
    hear(fake, guest)
    assert host.feed.get() == ("more", "x")
    assert len(logged("can't read")) == 1


def test_another_user_is_refused_and_told_nothing(fake, process, client, bound, monkeypatch):
    # All of this is another user's.
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    host = process("imbus")
    connected(host.listener)
    stranger = client()
    with contextlib.suppress(ConnectionError):
        stranger.send(b'["imbus"]')
    said = b""
    with contextlib.suppress(ConnectionError):
        said = stranger.recv(1 << 20)
    assert said == b""
    fake.notify("imbus", "[]")
    assert host.feed.get() == ("imbus", "[]")
    assert host.session.channels == {"imbus", HEARTBEAT_CHANNEL, host.session.check_channel}
    # Nor is another user's host used, or told what for.
    server, said = bound("evented"), []

    def serve():
        with server.accept()[0] as arrived, contextlib.suppress(ConnectionError):
            arrived.send(json.dumps([[_FACTS, []], []]).encode())
            arrived.settimeout(5)
            said.append(arrived.recv(1 << 20))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    other = process("imbus")
    connected(other.listener)
    thread.join(5)
    assert not thread.is_alive() and said in ([], [b""])
    assert not other.is_guest and fake.connects == 2


def test_a_guest_that_does_not_read_is_let_go_and_keeps_nobody_waiting(fake, process, client):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    stuck = client(b'["imbus", "stuck"]')
    expect(lambda: "stuck" in host.session.channels)
    payload, longest, number = '["%s"]' % ("a" * 7000), 0, 0
    while "stuck" in host.session.channels:
        began = time.monotonic()
        fake.notify("imbus", payload)
        assert host.feed.get() and guest.feed.get()
        longest, number = max(longest, time.monotonic() - began), number + 1
        assert number < 1000
    assert longest < 1
    hear(fake, host, guest)
    assert is_let_go(stuck) and fake.connects == 1


def test_a_guest_that_was_stuck_comes_back(fake, process):
    host = process("imbus")
    connected(host.listener)
    guest, go = process("imbus"), threading.Event()
    settled(host, guest)
    put = guest.feed.put
    guest.feed.put = lambda notifications: go.wait(10) and put(notifications)
    check = guest.session.check_channel
    while check in host.session.channels:
        fake.notify("imbus", '["%s"]' % ("a" * 7000))
        assert host.feed.get()
    go.set()
    assert guest.events.after(CONFIRMED).kind == MOVED
    expect(lambda: guest.in_force and guest.is_guest and guest.session.check_channel != check)
    guest.feed.all()
    hear(fake, host, guest)
    assert fake.connects == 1


def test_a_host_out_of_descriptors_waits_and_goes_on(fake, process, monkeypatch):
    accept, tried, exhausted = socket.socket.accept, [], [1]

    def out_of_descriptors(self):
        if exhausted:
            tried.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    monkeypatch.setattr(socket.socket, "accept", out_of_descriptors)
    other = process("imbus")
    expect(lambda: other.in_force)
    assert not other.is_guest
    hear(fake, host, guest, other)
    expect(lambda: len(tried) >= 2)
    assert min(after - before for before, after in zip(tried, tried[1:])) >= 0.2
    exhausted.clear()
    assert expect(other.better)
    assert other.events.after(CONFIRMED).kind == MOVED
    expect(lambda: other.in_force and other.is_guest)
    hear(fake, host, guest, other)


def test_who_can_not_be_a_host_for_want_of_descriptors_has_a_session(fake, process, monkeypatch):
    selector = sharing.selectors.DefaultSelector

    def exhausted():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(
        sharing, "selectors", SimpleNamespace(**dict(vars(sharing.selectors), DefaultSelector=exhausted))
    )
    one = process("imbus")
    expect(lambda: one.in_force)
    monkeypatch.setattr(
        sharing, "selectors", SimpleNamespace(**dict(vars(sharing.selectors), DefaultSelector=selector))
    )
    # Once it looks again it is one.
    assert not one.better()
    second = process("imbus")
    settled(one, second)
    assert second.is_guest and fake.connects == 1


def test_who_can_not_be_a_host_for_want_of_threads_has_a_session(fake, process, monkeypatch):
    start = threading.Thread.start

    def no_thread(self):
        if self.name.startswith("bus_alt_connection.sharing"):
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        one = process("imbus")
        expect(lambda: one.in_force)
    assert not one.better()
    second = process("imbus")
    settled(one, second)
    assert second.is_guest and fake.connects == 1


# Who shares with whom -------------------------------------------------------------------------------------------------

_OWN = {"host": "db-01", "port": 5432, "user": "odoo", "dbname": "postgres", "sslmode": "prefer"}


def _named(**changed):
    return Sharing(None, lambda: {**_OWN, **changed}, True, False)._name("plain")


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "db-02"},
        {"port": 5433},
        {"user": "other"},
        {"dbname": "other"},
        {"sslmode": "require"},
        {"options": "x"},
    ],
)
def test_who_would_connect_otherwise_is_a_stranger(fake, process, parameters, changed):
    assert _named(**changed) != _named()
    one, other = process("imbus"), process("imbus", parameters={**parameters, **changed})
    settled(one, other)
    assert fake.connects == 2
    assert not one.better() and not other.better()


@pytest.mark.parametrize("variable", ["PGHOST", "PGSERVICEFILE", "PGOPTIONS", "PGSSLMODE", "PGUSER"])
def test_so_is_who_has_other_variables_of_libpq(variable, monkeypatch):
    before = _named()
    monkeypatch.setenv(variable, "x")
    first = _named()
    monkeypatch.setenv(variable, "y")
    assert len({before, first, _named()}) == 3


def test_so_are_another_version_of_the_addon_and_another_user(monkeypatch):
    names = {_named()}
    with monkeypatch.context() as patched:
        patched.setattr(sharing, "_CODE", sharing._CODE + b"# another")
        names.add(_named())
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    names.add(_named())
    assert len(names) == 3


def test_the_version_is_all_of_the_code():
    for module in (sharing, listener_module, log):
        with open(module.__file__, "rb") as file:
            assert file.read() in sharing._CODE


def test_the_name_is_told_by_no_secret_and_tells_none(monkeypatch):
    """Anybody may read it, and try passwords until it is the same."""
    names = set()
    for secret in ("one", "two"):
        monkeypatch.setenv("PGPASSWORD", secret)
        for keyword in log.SECRETS:
            names.add(_named(**{keyword: secret}))
    # It is the same whether there is one or not.
    monkeypatch.delenv("PGPASSWORD")
    (found,) = names | {_named()}
    assert found.startswith("\0bus_alt_connection/") and found.endswith("/plain")
    digest = found.split("/")[1]
    assert len(digest) == 32 and int(digest, 16)
    for text in _OWN.values():
        assert str(text) not in found


def test_nor_by_what_tells_processes_apart(monkeypatch):
    names = {_named(), _named(application_name="odoo-listener-1"), _named(application_name="odoo-listener-2")}
    monkeypatch.setenv("PGAPPNAME", "x")
    assert names == {_named()}


def test_what_is_not_utf_8_is_no_harm(monkeypatch):
    monkeypatch.setitem(os.environ, "PGTZ", "\udcff")
    assert _named(options="\udcff") != _named(options="\udcfe")


@pytest.mark.parametrize("how", ["off", "impossible"])
def test_who_does_not_share_has_no_socket(fake, process, monkeypatch, how):
    def no_socket(*_args, **_named):
        raise AssertionError("a socket")

    if how == "impossible":
        monkeypatch.setattr(sharing, "POSSIBLE", False)
    monkeypatch.setattr(sharing, "socket", SimpleNamespace(**dict(vars(socket), socket=no_socket)))
    processes = [process("imbus", share=how != "off", evented=evented) for evented in (False, False, True)]
    for one in processes:
        connected(one.listener)
        assert not one.is_guest and not one.better() and one.listener.relay is None
    assert fake.connects == 3
    hear(fake, *processes)


def test_a_setting_that_is_refused_is_told(fake, process):
    def refused():
        raise psycopg2.OperationalError("options are wrong")

    one = Process(fake, None, ("imbus",))
    one.sharing._parameters = refused
    one.start()
    assert one.events.expect(FAILED).reason == "options are wrong"
    assert fake.connects == 0
    one.end()


# Ends -----------------------------------------------------------------------------------------------------------------


def _ours():
    return [one.name for one in threading.enumerate() if one.name.startswith("bus_alt_connection.sharing")]


def test_comings_and_goings_cost_nothing(fake, process):
    host = process("imbus")
    connected(host.listener)

    def come_and_go():
        guest = process("imbus", "more")
        settled(host, guest)
        guest.end()
        expect(lambda: "more" not in host.session.channels)

    come_and_go()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        come_and_go()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert host.listener.relay._told == host.listener.relay._wanted == {}
    assert len(_ours()) == 1 and fake.connects == 1


def test_so_do_hosts_that_come_and_go(fake, process):
    last = process("imbus")
    connected(last.listener)

    def change():
        following = process("imbus")
        settled(last, following)
        last.end()
        expect(lambda: following.in_force and not following.is_guest)
        return following

    last = change()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(25):
        last = change()
    expect(lambda: len(_ours()) == 1)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    last.end()
    expect(lambda: not _ours())


def test_losses_cost_nothing(fake, process, monkeypatch):
    monkeypatch.setattr(listener_module, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.002)
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)

    def lose():
        session = guest.session
        fake.cut()
        connected(guest.listener, session)
        settled(host, guest)

    lose()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        lose()
    expect(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert guest.directs == 0


def test_its_threads_end_with_the_listeners(fake, process):
    processes = [process("imbus"), process("imbus", evented=True), process("imbus", share=False)]
    expect(lambda: all(one.in_force for one in processes))
    assert _ours()
    for one in processes:
        one.end()
    expect(lambda: not _ours())
    assert not fake.sessions


def test_a_listener_that_has_ended_takes_the_name_from_nobody(fake, process, bound):
    """Its supervisor may be about to look for a better session, as it ends."""
    server = bound()
    one = process("imbus")
    session = connected(one.listener)
    one.end()
    server.close()
    one.sharing.better(session)
    expect(lambda: not _ours())
    others = [process("imbus") for _ in range(2)]
    assert len(settled(*others)) == 1


# What the log says ----------------------------------------------------------------------------------------------------


def _confirm(one):
    """As its supervisor does."""
    one.listener.confirm(one.session, one.listener.in_force[1], 0.001)


def test_a_move_is_no_outage(fake, process, caplog):
    caplog.set_level(logging.INFO, "bus_alt_connection")
    plain = process("imbus", tell=OutageLog("postgres"))
    connected(plain.listener)
    _confirm(plain)
    expect(lambda: plain.listener.deaf_since is None)
    evented = process("imbus", evented=True)
    connected(evented.listener)
    caplog.clear()
    assert plain.better()
    expect(lambda: plain.in_force and plain.is_guest)
    _confirm(plain)
    expect(lambda: plain.listener.deaf_since is None)
    lines = [(one.levelname, one.getMessage()) for one in caplog.records]
    through = "through process %d at db-01:5432 (database postgres, backend pid 102)" % os.getpid()
    assert lines == [
        ("INFO", "the listener of database postgres moves: there is a better one"),
        ("INFO", "listening on imbus %s, confirmed in 1.0 ms" % through),
    ]
    caplog.clear()
    evented.end()
    expect(lambda: plain.in_force and not plain.is_guest)
    _confirm(plain)
    expect(lambda: plain.listener.deaf_since is None)
    lines = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert lines[0][0] == "INFO" and "moves: process %d, " % os.getpid() in lines[0][1] and "is gone" in lines[0][1]
    assert lines[1][1].startswith("listening on imbus at db-01:5432 (")
    assert len(lines) == 2


def test_a_loss_through_another_process_is_told_with_its_way(fake, process, caplog):
    caplog.set_level(logging.INFO, "bus_alt_connection")
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus", tell=OutageLog("postgres"))
    settled(host, guest)
    _confirm(guest)
    expect(lambda: guest.listener.deaf_since is None)
    caplog.clear()
    fake.cut()
    (line,) = expect(lambda: [one.getMessage() for one in caplog.records])
    text = "lost the listener of database postgres: process %d, through which it listened, has lost its connection"
    assert line.startswith(text % os.getpid() + " (it was backend pid 101 at process %d at db-01:5432)" % os.getpid())


# With supervisors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(fake, options, monkeypatch):
    """Return a function that makes the supervisor of a process; tests call its ``round``, and time is ``fake.now``."""
    from bus_alt_connection import supervisor as supervisor_module

    for module in (listener_module, supervisor_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    monkeypatch.setattr(supervisor_module, "CHECK_TIMEOUT", 0.2)
    fake.rows["x"] = []

    def watch(one):
        backlog = Backlog(fake.opening)
        return Supervisor(one.listener, fake.opening, Databases(["x"]), backlog, options, one.sharing.better)

    return watch


def _rounds(fake, supervisors, seconds, step=1.0):
    end = fake.now + seconds
    while fake.now < end:
        fake.now += step
        for one in supervisors:
            one.round(fake.now)


def _until(fake, supervisors, fact):
    """Do rounds until ``fact()``; return it."""

    def done():
        _rounds(fake, supervisors, 1)
        return fact()

    return expect(done)


def test_the_mode_of_a_guest_is_shared(fake, process, watch, logged):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    supervisors = [watch(host), watch(guest)]
    _until(fake, supervisors, lambda: [one.mode for one in supervisors] == [LISTENING, SHARED])
    status = supervisors[1].status()
    assert (status["mode"], status["listening"], status["confirmed"]) == ("shared", True, True)
    assert guest.events.expect(CONFIRMED).session is guest.session


def test_a_check_proves_the_whole_way(fake, process, watch):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    supervisor = watch(guest)
    _until(fake, [supervisor], lambda: supervisor.mode == SHARED)
    guest.events.expect(CONFIRMED)
    fake.swallow()
    _rounds(fake, [supervisor], 65)
    assert "is silent" in guest.events.after(CONFIRMED).reason


def test_who_has_just_connected_does_not_look_for_something_better_at_once(fake, process, watch, monkeypatch):
    one = process("imbus")
    connected(one.listener)
    supervisor, looked = watch(one), []
    supervisor._better = lambda session: looked.append(session)
    _until(fake, [supervisor], lambda: one.session.confirmed)
    assert looked == []
    _rounds(fake, [supervisor], 60)
    assert looked == [one.session]


def test_supervisors_move_their_listeners_to_the_better_host(fake, process, watch):
    plain = [process("imbus") for _ in range(3)]
    settled(*plain)
    supervisors = [watch(one) for one in plain]
    _until(fake, supervisors, lambda: all(one.mode in (LISTENING, SHARED) for one in supervisors))
    evented = process("imbus", evented=True)
    connected(evented.listener)
    supervisors.append(watch(evented))
    _until(fake, supervisors, lambda: [one.mode for one in supervisors] == [SHARED, SHARED, SHARED, LISTENING])
    assert fake.connects == 2 and len(fake.sessions) == 1
    hear(fake, evented, *plain)


def test_what_was_sent_while_the_host_changed_is_given_to_the_guests(fake, process, watch):
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    settled(host, guest)
    supervisor = watch(guest)
    _rounds(fake, [supervisor], 300, 20)
    _until(fake, [supervisor], lambda: supervisor.mode == SHARED)
    guest.feed.all()
    host.end()
    guest.events.wait_for(MOVED)
    fake.write("x", '"lost?"', notify=False)
    settled(guest)
    _until(fake, [supervisor], lambda: guest.feed.arrived.qsize())
    assert guest.feed.all() == [("imbus", '["lost?"]')]


def test_guests_of_a_deaf_host_poll_and_are_back_with_it(fake, process, watch):
    fake.pooled = fake.deaf_pooler = True
    host = process("imbus")
    connected(host.listener)
    guest = process("imbus")
    supervisors = [watch(host), watch(guest)]
    for number in range(3):
        fake.write("x", '"%d"' % number, notify=False)
        _until(fake, supervisors, lambda number=number: '"%d"' % number in str(guest.feed.all()))
    assert supervisors[1].mode == POLLING
    assert guest.listener.deaf_since is not None
    assert not any("imbus" in session.channels for session in list(fake.sessions))
    fake.pooled = fake.deaf_pooler = False
    fake.cut()
    _until(fake, supervisors, lambda: {one.mode for one in supervisors} <= {LISTENING, SHARED})
    host.feed.all(), guest.feed.all()
    fake.notify("imbus", '["a"]')
    assert guest.feed.get() == ("imbus", '["a"]')


def test_guests_of_a_host_behind_a_pooler_that_keeps_listen_hear(fake, process, watch):
    fake.pooled = True
    host = process("imbus")
    connected(host.listener)
    first = watch(host)
    _until(fake, [first], lambda: first.mode == LISTENING)
    guest = process("imbus")
    second = watch(guest)
    _until(fake, [first, second], lambda: second.mode == SHARED)
    hear(fake, host, guest)
    assert fake.connects == 1


def test_a_token_behind_many_notifications_counts(fake, process):
    """As when something keeps gevent's loop busy: all of it is there already when the time is over."""
    host = process("more")
    connected(host.listener)
    guest, busy = process("more"), threading.Event()
    settled(host, guest)
    put = guest.feed.put
    guest.feed.put = lambda notifications: busy.wait(5) and time.sleep(0.002) or put(notifications)
    for number in range(100):
        fake.notify("more", "%d" % number)
        assert host.feed.get()
    guest.listener.expect("token")
    fake.notify(guest.session.check_channel, "token")
    threading.Timer(0.3, busy.set).start()
    assert guest.listener.hears(guest.session, 0.1)

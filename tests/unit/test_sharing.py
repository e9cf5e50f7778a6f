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
from bus_alt_connection.log import CONFIRMED, FAILED, LOST, MOVED, UNHEARD, OutageLog
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from bus_alt_connection.sharing import Sharing
from bus_alt_connection.supervisor import LISTENING, POLLING, SHARED
from stack.waiting import wait_until
from tests.unit.conftest import _end
from tests.unit.fakes import Events, FakeFeed, TimelessSupervisor, connected

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets without files are Linux's")

SECRET = "s3cret"
# The first ranks of gevent processes, and of others.
EVENTED, PLAIN = 0, 2


#: waits until what it is given is true, when called; returns it
expect = functools.partial(wait_until, deadline=5, interval=0.005)

HEARTBEAT = b"[null, []]"
# What neither a leader nor a follower says.
_NONSENSE = [b"", b"\xff\xfe", b"no JSON", b"[" * 10000, b"null", b"5"]


class DirectLog(OutageLog):
    """Writes at once what is told of a listener."""

    due = float("inf")

    def add(self, write, *args):
        write(*args)


class Process:
    """A listening process: what the addon has in one, with another way to connect.

    :ivar directs: how often it connected by itself
    """

    def __init__(self, fake, parameters, channels, evented=False, share=True, direct=None, tell=None):
        self.directs, self.events, self.feed = 0, Events(), FakeFeed(*channels)
        self._direct = direct or fake.connect
        self.sharing = Sharing(self.connect, lambda: parameters, share, evented)
        journal = tell or self.events
        self.listener = Listener("postgres", self.sharing.connect, lambda: False, journal, 19, self.sharing.close)
        self.listener.add(self.feed)
        self._thread = threading.Thread(target=self.listener.run, name="bus_alt_connection.listener", daemon=True)

    def connect(self, last):
        self.directs += 1
        return self._direct()

    def start(self):
        self._thread.start()
        return self

    @property
    def session(self):
        return self.listener.session

    @property
    def is_follower(self):
        return self.session is not None and self.session.leader_pid is not None

    @property
    def in_force(self):
        """Whether it has a session with all that it wants."""
        session = self.session
        return session is not None and self.feed.channels <= session.channels

    def better(self):
        """As its supervisor does after a check; return whether it moves."""
        session = self.session
        self.listener.confirm(session, frozenset(self.listener.in_force[1]), 0.001)
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
    monkeypatch.setattr(sharing, "GREETING_TIMEOUT", 0.4)


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
    """Return a function that gives the name of the leader, by kind."""
    sharing_ = Sharing(None, lambda: parameters, True, False)
    return lambda rank=PLAIN: sharing_._name(rank)


@pytest.fixture
def bound(name):
    """Return a function that binds the name of a leader to a socket of ours, which is returned."""
    with contextlib.ExitStack() as stack:

        def bind(rank=PLAIN):
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            server.bind(name(rank))
            server.listen(16)
            server.settimeout(5)
            return server

        yield bind


@pytest.fixture
def client(name):
    """Return a function that connects to the leader, as no follower would."""
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
    """Return whether the leader has hung up; wait for it."""
    with contextlib.suppress(ConnectionError):
        while client.recv(1 << 20):
            pass
    return True


def settled(*processes):
    """Wait until all have what they want in force; return those with a connection of their own."""
    expect(lambda: all(one.in_force for one in processes))
    return [one for one in processes if not one.is_follower]


def in_an_outage(fake, process):
    """Return a process that is leader, and a list of three that are its followers; their server has just gone."""
    leader = process("imbus")
    connected(leader.listener)
    followers = [process("imbus") for _ in range(3)]
    settled(leader, *followers)
    fake.refuse()
    fake.cut()
    return leader, followers


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


def test_a_follower_is_given_what_is_sent_on_its_channels_in_order_and_once(fake, process):
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
    """What came while the leader was kept from looking comes in one piece, and no follower loses its session."""
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


def test_a_burst_that_is_too_large_costs_a_follower_its_session_but_no_connection(fake, process):
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
    assert second.is_follower and fake.connects == 1
    expect(lambda: first.feed.arrived.qsize() == 1000)
    first.feed.all(), second.feed.all()
    hear(fake, first, second)


def test_a_channel_is_in_force_once_a_follower_is_told_so(fake, process):
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


def test_what_only_a_follower_wants_is_no_concern_of_the_leaders(fake, process):
    first = process("imbus")
    connected(first.listener)
    settled(first, process("cron_trigger"))
    assert set(first.listener.in_force[1]) == {"imbus"}
    before = first.listener.in_force
    third = process("more")
    settled(first, third)
    fake.notify("more", "x")
    assert third.feed.get() == ("more", "x")
    assert first.feed.all() == [] and first.listener.in_force == before


def test_the_channels_of_a_follower_go_with_it(fake, process):
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


def test_a_follower_that_wants_less_gets_less(fake, process):
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
    """Who comes between the two steps of the leader is refused."""
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
def test_when_the_leader_ends_the_others_settle_on_another(fake, process, evented):
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
        (leader,) = settled(*processes)
        processes.remove(leader)
        left = [one.session for one in processes]
        leader.end()
        expect(lambda left=left: not {one.session for one in processes} & {None, *left})
        settled(*processes)
        assert fake.connects == 1 + number
    hear(fake, *processes)


# Evented processes are the better leaders -----------------------------------------------------------------------------


def test_plain_ones_move_to_an_evented_one(fake, process):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    assert not leader.better() and not follower.better()
    evented = process("imbus", evented=True)
    connected(evented.listener)
    assert not evented.is_follower and fake.connects == 2
    # The follower first, then the leader.
    assert follower.better()
    assert follower.events.after(CONFIRMED).kind == MOVED
    expect(lambda: follower.in_force and follower.session.rank == EVENTED)
    assert leader.better()
    leader.events.wait_for(MOVED)
    expect(lambda: leader.in_force and leader.session.rank == EVENTED)
    assert fake.connects == 2 and len(fake.sessions) == 1
    hear(fake, evented, leader, follower)
    assert not any(one.better() for one in (evented, leader, follower))


def test_followers_of_a_plain_leader_go_where_it_goes(fake, process):
    leader = process("imbus")
    connected(leader.listener)
    followers = [process("imbus") for _ in range(3)]
    settled(leader, *followers)
    evented = process("imbus", evented=True)
    connected(evented.listener)
    assert leader.better()
    # None of them takes it for an outage.
    for one in (leader, *followers):
        assert one.events.after(CONFIRMED).kind == MOVED
    expect(lambda: all(one.in_force and one.session.rank == EVENTED for one in (leader, *followers)))
    assert fake.connects == 2 and len(fake.sessions) == 1
    hear(fake, evented, leader, *followers)
    expect(lambda: len(_ours()) == 1)


def test_an_evented_one_never_joins_a_plain_one(fake, process):
    plain = process("imbus")
    connected(plain.listener)
    evented, second = process("imbus", evented=True), None
    connected(evented.listener)
    assert not evented.better() and not evented.is_follower
    second = process("imbus", evented=True)
    settled(evented, second)
    assert second.session.rank == EVENTED
    evented.end()
    expect(lambda: second.session and not second.is_follower)
    assert not second.better() and not second.is_follower


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
    # And one that has been leader before is so again.
    again = process("imbus", evented=True)
    connected(again.listener)
    (leader,) = [one for one in plain if not one.is_follower]
    assert leader.better()
    expect(lambda: all(one.in_force and one.session.rank == EVENTED for one in plain))
    again.end()
    for one in plain:
        one.events.wait_for(MOVED)
    expect(lambda: all(one.in_force for one in plain) and [one.is_follower for one in plain].count(False) == 1)
    assert fake.connects == 4
    hear(fake, *plain)


# Outages --------------------------------------------------------------------------------------------------------------


def test_after_an_outage_only_the_leader_connects(fake, process):
    leader, followers = in_an_outage(fake, process)
    for one in (leader, *followers):
        event = one.events.expect(LOST)
        assert event.session is not None
        assert ("has lost its connection" in event.reason) == (one is not leader)
        assert not one.listener.session and one.listener.deaf_since
    leader.events.expect(FAILED, FAILED)
    fake.forward()
    assert settled(leader, *followers) == [leader]
    assert [one.directs for one in followers] == [0, 0, 0]
    hear(fake, leader, *followers)
    # And what is in force is that of the new session.
    assert all(one.session.check_channel in leader.session.channels for one in followers)


def test_a_follower_is_told_of_a_loss_that_is_over_at_once(fake, process):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    before = follower.session
    fake.cut()
    leader.events.expect(LOST)
    follower.events.expect(LOST)
    connected(follower.listener, before)
    settled(leader, follower)
    assert follower.is_follower and fake.connects == 2
    assert follower.session.facts.backend_pid == leader.session.facts.backend_pid != before.facts.backend_pid


def test_who_comes_in_an_outage_waits_with_the_others(fake, process):
    leader = process("imbus")
    connected(leader.listener)
    fake.refuse()
    fake.cut()
    leader.events.expect(LOST, FAILED)
    follower = process("imbus")
    leader.events.expect(FAILED)
    fake.forward()
    settled(leader, follower)
    assert follower.is_follower and follower.directs == 0


def test_after_a_long_outage_as_well(fake, process, monkeypatch):
    monkeypatch.setattr(sharing, "LONGEST_DELAY", 0.4)
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.2)
    leader, followers = in_an_outage(fake, process)
    leader.events.expect(LOST)
    # As 20 s are with the real delays.
    fails_for(leader, 4 * sharing.LONGEST_DELAY)
    fake.forward()
    settled(leader, *followers)
    assert [one.directs for one in followers] == [0, 0, 0]


def test_who_waits_with_a_leader_goes_where_it_goes(fake, process, monkeypatch):
    """Which has found a better one meanwhile, as that has a session."""
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.2)
    plain, followers = in_an_outage(fake, process)
    expect(lambda: not any(one.session for one in followers))
    evented = process("imbus", evented=True)
    fails_for(evented, 2 * sharing.GREETING_TIMEOUT)
    fake.forward()
    assert settled(evented, plain, *followers) == [evented]
    assert [one.directs for one in followers] == [0, 0, 0]
    hear(fake, evented, plain, *followers)


def test_a_leader_that_is_long_without_session_keeps_nobody_from_one(fake, process, monkeypatch):
    monkeypatch.setattr(sharing, "LONGEST_DELAY", 0.05)
    refuses = []

    def direct():
        if refuses:
            raise psycopg2.OperationalError("refused")
        return fake.connect()

    leader = process("imbus", direct=direct)
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    refuses.append(1)
    fake.cut()
    follower.events.expect(LOST)
    expect(lambda: follower.in_force and not follower.is_follower)
    assert follower.directs == 1 and not leader.session
    fake.notify("imbus", '["a"]')
    assert follower.feed.get() == ("imbus", '["a"]')
    # Nobody is asked to join a leader that has no session.
    assert not follower.better()
    refuses.clear()
    settled(leader, follower)
    assert follower.better()
    assert follower.events.after(CONFIRMED).kind == MOVED
    expect(lambda: follower.in_force and follower.is_follower)
    hear(fake, leader, follower)


# Hosts that do not answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evented", [False, True])
def test_a_silent_leader_keeps_nobody_from_a_session(fake, process, bound, evented):
    server, began = bound(EVENTED if evented else PLAIN), time.monotonic()
    one = process("imbus", evented=evented)
    connected(one.listener)
    assert sharing.GREETING_TIMEOUT <= time.monotonic() - began < sharing.GREETING_TIMEOUT + 1
    assert (fake.connects, one.is_follower) == (1, False)
    assert not one.better() and one.directs == 1
    # Meanwhile the others gather at the second name.
    second = process("imbus", evented=evented)
    settled(one, second)
    assert second.is_follower and fake.connects == 1
    # And once it is gone, at the first again, with the next process that comes.
    server.close()
    assert not one.better() and one.directs == 1
    third = process("imbus", evented=evented)
    settled(one, second, third)
    assert one.better() and expect(lambda: one.is_follower)
    assert settled(one, second, third) == [third]
    hear(fake, one, second, third)


def test_a_silent_evented_leader_does_not_keep_plain_ones_from_sharing(fake, process, bound):
    bound(EVENTED)
    first = process("imbus")
    connected(first.listener)
    second = process("imbus")
    settled(first, second)
    assert second.session.rank == PLAIN and fake.connects == 1


def test_who_connected_by_itself_joins_a_leader_that_answers_again(fake, process, monkeypatch):
    accept, stopped = sharing.Leader._accept, threading.Event()
    stopped.set()
    monkeypatch.setattr(sharing.Leader, "_accept", lambda *args: stopped.wait(5) and accept(*args))
    leader = process("imbus")
    connected(leader.listener)
    stopped.clear()
    other = process("imbus")
    connected(other.listener)
    assert not other.is_follower and fake.connects == 2
    assert not other.better()
    stopped.set()
    assert expect(other.better)
    assert other.events.after(CONFIRMED).kind == MOVED
    expect(lambda: other.in_force and other.is_follower)
    hear(fake, leader, other)


def test_a_follower_whose_leader_no_longer_hands_on_is_back_after_its_check(fake, process, monkeypatch):
    """As when the leader is stopped by a signal: its kernel takes the follower's connection all the same."""
    stopped = threading.Event()
    stopped.set()
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    for kind, name in ((sharing.Leader, "_accept"), (sharing.Leader, "_read"), (sharing.Follower, "_send")):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, method=method: stopped.wait(10) and method(*args))
    stopped.clear()
    try:
        session = follower.session
        follower.listener.expect("token")
        fake.notify(session.check_channel, "token")
        assert not follower.listener.wait_for_token(session, 0.1)
        follower.listener.replace(session, UNHEARD, "the path is silent")
        expect(lambda: follower.in_force and not follower.is_follower)
    finally:
        stopped.set()
    assert expect(follower.better)


_FACTS = ["db-01:5432", 100, False, False, "postgres", "15.3", 1000000]


@pytest.mark.parametrize("gone", ["silent", "reset"])
def test_a_leader_that_is_gone_as_a_follower_speaks_is_no_outage(fake, process, bound, gone, monkeypatch):
    monkeypatch.setattr(sharing, "SILENCE", 0.5)
    server, go, answers = bound(), threading.Event(), [True]

    def serve():
        with server.accept()[0] as follower:
            follower.send(json.dumps([[_FACTS, []], []]).encode())
            while answers:
                names = json.loads(follower.recv(1 << 20))
                follower.send(json.dumps([[_FACTS, names], []]).encode())
                if "imbus" in names:
                    answers.clear()
            go.wait(5)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    one = process("imbus", "more")
    expect(lambda: one.in_force)
    assert one.is_follower
    if gone == "silent":
        one.listener.listen(one.feed, frozenset(["imbus", "another"]))
    else:
        # That needs no answer, and what nobody reads makes the end of the leader an error.
        one.listener.listen(one.feed, frozenset(["imbus"]))
        expect(lambda: one.session.channels == {"imbus", HEARTBEAT_CHANNEL, one.session.check_channel})
        go.set()
    assert "process %d, through which it listened, " % os.getpid() in one.events.expect(MOVED).reason
    expect(lambda: one.in_force)
    assert not one.is_follower
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
    assert not one.is_follower
    hear(fake, one)
    ended.set()
    one.end()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
        last.connect(server.getsockname())
    thread.join(5)
    assert not thread.is_alive()


# What comes to a leader -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        *_NONSENSE,
        b'"imbus"',
        b'{"imbus": 1}',
    ],
)
def test_garbage_costs_only_who_sends_it(fake, process, client, logged, said):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    sessions = leader.session, follower.session
    assert is_let_go(client(said))
    hear(fake, leader, follower)
    # Also later, from who was a follower before.
    one = client(b'["more"]')
    expect(lambda: "more" in leader.session.channels)
    one.send(said)
    assert is_let_go(one)
    expect(lambda: "more" not in leader.session.channels)
    assert (leader.session, follower.session) == sessions and fake.connects == 1
    hear(fake, leader, follower)
    settled(leader, follower, process("cron_trigger"))
    assert not logged("internal error")


@pytest.mark.parametrize("bad", [5, None, ["imbus"], "", "a" * 64, "\u00e9" * 32, "a\0b", "\ud800", float("nan")])
def test_a_name_that_postgresql_does_not_take_costs_nobody_anything(fake, process, client, logged, bad):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    client(json.dumps(["more", bad]).encode())
    expect(lambda: "more" in leader.session.channels)
    hear(fake, leader, follower)
    assert fake.connects == 1 and not logged("internal error")


def test_what_is_too_long_costs_only_who_sends_it(fake, process, client):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    one = client()
    size = 1 << 21
    with pytest.raises(OSError):
        while True:
            # As much as the system takes; root may send more.
            one.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), 2 * size)
            one.send(b'["' + b"a" * size + b'"]')
            is_let_go(one)
            size *= 2
    hear(fake, leader, follower)
    assert fake.connects == 1


def test_the_longest_name_is_taken(fake, process, client):
    leader = process("imbus")
    connected(leader.listener)
    longest = "\u00e9" * 31 + "a"
    follower = process(longest)
    settled(leader, follower)
    fake.notify(longest, "x")
    assert follower.feed.get() == (longest, "x")


def test_who_connects_and_says_nothing_is_no_harm(fake, process, client):
    leader = process("imbus")
    connected(leader.listener)
    silent = [client() for _ in range(20)]
    follower = process("imbus")
    settled(leader, follower)
    hear(fake, leader, follower)
    # It was told of the session, but of nothing that was sent.
    for one in silent:
        one.settimeout(0)
        said = []
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(json.loads(one.recv(1 << 20)))
        assert said and all(notifications == [] for _state, notifications in said)


def test_a_follower_is_not_woken_for_what_others_do(fake, process, client):
    leader = process("imbus")
    connected(leader.listener)
    one = client(b'["more"]')
    while (json.loads(one.recv(1 << 20))[0] or [None, None])[1] != ["more"]:
        pass
    for _ in range(5):
        follower = process("imbus", "cron_trigger")
        settled(leader, follower)
        hear(fake, leader, follower)
        follower.end()
        expect(lambda: "cron_trigger" not in leader.session.channels)
    one.settimeout(0)
    with pytest.raises(BlockingIOError):
        while True:
            assert one.recv(1 << 20) == HEARTBEAT


def test_only_who_listens_warns_of_what_can_not_be_read(fake, process, logged, monkeypatch):
    monkeypatch.setattr(log, "rarely", lambda what: True)
    leader = process("more")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    fake.notify("imbus", "no JSON")
    fake.notify("more", "x")
    hear(fake, follower)
    assert leader.feed.get() == ("more", "x")
    assert len(logged("can't read")) == 1


def test_another_user_is_refused_and_told_nothing(fake, process, client, bound, monkeypatch):
    # All of this is another user's.
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    leader = process("imbus")
    connected(leader.listener)
    stranger = client()
    with contextlib.suppress(ConnectionError):
        stranger.send(b'["imbus"]')
    said = b""
    with contextlib.suppress(ConnectionError):
        said = stranger.recv(1 << 20)
    assert said == b""
    fake.notify("imbus", "[]")
    assert leader.feed.get() == ("imbus", "[]")
    assert leader.session.channels == {"imbus", HEARTBEAT_CHANNEL, leader.session.check_channel}
    # Nor is another user's leader used, or told what for.
    server, said = bound(EVENTED), []

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
    assert not other.is_follower and fake.connects == 2


@pytest.mark.parametrize("what", ["pid 0", "pid namespace", "user namespace", "unknown namespace"])
def test_a_process_of_another_container_is_refused_on_both_sides(fake, process, client, bound, monkeypatch, what):
    """With a shared network namespace, the same uid proves nothing."""
    leader = process("imbus")
    connected(leader.listener)
    server = bound(EVENTED)
    if what == "pid 0":
        monkeypatch.setattr(sharing.struct, "unpack", lambda *_args: (0, os.geteuid(), os.getegid()))
    else:
        namespaces = sharing._namespaces

        def of_another_container(pid="self"):
            if pid != "self" and what == "unknown namespace":
                raise FileNotFoundError
            found = namespaces()
            if pid != "self":
                found[what == "user namespace"] += 1
            return found

        monkeypatch.setattr(sharing, "_namespaces", of_another_container)
    stranger = client()
    with contextlib.suppress(ConnectionError):
        stranger.send(b'["imbus"]')
    assert is_let_go(stranger)
    assert leader.session.channels == {"imbus", HEARTBEAT_CHANNEL, leader.session.check_channel}
    # Nor is a leader of another container followed, or told anything.
    other = process("imbus")
    connected(other.listener)
    assert not other.is_follower
    server.settimeout(5)
    with server.accept()[0] as arrived:
        arrived.settimeout(5)
        assert arrived.recv(1 << 20) == b""


def test_the_namespaces_are_part_of_the_name(monkeypatch):
    names = {_named()}
    for found in ([1, 2], [1, 3], [2, 2]):
        monkeypatch.setattr(sharing, "_namespaces", lambda pid="self", found=found: found)
        names.add(_named())
    assert len(names) == 4


def test_a_socket_is_not_closed_while_another_thread_sends(monkeypatch):
    """Its number may belong to another file by the time of the system call."""
    sending, done = threading.Event(), threading.Event()

    class Socket:
        closed = False

        def send(self, _data):
            sending.set()
            done.wait(0.2)
            assert not self.closed

        def close(self):
            self.closed = True

    follower = sharing.Follower(Socket())
    thread = threading.Thread(target=follower.beat, daemon=True)
    thread.start()
    assert sending.wait(5)
    follower.close()
    thread.join(5)
    assert follower.socket.closed


def test_a_leader_that_stands_still_is_left(fake, process, monkeypatch):
    monkeypatch.setattr(sharing, "HEARTBEAT", 0.1)
    monkeypatch.setattr(sharing, "SILENCE", 0.5)
    leader = process("imbus")
    connected(leader.listener)
    followers = [process("imbus") for _ in range(3)]
    settled(leader, *followers)
    # Heartbeats are enough to stay.
    time.sleep(1.0)
    assert all(one.is_follower for one in followers)
    go_on = threading.Event()
    send = sharing.Follower._send
    monkeypatch.setattr(sharing.Follower, "_send", lambda *args: go_on.wait(20) and send(*args))
    accept, stopped = sharing.Leader._accept, leader.sharing._leader

    def accept_unless_stopped(self, *args):
        if self is stopped:
            go_on.wait(20)
        return accept(self, *args)

    monkeypatch.setattr(sharing.Leader, "_accept", accept_unless_stopped)
    began = time.monotonic()
    try:
        assert "has been silent for" in followers[0].events.wait_for(LOST).reason
        assert time.monotonic() - began < 2
        go_on.set()
        expect(lambda: all(one.in_force for one in followers))
    finally:
        go_on.set()


def test_a_follower_that_did_not_run_itself_waits_for_another_heartbeat(fake, process):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    session = follower.session
    # As if it had been stopped for longer than a leader may be silent.
    session._silent_at = time.monotonic() - 1
    assert session.receive() == []
    assert 0 < session.seconds_until_silent() <= sharing.HEARTBEAT + 0.5
    session._silent_at = time.monotonic() - 1
    with pytest.raises(psycopg2.OperationalError):
        session.receive()


def test_a_follower_that_does_not_read_is_let_go_and_keeps_nobody_waiting(fake, process, client):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    stuck = client(b'["imbus", "stuck"]')
    expect(lambda: "stuck" in leader.session.channels)
    payload, longest, number = '["%s"]' % ("a" * 7000), 0, 0
    while "stuck" in leader.session.channels:
        began = time.monotonic()
        fake.notify("imbus", payload)
        assert leader.feed.get() and follower.feed.get()
        longest, number = max(longest, time.monotonic() - began), number + 1
        assert number < 1000
    assert longest < 1
    hear(fake, leader, follower)
    assert is_let_go(stuck) and fake.connects == 1


def test_a_follower_that_was_stuck_comes_back(fake, process):
    leader = process("imbus")
    connected(leader.listener)
    follower, go = process("imbus"), threading.Event()
    settled(leader, follower)
    put = follower.feed.put
    follower.feed.put = lambda notifications: go.wait(10) and put(notifications)
    check = follower.session.check_channel
    while check in leader.session.channels:
        fake.notify("imbus", '["%s"]' % ("a" * 7000))
        assert leader.feed.get()
    go.set()
    assert follower.events.after(CONFIRMED).kind == MOVED
    expect(lambda: follower.in_force and follower.is_follower and follower.session.check_channel != check)
    follower.feed.all()
    hear(fake, leader, follower)
    assert fake.connects == 1


def test_a_leader_out_of_descriptors_waits_and_goes_on(fake, process, monkeypatch):
    accept, tried, exhausted = socket.socket.accept, [], [1]

    def out_of_descriptors(self):
        if exhausted:
            tried.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    monkeypatch.setattr(socket.socket, "accept", out_of_descriptors)
    other = process("imbus")
    expect(lambda: other.in_force)
    assert not other.is_follower
    hear(fake, leader, follower, other)
    expect(lambda: len(tried) >= 2)
    assert min(after - before for before, after in zip(tried, tried[1:])) >= 0.2
    exhausted.clear()
    assert expect(other.better)
    assert other.events.after(CONFIRMED).kind == MOVED
    expect(lambda: other.in_force and other.is_follower)
    hear(fake, leader, follower, other)


def test_who_can_not_be_a_leader_for_want_of_descriptors_has_a_session(fake, process, monkeypatch):
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
    assert one.better()
    expect(lambda: one.in_force and one.sharing._leader)
    second = process("imbus")
    settled(one, second)
    assert second.is_follower and fake.connects == 2


def test_who_can_not_be_a_leader_for_want_of_threads_has_a_session(fake, process, monkeypatch):
    start = threading.Thread.start

    def no_thread(self):
        if self.name.startswith("bus_alt_connection.sharing"):
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        one = process("imbus")
        expect(lambda: one.in_force)
    assert one.better()
    expect(lambda: one.in_force and one.sharing._leader)
    second = process("imbus")
    settled(one, second)
    assert second.is_follower and fake.connects == 2


# Who shares with whom -------------------------------------------------------------------------------------------------

_OWN = {"host": "db-01", "port": 5432, "user": "odoo", "dbname": "postgres", "sslmode": "prefer"}


def _named(**changed):
    return Sharing(None, lambda: {**_OWN, **changed}, True, False)._name(PLAIN)


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
        monkeypatch.setattr(sharing, "possible", lambda: False)
    monkeypatch.setattr(sharing, "socket", SimpleNamespace(**dict(vars(socket), socket=no_socket)))
    processes = [process("imbus", share=how != "off", evented=evented) for evented in (False, False, True)]
    for one in processes:
        connected(one.listener)
        assert not one.is_follower and not one.better() and one.sharing._leader is None
    assert fake.connects == 3
    hear(fake, *processes)


def test_a_setting_that_is_refused_is_told(fake, process):
    def refused(*_args):
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
    leader = process("imbus")
    connected(leader.listener)

    def come_and_go():
        follower = process("imbus", "more")
        settled(leader, follower)
        follower.end()
        expect(lambda: "more" not in leader.session.channels)

    come_and_go()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        come_and_go()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert leader.listener._all_feeds() == [leader.feed]
    assert len(_ours()) == 1 and fake.connects == 1


def test_so_do_hosts_that_come_and_go(fake, process):
    last = process("imbus")
    connected(last.listener)

    def change():
        following = process("imbus")
        settled(last, following)
        last.end()
        expect(lambda: following.in_force and not following.is_follower)
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
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)

    def lose():
        session = follower.session
        fake.cut()
        connected(follower.listener, session)
        settled(leader, follower)

    lose()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        lose()
    expect(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert follower.directs == 0


def test_its_threads_end_with_the_listeners(fake, process):
    processes = [process("imbus"), process("imbus", evented=True), process("imbus", share=False)]
    expect(lambda: all(one.in_force for one in processes))
    assert _ours()
    for one in processes:
        one.end()
    expect(lambda: not _ours())
    assert not fake.sessions


# What the log says ----------------------------------------------------------------------------------------------------


def _confirm(one):
    """As its supervisor does."""
    one.listener.confirm(one.session, frozenset(one.listener.in_force[1]), 0.001)


def test_a_move_is_no_outage(fake, process, caplog):
    caplog.set_level(logging.INFO, "bus_alt_connection")
    plain = process("imbus", tell=DirectLog("postgres"))
    connected(plain.listener)
    _confirm(plain)
    expect(lambda: plain.listener.deaf_since is None)
    evented = process("imbus", evented=True)
    connected(evented.listener)
    caplog.clear()
    assert plain.better()
    expect(lambda: plain.in_force and plain.is_follower)
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
    expect(lambda: plain.in_force and not plain.is_follower)
    _confirm(plain)
    expect(lambda: plain.listener.deaf_since is None)
    lines = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert lines[0][0] == "INFO" and "moves: process %d, " % os.getpid() in lines[0][1] and "is gone" in lines[0][1]
    assert lines[1][1].startswith("listening on imbus at db-01:5432 (")
    assert len(lines) == 2


def test_a_loss_through_another_process_is_told_with_its_way(fake, process, caplog):
    caplog.set_level(logging.INFO, "bus_alt_connection")
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus", tell=DirectLog("postgres"))
    settled(leader, follower)
    _confirm(follower)
    expect(lambda: follower.listener.deaf_since is None)
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
        return TimelessSupervisor(one.listener, fake.opening, Databases(["x"]), backlog, options, one.sharing.better)

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


def test_the_mode_of_a_follower_is_shared(fake, process, watch, logged):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    supervisors = [watch(leader), watch(follower)]
    _until(fake, supervisors, lambda: [one.mode for one in supervisors] == [LISTENING, SHARED])
    status = supervisors[1].status()
    assert (status["mode"], status["listening"], status["confirmed"]) == ("shared", True, True)
    assert follower.events.expect(CONFIRMED).session is follower.session


def test_a_check_proves_the_whole_way(fake, process, watch):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    supervisor = watch(follower)
    _until(fake, [supervisor], lambda: supervisor.mode == SHARED)
    follower.events.expect(CONFIRMED)
    fake.swallow()
    _rounds(fake, [supervisor], 65)
    assert "did not deliver" in follower.events.after(CONFIRMED).reason


def test_who_has_just_connected_does_not_look_for_something_better_at_once(fake, process, watch, monkeypatch):
    one = process("imbus")
    connected(one.listener)
    supervisor, looked = watch(one), []
    supervisor._better = lambda session: looked.append(session)
    _until(fake, [supervisor], lambda: one.session.confirmed)
    assert looked == []
    _rounds(fake, [supervisor], 60)
    assert looked == [one.session]


def test_supervisors_move_their_listeners_to_the_better_leader(fake, process, watch):
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


def test_what_was_sent_while_the_leader_changed_is_given_to_the_followers(fake, process, watch):
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    settled(leader, follower)
    supervisor = watch(follower)
    _rounds(fake, [supervisor], 300, 20)
    _until(fake, [supervisor], lambda: supervisor.mode == SHARED)
    follower.feed.all()
    leader.end()
    follower.events.wait_for(MOVED)
    fake.write("x", '"lost?"', notify=False)
    settled(follower)
    _until(fake, [supervisor], lambda: follower.feed.arrived.qsize())
    assert follower.feed.all() == [("imbus", '["lost?"]')]


def test_followers_of_a_deaf_leader_poll_and_are_back_with_it(fake, process, watch):
    fake.pooled = fake.deaf_pooler = True
    leader = process("imbus")
    connected(leader.listener)
    follower = process("imbus")
    supervisors = [watch(leader), watch(follower)]
    for number in range(3):
        fake.write("x", '"%d"' % number, notify=False)
        _until(fake, supervisors, lambda number=number: '"%d"' % number in str(follower.feed.all()))
    assert supervisors[1].mode == POLLING
    assert follower.listener.deaf_since is not None
    assert not any("imbus" in session.channels for session in list(fake.sessions))
    fake.pooled = fake.deaf_pooler = False
    fake.cut()
    _until(fake, supervisors, lambda: {one.mode for one in supervisors} <= {LISTENING, SHARED})
    leader.feed.all(), follower.feed.all()
    fake.notify("imbus", '["a"]')
    assert follower.feed.get() == ("imbus", '["a"]')


def test_followers_of_a_leader_behind_a_pooler_that_keeps_listen_hear(fake, process, watch):
    fake.pooled = True
    leader = process("imbus")
    connected(leader.listener)
    first = watch(leader)
    _until(fake, [first], lambda: first.mode == LISTENING)
    follower = process("imbus")
    second = watch(follower)
    _until(fake, [first, second], lambda: second.mode == SHARED)
    hear(fake, leader, follower)
    assert fake.connects == 1


def test_a_token_behind_many_notifications_counts(fake, process):
    """As when something keeps gevent's loop busy: all of it is there already when the time is over."""
    leader = process("more")
    connected(leader.listener)
    follower, busy = process("more"), threading.Event()
    settled(leader, follower)
    put = follower.feed.put
    follower.feed.put = lambda notifications: busy.wait(5) and time.sleep(0.002) or put(notifications)
    for number in range(100):
        fake.notify("more", "%d" % number)
        assert leader.feed.get()
    follower.listener.expect("token")
    fake.notify(follower.session.check_channel, "token")
    threading.Timer(0.3, busy.set).start()
    assert follower.listener.wait_for_token(follower.session, 0.1)

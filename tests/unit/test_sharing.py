"""The listeners of a machine share the connection of one of them: several "processes" in this one, on real sockets."""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import pytest
from psycopg2.extensions import Notify

from bus_alt_connection import listener as listener_module
from bus_alt_connection import log, sharing
from bus_alt_connection.listener import Moved
from bus_alt_connection.log import LOST, MOVED
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from bus_alt_connection.sharing import FollowerSession, Sharing
from bus_alt_connection.tasks import finish
from stack.waiting import wait_until
from tests.unit.fakes import Events, FakeFeed, connected

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets without files are Linux's")

# The first ranks of gevent processes, and of others.
EVENTED, PLAIN = 0, 2
#: waits until the function that it is given returns something true; returns that
expect = functools.partial(wait_until, deadline=5, interval=0.005)
HEARTBEAT = b"[null, []]"
# What neither a leader nor a follower says.
NONSENSE = [b"", b"\xff\xfe", b"no JSON", b"[" * 10000, b"null", b"5", b'"imbus"', b'{"imbus": 1}']
FACTS = ["db-01:5432", 100, False, False, "postgres", "15.3", 1000000]
GREETING = json.dumps([[FACTS, []], []]).encode()


class Process:
    """What the addon has in a listening process, with another way to connect. ``directs``: how often it connected."""

    def __init__(self, direct, listen, parameters, channels, evented=False, share=True):
        self.directs, self.events, self.feed = 0, Events(), FakeFeed(*channels)
        self._direct = direct
        self.sharing = Sharing(self._connect, parameters, share, evented)
        ways = {"connect": self.sharing.connect, "at_end": self.sharing.close}
        self.listener = listen(self.feed, journal=self.events, **ways)

    def _connect(self, unproven):
        self.directs += 1
        return self._direct()

    @property
    def session(self):
        return self.listener.session

    @property
    def is_follower(self):
        session = self.session
        return session is not None and session.leader_pid is not None

    @property
    def in_force(self):
        """Whether LISTEN is in force on all that its feed wants."""
        return self.listener.wait_for_listen(self.feed, 0)

    def moves(self):
        """Do as a supervisor does after a check; return whether that makes the listener move."""
        session = self.session
        self.listener.confirm(session, frozenset(self.listener.in_force[1]), 0.001)
        found = self.sharing.better(session)
        if found:
            self.listener.replace(session, MOVED, "there is a better one")
        return found


@pytest.fixture(autouse=True)
def short_greeting(monkeypatch):
    monkeypatch.setattr(sharing, "GREETING_TIMEOUT", 0.4)


@pytest.fixture
def parameters():
    """What all processes of a test connect with, and nobody else."""
    return {"host": "db-01", "user": "odoo", "dbname": "postgres", "password": "s3cret", "options": uuid.uuid4().hex}


@pytest.fixture
def process(fake, listen, parameters):
    """Return a function that starts a `Process`, and waits until it listens."""

    def process(*channels, direct=fake.connect, waits=True, **more):
        started = Process(direct, listen, lambda: parameters, channels or ["imbus"], **more)
        if waits:
            expect(lambda: started.in_force)
        return started

    return process


@pytest.fixture
def leader(process):
    return process()


@pytest.fixture
def follower(leader, process):
    follower = process("imbus", "cron_trigger")
    assert follower.is_follower
    return follower


@pytest.fixture
def name(parameters):
    """Return a function that returns the name of the leader at a rank."""
    return Sharing(None, lambda: parameters, True, False)._names().__getitem__


@pytest.fixture
def opened():
    """Return a function that makes a Unix socket."""
    with contextlib.ExitStack() as stack:

        def opened():
            made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            made.settimeout(5)
            return made

        yield opened


@pytest.fixture
def bind(opened, name):
    """Return a function that binds the name of a rank, as a leader that does not answer; it returns the socket."""

    def bind(rank=PLAIN):
        server = opened()
        server.bind(name(rank))
        server.listen(16)
        return server

    return bind


@pytest.fixture
def serve(bind):
    """Return a function that starts a leader which greets each process with the next of ``greetings``.

    Then it says ``answer(channels)`` whenever it was asked, and hangs up if that is None.
    """
    threads = []

    def serve(*greetings, answer=lambda names: None):
        server = bind()

        def run():
            for greeting in greetings:
                with server.accept()[0] as connected, contextlib.suppress(ConnectionError):
                    said = greeting
                    while said is not None:
                        connected.send(said)
                        asked = connected.recv(1 << 20)
                        said = answer(json.loads(asked)) if asked else None

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    yield serve
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
def client(opened, name):
    """Return a function that connects to the leader and says ``messages``."""

    def client(*messages):
        connected = opened()
        connected.connect(name(PLAIN))
        # The leader may have hung up.
        with contextlib.suppress(ConnectionError):
            for message in messages:
                connected.send(message)
        return connected

    return client


def hangs_up(client):
    """Wait until the leader hangs up; return what it said before."""
    said = []
    with contextlib.suppress(ConnectionError):
        said.extend(iter(lambda: client.recv(1 << 20), b""))
    return said


def settled(*processes):
    """Wait until all listen; return those with a connection of their own."""
    expect(lambda: all(each.in_force for each in processes))
    return [each for each in processes if not each.is_follower]


def hear(fake, *processes):
    """See that each hears what is sent, once."""
    settled(*processes)
    for each in processes:
        each.feed.all()
    token = '["%s"]' % uuid.uuid4().hex
    fake.notify("imbus", token)
    assert [each.feed.get() for each in processes] == [("imbus", token)] * len(processes)
    assert [each.feed.all() for each in processes] == [[]] * len(processes)


# One connection for all -----------------------------------------------------------------------------------------------


def test_followers_receive_what_they_listen_on_in_order_and_once_through_one_connection(fake, process, leader):
    bus, cron = process(), process("cron_trigger")
    assert (fake.connects, leader.directs, bus.directs, cron.directs) == (1, 1, 0, 0)
    assert bus.session.facts == leader.session.facts._replace(address="process %d at db-01:5432" % os.getpid())
    checks = {each.session.check_channel for each in (leader, bus, cron)}
    assert leader.session.channels == {"imbus", "cron_trigger", HEARTBEAT_CHANNEL, *checks}
    # What only a follower wants is no concern of the leader's supervisor.
    assert set(leader.listener.in_force[1]) == {"imbus"}
    for number in range(200):
        fake.notify("imbus", '["%d"]' % number)
        fake.notify("cron_trigger", "db%d" % number)
    expect(lambda: bus.feed.arrived.qsize() >= 200 and cron.feed.arrived.qsize() >= 200)
    assert bus.feed.all() == leader.feed.all() == [("imbus", '["%d"]' % number) for number in range(200)]
    assert cron.feed.all() == [("cron_trigger", "db%d" % number) for number in range(200)]


def test_no_message_is_larger_than_a_socket_takes():
    sent = []
    payloads = ["x" * size for size in [10] * 10000 + [7900] * 50]
    sharing.Follower(SimpleNamespace(send=sent.append)).put([Notify(7, "imbus", payload) for payload in payloads])
    # Linux grants this by default.
    assert max(len(message) for message in sent) < 208 * 1024
    assert [payload for message in sent for _pid, _channel, payload in json.loads(message)[1]] == payloads


def test_a_follower_that_does_not_read_is_dropped_keeps_nobody_waiting_and_comes_back(fake, process, leader, follower):
    stuck, go_on = process(), threading.Event()
    put, session = stuck.feed.put, stuck.session
    stuck.feed.put = lambda notifications: go_on.wait(10) and put(notifications)
    longest = 0.0
    while session.check_channel in leader.session.channels:
        began = time.monotonic()
        fake.notify("imbus", '["%s"]' % ("a" * 7000))
        assert leader.feed.get() and follower.feed.get()
        longest = max(longest, time.monotonic() - began)
    assert longest < 1
    go_on.set()
    assert stuck.events.expect(MOVED).session is session
    connected(stuck.listener, session)
    assert settled(leader, follower, stuck) == [leader] and fake.connects == 1
    expect(lambda: stuck.feed.arrived.qsize() > 0)
    fake.settle()
    hear(fake, leader, follower, stuck)


def test_a_follower_changes_its_channels_and_the_leader_listens_on_no_others(fake, leader, follower):
    (session,) = fake.sessions
    longest = "\u00e9" * 31 + "a"
    for channel in ("more", longest):
        follower.listener.listen(follower.feed, frozenset([channel]))
        # In force means: what is sent from now on arrives.
        assert follower.listener.wait_for_listen(follower.feed, 5)
        fake.notify(channel, "x")
        assert follower.feed.get() == (channel, "x")
    own = {"imbus", HEARTBEAT_CHANNEL, session.check_channel}
    expect(lambda: session.channels == own | {longest, follower.session.check_channel})
    follower.listener.close()
    expect(lambda: session.channels == own)
    hear(fake, leader)


def test_all_move_to_the_first_gevent_process(fake, process, leader, follower):
    assert not follower.moves()
    evented = process(evented=True)
    assert leader.moves() and follower.moves()
    expect(lambda: settled(leader, follower, evented) == [evented])
    hear(fake, evented, leader, follower)


def test_each_request_for_channels_is_answered_even_if_it_changes_nothing(leader, client):
    """A follower that gives up a channel and wants it again at once waits for the answer to the second request."""
    connected = client()
    for _request in range(2):
        connected.send(b'["imbus"]')
        expect(lambda: "imbus" in str(json.loads(connected.recv(1 << 20))[0]))


# Outages --------------------------------------------------------------------------------------------------------------


def test_followers_of_a_leader_that_moves_are_free_at_once(fake, process, leader, follower):
    """Though the better leader has just lost its connection, so that theirs waits for it."""
    evented = process(evented=True)
    fake.refuse()
    fake.sessions[-1].lose()
    evented.events.expect(LOST)
    leader.listener.replace(leader.session, MOVED, "there is a better one")
    assert "is gone" in follower.events.expect(MOVED).reason


def test_a_leader_that_closes_drops_its_followers_though_its_thread_is_busy(leader, follower, client, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(sharing.Leader, "_accept", lambda *_args: go_on.wait(20))
    client()
    leader.sharing.close()
    assert "is gone" in follower.events.expect(MOVED).reason
    go_on.set()


# Leaders that are of no use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent_ago, read_ago, unheard", [(2, 1, True), (1, 2, False), (6, 4, False)])
def test_a_leader_that_stands_still_is_not_blamed_for_its_connection(serve, name, sent_ago, read_ago, unheard):
    serve(GREETING)
    with contextlib.closing(FollowerSession(name(PLAIN), PLAIN, 1.0)) as session:
        now = time.monotonic()
        session._read_at = now - read_ago
        finish(session.explaining(None, now - sent_ago, False))
        assert (session.unheard, session.silent) == (unheard, not unheard)


@pytest.mark.parametrize("overslept, more", [(0.0, sharing.LAST_MOMENT), (1.0, sharing.LONGEST_BEAT)])
def test_a_follower_gives_a_silent_leader_more_time_if_it_overslept_itself(serve, name, monkeypatch, overslept, more):
    now = [1000.0]
    monkeypatch.setattr(sharing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    serve(GREETING)
    with contextlib.closing(FollowerSession(name(PLAIN), PLAIN, 1.0)) as session:
        session._socket.setblocking(False)
        now[0] += sharing.SILENCE + overslept
        assert session.receive() == [] and session.seconds_until_silent() == pytest.approx(more)


def test_what_a_follower_listens_on_is_in_force_when_the_leader_says_so_again(serve, name, monkeypatch):
    monkeypatch.setattr(sharing, "SILENCE", 0.3)
    answers = iter([json.dumps([[FACTS, ["a", "b"]], []]).encode(), HEARTBEAT, HEARTBEAT])
    serve(GREETING, answer=lambda names: next(answers))
    with contextlib.closing(FollowerSession(name(PLAIN), PLAIN, 1.0)) as session:
        session.listen(frozenset(["a", "b"]), None)
        session.listen(frozenset(["a"]), None)
        with pytest.raises(Moved, match="does not answer"):
            session.listen(frozenset(["a", "b"]), None)
        assert session.silent and session.fault[0] == MOVED


def test_a_leader_that_talks_nonsense_is_not_followed(fake, process, serve, name):
    said = [each for each in NONSENSE if each]
    said += [b'"ab"', b'["ab", []]', b"[[5], []]", b"[[null], []]", b"[[null, 5], []]", b"[[[1, 2], []], []]"]
    said += [b"[[[], [[]]], []]", b"[null, 5]", b"[null, [5]]", b'[null, [[1, "a", "b", "c"]]]', b"[1, 2, 3]"]
    said.append(json.dumps([[FACTS, [[]]], []]).encode())
    # The last one hangs up when it is asked for something.
    serve(*said, GREETING)
    for _ in said:
        with pytest.raises(Moved, match="is gone"):
            FollowerSession(name(PLAIN), PLAIN, 1.0)
    process_beside_it = process()
    assert not process_beside_it.is_follower
    hear(fake, process_beside_it)


@pytest.mark.parametrize(
    "silent, avoided, confirmed, seconds",
    [
        (True, 7, (None, None), (30, 30)),
        # It may be connected to another server.
        (False, "its session", ("before", None, None, "before", None), (30, 30, 3600, 30, 30)),
    ],
)
def test_a_leader_that_was_of_no_use_is_avoided_for_a_while(monkeypatch, silent, avoided, confirmed, seconds):
    now = [1000.0]
    monkeypatch.setattr(sharing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shared = Sharing(None, dict, False, False)
    last = SimpleNamespace(leader_pid=7, silent=silent, unheard=not silent, identity=lambda: "its session")
    for last.confirmed, each in zip(confirmed, seconds):
        shared._learn_from(last, now[0])
        now[0] += each - 1
        assert shared._to_avoid() == {avoided}
        now[0] += 2
        assert shared._to_avoid() == set()


def test_a_leader_to_avoid_is_not_followed(leader, name):
    with pytest.raises(Moved, match="not following process"):
        FollowerSession(name(PLAIN), PLAIN, 1.0, {os.getpid()})


# What comes to a leader -----------------------------------------------------------------------------------------------


def test_nonsense_costs_only_its_sender(fake, leader, follower, client, logged):
    sessions = leader.session, follower.session
    for said in NONSENSE:
        hangs_up(client(said))
    # Also what comes later, from a process that was a follower before.
    stranger = client(b'["more"]')
    expect(lambda: "more" in leader.session.channels)
    stranger.send(b"null")
    hangs_up(stranger)
    expect(lambda: "more" not in leader.session.channels)
    # PostgreSQL does not take these names.
    names = ["more", 5, None, ["imbus"], "", "a" * 64, "\u00e9" * 32, "a\0b", "\ud800", float("nan")]
    client(json.dumps(names).encode())
    expect(lambda: "more" in leader.session.channels)
    assert not leader.session.channels & {"", "a" * 64, "\u00e9" * 32, "a\0b", "\ud800"}
    hear(fake, leader, follower)
    assert (leader.session, follower.session) == sessions and not logged("internal error")


def test_a_process_that_comes_as_the_leader_ends_is_sent_away(leader, client):
    leader.listener.add = lambda follower: False
    assert hangs_up(client()) == [b"[[null, []], []]"]


@pytest.mark.parametrize("what", ["uid", "pid 0", "pid namespace", "user namespace", "unknown namespace"])
def test_a_process_of_another_user_or_container_is_neither_served_nor_followed(
    process, client, bind, monkeypatch, what
):
    """With a shared network namespace, the same uid proves nothing."""
    leader, server, uid, namespaces = process(), bind(EVENTED), os.geteuid(), sharing._namespaces

    def of_another_container(pid="self"):
        if pid != "self" and what == "unknown namespace":
            raise FileNotFoundError
        found = namespaces()
        if pid != "self" and "namespace" in what:
            found[what == "user namespace"] += 1
        return found

    peer = (0 if what == "pid 0" else os.getpid(), uid + (what == "uid"), os.getegid())
    monkeypatch.setattr(sharing.struct, "unpack", lambda *_args: peer)
    monkeypatch.setattr(sharing, "_namespaces", of_another_container)
    assert hangs_up(client(b'["more"]')) == []
    assert leader.session.channels == {"imbus", HEARTBEAT_CHANNEL, leader.session.check_channel}
    other = process()
    assert not other.is_follower
    with server.accept()[0] as connected:
        assert connected.recv(1 << 20) == b""


def test_a_socket_is_not_closed_while_another_thread_sends():
    """Its number may belong to another file by the time of the system call."""
    locked = []

    def note(*_args):
        locked.append(follower._lock.locked())

    follower = sharing.Follower(SimpleNamespace(send=note, close=note))
    follower.beat()
    follower.close()
    assert locked == [True, True]


def test_a_process_that_can_not_lead_for_want_of_resources_listens_and_leads_later(fake, process, monkeypatch):
    def start(_target, _name):
        raise RuntimeError("no new thread")

    with monkeypatch.context() as patch:
        patch.setattr(sharing.threads, "start", start)
        alone = process()
    before = alone.session
    assert alone.moves()
    connected(alone.listener, before)
    assert process().is_follower and fake.connects == 2


# Who shares with whom -------------------------------------------------------------------------------------------------


def _name_with(**changed):
    own = {"host": "db-01", "port": 5432, "user": "odoo", "dbname": "postgres", "sslmode": "prefer"}
    return Sharing(None, lambda: {**own, **changed}, True, False)._names()[PLAIN]


def test_a_process_that_differs_in_parameters_environment_code_user_or_namespaces_is_a_stranger(monkeypatch):
    other = {"host": "db-02", "port": 5433, "user": "x", "dbname": "x", "sslmode": "require", "options": "\udcff"}
    names = [_name_with()] + [_name_with(**{key: value}) for key, value in other.items()]
    different = [(os, "geteuid", lambda: -1), (sharing, "_CODE", b"other")]
    for found in ([1, 2], [1, 3], [2, 2]):
        different.append((sharing, "_namespaces", lambda pid="self", found=found: found))
    for place, attribute, value in different:
        with monkeypatch.context() as patch:
            patch.setattr(place, attribute, value)
            names.append(_name_with())
    for variable in ("PGHOST", "PGSERVICEFILE", "PGOPTIONS", "PGTZ"):
        for value in ("x", "\udcff"):
            monkeypatch.setenv(variable, value)
            names.append(_name_with())
    assert len(set(names)) == len(names)
    for module in (sharing, listener_module, log):
        with open(module.__file__, "rb") as file:
            assert file.read() in sharing._CODE


def test_the_name_depends_on_no_secret_and_tells_no_parameter(monkeypatch):
    """Anybody can see the names, and could try passwords until the name is the same."""
    names = {_name_with(), _name_with(application_name="odoo-listener-1")}
    for secret in ("one", "two"):
        for variable in ("PGPASSWORD", "PGAPPNAME"):
            monkeypatch.setenv(variable, secret)
        names.update(_name_with(**{keyword: secret}) for keyword in log.SECRETS)
    (found,) = names
    prefix, digest, rank = found.split("/")
    assert (prefix, len(digest), rank) == ("\0bus_alt_connection", 32, "plain") and int(digest, 16)


@pytest.mark.parametrize("how", ["off", "impossible"])
def test_without_sharing_each_process_connects_by_itself(fake, process, monkeypatch, how):
    def unreadable(_path):
        raise OSError

    if how == "impossible":
        monkeypatch.setattr(sharing.os, "stat", unreadable)
    processes = [process(share=how != "off", evented=evented) for evented in (False, True)]
    hear(fake, *processes)
    assert not any(each.moves() for each in processes)
    assert fake.connects == 2

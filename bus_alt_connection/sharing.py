# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Share one direct connection among all listening processes of a machine.

Each listening backend takes one of PostgreSQL's connections, and before PostgreSQL 19 each
NOTIFY wakes every backend that listens in the database. So among the processes with the same
user, namespaces, connection parameters, database and version of this code, one connects: the
*leader*. The others, its *followers*, receive their notifications through it.

Leader and followers meet at a Unix socket in Linux's abstract namespace. Only one process can
bind a name, and the name disappears with that process. So the process that binds it leads, and
nothing has to be negotiated or cleaned up. There are several names, see `_RANKS`. A process tries
them from the best to the worst: if it can't use the leader at one name, it tries the next.

- A follower receives all notifications on its channels once `FollowerSession.listen` has returned, as on any session.
- A leader sends a heartbeat every `HEARTBEAT` seconds. A follower that reads nothing for about
  `SILENCE` seconds leaves. While the leader has no connection, its followers wait for half a minute to a
  minute before they look for another connection.
- A leader never waits for a follower: it drops a follower whose socket is full. The dropped process
  joins again, and catches up with what it missed.
- Neither side talks to a process of another user or of other namespaces, see `_peer`.

The messages are JSON. A follower sends the list of all channels that it wants. Each
message of a leader is a pair: its state (null if unchanged), and a list of notifications. The
state is a pair too: the `connection.Facts` on its session (null while it has none), and those
channels of the follower that are in force.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import random
import selectors
import socket
import struct
import threading
import time

import psycopg2
from psycopg2.extensions import Notify

from . import threads
from .connection import Facts
from .forks import close_in_children
from .listener import LONGEST_DELAY, Moved, Session
from .log import LOST, MOVED, SECRETS, log_bug

_logger = logging.getLogger(__name__)

# Seconds for a leader to accept a connection and send its first message.
GREETING_TIMEOUT = 0.9
# Seconds between two messages of a leader, and seconds of silence after which a follower gives it a last chance. The
# difference allows for a busy machine that runs a thread late.
HEARTBEAT, SILENCE = 2.0, 4.5
# Seconds: the longest gap between two messages as long as the leader is on time.
LONGEST_BEAT = HEARTBEAT + 0.5
# Extra seconds for a silent leader, since its message may have arrived while this process was itself late.
LAST_MOMENT = 0.3
# AVOID_SILENT: seconds for which a process avoids a leader that was silent, or a session that did not deliver a token.
# AVOID_UNHEARD: seconds for which it avoids such a session if, for the second time, not even the first token arrived.
AVOID_UNHEARD, AVOID_SILENT = 3600.0, 30.0
# The ranks of leaders, the best first: a gevent process runs only its event loop, while the jobs of other processes
# may hold the interpreter for seconds. The "-2" names are for processes to which the leader at the first name of
# the kind is of no use.
_RANKS = ("evented", "evented-2", "plain", "plain-2")
# In bytes: the largest message that is read, and roughly the largest that is sent with more than one notification. A
# socket refuses a message that is larger than its buffer, which Linux limits to 208 kB by default.
_LONGEST_MESSAGE, _BATCH = 1 << 20, 1 << 16
# The addon's code identifies its version. Read it now: an update may replace the files of a running process.
_CODE = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))


def possible():
    """Return whether processes can share a connection on this system. This needs Linux with /proc."""
    try:
        return hasattr(socket, "SO_PEERCRED") and bool(_namespaces())
    except OSError:
        return False


class Sharing(object):
    """Finds the session of a listener: that of a leader, or a connection of this process.

    ``direct(unproven)`` returns a `listener.DirectSession`, and tries the addresses in the list
    ``unproven`` last. ``parameters()`` returns the libpq keywords of such a session. ``share``: whether
    to share at all; ``evented``: whether this is a gevent process.

    `connect` and `close` have to be called by the listener's thread; any thread may call `better`.
    """

    def __init__(self, direct, parameters, share, evented):
        self._direct = direct
        self._parameters = parameters
        own = (0, 1) if evented else (2, 3)
        #: the ranks at which this process may lead, and those at which it may follow
        self._own_ranks = own if share else ()
        self._reach = range(own[-1] + 1) if self._own_ranks else range(0)
        self._leader = None
        self._last = None
        #: pid of a leader, or identity of its session -> monotonic seconds until which to avoid it
        self._avoided = {}
        #: identities of leaders' sessions that did not deliver the first token to this process
        self._unheard = set()
        #: addresses that led to a session on which no token arrived, the latest address last
        self._unproven = []

    def connect(self, listener):
        """Return a session for ``listener``; raise ``psycopg2.Error`` or ``OSError`` if there is none.

        It may make this process a leader, which serves the session of ``listener`` to followers.
        """
        last, self._last = self._last, None
        self._learn_from(last, time.monotonic())
        if last is not None and last.fault is not None and last.fault[0] == MOVED:
            # The followers find the better leader by themselves. If that leader has just lost its connection, this
            # process may wait up to a minute for it, unable to serve followers.
            self.close()
        self._last = self._join_leader(listener, self._names()) or self._direct(self._unproven)
        return self._last

    def better(self, session):
        """Return whether `connect` is likely to return a better session than ``session``.

        A better session is that of a better leader, or one with which this process becomes a leader. May take seconds.
        """
        leader = self._leader if session.leader_pid is None else session
        for rank, name in enumerate(self._names()):
            if leader is not None and leader.rank == rank:
                return False
            try:
                FollowerSession(name, rank, GREETING_TIMEOUT, self._to_avoid()).close()
                return True
            except ConnectionRefusedError:
                # No process leads at this rank.
                if leader is None and rank in self._own_ranks:
                    return True
            except (OSError, psycopg2.Error):
                continue
        return False

    def close(self):
        """Stop leading. All followers leave."""
        if self._leader is not None:
            self._leader.close()
            self._leader = None

    def _join_leader(self, listener, names):
        """Return the session of the best leader; None if there is none, or this process leads."""
        for rank, name in enumerate(names):
            own = rank in self._own_ranks
            # A leader that starts or ends holds its name for a moment without accepting followers.
            for _attempt in range(3 if own else 1):
                if own and self._lead(listener, rank, name):
                    return None
                try:
                    return self._follow(listener, rank, name)
                except _LeaderEnded:
                    raise
                except (ConnectionRefusedError, Moved):
                    time.sleep(0.05 if own else 0)
                except (OSError, psycopg2.Error):
                    # This leader does not answer, or has had no connection for long.
                    break
        return None

    def _follow(self, listener, rank, name):
        """Stop leading and return a `FollowerSession`. Raises the exceptions of that class, or `_LeaderEnded`."""
        began = time.monotonic()
        # If a leader has no connection, all its followers wait for it to get one. The time is random, so that they do
        # not all give up at once.
        patience = LONGEST_DELAY * random.uniform(6, 12)
        try:
            session = FollowerSession(name, rank, patience, self._to_avoid(), listener.has_ended)
        except Moved as error:
            if GREETING_TIMEOUT < time.monotonic() - began < patience:
                raise _LeaderEnded(str(error)) from None
            raise
        self.close()
        return session

    def _lead(self, listener, rank, name):
        """Become a leader at ``rank``, unless this process leads already; return whether it leads there now."""
        if self._leader is not None:
            return self._leader.rank == rank
        try:
            self._leader = Leader(listener, name, rank)
        except (OSError, RuntimeError):
            # The name is taken, or there is no descriptor or thread left.
            return False
        return True

    def _to_avoid(self):
        """Return the pids of leaders, and the identities of sessions, to avoid now."""
        now = time.monotonic()
        return {leader for leader, until in list(self._avoided.items()) if until > now}

    def _learn_from(self, session, now):
        """Remember what the last session has shown about its leader or its address."""
        if session is None:
            return
        if session.leader_pid is not None:
            self._learn_from_leader(session, now)
            return
        if session.place in self._unproven:
            self._unproven.remove(session.place)
        if session.confirmed is None:
            self._unproven.append(session.place)

    def _learn_from_leader(self, session, now):
        identity = session.identity()
        if session.confirmed is not None:
            self._unheard.discard(identity)
        if session.silent:
            self._avoided[session.leader_pid] = now + AVOID_SILENT
        elif session.unheard:
            # Its path may be slow just now, so give it a second chance. A session that never delivers may be connected
            # to another server.
            self._avoided[identity] = now + (AVOID_UNHEARD if identity in self._unheard else AVOID_SILENT)
            if session.confirmed is None:
                self._unheard.add(identity)

    def _names(self):
        """Return the names of the leaders that this process may follow or be, the best rank first.

        Raises ``psycopg2.OperationalError`` if an option is wrong, so that no listener may connect.
        """
        if not self._reach or not possible():
            return []
        own, env = self._parameters(), os.environ
        # Leave secrets out of the name: every user can see it, and could guess a password by computing the hash. A
        # process with a wrong password may share as well, since it runs as the same user and could read the right one.
        alike = [(key, str(own[key])) for key in sorted(own) if key not in SECRETS + ("application_name",)]
        alike += [(key, env[key]) for key in sorted(env) if key[:2] == "PG" and key not in ("PGPASSWORD", "PGAPPNAME")]
        identity = ascii([os.geteuid(), _namespaces(), alike]).encode()
        digest = hashlib.sha256(_CODE + identity).hexdigest()[:32]
        return ["\0bus_alt_connection/%s/%s" % (digest, _RANKS[rank]) for rank in self._reach]


class _LeaderEnded(Moved):
    """Waiting for a leader's connection was in vain, usually because the leader ended.

    It may have found a better leader, so start again with the best rank.
    """


class FollowerSession(Session):
    """The session of a leader, as a follower sees it. The methods do what those of `DirectSession` do.

    ``patience``: the seconds to wait for a leader without a connection; ``avoided``: the pids of
    leaders, and the `identity` of sessions, not to follow; ``give_up()``: whether to wait no longer.
    Raises ``ConnectionRefusedError`` if no process leads at ``name``, else ``OSError`` or `Moved` if
    this leader is of no use.
    """

    #: whether this leader sent nothing for too long, or did not answer
    silent = False
    #: whether a token did not arrive through this session
    unheard = False

    def __init__(self, name, rank, patience, avoided=(), give_up=lambda: False):
        self.rank = rank
        self._in_force = frozenset()
        self._arrived = []
        with _closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as self._socket:
            close_in_children(self._socket)
            self.fileno = self._socket.fileno
            self.close = self._socket.close
            self._socket.settimeout(GREETING_TIMEOUT)
            self._socket.connect(name)
            self.leader_pid = _peer(self._socket)
            if self.leader_pid in avoided:
                raise Moved("not following process %d for now" % self.leader_pid)
            self._leader = "process %d" % self.leader_pid
            self._read()
            deadline = time.monotonic() + patience
            self._wait_until(lambda: self.facts is not None or give_up(), deadline)
            if self.facts is None:
                raise Moved(self._leader + " has no connection")
            if self.identity() in avoided:
                raise Moved(self._leader + " has a connection through which nothing arrives")

    def identity(self):
        """Return a value that is unique among the sessions of all leaders."""
        return self.leader_pid, self.facts.backend_pid, self.facts.started

    def listen(self, channels, warn):
        # Channels that this session did not want for a while may no longer be in force at the leader.
        self._in_force &= self.channels
        valid = {name for name in channels if _is_channel(name)}
        try:
            self._socket.settimeout(GREETING_TIMEOUT)
            self._socket.send(json.dumps(sorted(valid)).encode())
            self._wait_until(lambda: valid <= self._in_force, time.monotonic() + SILENCE)
        except OSError:
            self.silent = True
            self.fault = MOVED, self._leader + ", through which it listened, does not answer"
            raise Moved(self.fault[1]) from None
        self._socket.setblocking(False)
        self.channels = channels

    def receive(self):
        """Return the notifications that have arrived, without waiting for any."""
        with contextlib.suppress(BlockingIOError):
            while not self._arrived:
                self._read()
        if time.monotonic() >= self._silent_at:
            self._expect_another_heartbeat()
        arrived, self._arrived = self._arrived, []
        return arrived

    def seconds_until_silent(self):
        return max(self._silent_at - time.monotonic(), 0.0)

    def _expect_another_heartbeat(self):
        """Give a silent leader one more moment; if it stays silent, raise ``psycopg2.OperationalError``.

        If this process itself ran late, the machine may be busy, or may have been suspended. In that case the leader
        gets the time for one more heartbeat.
        """
        now = time.monotonic()
        if self._waits_longer:
            self.silent = True
            text = "%s, through which it listened, has been silent for %.1f s"
            raise psycopg2.OperationalError(text % (self._leader, now - self._read_at))
        self._waits_longer = True
        overslept = now - self._silent_at > 0.5
        self._silent_at = now + (LONGEST_BEAT if overslept else LAST_MOMENT)

    def explaining(self, examining_sender, sent_at, leaked):
        yield from ()
        # If the leader is stuck, its connection may still be good, so do not count this against the connection.
        if self._read_at > max(sent_at, time.monotonic() - LONGEST_BEAT):
            self.unheard = True
        else:
            self.silent = True
        return LOST, "%s, through which it listened, did not deliver what was sent" % self._leader

    def _wait_until(self, condition, deadline):
        """Read until ``condition()`` is true; raise ``OSError`` at ``deadline``, or if the leader is silent."""
        while not condition():
            left = min(deadline - time.monotonic(), SILENCE)
            if left <= 0:
                raise socket.timeout("timed out")
            self._socket.settimeout(left)
            self._read()

    def _read(self):
        """Read one message."""
        try:
            state, notifications = json.loads(self._socket.recv(_LONGEST_MESSAGE).decode())
            self._arrived += [Notify(*each) for each in notifications]
            if state:
                facts = Facts(*state[0]) if state[0] else None
                in_force = frozenset(state[1])
        except (ConnectionError, ValueError, TypeError, LookupError, RecursionError):
            raise Moved(self._leader + ", through which it listened, is gone") from None
        self._read_at = time.monotonic()
        self._silent_at = self._read_at + SILENCE
        self._waits_longer = False
        if state:
            if facts is not None:
                facts = facts._replace(address="%s at %s" % (self._leader, facts.address))
            if self.facts not in (None, facts):
                raise psycopg2.OperationalError(self._leader + ", through which it listened, has lost its connection")
            self.facts = facts
            self._in_force = in_force


class Follower(object):
    """A process that follows this one: a feed of the leader's listener.

    Any thread may call its methods.
    """

    #: a follower does not keep the listener alive
    local = False

    def __init__(self, connected):
        self.channels = frozenset()
        self.socket = connected
        self._state = None
        # A file that is opened may get the number of a socket that was just closed. So the socket is never closed
        # while another thread sends.
        self._lock = threading.Lock()

    def put(self, notifications):
        """Send ``notifications``. Return 0: each follower counts what it drops."""
        texts = [_text(each) for each in notifications]
        while texts:
            size, count = 0, 0
            while count < len(texts) and (count == 0 or size + len(texts[count]) <= _BATCH):
                size += len(texts[count])
                count += 1
            self._send("[null, [%s]]" % ", ".join(texts[:count]))
            del texts[:count]
        return 0

    def answer(self):
        """Have the next `tell` send the leader's state even if it is unchanged: the follower waits for it."""
        self._state = None

    def tell(self, facts, numbers):
        """Send the leader's state, unless it is unchanged."""
        state = [facts, sorted(numbers)]
        if state != self._state:
            self._state = state
            self._send(json.dumps([state, []]))

    def beat(self):
        """Send a heartbeat."""
        self._send("[null, []]")

    def drop(self):
        """Hang up. The follower notices it at once."""
        with self._lock, contextlib.suppress(OSError):
            # A forked child may hold a copy of the socket, so closing it would not be enough.
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Close the socket."""
        with self._lock:
            self.socket.close()

    def _send(self, text):
        try:
            with self._lock:
                self.socket.send(text.encode())
        except OSError:
            # The follower is gone, or does not read.
            self.drop()


class Leader(object):
    """Accepts followers for ``listener`` at ``name``, in a thread of its own, until it is closed.

    Raises ``OSError`` if the name is taken or no descriptor is left, ``RuntimeError`` if no thread can be started.
    """

    def __init__(self, listener, name, rank):
        self.rank = rank
        self._listener = listener
        self._closed = False
        #: connected socket -> its `Follower`
        self._followers = {}
        with _closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as self._server:
            close_in_children(self._server)
            self._server.bind(name)
            self._server.listen(128)
            with _closed_on_error(selectors.DefaultSelector()) as selector:
                selector.register(self._server, selectors.EVENT_READ)
                threads.start(functools.partial(self._run, selector), "%s.%s" % (__name__, listener.database))

    def close(self):
        """Drop all followers, and accept no more. Returns at once. Any thread may call it."""
        self._closed = True
        # This wakes up the thread, which closes the sockets.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        # Do this here, not in the thread: the listener may be about to tell the followers about another session.
        for follower in list(self._followers.values()):
            follower.drop()

    def _run(self, selector):
        heartbeat_due = 0.0
        with self._server, selector:
            while not self._closed:
                try:
                    wait = max(heartbeat_due - time.monotonic(), 0.0) if self._followers else None
                    for key, _events in selector.select(wait):
                        if key.fileobj is self._server:
                            self._accept(selector)
                        else:
                            self._read(selector, key.fileobj)
                    if time.monotonic() >= heartbeat_due:
                        heartbeat_due = time.monotonic() + HEARTBEAT
                        for follower in self._followers.values():
                            follower.beat()
                except Exception as error:
                    self._listener.journal.add(log_bug, _logger, error)
            for connected in list(self._followers):
                self._followers[connected].drop()
                self._remove(selector, connected)

    def _accept(self, selector):
        try:
            with _closed_on_error(self._server.accept()[0]) as connected:
                _peer(connected)
                close_in_children(connected)
                connected.setblocking(False)
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_MESSAGE)
                selector.register(connected, selectors.EVENT_READ)
        except PermissionError:
            return
        except OSError:
            # Usually no descriptor is left. The other process waits in vain for a message, and then tries another name.
            time.sleep(0 if self._closed else 0.5)
            return
        follower = self._followers[connected] = Follower(connected)
        # The listener sends the state later. The other process waits only `GREETING_TIMEOUT` for a first message.
        follower.tell(None, {})
        if not self._listener.add(follower):
            self._remove(selector, connected)

    def _read(self, selector, connected):
        """Read the channels that a follower wants; remove a follower that is gone or sent something else."""
        try:
            names = json.loads(connected.recv(_LONGEST_MESSAGE).decode())
            if not isinstance(names, list):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            self._remove(selector, connected)
            return
        # A name that PostgreSQL refuses must not cost the other followers their session.
        valid = frozenset(name for name in names if _is_channel(name))
        self._followers[connected].answer()
        self._listener.listen(self._followers[connected], valid)

    def _remove(self, selector, connected):
        follower = self._followers.pop(connected)
        selector.unregister(connected)
        self._listener.remove(follower)
        follower.close()


def _is_channel(name):
    try:
        return isinstance(name, str) and 0 < len(name.encode()) < 64 and "\0" not in name
    except UnicodeError:
        return False


# Cached, since all followers on a channel get the same text.
@functools.lru_cache(maxsize=64)
def _text(notification):
    return json.dumps([notification.pid, notification.channel, notification.payload])


def _peer(connected):
    """Return the pid of the process at the other end; raise ``PermissionError`` if it must not be trusted.

    Containers with a shared network namespace can reach each other, and the same uid may be a different
    user there. So both processes have to be in the same namespaces. Linux reports pid 0 for a process
    outside the pid namespace of this one.
    """
    pid, uid, _gid = struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid() or pid <= 0 or _namespaces(pid) != _namespaces():
        raise PermissionError("process %d belongs to another user or container" % pid)
    return pid


def _namespaces(pid="self"):
    """Return the inodes of the pid and user namespaces of a process; raise ``OSError`` if they can't be read.

    The mount namespace does not count: systemd's PrivateTmp gives each service its own, but services should share.
    """
    return [os.stat("/proc/%s/ns/%s" % (pid, name)).st_ino for name in ("pid", "user")]


@contextlib.contextmanager
def _closed_on_error(resource):
    try:
        yield resource
    except Exception:
        resource.close()
        raise

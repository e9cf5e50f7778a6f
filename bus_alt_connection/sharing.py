# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""One direct connection for all processes of a machine that would listen alike.

Every backend that listens takes a connection, and before PostgreSQL 19 each NOTIFY wakes
all that listen in its database. So of the listeners with one user, one set of parameters,
one database and one version of this code a single one connects, the *host*. The others,
its *guests*, hear through it, by a Unix socket in Linux's abstract namespace. Its name
can be bound but once and is gone with its process, so whoever binds it is the host:
nobody has to agree, or to clear away.

- A guest hears what it has asked for once `GuestSession.listen` has returned, like any session.
- A guest relies on its host as long as that answers: after an outage of up to half a minute
  the host alone connects. If it does not answer, the guest connects by itself, and looks
  again at its next check.
- A guest that does not read keeps nobody waiting: it is let go, comes back, and looks up
  what it has missed.

What passes is JSON: of a guest, all channels that it wants; of the host, pairs: its state,
if that has changed, and notifications. The state is the `connection.Facts` on its session,
null while there is none, and those of the guest's channels that are in force.
"""

import contextlib
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

from .connection import Facts
from .listener import LONGEST_DELAY, Moved, Session
from .log import MOVED, SECRETS, log_bug

_logger = logging.getLogger(__name__)

#: whether this system can do it
POSSIBLE = hasattr(socket, "SO_PEERCRED")
# Seconds that a host may take to answer. With it a guest that was deaf is back within its check interval.
PATIENCE = 0.9
# The better first: no job keeps the interpreter of a gevent process busy.
_KINDS = ("evented", "plain")
# Bytes, more than a message has; notifications in one.
_LONGEST, _BATCH = 1 << 20, 50
# Read when it is loaded: later there may be another version in its place.
_CODE = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))


class Sharing(object):
    """How a listener comes to its sessions: as a guest, or by itself, then as a host if it can be.

    ``direct()`` returns a session of its own; ``parameters()`` the libpq keywords that it
    would have; ``share``: whether to; ``evented``: whether this is a gevent process.
    ``listener`` is to be set.
    """

    def __init__(self, direct, parameters, share, evented):
        self.listener = None
        self._direct = direct
        self._parameters = parameters
        self._kind = -1 if not (share and POSSIBLE) else 0 if evented else 1
        self._host = self._guest = None
        self._lock = threading.Lock()

    def connect(self):
        """Return a session; raise ``psycopg2.Error`` or ``OSError`` if there is none to be had."""
        with self._lock:
            last = self._guest
            # Through whom nothing was heard at all is not asked twice running.
            deaf = last is not None and last.fault and last.confirmed is None
            # At random, or all would try by themselves at the same time.
            patience = LONGEST_DELAY * random.uniform(6, 12)
            self._guest = None if deaf else self._find(self._kind + (self._host is None), patience)
            return self._guest or self._direct()

    def better(self, session):
        """Return whether `connect` would now return a better one than ``session``. May take seconds."""
        # Not while that is about to, which may take longer.
        if not self._lock.acquire(False):
            return False
        try:
            alone = session.host_kind is None
            guest = self._find(self._kind + (self._host is None) if alone else session.host_kind, PATIENCE)
            if guest:
                guest.close()
            return guest is not None
        finally:
            self._lock.release()

    def _find(self, reach, patience):
        """Return a `GuestSession` with a host of the first so many kinds; None: there is none, or it is us.

        Raises `Moved` if the host has, while its session was waited for.
        """
        for kind in range(reach):
            name = self._name(_KINDS[kind])
            if kind == self._kind:
                # That is taken, or there are no descriptors or threads left.
                with contextlib.suppress(OSError, RuntimeError):
                    self._host = self.listener.relay = Host(self.listener, name)
                    if self.listener.closed:
                        # It has ended meanwhile, and would not any more.
                        self._host.close()
                    return None
            began = time.monotonic()
            try:
                try:
                    guest = GuestSession(name, kind, patience)
                except ConnectionRefusedError:
                    # A name is bound a moment before it can be reached.
                    time.sleep(0.05 if kind == self._kind else 0)
                    guest = GuestSession(name, kind, patience)
                if self._host:
                    self._host.close()
                    self._host = None
                return guest
            except Moved:
                # If at once, it is no host of ours.
                if time.monotonic() - began > PATIENCE:
                    raise
            except (OSError, psycopg2.Error):
                # There is none, or it does not answer, or it has no session itself.
                pass
        return None

    def _name(self, kind):
        own, env = self._parameters(), os.environ
        # No secrets, since anybody may read names, and guess; who has a wrong one is of the same user.
        alike = [(key, str(own[key])) for key in sorted(own) if key not in SECRETS + ("application_name",)]
        alike += [(key, env[key]) for key in sorted(env) if key[:2] == "PG" and key not in ("PGPASSWORD", "PGAPPNAME")]
        digest = hashlib.sha256(_CODE + ascii([os.geteuid(), alike]).encode()).hexdigest()[:32]
        return "\0bus_alt_connection/%s/%s" % (digest, kind)


class GuestSession(Session):
    """A session by way of that of the host at ``name``; `DirectSession` says what its methods do.

    Raises ``OSError`` or `Moved` if there is no host, it does not answer or is another
    user's, or it has had no session itself for ``patience`` seconds.
    """

    facts = None

    def __init__(self, name, kind, patience):
        self.host_kind = kind
        self._in_force, self._arrived = frozenset(), []
        with _closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as self._socket:
            self.fileno, self.close = self._socket.fileno, self._socket.close
            self._socket.settimeout(PATIENCE)
            self._socket.connect(name)
            self._host = "process %d" % _peer(self._socket)
            self._read()
            self._socket.settimeout(patience)
            while self.facts is None:
                self._read()

    def listen(self, channels):
        # The host may have dropped, since, what it had for us.
        self._in_force &= self.channels
        self._socket.settimeout(PATIENCE)
        try:
            self._socket.send(_message(*sorted(channels)))
            while not channels <= self._in_force:
                self._read()
        except OSError:
            self.fault = MOVED, self._host + ", through which it listened, does not answer"
            raise Moved(self.fault[1]) from None
        self._socket.setblocking(False)
        self.channels = channels

    def receive(self):
        with contextlib.suppress(BlockingIOError):
            self._read()
        arrived, self._arrived = self._arrived, []
        return arrived

    def _read(self):
        try:
            state, notifications = json.loads(self._socket.recv(_LONGEST).decode())
            self._arrived += [Notify(*one) for one in notifications]
            if state:
                facts, in_force = Facts(*state[0]) if state[0] else None, frozenset(state[1])
        except (ConnectionError, ValueError, TypeError, LookupError, RecursionError):
            raise Moved(self._host + ", through which it listened, is gone") from None
        if state:
            facts = facts and facts._replace(address="%s at %s" % (self._host, facts.address))
            if self.facts not in (None, facts):
                raise psycopg2.OperationalError(self._host + ", through which it listened, has lost its connection")
            self.facts, self._in_force = facts, in_force


class Host(object):
    """Hands on to guests, at ``name``, what ``listener`` receives.

    ``channels``: those of all guests. `put` and `inform` may be called by any thread.
    Raises ``OSError`` if the name is taken or there are no descriptors, ``RuntimeError`` if no threads.
    """

    def __init__(self, listener, name):
        self.channels = frozenset()
        self._listener = listener
        #: socket -> its channels; its state, as it was last told
        self._wanted, self._told = {}, {}
        self._ended = False
        self._lock = threading.Lock()
        with _closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as self._server:
            self._server.bind(name)
            self._server.listen(128)
            with _closed_on_error(selectors.DefaultSelector()) as selector:
                name = "%s.%s" % (__name__, listener.database)
                threading.Thread(target=self._run, args=[selector], name=name, daemon=True).start()

    def close(self):
        """Let all guests go, and have no more. Returns at once."""
        self._ended = True
        # A fork may have copies, for which closing is not enough; so before `_run` closes them.
        for one in list(self._wanted) + [self._server]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def put(self, notifications):
        """Send each guest those on its channels."""
        # A message longer than the buffer of a socket is refused.
        for part in [notifications[at : at + _BATCH] for at in range(0, len(notifications), _BATCH)]:
            present, messages = {one.channel for one in part}, {}
            # A copy, made in one go.
            for guest, channels in list(self._wanted.items()):
                wanted = channels & present
                if wanted not in messages:
                    fit = [(one.pid, one.channel, one.payload) for one in part if one.channel in wanted]
                    messages[wanted] = _message(None, fit)
                if wanted:
                    self._send(guest, messages[wanted])

    def inform(self):
        """Tell each guest what there is of a session, if it does not know."""
        with self._lock:
            session = self._listener.session
            # Once it is ended they are let go, which is no outage.
            ended = self._ended or self._listener.closed
            told, self._told = self._told, {}
            for guest, channels in [] if ended else list(self._wanted.items()):
                state = [session.facts, sorted(session.channels & channels)] if session else [None, []]
                self._told[guest] = state
                if told.get(guest) != state:
                    self._send(guest, _message(state, []))

    def _send(self, guest, message):
        with contextlib.suppress(OSError):
            guest.send(message)
            return
        # It does not read. Having been let go it comes back, and looks up what it has missed.
        with contextlib.suppress(OSError):
            guest.shutdown(socket.SHUT_RDWR)

    def _run(self, selector):
        with self._server, selector:
            selector.register(self._server, selectors.EVENT_READ)
            while not self._ended:
                try:
                    for key, _events in selector.select():
                        (self._accept if key.fileobj is self._server else self._hear)(selector, key.fileobj)
                    self.inform()
                except Exception as error:
                    log_bug(_logger, error)
        guests, self._wanted, self.channels = self._wanted, {}, frozenset()
        for guest in guests:
            guest.close()

    def _accept(self, selector, server):
        try:
            with _closed_on_error(server.accept()[0]) as guest:
                _peer(guest)
                guest.setblocking(False)
                guest.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
                selector.register(guest, selectors.EVENT_READ)
                self._wanted[guest] = frozenset()
        except PermissionError:
            pass
        except OSError:
            # Out of descriptors: who comes gets no answer, and connects by itself.
            time.sleep(0 if self._ended else 0.5)

    def _hear(self, selector, guest):
        try:
            names = json.loads(guest.recv(_LONGEST).decode())
            # What PostgreSQL would not take would cost us our session.
            if not isinstance(names, list) or not all(0 < len(one.encode()) < 64 and "\0" not in one for one in names):
                raise ValueError
            self._wanted[guest] = frozenset(names)
        except (OSError, ValueError, AttributeError, RecursionError):
            selector.unregister(guest)
            del self._wanted[guest]
            guest.close()
        self.channels = frozenset().union(*self._wanted.values())
        self._listener.wake()


def _message(*parts):
    return json.dumps(parts).encode()


def _peer(connected):
    """Return the pid at the other end; raise ``PermissionError`` if it is another user's."""
    pid, uid, _gid = struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        raise PermissionError("process %d is another user's" % pid)
    return pid


@contextlib.contextmanager
def _closed_on_error(one):
    try:
        yield one
    except Exception:
        one.close()
        raise

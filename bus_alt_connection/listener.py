# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""One connection that LISTENs, replaced whenever it is lost, for any number of feeds.

`Listener.run` is the whole life: connect, serve, pause, and again. It promises:

- Once `Listener.wait_for_listen` has returned, what is sent on a feed's channels is
  given to the feed, in the order of the server and once, as long as ``session`` stays.
- After a loss another session takes its place, at once if the last one has outlived
  `LONGEST_DELAY`; what was sent between is for the supervisor to find.
- Nothing ends it but the end of its last feed, or of Odoo.

Whether what is sent really arrives, the supervisor finds out.
"""

import contextlib
import logging
import random
import selectors
import socket
import threading
import time
import uuid
import weakref

import psycopg2
from psycopg2.extensions import Notify

from . import connection, log
from .payload import BUS_CHANNEL, HEARTBEAT_CHANNEL, quote, readable

_logger = logging.getLogger(__name__)

# Seconds between two connects: the first doubles up to the second.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0


class Listener(object):
    """Keep one session on ``database`` for feeds.

    ``connect()`` returns a `Session`, or raises ``psycopg2.Error``
    or ``OSError``; ``stopping()``: whether to give up; ``tell(event)`` is called with
    each `log.Event`, in the thread of `run`, and must not block; ``series``: of Odoo, as a
    number. A feed has ``channels``, a set of names, and
    ``put(notifications)``; it is held weakly, so that one that was forgotten is gone.

    To read by other threads: ``session``, None while there is no connection;
    ``deaf_since``: monotonic seconds, None while a LISTEN is confirmed; ``failed``:
    whether the last attempt has; ``lives``: how many sessions there were; ``gained``:
    the channels that came into force since `take_gained`; ``dropped``: how often a feed
    had no room for what the bus sent. ``changed`` is notified whenever one of these or the
    channels change.
    """

    def __init__(self, database, connect, stopping, tell, series=0):
        self.database = database
        self.series = series
        self.session = None
        self.deaf_since = time.monotonic()
        self.failed = False
        self.gained, self.lives, self.dropped = frozenset(), 0, 0
        self.changed = threading.Condition()
        self._connect = connect
        self._stopping = stopping
        self._tell = tell
        #: who hands on what is received to other processes, a `sharing.Host`, or None
        self.relay = None
        self._feeds, self._ended = weakref.WeakSet(), False
        self._had = frozenset()
        self._token, self._heard, self._look_asked_for = None, False, False
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)

    def run(self):
        """Live, pause, and live again, until it is `closed`. Raises nothing."""
        backoff = Backoff()
        while not self.closed and not self._stopping():
            seconds, began = LONGEST_DELAY, time.monotonic()
            try:
                seconds = backoff.after(self._live(), time.monotonic() - began)
            except Exception as error:
                # Better a listener with a bug than a deaf bus.
                log.log_bug(_logger, error)
            with self.changed:
                # Needs no descriptor, of which there may be none left.
                self.changed.wait_for(lambda: self.closed, seconds)
        self.close()
        self._waker.close()
        self._woken.close()

    def _live(self):
        """Connect and serve until the end; return the seconds that it lasted, None: not even began."""
        session, began, kind, reason = None, None, log.FAILED, ""
        try:
            session = self._connect()
            # One of its own, since a pooler may keep what an earlier session has left there.
            session.check_channel = "bus_alt_connection_%s" % uuid.uuid4().hex
            self._listen(session)
            began, kind = time.monotonic(), log.LOST
            self._serve(session)
        except Moved as error:
            kind, reason = log.MOVED, str(error)
        except (psycopg2.Error, OSError) as error:
            reason = str(error)
        finally:
            with self._change():
                self.session, self.failed, self._had = None, True, frozenset()
                self.deaf_since = self.deaf_since or time.monotonic()
            if self.relay:
                self.relay.inform()
            if session is not None:
                kind, reason = session.fault or (kind, reason)
                session.close()
        if not self.closed:
            self._tell(log.Event(kind, began and session, reason))
        return began and time.monotonic() - began

    def _serve(self, session):
        """Hand on what ``session`` receives, until that raises, is at ``fault``, or nobody listens."""
        with self._change():
            self.session, self.failed = session, False
            self.lives += 1
        told, woken = None, True
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(session, selectors.EVENT_READ)
            while not self.closed and not session.fault:
                if woken:
                    self._listen(session)
                if session.confirmed and session.confirmed != told:
                    if told is None:
                        session.settle()
                    told = session.confirmed
                    self._tell(log.Event(log.CONFIRMED, session, None))
                    with self._change():
                        self.deaf_since = None
                self._receive(session)
                woken = any(key.fileobj is self._woken for key, _events in selector.select())
                if woken:
                    self._woken.recv(4096)

    def _listen(self, session):
        """Have ``session`` LISTEN on the channels that are wanted."""
        channels, wanted = {session.check_channel}, frozenset()
        # Behind a pooler a LISTEN may outlive us: nothing but the check at first.
        if not session.facts.pooled or session.confirmed is not None:
            wanted = self.wanted
            channels |= wanted.union([HEARTBEAT_CHANNEL], self.relay.channels if self.relay else ())
        if session.channels != channels:
            session.listen(frozenset(channels))
        with self._change():
            self.gained, self._had = self.gained | wanted - self._had, wanted
        if self.relay:
            self.relay.inform()

    def _receive(self, session):
        asked, notifications = self._look_asked_for, session.receive()
        if notifications:
            session.heard_at = time.monotonic()
            self.deliver(notifications)
            if self.relay:
                self.relay.put(notifications)
        # After the rest: what was sent before a token was delivered before it counts.
        heard = any(one.payload == self._token for one in notifications)
        # A guest is given what has arrived bit by bit.
        if heard or asked and not notifications:
            with self._change():
                self._heard, self._look_asked_for = self._heard or heard, False

    def deliver(self, notifications):
        """Give the feeds on their channels what Odoo can read of ``notifications``.

        May be called by any thread. Return whether anybody is there for it, with room.
        """
        feeds = self._all_feeds()
        fit, channels = [], {one.channel for one in notifications}
        # Others are for guests, or for checks.
        wanted = frozenset().union(*(feed.channels for feed in feeds))
        for one in [one for one in notifications if one.channel in wanted]:
            payload = readable(one.payload, self.series) if one.channel == BUS_CHANNEL else one.payload
            if payload is None:
                text = "dropped a notification that Odoo's bus can't read, sent by backend pid %s on channel %s: %s"
                if log.rarely("unreadable"):
                    _logger.warning(text, one.pid, one.channel, ascii(one.payload[:80]))
            else:
                fit.append(Notify(one.pid, one.channel, payload))
        taken = [feed.put([one for one in fit if one.channel in feed.channels]) for feed in feeds]
        # Of cron's none is missed: those that wait say the same.
        if not all(taken) and BUS_CHANNEL in channels:
            with self._change():
                self.dropped += 1
        return all(taken) and any(channels & feed.channels for feed in feeds)

    # For feeds and cursors ---------------------------------------------------

    @property
    def closed(self):
        """True once the last feed is gone, or Odoo ends; it stays so."""
        with self.changed:
            self._ended = self._ended or not len(self._feeds)
            return self._ended

    def close(self):
        """End it. Returns at once; `run` follows."""
        with self._change():
            self._ended = True
        if self.relay:
            self.relay.close()
        self.wake()

    def add(self, feed):
        """Take on ``feed``; return False if it is too late for that."""
        with self.changed:
            if not self._ended:
                self._feeds.add(feed)
                # Who is forgotten does not say so.
                weakref.finalize(feed, self.wake).atexit = False
            return not self._ended

    def remove(self, feed):
        """Forget ``feed``, and end quietly if it was the last."""
        with self._change():
            self._feeds.discard(feed)
        self.wake()

    def listen(self, feed, channels):
        """Give ``feed`` what arrives on ``channels``, and on no others.

        It is in force some time later, and through reconnects; until then something may
        still arrive on others.
        """
        with self._change():
            feed.channels = channels
        self.wake()

    def wait_for_listen(self, feed, timeout):
        """Wait until LISTEN is in force for ``feed``, or known not to be to be had."""
        self.wait(lambda: feed.channels <= self.session.channels if self.session else self.failed, timeout)

    def _all_feeds(self):
        with self.changed:
            return list(self._feeds)

    # For the supervisor --------------------------------------------------------

    @property
    def wanted(self):
        """The channels that some feed is there for."""
        return frozenset().union(*(feed.channels for feed in self._all_feeds()))

    @property
    def in_force(self):
        """``(session, channels)``: who LISTENs, and on what that is wanted."""
        session = self.session
        return session, session.channels & self.wanted if session else frozenset()

    def take_gained(self):
        """Return ``gained``, which begins anew."""
        with self.changed:
            gained, self.gained = self.gained, frozenset()
        return gained

    def wait(self, condition, timeout):
        """Wait until ``condition()`` or the end; return what the former gives."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or condition(), timeout)
            return condition()

    def expect(self, token):
        """Take note of what `hears` is to wait for, before it is sent on a check channel."""
        with self.changed:
            self._token, self._heard = token, False

    def hears(self, session, timeout):
        """Wait for what is expected; return whether it came on ``session``.

        A listener that was kept from looking is given another second to do so: what was
        sent may be there already.
        """

        def over():
            return self._heard or self.session is not session

        if not self.wait(over, timeout):
            self._look_asked_for = True
            self.wake()
            self.wait(lambda: over() or not self._look_asked_for, 1.0)
        return self._heard and self.session is session

    def confirm(self, session, channels, round_trip):
        """Take note that what was sent came, in ``round_trip`` seconds, while ``channels`` were in force."""
        session.round_trip, session.confirmed = round_trip, channels
        self.wake()

    def replace(self, session, kind, reason):
        """Give up ``session``, if it is still there, and tell so: it is DEAF, or MOVED."""
        session.fault = kind, reason
        self.wake()

    @contextlib.contextmanager
    def _change(self):
        """Change what others may `wait` for."""
        with self.changed:
            yield
            self.changed.notify_all()

    def wake(self):
        """Have `run` see what has changed. Returns at once; any thread may."""
        # It may be full, so that it wakes up anyway; or closed, so that it has.
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")


class Moved(psycopg2.OperationalError):
    """The session is over, but another is to be had: no outage."""


class Session(object):
    """What a listener hears on, from connect to loss.

    ``facts``: the `connection.Facts` on the server at its end.
    """

    #: of the process by way of which it goes, see `sharing`; None: by itself
    host_kind = None
    #: those that it LISTENs on
    channels = frozenset()
    #: to where the supervisor sends, and which nobody else listens to
    check_channel = None
    #: the channels that were in force when what was sent came back; None: it has not yet
    confirmed = None
    #: seconds that it took
    round_trip = None
    #: monotonic seconds of the last notification
    heard_at = 0.0
    #: event kind and reason, if it is to be given up
    fault = None

    def settle(self):
        """Prepare for a long life, now that it is known to be no pooler's."""

    def examined(self):
        """Return ``facts``, having looked closer whether there is a pooler. Any thread may."""
        return self.facts


class DirectSession(Session, connection.Connection):
    """A connection straight to PostgreSQL."""

    def prepare(self):
        self.facts = self.examine()
        if self.facts.standby:
            raise psycopg2.OperationalError("is a standby, and only a primary takes LISTEN")

    def listen(self, channels):
        """LISTEN on ``channels`` and no others; they are in force on return."""
        statements = ["LISTEN %s" % quote(name) for name in sorted(channels)]
        statements += ["UNLISTEN %s" % quote(name) for name in self.channels - channels]
        # Who asks meanwhile is not told of those that are about to go.
        self.channels &= channels
        # As one pg_stat_activity shows them all; but of several PgDog heeds only the first.
        for statement in statements if self.facts.pooled else ["; ".join(statements)]:
            try:
                self.execute(statement)
            except psycopg2.Error as error:
                if error.sqlstate != "58P01":
                    raise
                # Up to PostgreSQL 14.20, 15.15, 16.11, 17.7 and 18.1 the queue may begin before the commit log does.
                _logger.warning("a bug of PostgreSQL (%s) kept LISTEN from working; update the server", error)
                self.execute("SELECT pg_catalog.pg_notification_queue_usage()")
                self.execute(statement)
        self.channels = channels

    def settle(self):
        if not self.facts.pooled and self.server_version >= 140000:
            self.execute("SET idle_session_timeout = 0")

    def examined(self):
        pooled = self.facts.pooled or connection.keeps_session(self.parameters) is False
        return self.facts._replace(pooled=pooled)


class Backoff(object):
    """How long to wait before the next attempt: intervals between connects, doubling."""

    def __init__(self):
        self._interval = 0.0

    def after(self, lasted, took):
        """Return the seconds to wait after a session of so many; None: there was none. All ``took`` that many.

        Only what has outlived `LONGEST_DELAY` makes it begin anew, so that who cuts
        every session early meets ever fewer of them.
        """
        if lasted is not None and lasted > LONGEST_DELAY:
            self._interval = 0.0
            return 0.0
        self._interval = min(max(FIRST_DELAY, 2 * self._interval), LONGEST_DELAY)
        return max(self._interval * random.uniform(0.5, 1) - took, 0.0)

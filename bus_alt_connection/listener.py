# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The direct connection: one per process and database, for all who listen there.

A thread (a greenlet under gevent) owns it, hands what arrives to the feeds, and
connects again whenever it is lost. Whether what is sent really arrives here is for
the supervisor to find out, which watches `Listener.session`.
"""

import json
import logging
import random
import selectors
import socket
import threading
import time
import uuid
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import psycopg2
from psycopg2.extensions import Notify

from . import connection, settings

_logger = logging.getLogger(__name__)

BUS_CHANNEL, CRON_CHANNEL = "imbus", "cron_trigger"

# Seconds. The first attempt is made at once, those after it wait from the first
# doubling up to the second.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
# Seconds between two lines of the log on the same trouble.
REMINDER = 60.0

# What tells this server from any other, a restarted or promoted copy included:
# when it was started, to the microsecond, and the database.
IDENTITY = (
    "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint::text"
    " || ' ' || current_database()"
)


class Session(object):
    """One life of the direct connection, from connect to loss."""

    def __init__(self, address, backend_pid, pooled, identity):
        self.address = address
        self.backend_pid = backend_pid
        #: True if libpq was told another backend pid than the server knows: there is
        #: a pooler in between. One that keeps the session for us would still do.
        self.pooled = pooled
        self.identity = identity
        #: the channels that PostgreSQL was told to LISTEN on
        self.channels = frozenset()
        #: True once what was sent came back
        self.confirmed = False


class Outage(object):
    """Tell the log of a time without a confirmed LISTEN: once, and a line a minute."""

    def __init__(self, database):
        self._database = database
        self._reminder = None
        self._told = set()
        #: monotonic seconds, None while all is well
        self.since = None

    def report(self, reason, session, attempts, found_out):
        """Log that ``session`` was lost, or without one that connecting failed.

        ``found_out``: True if a check that failed is the reason; an operator has to
        do something about these.
        """
        level, text = logging.DEBUG, "still not listening on database %s: %s"
        values = [self._database, reason]
        if self.since is None:
            self.since = time.monotonic()
            self._reminder = RateLimit(REMINDER)
            self._reminder.passes()
            if session is None:
                level, text = logging.ERROR, "can't listen on database %s: %s"
            else:
                level, text = logging.WARNING, "lost the listener of database %s: %s"
                text += " (it was backend pid %d at %s)"
                values += [session.backend_pid, session.address]
            text += "; trying again until it works"
        if found_out and reason not in self._told:
            self._told.add(reason)
            level, text = logging.ERROR, "can't listen on database %s: %s"
            values = values[:2]
        elif level == logging.DEBUG and self._reminder.passes() is not None:
            level, text = logging.WARNING, text + " (for %.0f s, %d attempts)"
            values += [time.monotonic() - self.since, attempts]
        _logger.log(level, text, *values)

    def end(self):
        """Return for how many seconds it lasted, or None if there was none."""
        since, self.since = self.since, None
        self._told.clear()
        return None if since is None else time.monotonic() - since


class RateLimit(object):
    """Let one through in so many ``seconds``."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._last = None
        self._suppressed = 0

    def passes(self):
        """Return how many were held back since the last, or None to hold back."""
        now = time.monotonic()
        if self._last is not None and now - self._last < self._seconds:
            self._suppressed += 1
            return None
        suppressed, self._last, self._suppressed = self._suppressed, now, 0
        return suppressed


class Listener(object):
    """Keep one direct connection to ``database`` for any number of feeds.

    ``parameters``: libpq keywords; ``stopping()``: whether to give up connecting.
    A feed has ``channels``, a set of names, and ``put(notifications)``.

    Attributes for others to read: ``session``, the `Session` or None while there is
    no connection; ``closed``; ``reconnects``, how often a lost one was replaced;
    ``attempts``, how often it tried to connect since it last heard itself.
    ``changed`` is notified whenever one of these, or the channels, change.
    """

    def __init__(self, database, parameters, stopping):
        self.database = database
        self.session = None
        self.closed = False
        self.reconnects = 0
        self.attempts = 0
        self.changed = threading.Condition()
        #: the supervisor sends here, and nobody else listens to it
        self.check_channel = "bus_alt_connection_%s" % uuid.uuid4().hex
        self.outage = Outage(database)
        self._parameters = parameters
        self._stopping = stopping
        self._feeds = []
        self._requests = []
        self._heard = set()
        self._dropped = None
        self._lost_one = False
        self._indigestible = RateLimit(REMINDER)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        thread = threading.Thread(
            target=self._run, name="bus_alt_connection.listener.%s" % database
        )
        thread.daemon = True
        thread.start()

    # For feeds and cursors ---------------------------------------------------

    def add(self, feed):
        """Take on ``feed``; return False if it is too late for that."""
        with self.changed:
            if not self.closed:
                self._feeds = self._feeds + [feed]
            return not self.closed

    def remove(self, feed):
        """Forget ``feed``, and end quietly if it was the last."""
        with self.changed:
            self._feeds = [other for other in self._feeds if other is not feed]
            if not self._feeds:
                self.closed = True
                self.changed.notify_all()
        self._wake()

    def listen(self, feed, channel):
        """Give ``feed`` what arrives on ``channel`` from now on, as LISTEN does."""
        with self.changed:
            feed.channels = feed.channels | {channel}
            self.changed.notify_all()
        self._wake()

    def unlisten(self, feed, channel=None):
        """Take ``feed`` off ``channel``, or off all of them."""
        with self.changed:
            feed.channels = feed.channels - {channel} if channel else frozenset()
        self._wake()

    def wait_for_listen(self, feed, timeout):
        """Wait until PostgreSQL listens for ``feed``, unless it is known to be away."""
        self.wait(
            lambda: feed.channels <= self.session.channels
            if self.session
            else self.outage.since is not None,
            timeout,
        )

    def query(self, query, values=None, timeout=connection.QUERY_TIMEOUT):
        """Have the server answer on the direct connection; return the rows.

        Raises ``psycopg2.Error`` if it can't be asked or refuses.
        """
        answer = Future()
        with self.changed:
            if self.session is None and self.outage.since is not None:
                raise psycopg2.OperationalError("there is no connection")
            self._requests.append((query, values, answer))
        self._wake()
        try:
            return answer.result(timeout)
        except FutureTimeoutError:
            answer.cancel()
            raise psycopg2.OperationalError("not answered in %g s" % timeout) from None

    # For the supervisor --------------------------------------------------------

    @property
    def wanted(self):
        """The channels that some feed is there for."""
        return frozenset().union(*(feed.channels for feed in self._feeds))

    def wait(self, condition, timeout):
        """Wait until ``condition()`` or the end; return what the former gives."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or condition(), timeout)
            return condition()

    def hears(self, token, session, timeout):
        """Wait for ``token`` on `check_channel`; return whether it came."""
        self.wait(lambda: token in self._heard or self.session is not session, timeout)
        with self.changed:
            heard = token in self._heard
            self._heard.clear()
        return heard

    def confirm(self, session):
        """Take note that ``session`` hears what is sent."""
        with self.changed:
            session.confirmed = True
            if self.session is session:
                self.attempts = 0
            self.changed.notify_all()
        self._wake()

    def drop(self, session, reason):
        """Replace the connection of ``session``, if that is still the one."""
        with self.changed:
            if self.session is session:
                self._dropped = reason
        self._wake()

    def put(self, channel, payloads):
        """Give the feeds on ``channel`` what the server would have sent."""
        self._deliver([Notify(0, channel, payload) for payload in payloads])

    # The thread ----------------------------------------------------------------

    def _run(self):
        while not self.closed and not self._stopping():
            try:
                self._live()
            except psycopg2.Error as error:
                # The first line tells; after it libpq only supposes.
                reason = (str(error).strip() or repr(error)).split("\n")[0]
                self._lost(settings.redact(reason, self._parameters))
            except Exception as error:
                # Better a listener with a bug than a deaf bus.
                settings.log_bug(_logger, error, self._parameters)
                self._lost("internal error")
            if self.attempts:
                self._pause(_delay(self.attempts))
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self._waker.close()
        self._woken.close()

    def _live(self):
        """Connect, and hand on what arrives until the connection is lost."""
        self.attempts += 1
        direct, session = connection.connect(self._parameters, _examine)
        try:
            if session.pooled:
                # Nothing but the check yet: behind a pooler a LISTEN may outlive us.
                self._listen(direct, session, frozenset())
            with self.changed:
                self.session = session
                self.reconnects += self._lost_one
                self.changed.notify_all()
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                selector.register(direct, selectors.EVENT_READ)
                while not self.closed:
                    self._attend(direct, session)
                    for key, _events in selector.select():
                        if key.fileobj is direct:
                            self._deliver(direct.receive())
                        else:
                            _drain(self._woken)
        finally:
            direct.close()

    def _attend(self, direct, session):
        """Do what other threads have asked for."""
        if self._dropped:
            raise psycopg2.OperationalError(self._dropped)
        wanted = self.wanted
        if wanted != session.channels and (session.confirmed or not session.pooled):
            self._listen(direct, session, wanted)
        while self._requests:
            query, values, answer = self._requests.pop(0)
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(direct.execute(query, values))
            except psycopg2.Error as error:
                answer.set_exception(error)
                if isinstance(error, psycopg2.OperationalError):
                    raise
        self._deliver(direct.take())

    def _listen(self, direct, session, channels):
        # In one statement, so that none is missed and pg_stat_activity shows them.
        names = sorted(channels) + [self.check_channel]
        direct.execute(
            "; ".join(
                ["LISTEN %s" % quoted(name) for name in names]
                + ["UNLISTEN %s" % quoted(n) for n in session.channels - channels]
            )
        )
        with self.changed:
            session.channels = channels
            self.changed.notify_all()

    def _deliver(self, notifications):
        fit = []
        for notification in notifications:
            if notification.channel == self.check_channel:
                with self.changed:
                    self._heard.add(notification.payload)
                    self.changed.notify_all()
                continue
            if notification.channel == BUS_CHANNEL:
                payload = digestible(notification.payload)
                if payload is None:
                    self._refuse(notification)
                    continue
                notification = Notify(notification.pid, BUS_CHANNEL, payload)
            fit.append(notification)
        if not fit:
            return
        for feed in self._feeds:
            mine = [one for one in fit if one.channel in feed.channels]
            if mine:
                feed.put(mine)

    def _refuse(self, notification):
        suppressed = self._indigestible.passes()
        if suppressed is not None:
            _logger.warning(
                "dropped a notification that Odoo's bus can't read, sent by backend pid"
                " %s on channel %s: %s%s",
                notification.pid,
                BUS_CHANNEL,
                ascii(notification.payload[:80]),
                " (and %d more of the kind)" % suppressed if suppressed else "",
            )

    def _lost(self, reason):
        with self.changed:
            session, self.session = self.session, None
            self._lost_one = self._lost_one or session is not None
            found_out, self._dropped = self._dropped is not None, None
            self.outage.report(reason, session, self.attempts, found_out)
            while self._requests:
                answer = self._requests.pop(0)[2]
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(psycopg2.OperationalError(reason))
            self.changed.notify_all()

    def _pause(self, seconds):
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            deadline = time.monotonic() + seconds
            while not self.closed:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return
                _drain(self._woken)

    def _wake(self):
        try:
            self._waker.send(b"\0")
        except OSError:
            # Full, so it will wake up anyway; or closed, so it has.
            pass


def digestible(payload):
    """Return ``payload`` as Odoo's bus can read it, or None if it can't be.

    The bus of every series takes a JSON list of channels, each a string or a flat
    list, and dies of anything else. It is written anew, since the JSON libraries of
    the series differ in what they forgive.
    """
    try:
        channels = json.loads(payload)
        if not isinstance(channels, list) or not all(map(_is_channel, channels)):
            return None
        payload = json.dumps(channels, ensure_ascii=False, separators=(",", ":"))
        payload.encode()  # lone surrogates
    except (ValueError, RecursionError):
        return None
    return payload


def _is_channel(channel):
    if isinstance(channel, list):
        return all(map(_is_scalar, channel))
    return isinstance(channel, str)


def _is_scalar(value):
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, str)


def quoted(name):
    """Return ``name`` as an SQL identifier."""
    # As Odoo itself has them, for those who look for them in pg_stat_activity.
    if name in (BUS_CHANNEL, CRON_CHANNEL):
        return name
    return '"%s"' % name.replace('"', '""')


def _examine(direct, parameters):
    """Set up a session on ``direct`` and return what it is."""
    ((backend_pid, standby, identity),) = direct.execute(
        "SELECT pg_backend_pid(), pg_is_in_recovery(), (%s)" % IDENTITY
    )
    if standby:
        raise psycopg2.OperationalError("is a standby, and only a primary takes LISTEN")
    if direct.server_version >= 140000:
        direct.execute("SET idle_session_timeout = 0")
    return Session(
        settings.address(parameters),
        backend_pid,
        backend_pid != direct.told_pid,
        identity,
    )


def _delay(attempts):
    """Return the seconds to wait after so many attempts, with jitter."""
    longest = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(attempts - 1, 10))
    return longest * random.uniform(0.5, 1)


def _drain(sock):
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        pass

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Does the listener hear what is sent? If not: why, and what was missed?

All that is done here goes the ordinary way, through the pooler, and in a thread of
its own (a greenlet under gevent): a pooler that hangs must not keep the listener
from listening.
"""

import functools
import logging
import os
import threading
import time
import uuid

import psycopg2

from . import catchup, connection, settings
from .listener import BUS_CHANNEL, CRON_CHANNEL, IDENTITY, digestible, quoted

_logger = logging.getLogger(__name__)

# Seconds that a check may take to come back, once it is committed.
CHECK_TIMEOUT = 5.0
# Seconds without a confirmed LISTEN before bus_bus is looked at instead.
GRACE = 2.0
# Seconds until what could not be done through the pooler is tried again.
RETRY = 2.0
NEVER = float("inf")

# The function is the one that Odoo itself sends with, since 14.0.
_NOTIFY = "SELECT %s(%%s, %%s), (%s), (%s)" % (
    quoted(os.environ.get("ODOO_NOTIFY_FUNCTION") or "pg_notify"),
    IDENTITY,
    catchup.SNAPSHOT,
)
_DATABASES = (
    "SELECT array_agg(datname::text ORDER BY datname) FROM pg_database"
    " WHERE datallowconn AND NOT datistemplate"
)


class Supervisor(object):
    """Watch over ``listener`` until it is closed.

    ``parameters_for(database)`` returns the libpq keywords of the ordinary way to a
    database; ``databases``: a set, filled by others, of those that may hold a bus_bus;
    ``options``: the `settings.Settings`.
    """

    def __init__(self, listener, parameters_for, databases, options):
        self.listener = listener
        self._database = database = listener.database
        self._options = options
        self._databases = databases
        self._parameters_for = parameters_for
        self._backlog = catchup.Backlog(parameters_for)
        self._began = time.monotonic()
        #: monotonic seconds since which no LISTEN is confirmed, None while one is
        self._deaf_since = self._began
        self._steps = [_Step(self._catch_up), _Step(self._check), _Step(self._poll)]
        self._announced = None
        self._last_check = None  # monotonic seconds
        self._round_trip = None  # seconds
        self._sender_works = True
        self._polling = False
        self._poll_works = False
        self._next_poll = 0.0
        thread = threading.Thread(
            target=self._run, name="bus_alt_connection.supervisor.%s" % database
        )
        thread.daemon = True
        thread.start()

    def status(self):
        """Return how the listener is, a dictionary for `health`."""
        session, now = self.listener.session, time.monotonic()
        deaf_since = self._deaf_since
        if deaf_since is None:
            status = "pass"
        elif BUS_CHANNEL not in self.listener.wanted or now - deaf_since < GRACE:
            status = "degraded"
        else:
            status = "degraded" if self._polling and self._poll_works else "fail"
        age = self._last_check and round(now - self._last_check, 3)
        round_trip = self._round_trip and round(self._round_trip * 1000, 3)
        return {
            "status": status,
            "listening": session is not None and bool(session.channels),
            "confirmed": session is not None and session.confirmed,
            "seconds_since_check": age,
            "round_trip_ms": round_trip,
            "reconnects": self.listener.reconnects,
        }

    def _run(self):
        while not self.listener.closed:
            state = self._state()
            due = min(step.run(state) for step in self._steps)
            seconds = min(max(due - time.monotonic(), 0), 3600)
            self.listener.wait(functools.partial(self._has_left, state), seconds)

    def _state(self):
        session = self.listener.session
        return session, session.channels if session else frozenset()

    def _has_left(self, state):
        return self._state() != state

    # The steps, in this order. Each is called in every new state, and again in the
    # same one after the seconds that it returned.

    def _catch_up(self, session, channels):
        """Now that we LISTEN, give the feeds what was sent before."""
        if BUS_CHANNEL in channels and not self._give_missed(overlap=True):
            return RETRY
        # Not at the first start: cron would begin at once instead of after a minute.
        late = self.listener.reconnects or time.monotonic() - self._began > GRACE
        if CRON_CHANNEL in channels and late:
            try:
                self.listener.put(CRON_CHANNEL, self._all_databases())
            except psycopg2.Error:
                return RETRY
        return NEVER

    def _check(self, session, channels):
        """Send to ourselves; if it does not arrive, say why and have us reconnect."""
        if session is None or not (channels or session.pooled):
            return NEVER
        token = uuid.uuid4().hex
        interval = self._options.check_interval
        try:
            began, identity, snapshot = self._send(token)
        except psycopg2.Error as error:
            if self._sender_works:
                self._sender_works = False
                _logger.warning(
                    "can't tell whether the listener of database %s hears: sending"
                    " fails: %s; trying again, the listener is left as it is",
                    self._database,
                    error,
                )
            return RETRY
        self._sender_works = True
        patience = min(CHECK_TIMEOUT, max(interval / 2, 1)) if interval else CHECK_TIMEOUT
        if not self.listener.hears(token, session, patience):
            self.listener.drop(session, self._why_deaf(session, identity))
            return RETRY
        self._last_check = time.monotonic()
        self._round_trip = self._last_check - began
        self._backlog.all_heard(snapshot)
        attempts = self.listener.attempts
        self.listener.confirm(session)
        if channels and self._announced != (session, channels):
            self._announced = session, channels
            self._announce(session, channels, attempts)
        # So that a verdict is there when the interval is over.
        return max(interval - patience, 0.1) if interval else NEVER

    def _poll(self, session, channels):
        """While no LISTEN is confirmed, look into the bus instead."""
        now = time.monotonic()
        if session is not None and session.confirmed:
            self._deaf_since = None
            if self._polling:
                self._polling = False
                _logger.info(
                    "the listener of database %s has taken over from polling",
                    self._database,
                )
            return NEVER
        if self._deaf_since is None:
            self._deaf_since = now
            self._poll_works = False
        interval = self._options.poll_interval
        if not interval:
            return NEVER
        wait = max(self._deaf_since + GRACE, self._next_poll) - now
        if wait > 0:
            return wait
        if BUS_CHANNEL in self.listener.wanted:
            if not self._polling:
                self._polling = True
                _logger.warning(
                    "nothing listens on database %s: looking into bus_bus every %g s"
                    " instead, so that notifications arrive late but arrive",
                    self._database,
                    interval,
                )
            self._poll_works = self._give_missed(overlap=not self._poll_works)
            if not self._poll_works:
                # The server may be there for a moment only.
                interval = min(interval, RETRY)
        self._next_poll = now + interval
        return interval

    # What they are made of ------------------------------------------------------

    def _send(self, token):
        """NOTIFY ourselves; return when, to which server, and its snapshot."""
        with connection.connect(self._parameters_for(self._database))[0] as pooled:
            began = time.monotonic()
            ((_, identity, snapshot),) = pooled.execute(
                _NOTIFY, (self.listener.check_channel, token)
            )
            return began, identity, snapshot

    def _why_deaf(self, session, identity):
        if session.pooled:
            return (
                "%s is a pooler that does not keep the connection for us; set %s and %s"
                " to PostgreSQL itself"
                % (session.address, settings.HOST_OPTION, settings.PORT_OPTION)
            )
        (there, there_in), (here, here_in) = (
            one.split(" ", 1) for one in (identity, session.identity)
        )
        if there != here:
            return (
                "%s is another server than the one that Odoo sends to; set %s and %s"
                " to that one"
                % (session.address, settings.HOST_OPTION, settings.PORT_OPTION)
            )
        if there_in != here_in:
            return "it listens on database %s, but Odoo sends on %s" % (here_in, there_in)
        return "the path to %s is silent, nothing comes through" % session.address

    def _announce(self, session, channels, attempts):
        outage = self.listener.outage.end()
        _logger.info(
            "listening%s on %s at %s (database %s, backend pid %d), confirmed in %.1f ms%s",
            " again" if self.listener.reconnects else "",
            ", ".join(sorted(channels)),
            session.address,
            self._database,
            session.backend_pid,
            self._round_trip * 1000,
            ""
            if outage is None
            else "; it took %.2f s and %d attempt(s)" % (outage, attempts),
        )

    def _give_missed(self, overlap):
        """Feed the channels with new rows in bus_bus; return whether all could be asked."""
        complete = True
        # A copy, made in one go: other threads add to it.
        databases = list(self._databases)
        for database in sorted(databases):
            if database == "postgres":
                continue  # Odoo keeps nothing there, and all else may be Odoo's
            try:
                rows = self._backlog.missed(database, overlap)
            except psycopg2.Error as error:
                _logger.debug("can't look into bus_bus of %s: %s", database, error)
                complete = self._forget_if_gone(database) and complete
                continue
            channels = [row for row in rows if digestible("[%s]" % row)]
            if channels:
                self.listener.put(BUS_CHANNEL, ["[%s]" % ",".join(channels)])
        return complete

    def _forget_if_gone(self, database):
        try:
            gone = database not in self._all_databases()
        except psycopg2.Error:
            return False
        if gone:
            self._databases.discard(database)
        return gone

    def _all_databases(self):
        with connection.connect(self._parameters_for(self._database))[0] as pooled:
            return pooled.execute(_DATABASES)[0][0]


class _Step(object):
    """Something to do once in each state, and again when it asks for it."""

    def __init__(self, action):
        self._action = action
        self._state = None
        self._due = 0.0

    def run(self, state):
        """Do it if it is due; return when it is due again, in monotonic seconds."""
        if state != self._state or time.monotonic() >= self._due:
            try:
                again = self._action(*state)
            except Exception as error:
                # Better a supervisor with a bug than none.
                settings.log_bug(_logger, error)
                again = RETRY
            self._state = state
            self._due = time.monotonic() + again
        return self._due

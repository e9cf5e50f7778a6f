# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Does the listener hear what is sent? If not: why, and what was missed?

`Supervisor.round` is what it does, again and again: check, give what is owed, and while
it is deaf, poll. So a notification is late by no more than ``check_interval`` when a path
dies without a word, and by ``poll_interval`` while there is none; it is never lost.

All of it goes the ordinary way, through the pooler, in a thread of its own (a greenlet
under gevent): a pooler that hangs must not keep the listener from listening.
"""

import contextlib
import logging
import os
import random
import time
import uuid

import psycopg2
from psycopg2.extensions import Notify

from . import catchup, connection, log
from .payload import BUS_CHANNEL, CRON_CHANNEL, HEARTBEAT_CHANNEL, quote, readable

_logger = logging.getLogger(__name__)

# The modes, of which log, health and tests speak.
#: What is sent arrives at once: it was tried. All is well.
LISTENING = "listening"
#: The same, by way of another process that listens.
SHARED = "shared"
#: What is sent arrives late, from looks into bus_bus, or is about to; scheduled actions
#: start by Odoo's own timer. The server, or the way to it, is away: see the log.
POLLING = "polling"
#: Nothing arrives. The pooler is away as well, or polling is off.
DEAF = "deaf"

# Seconds that a check may take to come back, once it is committed.
CHECK_TIMEOUT = 5.0
# Seconds; what is set below counts as these, since each check or look is a login at the pooler.
SHORTEST_CHECK_INTERVAL, SHORTEST_POLL_INTERVAL = 3.0, 1.0
# Seconds without a confirmed LISTEN before bus_bus is looked at instead.
GRACE = 2.0
# Seconds until what could not be done through the pooler is tried again.
RETRY = 2.0
NEVER = float("inf")

# Since 14.0 Odoo sends with this function. PostgreSQL has to find an operator's own function as it does for Odoo.
_FUNCTION = os.environ.get("ODOO_NOTIFY_FUNCTION", "")
NOTIFY = "SELECT %s(%%s, %%s)" % ("pg_catalog.pg_notify" if _FUNCTION in ("", "pg_notify") else quote(_FUNCTION))
# All names are qualified, see `connection`.
_SNAPSHOT = "SELECT pg_catalog.txid_current_snapshot()::pg_catalog.text"
_DATABASES = (
    "SELECT pg_catalog.array_agg(datname::pg_catalog.text) FROM pg_catalog.pg_database"
    " WHERE datallowconn AND NOT datistemplate"
)


class Supervisor(object):
    """Watch over ``listener`` until it is closed.

    ``open_ordinary(database)`` returns a `connection.Connection` the ordinary way;
    ``databases``: a set, filled by others, of those that may hold a bus_bus; ``backlog``:
    the `catchup.Backlog` of the process; ``options``: the `settings.Settings`;
    ``better(session)``: whether to give it up for another that is to be had.
    """

    def __init__(self, listener, open_ordinary, databases, backlog, options, better=lambda session: False):
        self.listener = listener
        self._open = open_ordinary
        self._databases = databases
        self._backlog = backlog
        self._options = options
        self._better = better
        self._began = time.monotonic()
        self._in_force = None, frozenset()
        self._dropped = 0
        self._cron_due = self._check_due = NEVER
        self._polling = False
        self._sender_works = True
        self._last_check = None
        #: seconds between two looks at the way, or since something was heard; what the last look saw, and when
        self._span, self._seen = NEVER, None

    def run(self):
        """Do a `round` whenever something changes or is due. Raises nothing."""
        while not self.listener.closed:
            seen = self._state()
            seconds = self.round(time.monotonic()) - time.monotonic()
            self.listener.wait(lambda seen=seen: self._state() != seen, min(max(seconds, 0), 3600))
        # Its last feed may have been forgotten without a word.
        self.listener.close()

    def round(self, now):
        """Do what is due at ``now``, monotonic seconds; return when to come again."""
        # What may take long, the looks into databases, comes last.
        steps = (self._note_changes, self._check, self._wake_cron, self._pay_owed, self._poll)
        return min([self._guarded(step, now) for step in steps])

    @property
    def mode(self):
        """How notifications arrive: LISTENING, SHARED, POLLING or DEAF."""
        deaf_since, session = self.listener.deaf_since, self.listener.session
        if deaf_since is None:
            return LISTENING if session is None or session.host_kind is None else SHARED
        if self._polling and (self._backlog.works or not self._with_bus()):
            return POLLING
        soon = time.monotonic() - deaf_since < GRACE
        return POLLING if soon or BUS_CHANNEL not in self.listener.wanted else DEAF

    def status(self):
        """Return how the listener is, a dictionary for `health`."""
        session, channels = self.listener.in_force
        round_trip = session and session.round_trip
        status = {"mode": self.mode, "reconnects": max(self.listener.lives - 1, 0), "listening": bool(channels)}
        status["confirmed"] = session is not None and session.confirmed is not None
        status["seconds_since_check"] = self._last_check and round(time.monotonic() - self._last_check, 3)
        status["round_trip_ms"] = round_trip and round(round_trip * 1000, 3)
        return status

    # The steps. Each returns when it has to be called again, if nothing changes.

    def _note_changes(self, now):
        """Find out what a new session, or new channels, or a full feed make due."""
        before, self._in_force = self._in_force, self.listener.in_force
        if self._in_force != before:
            self._check_due = now
        if BUS_CHANNEL in self.listener.wanted:
            self._backlog.begin(now)
        gained = self.listener.take_gained()
        if BUS_CHANNEL in gained:
            self._backlog.owe(self._with_bus(), now, afresh=True)
        # Not at the first start: cron would begin at once instead of after a minute.
        if CRON_CHANNEL in gained and (self.listener.lives > 1 or now - self._began > GRACE):
            self._cron_due = now
        if self._dropped != self.listener.dropped:
            self._dropped = self.listener.dropped
            self._backlog.owe(self._with_bus(), now)
        return NEVER

    def _pay_owed(self, now):
        """Give the feeds what the bus has sent while they did not hear."""
        channels = self.listener.wanted if self._polling else self._in_force[1]
        if BUS_CHANNEL not in channels:
            return NEVER
        self._give_missed(now)
        return self._backlog.due

    def _wake_cron(self, now):
        """Have cron look for jobs that it was told of while it did not hear."""
        if CRON_CHANNEL not in self._in_force[1]:
            return NEVER
        if self._cron_due <= now:
            self._cron_due = now + RETRY
            self.listener.deliver([Notify(0, CRON_CHANNEL, name) for name in self._all_databases()])
            self._cron_due = NEVER
        return self._cron_due

    def _check(self, now):
        """See that what is sent arrives; if it does not, say why and have us reconnect.

        What arrives anyway is as good as what we would send, and one that sends is enough
        for all that listen: NOTIFY wakes every one of them.
        """
        session, channels = self._in_force
        if session is None or not (channels or session.facts.pooled):
            return NEVER
        first = session.confirmed != channels
        if not first:
            self._check_due = max(self._check_due, min(self._seen[1], session.heard_at) + self._span)
        if now < self._check_due:
            return self._check_due
        self._check_due = now + RETRY
        interval = self._options.check_interval and max(self._options.check_interval, SHORTEST_CHECK_INTERVAL)
        patience = min(CHECK_TIMEOUT, interval / 3 or CHECK_TIMEOUT)
        token, leaked = uuid.uuid4().hex, []
        self.listener.expect(token)
        try:
            with contextlib.closing(self._open(self.listener.database)) as ordinary:
                facts, began = ordinary.examine(), time.monotonic()
                snapshot = ordinary.row(_SNAPSHOT)[0]
                elsewhere = (facts.started, facts.database) != (session.facts.started, session.facts.database)
                sends = first or elsewhere or session.heard_at + 0.98 * self._span <= now
                if sends:
                    # At first to nobody else; a pooler may have kept the LISTEN of somebody on the other channel.
                    ordinary.execute(NOTIFY, (session.check_channel if first else HEARTBEAT_CHANNEL, token))
                    leaked = [one for one in ordinary.receive() if one.payload == token]
        except (psycopg2.Error, OSError) as error:
            if self._sender_works:
                text = "can't tell whether the listener of database %s hears: sending fails: %s"
                text += "; trying again, the listener is left as it is"
                _logger.warning(text, self.listener.database, error)
            self._sender_works = False
            return self._check_due
        self._sender_works = True
        if sends and not self.listener.hears(session, patience):
            # What was lost meanwhile has told why.
            if self.listener.session is session:
                direct = session.examined()
                # Who says no LISTEN was handed the connection that we said it on.
                direct = direct._replace(pooled=direct.pooled or bool(leaked))
                self.listener.replace(session, log.DEAF, connection.why_deaf(direct, facts))
            return self._check_due
        self._last_check = time.monotonic()
        if sends:
            self.listener.confirm(session, channels, self._last_check - began)
        seen, self._seen = self._seen, (snapshot, now)
        if BUS_CHANNEL in channels and self._dropped == self.listener.dropped:
            # What was there at the last look has been notified before what has been heard since.
            self._backlog.heard_up_to(*(self._seen if sends else seen))
        if not first and self._better(session):
            self.listener.replace(session, log.MOVED, "there is a better one to listen through")
        # So that a verdict is there when the interval is over; at random, so that one speaks first.
        longest = interval - patience - connection.PROBE_TIMEOUT if interval else NEVER
        self._span = longest * random.uniform(0.9, 1)
        self._check_due = min(now, session.heard_at) + self._span
        return self._check_due

    def _poll(self, now):
        """While no LISTEN is confirmed, have bus_bus looked into instead."""
        since, interval = self.listener.deaf_since, self._options.poll_interval
        interval = interval and max(interval, SHORTEST_POLL_INTERVAL)
        session = self.listener.session
        if since is None:
            if self._polling:
                _logger.info("the listener of database %s has taken over from polling", self.listener.database)
            self._polling = False
        elif session is not None and session.confirmed:
            return NEVER  # the listener is about to tell
        elif interval and BUS_CHANNEL in self.listener.wanted:
            if now < since + GRACE:
                return since + GRACE
            due = now + interval * self._polling
            self._backlog.owe(self._with_bus(), due, afresh=not self._polling)
            if not self._polling:
                text = "nothing listens on database %s: looking into bus_bus every %g s instead"
                text += ", so that notifications arrive late but arrive"
                _logger.warning(text, self.listener.database, interval)
            self._polling = True
            return due
        return NEVER

    # What they are made of ------------------------------------------------------

    def _state(self):
        one = self.listener
        return one.in_force, one.gained, one.wanted, one.dropped, one.deaf_since

    def _guarded(self, step, now):
        try:
            return step(now)
        except (psycopg2.Error, OSError) as error:
            _logger.debug("%s: %s", step.__name__, error)
        except Exception as error:
            # Better a supervisor with a bug than none.
            log.log_bug(_logger, error)
        return now + RETRY

    def _give_missed(self, now):
        failed = self._backlog.pay(self._give, now)
        for database, (error, delay) in failed.items():
            if delay == catchup.LONGEST_DELAY and log.rarely(("owed", database)):
                text = "can't look into bus_bus of database %s for what was missed: %s; trying again until it works"
                _logger.warning(text, database, error)
        if failed:
            for database in set(failed).difference(self._all_databases()):
                self._databases.discard(database)
                self._backlog.forget(database)

    def _give(self, channels):
        fit = [one for one in channels if readable("[%s]" % one, self.listener.series)]
        return not fit or self.listener.deliver([Notify(0, BUS_CHANNEL, "[%s]" % ",".join(fit))])

    def _with_bus(self):
        """Return the databases that may hold a bus_bus."""
        # A copy, made in one go: other threads add to it. Odoo keeps nothing in postgres.
        return frozenset(list(self._databases)) - {"postgres"}

    def _all_databases(self):
        with contextlib.closing(self._open(self.listener.database)) as ordinary:
            return ordinary.row(_DATABASES)[0]

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Check that the listener receives what is sent; if it does not, find out why, and look up what it missed.

`Supervisor.round` checks the listener, looks up in bus_bus what it missed, polls while nothing listens, and writes the
listener's log lines. So a notification of the bus is late by about ``check_interval`` at most if a path dies silently
while the pooler works, and by about ``poll_interval`` while nothing listens. None is lost. Scheduled actions are up to
a minute late while nothing listens: Odoo has a timer for them. Notifications on other channels may be lost; the
listeners there get an error, see `cursor.Feed.tell`.

After a loss, in order:

1. `Listener._live`, in the listener's thread, forgets the session and sets ``deaf_since``. The log shows "lost the
   listener". A leader tells its followers that it has no session, so they lose theirs as well. If the process of the
   leader ends instead, this is no outage: one of its followers becomes the leader, and the others join it.
2. `Listener.run`, in that thread, gets a new session from `sharing.Sharing.connect`: at once, unless many sessions were
   lost within seconds, or none works at the moment (see `listener.Backoff`). A follower usually joins its leader again,
   and waits for the leader's new session for up to a minute. Then it tries the next rank, or connects by itself.
3. `Listener._listen`, in that thread, LISTENs again: through a pooler, on the check channel alone until a first token
   has arrived (see step 5). Each channel gets a new number in ``Listener.in_force``.
4. `Supervisor._note_changes` sees the new numbers. For the bus, `catchup` searches all databases that this process has
   used, through the pooler, starting at a mark from before the loss, and `Supervisor._deliver` puts what it finds into
   the feeds. This does not wait for step 5, unless step 3 does. Cron is woken for each database.
5. `Supervisor._check` sends a token, and through a pooler a second one. When the last token has arrived, the log shows
   "listening again".

If step 5 has not succeeded `GRACE` seconds after the loss, and if polling is on and the bus listens, the log shows
"nothing listens", and `Supervisor._poll` repeats the look-ups of step 4 until step 5 succeeds. Leader and followers do
all this for themselves, each with its own log lines: a leader passes on what its session receives, nothing else.

The supervisor has a thread of its own (a greenlet under gevent): it uses pooled connections, and a pooler that hangs
must not delay notifications. Checks and look-ups run side by side in that thread, as `tasks`, so a database that hangs
delays neither checks nor other databases.
"""

import collections
import contextlib
import logging
import os
import random
import time
import uuid

import psycopg2
from psycopg2.extensions import Notify

from . import catchup, connection, log, lookup, tasks
from .payload import BUS_CHANNEL, CRON_CHANNEL, HEARTBEAT_CHANNEL, quote, readable

_logger = logging.getLogger(__name__)

# The modes of a listener.
#: Notifications arrive at once, as a token has shown.
LISTENING = "listening"
#: The same, through the leader.
SHARED = "shared"
#: Notifications arrive late: if Odoo's bus waits for any, bus_bus is polled or soon will be; Odoo's own timer starts
#: scheduled actions. The server or the path to it is down, or an option is wrong: see the log.
POLLING = "polling"
#: Nothing arrives: the pooler is down as well, or polling is off.
DEAF = "deaf"

# Seconds to wait for a token after its commit; less if check_interval is below 15 s, see `Supervisor._patience`.
# `listener.Listener.wait_for_token` may add up to one second.
CHECK_TIMEOUT = 5.0
# Seconds. Shorter intervals are raised to these, since each check or look-up is a login at the pooler.
SHORTEST_CHECK_INTERVAL, SHORTEST_POLL_INTERVAL = 3.0, 1.0
# Seconds without a confirmed LISTEN until polling begins.
GRACE = 2.0
# Seconds until a step that failed is repeated. Where the delay doubles, it is at most the second number.
RETRY, LONGEST_RETRY = 2.0, 60.0
# Seconds between two look-ups of what a full feed dropped.
DROPPED_INTERVAL = 5.0
# Seconds. While look-ups are under way, rounds follow each other at least this often.
SLICE = 0.5
# Seconds between two log lines about databases that stay pending: at first, and at most. The interval doubles.
FIRST_REMINDER, LONGEST_REMINDER = 60.0, 3600.0
# The share of PostgreSQL's notification queue above which a warning is due.
MOST_QUEUE_USAGE = 0.5
NEVER = float("inf")
# An SQLSTATE.
INSUFFICIENT_PRIVILEGE = "42501"

# From 14.0 on, Odoo sends with the function that this variable names; the addon does so in every series. A custom
# function is not qualified, so that PostgreSQL finds it as it does for Odoo.
_FUNCTION = os.environ.get("ODOO_NOTIFY_FUNCTION", "")
NOTIFY = "SELECT %s(%%s, %%s)" % ("pg_catalog.pg_notify" if _FUNCTION in ("", "pg_notify") else quote(_FUNCTION))
# All names are qualified, see `connection`.
_SNAPSHOT = "SELECT pg_catalog.txid_current_snapshot()::pg_catalog.text, pg_catalog.pg_notification_queue_usage()"


#: ``moment``: a `lookup.Moment` before the token was sent; ``sent_at``: monotonic seconds, None if no token was
#: sent; ``leaked``: whether the sender received the token itself
_Attempt = collections.namedtuple("_Attempt", "moment sent_at leaked")
#: the `lookup.Moment` of the last successful check, and when that check began (monotonic seconds)
_Seen = collections.namedtuple("_Seen", "moment at")


class Supervisor(object):
    """Watch over ``listener`` until it is closed.

    ``opening(database)`` is a task (see `tasks`) that returns a pooled `connection.Connection`.
    ``databases`` are the `catchup.Databases` that may hold a bus_bus, ``backlog`` is the
    `catchup.Backlog` of the process, and ``options`` are the `settings.Settings`.
    ``better(session)`` returns whether there is a better session, see `sharing.Sharing.better`.
    ``configured`` are the databases to which Odoo is limited, if any.
    """

    def __init__(self, listener, opening, databases, backlog, options, better=lambda session: False, configured=()):
        self.listener = listener
        self._opening = opening
        self._databases = databases
        self._configured = frozenset(configured)
        self._backlog = backlog
        self._options = options
        self._better = better
        self._began = time.monotonic()
        self._in_force = None, {}
        self._dropped, self._dropped_due = 0, 0.0
        self._cron_due = self._check_due = NEVER
        #: seconds to wait if the databases can't be listed; None: the role may not list them
        self._list_delay = RETRY
        self._polling = False
        self._poll_due = 0.0
        #: the tasks that run side by side in this thread
        self._tasks = tasks.Tasks()
        #: when to log the next line about databases that stay pending (monotonic seconds), and the seconds from
        #: that line to the one after it
        self._reminder_due, self._reminder = 0.0, FIRST_REMINDER
        self._sender_works = True
        self._last_check = None
        #: seconds from the last check, or from the notification that it relied on, to the next check
        self._span = NEVER
        self._seen = None

    def run(self):
        """Do a `round` whenever something changes or is due. Raises nothing."""
        while not self.listener.has_ended():
            seen = self._state()
            seconds = self.round(time.monotonic()) - time.monotonic()
            self.listener.wait(lambda seen=seen: self._state() != seen, min(max(seconds, 0), 3600))
        # Databases whose look-up is under way stay pending, for the next listener.
        self._tasks.close()
        # If the last feed was garbage-collected, nothing has called close().
        self.listener.close()
        self.listener.journal.write(NEVER)

    def round(self, now):
        """Do what is due at ``now``, monotonic seconds; return when the next round is due.

        While look-ups are under way it waits for them, until one of them ends, the listener changes,
        another step is due or a `SLICE` is over.
        """
        self.listener.supervisor_waker.clear()
        steps = (self._note_changes, self._check, self._wake_cron, self._poll, self._look_up, self._write_log)
        due = min([self._guarded(step, now) for step in steps])
        if self._tasks:
            due = self._guarded(self._run_tasks, min(due, now + SLICE))
        return due

    @property
    def mode(self):
        """How notifications arrive: LISTENING, SHARED, POLLING or DEAF."""
        deaf_since, session = self.listener.deaf_since, self.listener.session
        if deaf_since is None:
            return LISTENING if session is None or session.leader_pid is None else SHARED
        if self._polling and (self._backlog.works or not self._with_bus()):
            return POLLING
        soon = time.monotonic() - deaf_since < GRACE
        return POLLING if soon or BUS_CHANNEL not in self.listener.wanted else DEAF

    def status(self):
        """Return the state of the listener, a dictionary for `health`."""
        session, channels = self.listener.in_force
        round_trip = session and session.round_trip
        return {
            "mode": self.mode,
            "problem": self._problem(),
            "reconnects": max(self.listener.lives - 1, 0),
            "listening": bool(channels),
            "confirmed": session is not None and session.confirmed is not None,
            "seconds_since_check": self._last_check and round(time.monotonic() - self._last_check, 3),
            "round_trip_ms": round_trip and round(round_trip * 1000, 3),
            "counters": dict(self.listener.counters),
        }

    def _problem(self):
        """Return what is wrong, in words that are safe to show to anybody; None if nothing is wrong."""
        mode = self.mode
        if mode == DEAF:
            return "notifications do not arrive"
        if mode == POLLING:
            return "nothing listens, so notifications arrive late"
        if not self._sender_works:
            return "notifications can't be sent through the pooled connection"
        interval, last = self._check_interval(), self._last_check
        if interval and last is not None and time.monotonic() - last > interval + CHECK_TIMEOUT:
            return "the last check of the listener is older than the check interval"
        return None

    # The steps. Each returns the time (monotonic seconds) at which to call it again unless something changes first.

    def _note_changes(self, now):
        """Plan what a new session, new channels or a full feed require."""
        before, self._in_force = self._in_force, self.listener.in_force
        if self._in_force != before:
            self._check_due = now
        if BUS_CHANNEL in self.listener.wanted:
            self._backlog.begin(now)
        gained = {name for name, number in self._in_force[1].items() if before[1].get(name) != number}
        if BUS_CHANNEL in gained:
            self._backlog.add_pending(self._with_bus(), now, afresh=True)
        # Do not wake cron for the first session if this listener has just started: cron would run at once instead of
        # after its usual minute.
        if CRON_CHANNEL in gained and (self.listener.lives > 1 or now - self._began > GRACE):
            self._cron_due = now
        if self._dropped == self.listener.dropped:
            return NEVER
        # While a feed is full, it drops what a look-up finds as well. So the look-up must not be repeated at once.
        if now >= self._dropped_due:
            self._dropped, self._dropped_due = self.listener.dropped, now + DROPPED_INTERVAL
            self._backlog.add_pending(self._with_bus(), now)
        return self._dropped_due

    def _look_up(self, now):
        """Start the look-ups that are due."""
        channels = self.listener.wanted if self._polling else self._in_force[1]
        if BUS_CHANNEL not in channels:
            return NEVER
        self._backlog.start(self._tasks, self._deliver, now)
        for database in self._backlog.take_gone():
            self._databases.forget(database)
        if not self._backlog.stuck(now):
            self._reminder_due, self._reminder = 0.0, FIRST_REMINDER
        elif now >= self._reminder_due:
            self._reminder_due = now + self._reminder
            self._reminder = min(2 * self._reminder, LONGEST_REMINDER)
            self._tasks.start(self._reminding())
        return self._backlog.next_due(now)

    def _wake_cron(self, now):
        """Make cron look for jobs that were announced while nothing listened."""
        if CRON_CHANNEL not in self._in_force[1]:
            return NEVER
        if self._cron_due <= now:
            self._cron_due = NEVER
            self._tasks.start(self._waking_cron())
        return self._cron_due

    def _check(self, now):
        """Check that notifications arrive. If they do not, find out why and make the listener reconnect.

        A session with new channels has to receive a token that this process sent. After that, any
        notification shows that the session still works. So it is enough if one process sends a
        heartbeat, since all processes that listen in the database receive it.
        """
        session, numbers = self._in_force
        if session is None or not (numbers or session.facts.pooled):
            return NEVER
        channels = frozenset(numbers)
        proven = session.confirmed == channels
        if proven:
            self._check_due = max(self._check_due, min(self._seen.at, session.heard_at) + self._span)
        if now < self._check_due:
            return self._check_due
        self._check_due = now + RETRY
        attempt = self._send_token(session, proven, now)
        if attempt is None:
            return self._check_due
        if attempt.sent_at is not None and not self.listener.wait_for_token(session, self._patience(), self._wait):
            self._give_up(session, attempt)
            return self._check_due
        self._note_success(session, channels, attempt, now)
        if proven and self._better(session):
            self.listener.replace(session, log.MOVED, "there is a better connection to share")
        return self._check_due

    def _send_token(self, session, proven, now):
        """Send a token unless a notification of another process shows that ``session`` works.

        Return an `_Attempt`; None if the pooled connection does not work.
        """
        try:
            attempt = self._finish(self._sending_token(session, proven, now))
        except (psycopg2.Error, OSError) as error:
            self._sender_works = False
            if not self.listener.has_ended() and log.rarely(("sending", self.listener.database)):
                text = "can't check the listener of database %s, since sending a notification fails: %s"
                text += "; trying again, while the listener stays connected"
                self._log(_logger.warning, text, self.listener.database, error)
            return None
        self._sender_works = True
        return attempt

    def _sending_token(self, session, proven, now):
        """A task: see `_send_token`."""
        token = uuid.uuid4().hex
        self.listener.expect(token)
        pooled = yield from self._opening(self.listener.database)
        with contextlib.closing(pooled):
            facts = yield from pooled.examining()
            snapshot, queue_usage = yield from pooled.asking_row(_SNAPSHOT, columns=2)
            if queue_usage > MOST_QUEUE_USAGE and log.rarely("queue"):
                yield from self._reporting_queue(pooled, queue_usage)
            moment = lookup.Moment(snapshot, facts.started)
            if proven and not self._needs_token(session, facts, now):
                return _Attempt(moment, None, False)
            sent_at = time.monotonic()
            yield from pooled.asking(NOTIFY, (self._token_channel(session, proven), token))
            leaked = any(each.payload == token for each in pooled.receive())
            return _Attempt(moment, sent_at, leaked)

    def _reporting_queue(self, pooled, usage):
        """A task: warn that PostgreSQL's notification queue is filling up; ``usage`` is the share that is in use."""
        oldest = yield from connection.finding_oldest_transaction(pooled)
        text = "PostgreSQL's notification queue is %.0f%% full, because a listening connection is in a long"
        text += " transaction. End it, or every NOTIFY will fail once the queue is full. The oldest transaction: %s"
        self._log(_logger.warning, text, 100 * usage, oldest)

    def _needs_token(self, session, sender, now):
        """Return whether only a token of this process can show that the proven ``session`` still receives."""
        if (sender.started, sender.database) != (session.facts.started, session.facts.database):
            return True
        # PgDog before 0.1.52 mixes up channels of the same name in two databases. So a notification that arrives
        # through a pooler may come from another database. A leader checks this for its followers.
        behind_pooler = session.facts.pooled and session.leader_pid is None
        return behind_pooler or session.heard_at + 0.98 * self._span <= now

    def _token_channel(self, session, proven):
        # A session that has received no token yet may be behind a pooler that kept the LISTEN of another process. So
        # the first token goes to the check channel, on which only this session listens. Behind a pooler, the second
        # token has to arrive on a channel that has the same name in all databases, as Odoo's channels do.
        if proven or (session.facts.pooled and session.confirmed is not None):
            return HEARTBEAT_CHANNEL
        return session.check_channel

    def _give_up(self, session, attempt):
        # The end of a session that was lost meanwhile has been reported already.
        if self.listener.session is session:
            task = session.explaining(self._examining, attempt.sent_at, attempt.leaked)
            kind, reason = self._finish(task)
            self.listener.replace(session, kind, reason)

    def _examining(self):
        """A task: return the `connection.Facts` on a new pooled connection."""
        return (yield from connection.examining_once(self._opening(self.listener.database)))

    def _note_success(self, session, channels, attempt, now):
        self._last_check = time.monotonic()
        last_seen, self._seen = self._seen, _Seen(attempt.moment, now)
        # Notifications arrive in the order of commits. So once a token has arrived, the notifications of all
        # transactions that are visible in a snapshot taken before it was sent have arrived too. A notification of
        # another process may be older than our snapshot, so it proves this only for the snapshot of the previous check.
        heard = last_seen
        if attempt.sent_at is not None:
            self.listener.confirm(session, channels, self._last_check - attempt.sent_at)
            heard = self._seen
        if BUS_CHANNEL in channels and self._dropped == self.listener.dropped:
            self._backlog.heard_up_to(*heard)
        interval = self._check_interval()
        # A failure has to be known when the interval is over, so the check begins earlier. Each process begins at a
        # random moment, so that the first one sends for all.
        longest = interval - self._patience() - connection.PROBE_TIMEOUT if interval else NEVER
        self._span = longest * random.uniform(0.9, 1)
        self._check_due = min(now, session.heard_at) + self._span

    def _check_interval(self):
        """Return the configured interval in seconds, raised to the minimum if need be; 0 if checks are off."""
        interval = self._options.check_interval
        return interval and max(interval, SHORTEST_CHECK_INTERVAL)

    def _patience(self):
        """Return the seconds that a token may take to arrive."""
        return min(CHECK_TIMEOUT, self._check_interval() / 3 or CHECK_TIMEOUT)

    def _write_log(self, now):
        """Write the log lines of both threads. This is the last step, since a log handler may block.

        During an outage, or while look-ups are under way, the lines wait for `log.LOG_DELAY`.
        """
        is_calm = self.listener.deaf_since is None and not self._tasks
        self.listener.journal.write(NEVER if is_calm else now)
        return self.listener.journal.due

    def _poll(self, now):
        """While no LISTEN is confirmed, poll bus_bus instead."""
        since, interval = self.listener.deaf_since, self._options.poll_interval
        interval = interval and max(interval, SHORTEST_POLL_INTERVAL)
        session = self.listener.session
        if since is None:
            if self._polling:
                text = "the listener of database %s has taken over from polling"
                self._log(_logger.info, text, self.listener.database)
            self._polling = False
        elif session is not None and session.confirmed:
            return NEVER  # the listener is about to report it
        elif interval and BUS_CHANNEL in self.listener.wanted:
            if now < since + GRACE:
                return since + GRACE
            if not self._polling:
                text = "nothing listens on database %s: polling bus_bus every %g s instead"
                text += "; notifications arrive late, but none is lost"
                self._log(_logger.warning, text, self.listener.database, interval)
                self._backlog.add_pending(self._with_bus(), now, afresh=True)
            self._polling = True
            if now < self._poll_due:
                return self._poll_due
            # A round follows each look-up. With many databases this step is slow, so do not repeat it in every round.
            self._poll_due = now + SHORTEST_POLL_INTERVAL / 4
            self._backlog.poll(self._last_used(now), interval, now)
            # By then Odoo may have used another database, which has to be polled too.
            return now + interval
        return NEVER

    # The parts of these steps -----------------------------------------------------

    def _state(self):
        listener = self.listener
        return listener.in_force, listener.wanted, listener.dropped, listener.deaf_since, listener.journal.due

    def _log(self, write, *args):
        """Have `_write_log` call ``write(*args)``: checks and look-ups come first."""
        self.listener.journal.add(write, *args)

    def _guarded(self, step, now):
        try:
            return step(now)
        except (psycopg2.Error, OSError) as error:
            _logger.debug("%s: %s", step.__name__, error)
        except Exception as error:
            # A bug must not end the supervisor.
            log.log_bug(_logger, error)
        return now + RETRY

    def _run_tasks(self, until):
        self._tasks.run(until, self.listener.supervisor_waker)
        # A task has ended, the listener has changed, or something else is due.
        return 0.0

    def _wait(self, condition, seconds):
        """Wait at most ``seconds`` for ``condition()``, or until the listener is closed; return ``condition()``.

        Meanwhile look-ups go on, and those that become due begin: waiting for one database delays no other.
        """
        deadline = time.monotonic() + seconds
        while not condition() and not self.listener.has_ended():
            self.listener.supervisor_waker.clear()
            now = time.monotonic()
            if condition() or now >= deadline:
                break
            due = min([deadline] + [self._guarded(step, now) for step in (self._poll, self._look_up)])
            if self._tasks:
                self._guarded(self._run_tasks, min(due, now + SLICE))
            elif self.listener.wait(condition, max(due - now, 0)) or due == deadline:
                break
        return condition()

    def _finish(self, task):
        """Run ``task`` to its end and return its value. Look-ups go on meanwhile."""
        outcome = []
        self._tasks.start(_noting(task, outcome))
        self._wait(lambda: outcome, NEVER)
        if not outcome:
            raise psycopg2.OperationalError("the listener is closed")
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def _deliver(self, channels):
        texts = [each for each in channels if readable("[%s]" % each, self.listener.series)]
        is_delivered = not texts or self.listener.deliver([Notify(0, BUS_CHANNEL, "[%s]" % ",".join(texts))])
        if is_delivered:
            self.listener.counters["notifications_caught_up"] += len(texts)
        return is_delivered

    def _last_used(self, now):
        """Return when the databases that may hold a bus_bus were last used."""
        # The database postgres has no bus_bus.
        return {name: at for name, at in self._databases.last_used(now).items() if name != "postgres"}

    def _with_bus(self):
        """Return the databases that may hold a bus_bus."""
        return frozenset(self._last_used(time.monotonic()))

    def _waking_cron(self):
        """A task: wake cron at once for the known databases, then for all others on the server."""
        known = self._configured.union(self._with_bus())
        self.listener.deliver([Notify(0, CRON_CHANNEL, name) for name in sorted(known)])
        try:
            _all_names, connectable, _started = yield from self._listing_databases()
        except (psycopg2.Error, OSError) as error:
            _logger.debug("can't list databases: %s", error)
            if self._list_delay is not None:
                self._cron_due = min(self._cron_due, time.monotonic() + self._list_delay)
                self._list_delay = min(2 * self._list_delay, LONGEST_RETRY)
        else:
            self.listener.deliver([Notify(0, CRON_CHANNEL, name) for name in connectable if name not in known])

    def _reminding(self):
        """A task: log how many of the databases that still exist can't be searched, with an example.

        Also log which databases have a bus_bus that is too large.
        """
        try:
            names, _connectable, started = yield from self._listing_databases()
            self._backlog.forget_missing(names, started)
        except (psycopg2.Error, OSError) as error:
            _logger.debug("can't list databases: %s", error)
        failing = self._backlog.stuck(time.monotonic())
        if failing:
            first = min(failing)
            text = "can't look up missed notifications in bus_bus of %d database(s), for example of %s: %s"
            text += "; trying again"
            self._log(_logger.warning, text, len(failing), first, failing[first])
        for database in self._backlog.too_large():
            text = "bus_bus of database %s has too many rows to be looked up in %g s; delete old ones"
            self._log(_logger.warning, text, database, catchup.LOOK_UP_TIMEOUT)

    def _listing_databases(self):
        """A task: return what `lookup.listing` does.

        Raises ``psycopg2.Error`` or ``OSError``. Once the server has said that the role may not do this, it is not
        asked again.
        """
        if self._list_delay is None:
            raise psycopg2.ProgrammingError("the role may not list databases")
        opened = yield from self._opening(self.listener.database)
        with contextlib.closing(opened):
            try:
                found = yield from lookup.listing(opened)
            except psycopg2.Error as error:
                if getattr(error, "sqlstate", None) == INSUFFICIENT_PRIVILEGE:
                    self._list_delay = None
                raise
        self._list_delay = RETRY
        return found


def _noting(task, outcome):
    """A task: append the value of ``task`` and the error that it raised to ``outcome``; one of them is None."""
    value, error = None, psycopg2.OperationalError("interrupted")
    try:
        value = yield from task
        error = None
    except Exception as raised:
        error = raised
    finally:
        # This runs as well if the task is closed because the process has run out of descriptors.
        outcome.append((value, error))

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Decide in which databases to look up missed notifications, when, and in how many at a time.

The module `lookup` queries one database.

Look-ups run side by side in the supervisor's thread, as `tasks`, so that a database that does not answer does not delay
the others. There are two kinds: quick look-ups have a short deadline, and several may run at a time; slow ones have a
long deadline, and few may run at a time. After a look-up that failed or took long, the next one of that database is
slow. After many failures, as when the pooler itself is down, look-ups are rare until one succeeds.

A look-up that gets no answer stays pending for `PENDING_FOR` seconds, unless there is conclusive evidence that the
database is gone, see `Backlog.forget`.
"""

import collections
import contextlib
import logging
import math
import threading
import time

import psycopg2

from . import connection, lookup, tasks
from .lookup import Mark, Moment

_logger = logging.getLogger(__name__)

# Seconds. Odoo commits rows first and sends their NOTIFY in another transaction, so the NOTIFY may arrive up to
# `MARGIN` seconds after its rows are visible in a snapshot.
MARGIN = 10.0
# Seconds: the deadlines of quick and of slow look-ups, for one statement in the server. A quick look-up as a whole has
# the same deadline; a slow one as a whole gets 10 s more.
QUICK_TIMEOUT, LOOK_UP_TIMEOUT = 1.0, 30.0
# How many look-ups of either kind may run at a time.
QUICK_AT_ONCE, SLOW_AT_ONCE = 5, 2
# Seconds until a database is asked again after a failure: the first delay, which doubles, and the longest. A quick
# look-up that ran out of time is repeated at once, as a slow one.
FIRST_DELAY, LONGEST_DELAY = 2.0, 10.0
# A budget of look-ups without an answer: its size, how much it grows per second, and how much of it is reserved for
# quick look-ups. When it is used up, look-ups wait.
FAILURES, FAILURES_EACH_SECOND, RESERVED = 50, 0.5, 10
# The pooler is considered down after FAILURES_IN_A_ROW quick look-ups that got no answer, without any answer in
# between, if the last answer is older than SILENCE seconds.
FAILURES_IN_A_ROW, SILENCE = 3, 10.0
# Seconds after which the log mentions a database whose look-ups fail.
STUCK = 10.0
# Seconds. Odoo deletes the rows of bus_bus after a day, so a look-up that was pending for longer would find nothing.
PENDING_FOR = 86400.0
# Look-ups take at most this part of the time while polling. But a single slow look-up delays the next one of its
# database by at most LONGEST_PAUSE seconds, since that one may be fast.
SHARE_OF_TIME, LONGEST_PAUSE = 0.1, 60.0
# A database that Odoo has not used for UNUSED seconds is polled only every UNUSED_INTERVAL seconds.
UNUSED, UNUSED_INTERVAL = 3600.0, 600.0
# How many channels Odoo's loop gets at a time, and the seconds in between, since each channel may wake clients that
# need cursors. The portions are larger if there would be more than MOST_PORTIONS.
PORTION, PAUSE, MOST_PORTIONS = 10, 0.2, 50

#: ``since``: the `Mark` after which rows may have been missed; ``overlap``: whether to go further back by date as well;
#: ``added``, ``due``: monotonic seconds; ``delay``: seconds to wait if it fails; ``error``: why it failed last, or
#: None; ``failing``: since when, monotonic seconds; ``too_slow``: how often the server could not read all rows in time
_Pending = collections.namedtuple("_Pending", "since overlap added due delay error failing too_slow")


class Databases(set):
    """The databases that Odoo has used, and when. The set itself has those added since the last call of `last_used`.

    ``add(name)`` is inherited from set, since it has to be fast: any thread of Odoo may call it for each new cursor.
    """

    def __init__(self, names=()):
        super().__init__(names)
        self._used = {}

    def last_used(self, now):
        """Return ``{name: monotonic seconds}``; a database that was added since the last call counts as used now."""
        # list() copies the set in one step, while other threads add to it.
        added = list(self)
        self.difference_update(added)
        for name in added:
            self._used[name] = now
        return dict(self._used)

    def forget(self, name):
        """Forget a database that does not exist any more."""
        self.discard(name)
        self._used.pop(name, None)


class Backlog(object):
    """The pending databases, and what is known about each. Each process has one backlog.

    A supervisor uses it if its listener listens on the bus. Odoo has one such listener in a process. If another addon
    adds one on another database, the lock keeps both supervisors from starting the same look-up; nothing else that
    both may change at once is protected.

    ``opening(database)`` is a task (see `tasks`) that returns a pooled `connection.Connection`.
    Each database has its own marks, so a database that stays pending does not affect the others.
    """

    def __init__(self, opening):
        self._opening = opening
        self._began = None
        #: marks up to which all notifications were received, in all databases of the cluster
        self._heard = collections.deque(maxlen=20)
        #: database -> mark of its last look-up
        self._marks = {}
        #: database -> the server's own name for it and the server's start time, as of the last look-up
        self._reached = {}
        #: database -> monotonic time at which its last look-up that got an answer began, and the seconds that the
        #: faster of the last two took
        self._asked = {}
        #: database -> seconds that its last look-up with an answer took
        self._took = {}
        self._pending = {}
        #: database -> whether its look-up under way is of the slow kind
        self._in_flight = {}
        # The databases that answered the last look-up, and those whose next look-up is a slow one.
        self._answered, self._slow = set(), set()
        self._gone = set()
        #: how many quick look-ups got no answer since the last answer; monotonic seconds of that answer
        self._failures, self._answered_at = 0, 0.0
        #: how many more look-ups may fail, and the monotonic seconds at which this number was set
        self._may_fail, self._may_fail_at = FAILURES, 0.0
        self._lock = threading.Lock()

    def begin(self, now):
        """Ignore rows older than `lookup.OVERLAP` seconds before ``now``; only the first call counts."""
        if self._began is None:
            self._began = now

    def heard_up_to(self, moment, now):
        """Record that the notifications for all rows visible at ``moment``, a `Moment`, have arrived or are on the way.

        A snapshot applies to all databases of a cluster. Pending databases stay pending.
        """
        self._heard.append(Mark(now, moment, []))

    def add_pending(self, databases, now, afresh=False):
        """Rows may have been missed in ``databases``: look them up at once, or after a delay if the last try failed.

        ``afresh``: True if LISTEN was not in force until now; then look up at once, and further back by date as well.
        """
        self.begin(now)
        for database in databases:
            pending = self._pending.get(database) or self._new(database, now, now)
            if afresh or pending.error is None:
                pending = pending._replace(due=min(pending.due, now))
            # The new tuple tells `_finish` that a look-up under way began before this call, so that it plans another.
            self._pending[database] = pending._replace(overlap=pending.overlap or afresh)

    def poll(self, last_used, interval, now):
        """Make each database due ``interval`` seconds after its last look-up.

        ``last_used``: what `Databases.last_used` returns. The interval is longer for databases that have not
        been used for a long time, and if look-ups would take more than `SHARE_OF_TIME`; see `LONGEST_PAUSE`.
        """
        self.begin(now)
        used = {database for database, at in last_used.items() if now - at < UNUSED}
        quick = [self._asked[database][1] for database in used.intersection(self._asked).difference(self._slow)]
        interval = max(interval, sum(quick) / min(max(len(quick), 1), QUICK_AT_ONCE) / SHARE_OF_TIME)
        for database, used_at in last_used.items():
            asked_at, seconds = self._asked.get(database, (now, 0.0))
            shortest = interval if now - used_at < UNUSED else max(interval, UNUSED_INTERVAL)
            due = asked_at + max(shortest, min(seconds / SHARE_OF_TIME, LONGEST_PAUSE))
            pending = self._pending.get(database)
            if pending is None:
                self._pending[database] = self._new(database, now, due)
            elif pending.error is None and due < pending.due:
                # The database is used again.
                self._pending[database] = pending._replace(due=due)

    def forget(self, database):
        """Forget a database that no longer exists.

        The caller needs conclusive evidence. PostgreSQL's error "database does not exist" is conclusive if
        the look-up itself got it. PgBouncer's "no such database" is not, since its configuration may be
        incomplete. A list of databases is conclusive only if an earlier look-up reached a database of this
        name on the server that gave the list, see `forget_missing`. Without such evidence a database stays
        pending for `PENDING_FOR`, and is asked every `LONGEST_DELAY` seconds, or less often if many do not answer.

        A database in which Odoo's search_path finds no bus_bus stops being pending too, since nothing can have
        been sent from it. A module update replaces a table in one transaction, so nobody sees the
        database without it; and during a restore nothing is sent that would have to be looked up. But such a
        database is not forgotten, and keeps its mark.
        """
        for known in (self._pending, self._marks, self._reached, self._asked, self._took):
            known.pop(database, None)
        self._answered.discard(database)
        self._slow.discard(database)
        self._gone.add(database)

    def forget_missing(self, names, started):
        """Forget failing databases that no longer exist.

        ``names``: all databases of a server; ``started``: when that server was started, which identifies it.
        """
        failing = [database for database, pending in list(self._pending.items()) if pending.error is not None]
        for database in failing:
            if database not in names and self._reached.get(database) == (database, started):
                self.forget(database)

    def take_gone(self):
        """Return the databases that were forgotten since the last call."""
        gone, self._gone = self._gone, set()
        return gone

    def stuck(self, now):
        """Return ``{database: error}`` of the databases that have been failing for `STUCK` seconds."""
        pending = list(self._pending.items())
        return {name: each.error for name, each in pending if each.error is not None and now - each.failing >= STUCK}

    def too_large(self):
        """Return the databases whose bus_bus the server could not read in time, at least twice."""
        return sorted(name for name, each in list(self._pending.items()) if each.too_slow > 1)

    @property
    def works(self):
        """Whether databases answer when they are asked."""
        is_away = self._failures >= FAILURES_IN_A_ROW and time.monotonic() - self._answered_at > SILENCE
        return bool(self._answered) and not is_away

    def next_due(self, now):
        """Return the monotonic seconds at which `start` has something to do; infinite if it has nothing to do.

        Call `start` as well whenever a look-up ends.
        """
        due = float("inf")
        free_at = {is_slow: self._free_at(is_slow, now) for is_slow in (False, True)}
        for database, pending in list(self._pending.items()):
            # A look-up under way causes a call of `start` when it ends, unless its supervisor is ending as well.
            at = now + LONGEST_DELAY if database in self._in_flight else free_at[database in self._slow]
            due = min(due, max(at, pending.due))
        return due

    def start(self, running, deliver, now):
        """Start the due look-ups that may run now, as tasks of ``running``, a `tasks.Tasks`.

        ``deliver(channels)`` gets the channels of new rows, as JSON texts, and returns whether it
        accepted them. If it did not, the database stays pending.
        """
        began = time.monotonic()
        # Resolving a host name may block the thread. If it does, leave the other look-ups for later, so that other
        # steps have their turn.
        while time.monotonic() < began + QUICK_TIMEOUT:
            with self._lock:
                database = self._next(now)
                pending = self._pending.get(database)
                if pending is None:
                    return
                self._in_flight[database] = database in self._slow
            running.start(self._looking_up(database, pending, deliver, now, running.attended))

    # When -------------------------------------------------------------------------

    def _new(self, database, now, due):
        asked = self._marks.get(database, Mark(self._began, Moment(None, None), []))
        # The listener may have been lost while a notification was on its way. So rely only on marks that are well
        # before the last one.
        heard = list(self._heard)
        sure = [mark for mark in heard if mark.at <= heard[-1].at - MARGIN]
        since = max(sure + [asked], key=lambda mark: mark.at)
        return _Pending(since, False, now, due, FIRST_DELAY, None, None, 0)

    def _free_at(self, is_slow, now):
        """Return the monotonic seconds at which a look-up of that kind may start, as far as is known now."""
        under_way = list(self._in_flight.values())
        if under_way.count(is_slow) >= (SLOW_AT_ONCE if is_slow else QUICK_AT_ONCE):
            return now + LONGEST_DELAY
        # Each look-up under way may fail as well.
        needed = 1 + len(under_way) + (RESERVED if is_slow else 0)
        return now + max(needed - self._allowance(now), 0) / FAILURES_EACH_SECOND

    def _allowance(self, now):
        """Return how many look-ups may fail now."""
        return min(self._may_fail + (now - self._may_fail_at) * FAILURES_EACH_SECOND, FAILURES)

    def _next(self, now):
        """Return the database whose look-up is to be started now, or None."""
        due = [item for item in list(self._pending.items()) if item[1].due <= now and item[0] not in self._in_flight]
        for is_slow in (False, True):
            waiting = [(pending.due, database) for database, pending in due if (database in self._slow) is is_slow]
            if waiting and self._free_at(is_slow, now) <= now:
                return min(waiting)[1]
        return None

    # Look up ----------------------------------------------------------------------

    def _looking_up(self, database, pending, deliver, now, clock):
        """A task: look up ``database``, deliver what is found, and note the result."""
        began, at = time.monotonic(), clock()
        timeout, longest = QUICK_TIMEOUT, QUICK_TIMEOUT
        if database in self._slow:
            timeout, longest = LOOK_UP_TIMEOUT, LOOK_UP_TIMEOUT + 2 * connection.QUERY_TIMEOUT
        try:
            channels, mark = yield from tasks.within(longest, self._asking(database, pending, timeout, now), clock)
            self._note_answer(database, clock() - at, now)
            is_delivered = yield from _delivering(channels, deliver)
            if is_delivered:
                self._finish(database, pending, mark)
            else:
                self._retry(database, pending, now + time.monotonic() - began)
        except (psycopg2.Error, OSError) as error:
            self._note_failure(database, pending, error, now, time.monotonic() - began)
        finally:
            self._in_flight.pop(database, None)

    def _asking(self, database, pending, timeout, now):
        """A task: return the channels that have new rows, and the new `Mark`, None if there is no bus_bus."""
        opened = yield from self._opening(database)
        with contextlib.closing(opened):
            found = yield from lookup.looking_up(opened, pending.since, pending.overlap, timeout, now)
        if found.mark is not None:
            self._reached[database] = found.database, found.mark.moment.started
        return found.channels, found.mark

    # Its result -------------------------------------------------------------------

    def _note_answer(self, database, seconds, now):
        if self._failures >= FAILURES_IN_A_ROW:
            # The pooler is back, so databases that could not be asked need not wait any longer.
            self._may_fail, self._may_fail_at = FAILURES, now
        self._failures, self._answered_at = 0, now + seconds
        self._answered.add(database)
        # A look-up that was under way when an outage ended may be slow for that reason. So the interval grows only if
        # two look-ups in a row are slow.
        before, self._took[database] = self._took.get(database, QUICK_TIMEOUT), seconds
        self._asked[database] = now, min(seconds, before)
        if seconds <= QUICK_TIMEOUT:
            self._slow.discard(database)
        else:
            self._slow.add(database)

    def _finish(self, database, done, mark):
        """Record that the look-up for ``done``, a `_Pending`, ended with ``mark``, which is None without a bus_bus."""
        if mark is not None:
            self._marks[database] = mark
        pending = self._pending.get(database)
        if pending is done:
            del self._pending[database]
        elif pending is not None and mark is not None:
            # More rows may have been missed since the look-up began, so look up again, from the new mark on.
            self._pending[database] = pending._replace(since=mark)

    def _note_failure(self, database, pending, error, began, seconds):
        _logger.debug("can't look up database %s: %s", database, error)
        if _is_gone(error, database):
            self.forget(database)
            return
        now = began + seconds
        was_quick = database not in self._slow
        self._answered.discard(database)
        self._slow.add(database)
        if lookup.has_answered(error):
            self._failures, self._answered_at = 0, now
        else:
            self._may_fail, self._may_fail_at = self._allowance(now) - 1, now
            self._failures += was_quick
        self._retry(database, pending, now, error, was_quick and seconds >= QUICK_TIMEOUT)

    def _retry(self, database, tried, now, error=None, at_once=False):
        """Plan another look-up after the one for ``tried``, a `_Pending`: later, or ``at_once`` with more time."""
        pending = self._pending.get(database)
        if pending is None:
            return
        if now - pending.added > PENDING_FOR:
            del self._pending[database]
            return
        if at_once:
            pending = pending._replace(due=now)
        elif pending is tried:
            pending = pending._replace(due=now + pending.delay, delay=min(2 * pending.delay, LONGEST_DELAY))
        if error is not None:
            failing = now if pending.error is None else pending.failing
            is_too_slow = getattr(error, "sqlstate", None) == "57014" and not at_once
            pending = pending._replace(error=error, failing=failing, too_slow=pending.too_slow + is_too_slow)
        self._pending[database] = pending


def _delivering(channels, deliver):
    """A task: deliver ``channels`` in portions; return whether all were accepted."""
    size = max(PORTION, math.ceil(len(channels) / MOST_PORTIONS))
    for first in range(0, len(channels), size):
        if first:
            yield from tasks.sleep(PAUSE)
        if not deliver(channels[first : first + size]):
            return False
    return True


def _is_gone(error, database):
    """Return whether PostgreSQL says that there is no such ``database``, at every address of the pooler."""
    # psycopg2 has no SQLSTATE for errors at login, so compare the text. In another language it does not match, and the
    # database stays pending.
    words = 'database "%s" does not exist' % database
    return all(words in str(reason) for reason in getattr(error, "reasons", [error]))

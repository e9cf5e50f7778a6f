# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Which databases are to be looked up, when, and how many at a time; see `lookup` for how.

Look-ups run side by side in one thread, as `tasks`, so that a database that does not
answer delays no other. Databases that answered last time have most of the places, and
little time. The others have fewer places and more time, and are asked ever more rarely.
All together may fail some times in a row; once they have, as when the pooler itself is
away, look-ups are few until one succeeds.

Only conclusive evidence ends a pending look-up without an answer, see `Backlog.forget`.
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

# Seconds. NOTIFY follows the commit of its rows in a transaction of its own: rows
# this much older than a snapshot may still have their NOTIFY before them.
MARGIN = 10.0
# Seconds for one look-up, in the server too: of a database that answered in time last time, of any other.
QUICK_TIMEOUT, LOOK_UP_TIMEOUT = 1.0, 30.0
# How many look-ups of either kind run at a time.
QUICK_AT_ONCE, SLOW_AT_ONCE = 5, 2
# Seconds until a database that did not answer is asked again, doubling.
FIRST_DELAY, LONGEST_DELAY = 2.0, 10.0
# So many look-ups may get no answer at once, and so many each second. Some are reserved for
# databases that answered last time.
FAILURES, FAILURES_EACH_SECOND, RESERVED = 50, 0.5, 10
# The pooler seems to be away if so many databases in a row fail that answered last time, and none
# has answered for so many seconds.
FAILURES_IN_A_ROW, SILENCE = 3, 10.0
# Seconds after which a look-up that fails is worth a line of the log.
STUCK = 10.0
# Seconds. Odoo deletes the rows of bus_bus after a day: what is pending for longer finds nothing any more.
PENDING_FOR = 86400.0
# Look-ups take at most this part of the time while polling. But after one that was slow, the next one of that
# database begins within so many seconds, since it may be fast.
SHARE_OF_TIME, LONGEST_PAUSE = 0.1, 60.0
# Seconds since its last use after which a database is rarely polled, and how rarely.
UNUSED, UNUSED_INTERVAL = 3600.0, 600.0
# Channels given to Odoo's loop at a time, and seconds between: each may wake a client that
# needs a cursor. If there are very many, there are at most so many portions.
PORTION, PAUSE, MOST_PORTIONS = 10, 0.2, 50

#: ``since``: `Mark` from which on rows may have been missed; ``overlap``: whether to go further back by date as well;
#: ``added``, ``due``: monotonic seconds; ``delay``: seconds to wait if it fails; ``error``: why it failed last,
#: or None; ``failing``: since when, monotonic seconds; ``too_slow``: how often the server did not read it all in time
_Pending = collections.namedtuple("_Pending", "since overlap added due delay error failing too_slow")


class Databases(set):
    """The databases that Odoo works on, and when it last did.

    ``add(name)`` is that of a set, since every cursor of Odoo calls it. Any thread may.
    """

    def __init__(self, names=()):
        super().__init__(names)
        self._used = {}

    def last_used(self, now):
        """Return ``{name: monotonic seconds}``; a database that was added since the last call was used now."""
        # A copy, made in one step: other threads add to it.
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
    """The databases that are pending, and what is known of each; one for each process.

    ``opening(database)`` is a task (see `tasks`) that returns a pooled `connection.Connection`.
    Each database has marks of its own: one that stays pending does not affect the others.
    """

    def __init__(self, opening):
        self._opening = opening
        self._began = None
        #: marks of when all was heard, in all databases of the cluster
        self._heard = collections.deque(maxlen=20)
        #: database -> mark of its last look-up
        self._marks = {}
        #: database -> name and start of the server's database that its last look-up reached
        self._reached = {}
        #: database -> monotonic seconds of its last look-up that succeeded, and seconds that it took
        self._asked = {}
        #: database -> seconds that its last look-up took
        self._took = {}
        self._pending = {}
        #: database -> whether its look-up under way is of the slow kind
        self._in_flight = {}
        # Of the databases that were asked: those that answered last time, and those that did not do so in time.
        self._answered, self._slow = set(), set()
        self._gone = set()
        #: how many failed in a row though they had answered before, and monotonic seconds of the last answer
        self._failures, self._answered_at = 0, 0.0
        #: how many more may fail, as of so many monotonic seconds
        self._may_fail, self._may_fail_at = FAILURES, 0.0
        self._lock = threading.Lock()

    def begin(self, now):
        """Ignore all rows that are older than ``now``, unless this was called before."""
        if self._began is None:
            self._began = now

    def heard_up_to(self, moment, now):
        """Take note that all rows that ``moment``, a `Moment`, shows have been notified, or are about to be.

        Snapshots hold for all databases of a cluster. Databases that are pending stay so.
        """
        self._heard.append(Mark(now, moment, []))

    def add_pending(self, databases, now, afresh=False):
        """Rows may have been missed up to now: look up ``databases`` at once, or when their delay is over.

        ``afresh``: the server is just back: look up at once, and further back by date as well.
        """
        self.begin(now)
        for database in databases:
            pending = self._pending.get(database) or self._new(database, now, now)
            if afresh or pending.error is None:
                pending = pending._replace(due=min(pending.due, now))
            # A new tuple, by which a look-up under way finds out that it may have begun too early.
            self._pending[database] = pending._replace(overlap=pending.overlap or afresh)

    def poll(self, last_used, interval, now):
        """See that each database is looked up again ``interval`` seconds after the last time.

        ``last_used``: as of `Databases`. The interval is longer if look-ups would take more than
        `SHARE_OF_TIME`, but see `LONGEST_PAUSE`, and for databases that were not used for long.
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
        """The database does not exist any more.

        This needs conclusive evidence. PostgreSQL's own words "database does not exist" are, on the way
        of that very look-up; PgBouncer's "no such database" is not, since its configuration may be
        incomplete. Neither is a list of databases, unless that way is known to have led to a
        database of this name on the very server that the list is of, see `forget_missing`. Without
        such evidence a database is pending for `PENDING_FOR`, and is asked ever more rarely.

        A database without a table bus_bus is evidence as well, given the search_path that Odoo uses: nothing
        can have been sent from there. A module update replaces a table in one transaction, so that nobody sees
        the database without it; and while a restore is under way, nothing is sent that would have to be looked up.
        But the mark of the database does not move.
        """
        for known in (self._pending, self._marks, self._reached, self._asked, self._took):
            known.pop(database, None)
        self._answered.discard(database)
        self._slow.discard(database)
        self._gone.add(database)

    def forget_missing(self, names, started):
        """Forget databases that fail, and are not among ``names``, all those of the server of that start."""
        failing = [database for database, pending in list(self._pending.items()) if pending.error is not None]
        for database in failing:
            if database not in names and self._reached.get(database) == (database, started):
                self.forget(database)

    def take_gone(self):
        """Return the databases that were forgotten since the last call."""
        gone, self._gone = self._gone, set()
        return gone

    def stuck(self, now):
        """Return ``{database: error}`` of those that have been failing for `STUCK` seconds."""
        pending = list(self._pending.items())
        return {name: each.error for name, each in pending if each.error is not None and now - each.failing >= STUCK}

    def too_large(self):
        """Return the databases whose bus_bus could not be read in time, several times."""
        return sorted(name for name, each in list(self._pending.items()) if each.too_slow > 1)

    @property
    def works(self):
        """Whether databases answer when they are asked."""
        is_away = self._failures >= FAILURES_IN_A_ROW and time.monotonic() - self._answered_at > SILENCE
        return bool(self._answered) and not is_away

    def next_due(self, now):
        """Return the monotonic seconds at which `start` has something to do; infinite: never.

        The end of a look-up under way may be a reason, too.
        """
        due = float("inf")
        free_at = {is_slow: self._free_at(is_slow, now) for is_slow in (False, True)}
        for database, pending in list(self._pending.items()):
            # What is under way ends before that, unless it is another supervisor's that ends itself.
            at = now + LONGEST_DELAY if database in self._in_flight else free_at[database in self._slow]
            due = min(due, max(at, pending.due))
        return due

    def start(self, running, deliver, now):
        """Start the look-ups that are due, and that there is a place for, as tasks of ``running``, a `tasks.Tasks`.

        ``deliver(channels)`` is called with channels that got rows, as JSON texts; it
        returns whether it took them, else the database stays pending.
        """
        began = time.monotonic()
        # The resolver of host names may block: then other steps come before the next look-up.
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
        # A notification may have been on its way to a listener already lost: only
        # what was heard well before the last sign of life is sure.
        heard = list(self._heard)
        sure = [mark for mark in heard if mark.at <= heard[-1].at - MARGIN]
        since = max(sure + [asked], key=lambda mark: mark.at)
        return _Pending(since, False, now, due, FIRST_DELAY, None, None, 0)

    def _free_at(self, is_slow, now):
        """Return when a look-up of that kind may start, as far as is known now."""
        under_way = list(self._in_flight.values())
        if under_way.count(is_slow) >= (SLOW_AT_ONCE if is_slow else QUICK_AT_ONCE):
            return now + LONGEST_DELAY
        # All that is under way may fail as well.
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
        """A task: look up ``database``, deliver what is found, and take note of the result."""
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
        """A task: return the channels that got rows, and the `Mark` that this sets, or None."""
        opened = yield from self._opening(database)
        with contextlib.closing(opened):
            found = yield from lookup.looking_up(opened, pending.since, pending.overlap, timeout, now)
        if found.mark is not None:
            self._reached[database] = found.database, found.mark.moment.started
        return found.channels, found.mark

    # Its result -------------------------------------------------------------------

    def _note_answer(self, database, seconds, now):
        if self._failures >= FAILURES_IN_A_ROW:
            # The pooler is back: those that could not be asked need not wait any longer.
            self._may_fail, self._may_fail_at = FAILURES, now
        self._failures, self._answered_at = 0, now + seconds
        self._answered.add(database)
        # A look-up that was under way when an outage ended says nothing of the next one: only the second slow one
        # counts.
        before, self._took[database] = self._took.get(database, QUICK_TIMEOUT), seconds
        self._asked[database] = now, min(seconds, before)
        if seconds <= QUICK_TIMEOUT:
            self._slow.discard(database)
        else:
            self._slow.add(database)

    def _finish(self, database, done, mark):
        """The look-up that ``done``, a `_Pending`, describes is over, and set ``mark`` unless that is None."""
        if mark is not None:
            self._marks[database] = mark
        pending = self._pending.get(database)
        if pending is done:
            del self._pending[database]
        elif pending is not None and mark is not None:
            # Something may have been missed since.
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
        """Look ``database`` up again later, or with more time ``at_once``: ``tried``, a `_Pending`, was in vain."""
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
    """A task: deliver ``channels`` in portions; return whether all were taken."""
    size = max(PORTION, math.ceil(len(channels) / MOST_PORTIONS))
    for first in range(0, len(channels), size):
        if first:
            yield from tasks.sleep(PAUSE)
        if not deliver(channels[first : first + size]):
            return False
    return True


def _is_gone(error, database):
    """Return whether PostgreSQL says that there is no such ``database``, at all addresses of the pooler."""
    # psycopg2 has no SQLSTATE of errors at login. A server that speaks another language leaves it open.
    words = 'database "%s" does not exist' % database
    return all(words in str(reason) for reason in getattr(error, "reasons", [error]))

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The cursor and the connection that a listener uses, in Odoo or in another addon.

Such a listener executes LISTEN on an Odoo cursor, selects on the cursor's connection
``_cnx``, polls it, and takes notifications from its ``notifies``. `listening_class` derives
the class of such a cursor from Odoo's own; its connection is a `ListeningConnection`.

- LISTEN and UNLISTEN go to the `listener.Listener` of the process. They need a pooled connection only if they have
  parameters or are not a ``str``.
- All other statements run on a pooled connection, as on an ordinary cursor. The first such
  statement opens it; only ``SELECT pg_is_in_recovery()`` is answered without one. Until LISTEN is executed, the cursor
  keeps this connection, as ordinary cursors do; from then on, only until commit or rollback.
- The `ListeningConnection` outlives both the pooled connections and the direct one.

Since the class is derived from Odoo's, commit, rollback and close run Odoo's own code and hooks.
"""

import collections
import contextlib
import functools
import logging
import os
import re

import psycopg2
from psycopg2 import extensions, sql

from .payload import BUS_CHANNEL, CRON_CHANNEL, fold, fold_plain
from .waker import Waker

_logger = logging.getLogger(__name__)

# How many seconds Odoo's loop waits for LISTEN to be in force. After that, the loop continues without it.
LISTEN_TIMEOUT = 5.0
# How many notifications may wait for Odoo's loop. Further ones are dropped; see `listener.Listener.deliver`.
FEED_SIZE = 5000

#: matches what may be a LISTEN or UNLISTEN
begins_with_listen = re.compile(r"\s*(?:un)?listen\b", re.IGNORECASE).match
_LISTEN = re.compile(r'\s*(un)?listen\s+(?:"((?:[^"]|"")+)"|([\w$]+|\*))\s*(?:;\s*|\Z)', re.IGNORECASE)
# Odoo executes this before LISTEN. The addon's listener is connected to a primary or waits for one, so the answer
# "false" needs no connection. Thus a cron thread can open its cursor during an outage.
_IN_RECOVERY = re.compile(r"\s*select\s+pg_is_in_recovery\(\)\s*;?\s*\Z", re.IGNORECASE)
# Odoo's own channels. After a gap, the supervisor looks up what the bus missed and wakes cron, so nothing is lost on
# either.
CAUGHT_UP = frozenset([BUS_CHANNEL, CRON_CHANNEL])


class Feed(object):
    """A selectable queue of notifications, which looks like a psycopg2 connection.

    Any thread may call `put` and `interrupt`. The listener's thread calls `tell`, and Odoo's thread calls the other
    methods. No method of this class waits long for another thread, see `Waker`, so a finalizer may call `close` at any
    time.
    """

    #: whether this process reads the feed; False for a `sharing.Follower`, a feed that another process reads
    local = True

    def __init__(self):
        self.notifies = []
        self.closed = 0
        #: the channels whose notifications the listener has to `put`
        self.channels = frozenset()
        #: notifications, and between them the errors that `poll` has to raise
        self._pending = collections.deque()
        self._waker = Waker()
        #: channel -> number of the last LISTEN that was in force, see `tell`
        self._numbers = {}
        #: the feed's channels, if the last commit returned before LISTEN was in force on all of them; `tell` removes
        #: each one once it is in force
        self._relied_on_early = set()

    def put(self, notifications):
        """Queue ``notifications`` for the next `poll`, and wake the thread that selects.

        Return how many did not fit because nobody has called `poll`.
        """
        if self.closed or not notifications:
            return 0
        room = max(FEED_SIZE - len(self._pending), 0)
        self._pending.extend(notifications[:room])
        self._waker.wake()
        dropped = max(len(notifications) - room, 0)
        if dropped and self.channels - CAUGHT_UP:
            self.interrupt("notifications were dropped, since they were not fetched in time")
        return dropped

    def interrupt(self, reason):
        """Have `poll` raise ``psycopg2.OperationalError(reason)`` once, and wake the thread that selects.

        Notifications that were put before this call are delivered by a `poll` before the one that raises, later ones by
        a `poll` after it. Several interruptions in a row raise one error.
        """
        if self.closed or isinstance(self._last_pending(), psycopg2.Error):
            return
        self._pending.append(psycopg2.OperationalError(reason))
        self._waker.wake()

    def tell(self, facts, numbers):
        """Interrupt if notifications may have been lost because the loop relied on LISTEN while it was not in force.

        ``numbers``: the feed's channels that are in force, each with a number that changes with each new LISTEN. Gaps
        on Odoo's own channels do not count, see `CAUGHT_UP`.
        """
        channels = self.channels
        kept = {name: number for name, number in self._numbers.items() if name in channels}
        gaps = [name for name in numbers if kept.get(name, numbers[name]) != numbers[name]]
        gaps += [name for name in list(self._relied_on_early) if name in numbers and name not in kept]
        self._numbers = dict(kept, **numbers)
        # In place, since Odoo's thread may add to it at the same time.
        self._relied_on_early.difference_update(numbers)
        if set(gaps) - CAUGHT_UP:
            reason = "LISTEN was not in force for a while: notifications on channels other than Odoo's may be lost"
            self.interrupt(reason)

    def rely(self, is_in_force):
        """Record that commit is about to return. From then on, Odoo's loop relies on the channels.

        ``is_in_force``: whether LISTEN is in force on all channels of the feed.
        """
        self._relied_on_early.clear()
        if not is_in_force:
            self._relied_on_early.update(self.channels)

    def _last_pending(self):
        # The thread that polls may remove the last element at any moment.
        try:
            return self._pending[-1]
        except IndexError:
            return None

    def fileno(self):
        return self._waker.fileno()

    def poll(self):
        """Move what has arrived to ``notifies``; return psycopg2's ``POLL_OK``.

        Raises ``psycopg2.OperationalError`` after `interrupt`; the feed remains usable.
        """
        self._check_open()
        self._waker.clear()
        error = None
        if self._pending and isinstance(self._pending[0], psycopg2.Error):
            error = self._pending.popleft()
        else:
            while self._pending and not isinstance(self._pending[0], psycopg2.Error):
                self.notifies.append(self._pending.popleft())
            # Cron's loop never removes notifications.
            del self.notifies[:-FEED_SIZE]
        if self._pending:
            self._waker.wake()
        if error:
            raise error
        return extensions.POLL_OK

    def close(self):
        self.closed = 1
        self._waker.close()

    def _check_open(self):
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")


class ListeningConnection(Feed):
    """The connection of a listening cursor, for as long as that cursor is open.

    ``open_pooled()`` returns an ordinary Odoo cursor. ``start_listening(feed)`` returns the
    `listener.Listener` that serves ``feed`` from then on; it is called at the first LISTEN.

    `commit` and `listen` may wait until LISTEN is in force. A finalizer may call `close`, which takes two locks:
    ``Listener.changed``, which is re-entrant (see `listener`), and, as for any Odoo cursor, that of Odoo's pool.

    All other attributes are those of the pooled connection.
    """

    def __init__(self, open_pooled, start_listening):
        super(ListeningConnection, self).__init__()
        self._open_pooled = open_pooled
        self._start_listening = start_listening
        self._listener = None
        self._pid = os.getpid()
        #: the ordinary cursor that has the current transaction, or None
        self._pooled = None
        self._autocommit = False
        #: name -> function that applies a setting to a pooled connection; in the order of the calls, since a later
        #: setting may override an earlier one
        self._settings = collections.OrderedDict()

    @property
    def is_pooled(self):
        """Whether there is a pooled connection now."""
        return self._pooled is not None

    def pooled(self):
        """Return the ordinary cursor that has the current transaction; open one if there is none."""
        self._check_open()
        if self._pooled is None:
            pooled = self._open_pooled()
            for apply in list(self._settings.values()):
                apply(pooled._cnx)
            self._pooled = pooled
        return self._pooled

    def adopt(self, cursor):
        """Take over the pooled connection of ``cursor``, an open ordinary cursor, with its transaction."""
        self._pooled = _FirstTransaction(cursor, self)
        if cursor._cnx.autocommit:
            self.autocommit = True

    def listen(self, statements):
        """Execute ``statements``, pairs of a bool (whether it is UNLISTEN) and a channel or ``*``."""
        self._check_open()
        channels = self.channels
        for stops, channel in statements:
            if not stops:
                channels |= {channel}
            else:
                channels = frozenset() if channel == "*" else channels - {channel}
        if channels == self.channels:
            return
        if self._listener is None:
            self._listener = self._start_listening(self)
        self._listener.listen(self, channels)
        if self._autocommit:
            self._release()
            self._wait_for_listen()

    def commit(self):
        """Commit the transaction and wait until LISTEN is in force, as it is in PostgreSQL after the commit."""
        self._check_open()
        try:
            if self._pooled is not None:
                self._pooled._cnx.commit()
        finally:
            self._release_if_listening()
        self._wait_for_listen()

    def rollback(self):
        self._check_open()
        try:
            if self._pooled is not None:
                self._pooled._cnx.rollback()
        finally:
            self._release_if_listening()

    def close(self):
        if self.closed:
            return
        super(ListeningConnection, self).close()
        self._release()
        # In a forked child the listener is only a copy, and another thread of the parent may have held its lock during
        # the fork.
        if self._listener is not None and self._pid == os.getpid():
            self._listener.remove(self)

    def give_back(self, *_connection, **_keep_in_pool):
        """Close this connection.

        A closing cursor gives its connection back to its pool; this object is the connection and the pool.
        """
        self.close()

    # psycopg2 keeps these settings in the connection object, not in the server. So they are applied to each pooled
    # connection.

    @property
    def autocommit(self):
        return self._autocommit

    @autocommit.setter
    def autocommit(self, is_on):
        self._autocommit = bool(is_on)
        self._configure("autocommit", lambda connection: setattr(connection, "autocommit", is_on))

    def set_isolation_level(self, level):
        self._autocommit = level == extensions.ISOLATION_LEVEL_AUTOCOMMIT
        self._configure("isolation level", lambda connection: connection.set_isolation_level(level))

    def set_session(self, *arguments, **named):
        self._autocommit = bool(named.get("autocommit", self._autocommit))
        self._configure("session", lambda connection: connection.set_session(*arguments, **named))

    def _configure(self, name, apply):
        if self._pooled is not None:
            apply(self._pooled._cnx)
        self._settings.pop(name, None)
        self._settings[name] = apply

    def __getattr__(self, name):
        return getattr(self.pooled()._cnx, name)

    def _wait_for_listen(self):
        if self._listener is not None:
            self.rely(self._listener.wait_for_listen(self, LISTEN_TIMEOUT))

    def _release_if_listening(self):
        # Before LISTEN, the state of the session has to outlast the transaction, as on an ordinary cursor.
        if self._listener is not None:
            self._release()

    def _release(self):
        pooled, self._pooled = self._pooled, None
        if pooled is not None:
            # The transaction is over. The next one may get another connection.
            with contextlib.suppress(psycopg2.Error):
                pooled.close()


class _FirstTransaction(object):
    """The pooled connection that a cursor had when it executed LISTEN.

    The code that listens may have read ``cursor._cnx`` before, and may go on using that object. So the
    connection does not return to the pool; after `close`, the object does what ``feed`` does.
    """

    def __init__(self, cursor, feed):
        self._cnx = cursor._cnx
        self._obj = cursor._obj
        self._feed = feed
        self._pool = vars(cursor).get("_Cursor__pool")

    def close(self):
        if self._pool is None:
            # From 20.0 on, a cursor has no pool.
            self._cnx.give_back(keep_in_pool=False)
        else:
            self._pool.give_back(self._cnx, keep_in_pool=False)
        forward(self._cnx, self._feed)


def forward(connection, feed):
    """Make ``connection``, a closed instance of a subclass of psycopg2's connection, do whatever ``feed`` does."""

    def forwarding(name):
        return property(lambda self: getattr(feed, name), lambda self, value: setattr(feed, name, value))

    names = [name for name in dir(extensions.connection) if not name.startswith("__")]
    own_class = type(connection)
    connection.__class__ = type(own_class.__name__, (own_class,), {name: forwarding(name) for name in names})


class _ListeningCursor(object):
    """What a listening cursor does differently from Odoo's ``Cursor``, its other base class."""

    _is_closing = False
    _unanswered = None

    @property
    def _obj(self):
        """psycopg2's cursor. Odoo expects it to exist at all times, so reading this attribute opens it."""
        if self._is_closing:
            return _Closed()
        cursor = self._cnx.pooled()._obj
        if self._unanswered:
            query, self._unanswered = self._unanswered, None
            cursor.execute(query)
        return cursor

    @_obj.deleter
    def _obj(self):
        # Odoo deletes it when it closes the cursor.
        pass

    @property
    def connection(self):
        return self._cnx

    def execute(self, query, params=None, *args, **kwargs):
        self._unanswered = None
        text = beginning(query)
        if begins_with_listen(text):
            if params or not isinstance(query, str):
                text = self.mogrify(query, params).decode()
            statements = _listen_statements(text)
            if statements:
                self._cnx.listen(statements)
                return None
            line = "the statement %s contains more than LISTEN, so it goes to the pooler and no notification will"
            line += " arrive. Execute LISTEN in a statement of its own"
            _logger.warning(line, ascii(text[:80]))
        elif _IN_RECOVERY.match(text) and not self._cnx.is_pooled and not self.closed:
            self._unanswered = query
            return None
        return super(_ListeningCursor, self).execute(query, params, *args, **kwargs)

    def fetchone(self):
        if self._unanswered:
            self._unanswered = None
            return (False,)
        return self._obj.fetchone()

    def _close(self, *args, **kwargs):
        # Odoo closes ``_obj`` first. That must not open a connection.
        self._is_closing = True
        try:
            return super(_ListeningCursor, self)._close(*args, **kwargs)
        finally:
            self._cnx.close()


class _Closed(object):
    """Replaces psycopg2's cursor in a cursor that is closed or being closed."""

    def close(self):
        pass

    def __getattr__(self, name):
        raise psycopg2.InterfaceError("Cursor already closed")


class _NoPool(object):
    """Stands in for a pool, its connections and their cursors while Odoo creates a cursor without a connection."""

    readonly = False
    closed = 1

    @property
    def connection(self):
        return self

    def _return_itself(self, *_args, **_kwargs):
        return self

    borrow = cursor = set_isolation_level = set_session = execute = commit = _return_itself


#: a pool for cursors that can't do anything before `turn`
NO_POOL = _NoPool()


@functools.lru_cache()
def listening_class(base):
    """Derive the class of listening cursors from ``base``, the ``Cursor`` of Odoo, and return it."""
    return type("ListeningCursor", (_ListeningCursor, base), {})


def turn(cursor, connection):
    """Turn ``cursor``, an ordinary cursor of Odoo, into a listening cursor on ``connection``, a `ListeningConnection`.
    """
    content = vars(cursor)
    cursor.__class__ = listening_class(type(cursor))
    content.pop("_obj", None)
    if "_Cursor__pool" in content:
        content["_Cursor__pool"] = connection
    cursor._cnx = connection


def beginning(query):
    """Return the beginning of ``query`` as text. ``query`` may have any type that Odoo's cursors accept."""
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode("latin-1")
    if isinstance(query, sql.SQL):
        return query.string
    if isinstance(query, sql.Composed):
        return beginning(query.seq[0]) if query.seq else ""
    # odoo.tools.SQL (from 17.0 on) has its text in this attribute.
    return getattr(query, "code", "")


def _listen_statements(text):
    """Return pairs for `ListeningConnection.listen`; None if ``text`` contains anything but LISTEN and UNLISTEN."""
    statements, at = [], 0
    while at < len(text):
        match = _LISTEN.match(text, at)
        if match is None:
            return None
        stops, quoted, plain = match.groups()
        statements.append((bool(stops), fold(quoted.replace('""', '"')) if quoted else fold_plain(plain)))
        at = match.end()
    return statements

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""What Odoo's loops see of the listener: a cursor and, as its connection, a feed.

Odoo selects on the connection of the cursor that it said LISTEN on, polls it, and
takes the notifications from it. The feed is such a connection as long as the loop
runs, however often the real one is lost meanwhile. Whatever else a listener wants of
its cursor or connection it gets of an ordinary cursor, which lasts until the commit.
"""

import contextlib
import logging
import re
import socket
import threading

import psycopg2

from .log import rarely

_logger = logging.getLogger(__name__)

# Seconds to wait for PostgreSQL to listen before Odoo's loop goes on regardless.
LISTEN_TIMEOUT = 5.0
# Notifications that may wait for Odoo's loop; what it misses beyond is in bus_bus.
FEED_SIZE = 5000

_LISTEN = re.compile(r'\s*(un)?listen\s+(?:"((?:[^"]|"")+)"|([\w$]+|\*))\s*;?\s*\Z', re.IGNORECASE)
# Odoo asks it before LISTEN. Ours is on a primary or waits for one, so that this needs no
# connection, and a cron thread that opens its cursor in an outage does not die of it.
_IN_RECOVERY = re.compile(r"\s*select\s+pg_is_in_recovery\(\)\s*;?\s*\Z", re.IGNORECASE)


class Feed(object):
    """Stands in for a psycopg2 connection: selectable, with ``notifies``.

    `put` may be called by any thread, everything else by the one that listens.
    ``ordinary()`` returns a cursor whose connection has what this one has not.
    """

    autocommit = True

    def __init__(self, listener, ordinary):
        self.notifies = []
        self.closed = 0
        #: the names of the channels that `put` is to be called for
        self.channels = frozenset()
        self._listener, self._ordinary = listener, ordinary
        self._pending = []
        self._lock = threading.Lock()
        # In it there is a byte while something is pending: neither end ever blocks.
        self._reader, self._writer = socket.socketpair()

    def put(self, notifications):
        """Have ``notifications`` ready for the next `poll`, and wake who selects.

        Return False if there was no room for some, since nobody polls.
        """
        with self._lock:
            if self.closed or not notifications:
                return True
            if not self._pending:
                self._writer.send(b"\0")
            self._pending.extend(notifications[: FEED_SIZE - len(self._pending)])
            full = len(self._pending) == FEED_SIZE
        if full and rarely("full"):
            text = "Odoo's loop does not fetch its notifications: %d wait, more are dropped and looked up later"
            _logger.warning(text, FEED_SIZE)
        return not full

    def fileno(self):
        return self._reader.fileno()

    def poll(self):
        """Move what has arrived to ``notifies``; return psycopg2's ``POLL_OK``."""
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")
        with self._lock:
            if self._pending:
                self._reader.recv(1)
                self.notifies.extend(self._pending)
                # Cron's loop never takes any out.
                del self.notifies[:-FEED_SIZE]
                self._pending = []
        return psycopg2.extensions.POLL_OK

    def close(self):
        with self._lock:
            self.closed = 1
            self._reader.close()
            self._writer.close()
        self._listener.remove(self)

    def __getattr__(self, name):
        return getattr(self._ordinary()._cnx, name)


class ListeningCursor(object):
    """As much of Odoo's ``Cursor`` as is different for a listener.

    LISTEN and UNLISTEN go to ``listener``; for all else ``open_ordinary()`` opens a
    cursor as Odoo would have had, through the pooler.
    """

    def __init__(self, listener, database, open_ordinary):
        self.dbname = database
        self._listener = listener
        self._open_ordinary = open_ordinary
        self._opened = None
        self._rows = []
        self._cnx = self.connection = Feed(listener, self._ordinary)

    @property
    def closed(self):
        return bool(self._cnx.closed)

    def execute(self, query, params=None, *args, **kwargs):
        if self._cnx.closed:
            raise psycopg2.InterfaceError("Cursor already closed")
        text = query
        if params or not isinstance(query, str):
            # A connection is needed to put it together.
            text = self._ordinary().mogrify(query, params).decode()
        self._rows = [(False,)] if _IN_RECOVERY.match(text) else []
        match = _LISTEN.match(text)
        if match:
            stop, exact, plain = match.groups()
            channel = exact.replace('""', '"') if exact else plain.lower()
            wanted = self._cnx.channels - {channel} if stop else self._cnx.channels | {channel}
            self._listener.listen(self._cnx, frozenset() if plain == "*" else wanted)
        elif not self._rows:
            self._ordinary().execute(query, params, *args, **kwargs)

    def fetchone(self):
        return self._rows.pop() if self._rows else self._ordinary().fetchone()

    def commit(self):
        """Wait until LISTEN is in force, which in SQL it is from the commit on."""
        self._end_ordinary(commit=True)
        self._listener.wait_for_listen(self._cnx, LISTEN_TIMEOUT)

    def rollback(self):
        self._end_ordinary()

    def close(self):
        self._end_ordinary()
        self._cnx.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _traceback):
        with contextlib.closing(self):
            self._end_ordinary(commit=kind is None)

    def __getattr__(self, name):
        return getattr(self._ordinary(), name)

    def _ordinary(self):
        if self._opened is None:
            self._opened = self._open_ordinary()
        return self._opened

    def _end_ordinary(self, commit=False):
        opened, self._opened = self._opened, None
        if opened is not None:
            with contextlib.closing(opened):
                if commit:
                    opened.commit()

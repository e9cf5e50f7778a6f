# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""What Odoo's loops see of the listener: a cursor and, as its connection, a feed.

Odoo selects on the connection of the cursor that it said LISTEN on, polls it, and
takes the notifications from it. The feed is such a connection as long as the loop
runs, however often the real one is lost meanwhile.
"""

import logging
import re
import socket
import threading

import psycopg2
from psycopg2 import sql

from .listener import quoted

_logger = logging.getLogger(__name__)

# Seconds to wait for PostgreSQL to listen before Odoo's loop goes on regardless.
LISTEN_TIMEOUT = 5.0

_LISTEN = re.compile(
    r'\s*(un)?listen\s+(?:"((?:[^"]|"")+)"|([\w$]+)|(\*))\s*;?\s*\Z', re.IGNORECASE
)


class _Partial(object):
    """Tells ``_missing`` when more is wanted of it than there is."""

    def __getattr__(self, name):
        if not name.startswith("__") and "_missing" in self.__dict__:
            self._missing("%s.%s" % (type(self).__name__, name))
        raise AttributeError(name)


class Feed(_Partial):
    """Stands in for a psycopg2 connection: selectable, with ``notifies``.

    `put` may be called by any thread, everything else by the one that listens.
    ``missing(name)`` is told when that one wants more of a connection.
    """

    autocommit = True

    def __init__(self, listener, missing):
        self.notifies = []
        self.closed = 0
        #: the names of the channels that `put` is to be called for
        self.channels = frozenset()
        self.listener = listener
        self._missing = missing
        self._pending = []
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def put(self, notifications):
        """Have ``notifications`` ready for the next `poll`, and wake who selects."""
        with self._lock:
            if self.closed:
                return
            waking = not self._pending
            self._pending.extend(notifications)
            if waking:
                self._writer.send(b"\0")

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
                self._pending = []
        return psycopg2.extensions.POLL_OK

    def close(self):
        with self._lock:
            if self.closed:
                return
            self.closed = 1
        self.listener.remove(self)
        self._reader.close()
        self._writer.close()


class ListeningCursor(_Partial):
    """As much of Odoo's ``Cursor`` as a listener needs, on a `Feed`.

    LISTEN and UNLISTEN go to the listener; any other statement is answered by the
    server on the direct connection or, while there is none, by ``ordinary()``, a
    cursor of Odoo's. ``missing(name)``: see `Feed`.
    """

    def __init__(self, feed, database, ordinary, missing):
        self.dbname = database
        self._cnx = feed
        self._listener = feed.listener
        self._ordinary = ordinary
        self._missing = missing
        self._rows = []

    @property
    def connection(self):
        return self._cnx

    @property
    def closed(self):
        return bool(self._cnx.closed)

    def execute(self, query, params=None, log_exceptions=None):
        if self._cnx.closed:
            raise psycopg2.InterfaceError("Cursor already closed")
        if hasattr(query, "_sql_tuple"):  # odoo.tools.SQL from 19.1 on
            query, params = query._sql_tuple[:2]
        elif hasattr(query, "code") and hasattr(query, "params"):  # and before
            query, params = query.code, query.params
        if not isinstance(query, (str, bytes, sql.Composable)):
            self._missing("%s.execute(%s)" % (type(self).__name__, type(query).__name__))
            raise TypeError("not a statement: %r" % (query,))
        match = _LISTEN.match(_text(query, params))
        if match is None:
            self._rows = self._ask(query, params)
            return
        stop, exact, plain, everything = match.groups()
        channel = exact.replace('""', '"') if exact else (plain or "").lower()
        if stop:
            self._listener.unlisten(self._cnx, channel or None)
        elif not everything:
            self._listener.listen(self._cnx, channel)
        self._rows = []

    def fetchone(self):
        return self._rows.pop(0) if self._rows else None

    def fetchall(self):
        rows, self._rows = self._rows, []
        return rows

    def commit(self):
        """Wait until LISTEN is in force, which in SQL it is from the commit on."""
        self._listener.wait_for_listen(self._cnx, LISTEN_TIMEOUT)

    def rollback(self):
        self._rows = []

    def autocommit(self, _on):
        """Each statement is on its own anyway."""

    def close(self):
        self._cnx.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def __del__(self):
        # Odoo's loops close their cursors, others may forget.
        if "_cnx" in self.__dict__:
            self._cnx.close()

    def _ask(self, query, params):
        try:
            return self._listener.query(query, params) or []
        except psycopg2.OperationalError as error:
            _logger.debug("asking through the pooler instead: %s", error)
        with self._ordinary() as cursor:
            cursor.execute(query, params)
            return cursor.fetchall() if cursor.description else []


def _text(query, params):
    """Return what would be the statement if it is a LISTEN, whichever way it was put."""
    if isinstance(query, bytes):
        query = query.decode()
    if isinstance(query, sql.Composable):
        query = _composed(query)
    try:
        return query % (params if isinstance(params, dict) else tuple(params or ()))
    except (TypeError, ValueError):
        return query


def _composed(part):
    # psycopg2 itself wants a connection for this, and the direct one is elsewhere.
    if isinstance(part, sql.Composed):
        return "".join(map(_composed, part.seq))
    if isinstance(part, sql.Identifier):
        return ".".join(map(quoted, getattr(part, "strings", None) or (part.string,)))
    return getattr(part, "string", "")

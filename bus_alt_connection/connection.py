# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""A connection to PostgreSQL that never waits without a deadline.

psycopg2's ordinary connections wait in libpq for as long as the network likes, and
under gevent libpq's ``connect_timeout`` does not apply either. An asynchronous one
leaves the waiting to us: the same code, bounded, in threads and in greenlets.
"""

import selectors
import time

import psycopg2
from psycopg2 import extensions

from . import settings

# Seconds, for one host. ``connect_timeout`` replaces it, if it is one.
CONNECT_TIMEOUT = 5.0
# Seconds, for one statement.
QUERY_TIMEOUT = 5.0
# A path that died without a word is noticed in 15 + 3 * 5 seconds while it is idle,
# and in 10 while something is on the way. PostgreSQL's documentation of libpq tells
# which are seconds and which milliseconds.
KEEPALIVES = {
    "keepalives": 1,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
TCP_USER_TIMEOUT = 10000


class Connection(object):
    """One open connection, in autocommit mode, for one thread or greenlet.

    Every method raises ``psycopg2.OperationalError`` once the connection is lost or
    a deadline has passed; the connection is of no use then.
    """

    def __init__(self, parameters, timeout):
        self._cnx = psycopg2.connect(async_=1, **parameters)
        try:
            self._wait(timeout)
        except Exception:
            self.close()
            raise
        #: the process that libpq was told serves it; a pooler makes this up
        self.told_pid = self._cnx.get_backend_pid()
        self.server_version = self._cnx.server_version

    def execute(self, query, values=None, timeout=QUERY_TIMEOUT):
        """Run one statement and return its rows, or None if it has none."""
        cursor = self._cnx.cursor()
        cursor.execute(query, values)
        self._wait(timeout)
        del self._cnx.notices[:]
        return cursor.fetchall() if cursor.description else None

    def receive(self):
        """Return the notifications that have arrived, without waiting for any."""
        try:
            self._cnx.poll()
        except psycopg2.OperationalError as error:
            # Why the server hangs up arrives as a notice, if there is no statement.
            reason = (self._cnx.notices or [str(error)])[-1]
            raise psycopg2.OperationalError(reason) from None
        return self.take()

    def take(self):
        """Return the notifications that came along with something else."""
        notifications = list(self._cnx.notifies)
        del self._cnx.notifies[:]
        return notifications

    def fileno(self):
        return self._cnx.fileno()

    def close(self):
        self._cnx.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def _wait(self, timeout):
        deadline = time.monotonic() + timeout
        while True:
            state = self._cnx.poll()
            if state == extensions.POLL_OK:
                return
            event = selectors.EVENT_READ
            if state == extensions.POLL_WRITE:
                event = selectors.EVENT_WRITE
            # libpq may have gone on to another address, hence another descriptor.
            with selectors.DefaultSelector() as selector:
                selector.register(self._cnx.fileno(), event)
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise psycopg2.OperationalError("no answer in %g s" % timeout)


def connect(parameters, examine=None):
    """Return a `Connection` to the first host of ``parameters`` that takes us.

    ``examine`` is called with the connection and that host's parameters; it raises
    ``psycopg2.Error`` if the host is none that we can use. What it returns comes
    back beside the connection: ``(connection, what examine returned)``.

    Raises ``psycopg2.OperationalError`` with what each host had to say, without
    secrets.
    """
    lively = dict(KEEPALIVES)
    if extensions.libpq_version() >= 120000:
        lively["tcp_user_timeout"] = TCP_USER_TIMEOUT
    problems = []
    for one in settings.each_host(dict(lively, **parameters)):
        try:
            connection = Connection(one, _timeout(one))
            try:
                return connection, examine and examine(connection, one)
            except Exception:
                connection.close()
                raise
        except psycopg2.Error as error:
            where = settings.address(one)
            problems.append("%s: %s" % (where, settings.redact(error, one)))
    raise psycopg2.OperationalError(", ".join(problems))


def _timeout(parameters):
    seconds = int(parameters.get("connect_timeout") or 0)
    return seconds if seconds > 0 else CONNECT_TIMEOUT

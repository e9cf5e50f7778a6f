"""Sending on Odoo's bus as Odoo does it, from outside."""

import contextlib
import itertools
import json
import select
import threading
import time
from typing import NamedTuple

import psycopg2

from .odoo import series_number
from .waiting import wait_until

MESSAGE_TYPE = "bus_alt_connection"


class Sent(NamedTuple):
    id: int  # of the row in bus_bus
    at: float  # time.monotonic() right before the NOTIFY
    committed: float  # and right after its COMMIT


class BusSender:
    """Two connections, kept open: to the database of the messages, and to the one of the notifications.

    One that was lost in the meantime is replaced, as Odoo's pool of connections does; one that fails is given up, and
    the error passed on.

    :param stack: the :class:`~.stack.Stack` whose Odoo it sends as
    :param through: the server or the pooler that it connects to
    """

    def __init__(self, stack, through):
        self._stack = stack
        self._through = through
        self._with_database = series_number(stack.series) >= 15
        self._connections = {}

    def channel(self, name):
        """Return what Odoo makes of a channel that is a string: from 15.0 the database is part of it."""
        return [self._stack.database, name] if self._with_database else name

    def send(self, channel, message):
        """Insert ``message`` for ``channel``, and notify: in two transactions, as Odoo does. Returns :class:`Sent`."""
        row_id = self.insert(channel, message)
        at = time.monotonic()
        self.notify(_json([self.channel(channel)]))
        return Sent(row_id, at, time.monotonic())

    def insert(self, channel, message):
        """Insert a message without telling anyone; return the id of its row in ``bus_bus``."""
        if self._with_database:
            message = {"type": MESSAGE_TYPE, "payload": message}
        rows = self._transaction(
            self._stack.database,
            """
            INSERT INTO bus_bus (channel, message, create_uid, create_date, write_uid, write_date)
            VALUES (%s, %s, 1, now() AT TIME ZONE 'UTC', 1, now() AT TIME ZONE 'UTC')
            RETURNING id
            """,
            (_json(self.channel(channel)), _json(message)),
        )
        return rows[0][0]

    def notify(self, payload, channel="imbus"):
        """Send one notification with any text as payload."""
        self._transaction(self._stack.system_database, "SELECT pg_notify(%s, %s)", (channel, payload))

    def close(self):
        while self._connections:
            self._connections.popitem()[1].close()

    def _transaction(self, database, query, params):
        connection = self._connections.pop(database, None)
        if connection is None or _is_lost(connection):
            login = {"user": self._through.user, "password": self._through.password}
            connection = self._through.connect(database, **login, application_name="tests")
        try:
            with connection, connection.cursor() as cr:
                cr.execute(query, params)
                rows = cr.fetchall()
        except BaseException:
            connection.close()
            raise
        self._connections[database] = connection
        return rows


class Flow(threading.Thread):
    """Numbers that are sent as messages during the block, whatever happens meanwhile.

    :param sender: a :class:`BusSender`, which is closed in the end
    :param interval: seconds between two messages, or a function that returns them
    :param numbers: an iterator of the numbers; default: 0, 1, 2, and so on
    """

    def __init__(self, sender, channel, interval, numbers=None):
        super().__init__(daemon=True)
        #: number -> :class:`Sent`, of each message whose COMMIT was confirmed
        self.sent = {}
        #: how many messages could not be sent, or may have been
        self.refused = 0
        self._sender, self._channel = sender, channel
        self._interval = interval if callable(interval) else lambda: interval
        self._numbers = numbers or itertools.count()
        self._done = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self.join()

    def run(self):
        with contextlib.closing(self._sender):
            while not self._done.wait(self._interval()):
                number = next(self._numbers)
                try:
                    self.sent[number] = self._sender.send(self._channel, number)
                except psycopg2.Error:
                    self.refused += 1

    def wait_for(self, count):
        """Wait until so many more messages were sent."""
        count += len(self.sent)
        wait_until(lambda: len(self.sent) >= count, 120, "%d messages to be sent" % count)


def _is_lost(connection):
    # Nothing comes unasked for but the end.
    return bool(connection.closed or select.select([connection], [], [], 0)[0])


def _json(value):
    return json.dumps(value, separators=(",", ":"))

"""Look-ups of many databases leave room for others in a small PostgreSQL behind a real PgBouncer."""

import contextlib
import threading
import time

import psycopg2

from bus_alt_connection import catchup, connection
from bus_alt_connection.tasks import Tasks
from stack.pgbouncer import PgBouncer
from stack.postgres import PASSWORD, USER, PostgreSQL, libpq_parameters

NAMES = ["x%d" % number for number in range(30)]
TABLE = """
    CREATE TABLE bus_bus (id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar);
    ALTER TABLE bus_bus OWNER TO odoo
"""


class Client(threading.Thread):
    """Connects by ``connect(number)`` again and again; ``refusals``: what it was told in vain."""

    def __init__(self, connect):
        super().__init__(daemon=True)
        self._connect, self._ended = connect, threading.Event()
        self.count, self.refusals, self.longest = 0, [], 0.0

    def run(self):
        while not self._ended.wait(0.05):
            began = time.monotonic()
            try:
                with contextlib.closing(self._connect(self.count)) as opened, opened.cursor() as cr:
                    cr.execute("SELECT 1")
            except psycopg2.Error as error:
                self.refusals.append(str(error))
            self.count += 1
            self.longest = max(self.longest, time.monotonic() - began)

    def end(self):
        self._ended.set()
        self.join()


def test_thirty_databases_on_a_server_of_twenty_connections_refuse_nobody():
    settings = {"max_user_connections": 12}
    with PostgreSQL({"max_connections": 20}) as server, PgBouncer(server, settings=settings) as pooler:
        server.execute("CREATE DATABASE template OWNER odoo")
        server.execute(TABLE, dbname="template")
        for name in NAMES:
            server.execute("CREATE DATABASE %s TEMPLATE template OWNER odoo" % name)
        backlog = catchup.Backlog(lambda database: connection.opening(libpq_parameters(pooler, database)))
        clients = [
            Client(lambda number: pooler.connect(NAMES[number * 7 % 30])),
            Client(lambda number: server.connect(user=USER, password=PASSWORD)),
        ]
        for client in clients:
            client.start()
        looked_up = _poll(backlog, rounds=3)
        for client in clients:
            client.end()
        assert looked_up == set(NAMES)
        assert not backlog.stuck(time.monotonic()) and backlog._slow == set()
        assert [client.refusals for client in clients] == [[], []]
        assert min(client.count for client in clients) > 5 and max(client.longest for client in clients) < 5


def _poll(backlog, rounds):
    """Look up all databases so many times; return those that answered each time."""
    running = Tasks()
    answered = set(NAMES)
    for _ in range(rounds):
        began = time.monotonic()
        backlog.add_pending(NAMES, began)
        while backlog.next_due(time.monotonic()) < float("inf") and time.monotonic() < began + 30:
            backlog.start(running, lambda channels: True, time.monotonic())
            running.run(time.monotonic() + 0.5)
        answered &= backlog._answered
    return answered

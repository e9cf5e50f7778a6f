"""Many databases are looked up side by side: none delays another, and others find room on the server."""

import contextlib
import json
import threading
import time

import psycopg2

from bus_alt_connection import catchup, connection
from bus_alt_connection.tasks import Tasks
from stack.pgbouncer import PgBouncer
from stack.postgres import PASSWORD, USER, PostgreSQL, libpq_parameters
from stack.waiting import wait_until
from tests.support.backlog import create_database, write
from tests.support.listening import listening

NAMES = ["x%d" % number for number in range(30)]


def refused():
    raise psycopg2.OperationalError("Connection refused")


def test_locked_tables_and_used_up_pools_delay_no_other_database(server):
    names = ("locked", "used_up", "healthy")
    for name in names:
        create_database(server, name)
    databases = {"used_up": "pool_size=1 reserve_pool=0"}
    with PgBouncer(server, databases=databases) as pooler, contextlib.ExitStack() as exits:
        for name, through in (("locked", server), ("used_up", pooler)):
            held = exits.enter_context(contextlib.closing(through.connect(name)))
            held.cursor().execute("LOCK TABLE bus_bus")
        running = exits.enter_context(listening(pooler, refused, databases=names, POLL_INTERVAL=1))
        wait_until(lambda: running.backlog._slow == {"locked", "used_up"}, 30, "both to be known", 0.1)
        late = []
        for number in range(15):
            began = time.monotonic()
            write(server, "healthy", json.dumps("number %d" % number), age=0)
            while '"number %d"' % number not in running.feed.get()[1]:
                pass
            late.append(time.monotonic() - began)
        # The interval, and a second; but tests that run beside this one may delay a message.
        assert sorted(late)[-3] < 2, late
        assert set(running.backlog.stuck(time.monotonic())) <= {"locked", "used_up"}


class Client(threading.Thread):
    """Connects by ``connect(number)`` again and again; ``refusals``: what it was told in vain."""

    def __init__(self, connect):
        super().__init__(daemon=True)
        self._connect, self._ended = connect, threading.Event()
        self.count, self.refusals = 0, []

    def run(self):
        while not self._ended.wait(0.05):
            try:
                with contextlib.closing(self._connect(self.count)) as opened, opened.cursor() as cr:
                    cr.execute("SELECT 1")
            except psycopg2.Error as error:
                self.refusals.append(str(error))
            self.count += 1

    def end(self):
        self._ended.set()
        self.join()


def test_thirty_databases_on_a_server_of_twenty_connections_refuse_nobody():
    settings = {"max_user_connections": 12}
    with PostgreSQL({"max_connections": 20}) as server, PgBouncer(server, settings=settings) as pooler:
        for name in NAMES:
            create_database(server, name)
        clients = [
            Client(lambda number: pooler.connect(NAMES[number * 7 % 30])),
            Client(lambda number: server.connect(user=USER, password=PASSWORD)),
        ]
        for client in clients:
            client.start()
        looked_up = look_up_all(lambda database: connection.opening(libpq_parameters(pooler, database)), rounds=3)
        for client in clients:
            client.end()
        assert looked_up == set(NAMES)
        assert [client.refusals for client in clients] == [[], []]
        assert min(client.count for client in clients) > 5


def look_up_all(opening, rounds):
    """Look up all databases so many times; return those that answered each time."""
    backlog, running, answered = catchup.Backlog(opening), Tasks(), set(NAMES)
    for _ in range(rounds):
        began = time.monotonic()
        backlog.add_pending(NAMES, began)
        while backlog.next_due(time.monotonic()) < float("inf") and time.monotonic() < began + 30:
            backlog.start(running, lambda channels: True, time.monotonic())
            running.run(time.monotonic() + 0.5)
        answered &= backlog._answered
    return answered

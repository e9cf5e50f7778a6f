"""Many databases are looked up side by side: none delays another, and others find room on the server."""

import contextlib
import json
import threading
import time

import psycopg2
import pytest

from stack.pgbouncer import PgBouncer
from stack.postgres import PASSWORD, USER, PostgreSQL
from stack.waiting import wait_until
from tests.support.backlog import create_database, write
from tests.support.listening import listening

LOCKED, *OTHERS = NAMES = ["x%d" % number for number in range(30)]


def refused():
    raise psycopg2.OperationalError("Connection refused")


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


@pytest.mark.rest
def test_a_locked_database_delays_no_other_and_thirty_on_a_server_of_twenty_connections_refuse_nobody():
    settings = {"max_user_connections": 12}
    with PostgreSQL({"max_connections": 20}) as server, PgBouncer(server, settings=settings) as pooler:
        for name in NAMES:
            create_database(server, name)
        clients = [
            Client(lambda number: pooler.connect(NAMES[number * 7 % 30])),
            Client(lambda number: server.connect(user=USER, password=PASSWORD)),
        ]
        with contextlib.closing(server.connect(LOCKED)) as locking:
            locking.cursor().execute("LOCK TABLE bus_bus")
            for client in clients:
                client.start()
            with listening(pooler, refused, databases=NAMES, POLL_INTERVAL=1) as running:
                wait_until(lambda: running.backlog._answered == set(OTHERS), 30, "all others to be looked up", 0.1)
                for name in OTHERS[::6]:
                    write(server, name, json.dumps("in " + name), age=0)
                arrived = []

                def have_arrived():
                    arrived.extend(payload for _channel, payload in running.feed.all())
                    return all('"in %s"' % name in " ".join(arrived) for name in OTHERS[::6])

                wait_until(have_arrived, 30, "what was sent to the others", 0.1)
                assert set(running.backlog.stuck(time.monotonic())) <= {LOCKED}
        for client in clients:
            client.end()
        assert [client.refusals for client in clients] == [[], []]
        assert min(client.count for client in clients) > 5

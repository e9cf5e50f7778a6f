"""While nothing listens, a real database whose table is locked, or whose pool is used up, delays no other."""

import contextlib
import json
import threading
import time

import psycopg2

from bus_alt_connection import catchup, connection, settings, supervisor
from bus_alt_connection.listener import Listener
from stack.pgbouncer import PgBouncer
from stack.postgres import libpq_parameters
from stack.waiting import wait_until
from tests.unit.fakes import Events, FakeFeed

TABLE = """
    CREATE TABLE bus_bus (id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar);
    ALTER TABLE bus_bus OWNER TO odoo
"""
NAMES = ("locked", "used_up", "healthy")


@contextlib.contextmanager
def polling(pooler, names):
    """A supervisor whose listener can't connect; yields the feed that gets what it finds."""

    def pooled(database):
        return connection.opening(libpq_parameters(pooler, database))

    def refused(_listener):
        raise psycopg2.OperationalError("Connection refused")

    options = settings.read({"IMDISPATCHER_POLL_INTERVAL": "1"}, {})
    listener, feed = Listener("postgres", refused, lambda: False, Events(), 19), FakeFeed("imbus")
    listener.add(feed)
    backlog = catchup.Backlog(pooled)
    watcher = supervisor.Supervisor(listener, pooled, catchup.Databases(names), backlog, options)
    threads = [threading.Thread(target=one.run, daemon=True) for one in (listener, watcher)]
    for thread in threads:
        thread.start()
    try:
        yield feed, backlog
    finally:
        listener.close()
        for thread in threads:
            thread.join(10)


def test_locked_tables_and_used_up_pools_delay_no_other_database(server):
    for name in NAMES:
        server.execute("CREATE DATABASE %s OWNER odoo" % name)
        server.execute(TABLE, dbname=name)
    databases = {"used_up": "pool_size=1 reserve_pool=0"}
    with PgBouncer(server, databases=databases) as pooler, contextlib.ExitStack() as exits:
        for name, through in (("locked", server), ("used_up", pooler)):
            held = exits.enter_context(contextlib.closing(through.connect(name)))
            held.cursor().execute("LOCK TABLE bus_bus")
        feed, backlog = exits.enter_context(polling(pooler, NAMES))
        wait_until(lambda: backlog._slow == {"locked", "used_up"}, 30, "both to be known", 0.1)
        late = []
        for number in range(15):
            began = time.monotonic()
            query = "INSERT INTO bus_bus (channel, create_date) VALUES (%s, now() AT TIME ZONE 'UTC')"
            server.execute(query, (json.dumps("number %d" % number),), "healthy")
            while '"number %d"' % number not in feed.get()[1]:
                pass
            late.append(time.monotonic() - began)
        # The interval, and a second; but tests that run beside this one may delay a message.
        assert sorted(late)[-3] < 2, late
        assert set(backlog.stuck(time.monotonic())) <= {"locked", "used_up"}

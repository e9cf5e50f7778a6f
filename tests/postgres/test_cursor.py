"""What a listener of Odoo's, or of another addon, can do with its cursor."""

import select
import threading

import psycopg2
import pytest
from psycopg2 import extensions, sql

from bus_alt_connection.cursor import NO_POOL, ListeningConnection, turn
from bus_alt_connection.listener import DirectSession, Listener
from stack.postgres import libpq_parameters
from stack.waiting import wait_until
from tests.unit.fakes import Cursor, Events, FakePool


class Connection(extensions.connection):
    """As Odoo's pool has them."""


@pytest.fixture
def pool(pooler):
    """Odoo's, with real connections through the pooler."""
    pool = FakePool(lambda database: pooler.connect(database, application_name="tests", connection_factory=Connection))
    yield pool
    assert pool.in_use == []
    for connection in pool.lent:
        connection.close()


@pytest.fixture
def ordinary(pool):
    """Return a function that opens an ordinary cursor."""
    return lambda: Cursor(pool, "postgres", {"database": "postgres"})


@pytest.fixture
def listening(server, ordinary):
    """Return a function that makes a ListeningConnection; its listener is confirmed by nobody, as no check is made."""
    listener = Listener("postgres", lambda _listener: DirectSession(libpq_parameters(server)), lambda: False, Events())

    def start(feed):
        listener.add(feed)
        threading.Thread(target=listener.run, daemon=True).start()
        return listener

    def listening():
        connection = ListeningConnection(ordinary, start)
        connection.listener = listener
        return connection

    yield listening
    listener.close()
    # It closes what it has, even if it was never started.
    listener.run()


@pytest.fixture
def cursor(listening):
    """A listening cursor."""
    cursor = Cursor(NO_POOL, "postgres", {})
    turn(cursor, listening())
    with cursor:
        yield cursor


def test_the_pooler_answers_statements_with_their_parameters(cursor, pool):
    cursor.execute("SELECT %s, %s", ("it's", 2))
    assert cursor.fetchone() == ("it's", 2)
    assert cursor.fetchone() is None
    cursor.execute("SELECT %(a)s || '%%'", {"a": "'; LISTEN"})
    assert cursor.fetchall() == [("'; LISTEN%",)]
    cursor.execute(sql.SQL("SELECT {}").format(sql.Literal("x")))
    assert cursor.fetchone() == ("x",)
    assert cursor.rowcount == 1
    with pytest.raises(psycopg2.ProgrammingError):
        cursor.execute("SELECT nothing FROM nowhere")
    assert len(pool.lent) == 1


def test_psycopg2_itself_takes_its_cursor_for_one(cursor):
    """Before anything was executed, too."""
    assert sql.Identifier("x").as_string(cursor._obj) == '"x"'
    cursor.execute("LISTEN orders")
    cursor.commit()
    assert sql.Identifier("x").as_string(cursor._obj) == '"x"'


def test_what_only_a_real_connection_has_is_that_of_the_pooled_one(cursor, pool):
    cursor.execute("LISTEN imbus")
    cursor.commit()
    assert cursor._cnx.info.dbname == "postgres"
    assert cursor._cnx.encoding == "UTF8"
    with pytest.raises(AttributeError):
        cursor._cnx.no_such_thing  # noqa: B018
    assert len(pool.in_use) == 1
    cursor.commit()
    assert pool.in_use == []


def check_heard(server, cursor, channel):
    server.execute("SELECT pg_notify(%s, 'x')", (channel,))
    assert select.select([cursor._cnx], [], [], 5)[0]
    cursor._cnx.poll()
    assert [(one.channel, one.payload) for one in cursor._cnx.notifies] == [(channel, "x")]
    cursor._cnx.notifies.clear()


def test_listen_and_unlisten_count_from_the_commit(server, cursor, pool):
    cursor.execute("listen OTHER")
    cursor.execute(sql.SQL("LISTEN {}").format(sql.Identifier("A b")))
    cursor.commit()
    for channel in ("A b", "other"):
        check_heard(server, cursor, channel)
    cursor.execute("UNLISTEN other")
    listener = cursor._cnx.listener
    wait_until(lambda: set(listener.in_force[1]) == {"A b"}, 5, "UNLISTEN")
    for channel, payload in (("other", "not heard"), ("A b", "heard")):
        server.execute("SELECT pg_notify(%s, %s)", (channel, payload))
    assert select.select([cursor._cnx], [], [], 5)[0]
    cursor._cnx.poll()
    assert [one.payload for one in cursor._cnx.notifies] == ["heard"]
    assert pool.in_use == []

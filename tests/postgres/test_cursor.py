"""What a listener of Odoo's, or of another addon, can do with its cursor."""

import select
import threading

import psycopg2
import pytest
from psycopg2 import sql

from bus_alt_connection.cursor import ListeningCursor
from bus_alt_connection.listener import DirectSession, Listener
from stack.postgres import libpq_parameters
from stack.waiting import wait_until


class Ordinary:
    """As much of Odoo's own cursor, which goes through the pooler, as is asked for here."""

    opened = 0

    def __init__(self, pooler):
        self.connection = self._cnx = pooler.connect(application_name="tests")
        self._cursor = self.connection.cursor()
        Ordinary.opened += 1

    def commit(self):
        self.connection.commit()

    def close(self):
        self.connection.close()

    def __getattr__(self, name):
        return getattr(self._cursor, name)


@pytest.fixture
def cursor(server, pooler):
    """A listening cursor whose listener is confirmed by nobody, as no check is made."""
    listener = Listener("postgres", lambda: DirectSession(libpq_parameters(server)), lambda: False, lambda event: None)
    Ordinary.opened = 0
    with ListeningCursor(listener, "postgres", lambda: Ordinary(pooler)) as cursor:
        cursor.listener = listener
        listener.add(cursor.connection)
        threading.Thread(target=listener.run, daemon=True).start()
        yield cursor


def test_the_pooler_answers_statements_with_their_parameters(cursor):
    cursor.execute("SELECT %s, %s", ("it's", 2))
    assert cursor.fetchone() == ("it's", 2)
    assert cursor.fetchone() is None
    cursor.execute("SELECT %(a)s || '%%'", {"a": "'; LISTEN"})
    assert cursor.fetchall() == [("'; LISTEN%",)]
    cursor.execute(sql.SQL("SELECT {}").format(sql.Literal("x")))
    assert cursor.fetchone() == ("x",)
    assert cursor.rowcount == 1
    assert Ordinary.opened == 1


def test_what_was_written_is_there_after_the_commit(server, cursor):
    server.execute("CREATE TABLE written (id int); GRANT ALL ON written TO odoo")
    cursor.execute("INSERT INTO written VALUES (1)")
    cursor.rollback()
    cursor.execute("INSERT INTO written VALUES (2)")
    cursor.commit()
    assert server.execute("SELECT id FROM written") == [(2,)]
    assert Ordinary.opened == 2


def test_a_wrong_statement_is_the_error_of_who_made_it(cursor):
    with pytest.raises(psycopg2.ProgrammingError):
        cursor.execute("SELECT nothing FROM nowhere")
    cursor.rollback()
    cursor.execute("SELECT 1")
    assert cursor.fetchone() == (1,)


def test_what_only_a_real_connection_has_is_that_of_the_ordinary_one(cursor):
    cursor.execute("LISTEN imbus")
    cursor.commit()
    assert cursor._cnx.info.dbname == "postgres"
    assert cursor._cnx.encoding == "UTF8"
    with pytest.raises(AttributeError):
        cursor._cnx.no_such_thing  # noqa: B018
    assert Ordinary.opened == 1
    cursor.commit()
    assert cursor._opened is None


def test_whether_it_is_in_recovery_takes_no_connection(cursor):
    # Odoo's cron thread asks it each time that it opens its cursor, and dies of an error.
    cursor.execute("SELECT pg_is_in_recovery()")
    assert cursor.fetchone() == (False,)
    assert Ordinary.opened == 0


def test_a_listen_put_together_by_psycopg2_is_one(server, cursor):
    cursor.execute(sql.SQL("LISTEN {}").format(sql.Identifier("A b")))
    cursor.commit()
    check_heard(server, cursor, "A b")


def check_heard(server, cursor, channel):
    server.execute("SELECT pg_notify(%s, 'x')", (channel,))
    assert select.select([cursor._cnx], [], [], 5)[0]
    cursor._cnx.poll()
    assert [(one.channel, one.payload) for one in cursor._cnx.notifies] == [(channel, "x")]
    cursor._cnx.notifies.clear()


def test_listen_and_unlisten_count_from_the_commit(server, cursor):
    cursor.execute('LISTEN "A b"')
    cursor.execute("listen OTHER")
    cursor.commit()
    for channel in ("A b", "other"):
        check_heard(server, cursor, channel)
    cursor.execute("UNLISTEN other")
    listener = cursor.listener
    wait_until(lambda: listener.in_force[1] == {"A b"}, 5, "UNLISTEN")
    for channel, payload in (("other", "not heard"), ("A b", "heard")):
        server.execute("SELECT pg_notify(%s, %s)", (channel, payload))
    assert select.select([cursor._cnx], [], [], 5)[0]
    cursor._cnx.poll()
    assert [one.payload for one in cursor._cnx.notifies] == ["heard"]
    assert Ordinary.opened == 0

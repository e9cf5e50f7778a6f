"""What a listener of Odoo's, or of another addon, can do with its cursor."""

import contextlib
import select

import psycopg2
import pytest
from psycopg2 import sql

from bus_alt_connection.cursor import Feed, ListeningCursor
from bus_alt_connection.listener import Listener
from stack.postgres import PASSWORD, USER
from stack.proxy import Proxy
from stack.waiting import wait_until


@contextlib.contextmanager
def cursor_through(place):
    """Yield a listening cursor whose listener connects to ``place``; its pooler is not to be needed."""
    parameters = {"host": place.host, "port": place.port, "user": USER, "password": PASSWORD, "dbname": "postgres"}
    missing = []
    listener = Listener("postgres", {**parameters, "connect_timeout": "2"}, lambda: False)
    feed = Feed(listener, missing.append)
    listener.add(feed)
    with ListeningCursor(feed, "postgres", None, missing.append) as cursor:
        yield cursor
    assert missing == []


def test_the_server_answers_statements_with_their_parameters(server):
    with cursor_through(server) as cursor:
        cursor.execute("SELECT %s, %s", ("it's", 2))
        assert cursor.fetchone() == ("it's", 2)
        assert cursor.fetchone() is None
        cursor.execute("SELECT %(a)s || '%%'", {"a": "'; LISTEN"})
        assert cursor.fetchall() == [("'; LISTEN%",)]
        cursor.execute(sql.SQL("SELECT {}").format(sql.Literal("x")))
        assert cursor.fetchone() == ("x",)
        cursor.execute("SET statement_timeout = 0")
        assert cursor.fetchall() == []


def test_a_wrong_statement_is_the_error_of_who_made_it(server):
    with cursor_through(server) as cursor:
        with pytest.raises(psycopg2.ProgrammingError):
            cursor.execute("SELECT nothing FROM nowhere")
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


def test_listen_and_unlisten_count_from_the_commit(server):
    with cursor_through(server) as cursor:
        cursor.execute('LISTEN "A b"')
        cursor.execute("listen OTHER")
        cursor.commit()
        for channel in ("A b", "other"):
            server.execute("SELECT pg_notify(%s, 'x')", (channel,))
            assert select.select([cursor._cnx], [], [], 5)[0]
            cursor._cnx.poll()
            assert [(one.channel, one.payload) for one in cursor._cnx.notifies] == [(channel, "x")]
            cursor._cnx.notifies.clear()
        cursor.execute("UNLISTEN other")
        listener = cursor._cnx.listener
        wait_until(lambda: listener.session.channels == {"A b"}, 5, "UNLISTEN")
        for channel, payload in (("other", "not heard"), ("A b", "heard")):
            server.execute("SELECT pg_notify(%s, %s)", (channel, payload))
        assert select.select([cursor._cnx], [], [], 5)[0]
        cursor._cnx.poll()
        assert [one.payload for one in cursor._cnx.notifies] == ["heard"]


def test_a_listener_survives_that_nobody_waits_for_an_answer_any_more(server):
    with Proxy((server.host, server.port)) as proxy:
        proxy.swallow()
        with cursor_through(proxy) as cursor:
            listener = cursor._cnx.listener
            with pytest.raises(psycopg2.OperationalError):
                listener.query("SELECT 1", timeout=0.2)
            # It gives up on this connection, and on the question that is still there.
            wait_until(lambda: listener.outage.since, 10, "the first attempt to fail")
            proxy.forward()
            wait_until(lambda: listener.session, 15, "a connection")
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,)

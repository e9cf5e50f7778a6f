"""What listeners of series to come do with their cursor."""

import contextlib
import select

import pytest

from bus_alt_connection.cursor import Feed, ListeningCursor
from bus_alt_connection.listener import Listener
from stack.postgres import PASSWORD, USER


class _SQL:
    """All that ``odoo.tools.SQL`` tells of itself from 19.1 on."""

    def __init__(self, code, *params):
        self._sql_tuple = (code, params, ())


@contextlib.contextmanager
def _cursor(server):
    parameters = {"host": server.host, "port": server.port, "user": USER, "password": PASSWORD, "dbname": "postgres"}
    missing = []
    listener = Listener("postgres", parameters, lambda: False)
    feed = Feed(listener, missing.append)
    listener.add(feed)
    with ListeningCursor(feed, "postgres", None, missing.append) as cursor:
        yield cursor, missing


def test_statements_may_be_objects_as_they_are_from_19_1_on(server):
    with _cursor(server) as (cursor, missing):
        cursor.execute(_SQL('LISTEN "channel"'))
        cursor.commit()
        cursor.execute(_SQL("SELECT pg_notify('channel', %s), %s", "hello", 3))
        assert cursor.fetchall() == [("", 3)]
        assert select.select([cursor._cnx], [], [], 5)[0]
        cursor._cnx.poll()
        assert [(one.channel, one.payload) for one in cursor._cnx.notifies] == [("channel", "hello")]
        assert missing == []


def test_a_statement_of_an_unknown_kind_is_something_that_is_missing(server):
    with _cursor(server) as (cursor, missing):
        with pytest.raises(TypeError):
            cursor.execute(object())
        assert missing == ["ListeningCursor.execute(object)"]

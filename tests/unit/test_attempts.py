"""What comes of an attempt to connect."""

import psycopg2
import pytest

from bus_alt_connection import catchup, connection
from bus_alt_connection.listener import DirectSession


def test_a_standby_is_no_place_to_listen():
    session = DirectSession.__new__(DirectSession)
    session.parameters = {}
    session.fileno = lambda: -1
    session.examine = lambda: connection.Facts("db-02:5432", 1, False, True, "postgres", "15.3", 1000)
    with pytest.raises(psycopg2.OperationalError, match="is a standby"):
        session.prepare()


def test_a_database_is_gone_only_if_each_address_of_the_pooler_says_so():
    gone = psycopg2.OperationalError('FATAL:  database "d1" does not exist')
    error = psycopg2.OperationalError("of both")
    for reasons, is_gone in (([gone, gone], True), ([gone, psycopg2.OperationalError("no answer in 5 s")], False)):
        error.reasons = reasons
        assert catchup._is_gone(error, "d1") is is_gone

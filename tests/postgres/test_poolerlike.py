"""The small pooler of the tests does to LISTEN what it is there for."""

import select
import threading
from contextlib import closing

import psycopg2
import pytest

from stack.postgres import PASSWORD, USER
from stack.waiting import wait_until
from tests.support.poolerlike import PoolerLike


def connect(through, **parameters):
    given = {"dbname": "postgres", "user": USER, "password": PASSWORD, **parameters}
    connection = psycopg2.connect(host=through.host, port=through.port, **given)
    connection.autocommit = True
    return closing(connection)


def value(connection, query):
    with connection.cursor() as cr:
        cr.execute(query)
        return cr.fetchone()[0] if cr.description else None


def hears(connection, seconds):
    if select.select([connection], [], [], seconds)[0]:
        connection.poll()
    return bool(connection.notifies)


PID = "SELECT pg_backend_pid()"


def test_it_hands_on_the_pid_of_the_server(server):
    with PoolerLike(server) as pooler, connect(pooler) as first:
        assert first.get_backend_pid() == value(first, PID)
        with connect(pooler) as second:
            assert second.get_backend_pid() == value(second, PID)
            # One whose pool is full is told the pid of the one that it will get.
            with connect(pooler) as third:
                assert third.get_backend_pid() == value(third, PID)


def test_it_hands_out_a_server_connection_for_a_transaction_the_last_first(server):
    with PoolerLike(server) as pooler, connect(pooler) as first, connect(pooler) as second:
        later = value(second, PID)
        assert value(first, PID) == later != first.get_backend_pid()
        value(second, "BEGIN")
        assert value(first, PID) == first.get_backend_pid()
        assert value(second, PID) == later
        value(second, "ROLLBACK")
        assert len(server.activity()) == 2


def test_listen_through_it_is_deaf_and_whoever_comes_next_gets_it(server):
    with PoolerLike(server) as pooler, connect(pooler) as listener, connect(pooler) as sender:
        value(listener, "LISTEN imbus")
        value(sender, "NOTIFY imbus, 'one'")
        assert not hears(listener, 0.3)
        assert [one.payload for one in sender.notifies] == ["one"]


def test_a_client_that_waits_gets_the_connection_that_comes_back(server):
    with PoolerLike(server, size=1) as pooler, connect(pooler) as first, connect(pooler) as second:
        value(first, "BEGIN")
        pids = []
        waiting = threading.Thread(target=lambda: pids.append(value(second, PID)))
        waiting.start()
        waiting.join(0.2)
        assert not pids
        value(first, "COMMIT")
        waiting.join(5)
        assert pids == [first.get_backend_pid()]


def test_a_transaction_left_open_is_rolled_back(server):
    with PoolerLike(server, size=1) as pooler:
        with connect(pooler) as leaving:
            value(leaving, "BEGIN; SET LOCAL application_name = 'left'")
        wait_until(lambda: not server.activity(), 5)
        with connect(pooler) as other:
            assert value(other, "SHOW application_name") == ""


def test_it_can_make_up_the_pid_and_keep_listen(server):
    with PoolerLike(server, hands_on_pid=False, pins=True) as pooler:
        with connect(pooler) as listener, connect(pooler) as sender:
            assert listener.get_backend_pid() != value(listener, PID)
            value(listener, "LISTEN imbus")
            value(sender, "NOTIFY imbus, 'one'")
            assert hears(listener, 5)
            value(sender, "NOTIFY imbus, 'two'")
            wait_until(lambda: hears(listener, 1) and len(listener.notifies) == 2, 5)


def test_of_several_statements_it_can_heed_the_first_listen_only(server):
    with PoolerLike(server, pins=True, first_only=True) as pooler, connect(pooler) as listener:
        value(listener, "LISTEN one; LISTEN two")
        value(listener, "SELECT 1; LISTEN three")
        assert value(listener, "SELECT array_agg(name) FROM pg_listening_channels() name") == ["one", "three"]


def test_what_the_server_refuses_is_refused(server):
    with PoolerLike(server) as pooler:
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            connect(pooler, password="wrong")
        with pytest.raises(psycopg2.OperationalError, match="does not exist"):
            connect(pooler, dbname="nowhere")


def test_nothing_of_it_is_left_even_after_a_failure(server):
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        with PoolerLike(server) as pooler, connect(pooler) as client:
            value(client, "BEGIN")
            raise ZeroDivisionError
    assert threading.active_count() == threads
    wait_until(lambda: not server.activity(), 5)
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        connect(pooler)


def test_it_survives_a_restart_of_the_server(server):
    with PoolerLike(server) as pooler, connect(pooler) as client:
        server.restart()
        with pytest.raises(psycopg2.OperationalError):
            value(client, PID)
        with connect(pooler) as again:
            assert value(again, PID) == again.get_backend_pid()

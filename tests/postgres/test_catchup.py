"""What was missed, as bus_bus tells it: the addon's queries on a real PostgreSQL."""

import contextlib
import json
import subprocess
import time

import psycopg2
import pytest

from bus_alt_connection import catchup
from stack.postgres import PASSWORD, USER, PostgreSQL
from stack.process import identity
from stack.system import postgres_bin

_TABLE = """
    CREATE TABLE bus_bus (id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar);
    GRANT ALL ON bus_bus, bus_bus_id_seq TO odoo;
    CREATE TABLE other (id int)
"""
_INSERT = """
    INSERT INTO bus_bus (channel, message, create_date)
    VALUES (%s, '{}', now() AT TIME ZONE 'UTC' - %s * interval '1 second')
"""
# Seconds; rows so old are found by their transaction, or not at all.
_OLD = 7200


@pytest.fixture
def bus(server):
    """A new database with an empty bus_bus."""
    with _database(server, "bus") as bus:
        server.execute(_TABLE, dbname="bus")
        yield bus


@pytest.fixture
def backlog(server):
    return _backlog(server)


def _backlog(server):
    """Return a Backlog that is allowed to know of the past what it knows by itself."""
    return catchup.Backlog(
        lambda database: {
            "host": server.host,
            "port": server.port,
            "user": USER,
            "password": PASSWORD,
            "dbname": database,
        }
    )


class _Bus:
    def __init__(self, server, name):
        self.server = server
        self.name = name

    def write(self, channel, age=_OLD):
        """Commit a row for ``channel`` that looks ``age`` seconds old."""
        self.server.execute(_INSERT, (json.dumps(channel), age), self.name)

    @contextlib.contextmanager
    def transaction(self):
        """A cursor whose transaction is committed at the end of the block."""
        connection = self.server.connect(self.name, application_name="tests")
        try:
            with connection, connection.cursor() as cr:
                yield cr
        finally:
            connection.close()

    def other_transactions(self, count=3):
        for number in range(count):
            self.server.execute("INSERT INTO other VALUES (%s)", (number,), self.name)


@contextlib.contextmanager
def _database(server, name):
    server.execute("CREATE DATABASE " + name)
    try:
        yield _Bus(server, name)
    finally:
        server.execute("DROP DATABASE %s WITH (FORCE)" % name)


def test_each_row_is_found_once(backlog, bus):
    assert backlog.missed("bus") == []
    bus.write("one")
    bus.write(["bus", "res.partner", 3])
    assert sorted(backlog.missed("bus", overlap=False)) == ['"one"', '["bus", "res.partner", 3]']
    assert backlog.missed("bus", overlap=False) == []
    bus.write("two")
    assert backlog.missed("bus", overlap=False) == ['"two"']


def test_a_channel_with_many_rows_is_named_once(backlog, bus):
    backlog.missed("bus")
    for _ in range(5):
        bus.write("one")
    assert backlog.missed("bus", overlap=False) == ['"one"']


def test_a_row_committed_late_is_found_when_it_is_committed(backlog, bus):
    backlog.missed("bus")
    with bus.transaction() as late:
        late.execute(_INSERT, ('"late"', _OLD))
        bus.write("early")  # with a higher id
        assert backlog.missed("bus", overlap=False) == ['"early"']
        bus.other_transactions()
        assert backlog.missed("bus", overlap=False) == []
    assert backlog.missed("bus", overlap=False) == ['"late"']
    assert backlog.missed("bus", overlap=False) == []


def test_a_row_written_in_a_savepoint_and_committed_late_is_found_once(backlog, bus):
    # Its transaction id is that of the savepoint, which snapshots do not know.
    backlog.missed("bus")
    with bus.transaction() as late:
        late.execute("SAVEPOINT inner_one")
        late.execute(_INSERT, ('"late"', _OLD))
        late.execute("RELEASE SAVEPOINT inner_one")
        bus.other_transactions()
        bus.write("early")
        assert backlog.missed("bus", overlap=False) == ['"early"']
        assert backlog.missed("bus", overlap=False) == []
    assert backlog.missed("bus", overlap=False) == ['"late"']
    assert backlog.missed("bus", overlap=False) == []


def test_rows_seen_beside_a_long_transaction_are_not_found_again_and_again(backlog, bus):
    backlog.missed("bus")
    with bus.transaction() as long:
        long.execute("INSERT INTO other VALUES (1)")
        for number in range(3):
            bus.write("row %d" % number)
            assert backlog.missed("bus", overlap=False) == ['"row %d"' % number]
    assert backlog.missed("bus", overlap=False) == []


def test_a_row_rolled_back_is_not_found(backlog, bus):
    backlog.missed("bus")
    with pytest.raises(ZeroDivisionError), bus.transaction() as cr:
        cr.execute(_INSERT, ('"never"', 0))
        raise ZeroDivisionError
    assert backlog.missed("bus", overlap=False) == []


def test_at_the_start_rows_of_the_last_minute_are_found_and_older_ones_are_not(backlog, bus):
    bus.write("young", age=catchup.OVERLAP / 2)
    bus.write("old", age=catchup.OVERLAP * 2)
    assert backlog.missed("bus", overlap=False) == ['"young"']


def test_overlap_finds_rows_of_the_last_minute_again(backlog, bus):
    backlog.missed("bus")
    bus.write("young", age=catchup.OVERLAP / 2)
    bus.write("old", age=catchup.OVERLAP * 2)
    assert sorted(backlog.missed("bus", overlap=False)) == ['"old"', '"young"']
    assert backlog.missed("bus", overlap=True) == ['"young"']
    assert backlog.missed("bus", overlap=False) == []


def test_what_was_heard_shortly_before_the_loss_counts_as_missed(server, bus, monkeypatch):
    backlog = _backlog(server)
    clock = _Clock(monkeypatch)
    backlog.missed("bus")
    bus.write("long ago")
    clock.now += 30
    backlog.all_heard(_snapshot(server))
    bus.write("before the last sign of life")
    clock.now += catchup.MARGIN + 1
    backlog.all_heard(_snapshot(server))
    bus.write("after it")
    clock.now += 1
    # Not by date: these rows look old.
    assert sorted(backlog.missed("bus", overlap=False)) == ['"after it"', '"before the last sign of life"']


def test_one_sign_of_life_alone_proves_nothing(server, bus, monkeypatch):
    backlog = _backlog(server)
    clock = _Clock(monkeypatch)
    backlog.missed("bus")
    bus.write("heard or not")
    clock.now += 30
    backlog.all_heard(_snapshot(server))
    assert backlog.missed("bus", overlap=False) == ['"heard or not"']


def test_after_a_failover_to_a_server_that_is_behind_dates_tell(server, bus, monkeypatch):
    backlog = _backlog(server)
    clock = _Clock(monkeypatch)
    ahead = 10**9
    backlog.all_heard("%d:%d:" % (ahead, ahead))
    clock.now += 300
    backlog.all_heard("%d:%d:" % (ahead, ahead))
    clock.now += 300
    bus.write("sent since", age=590)
    bus.write("sent before", age=900)
    assert backlog.missed("bus", overlap=True) == ['"sent since"']


def test_a_snapshot_of_one_database_holds_for_another(server, backlog, bus):
    # The self-check takes its snapshot in the system database.
    snapshot = _snapshot(server)
    backlog._heard.append((time.monotonic() + 1, snapshot, []))
    backlog._heard.append((time.monotonic() + 100, snapshot, []))
    bus.write("one")
    assert backlog.missed("bus", overlap=False) == ['"one"']


def test_a_database_without_bus_bus_has_nothing_and_may_get_one_later(server, backlog):
    with _database(server, "plain") as plain:
        assert backlog.missed("plain") == []
        server.execute(_TABLE, dbname="plain")
        plain.write("one", age=0)
        assert backlog.missed("plain") == ['"one"']


def test_a_database_that_is_not_there_is_an_error_without_the_password(backlog):
    with pytest.raises(psycopg2.Error, match="nowhere") as caught:
        backlog.missed("nowhere")
    assert PASSWORD not in str(caught.value)


def test_databases_do_not_mix(server, backlog, bus):
    with _database(server, "second") as second:
        server.execute(_TABLE, dbname="second")
        assert backlog.missed("bus") == backlog.missed("second") == []
        bus.write("one")
        second.write("two")
        assert backlog.missed("bus", overlap=False) == ['"one"']
        assert backlog.missed("second", overlap=False) == ['"two"']


_EPOCH = 2**32


@pytest.mark.parametrize(
    ("xmax", "xmin", "whole"),
    [
        (1000, 999, 999),
        (1000, 3, 3),
        (_EPOCH - 1, _EPOCH - 2, _EPOCH - 2),
        # the counter of 32 bits has just begun anew; 0 to 2 are not given to transactions
        (_EPOCH + 3, _EPOCH - 1, _EPOCH - 1),
        (_EPOCH + 4, 3, _EPOCH + 3),
        (_EPOCH + 100, 3, _EPOCH + 3),
        (_EPOCH + 100, _EPOCH - 1, _EPOCH - 1),
        (7 * _EPOCH + 100, 99, 7 * _EPOCH + 99),
        (7 * _EPOCH + 100, 101, 6 * _EPOCH + 101),
        (7 * _EPOCH, _EPOCH - 1, 7 * _EPOCH - 1),
    ],
)
def test_32_bits_of_a_transaction_id_are_made_whole(server, xmax, xmin, whole):
    row = server.execute(
        "SELECT " + catchup._XMIN + " AS whole FROM (SELECT %s::bigint AS xmax) now_, (SELECT %s::text::xid AS xmin) b",
        (xmax, str(xmin)),
    )[0]
    assert row.whole == whole


def test_rows_are_told_apart_in_a_cluster_whose_transaction_ids_have_wrapped_around():
    with PostgreSQL() as server:
        server.stop()
        subprocess.run(
            [postgres_bin() / "pg_resetwal", "--epoch=5", server.data],
            check=True,
            stdout=subprocess.DEVNULL,
            **identity(server.run_as),
        )
        server.start()
        assert int(_snapshot(server).split(":")[0]) > 5 * _EPOCH
        with _database(server, "bus") as bus:
            server.execute(_TABLE, dbname="bus")
            bus.write("before")
            backlog = _backlog(server)
            assert backlog.missed("bus") == []
            bus.write("one")
            assert backlog.missed("bus", overlap=False) == ['"one"']
            assert backlog.missed("bus", overlap=False) == []


def test_a_large_bus_bus_is_no_burden(server, backlog, bus):
    # All at once, while a transaction is under way that makes each of them new: the worst case.
    backlog.missed("bus")
    with bus.transaction() as long:
        long.execute("INSERT INTO other VALUES (1)")
        server.execute(
            "INSERT INTO bus_bus (channel, message, create_date)"
            " SELECT '\"channel ' || i %% 100 || '\"', repeat('x', 200), '2020-01-01' FROM generate_series(1, %s) i",
            (200000,),
            bus.name,
        )
        first = _timed(lambda: backlog.missed("bus", overlap=False))
        second = _timed(lambda: backlog.missed("bus", overlap=False))
    backlog.missed("bus", overlap=False)
    bus.write("one")
    usual = _timed(lambda: backlog.missed("bus", overlap=False))
    assert len(first.value) == 100
    assert (second.value, usual.value) == ([], ['"one"'])
    # An answer is waited for no longer than that.
    assert max(first.seconds, second.seconds) < 5
    assert usual.seconds < 2


class _Clock:
    """What catchup takes for the monotonic clock."""

    def __init__(self, monkeypatch):
        self.now = time.monotonic() + 1
        monkeypatch.setattr(catchup.time, "monotonic", lambda: self.now)


class _timed:
    def __init__(self, action):
        began = time.perf_counter()
        self.value = action()
        self.seconds = time.perf_counter() - began


def _snapshot(server):
    return server.value(catchup.SNAPSHOT)

"""What was missed, as bus_bus tells it: the addon's queries on a real PostgreSQL."""

import contextlib
import json
import subprocess
import time

import psycopg2
import pytest

from bus_alt_connection import catchup, lookup
from stack.pgbouncer import PgBouncer
from stack.postgres import USER, PostgreSQL
from stack.process import identity
from stack.waiting import wait_until
from tests.support.backlog import AskedBacklog

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
    return AskedBacklog(server)


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
    bus.write("young", age=lookup.OVERLAP / 2)
    bus.write("old", age=lookup.OVERLAP * 2)
    assert backlog.missed("bus", overlap=False) == ['"young"']


def test_overlap_finds_rows_of_the_last_minute_again(backlog, bus):
    backlog.missed("bus")
    bus.write("young", age=lookup.OVERLAP / 2)
    bus.write("old", age=lookup.OVERLAP * 2)
    assert sorted(backlog.missed("bus", overlap=False)) == ['"old"', '"young"']
    assert backlog.missed("bus", overlap=True) == ['"young"']
    assert backlog.missed("bus", overlap=False) == []


def test_what_was_heard_shortly_before_the_loss_counts_as_missed(server, bus):
    backlog = AskedBacklog(server)
    backlog.missed("bus")
    bus.write("long ago")
    backlog.now += 30
    backlog.all_heard(*_moment(server))
    bus.write("before the last sign of life")
    backlog.now += catchup.MARGIN + 1
    backlog.all_heard(*_moment(server))
    bus.write("after it")
    backlog.now += 1
    # Not by date: these rows look old.
    assert sorted(backlog.missed("bus", overlap=False)) == ['"after it"', '"before the last sign of life"']


def test_one_sign_of_life_alone_proves_nothing(server, bus):
    backlog = AskedBacklog(server)
    backlog.missed("bus")
    bus.write("heard or not")
    backlog.now += 30
    backlog.all_heard(*_moment(server))
    assert backlog.missed("bus", overlap=False) == ['"heard or not"']


@pytest.mark.parametrize("distance", [10**9, 0], ids=["is behind", "has passed the mark since"])
def test_after_a_failover_to_a_server_that_was_behind_dates_tell(server, bus, distance):
    backlog = AskedBacklog(server)
    ahead = int(_moment(server)[0].split(":")[1]) + distance
    backlog.begin(backlog.now)
    for _ in range(2):
        # As if the snapshot was one of another server.
        backlog.all_heard("%d:%d:" % (ahead, ahead), 5)
        backlog.now += 300
    bus.write("sent since", age=590)
    bus.write("sent before", age=900)
    bus.other_transactions(10)
    assert backlog.missed("bus", overlap=True) == ['"sent since"']


@pytest.mark.parametrize("distance", [10**9, 1], ids=["is behind", "has passed the mark since"])
def test_a_failover_to_a_server_that_was_behind_is_noticed_while_polling_too(server, bus, distance):
    backlog = AskedBacklog(server)
    backlog.missed("bus")
    # As if it had been asked at a primary that was ahead, and numbered transactions by itself.
    moment = backlog._marks["bus"].moment
    ahead = int(moment.snapshot.split(":")[1]) + distance
    moment = moment._replace(snapshot="%d:%d:" % (ahead, ahead), started=moment.started - 10**9)
    backlog._marks["bus"] = backlog._marks["bus"]._replace(moment=moment)
    bus.write("sent since", age=1)
    bus.other_transactions(10)
    backlog.now += 5
    assert backlog.missed("bus", overlap=False) == ['"sent since"']
    assert backlog.missed("bus", overlap=False) == []


def test_a_database_that_has_lost_its_bus_bus_is_not_pending(server, backlog):
    with _database(server, "plain") as plain:
        server.execute(_TABLE, dbname="plain")
        plain.write("one", age=0)
        assert backlog.missed("plain") == ['"one"']
        server.execute("DROP TABLE bus_bus", dbname="plain")
        assert backlog.missed("plain") == []
        assert backlog.next_due(backlog.now) == float("inf")


@pytest.mark.parametrize("path", ["public", "tenant, public"])
def test_the_bus_bus_of_odoo_is_found_in_spite_of_a_search_path_that_a_client_left_empty(server, bus, path):
    server.execute("CREATE SCHEMA tenant AUTHORIZATION %s" % USER, dbname=bus.name)
    server.execute("CREATE TABLE tenant.bus_bus (LIKE public.bus_bus INCLUDING DEFAULTS)", dbname=bus.name)
    server.execute("ALTER TABLE tenant.bus_bus OWNER TO %s" % USER, dbname=bus.name)
    server.execute("ALTER ROLE %s IN DATABASE %s SET search_path = %s" % (USER, bus.name, path))
    with PgBouncer(server, databases={bus.name: "pool_size=1"}) as pooler:
        with contextlib.closing(pooler.connect(bus.name)) as dump, dump.cursor() as cr:
            dump.autocommit = True
            # As pg_dump does; it stays with the server connection.
            cr.execute("SELECT pg_catalog.set_config('search_path', '', false)")
        schema = path.partition(",")[0]
        statement = "INSERT INTO %s.bus_bus (channel, create_date) VALUES ('1', now() AT TIME ZONE 'UTC')"
        server.execute(statement % schema, dbname=bus.name)
        assert AskedBacklog(pooler).missed(bus.name) == ["1"]


def test_a_snapshot_of_one_database_holds_for_another(server, backlog, bus):
    # The self-check takes its snapshot in the system database.
    moment = _moment(server)
    backlog.begin(backlog.now)
    for _ in range(2):
        backlog.now += catchup.MARGIN + 1
        backlog.all_heard(*moment)
    bus.write("one")
    assert backlog.missed("bus", overlap=False) == ['"one"']


def test_a_database_without_bus_bus_has_nothing_and_may_get_one_later(server, backlog):
    with _database(server, "plain") as plain:
        assert backlog.missed("plain") == []
        server.execute(_TABLE, dbname="plain")
        plain.write("one", age=0)
        assert backlog.missed("plain") == ['"one"']


def test_a_database_that_does_not_exist_is_forgotten_on_the_word_of_the_server(backlog):
    backlog.add_pending(["nowhere"], backlog.now)
    with pytest.raises(psycopg2.Error, match="nowhere is gone"):
        backlog.missed("nowhere")


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
    query = "SELECT " + lookup._TXID + " AS whole FROM (SELECT %s::bigint AS next, %s::text::xid AS xmin) row_"
    assert server.value(query.replace("xmin::text", "row_.xmin::text"), (xmax, str(xmin))) == whole


def test_rows_are_told_apart_in_a_cluster_whose_transaction_ids_have_wrapped_around():
    with PostgreSQL() as server:
        server.stop()
        subprocess.run(
            [server.programs / "pg_resetwal", "--epoch=5", server.data],
            check=True,
            stdout=subprocess.DEVNULL,
            **identity(server.run_as),
        )
        server.start()
        assert int(_moment(server)[0].split(":")[0]) > 5 * _EPOCH
        with _database(server, "bus") as bus:
            server.execute(_TABLE, dbname="bus")
            bus.write("before")
            backlog = AskedBacklog(server)
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
    # The server gets LOOK_UP_TIMEOUT for each statement. The first attempt ends after QUICK_TIMEOUT.
    assert max(first.seconds, second.seconds) < catchup.LOOK_UP_TIMEOUT / 3
    assert usual.seconds < 2


def test_of_a_large_bus_bus_only_the_end_is_read_even_at_first(server, backlog, bus):
    rows = "INSERT INTO bus_bus (channel, create_date) SELECT '\"old\"', '2020-01-01' FROM generate_series(1, %s)"
    server.execute(rows, (3 * lookup.LATE_ROWS,), bus.name)
    server.execute("ANALYZE bus_bus", dbname=bus.name)
    before = scans(server, bus)
    assert backlog.missed("bus") == []
    bus.write("new")
    assert backlog.missed("bus", overlap=False) == ['"new"']
    # The statistics come a little later than the answer.
    wait_until(lambda: scans(server, bus).idx_scan > before.idx_scan, 15, "the look to be counted", 0.1)
    assert scans(server, bus).seq_scan == before.seq_scan


def scans(server, bus):
    query = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'bus_bus'"
    return server.execute(query, dbname=bus.name)[0]


def test_all_rows_of_an_outage_are_found_however_many(server, backlog, bus):
    backlog.missed("bus")
    # Many more than may be committed late: the first of them are far behind the highest id.
    rows = "INSERT INTO bus_bus (channel, create_date) SELECT i::text, '2020-01-01' FROM generate_series(1, %s) i"
    server.execute(rows, (2 * lookup.LATE_ROWS,), bus.name)
    assert len(backlog.missed("bus", overlap=False)) == 2 * lookup.LATE_ROWS
    assert backlog.missed("bus", overlap=False) == []


def test_a_bus_bus_whose_ids_begin_anew_is_read_from_its_beginning(server, backlog, bus):
    server.execute("SELECT setval('bus_bus_id_seq', 10000000)", dbname=bus.name)
    bus.write("before")
    backlog.missed("bus")
    server.execute("TRUNCATE bus_bus RESTART IDENTITY", dbname=bus.name)
    bus.write("new")
    assert backlog.missed("bus", overlap=False) == ['"new"']


def test_a_bus_bus_that_is_locked_does_not_keep_anybody_waiting(server, backlog, bus):
    with bus.transaction() as locking:
        locking.execute("LOCK TABLE bus_bus")
        began = time.monotonic()
        with pytest.raises(psycopg2.OperationalError, match="lock timeout"):
            backlog.missed("bus")
        assert time.monotonic() - began < 1
        assert not [row for row in server.activity() if row.usename == USER]
    assert backlog.missed("bus") == []


def test_a_look_up_that_takes_too_long_is_ended_in_the_server_as_well(server, backlog, bus, monkeypatch):
    monkeypatch.setattr(catchup, "LOOK_UP_TIMEOUT", 0.2)
    monkeypatch.setattr(lookup, "_MISSED", lookup._MISSED.replace("DISTINCT channel", "DISTINCT pg_sleep(60)::text"))
    bus.write("one", age=0)
    backlog._slow.add("bus")
    for attempt in range(1, 3):
        with pytest.raises(psycopg2.OperationalError, match="statement timeout"):
            backlog.missed("bus")
        assert backlog.too_large() == ["bus"] * (attempt - 1)
    assert not [row for row in server.activity() if row.usename == USER and row.state == "active"]


class _timed:
    def __init__(self, action):
        began = time.perf_counter()
        self.value = action()
        self.seconds = time.perf_counter() - began


def _moment(server):
    started = server.value("SELECT " + lookup.STARTED)
    return server.value("SELECT txid_current_snapshot()::text"), started

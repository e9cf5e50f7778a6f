"""What was missed is found in bus_bus: the addon's queries on a real PostgreSQL."""

import contextlib
import time

import psycopg2
import pytest

from bus_alt_connection import catchup, lookup
from stack.postgres import USER
from stack.waiting import wait_until
from tests.support.backlog import INSERT, OLD, AskedBacklog, create_database, create_table, write

_MANY = "INSERT INTO bus_bus (channel, create_date) SELECT i::text, '2020-01-01' FROM generate_series(1, %s) i"


@pytest.fixture(autouse=True)
def fewer_rows(monkeypatch):
    """Look up fewer rows than otherwise, in the same proportion: many take their time."""
    monkeypatch.setattr(lookup, "LATE_ROWS", 5000)
    monkeypatch.setattr(lookup, "NEW_ROWS", 500)


@pytest.fixture
def bus(server):
    """A function that commits a row into the bus_bus of a new database ``bus``."""
    create_database(server, "bus")
    yield lambda channel, age=OLD: write(server, "bus", channel, age)
    server.execute("DROP DATABASE bus WITH (FORCE)")


@pytest.fixture
def backlog(server, bus):
    """One that has looked into the empty bus_bus."""
    backlog = AskedBacklog(server)
    assert backlog.missed("bus") == []
    return backlog


@contextlib.contextmanager
def transaction(server):
    """A cursor whose transaction is committed at the end of the block."""
    with contextlib.closing(server.connect("bus", application_name="tests")) as connection:
        with connection, connection.cursor() as cr:
            yield cr


def test_a_row_that_is_committed_late_is_found_then_and_never_again(server, backlog, bus):
    with transaction(server) as late:
        # Its transaction id is that of the savepoint, which snapshots do not know.
        late.execute("SAVEPOINT inner_one")
        late.execute(INSERT, ("late", OLD))
        late.execute("RELEASE SAVEPOINT inner_one")
        bus("early")  # with a higher id
        assert backlog.missed("bus") == ["early"]
        server.execute(_MANY, (9 * lookup.LATE_ROWS // 10,), "bus")
        assert len(backlog.missed("bus")) == 9 * lookup.LATE_ROWS // 10
    assert backlog.missed("bus") == ["late"]
    assert backlog.missed("bus") == []


def test_all_rows_of_an_outage_are_found_however_many(server, backlog):
    # Many more than may be committed late: the first of them are far behind the highest id.
    server.execute(_MANY, (2 * lookup.LATE_ROWS,), "bus")
    assert len(backlog.missed("bus")) == 2 * lookup.LATE_ROWS
    assert backlog.missed("bus") == []


def test_what_was_heard_shortly_before_the_loss_counts_as_missed(server, backlog, bus):
    bus("long ago")
    for channel in ("before the last sign of life", "after it"):
        backlog.now += catchup.MARGIN + 1
        # In another database: a snapshot holds for all of them.
        started = server.value("SELECT " + lookup.STARTED)
        backlog.all_heard(server.value("SELECT txid_current_snapshot()::text"), started)
        bus(channel)
    assert sorted(backlog.missed("bus")) == ["after it", "before the last sign of life"]


def test_a_database_without_bus_bus_has_nothing_and_is_found_once_it_has_one(server, backlog):
    server.execute("DROP TABLE bus_bus", dbname="bus")
    assert backlog.missed("bus") == []
    assert backlog.next_due(backlog.now) == float("inf")
    create_table(server, "bus")
    write(server, "bus", "new", age=0)
    assert backlog.missed("bus") == ["new"]


def test_of_a_large_bus_bus_only_the_end_is_read_even_at_first(server, bus):
    server.execute(_MANY, (3 * lookup.LATE_ROWS,), "bus")
    server.execute("ANALYZE bus_bus", dbname="bus")
    before = _scans(server)
    backlog = AskedBacklog(server)
    assert backlog.missed("bus") == []
    bus("new")
    assert backlog.missed("bus") == ["new"]
    # The statistics come a little later than the answer.
    wait_until(lambda: _scans(server).idx_scan > before.idx_scan, 15, "the look to be counted", 0.1)
    assert _scans(server).seq_scan == before.seq_scan


def _scans(server):
    query = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'bus_bus'"
    return server.execute(query, dbname="bus")[0]


def test_a_bus_bus_that_is_locked_does_not_keep_anybody_waiting(server, backlog):
    with transaction(server) as locking:
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
    bus("one", age=0)
    backlog._slow.add("bus")
    for attempt in range(2):
        with pytest.raises(psycopg2.OperationalError, match="statement timeout"):
            backlog.missed("bus")
        assert backlog.too_large() == ["bus"] * attempt
    assert not [row for row in server.activity() if row.usename == USER and row.state == "active"]

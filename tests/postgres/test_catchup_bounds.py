"""Looking up what was missed takes little of the server, however many rows Odoo keeps."""

import json
import time

import pytest

from bus_alt_connection import catchup, connection
from bus_alt_connection.catchup import Backlog
from stack.postgres import PASSWORD, USER
from stack.waiting import wait_until

ROWS = 3000000
INSERT = """
    INSERT INTO bus_bus (create_date, channel, message)
    SELECT now() AT TIME ZONE 'UTC' - %s * interval '1 second', %s || n %% %s, 'm' FROM generate_series(1, %s) n
"""


@pytest.fixture(scope="module")
def big(server):
    """The server, with a bus_bus of three million rows in the database ``big``."""
    server.execute("CREATE DATABASE big OWNER %s" % USER)
    server.execute(
        "CREATE TABLE bus_bus (id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar)",
        dbname="big",
    )
    server.execute("ALTER TABLE bus_bus OWNER TO %s" % USER, dbname="big")
    server.execute(INSERT, (3600, "old", 1, ROWS), "big")
    server.execute("VACUUM ANALYZE bus_bus", dbname="big")
    return server


@pytest.fixture
def look(big):
    """Return a function that looks for what was missed at a time, and returns the channels."""

    def open_ordinary(database):
        return connection.connect(
            {"host": big.host, "port": big.port, "user": USER, "password": PASSWORD, "dbname": database}
        )

    backlog = Backlog(open_ordinary)

    def look(now, afresh=False):
        found = []

        def give(channels):
            found.extend(channels)
            return True

        backlog.owe(["big"], now, afresh)
        assert not backlog.pay(give, now)
        return found

    look.backlog = backlog
    return look


def test_a_look_while_polling_takes_little(big, look):
    now = time.monotonic()
    look(now, afresh=True)
    seconds = []
    for number in range(5):
        big.execute(INSERT, (0, json.dumps("new%d" % number)[:-1], 1, 1), "big")
        began = time.monotonic()
        assert look(now + number) == ['"new%d0' % number]
        seconds.append(time.monotonic() - began)
    assert max(seconds) < 0.3


def test_many_rows_written_in_an_outage_are_all_found(big, look):
    now = time.monotonic()
    look(now, afresh=True)
    big.execute(INSERT, (0, "outage", 200000, 200000), "big")
    # Whatever other tests wrote is of this minute too.
    assert len([channel for channel in look(now + 100, afresh=True) if channel.startswith("outage")]) == 200000
    # And none of them again.
    assert look(now + 200) == []


def test_a_row_that_commits_late_is_found(big, look):
    now = time.monotonic()
    late = big.connect("big")
    try:
        with late.cursor() as cr:
            cr.execute(INSERT, (0, "late", 1, 1))
            big.execute(INSERT, (0, "early", 90000, 90000), "big")
            look(now, afresh=True)
            look(now + 10)
            late.commit()
        assert look(now + 20) == ["late0"]
        assert look(now + 30) == []
    finally:
        late.close()


def test_a_look_that_takes_too_long_ends_in_the_server_too(big, look, monkeypatch):
    monkeypatch.setattr(catchup, "LOOK_TIMEOUT", 0.2)
    locking = big.connect("big")
    try:
        with locking.cursor() as cr:
            cr.execute("LOCK TABLE bus_bus IN ACCESS EXCLUSIVE MODE")
            look.backlog.owe(["big"], time.monotonic())
            assert list(look.backlog.pay(None, time.monotonic())) == ["big"]
            wait_until(lambda: not [one for one in big.activity() if one.wait_event_type == "Lock"], 3)
    finally:
        locking.close()


def test_a_new_table_of_that_name_is_looked_at_from_its_beginning(big, look):
    now = time.monotonic()
    look(now, afresh=True)
    big.execute("TRUNCATE bus_bus RESTART IDENTITY", dbname="big")
    big.execute(INSERT, (0, "anew", 1, 1), "big")
    assert look(now + 10) == ["anew0"]

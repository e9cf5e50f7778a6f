"""Looking up what was missed takes little of the server, however many rows Odoo keeps."""

import json
import time

import pytest

from stack.postgres import USER
from tests.support.backlog import AskedBacklog

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
def backlog(big):
    return AskedBacklog(big)


def test_the_first_look_up_takes_little(big):
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert AskedBacklog(big).missed("big") == []
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.3


def test_a_look_while_polling_takes_little(big, backlog):
    backlog.missed("big")
    seconds = []
    for number in range(5):
        big.execute(INSERT, (0, json.dumps("new%d" % number)[:-1], 1, 1), "big")
        began = time.monotonic()
        assert backlog.missed("big", overlap=False) == ['"new%d0' % number]
        seconds.append(time.monotonic() - began)
        backlog.now += 1
    # The whole table takes more than a second; other tests may run beside this one.
    assert min(seconds) < 0.3


def test_many_rows_written_in_an_outage_are_all_found(big, backlog):
    backlog.missed("big")
    big.execute(INSERT, (0, "outage", 200000, 200000), "big")
    # Whatever other tests wrote is of this minute too.
    backlog.now += 100
    assert len([channel for channel in backlog.missed("big") if channel.startswith("outage")]) == 200000
    # And none of them again.
    backlog.now += 100
    assert backlog.missed("big", overlap=False) == []


def test_a_row_that_commits_late_is_found(big, backlog):
    late = big.connect("big")
    try:
        with late.cursor() as cr:
            cr.execute(INSERT, (0, "late", 1, 1))
            big.execute(INSERT, (0, "early", 90000, 90000), "big")
            backlog.missed("big")
            backlog.now += 10
            backlog.missed("big", overlap=False)
            late.commit()
        backlog.now += 10
        assert backlog.missed("big", overlap=False) == ["late0"]
        backlog.now += 10
        assert backlog.missed("big", overlap=False) == []
    finally:
        late.close()

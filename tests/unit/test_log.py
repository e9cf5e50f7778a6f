"""The log has a line when nothing is heard any more, one a minute, and one when all is well; and never a secret."""

import logging
from types import SimpleNamespace

import pytest

from bus_alt_connection import log
from bus_alt_connection.log import (
    CONFIRMED,
    FAILED,
    LOST,
    MOVED,
    UNHEARD,
    Event,
    OutageLog,
    log_bug,
    redact,
)
from tests.support.secrets import SECRETS, leaks

SESSION = SimpleNamespace(
    facts=SimpleNamespace(address="db-01:5432", backend_pid=42), leader_pid=None, round_trip=0.0012
)
LISTENING = "on cron_trigger, imbus at db-01:5432 (database postgres, backend pid 42), confirmed in 1.2 ms"


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def tell(clock, caplog, monkeypatch):
    """Return a function that tells of an event; it returns level and text of the line, None if there is none."""
    caplog.set_level(logging.INFO, "bus_alt_connection")
    monkeypatch.setattr(log, "_last", {})
    counters = dict.fromkeys(log.COUNTERS, 0)
    outage_log = OutageLog("postgres", counters)

    def tell(kind, session=None, reason="cron_trigger, imbus"):
        caplog.clear()
        outage_log(Event(kind, session, reason, clock.now))
        lines = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert len(lines) < 2
        return lines[0] if lines else None

    tell.counters = counters
    return tell


# An outage


def test_an_outage_has_a_line_when_it_begins_and_one_when_it_ends(tell, clock):
    assert tell(CONFIRMED, SESSION) == ("INFO", "listening " + LISTENING)
    assert tell(LOST, SESSION, "server closed the connection") == (
        "WARNING",
        "lost the listener of database postgres: server closed the connection (it was backend pid 42 at db-01:5432);"
        " trying again",
    )
    assert tell(FAILED, None, "refused") is None
    clock.now += 2.5
    tell.counters.update(notifications_received=5, notifications_caught_up=1)
    totals = ". Since the listener started: 1 outage(s), 2.50 s; 5 notification(s) received, 0 dropped, 1 caught up"
    took = "; the outage took 2.50 s and 2 attempt(s)"
    assert tell(CONFIRMED, SESSION) == ("INFO", "listening again " + LISTENING + took + totals)
    assert tell(CONFIRMED, SESSION) == ("INFO", "listening " + LISTENING)
    tell(LOST, SESSION, "server closed the connection")
    clock.now += 1
    assert "Since the listener started: 2 outage(s), 3.50 s;" in tell(CONFIRMED, SESSION)[1]


def test_a_first_connect_that_fails_is_an_error_and_counts_as_an_attempt(tell):
    assert tell(FAILED, None, "refused") == ("ERROR", "can't listen on database postgres: refused; trying again")
    assert "and 2 attempt(s)." in tell(CONFIRMED, SESSION)[1]


def test_a_long_outage_has_a_line_each_minute(tell, clock):
    for _outage in range(2):
        tell(LOST, SESSION, "lost")
        lines = []
        for _second in range(180):
            clock.now += 1
            lines.append(tell(FAILED, None, "refused"))
        lines = [line for line in lines if line]
        assert lines[2:] == [("WARNING", "still not listening on database postgres: refused (for 180 s, 180 attempts)")]
        tell(CONFIRMED, SESSION)


def test_what_an_operator_has_to_mend_is_an_error_once_in_each_outage(tell):
    pooler = ("ERROR", "can't listen on database postgres: is a pooler")
    for _outage in range(2):
        assert tell(UNHEARD, SESSION, "is a pooler") == pooler
        assert tell(UNHEARD, SESSION, "is a pooler") is None
        assert tell(UNHEARD, SESSION, "another server")[0] == "ERROR"
        tell(CONFIRMED, SESSION)


def test_a_move_neither_begins_an_outage_nor_ends_one(tell, clock):
    tell(CONFIRMED, SESSION)
    moves = "INFO", "the listener of database postgres is switching to another connection: there is a better one"
    assert tell(MOVED, SESSION, "there is a better one") == moves
    assert tell(MOVED, SESSION, "there is a better one") is None
    following = SimpleNamespace(**dict(vars(SESSION), leader_pid=7))
    assert tell(CONFIRMED, following) == ("INFO", "listening " + LISTENING.replace(" at ", " through "))
    tell(LOST, SESSION, "lost")
    clock.now += 1
    # The lines on the outage say enough: each leader that is tried and left would give another one.
    assert tell(MOVED, None, "process 7 is gone") is None
    clock.now += 1
    assert tell(FAILED, None, "refused") is None
    # The move is none of the attempts.
    assert "; the outage took 2.00 s and 2 attempt(s)." in tell(CONFIRMED, SESSION)[1]


# Bugs and secrets


def test_each_bug_is_told_once_a_minute_with_its_place_and_no_secret(clock, logged):
    def fail(kind, text):
        try:
            raise kind(text)
        except kind as error:
            log_bug(logging.getLogger("bus_alt_connection.test"), error)

    for _ in range(50):
        fail(KeyError, "password=s3cret")
    (line,) = logged("internal error")
    assert "in fail" in line and "s3cret" not in line
    with pytest.raises(ZeroDivisionError) as another:
        print(1 / 0)
    log_bug(logging.getLogger("bus_alt_connection.test"), another.value)
    assert len(logged("internal error")) == 2
    clock.now += 61
    fail(KeyError, "again")
    assert len(logged("internal error")) == 3


@pytest.mark.parametrize(
    "text, shown",
    [
        ("two\n  lines\n", "two; lines"),
        ("postgresql://odoo:{}@db-01/x", "postgresql://odoo:***@db-01/x"),
        ("postgresql://db/x?password={}&sslmode=a", "postgresql://db/x?password=***"),
        ("host=a password='{}' user=b", "host=a password=***"),
        ("host=db sslpassword = {} oauth_client_secret='{}'", "host=db sslpassword = ***"),
    ],
)
def test_a_message_is_one_line_without_passwords(text, shown):
    for secret in SECRETS:
        assert redact(text.replace("{}", secret)) == shown


@pytest.mark.parametrize("keyword", log.SECRETS)
def test_a_message_with_a_known_password_is_told_without_it(keyword):
    for secret in SECRETS:
        assert leaks(secret)
        told = redact("can't do it:\n%s is wrong\n" % secret, {keyword: secret, "port": 5432})
        assert told == "can't do it:; *** is wrong"
    for unset in (None, "", False):
        assert redact("as it is", {keyword: unset}) == "as it is"

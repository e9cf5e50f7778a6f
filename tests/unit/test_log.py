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
    Journal,
    OutageLog,
    log_bug,
    rarely,
    redact,
)

SESSION = SimpleNamespace(
    facts=SimpleNamespace(address="db-01:5432", backend_pid=42),
    leader_pid=None,
    confirmed={"imbus", "cron_trigger"},
    round_trip=0.0012,
)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def told(clock, caplog, monkeypatch):
    """Return a function that tells of an event; it returns level and text of the line, None if there is none."""
    caplog.set_level(logging.INFO, "bus_alt_connection")
    monkeypatch.setattr(log, "_last", {})
    outage_log = OutageLog("postgres")

    def tell(kind, session=None, reason="cron_trigger, imbus"):
        caplog.clear()
        outage_log(Event(kind, session, reason, clock.now))
        lines = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert len(lines) < 2
        return lines[0] if lines else None

    return tell


LISTENING = "on cron_trigger, imbus at db-01:5432 (database postgres, backend pid 42), confirmed in 1.2 ms"


def test_all_is_well_from_the_beginning(told):
    assert told(CONFIRMED, SESSION) == ("INFO", "listening " + LISTENING)


def test_an_outage(told, clock):
    told(CONFIRMED, SESSION)
    assert told(LOST, SESSION, "server closed the connection") == (
        "WARNING",
        "lost the listener of database postgres: server closed the connection (it was backend pid 42 at db-01:5432);"
        " trying again until it works",
    )
    assert told(FAILED, None, "refused") is None
    clock.now += 2.5
    assert told(CONFIRMED, SESSION) == ("INFO", "listening again " + LISTENING + "; it took 2.50 s and 2 attempt(s)")


@pytest.mark.parametrize("failures, attempts", [(0, 1), (1, 2), (5, 6)])
def test_each_connect_of_an_outage_counts_as_an_attempt(told, failures, attempts):
    told(CONFIRMED, SESSION)
    told(LOST, SESSION, "lost")
    for _ in range(failures):
        told(FAILED, None, "refused")
    assert told(CONFIRMED, SESSION)[1].endswith("and %d attempt(s)" % attempts)


def test_the_first_connect_counts_if_it_fails(told):
    assert told(FAILED, None, "refused") == (
        "ERROR",
        "can't listen on database postgres: refused; trying again until it works",
    )
    assert told(CONFIRMED, SESSION)[1].endswith("and 2 attempt(s)")


def test_no_attempts_are_carried_over_to_the_next_outage(told):
    for _ in range(2):
        told(LOST, SESSION, "lost")
        told(FAILED, None, "refused")
        assert told(CONFIRMED, SESSION)[1].endswith("and 2 attempt(s)")


def test_a_long_outage_is_told_once_a_minute(told, clock):
    told(LOST, SESSION, "lost")
    lines = []
    for _ in range(180):
        clock.now += 1
        lines.append(told(FAILED, None, "refused"))
    lines = [line for line in lines if line]
    assert len(lines) == 3
    assert lines[-1] == (
        "WARNING",
        "still not listening on database postgres: refused (for 180 s, 181 attempts)",
    )


def test_what_an_operator_has_to_mend_is_an_error_once(told, clock):
    told(CONFIRMED, SESSION)
    pooler = ("ERROR", "can't listen on database postgres: is a pooler")
    assert told(UNHEARD, SESSION, "is a pooler") == pooler
    assert told(UNHEARD, SESSION, "is a pooler") is None
    assert told(UNHEARD, SESSION, "another server")[0] == "ERROR"
    told(CONFIRMED, SESSION)
    assert told(UNHEARD, SESSION, "is a pooler") == pooler


def test_a_move_is_no_outage(told, clock):
    told(CONFIRMED, SESSION)
    moves = "INFO", "the listener of database postgres moves: there is a better one"
    assert told(MOVED, SESSION, "there is a better one") == moves
    clock.now += 3
    facts = SimpleNamespace(address="process 7 at db-01:5432", backend_pid=42)
    guest = SimpleNamespace(**dict(vars(SESSION), facts=facts, leader_pid=0))
    told_of_guest = LISTENING.replace("at db-01", "through process 7 at db-01")
    assert told(CONFIRMED, guest) == ("INFO", "listening " + told_of_guest)


def test_a_move_does_not_end_an_outage(told, clock):
    told(CONFIRMED, SESSION)
    told(LOST, SESSION, "lost")
    clock.now += 1
    assert told(MOVED, None, "process 7 is gone")[0] == "INFO"
    clock.now += 1
    assert told(FAILED, None, "refused") is None
    clock.now += 1
    # A move is none of its attempts.
    assert told(CONFIRMED, SESSION)[1].endswith("; it took 3.00 s and 2 attempt(s)")


# Bugs


def fail(text):
    raise KeyError(text)


def catch(text):
    try:
        fail(text)
    except KeyError as error:
        log_bug(logging.getLogger("bus_alt_connection.test"), error)


def test_a_bug_is_told_once_a_minute_with_its_place_and_no_secrets(clock, logged):
    for _ in range(50):
        catch("password=s3cret")
    (line,) = logged("internal error")
    assert "in fail" in line and "s3cret" not in line
    clock.now += 61
    catch("again")
    assert len(logged("internal error")) == 2


def test_another_bug_is_told_as_well(clock, logged):
    catch("one")
    try:
        raise ValueError("two")
    except ValueError as error:
        log_bug(logging.getLogger("bus_alt_connection.test"), error)
    assert len(logged("internal error")) == 2


def test_what_happens_rarely_happens_once_a_minute_for_each(clock, logged):
    assert [rarely("a"), rarely("b"), rarely("a"), rarely("b")] == [True, True, False, False]
    clock.now += 59
    assert not rarely("a")
    clock.now += 1
    assert [rarely("a"), rarely("a")] == [True, False]


# Secrets


@pytest.mark.parametrize(
    "text, shown",
    [
        ("nothing here", "nothing here"),
        ("two\n  lines\n", "two; lines"),
        ("postgresql://odoo:s3cret@db-01/x", "postgresql://odoo:***@db-01/x"),
        ("host=a password=s3cret user=b", "host=a password=***"),
        ('connection to "db-01" failed: s3cret is wrong', 'connection to "db-01" failed: *** is wrong'),
        ("", ""),
    ],
)
def test_no_message_has_a_password_or_a_second_line(text, shown):
    assert redact(text, {"password": "s3cret", "host": "db-01"}) == shown


# A journal


def test_a_journal_writes_in_order_and_when_it_is_time(clock):
    written = []
    journal = Journal(written.append)
    assert journal.due == float("inf")
    journal(Event(LOST, SESSION, "cut", clock.now))
    clock.now += 0.1
    journal.add(lambda *args: written.append(args), "a", 1)
    assert journal.due == 1000.0 + log.LOG_DELAY
    journal.write(1000.0)
    assert written == []
    journal.write(1000.0 + log.LOG_DELAY)
    assert [event.kind for event in written] == [LOST]
    journal.write(float("inf"))
    assert written[1:] == [("a", 1)] and journal.due == float("inf")


def test_a_journal_that_nobody_writes_does_not_grow_without_limit(clock):
    journal = Journal(None)
    for number in range(2 * log.LONGEST_JOURNAL):
        journal.add(print, number)
    assert len(journal._entries) == log.LONGEST_JOURNAL

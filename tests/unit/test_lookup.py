"""A look-up executes nothing that another user of the database has defined, and reads only what it may trust."""

import re
import types

import psycopg2
import pytest

from bus_alt_connection import catchup, check, connection, listener, lookup, supervisor, tasks

# What is executed with a search_path of somebody else's.
UNSAFE_PATH = {
    "lookup._FIND": lookup._FIND,
    "connection._FACTS": connection._FACTS,
    "connection._OLDEST_TRANSACTION": connection._OLDEST_TRANSACTION,
    "supervisor._SNAPSHOT": supervisor._SNAPSHOT,
    "supervisor.NOTIFY": supervisor.NOTIFY,
    "listener._READ_SETTINGS": listener._READ_SETTINGS,
    "check._LISTENS": check._LISTENS,
    "check._CAPACITY": check._CAPACITY,
}
# Parts of the syntax that are followed by a parenthesis; no function has these names.
SYNTAX = {"select", "extract", "any", "array", "where"}


@pytest.mark.parametrize("statement", UNSAFE_PATH.values(), ids=UNSAFE_PATH)
def test_all_names_are_those_of_pg_catalog(statement):
    text = re.sub(r"'[^']*'|%s", "", statement)
    text = re.sub(r"OPERATOR\(pg_catalog\.[^)]+\)|::pg_catalog\.\w+", "", text)
    assert not re.search(r"::|[=<>+*/~|]", text)
    functions = [name.lower() for name in re.findall(r"([\w.]+)\s*\(", text)]
    tables = re.findall(r"\b(?:FROM|JOIN)\s+([\w.]+)", re.sub(r"\bepoch FROM", "", text))
    assert [name for name in functions + tables if not name.startswith("pg_catalog.") and name not in SYNTAX] == []


class Answers:
    """A connection that gives these rows, one after the other. ``asked``: the statements."""

    def __init__(self, *rows):
        self._rows = list(rows)
        self.asked = []

    def asking_row(self, query, values=None, columns=1, timeout=None):
        yield from self.asking(query)
        return self._rows.pop(0)

    def asking(self, query, values=None):
        self.asked.append(query)
        yield from ()


SINCE = lookup.Mark(0.0, lookup.Moment("100:100:", 1), [])


def look_up(answers):
    return tasks.finish(lookup.looking_up(answers, SINCE, False, 1, 10.0))


@pytest.mark.parametrize(
    ("is_table", "is_trusted", "is_standby", "refusal"),
    [
        (False, True, False, "not an ordinary table"),
        (True, False, False, "belongs to another role"),
        (True, True, True, "a standby"),
    ],
)
def test_a_table_that_is_not_to_be_trusted_is_not_read(is_table, is_trusted, is_standby, refusal):
    answers = Answers(("public",), (is_table, is_trusted, is_standby, "d1"))
    with pytest.raises(psycopg2.NotSupportedError, match=refusal):
        look_up(answers)
    assert len(answers.asked) == 3 and answers.asked[-1] == "ROLLBACK"


def test_everything_else_is_executed_with_pg_catalog_as_its_path_and_with_limits():
    answers = Answers(("it's",), (True, True, False, "d1"), ("100:100:", 1, True, [], []))
    look_up(answers)
    begin, check_table, _read, _commit = answers.asked
    assert "lock_timeout = 200;" in begin and "statement_timeout = 1000;" in begin and "row_security = off" in begin
    assert check_table.startswith('SET LOCAL search_path = pg_catalog, pg_temp; LOCK TABLE "it\'s".bus_bus')


def test_a_look_up_goes_further_back_until_it_has_read_enough():
    part, whole = ("110:110:", 1, False, ["a"], []), ("110:110:", 1, True, ["a", "b"], [])
    found = look_up(Answers(("public",), (True, True, False, "d1"), part, whole))
    assert found.channels == ["a", "b"]


def test_transactions_of_another_server_are_not_compared():
    other, by_date = ("5:5:", 2, True, [], []), ("5:5:", 2, True, ["a"], [])
    found = look_up(Answers(("public",), (True, True, False, "d1"), other, by_date))
    assert (found.channels, found.mark.moment) == (["a"], lookup.Moment("5:5:", 2))


def test_a_look_up_begins_seconds_before_the_last_sign_of_life():
    # The NOTIFY of what was committed before it may have been on its way to the session that was lost.
    backlog = catchup.Backlog(None)
    backlog.begin(0.0)
    for at in (5.0, 100.0, 109.0, 115.0):
        backlog.heard_up_to(lookup.Moment("100:100:", 1), at)
    backlog.add_pending(["d1"], 120.0)
    assert backlog._pending["d1"].since.at == 100.0


def test_what_a_full_feed_drops_again_is_looked_up_again(fake, options):
    listener = types.SimpleNamespace(in_force=(None, {}), wanted={"imbus"}, dropped=0, lives=1)
    backlog = catchup.Backlog(fake.opening)
    watching = supervisor.Supervisor(listener, fake.opening, catchup.Databases(["d1"]), backlog, options)
    for now in (100.0, 200.0):
        listener.dropped += 1
        watching._note_changes(now)
        assert list(backlog._pending) == ["d1"]
        backlog._pending.clear()
        listener.dropped += 1
        # Not at once, while the feed is still full.
        assert watching._note_changes(now + 1) == now + supervisor.DROPPED_INTERVAL and not backlog._pending


def test_databases_that_do_not_answer_leave_attempts_for_those_that_do():
    backlog = catchup.Backlog(None)
    backlog._may_fail, backlog._may_fail_at = catchup.RESERVED, 100.0
    assert backlog._free_at(False, 100.0) == 100.0
    assert backlog._free_at(True, 100.0) > 100.0

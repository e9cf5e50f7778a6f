"""What Odoo's loops work with: a feed, and a cursor of their series' own class whose connection is a feed."""

import functools
import select

import psycopg2
import pytest
from psycopg2 import sql
from psycopg2.extensions import POLL_OK, Notify

from bus_alt_connection.cursor import (
    FEED_SIZE,
    NO_POOL,
    Feed,
    ListeningConnection,
    _listen_statements,
    beginning,
    begins_with_listen,
    turn,
)
from tests.unit.fakes import Cursor as FakeCursor
from tests.unit.fakes import FakeFeed, FakePool, FakePsycopg, connected


def payloads(feed):
    return [notification.payload for notification in feed.notifies]


def is_readable(feed):
    return bool(select.select([feed], [], [], 0)[0])


# Feeds


@pytest.fixture
def feed():
    feed = Feed()
    feed.channels = frozenset(["imbus", "orders"])
    yield feed
    feed.close()


def test_what_nobody_fetches_is_bounded_and_looked_up_later(feed, listen, logged):
    listener = listen(FakeFeed("imbus"))
    connected(listener)
    feed.channels = frozenset(["imbus"])
    listener.add(feed)
    for number in range(3):
        listener.deliver([Notify(1, "imbus", '["%d"]' % number)] * FEED_SIZE)
    assert listener.dropped and listener.counters["notifications_dropped"] == 2 * FEED_SIZE
    assert len(logged("does not fetch its notifications")) == 1
    # Odoo's cron polls and takes nothing out.
    for _ in range(2):
        feed.poll()
        assert len(feed.notifies) == FEED_SIZE
        assert listener.deliver([Notify(1, "imbus", '["again"]')])
    assert payloads(feed)[-1] == '["again"]'


def test_an_interruption_is_raised_once_at_its_place_among_the_notifications(feed):
    feed.put([Notify(1, "imbus", "before")])
    for _ in range(3):
        feed.interrupt("the connection was lost")
    feed.put([Notify(1, "imbus", "after")])
    assert is_readable(feed) and feed.poll() == POLL_OK
    assert payloads(feed) == ["before"]
    assert is_readable(feed)
    with pytest.raises(psycopg2.OperationalError, match="the connection was lost"):
        feed.poll()
    assert payloads(feed) == ["before"]
    assert is_readable(feed) and feed.poll() == POLL_OK
    assert payloads(feed) == ["before", "after"]
    assert not is_readable(feed)


def test_a_closed_feed_takes_nothing_more(feed):
    feed.close()
    assert feed.put([Notify(1, "imbus", "x")]) == 0
    feed.interrupt("lost")
    with pytest.raises(psycopg2.InterfaceError):
        feed.poll()


# Gaps, of which the listeners of other channels than Odoo's are told


FACTS = "of a session"


def told_of_gaps(feed):
    """Return how often ``poll`` raises until nothing is pending."""
    raised = 0
    for _ in range(5):
        try:
            feed.poll()
        except psycopg2.OperationalError as error:
            assert "may be lost" in str(error)
            raised += 1
    return raised


def test_each_gap_is_told_once_when_listen_is_in_force_again(feed):
    feed.tell(FACTS, {"imbus": 1, "orders": 2})
    feed.rely(True)
    assert told_of_gaps(feed) == 0
    for number in (3, 5):
        feed.tell(None, {})
        # Too early: a query that its owner makes now may miss something.
        assert told_of_gaps(feed) == 0
        for _ in range(2):
            feed.tell(FACTS, {"imbus": number, "orders": number + 1})
        assert told_of_gaps(feed) == 1


def test_a_listen_that_comes_into_force_late_is_a_gap(feed):
    feed.rely(False)
    feed.tell(FACTS, {"imbus": 1})
    assert told_of_gaps(feed) == 0
    feed.tell(FACTS, {"imbus": 1, "orders": 2})
    assert told_of_gaps(feed) == 1


def test_neither_odoos_own_channels_nor_a_new_listen_have_gaps(feed):
    feed.tell(FACTS, {"imbus": 1, "orders": 2})
    feed.rely(True)
    feed.channels = frozenset(["imbus", "cron_trigger"])
    feed.rely(False)
    feed.tell(None, {})
    feed.tell(FACTS, {"imbus": 3, "cron_trigger": 4})
    feed.channels = frozenset(["imbus", "orders"])
    feed.tell(FACTS, {"imbus": 3, "orders": 5})
    assert told_of_gaps(feed) == 0


def test_what_does_not_fit_is_dropped_and_is_a_gap(feed):
    assert feed.put([Notify(1, "orders", "x")] * (FEED_SIZE - 1)) == 0
    assert feed.put([Notify(1, "orders", "x")] * 3) == 2
    feed.poll()
    with pytest.raises(psycopg2.OperationalError, match="were dropped"):
        feed.poll()


# Cursors of a function that has a LISTEN statement


class RecordingListener:
    """What a cursor wants of a listener."""

    def __init__(self):
        self.calls = []

    def listen(self, feed, channels):
        feed.channels = channels
        self.calls.append(sorted(channels))

    def wait_for_listen(self, feed, timeout):
        self.calls.append("wait")

    def remove(self, feed):
        self.calls.append("remove")


@pytest.fixture
def pool():
    return FakePool(FakePsycopg)


@pytest.fixture
def recorder():
    return RecordingListener()


@pytest.fixture
def ordinary(pool):
    """Return a function that opens an ordinary cursor."""
    return lambda: FakeCursor(pool, "orders", {"database": "orders"})


@pytest.fixture
def cursor(ordinary, recorder):
    cursor = FakeCursor(NO_POOL, "orders", {})
    turn(cursor, ListeningConnection(ordinary, lambda feed: recorder))
    assert isinstance(cursor, FakeCursor)
    return cursor


def done(pool):
    return [connection.done for connection in pool.lent]


def test_without_a_listen_it_is_an_ordinary_cursor(cursor, pool, recorder):
    assert pool.lent == []
    cursor.execute("SELECT 1")
    assert cursor.fetchone() == ("answer to SELECT 1",)
    cursor.commit()
    cursor.execute("SELECT 2")
    assert done(pool) == [["SELECT 1", "COMMIT", "SELECT 2"]]
    cursor.close()
    assert pool.kept == pool.lent
    assert recorder.calls == []


def test_listen_takes_no_pooled_connection_and_counts_from_the_commit(cursor, pool, recorder):
    cursor.execute("LISTEN orders")
    cursor.execute("LISTEN orders")
    cursor.execute('listen "A b";')
    cursor.commit()
    cursor.execute("UNLISTEN orders")
    cursor.execute("UNLISTEN *")
    cursor.close()
    assert recorder.calls == [["orders"], ["A b", "orders"], "wait", ["A b"], [], "remove"]
    assert pool.lent == []
    # Odoo's hooks run as on any cursor.
    assert cursor.hooks_run[:2] == ["precommit", "postcommit"]


def test_while_it_listens_it_has_a_pooled_connection_for_a_transaction_only(cursor, pool):
    cursor.execute("LISTEN orders")
    cursor.execute("INSERT 1")
    assert len(pool.in_use) == 1
    cursor.commit()
    assert pool.in_use == []
    cursor.execute("INSERT 2")
    cursor.rollback()
    assert pool.in_use == []
    assert done(pool) == [["INSERT 1", "COMMIT", "ROLLBACK"], ["INSERT 2", "ROLLBACK", "ROLLBACK"]]


def test_a_failed_commit_is_an_error_and_leaves_no_connection_behind(cursor, pool, recorder):
    cursor.execute("LISTEN orders")
    cursor.execute("INSERT")

    def fail():
        raise psycopg2.OperationalError("could not serialize access")

    pool.lent[0].commit = fail
    with pytest.raises(psycopg2.OperationalError):
        cursor.commit()
    assert pool.in_use == []
    assert "wait" not in recorder.calls


def test_to_close_it_takes_no_connection_and_ends_all(cursor, pool):
    cursor.close()
    assert pool.lent == []
    assert cursor.closed
    cursor.close()
    for statement in ("LISTEN orders", "SELECT 1", "SELECT pg_is_in_recovery()"):
        with pytest.raises(psycopg2.InterfaceError):
            cursor.execute(statement)


def test_to_close_it_ends_the_feed_even_if_the_pooled_connection_is_lost(cursor, pool, recorder):
    cursor.execute("LISTEN orders")
    cursor.execute("SELECT 1")

    def fail():
        pool.lent[0].closed = 2
        raise psycopg2.InterfaceError("connection already closed")

    pool.lent[0].rollback = fail
    with pytest.raises(psycopg2.InterfaceError):
        cursor.close()
    assert recorder.calls[-1] == "remove"
    assert cursor._cnx.closed
    # What was written is gone, as with psycopg2.
    with pytest.raises(psycopg2.InterfaceError):
        cursor.commit()


def test_whether_it_is_in_recovery_takes_no_connection_unless_more_is_asked(cursor, pool):
    cursor.execute("SELECT pg_is_in_recovery()")
    assert cursor.fetchone() == (False,)
    assert pool.lent == []
    cursor.execute("SELECT pg_is_in_recovery()")
    assert cursor.connection is cursor._cnx
    assert cursor.encoding == "UTF8"
    cursor.execute("SELECT pg_is_in_recovery()")
    assert done(pool) == [["SELECT pg_is_in_recovery()"] * 2]


def test_what_is_set_for_the_connection_counts_for_each_pooled_one(cursor, pool, recorder):
    cursor._cnx.autocommit = True
    cursor.execute("LISTEN orders")
    # No commit will follow.
    assert recorder.calls == [["orders"], "wait"]
    cursor.execute("SELECT 1")
    cursor.commit()
    cursor.execute("SELECT 2")
    assert [connection.autocommit for connection in pool.lent] == [True, True]
    cursor._cnx.set_isolation_level(1)
    assert not pool.lent[-1].autocommit and not cursor._cnx.autocommit
    cursor.commit()
    cursor.execute("SELECT 3")
    assert not pool.lent[-1].autocommit


# Ordinary cursors that become listening ones, see also postgres/test_cursor.py


def adopt(cursor, ordinary, recorder):
    """Make an ordinary cursor a listening one."""
    connection = ListeningConnection(ordinary, lambda feed: recorder)
    connection.adopt(cursor)
    turn(cursor, connection)


@pytest.mark.parametrize("is_autocommit", [False, True])
def test_nobody_else_gets_the_pooled_connection_that_it_had(ordinary, recorder, pool, is_autocommit):
    cursor = ordinary()
    fetched = cursor._cnx
    fetched.autocommit = is_autocommit
    adopt(cursor, ordinary, recorder)
    cursor.execute("LISTEN orders")
    if not is_autocommit:
        cursor.commit()
    assert recorder.calls == [["orders"], "wait"]
    assert pool.closed == pool.lent == [fetched]
    # Who has it already hears as well.
    assert fetched.fileno() == cursor._cnx.fileno()


def test_a_connection_without_a_pool_gives_itself_back(ordinary, recorder, pool):
    """As of Odoo 20.0."""

    class Cursor20(FakeCursor):
        def __init__(self, connection):
            self._closed, self.hooks_run = False, []
            self._cnx, self._obj = connection, connection.cursor()

    connection = pool.borrow({"database": "orders"})
    connection.give_back = functools.partial(pool.give_back, connection)
    cursor = Cursor20(connection)
    adopt(cursor, ordinary, recorder)
    cursor.execute("LISTEN orders")
    cursor.commit()
    assert pool.closed == [connection]
    cursor._cnx.give_back(keep_in_pool=True)
    assert cursor.closed


# Statements


class ToolsSQL:
    """As of odoo.tools."""

    code = "LISTEN x"


@pytest.mark.parametrize(
    "query, listens",
    [
        *((query, True) for query in ("LISTEN x", b"LISTEN x", sql.SQL("LISTEN x"), ToolsSQL())),
        (sql.SQL("LISTEN {}").format(sql.Identifier("x")), True),
        *((query, False) for query in ("SELECT 'LISTEN x'", "listened", "", 5)),
        (sql.Composed([]), False),
    ],
)
def test_a_listen_is_seen_in_whatever_odoo_executes(query, listens):
    assert bool(begins_with_listen(beginning(query))) is listens


@pytest.mark.parametrize(
    "text, statements",
    [
        (" listen A ; ", [(False, "a")]),
        ('UNLISTEN "A""b"', [(True, 'A"b')]),
        ("LISTEN a; LISTEN b;\nunlisten *", [(False, "a"), (False, "b"), (True, "*")]),
        # PostgreSQL folds and truncates identifiers.
        ("LISTEN %s" % ("A" * 70), [(False, "a" * 63)]),
        ("LISTEN a; SELECT 1", None),
    ],
)
def test_channels_are_read_as_postgresql_reads_them(text, statements):
    assert _listen_statements(text) == statements


def test_what_is_more_than_a_listen_goes_to_the_pooler_with_a_warning(cursor, pool, logged):
    cursor.execute("LISTEN a; SELECT 1")
    assert done(pool) == [["LISTEN a; SELECT 1"]]
    assert len(logged("LISTEN a; SELECT 1", "contains more than LISTEN")) == 1


def test_a_listen_is_put_together_by_the_pooled_cursor(cursor, recorder):
    cursor.execute("LISTEN %s", ("x",))
    assert recorder.calls == [["x"]]

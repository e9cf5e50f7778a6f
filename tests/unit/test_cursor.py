"""What Odoo's loops see: a feed, and a cursor of their series' own class whose connection is one."""

import functools
import gc
import select
import threading

import psycopg2
import pytest
from psycopg2 import sql
from psycopg2.extensions import Notify

from bus_alt_connection import cursor as cursor_module
from bus_alt_connection.cursor import (
    FEED_SIZE,
    NO_POOL,
    Feed,
    ListeningConnection,
    _listen_statements,
    beginning,
    forward,
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
def listener(listen):
    listener = listen(FakeFeed("imbus"))
    connected(listener)
    return listener


@pytest.fixture
def feed(listener):
    """A feed of the listener's."""
    feed = Feed()
    feed.channels = frozenset(["imbus"])
    listener.add(feed)
    yield feed
    feed.close()


def test_what_nobody_fetches_is_bounded_and_owed(listener, feed, logged):
    for number in range(3):
        listener.deliver([Notify(1, "imbus", '["%d"]' % number)] * FEED_SIZE)
    feed.poll()
    assert len(feed.notifies) == FEED_SIZE
    assert listener.dropped
    assert len(logged("does not fetch its notifications")) == 1
    assert listener.deliver([Notify(1, "imbus", '["again"]')])
    feed.poll()
    assert feed.notifies[-1].payload == '["again"]'


def test_what_just_fits_is_not_dropped(feed):
    assert feed.put([Notify(1, "imbus", "x")] * FEED_SIZE)
    assert not feed.put([Notify(1, "imbus", "x")])


def test_a_loop_that_polls_and_takes_nothing_out_does_not_make_it_grow(feed):
    """As Odoo's cron does from 15.0 on."""
    for _ in range(3):
        assert feed.put([Notify(1, "cron_trigger", "x")] * (FEED_SIZE - 1))
        feed.poll()
    assert len(feed.notifies) == FEED_SIZE


def test_one_that_is_full_takes_nothing_from_the_others(listener, feed):
    other = FakeFeed("imbus")
    listener.add(other)
    other.full = True
    assert not listener.deliver([Notify(1, "imbus", '["a"]')])
    feed.poll()
    assert payloads(feed) == ['["a"]']


def test_it_is_readable_while_something_waits(feed):
    assert not is_readable(feed)
    feed.put([Notify(1, "imbus", "x")])
    assert is_readable(feed)
    feed.poll()
    assert not is_readable(feed)


def test_an_interruption_is_raised_once_and_wakes_the_loop(feed):
    feed.interrupt("the connection was lost")
    assert is_readable(feed)
    with pytest.raises(psycopg2.OperationalError, match="the connection was lost"):
        feed.poll()
    assert not is_readable(feed)
    assert feed.poll() == psycopg2.extensions.POLL_OK


def test_an_interruption_keeps_its_place_among_the_notifications(feed):
    feed.put([Notify(1, "imbus", "before")])
    feed.interrupt("lost")
    feed.put([Notify(1, "imbus", "after")])
    feed.poll()
    assert payloads(feed) == ["before"]
    assert is_readable(feed)
    with pytest.raises(psycopg2.OperationalError):
        feed.poll()
    assert payloads(feed) == ["before"]
    assert is_readable(feed)
    feed.poll()
    assert payloads(feed) == ["before", "after"]
    assert not is_readable(feed)


def test_interruptions_that_nobody_fetches_count_as_one(feed):
    for _ in range(3):
        feed.interrupt("lost")
    with pytest.raises(psycopg2.OperationalError):
        feed.poll()
    feed.poll()


def test_a_closed_feed_takes_nothing_more(feed):
    feed.close()
    assert feed.put([Notify(1, "imbus", "x")])
    feed.interrupt("lost")
    with pytest.raises(psycopg2.InterfaceError):
        feed.poll()


def test_nothing_is_lost_between_threads(feed):
    """Each notification wakes the loop, whatever the moment it comes at."""
    number = 2000

    def put():
        for at in range(number):
            feed.put([Notify(1, "imbus", str(at))])

    threads = [threading.Thread(target=put) for _ in range(2)]
    for thread in threads:
        thread.start()
    got = []
    while len(got) < 2 * number and select.select([feed], [], [], 5)[0]:
        feed.poll()
        got += payloads(feed)
        del feed.notifies[:]
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted([str(at) for at in range(number)] * 2)


# Cursors


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
    """A cursor as of a function that has a LISTEN statement."""
    cursor = FakeCursor(NO_POOL, "orders", {})
    turn(cursor, ListeningConnection(ordinary, lambda feed: recorder))
    return cursor


def done(pool):
    return [connection.done for connection in pool.lent]


def test_it_is_a_cursor_of_its_series(cursor):
    assert isinstance(cursor, FakeCursor)


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


def test_hooks_run_once_with_and_without_a_pooled_connection(cursor, pool):
    cursor.commit()
    cursor.rollback()
    expected = ["precommit", "postcommit", "prerollback", "postrollback"]
    assert cursor.hooks_run == expected
    cursor.execute("INSERT")
    cursor.commit()
    cursor.rollback()
    assert cursor.hooks_run == 2 * expected


def test_listen_takes_no_pooled_connection_and_counts_from_the_commit(cursor, pool, recorder):
    cursor.execute("LISTEN orders")
    cursor.execute('listen "A b";')
    cursor.commit()
    cursor.execute("UNLISTEN orders")
    cursor.execute("UNLISTEN *")
    cursor.close()
    assert recorder.calls == [["orders"], ["A b", "orders"], "wait", ["A b"], [], "remove"]
    assert pool.lent == []


def test_while_it_listens_it_has_a_pooled_connection_for_a_transaction_only(cursor, pool):
    cursor.execute("LISTEN orders")
    cursor.execute("INSERT 1")
    assert len(pool.in_use) == 1
    cursor.commit()
    assert pool.in_use == []
    cursor.execute("INSERT 2")
    cursor.rollback()
    assert pool.in_use == []
    assert done(pool) == [["LISTEN", "INSERT 1"][1:] + ["COMMIT", "ROLLBACK"], ["INSERT 2", "ROLLBACK", "ROLLBACK"]]


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


def test_to_close_it_takes_no_connection(cursor, pool):
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


def test_a_commit_after_the_connection_was_closed_is_an_error(cursor):
    """What was written is gone, as with psycopg2."""
    cursor.execute("LISTEN orders")
    cursor.execute("INSERT")
    cursor._cnx.close()
    with pytest.raises(psycopg2.InterfaceError):
        cursor.commit()


def test_whether_it_is_in_recovery_takes_no_connection_unless_more_is_asked(cursor, pool):
    cursor.execute("SELECT pg_is_in_recovery()")
    assert cursor.fetchone() == (False,)
    assert pool.lent == []
    cursor.execute("SELECT pg_is_in_recovery()")
    assert cursor.connection is cursor._cnx
    assert cursor.encoding == "UTF8"
    assert done(pool) == [["SELECT pg_is_in_recovery()"]]


def test_what_is_set_for_the_connection_counts_for_each_pooled_one(cursor, pool, recorder):
    cursor._cnx.autocommit = True
    cursor.execute("LISTEN orders")
    # Of nothing that waits for a commit.
    assert recorder.calls == [["orders"], "wait"]
    cursor.execute("SELECT 1")
    cursor.commit()
    cursor.execute("SELECT 2")
    assert [connection.autocommit for connection in pool.lent] == [True, True]
    cursor._cnx.set_isolation_level(2)
    cursor._cnx.autocommit = False
    cursor._cnx.autocommit = True
    cursor._cnx.set_isolation_level(1)
    assert not pool.lent[-1].autocommit
    assert not cursor._cnx.autocommit
    cursor.commit()
    # As it was set last.
    cursor.execute("SELECT 3")
    assert len(pool.lent) == 3
    assert not pool.lent[-1].autocommit


# The garbage collector complains of what is not closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cursor_collected_while_its_feed_is_filled_does_not_block(recorder, ordinary):
    cursor = FakeCursor(NO_POOL, "orders", {})
    feed = ListeningConnection(ordinary, lambda feed: recorder)
    turn(cursor, feed)
    cursor.execute("LISTEN orders")
    cursor.itself = cursor
    del cursor

    class Collecting(list):
        def __iter__(self):
            gc.collect()
            return super().__iter__()

    filling = threading.Thread(target=feed.put, args=[Collecting([Notify(1, "imbus", "[]")])], daemon=True)
    filling.start()
    filling.join(5)
    assert not filling.is_alive()
    gc.collect()
    assert feed.closed


# An ordinary cursor becomes a listening one


@pytest.fixture
def turned(ordinary, recorder):
    """Return a function that makes an ordinary cursor a listening one."""

    def turned(cursor):
        connection = ListeningConnection(ordinary, lambda feed: recorder)
        connection.adopt(cursor)
        turn(cursor, connection)
        return cursor

    return turned


def test_its_transaction_goes_on(turned, ordinary, pool, recorder):
    cursor = ordinary()
    cursor.execute("INSERT")
    turned(cursor)
    cursor.execute("LISTEN orders")
    cursor.execute("UPDATE")
    cursor.commit()
    assert done(pool) == [["INSERT", "UPDATE", "COMMIT"]]
    assert cursor.hooks_run == ["precommit", "postcommit"]
    cursor.close()
    assert pool.in_use == []


def test_who_has_its_connection_already_hears_as_well(turned, ordinary, pool):
    cursor = ordinary()
    connection = cursor._cnx
    turned(cursor).execute("LISTEN orders")
    cursor.commit()
    # Nobody else gets it.
    assert pool.kept == [] and pool.in_use == []
    cursor._cnx.put([Notify(1, "orders", "x")])
    assert select.select([connection], [], [], 0)[0]
    assert connection.poll() == psycopg2.extensions.POLL_OK
    assert [one.payload for one in connection.notifies] == ["x"]
    connection.notifies.clear()
    assert cursor._cnx.notifies == []
    assert connection.closed == 0
    cursor.close()
    assert connection.closed == 1


def test_in_autocommit_mode_it_listens_at_once(turned, ordinary, pool, recorder):
    cursor = ordinary()
    connection = cursor._cnx
    connection.autocommit = True
    turned(cursor).execute("LISTEN orders")
    assert recorder.calls == [["orders"], "wait"]
    assert connection.fileno() == cursor._cnx.fileno()


def test_without_a_commit_it_leaves_nothing_behind(turned, ordinary, pool):
    cursor = turned(ordinary())
    cursor.execute("LISTEN orders")
    cursor.close()
    assert pool.in_use == []


def test_a_connection_without_a_pool_gives_itself_back(turned, pool):
    """As of Odoo 20.0."""

    class Cursor20(FakeCursor):
        def __init__(self, connection):
            self._closed, self.hooks_run = False, []
            self._cnx, self._obj = connection, connection.cursor()

    connection = pool.borrow({"database": "orders"})
    connection.give_back = functools.partial(pool.give_back, connection)
    cursor = turned(Cursor20(connection))
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
    "query",
    ["LISTEN x", b"LISTEN x", sql.SQL("LISTEN x"), sql.SQL("LISTEN {}").format(sql.Identifier("x")), ToolsSQL()],
)
def test_a_listen_is_seen_in_whatever_odoo_executes(query):
    assert cursor_module.begins_with_listen(beginning(query))


@pytest.mark.parametrize("query", ["SELECT 'LISTEN x'", "listened", "-- LISTEN x\nSELECT 1", "", sql.Composed([]), 5])
def test_nothing_else_is_taken_for_one(query):
    assert not cursor_module.begins_with_listen(beginning(query))


@pytest.mark.parametrize(
    "text, statements",
    [
        ("LISTEN a", [(False, "a")]),
        (" listen A ; ", [(False, "a")]),
        ('UNLISTEN "A""b"', [(True, 'A"b')]),
        ("unlisten *", [(True, "*")]),
        ("LISTEN a; LISTEN b;\nUNLISTEN c", [(False, "a"), (False, "b"), (True, "c")]),
        # As PostgreSQL folds and cuts identifiers.
        ("LISTEN %s" % ("A" * 70), [(False, "a" * 63)]),
        ('LISTEN "%s"' % ("ä" * 40), [(False, "ä" * 31)]),
        ("LISTEN ÄB", [(False, "Äb")]),
        ("LISTEN a; SELECT 1", None),
        ("LISTEN a b", None),
        ("LISTEN", None),
        ("Listen now, please", None),
    ],
)
def test_channels_are_read_as_postgresql_reads_them(text, statements):
    assert _listen_statements(text) == statements


def test_what_is_more_than_a_listen_goes_to_the_pooler_with_a_warning(cursor, pool, logged):
    cursor.execute("LISTEN a; SELECT 1")
    assert done(pool) == [["LISTEN a; SELECT 1"]]
    assert len(logged("LISTEN a; SELECT 1", "is more than LISTEN")) == 1


def test_a_listen_is_put_together_by_the_pooled_cursor(cursor, recorder):
    cursor.execute("LISTEN %s", ("x",))
    assert recorder.calls == [["x"]]


def test_forwarding_works_both_ways():
    class Connection:
        closed = 1

    feed, connection = Feed(), Connection()
    forward(connection, feed)
    connection.notifies = ["x"]
    assert feed.notifies == ["x"]
    feed.close()


# Gaps


FACTS = "of a session"


@pytest.fixture
def orders():
    feed = Feed()
    feed.channels = frozenset(["imbus", "orders"])
    yield feed
    feed.close()


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


def test_a_listener_on_another_channel_is_told_once_after_each_gap(orders):
    orders.tell(FACTS, {"imbus": 1, "orders": 2})
    orders.rely(True)
    assert told_of_gaps(orders) == 0
    for number in (3, 5):
        orders.tell(None, {})
        # Only once LISTEN is in force again: from then on a new query misses nothing.
        assert told_of_gaps(orders) == 0
        orders.tell(FACTS, {"imbus": number, "orders": number + 1})
        orders.tell(FACTS, {"imbus": number, "orders": number + 1})
        assert told_of_gaps(orders) == 1


def test_a_listen_that_came_into_force_late_is_a_gap(orders):
    orders.rely(False)
    orders.tell(FACTS, {"imbus": 1})
    assert told_of_gaps(orders) == 0
    orders.tell(FACTS, {"imbus": 1, "orders": 2})
    assert told_of_gaps(orders) == 1


def test_the_listeners_of_odoo_are_not_told(orders):
    orders.channels = frozenset(["imbus", "cron_trigger"])
    orders.tell(FACTS, {"imbus": 1, "cron_trigger": 2})
    orders.rely(False)
    orders.tell(None, {})
    orders.tell(FACTS, {"imbus": 3, "cron_trigger": 4})
    assert told_of_gaps(orders) == 0


def test_unlisten_and_listen_is_no_gap(orders):
    orders.tell(FACTS, {"imbus": 1, "orders": 2})
    orders.rely(True)
    orders.channels = frozenset(["imbus"])
    orders.tell(FACTS, {"imbus": 1})
    orders.channels = frozenset(["imbus", "orders"])
    orders.tell(FACTS, {"imbus": 1, "orders": 3})
    assert told_of_gaps(orders) == 0


def test_what_was_dropped_is_a_gap_for_other_channels(orders):
    assert not orders.put([Notify(1, "orders", "x")] * (FEED_SIZE + 1))
    orders.poll()
    with pytest.raises(psycopg2.OperationalError):
        orders.poll()

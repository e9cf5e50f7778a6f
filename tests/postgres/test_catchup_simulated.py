"""Random histories: does catch-up find each row once, and is the simulation's query the same as the real one?

Each history is played on a real PostgreSQL and in the simulation. Transactions are committed out of order, with and
without savepoints, some are rolled back; the table is emptied, the server restarted, and its transaction ids pass 2**32
on the way. Whatever look-up the addon does is compared with what `statements.look_up` makes of the same values.
"""

import random
import subprocess

import pytest

from bus_alt_connection import connection, lookup
from stack.postgres import PostgreSQL
from stack.process import identity
from tests.simulation import kernel, postgres, statements
from tests.support.backlog import INSERT, OLD, AskedBacklog, create_database

pytestmark = pytest.mark.rest

# Seconds; a row is either found by its date or not, however long the test takes.
YOUNG = 5
STEPS, MOST_OPEN, HISTORIES = 80, 4, 4
# Transaction ids of rows have 32 bits; that of the first row is so far from the end of these.
EPOCH, BEFORE_THE_END = 1 << 32, 30
# Of one file of pg_xact.
XIDS_PER_FILE, FILE_SIZE = 1 << 20, 1 << 18


@pytest.fixture
def server():
    """A PostgreSQL with a database ``bus``, whose transactions are those of the test, near the end of an epoch."""
    with PostgreSQL({"autovacuum": "off"}) as server:
        create_database(server, "bus")
        for (database,) in server.execute("SELECT datname FROM pg_database WHERE datallowconn"):
            # After the jump an id of before would be one of the future.
            server.execute("VACUUM FREEZE", dbname=database)
        server.stop()
        first = EPOCH - BEFORE_THE_END
        (server.data / "pg_xact" / ("%04X" % (first // XIDS_PER_FILE))).write_bytes(bytes(FILE_SIZE))
        subprocess.run(["chown", "-R", "--reference=%s" % server.data, server.data / "pg_xact"], check=True)
        command = [server.programs / "pg_resetwal", "--epoch=5", "--next-transaction-id=%d" % first, server.data]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **identity(server.run_as))
        yield server.start()


@pytest.fixture
def recorded(monkeypatch):
    """Pairs of the values of a look-up and its answer, as the addon makes them."""
    found, asking = [], connection.Connection.asking

    def recording(self, query, *args, **options):
        rows = yield from asking(self, query, *args, **options)
        if statements.is_look_up(query):
            found.append((args[0], rows[0]))
        return rows

    monkeypatch.setattr(connection.Connection, "asking", recording)
    return found


class Cluster(postgres.Cluster):
    """A cluster whose transaction ids may begin anew, which those of the simulation are too small for."""

    def snapshot(self):
        if (self.completed + 1) % EPOCH == 0:
            # The first three of an epoch are not given to transactions.
            self.completed += 3
        return super().snapshot()


class Transaction(postgres.Transaction):
    """A transaction of the simulation with the ids of a real one, and that itself."""

    def __init__(self, cluster, real):
        self.real, self._cluster, self.database = real, cluster, "bus"
        self._xids, self._rows, self.alive = [], [], True
        #: the ages of its rows, by channel
        self.ages = {}

    def insert(self, channel, age, savepoint):
        """Write a row; ``savepoint``: ``""``, or what becomes of the savepoint that the row is written in."""
        with self.real.cursor() as cr:
            cr.execute("SELECT txid_current()")
            self._begin(*cr.fetchone())
            if savepoint:
                cr.execute("SAVEPOINT inner_one")
            cr.execute(INSERT + "RETURNING id, xmin::text::bigint", (channel, age))
            ident, xmin = cr.fetchone()
            if savepoint:
                cr.execute("%s SAVEPOINT inner_one" % savepoint)
        self._xids.append(self._xids[0] + (xmin - self._xids[0]) % EPOCH)
        if savepoint == "ROLLBACK TO":
            # It has ended before its transaction.
            self._cluster.completed = max(self._cluster.completed, self._xids[-1])
        else:
            self.ages[channel] = age
            date = kernel.K.now - age
            self._rows.append(postgres.Row(ident, self._xids[-1], date, channel, ident, "bus", None))

    def _begin(self, xid):
        if not self._xids:
            self._xids.append(xid)
            self._cluster.running[xid] = self

    def end(self, commit):
        (self.real.commit if commit else self.real.rollback)()
        self.real.close()
        if self._xids:
            super().end(commit)


class History:
    """The same history on a real server and in the simulation."""

    def __init__(self, server, seed):
        kernel.Kernel(seed)
        self.server, self.rng, self.cluster = server, random.Random(seed), Cluster(["bus"])
        self.open, self._number = [], 0
        #: the ages of all rows that are committed and have to be found by the next look-up, by channel
        self.pending = {}
        #: whether nothing is known yet of the transactions of this server
        self.only_by_date = True

    def step(self):
        actions = [self.write] * 5 + [self.begin, self.commit, self.roll_back, self.empty]
        self.rng.choice(actions)()

    def begin(self):
        if len(self.open) < MOST_OPEN:
            self.open.append(Transaction(self.cluster, self.server.connect("bus")))

    def write(self):
        """Write a row in one of the open transactions, or in one of its own."""
        is_alone = not self.open or self.rng.random() < 0.3
        transaction = Transaction(self.cluster, self.server.connect("bus")) if is_alone else self.rng.choice(self.open)
        self._number += 1
        savepoint = self.rng.choice(("", "", "", "RELEASE", "ROLLBACK TO"))
        transaction.insert("c%d" % self._number, self.rng.choice((YOUNG, OLD)), savepoint)
        if is_alone:
            self._end(transaction, commit=True)

    def commit(self):
        if self.open:
            self._end(self.rng.choice(self.open), commit=True)

    def roll_back(self):
        if self.open:
            self._end(self.rng.choice(self.open), commit=False)

    def empty(self):
        if not self.open:
            self.server.execute("TRUNCATE bus_bus %s" % self.rng.choice(("", "RESTART IDENTITY")), dbname="bus")
            self.cluster.tables["bus"], self.pending = [], {}
            self._follow()

    def restart(self):
        self.close()
        self.server.restart("immediate")
        self.cluster.started = self.server.value("SELECT " + lookup.STARTED)
        # It could be another server.
        self.only_by_date = True
        self._add_pending({})
        self._follow()
        # A transaction that may be under way when the addon first looks.
        self.begin()

    def close(self):
        while self.open:
            self._end(self.open[0], commit=False)

    def _end(self, transaction, commit):
        if transaction in self.open:
            self.open.remove(transaction)
        transaction.end(commit)
        if commit:
            self._add_pending(transaction.ages)

    def _add_pending(self, ages):
        self.pending.update(ages)
        if self.only_by_date:
            self.pending = {channel: age for channel, age in self.pending.items() if age == YOUNG}

    def _follow(self):
        """Others than the transactions above have ended: the next number is that of the real server."""
        snapshot = self.server.value("SELECT txid_current_snapshot()::text")
        self.cluster.completed = int(snapshot.split(":")[1]) - 1


def same(answer):
    """Return an answer in which the order of channels and ids does not matter."""
    return tuple(sorted(value) if isinstance(value, list) else value for value in answer)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_each_row_of_a_history_is_found_once_and_the_simulation_finds_the_same(server, recorded, seed):
    epoch = server.value("SELECT txid_current()") // EPOCH
    history, backlog, known = History(server, seed), AskedBacklog(server), set()

    def look_up(by_date):
        backlog.now += 0.1
        found = set(backlog.missed("bus", overlap=by_date))
        assert set(history.pending) <= found
        again = found - set(history.pending)
        assert again <= known and (by_date or not again)
        known.update(found)
        history.pending, history.only_by_date = {}, False
        for values, answer in recorded:
            assert same(statements.look_up(history.cluster, "bus", **values)) == same(answer), values
        recorded.clear()

    history.restart()
    for number in range(STEPS):
        history.step()
        if number == STEPS // 2:
            history.restart()
        elif history.rng.random() < (0.1 if history.only_by_date else 0.5):
            look_up(by_date=history.only_by_date or history.rng.random() < 0.2)
    history.close()
    assert len(known) > 10
    assert server.value("SELECT txid_current()") // EPOCH == epoch + 1

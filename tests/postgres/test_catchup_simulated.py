"""Random histories: does catch-up find each row once, and is the simulation's query the same as the real one?

Transactions are committed out of order, with and without savepoints, some are rolled back; the table is emptied, the
server restarted, and its transaction ids pass 2**32 on the way. The answer to each look-up of the addon is compared
with what `statements.look_up` makes of the same values and rows.
"""

import random
import subprocess

import pytest

from bus_alt_connection import connection, lookup
from stack.postgres import PostgreSQL
from stack.process import identity
from tests.simulation import kernel, postgres, statements
from tests.support.backlog import INSERT, OLD, AskedBacklog, create_database

# Seconds; a row is either found by its date or not, however long the test takes.
YOUNG = 5
STEPS, MOST_OPEN, HISTORIES = 80, 4, 4
# Transaction ids of rows have 32 bits; that of the first row is so far from the end of these.
EPOCH, BEFORE_THE_END = 1 << 32, 30
AGE = "extract(epoch FROM now() AT TIME ZONE 'UTC' - create_date)::float"
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

    def recording(self, query, values=None, *timeout):
        rows = yield from asking(self, query, values, *timeout)
        if statements.is_look_up(query):
            found.append((dict(values), rows[0]))
        return rows

    monkeypatch.setattr(connection.Connection, "asking", recording)
    return found


class Cluster:
    """What the simulation's look-up reads, with the rows of a real server as they are now."""

    def __init__(self, server):
        self._snapshot, self.started = server.execute("SELECT txid_current_snapshot()::text, " + lookup.STARTED)[0]
        found = server.execute(
            "SELECT id, xmin::text::bigint AS xmin, %s AS age, channel FROM bus_bus" % AGE, None, "bus"
        )
        self._rows = [
            postgres.Row(row.id, self._txid(row.xmin), kernel.K.now - row.age, row.channel, row.id, "bus", None)
            for row in found
        ]

    def _txid(self, xmin):
        """Return the last transaction id before the snapshot that has these lower bits."""
        following = int(self._snapshot.split(":")[1])
        return following - (following - xmin) % EPOCH

    def rows(self, _database):
        return self._rows

    def snapshot(self):
        return self._snapshot


class History:
    """What happens on a real server, and which rows have to be found because of it."""

    def __init__(self, server, seed):
        self._server, self.rng = server, random.Random(seed)
        #: open transactions: connections, and the ages of what each has written, by channel
        self._open, self._number = {}, 0
        #: the ages of all rows that are committed and have to be found by the next look-up, by channel
        self.pending = {}
        #: whether nothing is known yet of the transactions of this server
        self.only_by_date = True

    def step(self):
        actions = [self.write] * 5 + [self.begin, self.commit, self.roll_back, self.empty]
        self.rng.choice(actions)()

    def begin(self):
        if len(self._open) < MOST_OPEN:
            self._open[self._server.connect("bus")] = {}

    def write(self):
        """Write a row in one of the open transactions, or in one of its own."""
        is_alone = not self._open or self.rng.random() < 0.3
        real = self._server.connect("bus") if is_alone else self.rng.choice(list(self._open))
        ages = self._open.setdefault(real, {})
        self._number += 1
        channel, age = "c%d" % self._number, self.rng.choice((YOUNG, OLD))
        #: what becomes of the savepoint that the row is written in
        savepoint = self.rng.choice(("", "", "", "RELEASE", "ROLLBACK TO"))
        with real.cursor() as cr:
            if savepoint:
                cr.execute("SAVEPOINT inner_one")
            cr.execute(INSERT, (channel, age))
            if savepoint:
                cr.execute("%s SAVEPOINT inner_one" % savepoint)
        if savepoint != "ROLLBACK TO":
            ages[channel] = age
        if is_alone:
            self._end(real, commit=True)

    def commit(self):
        if self._open:
            self._end(self.rng.choice(list(self._open)), commit=True)

    def roll_back(self):
        if self._open:
            self._end(self.rng.choice(list(self._open)), commit=False)

    def empty(self):
        if not self._open:
            self._server.execute("TRUNCATE bus_bus %s" % self.rng.choice(("", "RESTART IDENTITY")), dbname="bus")
            self.pending = {}

    def restart(self):
        self.close()
        self._server.kill()
        self._server.start()
        # It could be another server.
        self.only_by_date = True
        self._add_pending({})
        # A transaction that may be under way when the addon first looks.
        self.begin()

    def close(self):
        for real in list(self._open):
            self._end(real, commit=False)

    def _end(self, real, commit):
        ages = self._open.pop(real)
        if commit:
            real.commit()
            self._add_pending(ages)
        real.close()

    def _add_pending(self, ages):
        self.pending.update(ages)
        if self.only_by_date:
            self.pending = {channel: age for channel, age in self.pending.items() if age == YOUNG}


def same(answer):
    """Return an answer in which the order of channels and ids does not matter."""
    return tuple(sorted(value) if isinstance(value, list) else value for value in answer)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_each_row_of_a_history_is_found_once_and_the_simulation_finds_the_same(server, recorded, seed):
    kernel.Kernel(seed)
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
            assert same(statements.look_up(Cluster(server), "bus", **values)) == same(answer), values
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

"""Is the simulation's catch-up query, written again in Python, the same as the addon's on a real PostgreSQL?

Random histories are played on both: rows committed out of order, savepoints, emptied tables, restarts. Whatever look-up
the addon does is recorded, and compared with what `statements.catch_up` makes of the same values.
"""

import random
import subprocess

import psycopg2
import pytest
from psycopg2 import extensions

from stack.postgres import PostgreSQL
from stack.process import identity
from tests.simulation import kernel, postgres, statements
from tests.support.backlog import AskedBacklog

_TABLE = """
    CREATE TABLE bus_bus (id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar);
    GRANT ALL ON bus_bus, bus_bus_id_seq TO odoo
"""
_INSERT = """
    INSERT INTO bus_bus (channel, message, create_date)
    VALUES (%s, '{}', now() AT TIME ZONE 'UTC' - %s * interval '1 second') RETURNING id, xmin::text::bigint
"""
# Seconds; a row is either found by its date or not, however long the test takes.
_AGES = (5, 7200)
_STEPS, _MOST_OPEN = 60, 4
_HISTORIES = 8
# Transaction ids of tables have 32 bits.
_EPOCH = 1 << 32


@pytest.fixture(scope="module")
def quiet_server():
    """A PostgreSQL whose transactions are those of the test, and whose transaction ids have wrapped around."""
    with PostgreSQL({"autovacuum": "off"}) as server:
        server.stop()
        command = [server.programs / "pg_resetwal", "--epoch=5", server.data]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **identity(server.run_as))
        server.start()
        yield server


@pytest.fixture
def recorded(monkeypatch):
    """Pairs of the values of a look-up and its answer, as the addon makes them."""
    found = []

    class Recording(extensions.cursor):
        def execute(self, query, values=None):
            self.asked = query, values
            return super().execute(query, values)

        def fetchall(self):
            rows = super().fetchall()
            query, values = self.asked
            if statements.is_look_up(query):
                found.append((dict(values), rows[0]))
            return rows

    original = psycopg2.connect

    def connect(*args, **kwargs):
        # The addon's connections are asynchronous, those of the test are not.
        recording = {"cursor_factory": Recording} if kwargs.get("async_") else {}
        return original(*args, **recording, **kwargs)

    monkeypatch.setattr(psycopg2, "connect", connect)
    return found


class _History:
    """The same history on a real server and in the simulation."""

    def __init__(self, server, seed):
        self._server, self.rng = server, random.Random(seed)
        kernel.Kernel(seed)
        self.cluster = postgres.Cluster(["bus"])
        #: real connection -> its transaction in the simulation, None before its first row
        self._open = {}
        self._number = 0

    def step(self):
        """Do something at random, on both."""
        actions = [self.write, self.write, self.write, self.begin, self.commit, self.roll_back, self.empty]
        self.rng.choice(actions)()

    def begin(self):
        if len(self._open) < _MOST_OPEN:
            self._open[self._server.connect("bus")] = None

    def write(self):
        """Write a row in one of the open transactions, or in one of its own."""
        if self._open and self.rng.random() < 0.7:
            self._insert(self.rng.choice(list(self._open)))
        else:
            real = self._server.connect("bus")
            self._open[real] = None
            self._insert(real)
            self._end(real, commit=True)

    def commit(self):
        if self._open:
            self._end(self.rng.choice(list(self._open)), commit=True)

    def roll_back(self):
        if self._open:
            self._end(self.rng.choice(list(self._open)), commit=False)

    def empty(self):
        if not self._open and self.rng.random() < 0.3:
            restart = self.rng.choice(("", "RESTART IDENTITY"))
            self._server.execute("TRUNCATE bus_bus %s" % restart, dbname="bus")
            self._follow()
            self.cluster.tables["bus"] = []

    def restart(self):
        for real in list(self._open):
            self._end(real, commit=False)
        self._server.restart("immediate")
        self.cluster.started = self._server.value(
            "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
        )
        self._follow()

    def close(self):
        for real in list(self._open):
            self._end(real, commit=False)

    def _insert(self, real):
        self._number += 1
        channel, age = '"c%d"' % self._number, self.rng.choice(_AGES)
        with real.cursor() as cr:
            in_savepoint, gives_up = self.rng.random() < 0.4, self.rng.random() < 0.2
            cr.execute("SELECT txid_current()")
            if self._open[real] is None:
                self._open[real] = self._transaction(cr.fetchone()[0])
            if in_savepoint:
                cr.execute("SAVEPOINT inner_one")
            cr.execute(_INSERT, (channel, age))
            ident, xmin = cr.fetchone()
            if in_savepoint:
                cr.execute("%s SAVEPOINT inner_one" % ("ROLLBACK TO" if gives_up else "RELEASE"))
        self._open[real].add(ident, xmin, channel, age, kept=not (in_savepoint and gives_up))

    def _transaction(self, xid):
        return _Transaction(self.cluster, xid)

    def _end(self, real, commit):
        simulated = self._open.pop(real)
        if commit:
            real.commit()
        else:
            real.rollback()
        real.close()
        if simulated:
            simulated.end(commit)

    def _follow(self):
        """Other transactions than those of `_insert` have ended: the next number is that of the real server."""
        snapshot = self._server.value("SELECT txid_current_snapshot()::text")
        self.cluster.completed = int(snapshot.split(":")[1]) - 1


class _Transaction:
    """`postgres.Transaction` with the numbers of a real one."""

    def __init__(self, cluster, xid):
        self._cluster, self._xids, self._rows = cluster, [xid], []
        cluster.running[xid] = self

    def add(self, ident, xmin, channel, age, kept):
        xid = self._xids[0] // _EPOCH * _EPOCH + xmin
        self._xids.append(xid)
        if kept:
            date = kernel.K.now - age
            self._rows.append(postgres.Row(ident, xid, date, channel, ident, "bus", None))
        else:
            # A savepoint that was rolled back has ended before its transaction.
            self._cluster.completed = max(self._cluster.completed, xid)

    def end(self, commit):
        del self._cluster.running[self._xids[0]]
        self._cluster.completed = max([self._cluster.completed, *self._xids])
        if commit:
            self._cluster.tables["bus"] += self._rows


def _same(answer):
    """Return an answer in which the order of channels and ids does not matter."""
    return tuple(sorted(value) if isinstance(value, list) else value for value in answer)


@pytest.mark.parametrize("seed", range(_HISTORIES))
def test_look_ups_of_the_simulation_are_those_of_postgresql(quiet_server, recorded, seed):
    quiet_server.execute("CREATE DATABASE bus")
    quiet_server.execute(_TABLE, dbname="bus")
    history, backlog = _History(quiet_server, seed), AskedBacklog(quiet_server)
    try:
        history.restart()
        found = 0
        for number in range(_STEPS):
            history.step()
            if number == _STEPS // 2 and seed % 2:
                history.restart()
            if history.rng.random() < 0.4:
                backlog.now += 0.1
                backlog.missed("bus", overlap=history.rng.random() < 0.2)
            for values, answer in recorded:
                found += len(answer[-2])
                assert _same(statements.look_up(history.cluster, "bus", values)) == _same(answer), values
            recorded.clear()
        assert found > 10
    finally:
        history.close()
        quiet_server.execute("DROP DATABASE bus WITH (FORCE)")

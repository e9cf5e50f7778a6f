"""A PostgreSQL: databases with a bus_bus each, transactions and snapshots, locks, LISTEN and NOTIFY."""

import collections
import copy

from psycopg2.extensions import Notify

from . import kernel, statements
from .network import TO_CLIENT

#: ``at``: when it became visible; ``date``: create_date
Row = collections.namedtuple("Row", "id xid date channel number database at")
_FIRST_XID = 1000
HEARTBEAT_CHANNEL = "bus_alt_connection"


class Transaction:
    """A transaction of Odoo that writes rows into the bus_bus of ``database``."""

    def __init__(self, cluster, database):
        self._cluster, self.database = cluster, database
        self._xids, self._rows, self._date = [cluster.new_xid()], [], kernel.K.now
        self.alive = True
        cluster.running[self._xids[0]] = self

    def write(self, channel, number, savepoint):
        """Insert a row; within a ``savepoint`` it has an xid of its own."""
        if savepoint:
            self._xids.append(self._cluster.new_xid())
        ident = self._cluster.next_id(self.database)
        self._rows.append(Row(ident, self._xids[-1], self._date, channel, number, self.database, None))

    def end(self, commit):
        """Return the rows that are visible from now on; None if the transaction was lost with the server."""
        if not self.alive:
            return None
        self.alive = False
        del self._cluster.running[self._xids[0]]
        self._cluster.completed = max([self._cluster.completed, *self._xids])
        rows = [row._replace(at=kernel.K.now) for row in self._rows] if commit else []
        self._cluster.tables[self.database] += rows
        return rows


class Cluster:
    """A server with its databases; "postgres" has no bus_bus."""

    def __init__(self, databases):
        self.databases = ["postgres", *databases]
        self.tables = {name: [] for name in databases}
        self._ids = dict.fromkeys(databases, 0)
        self.started, self.up, self.standby = 1000000, True, False
        self._next_xid, self.completed, self.running = _FIRST_XID, _FIRST_XID - 1, {}
        self.backends, self.most_backends = [], 60
        #: databases whose bus_bus somebody holds an ACCESS EXCLUSIVE lock on, and who waits for that
        self.locked, self._waiting_for_lock = set(), []
        #: seconds that a look-up may take
        self.slow_look_up = 0.0
        self.heartbeats = 0
        #: called with a backend, and the seconds that a statement has waited for a lock and has taken besides
        self.executed = lambda backend, waited, took: None

    # Tables

    def add_database(self, name):
        self.databases.append(name)
        self.tables[name], self._ids[name] = [], 0

    def has_bus(self, database):
        return database in self.tables

    def rows(self, database):
        return self.tables[database]

    def next_id(self, database):
        self._ids[database] += 1
        return self._ids[database]

    def new_xid(self):
        self._next_xid += 1
        return self._next_xid - 1

    def snapshot(self):
        """Return what ``txid_current_snapshot()`` does, as text."""
        xmax = self.completed + 1
        active = sorted(xid for xid in self.running if xid < xmax)
        return "%d:%d:%s" % (active[0] if active else xmax, xmax, ",".join(map(str, active)))

    def lock(self, database):
        self.locked.add(database)

    def unlock(self, database):
        self.locked.discard(database)
        waiting, self._waiting_for_lock = self._waiting_for_lock, []
        for proceed in waiting:
            proceed()

    def wait_for_lock(self, proceed):
        self._waiting_for_lock.append(proceed)

    # Server

    def refusal(self, database):
        """Return why a new connection is refused, None if it is not."""
        if not self.up:
            return "connection to server failed: Connection refused"
        if database not in self.databases:
            return 'FATAL:  database "%s" does not exist' % database
        if len(self.backends) >= self.most_backends:
            return "FATAL:  sorry, too many clients already"
        return None

    def stop(self, reason, silently=False):
        """End all backends, with a FATAL message of ``reason``, without one, or ``silently`` like a dead machine."""
        self.up = False
        for transaction in self.running.values():
            transaction.alive = False
        self.running = {}
        self.completed = self._next_xid - 1
        for backend in list(self.backends):
            backend.terminate(reason, silently)
        self.backends = []

    def start(self):
        self.up = True
        self.started += int(kernel.K.now * 1e6)

    def left_behind(self):
        """Return the former primary, which goes on with its direct clients, but without pooler and senders."""
        former = copy.copy(self)
        former.backends = [backend for backend in self.backends if backend.is_direct]
        former.running, former.locked, former._waiting_for_lock = {}, set(), []
        former.tables = {name: list(rows) for name, rows in self.tables.items()}
        former._ids = dict(self._ids)
        for backend in former.backends:
            backend.cluster = former
            self.backends.remove(backend)
        return former

    def lag_behind(self, seconds):
        """Become a promoted copy without what was committed in the last ``seconds``; return the rows lost."""
        lost = []
        for name, rows in self.tables.items():
            kept = [row for row in rows if row.at <= kernel.K.now - seconds]
            lost += rows[len(kept) :]
            self.tables[name] = kept
            # A sequence is written ahead, 32 values at a time.
            self._ids[name] = max([row.id for row in kept] or [0]) + kernel.K.rng.choice((0, 0, 32))
        self.completed = max([row.xid for rows in self.tables.values() for row in rows] or [_FIRST_XID - 1])
        self._next_xid = self.completed + 1
        return lost

    def notify(self, pid, database, channel, payload):
        """Deliver a notification, as a transaction of its own does at its commit."""
        self.new_xid()
        self.completed = max(self.completed, self._next_xid - 1)
        self.heartbeats += channel == HEARTBEAT_CHANNEL
        for backend in list(self.backends):
            if backend.database == database and channel in backend.listens:
                backend.hear(Notify(pid, channel, payload))


class Backend:
    """A server process: one statement at a time.

    It belongs to a client that came directly, by ``link``, or to a pooler. ``hear(notification)`` and
    ``lost(reason, silently)`` are set by whoever it belongs to.
    """

    def __init__(self, cluster, database, is_direct):
        self.cluster, self.database, self.is_direct = cluster, database, is_direct
        self.pid = 20000 + kernel.K.number("backend")
        self.listens, self.in_transaction, self._failed = set(), False, False
        self._timeouts, self._local_timeouts = {}, {}
        self.busy, self.client_name = False, "?"
        self.hear = lambda notification: None
        self.lost = lambda reason, silently: None
        cluster.backends.append(self)

    def execute(self, text, values, reply):
        """Run all statements of ``text`` and call ``reply(kind, what)``, if nothing kills the backend before."""
        parts = statements.split(text)
        self.busy = True
        self._proceed(parts, values, reply, None)

    def close(self):
        """End: the client has gone. A statement under way is finished first."""
        if self in self.cluster.backends and not self.busy:
            self.cluster.backends.remove(self)
        self.hear = lambda notification: None
        self.listens = set()

    def terminate(self, reason, silently=False):
        if self in self.cluster.backends:
            self.cluster.backends.remove(self)
        self.lost(reason, silently)

    def set_timeout(self, name, seconds):
        (self._local_timeouts if self.in_transaction else self._timeouts)[name] = seconds

    def end_transaction(self):
        self.in_transaction, self._failed, self._local_timeouts = False, False, {}

    # The statements of one text, one after the other

    def _proceed(self, parts, values, reply, rows):
        if self not in self.cluster.backends:
            return
        if not parts:
            self._finish(reply, "result", rows)
            return
        statement = parts[0]
        if self._failed and not statement.upper().startswith(("ROLLBACK", "COMMIT")):
            self._fail(reply, "25P02", "current transaction is aborted")
        elif statements.touches_bus(statement) and self.database in self.cluster.locked:
            self._wait_for_lock(parts, values, reply, rows)
        else:
            self._run(parts, values, reply)

    def _run(self, parts, values, reply):
        try:
            rows = statements.run(self, parts[0], values)
        except statements.Failure as failure:
            self._fail(reply, *failure.args)
            return
        seconds = kernel.K.rng.uniform(0, 0.001)
        if statements.is_look_up(parts[0]):
            seconds += kernel.K.rng.uniform(0, self.cluster.slow_look_up)
        limit = self._timeout("statement_timeout")
        self.cluster.executed(self, 0.0, min(seconds, limit))
        if seconds > limit:
            text = "canceling statement due to statement timeout"
            kernel.K.after(limit, lambda: self._fail(reply, "57014", text))
        elif len(parts) > 1 and seconds < 0.001:
            self._proceed(parts[1:], values, reply, rows)
        else:
            kernel.K.after(seconds, lambda: self._proceed(parts[1:], values, reply, rows))

    def _wait_for_lock(self, parts, values, reply, rows):
        lock_limit, limit = self._timeout("lock_timeout"), self._timeout("statement_timeout")
        waiting, since = [True], kernel.K.now

        def proceed():
            if waiting:
                waiting.clear()
                self.cluster.executed(self, kernel.K.now - since, 0.0)
                self._proceed(parts, values, reply, rows)

        def give_up():
            if waiting:
                waiting.clear()
                self.cluster.executed(self, kernel.K.now - since, 0.0)
                kind = ("55P03", "lock") if lock_limit < limit else ("57014", "statement")
                self._fail(reply, kind[0], "canceling statement due to %s timeout" % kind[1])

        self.cluster.wait_for_lock(proceed)
        if min(lock_limit, limit) < 1e6:
            kernel.K.after(min(lock_limit, limit), give_up)

    def _timeout(self, name):
        """Return the seconds of a timeout, infinite if there is none."""
        return self._local_timeouts.get(name, self._timeouts.get(name)) or float("inf")

    def _fail(self, reply, sqlstate, text):
        if self in self.cluster.backends:
            self._failed = self.in_transaction
            self._finish(reply, "failed", (sqlstate, text))

    def _finish(self, reply, kind, what):
        self.busy = False
        reply(kind, what)


class Server:
    """What accepts direct connections: the cluster of the world, or ``former``, which no longer is the primary."""

    former = None

    @property
    def cluster(self):
        return self.former or kernel.K.world.cluster

    def connect(self, link, database):
        problem = self.cluster.refusal(database)
        if link.path.refusing:
            problem = "connection to server failed: Connection refused"
        elif link.path.full:
            problem = "FATAL:  sorry, too many clients already"
        if problem:
            link.carry(TO_CLIENT, lambda: link.client.push("refused", problem))
            return
        link.server = _DirectClient(link, Backend(self.cluster, database, is_direct=True))
        link.carry(TO_CLIENT, lambda: link.client.push("connected", link.server.backend.pid))


class _DirectClient:
    """The server's end of a direct connection."""

    def __init__(self, link, backend):
        self._link, self.backend = link, backend
        backend.client_name = link.client.process_name
        backend.hear = lambda notification: self._push("notification", notification)
        backend.lost = self._lost

    def execute(self, statement, values):
        if self.backend in self.backend.cluster.backends:
            self.backend.execute(statement, values, self._push)

    def hang_up(self):
        self.backend.close()

    def _push(self, kind, what):
        self._link.carry(TO_CLIENT, lambda: self._link.client.push(kind, what))

    def _lost(self, reason, silently):
        if silently:
            self._link.lose(silent=False)
            return
        if reason and not self.backend.busy:
            self._push("notice", "FATAL:  " + reason)
            reason = None
        # Who waits for an answer gets the reason in its place.
        self._push("closed", reason or "server closed the connection unexpectedly")

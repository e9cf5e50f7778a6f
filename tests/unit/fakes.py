"""A server that is none: what the listener and the supervisor meet, in milliseconds and with faults on demand."""

import queue
import selectors
import sys
import threading
import time

import psycopg2
from psycopg2.extensions import Notify

from bus_alt_connection import connection, log, lookup, tasks
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.connection import Facts
from bus_alt_connection.listener import Session
from bus_alt_connection.supervisor import Supervisor
from bus_alt_connection.waker import Waker

_PAST = 1000000  # microseconds, of the server's start


class FakeServer:
    """A PostgreSQL with a direct way and a pooled way to it.

    The verbs are those of :class:`~stack.proxy.Proxy`, and mean the direct way: :meth:`refuse`, :meth:`cut`,
    :meth:`swallow`, :meth:`forward`. For the pooled way see ``away``.

    :ivar away: names of databases that the pooled way does not lead to, or ``"pooler"``: to none of them
    :ivar silent: names of databases that do not answer the pooled way, or ``"pooler"``; needs the fixture ``clock``
    :ivar refusal: what is said of those that are away
    :ivar takes: seconds that a login takes
    :ivar may_list: whether Odoo's role may read pg_database
    :ivar pooled: whether a session says that there is a pooler in between
    :ivar deaf_pooler: the sender itself receives what LISTEN asks for, as behind a pooler in transaction mode
    :ivar on_notify: called with each session that was given a notification
    :ivar now: the simulated time, monotonic seconds
    :ivar listeners: those that `settle` waits for
    """

    def __init__(self):
        self.sessions, self.listeners = [], []
        self.connects = 0
        self.sent = []
        self.away, self.silent = set(), set()
        self.refusal = "pooler:6432: no more connections allowed"
        self.takes = 0.0
        self.may_list, self.unlisted = True, set()
        #: the used share of the notification queue, and the oldest transaction as `connection` asks for it
        self.queue_usage, self.transactions = 0.0, []
        self.pooled = self.deaf_pooler = False
        self.asked = []
        self.rows = {}
        self.logins = []
        self.now = 1e6
        self.on_notify = lambda session: None
        self._refusing = self._swallowing = False
        self._xid = 1000
        self._lock = threading.RLock()

    def settle(self):
        """Wait until the threads of the listeners have nothing to do. Only then may simulated time go on."""
        deadline = time.monotonic() + 10
        # Twice, since a leader may have sent something to a follower that was at rest before.
        while not all(self._is_at_rest(listener) for listener in 2 * self.listeners):
            assert time.monotonic() < deadline, "a listener that does not come to rest"
            time.sleep(0.0005)

    def _is_at_rest(self, listener):
        session = listener.session
        if session is None:
            return self._refusing or listener.has_ended()
        selector = vars(session).get("selector")
        return session.fault is None and selector is not None and selector.is_at_rest()

    # Verbs

    def refuse(self):
        self._refusing = True

    def swallow(self):
        self._swallowing = True

    def forward(self):
        self._refusing = self._swallowing = False

    def cut(self):
        with self._lock:
            for session in list(self.sessions):
                session.lose()

    # The direct way

    def connect(self, listener=None, last=()):
        """Return a new :class:`FakeSession`; see :class:`~bus_alt_connection.sharing.Sharing` for the arguments."""
        with self._lock:
            self.connects += 1
            if self._refusing:
                raise psycopg2.OperationalError("db-01:5432: Connection refused")
            session = FakeSession(self)
            self.sessions.append(session)
            return session

    def notify(self, channel, payload):
        with self._lock:
            for session in list(self.sessions):
                if channel in session.channels and not (self._swallowing or self.deaf_pooler):
                    session.arrive(Notify(7, channel, payload))
                    self.on_notify(session)

    # The pooled way

    def opening(self, database):
        """A task: return a connection to ``database``."""
        self.logins.append(database)
        yield from tasks.sleep(self.takes)
        if self.silent & {database, "pooler"}:
            yield from tasks.sleep(5.0)
            raise psycopg2.OperationalError("no answer in 5 s")
        if self.away & {database, "pooler"}:
            raise psycopg2.OperationalError(self.refusal)
        return FakePooled(self, database)

    def write(self, database, channel, notify=True):
        """Send on Odoo's bus; ``channel``: JSON text."""
        with self._lock:
            self._xid += 1
            rows = self.rows.setdefault(database, [])
            rows.append((self._xid, self.now, channel))
        if notify:
            self.notify("imbus", "[%s]" % channel)

    def _snapshot(self):
        return "%d:%d:" % (self._xid + 1, self._xid + 1)


class FakeSession(Session):
    """As :class:`bus_alt_connection.listener.DirectSession`."""

    def __init__(self, server):
        self._server = server
        pid = 100 + server.connects
        self.facts = Facts("db-01:5432", pid, server.pooled, False, "postgres", "15.3", _PAST)
        self.settled = self.closed = False
        self._arrived, self._lost = [], False
        self._waker = Waker()
        self.fileno = self._waker.fileno

    def listen(self, channels, warn):
        if self._lost:
            raise psycopg2.OperationalError("server closed the connection unexpectedly")
        self.channels = frozenset(channels)

    def settle(self):
        self.settled = True

    def receive(self):
        self._waker.clear()
        with self._server._lock:
            arrived, self._arrived = self._arrived, []
        if self._lost and not arrived:
            raise psycopg2.OperationalError("server closed the connection unexpectedly")
        if self._lost:
            self._waker.wake()
        return arrived

    def explaining(self, examining_sender, sent_at, leaked):
        sender = yield from examining_sender()
        facts = self.facts._replace(pooled=self.facts.pooled or leaked)
        return log.UNHEARD, connection.why_deaf(facts, sender)

    def close(self):
        with self._server._lock:
            self.closed = True
            if self in self._server.sessions:
                self._server.sessions.remove(self)
        self._waker.close()

    # By the server

    def arrive(self, notification):
        self._arrived.append(notification)
        self._waker.wake()

    def lose(self):
        self._lost = True
        self._waker.wake()


class FakePooled:
    """As :class:`bus_alt_connection.connection.Connection`, on a way that answers what the addon asks there."""

    def __init__(self, server, database):
        self._server, self._database = server, database
        self._leaked = []

    def asking(self, query, values=None, timeout=None):
        """A task: answer what a look-up asks, as a list of rows."""
        yield from ()
        server = self._server
        if query in ("COMMIT", "ROLLBACK"):
            return None
        if values is None and "snapshot()" in query:
            return [(server._snapshot(), server.queue_usage)]
        if "pg_stat_get_activity" in query:
            return server.transactions
        if "pg_notify" in query:
            self._notify(*values)
            return [("",)]
        if query == lookup._DATABASES:
            if not self._server.may_list:
                refused = psycopg2.OperationalError("permission denied for table pg_database")
                refused.sqlstate = "42501"
                raise refused
            names = sorted({"postgres", *server.rows} - server.unlisted)
            return [(names, names, _PAST)]
        if "to_regclass" in query:
            return [("public" if self._database in server.rows else None,)]
        if "LOCK TABLE" in query:
            return [(True, True, False, self._database)]
        assert query == lookup._MISSED.replace("TABLE_NAME", '"public".bus_bus')
        return [self._missed(**values)]

    def asking_row(self, query, values=None, columns=1, timeout=None):
        """A task: `asking`, for one row."""
        rows = yield from self.asking(query, values, timeout)
        assert len(rows[0]) == columns
        return rows[0]

    def _missed(self, since, known, overlap, rows, late):
        server, table = self._server, self._server.rows[self._database]
        server.asked.append(self._database)
        oldest = int(since.split(":")[0]) if since else None
        found = {
            channel for xid, at, channel in table if oldest is not None and xid >= oldest or at > server.now - overlap
        }
        return server._snapshot(), _PAST, True, sorted(found), []

    def _notify(self, *values):
        server = self._server
        server.sent.append(server.now)
        if server.deaf_pooler:
            self._leaked.append(Notify(7, *values))
        server.notify(*values)

    def examining(self):
        yield from ()
        return Facts("pooler:6432", 200, True, False, "postgres", "15.3", _PAST)

    def receive(self):
        leaked, self._leaked = self._leaked, []
        return leaked

    def close(self):
        pass


def connected(listener, after=None):
    """Return the session that it has, another than ``after``, with LISTEN in force; wait for it."""
    assert listener.wait(lambda: listener.session not in (None, after), 5), "no session"
    return listener.session


class WatchedSelector(selectors.DefaultSelector):
    """A listener's selector, which tells whether the listener's thread waits in vain."""

    _is_selecting = False

    def register(self, fileobj, events, data=None):
        fileobj.selector = self
        return super().register(fileobj, events, data)

    def select(self, timeout=None):
        self._is_selecting = True
        try:
            return super().select(timeout)
        finally:
            self._is_selecting = False

    def is_at_rest(self):
        try:
            # In this order: the thread stops selecting before it reads what was there to be read.
            return not super().select(0) and self._is_selecting
        except ValueError:
            # The thread has closed it.
            return False


class Watched(Supervisor):
    """A supervisor, the listener that it watches over, and its server: what happens to them in simulated time.

    Needs the fixture ``clock``. Time passes while look-ups are under way, and between two rounds.

    :ivar feed: the first of the feeds that the listener serves
    """

    def __init__(self, fake, listener, events, feeds, options, databases=("x1",), **more):
        for database in databases:
            fake.rows.setdefault(database, [])
        self.fake, self.events, self.feed, self.backlog = fake, events, feeds[0], Backlog(fake.opening)
        super().__init__(listener, fake.opening, Databases(databases), self.backlog, options, **more)

    def live(self, seconds, step=1.0, meanwhile=lambda: None):
        """Do what is due within so many seconds; call ``meanwhile()`` every ``step`` seconds."""
        end = self.fake.now + seconds
        while self.fake.now < end:
            began = self.fake.now
            due = self.round(began)
            meanwhile()
            self.fake.settle()
            self.fake.now = max(self.fake.now, min(due, began + step), began + 0.001)

    def lose(self):
        """Cut the direct way, which refuses connections from now on."""
        self.fake.refuse()
        self.fake.cut()
        self.events.wait_for(log.LOST)

    def come_back(self, after=0.0):
        """Let the listener connect again."""
        self.fake.now += after
        self.fake.forward()
        connected(self.listener)

    def miss(self, channel, after=0.0):
        """Lose the direct way, and send to x1 before it is back."""
        self.lose()
        self.fake.write("x1", channel)
        self.come_back(after)

    def _wait(self, condition, seconds):
        deadline = self.fake.now + seconds
        while self._tasks and not condition() and self.fake.now < deadline:
            super()._wait(lambda: condition() or not self._tasks, deadline - self.fake.now)
        # What does not happen while nobody has anything to do does not happen at all.
        self.fake.settle()
        return condition()


class FakeFeed:
    """What a listener gives to; ``full``: it has no room."""

    local = True

    def __init__(self, *channels):
        self.channels = frozenset(channels)
        self.full = False
        self.arrived = queue.Queue()

    def put(self, notifications):
        for one in () if self.full else notifications:
            self.arrived.put((one.channel, one.payload))
        return len(notifications) if self.full else 0

    def tell(self, facts, numbers):
        """Odoo's feeds note gaps here."""

    def get(self):
        """Return channel and payload of the next; wait for it."""
        return self.arrived.get(timeout=5)

    def all(self):
        """Return what there is, a list, and forget it."""
        return [self.arrived.get() for _ in range(self.arrived.qsize())]

    def bus(self):
        """Return the payloads of what there is on the channel of the bus, and forget all that there is."""
        return [payload for channel, payload in self.all() if channel == "imbus"]


class Events:
    """Stands in for a :class:`~bus_alt_connection.log.Journal` whose events a test waits for."""

    due = float("inf")

    def __init__(self):
        self._events = queue.Queue()

    def __call__(self, event):
        self._events.put(event)

    def add(self, write, *args):
        write(*args)

    def write(self, now):
        """There is nothing to write."""

    def expect(self, *kinds):
        """Return the last of the next events, which are to be of these kinds."""
        events = [self._events.get(timeout=5) for _ in kinds]
        assert [event.kind for event in events] == list(kinds)
        return events[-1]

    def wait_for(self, kind):
        """Return the next event of that kind, however many others come before."""
        while True:
            event = self._events.get(timeout=5)
            if event.kind == kind:
                return event


class Cursor:
    """As much of Odoo 19.0's ``sql_db.Cursor`` as the addon relies on, the names of its attributes included."""

    @staticmethod
    def frame_codeinfo(frame, back=0):
        """Odoo's is a function of ``sql_db``."""

    def __init__(self, pool, dbname, dsn):
        self.hooks_run = []
        # Odoo does so for its log, and only if that is verbose.
        self.opened_at = self.frame_codeinfo(sys._getframe(), 2)
        self.dbname = dbname
        self._closed = True
        self.__pool = pool
        self._cnx = pool.borrow(dsn)
        self._obj = self._cnx.cursor()
        self._closed = False
        self.connection.set_isolation_level(2)

    def execute(self, query, params=None, log_exceptions=True):
        self._obj.execute(query, params)

    def close(self):
        if not self.closed:
            self._close(False)

    def _close(self, leak=False):
        if not self._obj:
            return
        self._obj.close()
        del self._obj
        self.rollback()
        self._closed = True
        if not leak:
            self.__pool.give_back(self._cnx, keep_in_pool=self.dbname != "postgres")

    def __del__(self):
        if not self._closed and not self._cnx.closed:
            self._close(True)

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _traceback):
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

    def commit(self):
        self.hooks_run.append("precommit")
        self._cnx.commit()
        self.hooks_run.append("postcommit")

    def rollback(self):
        self.hooks_run.append("prerollback")
        self._cnx.rollback()
        self.hooks_run.append("postrollback")

    def __getattr__(self, name):
        if self._closed and name == "_obj":
            raise psycopg2.InterfaceError("Cursor already closed")
        return getattr(self._obj, name)

    @property
    def closed(self):
        return self._closed or bool(self._cnx.closed)


class FakePsycopg:
    """A connection of psycopg2's, and its one cursor. ``done``: what was executed, with commits and rollbacks."""

    def __init__(self, database):
        self.database = database
        self.closed = 0
        self.autocommit = False
        self.connection = self
        self.done = []
        self.notifies = []

    def cursor(self):
        return _FakePsycopgCursor(self)

    def set_isolation_level(self, level):
        self.autocommit = level == 0

    def close(self):
        self.closed = 1

    def commit(self):
        self.done.append("COMMIT")

    def rollback(self):
        self.done.append("ROLLBACK")


class _FakePsycopgCursor:
    def __init__(self, connection):
        self.connection = connection
        self.encoding = "UTF8"

    def execute(self, query, params=None):
        self.connection.done.append(query)

    def mogrify(self, query, params=None):
        return (query % params if params else query).encode()

    def fetchone(self):
        return ("answer to %s" % self.connection.done[-1],)

    def close(self):
        pass


class FakePool:
    """Odoo's pool. ``connect(database)`` makes what it lends; ``lent``: all of that, in order."""

    readonly = False

    def __init__(self, connect):
        self.connect = connect
        self.lent, self.kept, self.closed = [], [], []

    def borrow(self, dsn):
        connection = self.connect(dsn["database"] if "database" in dsn else dsn["dsn"])
        self.lent.append(connection)
        return connection

    def give_back(self, connection, keep_in_pool=True):
        assert connection in self.lent and connection not in self.kept + self.closed
        if keep_in_pool:
            self.kept.append(connection)
        else:
            self.closed.append(connection)
            connection.close()

    @property
    def in_use(self):
        return [each for each in self.lent if each not in self.kept + self.closed]

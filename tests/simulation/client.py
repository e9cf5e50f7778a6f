"""psycopg2's asynchronous connections to the simulated server: ``psycopg2.connect(async_=1, ...)``."""

import collections
import types

import psycopg2
from psycopg2 import errors, extensions

from . import kernel, machine
from .network import TO_SERVER, Link


def error(sqlstate, message):
    """Return what psycopg2 raises for ``sqlstate``; its ``pgcode`` can only be set by a class."""
    base = errors.lookup(sqlstate)
    return type(base.__name__, (base,), {"pgcode": sqlstate})(message)


class _ConnectionDescription(machine.Description):
    def __init__(self, link):
        super().__init__()
        self.link, self.inbox = link, collections.deque()

    def readable(self):
        return bool(self.inbox)

    def closed(self):
        self.link.close()


class Connection:
    """What ``psycopg2.connect`` returns."""

    server_version = 150003
    closed = 1

    def __init__(self, dsn=None, async_=0, host="", hostaddr="", dbname="", application_name="", **_others):
        assert async_ and not dsn, "the simulation knows asynchronous connections by keywords only"
        self._process = machine.this_process()
        self.path = kernel.K.world.paths[hostaddr or host]
        self.link = Link(self.path, self)
        self._description = _ConnectionDescription(self.link)
        try:
            self._number = self._process.open(self._description)
        except OSError as problem:
            raise psycopg2.OperationalError("could not create socket: %s" % problem) from None
        self.notifies, self.notices, self.closed = [], [], 0
        self.process_name, self.database = self._process.name, dbname
        self.rows, self._waiting, self._backend_pid = None, True, None
        kernel.K.world.watch.connected(self._process, self.path)
        self.link.carry(TO_SERVER, lambda: self.path.target.connect(self.link, dbname))
        kernel.point()

    def push(self, kind, what):
        """Called by the network: something has arrived."""
        self._description.inbox.append((kind, what))
        kernel.K.wake(self._description.waiters)

    def poll(self):
        kernel.point()
        machine.this_process()
        self._check_open()
        arrived = []
        try:
            while self._description.inbox:
                self._take(*self._description.inbox.popleft(), arrived)
        finally:
            self.notifies += arrived
        return extensions.POLL_READ if self._waiting else extensions.POLL_OK

    def _take(self, kind, what, arrived):
        """Take what has arrived; raise what psycopg2 raises then."""
        if kind == "notification":
            arrived.append(what)
        elif kind == "notice":
            self.notices.append(what)
        elif kind == "closed":
            self.closed = 2
            # libpq does not always get to read what came before.
            if kernel.K.rng.random() < 0.5:
                arrived.clear()
            raise psycopg2.OperationalError(what)
        elif kind == "refused":
            raise psycopg2.OperationalError(what)
        else:
            self._take_answer(kind, what)

    def _take_answer(self, kind, what):
        self._waiting = False
        if kind == "failed":
            raise error(*what)
        if kind == "connected":
            self._backend_pid = what
        else:
            self.rows = what

    def cursor(self):
        self._check_open()
        return _Cursor(self)

    def fileno(self):
        if self.closed == 1:
            raise psycopg2.InterfaceError("connection already closed")
        return self._number

    def get_backend_pid(self):
        return self._backend_pid

    def close(self):
        if self.closed != 1:
            self.closed = 1
            self._process.close(self._number)

    __del__ = close

    def execute(self, statement, values):
        machine.this_process()
        self._check_open()
        if self._waiting:
            raise psycopg2.ProgrammingError("execute cannot be used while an asynchronous query is underway")
        self._waiting, self.rows = True, None
        values = dict(values) if isinstance(values, dict) else values

        def arrive():
            if self.link.server is not None:
                self.link.server.execute(statement, values)

        self.link.carry(TO_SERVER, arrive)

    def _check_open(self):
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")


class _Cursor:
    def __init__(self, connection):
        self.connection = connection

    def execute(self, statement, values=None):
        self.connection.execute(statement, values)

    @property
    def description(self):
        return None if self.connection.rows is None else ("a column",)

    def fetchall(self):
        return self.connection.rows


def library():
    """Return the module that stands in for psycopg2: the real one, with another ``connect``."""
    module = types.ModuleType("psycopg2")
    vars(module).update({name: value for name, value in vars(psycopg2).items() if not name.startswith("__")})
    module.connect = Connection
    return module

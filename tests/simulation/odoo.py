"""Odoo's processes: their loops that listen, and as much of Odoo as the addon imports."""

import json
import types

from psycopg2 import Error

from tests.unit import fakes

from . import kernel, machine
from .kernel import Task
from .loading import Program, sleep
from .machine import Process
from .threads import Lock

# How Odoo itself connects.
_POOLED = {"host": "pooler", "port": 6432, "user": "odoo", "password": "s3cret"}
GEVENT, CRON, THREADED = "gevent", "cron", "threaded"
LOOPS = "bus", "cron0", "cron1"
BUS_CHANNEL, CRON_CHANNEL = "imbus", "cron_trigger"


class Odoo(Process):
    """One process of Odoo: with gevent (the bus), a cron worker, or threaded (both)."""

    def __init__(self, world, kind):
        name = "%s%d" % (kind, kernel.K.number("Odoo"))
        super().__init__(name, kind != GEVENT, world.rng.randrange(world.machines))
        self.world, self.kind = world, kind
        #: told to end, or to open its cursors anew
        self.ends, self.reopens = False, set()
        #: loop -> time until when it is busy with something else
        self.busy = {}
        #: seconds that writing a line of the log takes
        self.log_seconds, self.log_lock = 0.0, Lock()
        self.program, self.installed = None, False
        Task(self, self._main, (), "%s/main" % self.name)

    def _main(self):
        self.program = Program(self.world.addon, self, _odoo_modules(self), dict(self.world.environ))
        if self.world.feed_size:
            self.program.module("cursor").FEED_SIZE = self.world.feed_size
        self.program.module("patch").install()
        self.installed = True
        if self.kind != CRON:
            self._start_loop("bus", self._serve_bus)
        if self.kind != GEVENT:
            for number in range(self.world.rng.choice((1, 2))):
                self._start_loop("cron%d" % number, self._serve_cron)

    def _start_loop(self, loop, serve):
        Task(self, self._loop, (loop, serve), "%s/%s" % (self.name, loop))

    def work_on(self, databases):
        """Open an ordinary cursor on each of ``databases``, as requests do."""
        for name in databases:
            self._connect(name).cursor().close()

    def supervisors(self):
        """Return what `patch.supervisors` does, seen from outside."""
        if not self.installed or self.dead:
            return []
        return self.program.module("patch").supervisors()

    def modes(self):
        return [supervisor.mode for supervisor in self.supervisors()]

    def _connect(self, name):
        return self.program.modules["odoo.sql_db"].db_connect(name)

    # The loops, which differ between series in what does not matter here

    def _loop(self, loop, serve):
        while not self.ends:
            try:
                with self._connect("postgres").cursor() as cr, machine.Selector() as selector:
                    self.work_on(self.world.databases)
                    # The addon knows a listener by the LISTEN in the function that opens its cursor.
                    if loop == "bus":
                        cr.execute("listen imbus")
                    else:
                        cr.execute("SELECT pg_is_in_recovery()")
                        if not cr.fetchone()[0]:
                            cr.execute("LISTEN cron_trigger")
                    cr.commit()
                    connection = cr._cnx
                    selector.register(connection, 1)
                    self.world.watch.loop_begins(self, loop)
                    serve(connection, selector, loop)
            except (OSError, RuntimeError, Error) as error:
                kernel.K.note("the loop %s failed: %r" % (loop, error))
                sleep(5)
            finally:
                self.world.watch.loop_ends(self, loop)

    def _serve_bus(self, connection, selector, loop):
        while not self._over(loop):
            self._be_busy(loop)
            if not selector.select(5):
                continue
            connection.poll()
            while connection.notifies:
                for channel in json.loads(connection.notifies.pop().payload):
                    self.world.watch.received(self, loop, channel[1])

    def _serve_cron(self, connection, selector, loop):
        while not self._over(loop):
            self._be_busy(loop)
            selector.select(60)
            connection.poll()
            for notification in connection.notifies:
                self.world.watch.received(self, loop, notification.payload)
            connection.notifies.clear()

    def _over(self, loop):
        reopens = loop in self.reopens
        self.reopens.discard(loop)
        if reopens and loop == "bus":
            # Odoo's bus opens its cursor anew only after an error, and pauses first.
            self.world.watch.loop_ends(self, loop)
            raise Error("the bus failed")
        return self.ends or reopens

    def _be_busy(self, loop):
        while self.busy.get(loop, 0) > kernel.K.now:
            sleep(min(self.busy[loop] - kernel.K.now, 1))


def _odoo_modules(process):
    """Return what the addon imports of Odoo, as modules of ``process`` by name."""
    release = _module("odoo.release", version_info=(19, 0, 0, "final", 0, ""), version="19.0")
    tools = _module("odoo.tools", config=_Config(workers=0 if process.kind == THREADED else 2))
    server = _module("odoo.service.server", server=types.SimpleNamespace(quit_signals_received=0))
    service = _module("odoo.service", server=server)
    sql_db = _sql_db()
    odoo = _module("odoo", sql_db=sql_db, release=release, tools=tools, service=service)
    odoo.evented = process.kind == GEVENT
    return {module.__name__: module for module in (odoo, sql_db, release, tools, service, server)}


def _module(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return module


class _Config(dict):
    @property
    def options(self):
        return self


# As much of Odoo's sql_db as the addon patches.


def _sql_db():
    """Return a module ``sql_db``, with classes of its own, since the addon changes them."""
    module = _module("odoo.sql_db", frame_codeinfo=lambda frame, back=0: ("", 0))
    module.Cursor = type("Cursor", (fakes.Cursor,), {"execute": fakes.Cursor.execute})
    module.Connection = type("Connection", (_Connection,), {"cursor": _Connection.cursor, "_module": module})
    module.connection_info_for = lambda name, readonly=False: (name, {"database": name, **_POOLED})
    # All that the addon executes goes through `client.Connection`, and nothing through a connection of this pool.
    module.db_connect = lambda to, readonly=False: module.Connection(
        fakes.FakePool(fakes.FakePsycopg), *module.connection_info_for(to)
    )
    return module


class _Connection:
    def __init__(self, pool, dbname, dsn):
        self._pool, self.dbname, self._dsn = pool, dbname, dsn

    @property
    def dsn(self):
        return {name: value for name, value in self._dsn.items() if name != "password"}

    def cursor(self):
        return self._module.Cursor(self._pool, self.dbname, self._dsn)

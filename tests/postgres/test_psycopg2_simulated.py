"""Does the simulated psycopg2 answer as the real one does, with a real server behind it?

The same steps are done on both: what the addon calls of a connection and its cursor, and the statements that it sends.
It never cancels, and asks for no status.
"""

import contextlib
import selectors
import types

import psycopg2
import pytest
from psycopg2 import extensions

from bus_alt_connection import connection, listener, lookup, supervisor
from stack import ports
from stack.postgres import libpq_parameters
from tests.simulation import client, kernel, machine, network, postgres
from tests.support.backlog import create_database

TABLE = '"public".bus_bus'
LOOK_UP = {"since": "1:1:", "known": [1], "overlap": 0, "rows": 110000, "late": 100000}


class Real:
    """What the steps need of a real server with a database ``bus``."""

    selector = selectors.DefaultSelector

    def __init__(self, server, standby):
        self._server, self._places = server, {"primary": server, "standby": standby}
        self._places["nobody"] = types.SimpleNamespace(host=server.host, port=ports.take_port())
        ports.release_port(self._places["nobody"].port)

    def connect(self, database="bus", place="primary"):
        return psycopg2.connect(async_=1, **libpq_parameters(self._places[place], database))

    @contextlib.contextmanager
    def locked(self):
        with contextlib.closing(self._server.connect("bus", application_name="tests")) as locking:
            locking.cursor().execute("LOCK TABLE bus_bus")
            yield

    def terminate(self, pid):
        self._server.execute("SELECT pg_terminate_backend(%s)", (pid,))


class Simulated:
    """The same of simulated ones."""

    selector = machine.Selector

    def __init__(self):
        clusters = [postgres.Cluster(["bus"]), postgres.Cluster(["bus"])]
        self._cluster, clusters[1].standby = clusters[0], True
        servers = [postgres.Server(), postgres.Server()]
        for server, cluster in zip(servers, clusters):
            server.former = cluster
        names = zip(("primary", "standby", "nobody"), [*servers, servers[0]])
        paths = {name: network.Path(name, server) for name, server in names}
        paths["nobody"].refusing = True
        watch = types.SimpleNamespace(connected=lambda process, path: None)
        kernel.K.world = types.SimpleNamespace(paths=paths, watch=watch)

    def connect(self, database="bus", place="primary"):
        return client.Connection(async_=1, host=place, dbname=database)

    @contextlib.contextmanager
    def locked(self):
        self._cluster.lock("bus")
        yield
        self._cluster.unlock("bus")

    def terminate(self, pid):
        # What was asked before has arrived by then.
        kernel.K.wait([], kernel.K.now + 1)
        (backend,) = [one for one in self._cluster.backends if one.pid == pid]
        backend.terminate("terminating connection due to administrator command")


class Steps:
    """Calls, and what comes of each; for both to be equal, values that depend on the server are told by their type."""

    def __init__(self, system):
        self._system, self.outcomes = system, []

    def run(self):
        self.connecting()
        one, other = self.connected(), self.connected()
        self.asking(one)
        self.notifying(one, other)
        self.failing(one)
        self.losing(one, other)
        return self.outcomes

    def note(self, what, opened, step):
        """Do a step, and take note of what it returns or raises, and of whether the connection is closed then."""
        try:
            outcome = step()
        except psycopg2.Error as error:
            outcome = type(error).__name__, error.pgcode
        self.outcomes.append((what, outcome, opened.closed))

    def wait(self, opened):
        """Poll until the answer is there."""
        for state in iter(opened.poll, extensions.POLL_OK):
            self.wait_ready(opened, selectors.EVENT_WRITE if state == extensions.POLL_WRITE else selectors.EVENT_READ)

    def wait_ready(self, opened, event=selectors.EVENT_READ):
        with self._system.selector() as selector:
            selector.register(opened.fileno(), event)
            assert selector.select(10)

    def answer(self, opened, query, values=None):
        cursor = opened.cursor()
        cursor.execute(query, values)
        self.wait(opened)
        return cursor.fetchall() if cursor.description else None

    def ask(self, opened, query, values=None):
        self.note(query, opened, lambda: self.answer(opened, query, values))

    def ask_kinds(self, opened, query, values=None):
        """Ask for what depends on the server."""

        def kinds():
            return [[type(value).__name__ for value in row] for row in self.answer(opened, query, values)]

        self.note(query, opened, kinds)

    def connected(self):
        opened = self._system.connect()
        self.wait(opened)
        return opened

    def connecting(self):
        for database, place in (("bus", "primary"), ("nowhere", "primary"), ("bus", "nobody")):
            opened = self._system.connect(database, place)
            self.note("connect to %s of %s" % (database, place), opened, lambda opened=opened: self.wait(opened))
        standby = self._system.connect(place="standby")
        self.wait(standby)
        self.ask(standby, "LISTEN imbus")
        self.ask(standby, "SELECT pg_catalog.pg_is_in_recovery()")

    def asking(self, one):
        self.note("pid", one, lambda: self.answer(one, connection.PID) == [(one.get_backend_pid(),)])
        self.ask_kinds(one, connection._FACTS)
        self.ask(one, listener._READ_SETTINGS, (["idle_session_timeout", "tcp_user_timeout"],))
        self.ask_kinds(one, lookup._DATABASES)
        self.ask(one, "COMMIT")
        self.ask(one, "%s; %s" % (lookup._BEGIN % (200, 1000), lookup._FIND))
        self.ask(one, "%s; %s" % (lookup._LOCK.replace("TABLE_NAME", TABLE), lookup._CHECK), (TABLE,))
        self.ask_kinds(one, lookup._MISSED.replace("TABLE_NAME", TABLE), LOOK_UP)
        self.ask(one, "COMMIT")

        cursor = one.cursor()
        cursor.execute(connection.PID)
        self.note("execute while a statement is under way", one, lambda: one.cursor().execute(connection.PID))
        self.note("its answer", one, lambda: self.wait(one))

    def notifying(self, one, other):
        def arrived():
            self.wait_ready(one)
            one.poll()
            found = [(each.channel, each.payload, each.pid == other.get_backend_pid()) for each in one.notifies]
            del one.notifies[:]
            return found

        self.ask(one, 'LISTEN "A ""b"""; LISTEN Folded')
        for channel in ('A "b"', "folded", "nobody's"):
            self.ask(other, supervisor.NOTIFY, (channel, "one"))
            if channel != "nobody's":
                self.note("it arrives", one, arrived)
        self.ask(one, "UNLISTEN folded")
        self.ask(other, supervisor.NOTIFY, ("folded", "two"))
        self.ask(one, supervisor.NOTIFY, ('A "b"', "to itself"))
        self.note("it has arrived with the answer", one, lambda: [each.payload for each in one.notifies])

    def failing(self, one):
        lock = "LOCK TABLE bus_bus IN ACCESS SHARE MODE"
        with self._system.locked():
            for name in ("lock_timeout", "statement_timeout"):
                self.ask(one, "BEGIN; SET LOCAL %s = 100; %s" % (name, lock))
                self.ask(one, "SELECT pg_catalog.pg_is_in_recovery()")
                self.ask(one, "ROLLBACK")
        self.ask(one, "SELECT pg_catalog.pg_is_in_recovery()")

    def losing(self, one, other):
        self._system.terminate(one.get_backend_pid())

        def ended():
            while True:
                self.wait_ready(one)
                one.poll()

        self.note("poll when the server has ended it", one, ended)
        self.note("why", one, lambda: [text.strip() for text in one.notices])
        asking = self.connected()
        with self._system.locked():
            cursor = asking.cursor()
            cursor.execute("BEGIN; LOCK TABLE bus_bus IN ACCESS SHARE MODE")
            self._system.terminate(asking.get_backend_pid())
            self.note("answer when the server has ended it meanwhile", asking, lambda: self.wait(asking))
            self.note("why, then", asking, lambda: list(asking.notices))
        for what, opened in (("lost", one), ("closed", other)):
            if what == "closed":
                opened.close()
                opened.close()
                self.note("fileno when closed", opened, opened.fileno)
            self.note("poll when %s" % what, opened, opened.poll)
            self.note("cursor when %s" % what, opened, opened.cursor)


@pytest.fixture(scope="module")
def standby(server):
    create_database(server, "bus")
    with contextlib.closing(server.standby()) as standby:
        yield standby.start()


def test_the_simulated_psycopg2_answers_as_the_real_one(server, standby):
    simulated = []
    kernel.Kernel(1)
    system = Simulated()
    kernel.Task(machine.Process("p"), lambda: simulated.extend(Steps(system).run()), (), "t")
    kernel.K.run(kernel.K.now + 100)
    assert not kernel.K.problems, kernel.K.trace
    real = Steps(Real(server, standby)).run()
    assert len(real) > 40
    assert [pair for pair in zip(simulated, real) if pair[0] != pair[1]] == []
    assert len(simulated) == len(real)

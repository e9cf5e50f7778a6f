"""Who says LISTEN in Odoo is handed a cursor of the addon's, and there is a supervisor with each listener."""

import json
import threading

import pytest

from bus_alt_connection import connection, log, supervisor
from stack.waiting import wait_until
from tests.unit.fakes import FakePsycopg

# Sockets of what Odoo, or an error, leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def install(odoo, fake, monkeypatch):
    """Return a function that installs the patch with options, whose both ways lead to the fake server."""

    def install(environ=(), **options):
        for name, value in dict(environ).items():
            monkeypatch.setenv(name, value)
        odoo.tools.config.update(options)
        monkeypatch.setattr(odoo.patch, "_opening", fake.opening)
        monkeypatch.setattr(odoo.patch, "_direct_session", lambda *_arguments: fake.connect())
        odoo.patch.install()
        return odoo

    return install


@pytest.fixture
def installed(install):
    """The stub of Odoo with the patch, and with connections for ordinary cursors."""
    odoo = install()
    odoo.pool.connect = FakePsycopg
    return odoo


#: of one listener that leads
THREADS = ["bus_alt_connection.%s.postgres" % name for name in ("listener", "sharing", "supervisor")]


def bus_loop(odoo):
    cursor = odoo.sql_db.db_connect("postgres").cursor()
    cursor.execute("LISTEN imbus")
    cursor.commit()
    return cursor


def cron_loop(odoo):
    """As of Odoo 19.0, which does so anew after limit_time_worker_cron."""
    cursor = odoo.sql_db.db_connect("postgres").cursor()
    cursor.execute("SELECT pg_is_in_recovery()")
    assert cursor.fetchone() == (False,)
    cursor.execute("LISTEN cron_trigger")
    cursor.commit()
    return cursor


def open_cursor(odoo, to="x"):
    return odoo.sql_db.db_connect(to).cursor()


def ours():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("bus_alt_connection."))


def heard(cursor, send):
    """Send by ``send()`` until something arrives; return the first channel and payload."""

    def arrived():
        send()
        cursor._cnx.poll()
        return cursor._cnx.notifies

    first = wait_until(arrived, 5)[0]
    return first.channel, first.payload


# Who listens


def test_listeners_of_a_process_share_one_connection(installed, fake):
    cursors = [cron_loop(installed), bus_loop(installed), bus_loop(installed)]
    assert fake.connects == len(installed.patch.supervisors()) == 1
    assert ours() == THREADS
    assert heard(cursors[0], lambda: fake.notify("cron_trigger", "x")) == ("cron_trigger", "x")
    # No pooled connection was needed.
    assert installed.pool.lent == []
    for cursor in cursors:
        cursor.close()


def test_a_listen_on_a_cursor_of_another_function_is_heard_and_told(installed, fake, logged):
    cursor = open_cursor(installed)
    fetched = cursor._cnx
    cursor.execute("SELECT 1")
    cursor.execute("LISTEN orders")
    cursor.commit()
    assert heard(cursor, lambda: fake.notify("orders", "x")) == ("orders", "x")
    assert fetched.notifies == cursor._cnx.notifies
    (line,) = logged("executes LISTEN on a cursor that")
    assert "test_a_listen_on_a_cursor_of_another_function" in line and "open_cursor (" in line
    assert line.count(__file__) == 2
    cursor.close()
    assert installed.pool.in_use == []


def test_a_listen_that_the_addon_can_not_take_is_left_to_the_pooler_and_told(installed, logged):
    def listen(to):
        cursor = installed.sql_db.db_connect(to).cursor()
        cursor.execute("LISTEN orders")
        return cursor

    cursors = [listen("postgresql://elsewhere/x"), installed.sql_db.Cursor(installed.pool, "x", {"database": "x"})]
    assert len(logged("listen (", "listens through a connection URI of its own; the addon does not change that")) == 1
    cursors[1].execute("LISTEN orders")
    assert len(logged("test_a_listen_that_the_addon_can_not_take", "so LISTEN goes to the pooler")) == 1
    assert [one.done for one in installed.pool.lent] == [["LISTEN orders"]] * 2
    assert {type(cursor) for cursor in cursors} == {installed.sql_db.Cursor}
    assert installed.patch._here().databases == set()
    for cursor in cursors:
        cursor.close()


@pytest.mark.parametrize(
    "source, answer",
    [
        ("listen = 'LISTEN orders'", True),
        ("def f():\n    def g():\n        return 'LISTEN %s'", True),
        ("text = 'Listen now'", False),
        ("'LISTEN orders is what we execute.'", False),
    ],
)
def test_a_function_listens_if_a_constant_is_a_listen_statement(odoo, monkeypatch, source, answer):
    # Of a server action, the code is another one each time. What is known of codes is bounded.
    monkeypatch.setattr(odoo.patch, "_CACHE_SIZE", 10)
    for _ in range(20):
        assert odoo.patch._says_listen(compile(source, "<generated>", "exec")) is answer
    assert len(odoo.patch._says_listen_cache) <= 10


def test_a_cursor_names_the_function_that_opened_it(installed):
    for opener in (open_cursor, bus_loop):
        cursor = opener(installed)
        filename, line = cursor.opened_at
        assert filename == __file__
        assert opener.__code__.co_firstlineno < line < opener.__code__.co_firstlineno + 5
        cursor.close()


# Beginnings and ends


@pytest.mark.parametrize("which", ["listener", "supervisor"])
def test_there_is_no_listener_without_supervisor_nor_the_reverse(installed, fake, monkeypatch, which):
    start = threading.Thread.start

    def no_thread(self):
        if ".%s." % which in self.name:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        # Its traceback keeps the cursor, whose end would end the listener.
        with pytest.raises(RuntimeError) as _refused:
            bus_loop(installed)
    wait_until(lambda: not ours(), 5)
    assert not fake.sessions and installed.patch.supervisors() == []
    # Once there are threads again, the next has both.
    cursor = bus_loop(installed)
    assert ours() == THREADS
    cursor.close()


@pytest.mark.parametrize(
    "options, evented, limited",
    [({"workers": 2}, False, True), ({"workers": 0}, False, False), ({"workers": 0}, True, True)],
)
def test_only_the_threads_of_a_worker_share_an_arena(installed, monkeypatch, options, evented, limited):
    calls = []
    monkeypatch.setattr(installed.patch.threads, "limit_arenas", lambda: calls.append(ours()))
    installed.tools.config.update(options)
    installed.evented = evented
    bus_loop(installed).close()
    # It must come before the first thread has an arena.
    assert calls == ([[]] if limited else [])


@pytest.mark.parametrize("db_name, databases", [("a, b", ["a", "b"]), (["a", "b"], ["a", "b"]), (False, [])])
def test_the_databases_that_odoo_is_limited_to_are_known(odoo, db_name, databases):
    odoo.tools.config["db_name"] = db_name
    assert odoo.patch._configured_databases() == databases


# Outages


def test_with_a_wrong_setting_odoo_starts_and_nothing_connects(odoo, fake, monkeypatch, logged):
    monkeypatch.setenv("IMDISPATCHER_DB_SSLMODE", "verify_full")
    asked = []
    monkeypatch.setattr(connection, "connect", lambda parameters, *_more: asked.append(parameters))
    monkeypatch.setattr(odoo.patch, "_opening", fake.opening)
    monkeypatch.setattr(supervisor, "GRACE", 0.05)
    # Whoever loads the addon a second time changes nothing.
    for _ in range(2):
        odoo.patch.install()
    assert len(logged("IMDISPATCHER_DB_SSLMODE", "No listener connects until this is corrected")) == 1
    assert not logged("listeners go to") and not logged("share a direct connection")
    odoo.patch._here().databases.add("x")
    cursor = bus_loop(odoo)
    (one,) = odoo.patch.supervisors()
    wait_until(lambda: one.mode == supervisor.POLLING, 5)
    assert not asked
    cursor.close()


# A system database that is not postgres

CUSTOMER = {"IMDISPATCHER_DB_DBNAME": "customer"}


def test_what_odoo_does_on_postgres_is_done_on_the_system_database(install):
    odoo = install(CUSTOMER)
    odoo.pool.connect = FakePsycopg
    connected = odoo.sql_db.db_connect("postgres")
    assert connected.dsn == dict(odoo.own, database="customer")
    # By this name Odoo knows that it keeps none of these connections.
    assert connected.dbname == "postgres"
    replica = odoo.sql_db.connection_info_for("postgres", True)
    assert replica == ("postgres", dict(odoo.own, database="customer", host="replica"))
    for to in ("x", "customer"):
        assert odoo.sql_db.connection_info_for(to) == (to, dict(odoo.own, database=to))
    cursor = bus_loop(odoo)
    (one,) = odoo.patch.supervisors()
    assert one.listener.database == odoo.patch._direct("postgres")["dbname"] == "customer"
    # The bus is looked up there only if Odoo itself works on it.
    open_cursor(odoo, "postgres").close()
    assert one._with_bus() == set()
    open_cursor(odoo, "customer").close()
    assert one._with_bus() == {"customer"}
    cursor.close()


def test_a_system_database_that_is_away_is_told_and_odoo_starts(install, fake, logged):
    fake.away.add("customer")
    odoo = install(CUSTOMER)
    expected = "can't use database customer in place of postgres: pooler:6432: no more connections allowed"
    assert logged("can't use") == [expected]
    assert odoo.sql_db.db_connect("postgres").dsn["database"] == "customer"


@pytest.mark.parametrize(
    "version, database",
    [((19, 0, 0, "final", 0, ""), "customer"), ((19, 1, 0, "alpha", 1, ""), "postgres"), (("saas~19", 2), "postgres")],
)
def test_from_19_1_on_odoos_own_option_rules(odoo, install, logged, version, database):
    odoo.release.version_info = version
    install(CUSTOMER, db_system="system")
    assert odoo.sql_db.connection_info_for("postgres")[1]["database"] == database
    assert bool(logged("IMDISPATCHER_DB_DBNAME and Odoo's own db_system differ")) is (database == "postgres")


# Health


def test_health_tells_of_the_worst_listener(installed, monkeypatch):
    from bus_alt_connection.health import Health

    def ask(*statuses):
        supervisors = [type("Supervisor", (), {"status": lambda self, one=one: one})() for one in statuses]
        monkeypatch.setattr(installed.patch, "supervisors", lambda: supervisors)
        response = Health().health()
        body = json.loads(response.body)
        assert body["counters"]["outages"] == 2 * len(statuses)
        return response.status, body["status"], body["mode"]

    def status(mode, problem=None):
        return {"mode": mode, "problem": problem, "counters": dict.fromkeys(log.COUNTERS, 2)}

    assert ask() == (200, "pass", None)
    assert ask(status("listening")) == ask(status("listening"), status("shared")) == (200, "pass", "listening")
    # A listener without a problem does not hide that of another.
    assert ask(status("listening"), status("shared", "stuck")) == (200, "degraded", "shared")
    assert ask(status("listening"), status("listening", "stuck")) == (200, "degraded", "listening")
    assert ask(status("polling"), status("listening")) == (200, "degraded", "polling")
    assert ask(status("listening"), status("deaf"), status("polling")) == (503, "fail", "deaf")

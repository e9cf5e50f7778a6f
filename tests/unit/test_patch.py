"""Who says LISTEN in Odoo is handed a cursor of the addon's, and there is a supervisor with each listener."""

import functools
import json
import threading
import time

import psycopg2
import pytest

from bus_alt_connection import connection, listener, supervisor
from tests.unit.fakes import FakePsycopg

# Sockets of what Odoo, or an error, leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bus_alt_connection.")]


@pytest.fixture
def installed(odoo, fake, monkeypatch):
    """The stub of Odoo with the patch, whose both ways lead to the fake server."""
    monkeypatch.setattr(odoo.patch, "DirectSession", lambda *_arguments: fake.connect(), raising=False)
    monkeypatch.setattr(odoo.patch, "_direct_session", lambda *_arguments: fake.connect(), raising=False)
    monkeypatch.setattr(odoo.patch, "_opening", fake.opening)
    odoo.patch.install()
    return odoo


def bus_loop(odoo):
    cursor = odoo.sql_db.db_connect("postgres").cursor()
    cursor.execute("LISTEN imbus")
    cursor.commit()
    return cursor


def cron_loop(odoo):
    """As of Odoo 19.0, which does so anew after limit_time_worker_cron."""
    cursor = odoo.sql_db.db_connect("postgres").cursor()
    cursor.execute("SELECT pg_is_in_recovery()")
    in_recovery = cursor.fetchone()[0]
    if not in_recovery:
        cursor.execute("LISTEN cron_trigger")
    cursor.commit()
    return cursor


def test_listeners_of_a_process_share_one_connection(installed, fake):
    bus, cron = bus_loop(installed), cron_loop(installed)
    assert fake.connects == 1
    fake.notify("cron_trigger", "x")
    deadline = time.monotonic() + 5
    while not cron._cnx.notifies and time.monotonic() < deadline:
        cron._cnx.poll()
    assert [one.payload for one in cron._cnx.notifies] == ["x"]
    bus.close()
    cron.close()


def test_others_get_what_they_got_before(installed):
    installed.pool.connect = FakePsycopg

    def job():
        with installed.sql_db.db_connect("x").cursor() as cursor:
            cursor.execute("SELECT 1")
            return cursor

    assert type(job()) is installed.sql_db.Cursor
    (connection,) = installed.pool.kept
    assert (connection.database, connection.done) == ("x", ["SELECT 1", "COMMIT", "ROLLBACK"])
    assert installed.patch._here().databases == {"x"}


def test_no_listener_is_made_again_and_again_while_stopping(installed, monkeypatch):
    made = []

    class Counted(listener.Listener):
        def __init__(self, *arguments, **named):
            made.append(self)
            assert len(made) < 100
            super().__init__(*arguments, **named)

    monkeypatch.setattr(installed.patch, "Listener", Counted)
    installed.service_server.server.quit_signals_received = 1
    for _ in range(3):
        began = time.monotonic()
        cursor = bus_loop(installed)
        assert time.monotonic() - began < 1
        cursor.close()
    assert len(made) <= 3


@pytest.mark.parametrize("which", ["listener", "supervisor"])
def test_there_is_no_listener_without_supervisor_nor_the_reverse(installed, fake, monkeypatch, which):
    start = threading.Thread.start

    def no_thread(self):
        if ".%s." % which in self.name:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                bus_loop(installed)
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ours() and not fake.sessions
    assert installed.patch.supervisors() == []
    # And the next, once there are threads again, gets both.
    cursor = bus_loop(installed)
    threads = ["bus_alt_connection.%s.postgres" % module for module in ("listener", "sharing", "supervisor")]
    assert sorted(ours()) == threads and len(fake.sessions) == 1
    cursor.close()


def test_cron_outlives_that_it_reopens_while_both_ways_are_down(installed, fake):
    def no_connection(database):
        raise psycopg2.OperationalError("the pooler is away")

    installed.pool.connect = no_connection
    fake.refuse()
    fake.away.add("pooler")
    first = cron_loop(installed)
    first.close()
    cursor = cron_loop(installed)
    fake.forward()
    fake.away.clear()
    deadline = time.monotonic() + 5
    while not cursor._cnx.notifies and time.monotonic() < deadline:
        fake.notify("cron_trigger", "x")
        cursor._cnx.poll()
        time.sleep(0.01)
    assert cursor._cnx.notifies
    cursor.close()


def test_a_loop_that_comes_back_is_given_what_it_missed(installed, fake, monkeypatch):
    """The backlog belongs to the process, not to a listener."""
    fake.rows["x"] = []
    installed.patch._here().databases.add("x")
    cursor = bus_loop(installed)
    deadline = time.monotonic() + 5
    while not fake.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    cursor.close()
    fake.now += 1000
    fake.write("x", '"lost?"')
    # By its transaction: by its date it is long past.
    fake.now += 1000
    cursor = bus_loop(installed)
    deadline = time.monotonic() + 5
    while not cursor._cnx.notifies and time.monotonic() < deadline:
        cursor._cnx.poll()
        time.sleep(0.01)
    assert [one.payload for one in cursor._cnx.notifies] == ['["lost?"]']
    cursor.close()


# Who listens, and on which cursor


def open_cursor(odoo, to="x"):
    return odoo.sql_db.db_connect(to).cursor()


def wait_until_heard(fake, cursor, channel):
    deadline = time.monotonic() + 5
    while not cursor._cnx.notifies and time.monotonic() < deadline:
        fake.notify(channel, "x")
        time.sleep(0.01)
        cursor._cnx.poll()
    return [(one.channel, one.payload) for one in cursor._cnx.notifies][:1]


def test_a_listen_on_a_cursor_of_another_function_is_heard_and_told(installed, fake, logged):
    installed.pool.connect = FakePsycopg
    cursor = open_cursor(installed)
    fetched = cursor._cnx
    cursor.execute("SELECT 1")
    cursor.execute("LISTEN orders")
    cursor.commit()
    assert wait_until_heard(fake, cursor, "orders") == [("orders", "x")]
    assert fetched.notifies == cursor._cnx.notifies
    (line,) = logged("executes LISTEN on a cursor that")
    assert "test_a_listen_on_a_cursor_of_another_function" in line and "open_cursor (" in line
    assert line.count(__file__) == 2
    cursor.close()
    assert installed.pool.in_use == []


def test_a_want_of_threads_is_the_error_of_whoever_executes_listen(installed, monkeypatch):
    installed.pool.connect = FakePsycopg
    cursor = open_cursor(installed)

    def no_thread(*_arguments):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(installed.patch.threads, "start", no_thread)
        with pytest.raises(RuntimeError):
            cursor.execute("LISTEN orders")
    # Once there are threads again, it works.
    cursor.execute("LISTEN orders")
    cursor.commit()
    assert len(installed.patch.supervisors()) == 1
    cursor.close()


def test_a_database_that_is_opened_by_a_uri_is_left_alone(installed, logged):
    installed.pool.connect = FakePsycopg

    def listen(to):
        cursor = installed.sql_db.db_connect(to).cursor()
        cursor.execute("LISTEN orders")
        return cursor

    cursor = listen("postgresql://elsewhere/x")
    assert type(cursor) is installed.sql_db.Cursor
    assert installed.pool.lent[0].done == ["LISTEN orders"]
    assert len(logged("listen (", "listens at a URI of its own, which is left to it")) == 1
    assert installed.patch._here().databases == set()
    cursor.close()


def test_a_listen_on_a_cursor_of_unknown_origin_is_told(installed, logged):
    installed.pool.connect = FakePsycopg
    cursor = installed.sql_db.Cursor(installed.pool, "x", {"database": "x"})
    cursor.execute("LISTEN orders")
    assert installed.pool.lent[0].done == ["LISTEN orders"]
    assert len(logged("test_a_listen_on_a_cursor_of_unknown_origin", "is left to the pooler")) == 1
    cursor.close()


def test_prose_is_no_listener(installed):
    installed.pool.connect = FakePsycopg

    def greet():
        cursor = installed.sql_db.db_connect("x").cursor()
        cursor.execute("SELECT %s", ("listen now",))
        cursor.commit()
        return cursor

    cursor = greet()
    assert installed.patch.supervisors() == []
    assert installed.pool.lent[0].done == ["SELECT %s", "COMMIT"]
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
def test_a_function_that_is_generated_is_looked_at(odoo, source, answer):
    # Each time another code, as of a server action.
    for _ in range(2):
        assert odoo.patch._says_listen(compile(source, "<generated>", "exec")) is answer


def test_what_is_known_of_functions_takes_no_more_and_more_memory(odoo):
    for number in range(2 * odoo.patch._CACHE_SIZE):
        assert not odoo.patch._says_listen(compile("x = %d" % number, "<generated>", "exec"))
    assert len(odoo.patch._says_listen_cache) <= odoo.patch._CACHE_SIZE


def test_the_function_that_asks_through_a_partial_is_the_one_that_calls_it(installed):
    ask = functools.partial(installed.sql_db.db_connect("postgres").cursor)

    def listen():
        cursor = ask()
        cursor.execute("LISTEN orders")
        return cursor

    # It has taken no pooled connection, of which there is none.
    listen().close()


def test_a_cursor_names_the_function_that_opened_it(installed):
    installed.pool.connect = FakePsycopg
    for opener in (open_cursor, bus_loop):
        cursor = opener(installed)
        filename, line = cursor.opened_at
        assert filename == __file__
        assert opener.__code__.co_firstlineno < line < opener.__code__.co_firstlineno + 5
        cursor.close()


# One process, many threads


def in_threads(number, function):
    """Return what ``function`` returns in each of so many threads that call it at the same time."""
    together, found = threading.Barrier(number), []

    def run():
        together.wait(5)
        found.append(function())

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == number
    return found


def test_all_threads_of_a_process_have_the_same_listeners(odoo, monkeypatch):
    begun = threading.Barrier(2)

    class Slow(odoo.patch._Process):
        def __init__(self):
            begun.wait(5)
            super().__init__()

    monkeypatch.setattr(odoo.patch, "_Process", Slow)
    # Empty, but of the same kind.
    monkeypatch.setattr(odoo.patch, "_processes", odoo.patch._processes.copy())
    odoo.patch._processes.clear()
    first, second = in_threads(2, odoo.patch._here)
    assert first is second is odoo.patch._here()


def test_all_cursors_that_begin_to_listen_at_once_share_one_listener(installed, fake):
    cursors = in_threads(4, lambda: bus_loop(installed))
    assert len(installed.patch.supervisors()) == 1
    assert fake.connects == 1
    for cursor in cursors:
        cursor.close()


def test_it_is_installed_once_even_by_two_threads(odoo, monkeypatch):
    read, calls = odoo.patch.settings.read, []

    def slowly(*arguments):
        calls.append(arguments)
        time.sleep(0.1)
        return read(*arguments)

    monkeypatch.setattr(odoo.patch.settings, "read", slowly)
    in_threads(2, odoo.patch.install)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options, evented, limited",
    [({"workers": 2}, False, True), ({"workers": 0}, False, False), ({}, False, False), ({"workers": 0}, True, True)],
)
def test_only_the_threads_of_a_worker_share_an_arena(installed, monkeypatch, options, evented, limited):
    calls = []
    monkeypatch.setattr(installed.patch.threads, "limit_arenas", lambda: calls.append(ours()))
    installed.tools.config.update(options)
    installed.evented = evented
    bus_loop(installed).close()
    # Before the first thread has an arena.
    assert calls == ([[]] if limited else [])


# A system database of one's own


@pytest.fixture
def customer(installed_with):
    return installed_with("customer")


@pytest.fixture
def installed_with(odoo, fake, monkeypatch):
    """Return a function that installs the patch with a system database; both ways lead to the fake server."""

    def installed_with(database, **options):
        monkeypatch.setenv("IMDISPATCHER_DB_DBNAME", database)
        odoo.tools.config.update(options)
        monkeypatch.setattr(odoo.patch, "_direct_session", lambda *_arguments: fake.connect())
        monkeypatch.setattr(odoo.patch, "_opening", fake.opening)
        odoo.pool.connect = FakePsycopg
        odoo.patch.install()
        return odoo

    return installed_with


def test_what_odoo_does_on_postgres_is_done_on_the_system_database(customer):
    connected = customer.sql_db.db_connect("postgres")
    assert connected.dsn == dict(customer.own, database="customer")
    # By this name Odoo knows that it keeps none of these connections.
    assert connected.dbname == "postgres"
    replica = customer.sql_db.connection_info_for("postgres", True)
    assert replica == ("postgres", dict(customer.own, database="customer", host="replica"))


@pytest.mark.parametrize("to", ["x", "customer", "postgresql://elsewhere/postgres"])
def test_all_other_databases_are_what_they_were(odoo, customer, to):
    name, info = customer.sql_db.connection_info_for(to)
    assert name in to
    assert info == ({"dsn": to} if "://" in to else dict(customer.own, database=to))


def test_the_listener_is_on_the_system_database_and_so_is_its_check(customer, fake):
    cursor = bus_loop(customer)
    (one,) = customer.patch.supervisors()
    deadline = time.monotonic() + 5
    while one.mode != supervisor.LISTENING and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.listener.database == "customer"
    # One of them at the start: may we connect at all?
    assert len(fake.logins) > 1 and set(fake.logins) == {"customer"}
    assert customer.patch._direct("customer")["dbname"] == "customer"
    cursor.close()


def test_the_bus_is_looked_for_in_a_system_database_only_if_odoo_itself_works_on_it(customer):
    def job(database):
        customer.sql_db.db_connect(database).cursor().close()

    job("postgres")
    cursor = bus_loop(customer)
    (one,) = customer.patch.supervisors()
    assert one._with_bus() == set()
    job("customer")
    assert one._with_bus() == {"customer"}
    cursor.close()


def test_a_system_database_that_can_not_be_had_is_told_and_odoo_starts(installed_with, fake, logged):
    fake.away.add("customer")
    odoo = installed_with("customer")
    expected = "can't use database customer in place of postgres: pooler:6432: no more connections allowed"
    assert logged("can't use") == [expected]
    assert odoo.sql_db.db_connect("postgres").dsn["database"] == "customer"


def test_without_one_nothing_is_connected_to_at_the_start(installed, fake):
    assert fake.logins == []
    assert installed.sql_db.connection_info_for("postgres")[1]["database"] == "postgres"


@pytest.mark.parametrize("version", [(19, 1, 0, "alpha", 1, ""), ("saas~19", 2, 0, "final", 0, ""), (20, 0)])
def test_from_19_1_on_odoos_own_option_rules(odoo, installed_with, logged, version):
    odoo.release.version_info = version
    installed_with("customer", db_system="system")
    assert odoo.sql_db.connection_info_for("postgres")[1]["database"] == "postgres"
    assert logged("IMDISPATCHER_DB_DBNAME and Odoo's own db_system differ; db_system is used")


@pytest.mark.parametrize("version", [(12, 0, 0, "final", 0, ""), ("saas~18", 4), (19, 0, 0, "final", 0, "")])
def test_to_an_earlier_odoo_that_option_means_nothing(odoo, installed_with, logged, version):
    odoo.release.version_info = version
    installed_with("customer", db_system="system")
    assert odoo.sql_db.connection_info_for("postgres")[1]["database"] == "customer"
    assert not logged("db_system")


# Wrong settings


def test_with_a_wrong_setting_odoo_starts_and_polls(odoo, fake, monkeypatch, logged):
    monkeypatch.setenv("IMDISPATCHER_DB_SSLMODE", "verify_full")
    asked = []
    monkeypatch.setattr(connection, "connect", lambda parameters, *_more: asked.append(parameters))
    monkeypatch.setattr(odoo.patch, "_opening", fake.opening)
    monkeypatch.setattr(supervisor, "GRACE", 0.05)
    odoo.patch.install()
    (line,) = logged("No listener connects until that is mended")
    assert "IMDISPATCHER_DB_SSLMODE" in line and "Did you mean verify-full?" in line
    fake.rows["x"] = []
    odoo.patch._here().databases.add("x")
    cursor = bus_loop(odoo)
    deadline = time.monotonic() + 5
    while not cursor._cnx.notifies and time.monotonic() < deadline:
        fake.now = time.monotonic()
        fake.write("x", '"late"', notify=False)
        cursor._cnx.poll()
        time.sleep(0.02)
    assert cursor._cnx.notifies
    assert not asked
    (one,) = odoo.patch.supervisors()
    assert one.mode == supervisor.POLLING
    cursor.close()


# Health


@pytest.fixture
def health(installed):
    from bus_alt_connection.health import Health

    def ask():
        response = Health().health()
        return response.status, json.loads(response.body)

    return ask


def test_a_process_without_listener_is_well(health):
    status, body = health()
    assert (status, body["status"], body["listening"]) == (200, "pass", False)


def test_health_follows_the_mode(installed, health, fake, monkeypatch):
    cursor = bus_loop(installed)
    (one,) = installed.patch.supervisors()
    deadline = time.monotonic() + 5
    while one.mode != supervisor.LISTENING and time.monotonic() < deadline:
        time.sleep(0.01)
    status, body = health()
    assert (status, body["status"], body["mode"], body["confirmed"]) == (200, "pass", "listening", True)
    for mode, code, word in (("polling", 200, "degraded"), ("deaf", 503, "fail"), ("listening", 200, "pass")):
        monkeypatch.setattr(type(one), "mode", mode)
        status, body = health()
        assert (status, body["status"], body["mode"]) == (code, word, mode)
    cursor.close()

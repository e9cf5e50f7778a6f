"""No statement of the addon runs what another user has put into schema public (CVE-2018-1058).

What the addon sends is taken from the server's log, so that each new statement is covered once the scenario sends it;
and a test sees to that.
"""

import ast
import contextlib
import re
import uuid

import psycopg2
import pytest

from bus_alt_connection import connection, listener, supervisor, tasks
from stack.postgres import USER, PostgreSQL, libpq_parameters
from stack.proxy import Proxy
from stack.stack import ADDON
from stack.waiting import wait_until
from tests.support import traps
from tests.support.backlog import create_database
from tests.support.checking import HEARD, directly_to, odoo_conf, run_check
from tests.support.listening import directly, listening

BUS = "bus"
DATABASES = ("postgres", BUS)
SOURCES = sorted((ADDON / "bus_alt_connection").glob("*.py"))
SELECT = re.compile(r"\s*(SELECT|WITH|BEGIN)\b")
CALL = re.compile(r"(?<![%\w])([a-z_]+)\(")
QUALIFIED = re.compile(r"pg_catalog\.([a-z]\w*)")


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL where everybody may create objects in schema public, with a database that has a bus_bus."""
    with PostgreSQL({"log_line_prefix": traps.LOG_LINE_PREFIX}) as server:
        create_database(server, BUS)
        traps.let_everybody_create(server)
        yield server


@pytest.fixture(scope="module")
def seen(server, pooler, tmp_path_factory):
    """The statements that the addon sends."""
    mark = server.log_mark()
    scenario(server, pooler, tmp_path_factory.mktemp("before"))
    log = server.log_since(mark)
    assert traps.caught(log, USER) == []
    return traps.statements_of(log, USER)


@pytest.fixture(params=["default search_path", "public first"])
def trapped(request, server, pooler, seen):
    """The server with its traps set."""
    with contextlib.ExitStack() as stack:
        if request.param == "public first":
            # No attacker can do that; but then what is not qualified is caught even if it matches exactly.
            server.execute("ALTER ROLE %s SET search_path = public, pg_catalog" % USER)
            stack.callback(server.execute, "ALTER ROLE %s RESET search_path" % USER)
        for database in DATABASES:
            stack.callback(traps.remove_traps, server, database)
            traps.set_traps(server, seen, database)
        # The server connections of the pool have the search_path of before.
        pooler.restart()
        yield server


def test_no_statement_of_the_addon_runs_foreign_code(trapped, pooler, tmp_path):
    mark = trapped.log_mark()
    problem = None
    try:
        scenario(trapped, pooler, tmp_path)
    except Exception as error:
        # The traps tell why.
        problem = error
    assert traps.caught(trapped.log_since(mark), USER) == []
    assert problem is None


@pytest.mark.parametrize("database", DATABASES)
def test_the_traps_catch_what_is_not_qualified(trapped, pooler, database):
    mark = trapped.log_mark()
    statements = [
        "SELECT extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000",
        "SELECT count(datname::text) FROM pg_catalog.pg_database",
        "SELECT CASE 1.5 WHEN 1 THEN 2 END",
    ]
    for statement in statements:
        # Whatever comes of it.
        with contextlib.closing(pooler.connect(database)) as cnx, cnx.cursor() as cr:
            with contextlib.suppress(psycopg2.Error):
                cr.execute(statement)
    caught = traps.caught(trapped.log_since(mark), USER)
    assert [one for one in statements if not any(one in line and traps.MARK in line for line in caught)] == []


def test_the_scenario_sends_each_statement_of_the_addon(seen):
    names = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used = CALL.findall(node.value) if SELECT.match(node.value) else []
                names.update(dict.fromkeys(used + QUALIFIED.findall(node.value), path.name))
    assert {"pg_backend_pid", "pg_notification_queue_usage", "pg_settings", "set_config"} <= set(names)
    missing = set(names) - traps.names_in(seen)
    assert {name: names[name] for name in missing} == {}
    # Statements that call nothing.
    assert {"lock", "listen", "unlisten"} <= traps.names_in(seen)


# What the addon does ----------------------------------------------------------


def scenario(server, pooler, folder):
    """Have the addon do all for which it sends a statement: listen, lose, poll, catch up, check."""
    options = {"databases": [BUS], "CHECK_INTERVAL": 3, "POLL_INTERVAL": 1}
    with (
        Proxy((server.host, server.port)) as direct,
        listening(pooler, directly(direct), ("imbus", "cron_trigger"), **options) as running,
    ):
        feed = running.feed

        def wait_for_mode(mode):
            wait_until(lambda: running.supervisor.mode == mode, 20, mode)

        wait_for_mode(supervisor.LISTENING)
        server.execute("""NOTIFY imbus, '["heard"]'""")
        wait_for(feed, "imbus", "heard")
        direct.refuse()
        direct.cut()
        wait_until(lambda: running.listener.session is None, 20, "the loss")
        wait_for_mode(supervisor.POLLING)
        for _look in range(2):
            # No row of an earlier scenario is taken for it.
            name = uuid.uuid4().hex
            write_row(server, name)
            wait_for(feed, "imbus", name)
        direct.forward()
        wait_for_mode(supervisor.LISTENING)
        wait_for(feed, "cron_trigger", BUS)
    for way in (server, pooler):
        assert tasks.finish(connection.keeping_session(libpq_parameters(way))) is (way is server)
        with contextlib.closing(connection.connect(libpq_parameters(way))) as opened:
            tasks.finish(connection.finding_oldest_transaction(opened))
    listen_in_spite_of_a_bug(server)
    assert HEARD in run_check(folder, odoo_conf(pooler), directly_to(server))[1]


def write_row(server, channel):
    """Commit a row of bus_bus, and have no trap in the way of it."""
    statement = "INSERT INTO bus_bus (channel, create_date) VALUES (%s, pg_catalog.timezone('UTC', pg_catalog.now()))"
    server.execute(statement, ('"%s"' % channel,), BUS)


def wait_for(feed, channel, text):
    """Wait for a notification on ``channel`` with ``text`` in it; a look into bus_bus puts several into one."""
    arrived = []

    def has_arrived():
        arrived.extend(feed.all())
        return any(name == channel and text in payload for name, payload in arrived)

    wait_until(has_arrived, 20, "%s on %s" % (text, channel))


class Refused(psycopg2.OperationalError):
    sqlstate = "58P01"


class RefusingOnce(listener.DirectSession):
    """As at a server that can't access the status of a transaction."""

    refused = False

    def execute(self, query, *args, **kwargs):
        if query.startswith("LISTEN") and not self.refused:
            self.refused = True
            raise Refused("could not access status of transaction 1")
        return super().execute(query, *args, **kwargs)


def listen_in_spite_of_a_bug(server):
    with contextlib.closing(RefusingOnce(libpq_parameters(server))) as session:
        session.listen(frozenset(["imbus"]), lambda *_warning: None)
        assert session.refused

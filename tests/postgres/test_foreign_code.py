"""No statement of the addon runs what another user has put into schema public (CVE-2018-1058).

PostgreSQL looks an unqualified name up in all schemas of the search path, and prefers what matches the types of the
arguments more exactly, wherever it is. So schema ``public`` has a trap for each operator, and for each function that
the addon names, with every combination of types that may occur. A trap writes a line to the server's log, which it does
in a read-only or aborted transaction as well. ``public`` comes first in the search path: no attacker can do that, but
then what is not qualified is caught even if PostgreSQL's own matches exactly.
"""

import ast
import contextlib
import itertools
import re
import uuid

import psycopg2
import pytest

from bus_alt_connection import connection, supervisor, tasks
from stack.postgres import USER, PostgreSQL, libpq_parameters
from stack.proxy import Proxy
from stack.stack import ADDON
from stack.waiting import wait_until
from tests.support.backlog import create_database
from tests.support.checking import HEARD, directly_to, odoo_conf, run_check
from tests.support.listening import directly, listening

BUS = "bus"
OWNER, OWNER_PASSWORD = "mallory", "mallory-s3cret"
MARK = "TRAP"
# What an operator or function may be given; the last ones are polymorphic.
TYPES = (
    'int2 int4 int8 numeric float8 text varchar name "char" bool oid xid txid_snapshot timestamp timestamptz interval'
    " regclass int4[] int8[] text[] name[] anyelement anyarray"
).split()
# For IN, CASE x WHEN, NULLIF, USING, IS DISTINCT FROM, BETWEEN and LIKE, PostgreSQL looks the first ones up as if they
# were written out.
OPERATORS = {"bool": "= <> <= >= ~~ < > ~".split(), "text": "+ - * / ||".split()}
SELECT = re.compile(r"\s*(SELECT|WITH|BEGIN)\b")
CALL = re.compile(r"(?<![%\w])([a-z_]+)\(")
QUALIFIED = re.compile(r"pg_catalog\.([a-z]\w*)")
LITERAL = re.compile(r"E?'(?:[^'\\]|''|\\.)*'")
# A line of the server's log: application, level and text of what Odoo's role does.
LOGGED = re.compile(r"^\d{4}-\d\d-\d\d .*?\] %s/(.*?) ([A-Z]+):  (.*)" % USER, re.MULTILINE)


def names_in_source():
    """Return the names of functions, types and the like in the statements of the addon."""
    names = set()
    for path in (ADDON / "bus_alt_connection").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.update(CALL.findall(node.value) if SELECT.match(node.value) else [])
                names.update(QUALIFIED.findall(node.value))
    return names


def logged(log):
    """Return level and text of what the addon has caused in the server's log."""
    found = LOGGED.findall(log.replace("\n\t", " "))
    return [(level, text) for application, level, text in found if application != "tests"]


def caught(log):
    """Return the traps that were set off, and all errors."""
    return [text for level, text in logged(log) if level == "ERROR" or MARK in text]


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL with traps, and with a database that has a bus_bus."""
    with PostgreSQL({"log_line_prefix": "%m [%p] %u/%a "}) as server:
        create_database(server, BUS)
        server.execute("CREATE ROLE %s LOGIN PASSWORD '%s'" % (OWNER, OWNER_PASSWORD))
        # Megabytes.
        server.execute("ALTER ROLE %s SET log_statement = 'none'" % OWNER)
        for database in ("postgres", BUS):
            # As everybody may up to PostgreSQL 14.
            server.execute("GRANT CREATE ON SCHEMA public TO PUBLIC", dbname=database)
            with contextlib.closing(server.connect(database, OWNER, OWNER_PASSWORD)) as attacker:
                with attacker, attacker.cursor() as cr:
                    cr.execute("SET search_path = pg_catalog; " + "; ".join([*operators(), *functions(cr)]))
        server.execute("ALTER ROLE %s SET search_path = public, pg_catalog" % USER)
        yield server


def trap(name, types, result="text"):
    body = "BEGIN RAISE LOG '%s %s(%s)'; RETURN NULL; END" % (MARK, name, ", ".join(types))
    head = 'CREATE FUNCTION public."%s"(%s) RETURNS %s' % (name, ", ".join(types), result)
    return "%s LANGUAGE plpgsql AS $trap$%s$trap$" % (head, body)


def operators():
    for result, symbols in OPERATORS.items():
        function = "trap_" + result
        for left, right in itertools.product(TYPES, repeat=2):
            yield trap(function, [left, right], result)
            for symbol in symbols:
                operands = "FUNCTION = public.%s, LEFTARG = %s, RIGHTARG = %s" % (function, left, right)
                yield "CREATE OPERATOR public.%s (%s)" % (symbol, operands)


def functions(cr):
    cr.execute(
        "SELECT DISTINCT proname, pronargs - n FROM pg_proc, generate_series(0, pronargdefaults) n"
        " WHERE proname = ANY(%s) AND pronamespace = 'pg_catalog'::regnamespace AND pronargs - n <= 2",
        (sorted(names_in_source()),),
    )
    for name, count in cr.fetchall():
        for types in itertools.product(TYPES, repeat=count):
            yield trap(name, types)


@pytest.fixture(scope="module")
def log(server, pooler, tmp_path_factory):
    """What the server logs while the addon does all that it does."""
    mark = server.log_mark()
    try:
        scenario(server, pooler, tmp_path_factory.mktemp("check"))
    except Exception:
        # The traps tell why.
        assert caught(server.log_since(mark)) == []
        raise
    return server.log_since(mark)


def test_no_statement_of_the_addon_runs_foreign_code(log):
    assert caught(log) == []


def test_the_scenario_sends_each_statement_of_the_addon(log):
    statements = " ".join(text for _level, text in logged(log) if text.startswith("statement: "))
    sent = set(re.findall(r"[a-z_]\w*", LITERAL.sub("''", statements).lower()))
    # The last ones call nothing.
    names = names_in_source() | {"lock", "listen", "unlisten"}
    assert {"pg_backend_pid", "pg_notification_queue_usage", "pg_settings", "set_config"} <= names
    assert names - sent == set()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000",
        "SELECT count(datname::text) FROM pg_catalog.pg_database",
        "SELECT CASE 1.5 WHEN 1 THEN 2 END",
    ],
)
def test_the_traps_catch_what_is_not_qualified(server, pooler, statement):
    mark = server.log_mark()
    with contextlib.closing(pooler.connect(BUS)) as cnx, cnx.cursor() as cr:
        # Whatever comes of it.
        with contextlib.suppress(psycopg2.Error):
            cr.execute(statement)
    assert any(MARK in text for text in caught(server.log_since(mark)))


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

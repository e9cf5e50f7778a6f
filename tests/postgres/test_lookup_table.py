"""A look-up reads the table that Odoo uses, and none that may execute what another user has defined."""

import contextlib

import psycopg2
import pytest

from bus_alt_connection import connection
from stack.pgbouncer import PgBouncer
from stack.postgres import libpq_parameters
from tests.support.backlog import AskedBacklog

TABLE = "CREATE TABLE {0}.bus_bus (id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar)"
INSERT = "INSERT INTO {0}.bus_bus (channel, create_date) VALUES (%s, '2020-01-01')"


@pytest.fixture
def write(server):
    """Return a function that writes a row into the table of a schema; all is in a new database ``x`` of Odoo's."""
    server.execute("CREATE DATABASE x OWNER odoo")
    server.execute(TABLE.format("public"), dbname="x")
    server.execute("ALTER TABLE bus_bus OWNER TO odoo", dbname="x")
    yield lambda channel, schema="public": server.execute(INSERT.format(schema), (channel,), "x")
    server.execute("DROP DATABASE x WITH (FORCE)")


@pytest.fixture
def backlog(server, write):
    backlog = AskedBacklog(server)
    assert backlog.missed("x") == []
    backlog.now += 100
    return backlog


def test_what_another_client_left_in_the_pool_does_not_matter(server, write):
    with PgBouncer(server, databases={"x": "pool_size=1"}) as pooler:
        backlog = AskedBacklog(pooler)
        assert backlog.missed("x") == []
        with contextlib.closing(pooler.connect("x")) as other, other.cursor() as cr:
            other.autocommit = True
            # As pg_dump does.
            cr.execute("SELECT pg_catalog.set_config('search_path', '', false)")
            write("one")
            assert backlog.missed("x", overlap=False) == ["one"]
            cr.execute("SHOW search_path")
            assert cr.fetchone()[0].strip('"') == ""
        # Nor is anything left there by the look-up, or thrown away.
        assert "client disconnect" not in pooler.log()


@pytest.mark.parametrize("schema", ["own", 'with "quotes" and 100%s'])
def test_it_is_the_table_that_odoo_finds_by_its_name(server, write, backlog, schema):
    quoted = '"%s"' % schema.replace('"', '""')
    server.execute("CREATE SCHEMA %s AUTHORIZATION odoo" % quoted.replace("%", "%%"), (), "x")
    server.execute(TABLE.format(quoted).replace("%", "%%"), (), "x")
    server.execute(("ALTER TABLE %s.bus_bus OWNER TO odoo" % quoted).replace("%", "%%"), (), "x")
    server.execute("ALTER ROLE odoo IN DATABASE x SET search_path = %s, public" % quoted.replace("%", "%%"), (), "x")
    write("public")
    server.execute(INSERT.format(quoted.replace("%", "%%")), ("own",), "x")
    assert backlog.missed("x", overlap=False) == ["own"]


OTHERS = {
    "another's table": ("ALTER TABLE bus_bus OWNER TO mallory; GRANT SELECT ON bus_bus TO odoo", "belongs to another"),
    "a view": (
        "ALTER TABLE bus_bus RENAME TO b; CREATE VIEW bus_bus AS SELECT * FROM b; ALTER VIEW bus_bus OWNER TO odoo",
        "not an ordinary table",
    ),
    "policies": (
        "ALTER TABLE bus_bus OWNER TO postgres; GRANT SELECT ON bus_bus TO odoo;"
        " ALTER TABLE bus_bus ENABLE ROW LEVEL SECURITY",
        "row-level security",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_may_execute_something_of_another_user_is_not_read(server, write, backlog, kind):
    change, reason = OTHERS[kind]
    server.execute("DROP ROLE IF EXISTS mallory; CREATE ROLE mallory")
    server.execute(change, dbname="x")
    for _ in range(2):
        with pytest.raises(psycopg2.Error, match=reason):
            backlog.missed("x", overlap=False)
    assert backlog._pending


def test_a_table_of_a_role_that_odoos_belongs_to_will_do(server, write, backlog):
    server.execute("CREATE ROLE owners; GRANT owners TO odoo")
    server.execute("ALTER TABLE bus_bus OWNER TO owners", dbname="x")
    write("one")
    assert backlog.missed("x", overlap=False) == ["one"]
    server.execute("ALTER TABLE bus_bus OWNER TO odoo", dbname="x")
    server.execute("DROP ROLE owners")


def test_a_standby_is_not_asked(server, write):
    with server.standby() as standby:
        backlog = AskedBacklog(standby)
        with pytest.raises(psycopg2.Error, match="the pooler leads to a standby"):
            backlog.missed("x")


def test_marks_and_checks_tell_a_server_by_the_same_value(server, write, backlog):
    with contextlib.closing(connection.connect(libpq_parameters(server))) as opened:
        assert opened.examine().started == backlog._marks["x"].moment.started


# Only the server's own word ends it -----------------------------------------------------------------------------------


class WithoutFallback(PgBouncer):
    """A pooler that knows the databases of its configuration only: ``postgres``."""

    def _write(self, name, lines):
        super()._write(name, [line.replace("\n* = ", "\n;* = ") for line in lines])


def test_a_database_that_does_not_exist_is_forgotten_through_a_pooler_too(server):
    with PgBouncer(server) as pooler, pytest.raises(psycopg2.Error, match="nowhere is gone"):
        AskedBacklog(pooler).missed("nowhere")


def test_a_database_that_the_pooler_does_not_know_stays_pending(server, write):
    with WithoutFallback(server) as pooler:
        backlog = AskedBacklog(pooler)
        for _ in range(2):
            with pytest.raises(psycopg2.Error, match="no such database"):
                backlog.missed("x")


def test_a_database_that_allows_no_connections_stays_pending(server, write, backlog):
    write("one")
    server.execute("ALTER DATABASE x ALLOW_CONNECTIONS false")
    with pytest.raises(psycopg2.Error, match="not currently accepting connections"):
        backlog.missed("x", overlap=False)
    server.execute("ALTER DATABASE x ALLOW_CONNECTIONS true")
    assert backlog.missed("x", overlap=False) == ["one"]

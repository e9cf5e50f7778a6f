"""A look-up reads the table that Odoo uses, and none that may execute what another user has defined."""

import contextlib

import psycopg2
import pytest

from bus_alt_connection import connection
from stack.pgbouncer import PgBouncer
from stack.postgres import libpq_parameters
from tests.support.backlog import AskedBacklog, create_database, create_table, write


@pytest.fixture
def backlog(server):
    """One that has looked into the empty bus_bus of a new database ``x``."""
    create_database(server, "x")
    backlog = AskedBacklog(server)
    assert backlog.missed("x") == []
    yield backlog
    server.execute("DROP DATABASE x WITH (FORCE)")


def test_the_search_path_that_another_client_left_in_the_pool_does_not_matter(server, backlog):
    with PgBouncer(server, databases={"x": "pool_size=1"}) as pooler:
        with contextlib.closing(pooler.connect("x")) as other, other.cursor() as cr:
            other.autocommit = True
            # pg_dump sets an empty one. PgBouncer 1.26.1 can't give that back to its client, see docs/poolers.rst.
            cr.execute("SET search_path = pg_catalog")
            write(server, "x", "one", age=0)
            assert AskedBacklog(pooler).missed("x") == ["one"]
            cr.execute("SHOW search_path")
            assert cr.fetchone()[0] == "pg_catalog"
        # Nor is anything left there by the look-up, or thrown away.
        assert "client disconnect" not in pooler.log()


def test_it_is_the_table_that_odoo_finds_by_its_name(server, backlog):
    schema = '"with ""quotes"" and 100%s"'
    server.execute("CREATE SCHEMA %s AUTHORIZATION odoo" % schema, dbname="x")
    create_table(server, "x", schema)
    server.execute("ALTER ROLE odoo IN DATABASE x SET search_path = %s, public" % schema, dbname="x")
    write(server, "x", "public")
    server.execute("INSERT INTO %s.bus_bus (channel, create_date) VALUES ('own', '2020-01-01')" % schema, dbname="x")
    assert backlog.missed("x") == ["own"]


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
def test_what_may_execute_something_of_another_user_is_not_read(server, backlog, kind):
    change, reason = OTHERS[kind]
    server.execute("DROP ROLE IF EXISTS mallory; CREATE ROLE mallory")
    server.execute(change, dbname="x")
    for _ in range(2):
        with pytest.raises(psycopg2.Error, match=reason):
            backlog.missed("x")


def test_a_table_of_a_role_that_odoos_belongs_to_will_do(server, backlog):
    server.execute("CREATE ROLE owners; GRANT owners TO odoo")
    server.execute("ALTER TABLE bus_bus OWNER TO owners", dbname="x")
    write(server, "x", "one")
    assert backlog.missed("x") == ["one"]


def test_a_standby_is_not_asked(server, backlog):
    with server.standby() as standby, pytest.raises(psycopg2.Error, match="the pooler leads to a standby"):
        AskedBacklog(standby).missed("x")


def test_look_ups_and_checks_tell_a_server_by_the_same_value(server, backlog):
    with contextlib.closing(connection.connect(libpq_parameters(server))) as opened:
        assert opened.examine().started == backlog._marks["x"].moment.started


# Only the server's own word ends a look-up that is pending ------------------------------------------------------------


def test_a_database_that_does_not_exist_is_forgotten_through_a_pooler_too(pooler):
    with pytest.raises(psycopg2.Error, match="nowhere is gone"):
        AskedBacklog(pooler).missed("nowhere")


def test_a_database_that_the_pooler_does_not_know_stays_pending(server, backlog):
    with PgBouncer(server, databases={"*": None}) as pooler:
        backlog = AskedBacklog(pooler)
        for _ in range(2):
            with pytest.raises(psycopg2.Error, match="no such database"):
                backlog.missed("x")

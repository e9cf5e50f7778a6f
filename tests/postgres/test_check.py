"""The check before going live, on right and wrong settings; on real servers, and without Odoo."""

import contextlib
import re
import sys
from typing import NamedTuple, Optional

import pytest

from stack import ports
from stack.pgbouncer import PgBouncer
from stack.postgres import PASSWORD, USER, PostgreSQL
from tests.support.checking import HEARD, directly_to, odoo_conf, run_check
from tests.support.overheard import overheard

WRONG_PASSWORD = "zulu'yankee=xray whiskey"
NEEDLESS = "OK; but Odoo uses no pooler, or one that keeps LISTEN, so it needs no addon to listen"
IS_POOLER = "is a pooler that does not keep LISTEN; set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to Po"
IS_ANOTHER = "is not the server that Odoo sends to; set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to tha"
IS_STANDBY = "is a standby, and only a primary accepts LISTEN"


# Servers and poolers, by the names that the cases below use -----------------------------------------------------------


@pytest.fixture(scope="module")
def copied_server():
    """A PostgreSQL of a copy of the cluster; all those of the tests are."""
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="module")
def standby(server):
    with contextlib.closing(server.standby()) as standby:
        yield standby.start()


def pooler_fixture(server="server", **options):
    """Return a fixture: a PgBouncer in front of what the fixture ``server`` is, with these options."""

    @pytest.fixture
    def started(request):
        with PgBouncer(request.getfixturevalue(server), **options) as pooler:
            yield pooler

    return started


keeping = pooler_fixture(settings={"pool_mode": "session"})
small = pooler_fixture(settings={"reserve_pool_size": 0}, databases={"postgres": "pool_size=1"})
renaming = pooler_fixture(databases={"postgres": "dbname=template1"})
before_standby = pooler_fixture("standby")


@pytest.fixture
def going_round(server):
    """A pooler that gives each transaction another of its server connections, so that it seems to keep sessions."""
    with PgBouncer(server, settings={"server_round_robin": 1}) as pooler, used_by(pooler, 2):
        yield pooler


@contextlib.contextmanager
def used_by(pooler, number):
    """Have clients use so many server connections at once before the block, which are idle during it; yield them."""
    with contextlib.ExitStack() as exits:
        clients = [exits.enter_context(contextlib.closing(pooler.connect())) for _ in range(number)]
        for client in clients:
            client.cursor().execute("SELECT 1")
        yield clients


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the check and returns its output, in which no password may be."""

    def run(conf, variables=None, *arguments, code=0, **options):
        found, output = run_check(tmp_path, conf, variables or {}, *arguments, **options)
        for secret in (PASSWORD, *WRONG_PASSWORD.split()):
            assert secret not in output
        assert "Traceback" not in output
        assert found == code
        return output

    return run


def rows(output, way):
    """Return the rows of the table, each without its address."""
    return [found.split() for found in re.findall(r"^%s +(.+?) +\S+$" % way, output, re.MULTILINE)]


def lines(output, word):
    return re.findall("^%s: (.*)" % word, output, re.MULTILINE)


def verdict(output):
    return output.splitlines()[-1]


# What it says of the two ways -----------------------------------------------------------------------------------------


class Case(NamedTuple):
    ordinary: str
    direct: Optional[str]  # None: nothing is set
    says: str  # the verdict, or what is found in the only error
    own: dict = {}  # more options of odoo.conf
    of_listeners: dict = {}  # more variables


CASES = {
    "all is well": Case("pooler", "server", HEARD),
    "a pooler that goes round its connections": Case("going_round", "server", HEARD),
    "a direct way through a pooler that keeps sessions": Case("pooler", "keeping", HEARD),
    "no pooler": Case("server", None, NEEDLESS),
    "a pooler that keeps sessions": Case("keeping", "server", NEEDLESS),
    "direct: a pooler": Case("pooler", None, IS_POOLER),
    "direct: a copy of the cluster": Case("pooler", "copied_server", IS_ANOTHER),
    "direct: a standby": Case("pooler", "standby", IS_STANDBY),
    "direct: another database": Case("renaming", "server", "on database postgres, but Odoo sends on template1"),
    "direct: password": Case("pooler", "server", "authentication failed for", {}, {"PASSWORD": WRONG_PASSWORD}),
    "direct: TLS": Case("pooler", "server", "does not support SSL", {}, {"SSLMODE": "require"}),
    "direct: refused option": Case("pooler", "server", "Did you mean verify-full", {}, {"SSLMODE": "verify_full"}),
    "ordinary: password": Case("pooler", "server", "authentication failed", {"db_password": WRONG_PASSWORD}),
    "ordinary: a standby": Case("before_standby", "server", IS_STANDBY),
}


@pytest.mark.parametrize("name", CASES)
def test_it_says_whether_listeners_hear_and_what_is_wrong(request, run, name):
    case = CASES[name]
    ordinary = request.getfixturevalue(case.ordinary)
    own = {"USER": USER, "PASSWORD": PASSWORD, "SSLMODE": "prefer", **case.of_listeners}
    variables = directly_to(request.getfixturevalue(case.direct), **own) if case.direct else {}
    is_right = case.says.startswith("OK")
    output = run(odoo_conf(ordinary, **case.own), variables, code=0 if is_right else 1)
    if is_right:
        assert verdict(output) == case.says
        assert not lines(output, "ERROR") + lines(output, "WARNING")
    else:
        (error,) = lines(output, "ERROR")
        assert re.search(case.says, error)
        assert error.startswith(name.partition(":")[0]) or "option" in name
        assert verdict(output) == "NOT OK: 1 error(s)"
    # With a wrong option nothing is connected to.
    assert bool(rows(output, "direct")) == ("option" not in name and name != "no pooler" or case.direct is None)


def test_it_shows_what_is_where_also_if_run_as_a_module(run, server, pooler):
    program = (sys.executable, "-m", "bus_alt_connection.check")
    output = run(odoo_conf(pooler), directly_to(server), program=program)
    version = server.value("SHOW server_version").split()[0]
    assert rows(output, "ordinary") == rows(output, "direct") == [[version, "primary", "same"]]
    most, used = re.search(r"max_connections is (\d+), 3 of them .*, (\d+) are in use", output).groups()
    assert most == server.value("SHOW max_connections") and 1 <= int(used) < int(most)
    for place in (pooler, server):
        assert "  %s:%s\n" % (place.host, place.port) in output


def test_in_a_list_of_hosts_those_of_no_use_are_passed_over_and_named(run, server, pooler, standby):
    # Nobody listens there.
    closed = ports.take_port()
    places = {"HOST": ",".join([server.host] * 3), "PORT": "%s,%s,%s" % (standby.port, closed, server.port)}
    output = run(odoo_conf(pooler), directly_to(server, **places))
    assert [row[1] for row in rows(output, "direct")] == ["standby", "-", "primary"]
    first, second = lines(output, "WARNING")
    assert first.endswith(IS_STANDBY + "; skipped")
    assert re.search("Connection refused.*; skipped$", second)
    assert verdict(output) == HEARD
    ports.release_port(closed)


def test_the_function_that_odoo_notifies_with_is_tried(run, server, pooler):
    variables = dict(directly_to(server), ODOO_NOTIFY_FUNCTION="no_such_function")
    (error,) = lines(run(odoo_conf(pooler), variables, code=1), "ERROR")
    assert "function no_such_function(unknown, unknown) does not exist" in error


def test_a_system_database_that_there_is_not_is_told_in_any_terminal(run, server, pooler):
    variables = dict(directly_to(server, DBNAME="straße"), PYTHONIOENCODING="ascii")
    errors = lines(run(odoo_conf(pooler), variables, code=1), "ERROR")
    assert [error.partition(":")[0] for error in errors] == ["ordinary", "direct"]
    assert all(r'"stra\xdfe" does not exist; IMDISPATCHER_DB_DBNAME may name another one' in error for error in errors)


# What it does to others, and finds of them ----------------------------------------------------------------------------


def test_nobody_else_hears_anything(run, server, pooler):
    with overheard(server) as heard:
        run(odoo_conf(pooler), directly_to(server))
        run(odoo_conf(pooler), code=1)
    assert not heard


def test_no_pooler_is_left_with_a_connection_that_listens(run, server, going_round):
    mark = server.log_mark()
    run(odoo_conf(going_round), code=1)
    said = re.findall(r"\[(\d+)\] .*statement: (LISTEN|UNLISTEN) \W?bus_alt_connection_", server.log_since(mark))
    assert "LISTEN" in [word for _pid, word in said]
    assert set(dict(said).values()) == {"UNLISTEN"}


def test_listens_that_odoo_left_in_the_pool_are_told_until_reconnect(run, server):
    with PgBouncer(server) as pooler, used_by(pooler, 3) as clients:
        # Through the server connection that is handed out last.
        clients[0].cursor().execute("LISTEN imbus; LISTEN cron_trigger")
        for client in clients:
            client.commit()
        before = {row["remote_pid"] for row in pooler.show("servers")}
        (warning,) = lines(run(odoo_conf(pooler), directly_to(server)), "WARNING")
        assert "that still LISTEN, on cron_trigger, imbus." in warning and "RECONNECT" in warning
        # One may have been opened for the look, and one before it to see whether the pooler keeps sessions.
        assert len({row["remote_pid"] for row in pooler.show("servers")} - before) <= 2
        pooler.admin("RECONNECT")
        assert lines(run(odoo_conf(pooler), directly_to(server)), "WARNING") == []


def test_a_notification_queue_that_fills_is_told(run, server, pooler):
    with contextlib.closing(server.connect(application_name="tests")) as listening:
        listening.cursor().execute("LISTEN other")
        listening.commit()
        # From here on it fetches nothing.
        listening.cursor().execute("SELECT 1")
        # 8 GB at most, up to PostgreSQL 16 and by default.
        server.execute("SELECT pg_notify('other', i || repeat('x', 7900)) FROM generate_series(1, 14000) i")
        output = run(odoo_conf(pooler), directly_to(server))
        assert "PostgreSQL's notification queue is 1% full" in " ".join(lines(output, "WARNING"))
        assert verdict(output) == HEARD


# Options and odoo.conf ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conf, variables, arguments, says",
    [
        ("", {}, ["-c", "missing.conf"], "missing.conf:-: No such file"),
        ("[options]\ndb_password %s\n" % PASSWORD, {}, [], "odoo.conf:2: "),
        ("", {}, ["--db_password=%s" % PASSWORD], "set PGPASSWORD"),
        ("", {}, ["postgresql://odoo:%s@db-01/x" % PASSWORD], "set PGPASSWORD"),
        ("[options]\ndb_host = db-01\n", {"PGHOST": "db-02"}, [], "PGHOST and db_host of odoo.conf differ"),
        ("[options]\ndb_password = %s\n" % PASSWORD, {"PGPASSWORD": WRONG_PASSWORD}, [], "PGPASSWORD and db_password"),
    ],
)
def test_what_can_not_be_read_or_reconciled_is_told_without_passwords(run, conf, variables, arguments, says):
    assert says in run(conf, variables, *arguments, code=2)


def test_the_command_line_decides(run, server, pooler):
    variables = dict(directly_to(server), PGHOST="nowhere.invalid")
    output = run(odoo_conf(pooler, db_host="elsewhere.invalid"), variables, "--db_host", pooler.host)
    assert verdict(output) == HEARD


def test_the_environment_and_pgpass_are_enough(run, tmp_path, server, pooler):
    pgpass = tmp_path / ".pgpass"
    pgpass.write_text("*:*:*:%s:%s\n" % (USER, PASSWORD))
    pgpass.chmod(0o600)
    # Old releases of libpq don't go by HOME.
    variables = {"PGHOST": pooler.host, "PGPORT": str(pooler.port), "PGUSER": USER, "PGPASSFILE": str(pgpass)}
    output = run(None, {**variables, **directly_to(server)})
    assert output.startswith("odoo.conf: none\n") and verdict(output) == HEARD


@pytest.mark.parametrize(
    "name, variable", [(".odoorc", None), ("given.conf", "OPENERP_SERVER"), ("given.conf", "ODOO_RC")]
)
def test_odoo_conf_is_where_odoo_looks_for_it(run, tmp_path, server, pooler, name, variable):
    path = tmp_path / name
    path.write_text(odoo_conf(pooler))
    output = run(None, {**directly_to(server), **({variable: str(path)} if variable else {})})
    assert output.startswith("odoo.conf: %s\n" % path) and verdict(output) == HEARD

"""The check before going live, on right and wrong settings; on real servers, and without Odoo."""

import contextlib
import os
import re
import subprocess
import sys
import threading

import pytest
from psycopg2.extensions import Notify

from bus_alt_connection import check, connection
from stack import ports
from stack.pgbouncer import PgBouncer
from stack.postgres import PASSWORD, USER, NewCluster, PostgreSQL
from stack.proxy import black_hole
from stack.stack import ADDON
from tests.support.overheard import overheard
from tests.support.poolerlike import PoolerLike

CHECK = ADDON / "bus_alt_connection" / "check.py"
WRONG_PASSWORD = "zulu'yankee=xray whiskey"
FOREIGN = re.compile("PG|IMDISPATCHER_|ODOO_|OPENERP_|HOME$|PYTHON")

HEARD = "OK: listeners hear what Odoo sends"
NO_POOLER = "OK; but Odoo uses no pooler, or one that keeps sessions, so it needs no addon to listen"
KEEPS = "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"
IS_POOLER = (
    "is a pooler that does not keep the connection for us; set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT"
    " to PostgreSQL itself"
)
IS_ANOTHER = (
    "is another server than the one that Odoo sends to; set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to that one"
)
IS_STANDBY = "is a standby, and only a primary takes LISTEN"


@pytest.fixture(scope="module")
def other_server():
    """A PostgreSQL of another cluster."""
    with NewCluster() as server:
        server.execute("CREATE ROLE %s LOGIN PASSWORD '%s'" % (USER, PASSWORD))
        yield server


@pytest.fixture(scope="module")
def copied_server():
    """A PostgreSQL of a copy of the cluster; all those of the tests are."""
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="module")
def standby(server):
    with contextlib.closing(server.standby()) as standby:
        yield standby.start()


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the check: ``run(conf, variables, *arguments)``; ``conf`` None: without ``-c``."""

    def run(conf, variables=None, *arguments, code=0, python=(sys.executable, CHECK)):
        if conf is not None:
            path = tmp_path / "odoo.conf"
            path.write_text(as_text(conf))
            arguments = ("-c", path, *arguments)
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        done = subprocess.run(
            [*python, *arguments],
            env={**kept, "HOME": str(tmp_path), **(variables or {})},
            cwd=tmp_path if CHECK in python else ADDON,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        print(done.stdout)
        for secret in (PASSWORD, *WRONG_PASSWORD.split()):
            assert secret not in done.stdout
        assert "Traceback" not in done.stdout
        assert done.returncode == code
        return done.stdout

    return run


def as_text(conf):
    if isinstance(conf, str):
        return conf
    return "[options]\n" + "".join("%s = %s\n" % item for item in conf.items())


def odoo(through, **more):
    """Return Odoo's own options, of an Odoo that connects to ``through``."""
    return {
        "db_host": through.host,
        "db_port": through.port,
        "db_user": USER,
        "db_password": PASSWORD,
        **more,
    }


def to(server, **more):
    """Return variables that send the listeners to ``server``."""
    variables = {"HOST": server.host, "PORT": str(server.port), **more}
    return {"IMDISPATCHER_DB_" + name: value for name, value in variables.items()}


def rows(output, way):
    """Return the rows of the table, each without its address."""
    return [found.split() for found in re.findall(r"^%s +(.+?) +\S+$" % way, output, re.MULTILINE)]


def kind(output, way):
    ((is_a, *_others),) = rows(output, way)
    return is_a


def lines(output, word):
    return re.findall("^%s: (.*)" % word, output, re.MULTILINE)


def verdict(output):
    return output.splitlines()[-1]


# What is right


@pytest.mark.parametrize("where", ["environment", "odoo.conf", "module", "command line"])
def test_right_settings_pass_and_show_what_is_where(run, server, pooler, where):
    conf, variables, arguments, options = odoo(pooler), to(server), [], {}
    if where == "odoo.conf":
        conf.update((name.lower(), value) for name, value in variables.items())
        variables = {}
    elif where == "module":
        options = {"python": (sys.executable, "-m", "bus_alt_connection.check")}
    elif where == "command line":
        arguments = ["--db_host", conf["db_host"], "--db_port=%s" % conf["db_port"], "-r", USER]
        conf = {"db_host": "elsewhere.invalid", "db_port": "1", "db_user": "nobody", "db_password": PASSWORD}
    output = run(conf, variables, *arguments, **options)
    version = server.value("SHOW server_version").split()[0]
    assert rows(output, "ordinary") == [["pooler", version, "primary", "same"]]
    assert rows(output, "direct") == [["server", version, "primary", "same"]]
    assert "  %s:%s\n" % (pooler.host, pooler.port) in output
    assert "  %s:%s\n" % (server.host, server.port) in output
    assert not lines(output, "ERROR") + lines(output, "WARNING")
    assert verdict(output) == HEARD
    assert max(map(len, output.splitlines()[1:])) < 80


def test_nobody_else_hears_anything(run, server, pooler, other_server):
    with overheard(server) as heard:
        run(odoo(pooler), to(server))
        run(odoo(server))
        run(odoo(pooler), to(other_server), code=1)
        run(odoo(pooler), code=1)
    assert not heard


@pytest.mark.parametrize("round_robin", [0, 1])
def test_no_pooler_is_left_with_a_connection_that_listens(run, server, round_robin):
    with PgBouncer(server, settings={"server_round_robin": round_robin}) as pooler:
        mark = server.log_mark()
        run(odoo(pooler), code=1)
        run(odoo(pooler), to(server))
        log = server.log_since(mark)
    said = re.findall(r"\[(\d+)\] .*statement: (LISTEN|UNLISTEN) bus_alt_connection_", log)
    # As a direct way, as the ordinary one, and where it belongs.
    assert [word for _pid, word in said].count("LISTEN") == 3
    last = dict(said)
    assert set(last.values()) == {"UNLISTEN"}


def test_the_function_that_odoo_notifies_with_is_used(run, server, pooler):
    (error,) = lines(run(odoo(pooler), dict(to(server), ODOO_NOTIFY_FUNCTION="no_such_function"), code=1), "ERROR")
    assert "function no_such_function(unknown, unknown) does not exist" in error


def test_without_a_pooler_the_addon_is_not_needed(run, server):
    output = run(odoo(server))
    assert kind(output, "ordinary") == "server"
    assert verdict(output) == NO_POOLER


def test_both_spellings_that_differ_are_a_warning(run, server, pooler):
    output = run(odoo(pooler), dict(to(server), ODOO_IMDISPATCHER_DB_HOST="elsewhere"))
    (warning,) = lines(output, "WARNING")
    assert "IMDISPATCHER_DB_HOST and ODOO_IMDISPATCHER_DB_HOST are both set and differ" in warning
    assert verdict(output) == HEARD


def test_a_standby_in_the_list_is_passed_over_and_named(run, server, pooler, standby):
    variables = to(server)
    for name, first in (("HOST", standby.host), ("PORT", standby.port)):
        variables["IMDISPATCHER_DB_" + name] = "%s,%s" % (first, variables["IMDISPATCHER_DB_" + name])
    output = run(odoo(pooler), variables)
    assert [(is_a, *others) for is_a, _version, *others in rows(output, "direct")] == [
        ("server", "standby", "another"),
        ("server", "primary", "same"),
    ]
    (warning,) = lines(output, "WARNING")
    assert warning.startswith("direct: %s:%s" % (standby.host, standby.port))
    assert warning.endswith(IS_STANDBY + "; passed over")
    assert verdict(output) == HEARD


def test_a_host_in_the_list_that_is_down_is_passed_over_and_named(run, server, pooler):
    variables = to(server, HOST="%s,%s" % (server.host, server.host), PORT="%s,%s" % (closed_port(), server.port))
    output = run(odoo(pooler), variables)
    assert rows(output, "direct")[0] == ["-", "-", "-", "-"]
    (warning,) = lines(output, "WARNING")
    assert re.match("direct: .*Connection refused.*; passed over$", warning)
    assert verdict(output) == HEARD


# Poolers of all kinds


def test_a_pooler_that_keeps_sessions_is_told(run, server):
    with PgBouncer(server, settings={"pool_mode": "session"}) as pooler:
        for variables in (to(server), {}):
            output = run(odoo(pooler), variables)
            assert kind(output, "ordinary") == "pooler"
            assert verdict(output) == KEEPS


@pytest.mark.parametrize("idle", [2, 3])
def test_a_pooler_that_goes_round_its_connections_is_not_taken_for_one_that_keeps_sessions(run, server, idle):
    with PgBouncer(server, settings={"server_round_robin": 1}) as pooler, contextlib.ExitStack() as exits:
        clients = [exits.enter_context(contextlib.closing(pooler.connect())) for _ in range(idle)]
        for client in clients:  # in a transaction each, and so on a server connection each
            client.cursor().execute("SELECT 1")
        for client in clients:
            client.rollback()
        assert verdict(run(odoo(pooler), to(server))) == HEARD


def test_a_direct_way_through_a_pooler_that_keeps_sessions_is_good(run, server, pooler):
    with PgBouncer(server, databases={"postgres": "pool_mode=session"}) as pinning:
        output = run(odoo(pooler), to(pinning))
    assert kind(output, "direct") == "pooler"
    assert verdict(output) == HEARD


def test_a_pooler_that_keeps_sessions_is_not_what_is_wrong(run, pooler, copied_server):
    with PgBouncer(copied_server, settings={"pool_mode": "session"}) as pinning:
        (error,) = lines(run(odoo(pooler), to(pinning), code=1), "ERROR")
    assert error.endswith(IS_ANOTHER)


def test_a_pooler_with_one_server_connection_is_enough_to_tell(run, server):
    with PgBouncer(server, settings={"reserve_pool_size": 0}, databases={"postgres": "pool_size=1"}) as pooler:
        assert verdict(run(odoo(pooler), to(server))) == HEARD
        (error,) = lines(run(odoo(pooler), {}, code=1), "ERROR")
    assert error.endswith(IS_POOLER)


def test_a_busy_pooler_is_not_taken_for_one_that_keeps_sessions(run, server, pooler):
    busy = threading.Event()
    busy.set()

    def send():
        with contextlib.closing(pooler.connect()) as connection:
            connection.autocommit = True
            while busy.is_set():
                connection.cursor().execute("SELECT 1")

    senders = [threading.Thread(target=send) for _ in range(3)]
    for sender in senders:
        sender.start()
    try:
        (error,) = lines(run(odoo(pooler), code=1), "ERROR")
        assert error.endswith(IS_POOLER)
        assert verdict(run(odoo(pooler), to(server))) == HEARD
    finally:
        busy.clear()
        for sender in senders:
            sender.join()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_pooler_that_hands_on_the_servers_pid_is_no_server(run, server, pooler, size):
    with PoolerLike(server, size=size) as alike:
        # Who believes "no pooler" removes the addon, and is deaf.
        output = run(odoo(alike), to(server))
        assert kind(output, "ordinary") == "pooler"
        assert verdict(output) == HEARD
        for conf, variables in ((odoo(pooler), to(alike)), (odoo(alike), {})):
            output = run(conf, variables, code=1)
            assert kind(output, "direct") == "pooler"
            (error,) = lines(output, "ERROR")
            assert error == "direct: %s:%s %s" % (alike.host, alike.port, IS_POOLER)


@pytest.mark.parametrize("hands_on_pid", [True, False])
def test_a_pooler_that_keeps_the_connection_of_who_listens_is_good(run, server, pooler, hands_on_pid):
    with PoolerLike(server, size=3, hands_on_pid=hands_on_pid, pins=True) as pinning:
        output = run(odoo(pooler), to(pinning))
        assert kind(output, "direct") == "pooler"
        assert verdict(output) == HEARD
        # On Odoo's own way it makes the addon superfluous.
        for variables in (to(server), {}):
            output = run(odoo(pinning), variables)
            assert kind(output, "ordinary") == "pooler"
            assert verdict(output) == KEEPS


# What listens in the pool


@pytest.fixture
def used_pooler(server):
    """A pooler with three server connections; stock Odoo listens through the one that is handed out last."""
    with PgBouncer(server) as pooler, contextlib.ExitStack() as exits:
        clients = [exits.enter_context(contextlib.closing(pooler.connect())) for _ in range(3)]
        # In a transaction each, and so on a server connection each.
        for client in clients:
            client.cursor().execute("SELECT 1")
        clients[0].cursor().execute("LISTEN imbus; LISTEN cron_trigger")
        for client in clients:
            client.commit()
        yield pooler


def test_listens_that_odoo_left_in_the_pool_are_told_until_reconnect(run, server, used_pooler):
    output = run(odoo(used_pooler), to(server))
    (warning,) = lines(output, "WARNING")
    place = "%s:%s" % (used_pooler.host, used_pooler.port)
    assert warning.startswith(
        "the pooler at %s has server connections that still LISTEN, on cron_trigger, imbus." % place
    )
    assert "RECONNECT" in warning
    assert verdict(output) == HEARD
    used_pooler.admin("RECONNECT")
    assert lines(run(odoo(used_pooler), to(server)), "WARNING") == []


def test_the_look_into_the_pool_costs_it_no_connection(run, server, used_pooler):
    before = {row["remote_pid"] for row in used_pooler.show("servers") if row["database"] == "postgres"}
    run(odoo(used_pooler), to(server))
    after = {row["remote_pid"] for row in used_pooler.show("servers") if row["database"] == "postgres"}
    assert before <= after
    # One may have been opened for the look, and one before it to see whether the pooler keeps sessions.
    assert len(after - before) <= 2


def test_a_listen_in_a_pool_that_is_used_up_is_told(run, server):
    with PgBouncer(server, settings={"reserve_pool_size": 0}, databases={"postgres": "pool_size=1"}) as pooler:
        with contextlib.closing(pooler.connect()) as client:
            client.autocommit = True
            client.cursor().execute("LISTEN imbus")
        (warning,) = lines(run(odoo(pooler), to(server)), "WARNING")
        assert "still LISTEN, on imbus." in warning


def test_a_notification_queue_that_fills_is_told(run, server, pooler):
    with contextlib.closing(server.connect(application_name="tests")) as listening:
        listening.cursor().execute("LISTEN other")
        listening.commit()
        # From here on it fetches nothing.
        listening.cursor().execute("SELECT 1")
        # 8 GB at most, up to PostgreSQL 16 and by default.
        server.execute("SELECT pg_notify('other', i || repeat('x', 7900)) FROM generate_series(1, 14000) i")
        output = run(odoo(pooler), to(server))
        (warning,) = [line for line in lines(output, "WARNING") if "queue of PostgreSQL" in line]
        assert warning.startswith("the notification queue of PostgreSQL is 1% full.")
        assert verdict(output) == HEARD


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Return a function like ``run``, without settings of the listeners, in this very process."""
    for name in list(os.environ):
        if FOREIGN.match(name) and name != "HOME":
            monkeypatch.delenv(name)

    def run_here(conf):
        path = tmp_path / "odoo.conf"
        path.write_text(as_text(conf))
        code = check.main(["-c", str(path)])
        output = capsys.readouterr().out
        assert code == (1 if "ERROR" in output else 0)
        return output

    return run_here


def test_a_notification_that_comes_back_to_its_sender_gives_a_pooler_away(run_here, server, monkeypatch):
    monkeypatch.setattr(connection, "keeps_session", lambda parameters: None)
    with PoolerLike(server, size=1) as alike:
        output = run_here(odoo(alike))
    assert kind(output, "ordinary") == kind(output, "direct") == "?"
    (error,) = lines(output, "ERROR")
    assert error.endswith(IS_POOLER)


def test_without_proof_no_way_is_called_a_server(run_here, server, monkeypatch):
    monkeypatch.setattr(connection, "keeps_session", lambda parameters: None)
    output = run_here(odoo(server))
    assert kind(output, "ordinary") == "?"
    # LISTEN was tried there, so that the addon is not needed is true all the same.
    assert verdict(output) == KEEPS


class LazyPooler:
    """Leaves its one server connection with a client until another one wants it: luck, as long as nobody does."""

    def __init__(self):
        self.client = None

    def connect(self, parameters):
        return LazilyPooled(self, parameters)


class LazilyPooled(connection.Connection):
    def __init__(self, pooler, parameters):
        self.parameters = parameters
        self._pooler, self._heard = pooler, []

    def execute(self, query, values=None, timeout=0):
        if "pg_notify" in query:
            # Sent by another way.
            self._pooler.client._heard.append(Notify(1, *values))
        else:
            self._pooler.client = self

    def receive(self):
        heard, self._heard = self._heard, []
        return heard

    def close(self):
        pass

    def examine(self):
        return connection.Facts("lazy:6432", 1, False, False, "postgres", "15.18", 1)


def test_luck_is_no_proof_of_a_pooler_that_keeps_the_connection(run_here, monkeypatch):
    monkeypatch.setattr(connection, "connect", LazyPooler().connect)
    monkeypatch.setattr(connection, "keeps_session", lambda parameters: False)
    (error,) = lines(run_here({"db_host": "127.0.0.1"}), "ERROR")
    assert error.endswith(IS_POOLER)


@pytest.mark.parametrize("answer", [None, [], [(1,)], [(1, 2, 3, 4, 5, 6)]], ids=repr)
def test_a_broken_pooler_is_told_without_a_traceback(run_here, pooler, monkeypatch, answer):
    def asking(*_arguments, **_options):
        yield from ()
        return answer

    monkeypatch.setattr(connection.Connection, "asking", asking)
    (error,) = lines(run_here(odoo(pooler)), "ERROR")
    assert error.startswith("ordinary: %s:%s" % (pooler.host, pooler.port))
    assert error.endswith("not the answer")


# What is wrong: how it is made, and what is said


def closed_port():
    # Released at once, so somebody else could take it; but nobody who speaks PostgreSQL's protocol.
    port = ports.take_port()
    ports.release_port(port)
    return port


DIRECT = {
    # Facts, with what to do about them.
    "pooler": (lambda servers: to(servers.pooler), IS_POOLER),
    "nothing set": (lambda servers: {}, IS_POOLER),
    "other cluster": (lambda servers: to(servers.other_server), IS_ANOTHER),
    "copied cluster": (lambda servers: to(servers.copied_server), IS_ANOTHER),
    "standby": (lambda servers: to(servers.standby), IS_STANDBY),
    # The words of libpq and of the server.
    "refused": (lambda servers: to(servers.server, PORT=str(closed_port())), "Connection refused"),
    "unknown host": (lambda servers: to(servers.server, HOST="elsewhere.invalid"), "elsewhere.invalid:.* known"),
    "impossible host": (lambda servers: to(servers.server, HOST="db..invalid"), "label|known|resolved"),
    "lists": (lambda servers: to(servers.server, HOST="a,b", PORT="1,2,3"), "3 .*2 host"),
    "password": (
        lambda servers: to(servers.server, PASSWORD=WRONG_PASSWORD),
        'password authentication failed for user "odoo"',
    ),
    "TLS not offered": (lambda servers: to(servers.server, SSLMODE="require"), "does not support SSL"),
    "standby, told by libpq": (
        lambda servers: to(servers.standby, TARGET_SESSION_ATTRS="read-write"),
        "standby|read-only|hot standby",
    ),
    # The settings.
    "misspelt": (
        lambda servers: dict(to(servers.server), IMDISPATCHER_DB_PASWORD=WRONG_PASSWORD),
        r"IMDISPATCHER_DB_PASWORD is not an option. Did you mean IMDISPATCHER_DB_PASSWORD\?",
    ),
    "sslmode": (
        lambda servers: to(servers.server, SSLMODE="verify_full"),
        r"IMDISPATCHER_DB_SSLMODE is not an sslmode. Did you mean verify-full\?",
    ),
}


class Servers:
    """What the cases above choose from, started when it is first asked for."""

    def __init__(self, request):
        self._request = request

    def __getattr__(self, name):
        return self._request.getfixturevalue(name)


@pytest.mark.parametrize("case", DIRECT)
def test_a_wrong_direct_way_is_told(run, request, pooler, case):
    variables, said = DIRECT[case]
    output = run(odoo(pooler), variables(Servers(request)), code=1)
    (error,) = lines(output, "ERROR")
    assert re.search(said, error)
    assert kind(output, "ordinary") == "pooler"
    assert verdict(output) == "NOT OK: 1 error(s)"


def test_a_database_that_the_pooler_has_by_another_name_is_told(run, server):
    with PgBouncer(server, databases={"postgres": "dbname=template1"}) as pooler:
        (error,) = lines(run(odoo(pooler), to(server), code=1), "ERROR")
        assert error == "direct: it listens on database postgres, but Odoo sends on template1"
        assert verdict(run(odoo(pooler), to(server, DBNAME="template1"))) == HEARD


def test_a_system_database_is_for_both_ways(run, server, pooler):
    mark = server.log_mark()
    assert verdict(run(odoo(pooler, imdispatcher_db_dbname="template1"), to(server))) == HEARD
    said = re.findall(r"(\S+) LOG:  statement: (?:listen|.*pg_notify)", server.log_since(mark), re.IGNORECASE)
    assert len(said) > 1 and set(said) == {"template1"}


def test_a_system_database_that_there_is_not_is_told(run, server, pooler):
    output = run(odoo(pooler), to(server, DBNAME="nowhere"), code=1)
    assert [found.partition(":")[0] for found in lines(output, "ERROR")] == ["ordinary", "direct"]
    assert all('database "nowhere" does not exist' in found for found in lines(output, "ERROR"))


def test_settings_that_are_refused_are_not_connected_with(run, server, pooler):
    # A server connection of the pool may have kept the application_name of an earlier client.
    pooler.restart()
    mark = server.log_mark()
    output = run(odoo(pooler), to(server, SSLMODE="verify_full"), code=1)
    assert not rows(output, "direct")
    assert "odoo-listener" not in server.log_since(mark)


def test_a_silent_path_is_told_in_time(run, pooler):
    with black_hole() as (host, port):
        variables = {"HOST": host, "PORT": str(port), "CONNECT_TIMEOUT": "1"}
        variables = {"IMDISPATCHER_DB_" + name: value for name, value in variables.items()}
        (error,) = lines(run(odoo(pooler), variables, code=1), "ERROR")
    assert error == "direct: %s:%s: no answer in 1 s" % (host, port)


def test_a_pooler_that_takes_no_transactions_is_told(run, server, pooler):
    with PgBouncer(server, settings={"pool_mode": "statement"}) as deaf:
        output = run(odoo(pooler), to(deaf), code=1)
    assert kind(output, "direct") == "pooler"
    assert len(lines(output, "ERROR")) == 1


class OneDatabase(PgBouncer):
    """A pooler that has forgotten all databases but Odoo's own, as many do."""

    def _write_configuration(self):
        super()._write_configuration()
        path = self.folder / "pgbouncer.ini"
        path.write_text(re.sub(r"(?m)^(\*|postgres) =", "odoo =", path.read_text()))


@pytest.mark.parametrize(
    "options, variables, said",
    [
        ({"db_password": WRONG_PASSWORD}, {}, "SASL authentication failed|password authentication failed"),
        ({"db_sslmode": "require"}, {}, "does not support SSL"),
        ({"db_sslmode": "prefer"}, {"PGSSLMODE": "require"}, "does not support SSL"),
        ({"db_host": "elsewhere.invalid"}, {}, "elsewhere.invalid:.* known"),
        ({}, {"PGGEQO": "off"}, "unsupported startup parameter"),
    ],
    ids=["password", "TLS not offered", "TLS by PGSSLMODE", "unknown host", "startup parameter"],
)
def test_a_wrong_ordinary_way_is_told(run, server, pooler, options, variables, said):
    direct = to(server, PASSWORD=PASSWORD, USER=USER, SSLMODE="prefer")
    output = run(odoo(pooler, **options), {**direct, **variables}, code=1)
    (error,) = lines(output, "ERROR")
    assert re.search("^ordinary: .*(%s)" % said, error)
    # There is nothing to compare it with.
    assert [found[0] for found in rows(output, "direct")] == ["server"]
    assert [found[-1] for found in rows(output, "direct")] == ["?"]


def test_without_settings_the_same_trouble_is_told_once(run, pooler):
    output = run(odoo(pooler, db_password=WRONG_PASSWORD), code=1)
    assert len(lines(output, "ERROR")) == 1
    assert not rows(output, "direct")


def test_a_pooler_without_the_database_postgres_is_told(run, server):
    with OneDatabase(server) as pooler:
        (error,) = lines(run(odoo(pooler), to(server), code=1), "ERROR")
    assert re.search("^ordinary: .*no such database", error)


def test_a_pooler_without_a_server_is_told(run, server):
    with PgBouncer(server, settings={"query_wait_timeout": 2}) as pooler:
        pooler.server = Nowhere()
        pooler.reload()
        (error,) = lines(run(odoo(pooler), to(server), code=1), "ERROR")
    assert error.startswith("ordinary: ")


class Nowhere:
    host, port = "127.0.0.1", 1


def test_a_pooler_in_front_of_a_standby_is_told(run, server, standby):
    with PgBouncer(standby) as pooler:
        (error,) = lines(run(odoo(pooler), to(server), code=1), "ERROR")
    assert re.search("^ordinary: .*" + IS_STANDBY, error)


def test_what_the_terminal_has_no_signs_for_is_escaped(run, server, pooler):
    variables = dict(to(server, DBNAME="straße"), PYTHONIOENCODING="ascii")
    errors = lines(run(odoo(pooler), variables, code=1), "ERROR")
    assert len(errors) == 2
    assert all(r'"stra\xdfe" does not exist' in error for error in errors)


# Options and odoo.conf


def test_what_can_not_be_read_is_told_without_secrets(run, tmp_path):
    missing = "%s:-: No such file" % (tmp_path / "missing.conf")
    assert missing in run({}, None, "-c", str(tmp_path / "missing.conf"), code=2)
    conf = tmp_path / "odoo.conf"
    assert "%s:2: " % conf in run("[options]\ndb_password %s\n" % PASSWORD, code=2)
    assert "%s:1: " % conf in run("db_password = %s\n" % PASSWORD, code=2)
    assert "%s:3: " % conf in run("[options]\ndb_password = x\ndb_password = %s\n" % PASSWORD, code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-w", PASSWORD],
        ["-w%s" % PASSWORD],
        ["--db_password", PASSWORD],
        ["--db_password=%s" % PASSWORD],
        ["--db_pasword=%s" % PASSWORD],
        ["--%s" % PASSWORD],
        ["postgresql://odoo:%s@db-01/x" % PASSWORD],
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_shown(run, arguments):
    assert "set PGPASSWORD" in run({}, None, *arguments, code=2)


def test_a_python_without_psycopg2_is_told(run):
    assert "psycopg2 is missing" in run({}, python=(sys.executable, "-S", CHECK), code=2)


@pytest.mark.parametrize(
    "option, variable, value",
    [
        ("db_host", "PGHOST", "elsewhere"),
        ("db_port", "PGPORT", "5433"),
        ("db_user", "PGUSER", "somebody"),
        ("db_password", "PGPASSWORD", WRONG_PASSWORD),
        ("db_sslmode", "PGSSLMODE", "require"),
    ],
)
def test_where_odoo_conf_and_libpqs_variable_differ_somebody_has_to_decide(run, pooler, option, variable, value):
    output = run(odoo(pooler, db_sslmode="disable"), {variable: value}, code=2)
    (line,) = output.splitlines()
    assert line.startswith("%s and %s of odoo.conf differ" % (variable, option))


def test_the_command_line_decides(run, server, pooler):
    elsewhere = odoo(pooler, db_host="elsewhere.invalid")
    output = run(elsewhere, dict(to(server), PGHOST="nowhere.invalid"), "--db_host", pooler.host)
    assert kind(output, "ordinary") == "pooler"


def test_what_does_not_differ_is_no_conflict(run, server, pooler):
    alone = {"PGHOST": pooler.host, "PGPORT": str(pooler.port), "PGUSER": USER, "PGPASSWORD": PASSWORD}
    for conf in (odoo(pooler), {"db_host": "False", "db_port": "False"}):
        output = run(conf, {**to(server), **alone})
        assert kind(output, "ordinary") == "pooler"
        assert "  %s:%s\n" % (pooler.host, pooler.port) in output


def test_a_password_of_pgpass_is_found(run, tmp_path, server, pooler):
    pgpass = tmp_path / ".pgpass"
    pgpass.write_text("*:*:*:%s:%s\n" % (USER, PASSWORD))
    pgpass.chmod(0o600)
    conf = odoo(pooler)
    del conf["db_password"]
    # Old releases of libpq don't go by HOME.
    run(conf, dict(to(server), PGPASSFILE=str(pgpass)))


def test_odoo_conf_is_where_odoo_looks_for_it(run, tmp_path, server, pooler):
    """In the home folder or where a variable says; or there is none, and the environment is enough."""
    variables = {**to(server), "PGHOST": pooler.host, "PGUSER": USER, "PGPASSWORD": PASSWORD}
    home, given = tmp_path / ".odoorc", tmp_path / "given.conf"
    for path, more in (None, {}), (home, {}), (given, {"OPENERP_SERVER": str(given)}), (given, {"ODOO_RC": str(given)}):
        if path:
            path.write_text("[options]\ndb_port = %d\n" % pooler.port)
        arguments = [] if path else ["--db_port", str(pooler.port)]
        assert run(None, {**variables, **more}, *arguments).startswith("odoo.conf: %s\n" % (path or "none"))

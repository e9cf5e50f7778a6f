"""The check before going live, on right and wrong settings; on real servers, and without Odoo."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from bus_alt_connection.listener import digestible
from stack import ports
from stack.pgbouncer import PgBouncer
from stack.postgres import PASSWORD, USER, NewCluster, PostgreSQL
from stack.proxy import black_hole
from stack.stack import ADDON
from stack.waiting import wait_until
from tests.support.certificates import make_authority, make_certificate

CHECK = ADDON / "bus_alt_connection" / "check.py"
WRONG_PASSWORD = "zulu'yankee=xray whiskey"
FOREIGN = re.compile("PG|IMDISPATCHER_|ODOO_|OPENERP_|HOME$|PYTHON")

# For what the server's default pg_hba.conf does not do: by the names of roles.
HBA = """
host    all rejected all reject
hostssl all tlsonly  all scram-sha-256
host    all tlsonly  all reject
host    all all      all scram-sha-256
host    replication all all scram-sha-256
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="module")
def server(authority, tmp_path_factory):
    """A PostgreSQL with a certificate for localhost."""
    with PostgreSQL() as server:
        for path in make_certificate(tmp_path_factory.mktemp("server"), authority, "localhost"):
            owner = ["-o", server.run_as] if server.run_as else []
            subprocess.run(["install", "-m", "600", *owner, path, server.data / path.name], check=True)
        (server.data / "pg_hba.conf").write_text(HBA)
        server.settings.update(ssl="on", ssl_cert_file="server.crt", ssl_key_file="server.key")
        server.reload()
        for role in ("rejected", "tlsonly", "crowded"):
            server.execute("CREATE ROLE %s LOGIN PASSWORD '%s'" % (role, PASSWORD))
        server.execute("ALTER ROLE crowded CONNECTION LIMIT 0")
        server.execute("CREATE DATABASE closed")
        server.execute("REVOKE CONNECT ON DATABASE closed FROM PUBLIC")
        yield server


@pytest.fixture(scope="module")
def other_server():
    """A PostgreSQL of another cluster, without TLS."""
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
    """Return a function that runs the check: ``run(conf, variables, *arguments)``."""

    def run(conf, variables=None, *arguments, code=0, python=(sys.executable,)):
        path = tmp_path / "odoo.conf"
        if isinstance(conf, dict):
            conf = "[options]\n" + "".join("%s = %s\n" % item for item in conf.items())
        path.write_text(conf)
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        done = subprocess.run(
            [*python, *([CHECK] if len(python) < 3 else []), "-c", path, *arguments],
            env={**kept, "HOME": str(tmp_path), **(variables or {})},
            cwd=ADDON if len(python) > 2 else tmp_path,
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


def row(output, way):
    """Return the row of the table, without its address."""
    return re.search(r"^%s +(.+?) +\S+$" % way, output, re.MULTILINE)[1].split()


def lines(output, word):
    return re.findall("^%s: (.*)" % word, output, re.MULTILINE)


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
    assert row(output, "ordinary") == ["pooler", version, "primary", "same", "no"]
    assert row(output, "direct")[:-1] == ["server", version, "primary", "same"]
    assert row(output, "direct")[-1].startswith("TLSv1.")
    for channel in ("imbus", "cron_trigger"):
        assert float(re.search(r"NOTIFY %s +heard after ([\d.]+) ms" % channel, output)[1]) > 0
    assert not lines(output, "ERROR") + lines(output, "WARNING")
    assert output.splitlines()[-1] == "OK: listeners hear what Odoo sends"
    table = output.splitlines()[1:]
    assert max(map(len, table)) < 80


@contextlib.contextmanager
def overheard(server):
    """Yield a list that has, when the context is left, what every Odoo of the cluster has heard meanwhile."""
    heard = []
    with contextlib.closing(server.connect()) as foreign:
        foreign.autocommit = True
        foreign.cursor().execute("LISTEN imbus; LISTEN cron_trigger; LISTEN the_end")
        yield heard
        # All come in the order in which they were sent.
        server.execute("NOTIFY the_end")

        def ended():
            foreign.poll()
            return foreign.notifies and foreign.notifies[-1].channel == "the_end"

        wait_until(ended, 10, "the last notification")
        heard += foreign.notifies[:-1]


def test_others_hear_two_notifications_that_mean_nothing_to_them(run, server, pooler):
    with overheard(server) as heard:
        run(odoo(pooler), to(server))
    bus, cron = heard
    assert (bus.channel, cron.channel) == ("imbus", "cron_trigger")
    assert digestible(bus.payload)
    ((name, *_),) = json.loads(bus.payload)
    databases = [found.datname for found in server.execute("SELECT datname FROM pg_database")]
    assert name not in databases
    assert cron.payload not in databases


def test_nobody_is_woken_if_the_listeners_would_not_hear_it(run, server, pooler, other_server):
    mark = server.log_mark()
    with overheard(server) as heard:
        run(odoo(pooler), to(other_server), code=1)
        run(odoo(pooler), to(pooler), code=1)
    assert not heard
    # Nor is a LISTEN left behind in the pooler.
    listens = re.findall("statement: LISTEN (.*)", server.log_since(mark))
    assert listens == ["imbus; LISTEN cron_trigger; LISTEN the_end"]


def test_the_function_that_odoo_notifies_with_is_used(run, server, pooler):
    output = run(odoo(pooler), dict(to(server), ODOO_NOTIFY_FUNCTION="no_such_function"), code=1)
    assert "function no_such_function(unknown, unknown) does not exist" in lines(output, "ERROR")[0]


def test_without_a_pooler_the_addon_is_not_needed(run, server):
    output = run(odoo(server))
    assert output.splitlines()[-1] == "OK; but Odoo uses no pooler, so it needs no addon to listen"


def test_a_pooler_that_keeps_sessions_is_told(run, server):
    with PgBouncer(server, settings={"pool_mode": "session"}) as pooler:
        for variables in (to(server), {}):
            last = run(odoo(pooler), variables).splitlines()[-1]
            assert last == "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"


def test_a_pooler_with_one_server_connection_is_enough_to_tell(run, server):
    with PgBouncer(server, settings={"reserve_pool_size": 0}, databases={"postgres": "pool_size=1"}) as pooler:
        assert run(odoo(pooler), to(server)).splitlines()[-1] == "OK: listeners hear what Odoo sends"
        assert "where LISTEN is lost" in lines(run(odoo(pooler), {}, code=1), "ERROR")[0]


def test_a_busy_pooler_is_not_taken_for_one_that_keeps_sessions(run, pooler):
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
        assert "where LISTEN is lost" in lines(run(odoo(pooler), code=1), "ERROR")[0]
    finally:
        busy.clear()
        for sender in senders:
            sender.join()


def test_a_standby_in_the_list_is_passed_over_and_named(run, server, pooler, standby):
    variables = to(server)
    for name, first in (("HOST", standby.host), ("PORT", standby.port)):
        variables["IMDISPATCHER_DB_" + name] = "%s,%s" % (first, variables["IMDISPATCHER_DB_" + name])
    output = run(odoo(pooler), variables)
    rows = re.findall(r"^direct +server +\S+ +(\w+) +(\w+(?: \w+)?) ", output, re.MULTILINE)
    assert rows == [("standby", "a copy"), ("primary", "same")]
    (warning,) = lines(output, "WARNING")
    assert warning.startswith("direct: %s:%s is a standby" % (standby.host, standby.port))
    assert warning.endswith("; passed over")


def test_both_spellings_that_differ_are_a_warning(run, server, pooler):
    output = run(odoo(pooler), dict(to(server), ODOO_IMDISPATCHER_DB_HOST="elsewhere"))
    (warning,) = lines(output, "WARNING")
    assert "IMDISPATCHER_DB_HOST and ODOO_IMDISPATCHER_DB_HOST are both set and differ" in warning


# What is wrong: how it is made, what is said, and what is to be done


def nothing_listens(servers):
    # Released at once, so somebody else could take it; but nobody who speaks PostgreSQL's protocol.
    port = ports.take_port()
    ports.release_port(port)
    return dict(to(servers.server), IMDISPATCHER_DB_PORT=str(port))


DIRECT = {
    "refused": (nothing_listens, "Connection refused => correct IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT"),
    "unknown host": (
        lambda servers: {"IMDISPATCHER_DB_HOST": "elsewhere.invalid"},
        "could not translate host name .* => correct IMDISPATCHER_DB_HOST, or the DNS",
    ),
    "password": (
        lambda servers: to(servers.server, PASSWORD=WRONG_PASSWORD),
        'password authentication failed for user "odoo".* => correct IMDISPATCHER_DB_USER and IMDISPATCHER_DB_PASSWORD',
    ),
    "role": (
        lambda servers: to(servers.server, USER="nobody"),
        'password authentication failed for user "nobody".* => correct IMDISPATCHER_DB_USER',
    ),
    "pg_hba.conf": (
        lambda servers: to(servers.server, USER="rejected"),
        'pg_hba.conf rejects connection .*user "rejected".* => add a line',
    ),
    "TLS wanted": (
        lambda servers: to(servers.server, USER="tlsonly", SSLMODE="disable"),
        "pg_hba.conf rejects .*no encryption => set IMDISPATCHER_DB_SSLMODE to require",
    ),
    "TLS not offered": (
        lambda servers: to(servers.other_server, SSLMODE="require"),
        "does not support SSL.* => set IMDISPATCHER_DB_SSLMODE to prefer, or switch TLS on",
    ),
    "authority unknown": (
        lambda servers: to(servers.server, SSLMODE="verify-ca", SSLROOTCERT=servers.another_authority),
        "certificate verify failed => set IMDISPATCHER_DB_SSLROOTCERT",
    ),
    "authority missing": (
        lambda servers: to(servers.server, SSLMODE="verify-ca"),
        "root certificate file .* does not exist.* => set IMDISPATCHER_DB_SSLROOTCERT",
    ),
    "certificate's name": (
        lambda servers: to(servers.server, SSLMODE="verify-full", SSLROOTCERT=servers.authority),
        'does not match host name "127.0.0.1" => set IMDISPATCHER_DB_HOST to the name',
    ),
    "pooler": (
        lambda servers: to(servers.pooler),
        "is a pooler, where LISTEN is lost => set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to PostgreSQL",
    ),
    "nothing set": (
        lambda servers: {},
        "neither option is set, and .* is a pooler, where LISTEN is lost => set IMDISPATCHER_DB_HOST",
    ),
    "other cluster": (
        lambda servers: to(servers.other_server),
        "is another, not the server that Odoo sends to => set IMDISPATCHER_DB_HOST",
    ),
    "copied cluster": (
        lambda servers: to(servers.copied_server),
        "is a copy, not the server that Odoo sends to => set IMDISPATCHER_DB_HOST",
    ),
    "standby": (
        lambda servers: to(servers.standby),
        "is a standby, and only a primary takes LISTEN .*=> set IMDISPATCHER_DB_HOST to the primary, or to all hosts",
    ),
    "standby, told by libpq": (
        lambda servers: to(servers.standby, TARGET_SESSION_ATTRS="read-write"),
        "=> set IMDISPATCHER_DB_HOST to the primary, or to all hosts",
    ),
    "database": (
        lambda servers: to(servers.server, DBNAME="template1"),
        "listens on the database template1, but Odoo sends on postgres => unset IMDISPATCHER_DB_DBNAME",
    ),
    "no such database": (
        lambda servers: to(servers.server, DBNAME="nowhere"),
        'database "nowhere" does not exist => .*: unset IMDISPATCHER_DB_DBNAME',
    ),
    "closed database": (
        lambda servers: to(servers.server, DBNAME="closed"),
        'permission denied for database "closed".* => GRANT CONNECT',
    ),
    "too many": (
        lambda servers: to(servers.server, USER="crowded"),
        'too many connections for role "crowded" => raise',
    ),
    "misspelt": (
        lambda servers: dict(to(servers.server), IMDISPATCHER_DB_PASWORD=WRONG_PASSWORD),
        r"IMDISPATCHER_DB_PASWORD=\*\*\* is not an option and is left out. Did you mean IMDISPATCHER_DB_PASSWORD\?",
    ),
}


class Servers:
    """What the cases above choose from, started when it is first asked for."""

    def __init__(self, request, folder):
        self._request = request
        self._folder = folder

    def __getattr__(self, name):
        if name == "another_authority":
            return str(make_authority(self._folder, "another")[0])
        value = self._request.getfixturevalue(name)
        return str(value[0]) if name == "authority" else value


@pytest.mark.parametrize("case", DIRECT)
def test_a_wrong_direct_way_is_told_with_what_to_do(run, request, tmp_path, pooler, case):
    variables, said = DIRECT[case]
    output = run(odoo(pooler), variables(Servers(request, tmp_path)), code=1)
    (error,) = lines(output, "ERROR")
    assert re.search(said, error)
    assert row(output, "ordinary")[0] == "pooler"
    assert output.splitlines()[-1] == "NOT OK: 1 error(s)"


def test_a_silent_path_is_told_in_time(run, pooler):
    with black_hole() as (host, port):
        variables = {"HOST": host, "PORT": str(port), "CONNECT_TIMEOUT": "1"}
        variables = {"IMDISPATCHER_DB_" + name: value for name, value in variables.items()}
        (error,) = lines(run(odoo(pooler), variables, code=1), "ERROR")
    assert re.search("no answer in 1 s => correct IMDISPATCHER_DB_HOST .*look for a firewall", error)


def test_what_is_sent_and_does_not_arrive_is_told(run, server, pooler):
    # Of a pooler that takes no transactions there is no telling beforehand.
    with PgBouncer(server, settings={"pool_mode": "statement"}) as deaf, overheard(server) as heard:
        (error,) = lines(run(odoo(pooler), to(deaf), code=1), "ERROR")
    assert re.search("^direct: nothing comes from .* in 5 s, the path is silent => look for", error)
    assert not heard


class OneDatabase(PgBouncer):
    """A pooler that has forgotten all databases but Odoo's own, as many do."""

    def _write_configuration(self):
        super()._write_configuration()
        path = self.folder / "pgbouncer.ini"
        path.write_text(re.sub(r"(?m)^(\*|postgres) =", "odoo =", path.read_text()))


@pytest.mark.parametrize(
    "options, variables, said",
    [
        ({"db_password": WRONG_PASSWORD}, {}, "=> correct db_user and db_password, or what the pooler's auth_file has"),
        ({"db_user": "nobody"}, {}, "=> correct db_user and db_password, or what the pooler's auth_file has"),
        ({"db_sslmode": "require"}, {}, "does not support SSL.* => set db_sslmode to prefer"),
        ({"db_host": "elsewhere.invalid"}, {}, "could not translate .*=> correct db_host, or the DNS"),
        (
            {},
            {"PGOPTIONS": "-c geqo=off"},
            "unsupported startup parameter.* => add it to ignore_startup_parameters in pgbouncer.ini",
        ),
    ],
    ids=["password", "user", "TLS not offered", "unknown host", "startup parameter"],
)
def test_a_wrong_ordinary_way_is_told_with_what_to_do(run, server, pooler, options, variables, said):
    output = run(
        odoo(pooler, **options), dict(to(server, PASSWORD=PASSWORD, USER=USER, SSLMODE="prefer"), **variables), code=1
    )
    (error,) = lines(output, "ERROR")
    assert re.search("^ordinary: .*" + said, error)
    assert row(output, "direct")[0] == "server"


def test_a_pooler_without_the_database_postgres_is_told(run, server):
    with OneDatabase(server) as pooler:
        (error,) = lines(run(odoo(pooler), to(server), code=1), "ERROR")
    assert re.search("no such database.* => add 'postgres = host=...' or .* to .databases. in pgbouncer.ini", error)


def test_a_pooler_without_a_server_is_told(run, server):
    with PgBouncer(server, settings={"query_wait_timeout": 2}) as pooler:
        pooler.server = Nowhere()
        pooler.reload()
        (error,) = lines(run(odoo(pooler), to(server), code=1), "ERROR")
    assert re.search("^ordinary: .* => .*the pooler gets no connection to PostgreSQL: see its log", error)


class Nowhere:
    host, port = "127.0.0.1", 1


def test_a_pooler_in_front_of_a_standby_is_told(run, server, standby):
    with PgBouncer(standby) as pooler:
        output = run(odoo(pooler), to(server), code=1)
    (error,) = lines(output, "ERROR")
    assert re.search("^ordinary: .* is a standby.* => set db_host to the primary", error)


# Options and odoo.conf


def test_what_can_not_be_read_is_told_without_secrets(run, tmp_path):
    assert "No such file" in run({}, None, "-c", str(tmp_path / "missing.conf"), code=2)
    assert "No such file" in run({}, {"ODOO_RC": "/missing.conf"}, "-c", "", code=2)
    assert "has no section [options]" in run("[queue_job]\nchannels = root:1\n", code=2)
    assert "because of line 2" in run("[options]\ndb_password %s\n" % PASSWORD, code=2)
    assert "because of line 1" in run("db_password = %s\n" % PASSWORD, code=2)
    assert "others can see a password here" in run({}, None, "-w", PASSWORD, code=2)
    assert "no option --db_pasword" in run({}, None, "--db_pasword=%s" % PASSWORD, code=2)
    assert "no option" in run({}, None, "postgresql://odoo:%s@db-01/x" % PASSWORD, code=2)
    assert "invalid choice: 'yes'" in run({}, None, "--db_sslmode", "yes", code=2)
    assert "psycopg2 is missing" in run({}, python=(sys.executable, "-S"), code=2)


def test_variables_that_odoo_reads_since_19_count_there(run, server, pooler):
    elsewhere = odoo(pooler, db_host="elsewhere.invalid")
    variables = dict(to(server), PGHOST=pooler.host)
    output = run(elsewhere, variables, code=2)
    assert "PGHOST in the environment and db_host in odoo.conf differ" in output
    assert "--odoo 19.0" in output
    assert row(run(elsewhere, variables, "--odoo", "19.0"), "ordinary")[0] == "pooler"
    assert "elsewhere.invalid" in lines(run(elsewhere, variables, "--odoo", "18.0", code=1), "ERROR")[0]
    # Of one alone there is no doubt, in any series.
    alone = {"PGHOST": pooler.host, "PGPORT": str(pooler.port), "PGUSER": USER, "PGPASSWORD": PASSWORD}
    output = run({"db_host": "False", "db_port": "False"}, {**to(server), **alone})
    assert row(output, "ordinary")[0] == "pooler"
    assert "  %s:%s\n" % (pooler.host, pooler.port) in output


def test_a_password_of_pgpass_is_found(run, tmp_path, server, pooler):
    pgpass = tmp_path / ".pgpass"
    pgpass.write_text("*:*:*:%s:%s\n" % (USER, PASSWORD))
    pgpass.chmod(0o600)
    conf = odoo(pooler)
    del conf["db_password"]
    # Old releases of libpq don't go by HOME.
    run(conf, dict(to(server), PGPASSFILE=str(pgpass)))


def test_without_odoo_conf_the_environment_is_enough(run, tmp_path, server, pooler):
    variables = {"PGHOST": pooler.host, "PGPORT": str(pooler.port), "PGUSER": USER, "PGPASSWORD": PASSWORD}
    output = run({}, {**to(server), **variables}, "-c", "")
    assert output.startswith("odoo.conf: none\n")

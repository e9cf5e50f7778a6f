"""A private PostgreSQL server."""

import contextlib
import os
import re
import shutil
import signal
import subprocess

import psycopg2
from psycopg2.extras import NamedTupleCursor

from .archive import archived, unpack
from .commands import run
from .process import Process, identity, server_user
from .servers import postgres_programs

SUPERUSER = "postgres"
SUPERUSER_PASSWORD = "postgres-s3cret"
USER = "odoo"
# Easy to find, so that tests can see that it turns up in no log.
PASSWORD = "odoo-s3cret"

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": 200,
    # Without fsync only a crash of the machine loses data, not one of the server.
    "fsync": "off",
    "password_encryption": "scram-sha-256",
    "log_statement": "all",
    "log_line_prefix": "%m [%p] %r %a %d ",
    "lc_messages": "C",
}


def version(programs=None):
    """Return the major version of the PostgreSQL in ``programs``, as text; default: the one that is chosen."""
    return re.match(r"\d+", full_version(programs))[0]


def full_version(programs=None):
    """Return the version with all that the distribution has to say of it."""
    return run([(programs or postgres_programs()) / "postgres", "-V"]).split(" ", 2)[2].strip()


def libpq_parameters(place, dbname="postgres"):
    """Return the libpq keywords by which Odoo's role connects to ``place``, a server or what stands in front of one."""
    return {"host": place.host, "port": place.port, "user": USER, "password": PASSWORD, "dbname": dbname}


def execute(connection, query, params=None):
    """Run ``query`` outside of a transaction, and close the connection; return the rows, if it has any."""
    with contextlib.closing(connection):
        connection.autocommit = True
        with connection.cursor() as cr:
            cr.execute(query, params)
            return cr.fetchall() if cr.description else None


class Server(Process):
    """What can be connected to as to PostgreSQL, on its own port of 127.0.0.1."""

    def __init__(self, user=USER, password=PASSWORD):
        super().__init__(run_as=server_user())
        self.host = "127.0.0.1"
        self.port = self.take_port()
        # of Odoo
        self.user = user
        self.password = password

    def is_up(self):
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def connect(self, dbname="postgres", user=None, password=None, **parameters):
        """Return a new psycopg2 connection, by default as Odoo's role."""
        place = {"host": self.host, "port": self.port, "dbname": dbname}
        login = {"user": user or self.user, "password": password or self.password}
        return psycopg2.connect(**place, **login, **parameters)


class PostgreSQL(Server):
    """A PostgreSQL cluster of its own, on its own port of 127.0.0.1.

    It has the superuser ``postgres`` and the role ``odoo``, which may log in and create databases.

    :param settings: additions to ``postgresql.conf``, by name; changes of the attribute count from the next
        :meth:`start` or :meth:`reload` on
    :param archive: tar file with the data folder to start from; default: an empty cluster
    :param programs: folder with its programs, such as :func:`~.servers.postgres_programs` returns
    """

    name = "postgresql"
    # For a fast shutdown.
    stop_signal = signal.SIGINT

    def __init__(self, settings=None, archive=None, programs=None):
        super().__init__()
        self.settings = dict(settings or {})
        self.data = self.folder / "data"
        self.programs = programs or postgres_programs()
        self._archive = archive

    def command(self):
        return [self.programs / "postgres", "-D", self.data]

    def prepare(self):
        if not self.data.exists():
            self._make_folder()
            unpack(self._archive or _empty_cluster(self.programs), self.data, self.run_as)
        self._write_settings()

    def reload(self):
        """Have the server read :attr:`settings` again."""
        self._write_settings()
        self.execute("SELECT pg_reload_conf()")

    def connect(self, dbname="postgres", user=SUPERUSER, password=SUPERUSER_PASSWORD, **parameters):
        """Return a new psycopg2 connection, by default as superuser."""
        return super().connect(dbname, user, password, **parameters)

    def execute(self, query, params=None, dbname="postgres"):
        """Run ``query`` as superuser, outside of a transaction; return its rows, named tuples, if it has any."""
        connection = self.connect(dbname, application_name="tests", cursor_factory=NamedTupleCursor)
        return execute(connection, query, params)

    def value(self, query, params=None, dbname="postgres"):
        """Return the first value of the first row of :meth:`execute`."""
        return self.execute(query, params, dbname)[0][0]

    def activity(self):
        """Return the rows of ``pg_stat_activity`` for all clients but the one that asks."""
        return self.execute(
            "SELECT * FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def standby(self):
        """Return a streaming replica of this running server: a PostgreSQL not started yet."""
        replica = PostgreSQL(self.settings, programs=self.programs)
        replica._make_folder()
        place = ["--host=%s" % self.host, "--port=%s" % self.port, "--username=%s" % SUPERUSER, "--no-password"]
        options = ["--wal-method=stream", "--checkpoint=fast", "--write-recovery-conf"]
        subprocess.run(
            [self.programs / "pg_basebackup", "--pgdata=%s" % replica.data, *place, *options],
            check=True,
            env={**os.environ, "PGPASSWORD": SUPERUSER_PASSWORD},
            **identity(replica.run_as),
        )
        return replica

    def _make_folder(self):
        subprocess.run(["mkdir", "-m", "700", self.data], check=True, **identity(self.run_as))

    def _write_settings(self):
        settings = {**_SETTINGS, "port": self.port, "unix_socket_directories": self.folder, **self.settings}
        lines = ["%s = '%s'\n" % (name, str(value).replace("'", "''")) for name, value in settings.items()]
        (self.data / "postgresql.conf").write_text("".join(lines))


def _empty_cluster(programs):
    return archived("postgresql-%s" % version(programs), lambda: _new_cluster(programs))["cluster"]


@contextlib.contextmanager
def _new_cluster(programs):
    """Make the cluster that all others are copies of."""
    with contextlib.closing(PostgreSQL(programs=programs)) as server:
        password = server.folder / "password"
        password.write_text(SUPERUSER_PASSWORD)
        if server.run_as:
            shutil.chown(password, server.run_as)
        superuser = ["--username=%s" % SUPERUSER, "--pwfile=%s" % password, "--auth=scram-sha-256"]
        options = ["--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [programs / "initdb", "--pgdata=%s" % server.data, *superuser, *options],
            check=True,
            stdout=subprocess.DEVNULL,
            **identity(server.run_as),
        )
        server.start()
        server.execute("CREATE ROLE %s LOGIN CREATEDB PASSWORD %%s" % USER, (PASSWORD,))
        server.stop()
        yield {"cluster": server.data}

"""A private PgBouncer in front of a PostgreSQL server."""

import signal
from pathlib import Path

import psycopg2
from psycopg2.extras import RealDictCursor

from . import postgres
from .poolers import Pooler

ADMIN = "pgbouncer"
ADMIN_PASSWORD = "pgbouncer-s3cret"

#: What we tell users to begin with. Its last section is ``[pgbouncer]``.
EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "pgbouncer.ini"
#: what it says of where PostgreSQL is
EXAMPLE_SERVER = "host=db-01 port=5432"

_SETTINGS = {
    "listen_addr": "127.0.0.1",
    # After an outage of the server the pooler would be the slowest to come back.
    "server_login_retry": 0.2,
}


class PgBouncer(Pooler):
    """A PgBouncer on its own port of 127.0.0.1, with one pool per database of ``server``, set up as :data:`EXAMPLE`.

    :param server: the PostgreSQL it logs in to
    :param user: name under which clients log in as the server's role ``odoo``
    :param password: their password. Where user or password differ from the server's, every client works as ``odoo``
        there, the superuser included
    :param settings: additions to the section ``[pgbouncer]``, by name
    :param databases: additions to the line of a database, by its name: ``{"postgres": "pool_mode=session"}``; None:
        without the line that the example has, as in ``{"*": None}``

    Changes of the attributes count from the next :meth:`start` on.
    """

    name = package = "pgbouncer"
    # At once, clients or not. Up to 1.22 the default action of this signal, since then its meaning; that of SIGTERM
    # has changed.
    stop_signal = signal.SIGQUIT

    def __init__(self, server, user=postgres.USER, password=postgres.PASSWORD, settings=None, databases=None):
        super().__init__(server, user, password, settings)
        self.databases = dict(databases or {})

    def command(self):
        return [self.program(), self.folder / "pgbouncer.ini"]

    def prepare(self):
        server = "host=%s port=%s" % (self.server.host, self.server.port)
        if (self.user, self.password) != (postgres.USER, postgres.PASSWORD):
            server += " user=%s password=%s" % (postgres.USER, postgres.PASSWORD)
        lines = EXAMPLE.read_text().replace(EXAMPLE_SERVER, server).splitlines()
        lines = [line for line in lines if self.databases.get(line.partition(" = ")[0], "") is not None]
        # Of two lines with one name the later counts. But a second [pgbouncer] would begin with the defaults again.
        settings = {
            **_SETTINGS,
            "listen_port": self.port,
            "unix_socket_dir": self.folder,
            "auth_file": self.folder / "users",
            **self.settings,
        }
        lines += ["%s = %s" % item for item in settings.items()]
        if self.databases:
            lines.append("[databases]")
            lines += ["%s = %s %s" % (name, server, more) for name, more in self.databases.items() if more is not None]
        # In plain text, with which the pooler can log in to the server as well.
        users = {
            self.user: self.password,
            postgres.SUPERUSER: postgres.SUPERUSER_PASSWORD,
            ADMIN: ADMIN_PASSWORD,
        }
        self._write("users", ['"%s" "%s"' % item for item in users.items()])
        self._write("pgbouncer.ini", lines)

    def is_up(self):
        try:
            self.show("version")
        except psycopg2.OperationalError:
            return False
        return True

    # Admin console

    def admin(self, command):
        """Run a command of the admin console; return its rows as dicts, if it has any."""
        connection = self.connect("pgbouncer", ADMIN, ADMIN_PASSWORD, cursor_factory=RealDictCursor)
        return postgres.execute(connection, command)

    def show(self, what):
        """Return the rows of ``SHOW <what>`` as dicts: ``servers``, ``clients``, ``pools``, ``config`` ..."""
        return self.admin("SHOW %s" % what)

    def server_ports(self):
        """Return the set of the local ports of the connections to PostgreSQL.

        A backend whose ``pg_stat_activity.client_port`` is among them serves the pooler; any other is direct.
        """
        return {row["local_port"] for row in self.show("servers")}

    def _write(self, name, lines):
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o644)  # for the server's user; the folder keeps all others out

"""What stands in front of a PostgreSQL server: what poolers have in common, and others than PgBouncer.

Not every Debian has these: 12 has pgpool-II, sid has Odyssey too. What is known of them is in ``docs/poolers.rst``.
"""

import psycopg2

from . import ports
from .postgres import PASSWORD, USER
from .process import Process, server_user
from .servers import program


class Pooler(Process):
    """A pooler on its own port of 127.0.0.1, by which all databases of ``server`` are reached.

    :param server: the PostgreSQL it logs in to
    :param user: name under which clients log in
    :param password: their password
    :param settings: additions to its configuration, by name
    """

    def __init__(self, server, user=USER, password=PASSWORD, settings=None):
        super().__init__(run_as=server_user())
        self.host = "127.0.0.1"
        self.port = ports.take_port()
        self.server = server
        self.user = user
        self.password = password
        self.settings = dict(settings or {})

    def is_up(self):
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def close(self):
        super().close()
        ports.release_port(self.port)

    def connect(self, dbname="postgres", user=None, password=None, **parameters):
        """Return a new psycopg2 connection through the pooler, by default as Odoo's role."""
        return psycopg2.connect(
            host=self.host,
            port=self.port,
            dbname=dbname,
            user=user or self.user,
            password=password or self.password,
            **parameters,
        )


class Odyssey(Pooler):
    """An Odyssey in transaction mode, for Odoo's role only."""

    name = "odyssey"

    # What it writes into the folder "locks_dir" would be in /tmp by default.
    _CONFIGURATION = """\
daemonize no
log_to_stdout yes
log_format "%%p %%t %%l [%%i %%s] (%%c) %%m\\n"
locks_dir "%(folder)s"
workers 1
listen {
    host "%(host)s"
    port %(port)d
}
storage "server" {
    type "remote"
    host "%(server_host)s"
    port %(server_port)d
}
database default {
    user "%(user)s" {
        authentication "scram-sha-256"
        password "%(password)s"
        storage "server"
        pool "transaction"
        pool_size 20
%(settings)s
    }
}
"""

    @staticmethod
    def program():
        """Return the path of the program; raise RuntimeError if it can not be had."""
        return program("odyssey", "odyssey")

    def command(self):
        return [self.program(), self.folder / "odyssey.conf"]

    def prepare(self):
        settings = "\n".join("%s %s" % setting for setting in self.settings.items())
        places = {**vars(self), "server_host": self.server.host, "server_port": self.server.port, "settings": settings}
        (self.folder / "odyssey.conf").write_text(self._CONFIGURATION % places)


class PinningOdyssey(Odyssey):
    """An Odyssey that leaves a server connection to who has said LISTEN on it."""

    def __init__(self, server):
        super().__init__(server, settings={"pool_pin_on_listen": "yes"})


class Pgpool(Pooler):
    """A pgpool-II in front of one server, for Odoo's role only. It keeps connections, but knows no transaction mode."""

    name = "pgpool"

    @staticmethod
    def program():
        """Return the path of the program; raise RuntimeError if it can not be had."""
        return program("pgpool", "pgpool2")

    def command(self):
        files = ["-f", "pgpool.conf", "-a", "pool_hba.conf", "-F", "pcp.conf"]
        return [self.program(), "-n", *files]

    def prepare(self):
        settings = {
            "backend_clustering_mode": "streaming_replication",
            "backend_hostname0": self.server.host,
            "backend_port0": self.server.port,
            "listen_addresses": self.host,
            "port": self.port,
            "pcp_listen_addresses": "",
            "unix_socket_directories": self.folder,
            "pcp_socket_dir": self.folder,
            "pid_file_name": self.folder / "pid",
            "work_dir": self.folder,
            "enable_pool_hba": "on",
            "pool_passwd": "pool_passwd",
            # It asks each server at its start whether it is the primary.
            "sr_check_user": self.user,
            **self.settings,
        }
        files = {
            "pgpool.conf": "".join("%s = '%s'\n" % setting for setting in settings.items()),
            "pool_hba.conf": "host all all 127.0.0.1/32 scram-sha-256\n",
            "pool_passwd": "%s:TEXT%s\n" % (self.user, self.password),
            "pcp.conf": "",
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)

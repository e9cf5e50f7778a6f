"""What stands in front of a PostgreSQL server: what poolers have in common, and others than PgBouncer.

Not every Debian has these: 12 has pgpool-II, sid has Odyssey too. What is known of them is in ``docs/poolers.rst``.
"""

from pathlib import Path

from .postgres import PASSWORD, USER, Server
from .servers import program

# Of the configurations.
_HERE = Path(__file__).parent


class Pooler(Server):
    """A pooler, by which all databases of ``server`` are reached.

    :param server: the PostgreSQL it logs in to
    :param user: name under which clients log in
    :param password: their password
    :param settings: additions to its configuration, by name
    """

    #: the Debian package that has it
    package = None

    def __init__(self, server, user=USER, password=PASSWORD, settings=None):
        super().__init__(user, password)
        self.server = server
        self.settings = dict(settings or {})

    @classmethod
    def program(cls):
        """Return the path of the program; raise RuntimeError if it can not be had."""
        return program(cls.name, cls.package)

    def configuration(self, **more):
        """Return our configuration file for this program, with the places filled in."""
        places = {**vars(self), "server_host": self.server.host, "server_port": self.server.port, **more}
        return (_HERE / (self.name + ".conf")).read_text() % places


class Odyssey(Pooler):
    """An Odyssey in transaction mode, for Odoo's role only."""

    name = package = "odyssey"

    def command(self):
        return [self.program(), self.folder / "odyssey.conf"]

    def prepare(self):
        settings = "\n".join("%s %s" % setting for setting in self.settings.items())
        (self.folder / "odyssey.conf").write_text(self.configuration(settings=settings))


class PinningOdyssey(Odyssey):
    """An Odyssey that leaves a server connection to who has said LISTEN on it."""

    def __init__(self, server):
        super().__init__(server, settings={"pool_pin_on_listen": "yes"})


class Pgpool(Pooler):
    """A pgpool-II in front of one server, for Odoo's role only. It keeps connections, but knows no transaction mode."""

    name, package = "pgpool", "pgpool2"

    def command(self):
        files = ["-f", "pgpool.conf", "-a", "pool_hba.conf", "-F", "pcp.conf"]
        return [self.program(), "-n", *files]

    def prepare(self):
        files = {
            "pgpool.conf": self.configuration(),
            "pool_hba.conf": "host all all 127.0.0.1/32 scram-sha-256\n",
            "pool_passwd": "%s:TEXT%s\n" % (self.user, self.password),
            "pcp.conf": "",
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)

"""PostgreSQL, a pooler and Odoo, put together."""

import contextlib
import copy
import re
from pathlib import Path

from .builds import find_build
from .clients import Client
from .database import DATABASE, odoo_database
from .odoo import Odoo
from .pgbouncer import PgBouncer
from .postgres import PASSWORD, USER, PostgreSQL
from .proxy import Proxy
from .sender import BusSender
from .waiting import wait_until

#: Folder that holds our addon.
ADDON = Path(__file__).resolve().parents[1]

DEFAULT_SERIES = "19.0"


class Stack:
    """A running Odoo with its database, behind PgBouncer in transaction mode.

    :param series: of Odoo
    :param workers: 0: threaded; more: prefork
    :param addon: folder that holds a ``bus_alt_connection``; None: without it
    :param pooler: what Odoo connects to: True: PgBouncer; False: PostgreSQL itself; or a class, such as
        :class:`~.poolers.Odyssey`
    :param direct: whether to tell the addon, by environment variables, how to reach PostgreSQL directly
    :param proxy: whether the direct connections take a path that can be made to fail, a :class:`~.proxy.Proxy`
    :param modules: what is installed in the database, separated by commas
    :param system_database: what Odoo is told to use in place of ``postgres``
    :param jobs: False: its scheduled actions, of which some are due at once, wait for a year
    :param build: what to run, a :class:`~.builds.Build`; default: the one of the series
    :param environment: more environment variables for Odoo; or a function that is given this stack, with ``server``,
        ``proxy`` and ``pooler`` running, and returns them. With a host or a port for the direct connection among them,
        ``direct`` means nothing
    :param server_options: arguments for :class:`~.postgres.PostgreSQL`
    :param pooler_options: arguments for the pooler; of :class:`~.pgbouncer.PgBouncer`, with ``user`` or ``password``
        among them, the credentials for the pooler are other than those for the server
    :param odoo_options: arguments for :class:`~.odoo.Odoo`: ``load``, ``conf`` or ``options``

    While it runs: ``server``, ``proxy`` and ``pooler`` (None without one), ``odoo``, and ``database``, the name of
    Odoo's database.
    """

    def __init__(
        self,
        series=DEFAULT_SERIES,
        workers=0,
        addon=ADDON,
        pooler=True,
        direct=True,
        modules="bus",
        environment=None,
        server_options=None,
        pooler_options=None,
        build=None,
        jobs=True,
        proxy=False,
        system_database="postgres",
        **odoo_options,
    ):
        self.build = build or find_build(series)
        self.series = self.build.series
        self.database = DATABASE
        self.system_database = system_database
        self.server = self.proxy = self.pooler = self.odoo = None
        self._pooler = PgBouncer if pooler is True else pooler
        self._direct = direct
        self._proxy = proxy
        self._modules = modules
        self._jobs = jobs
        self._environment = environment
        self._odoo_options = {"workers": workers, "addon": addon, **odoo_options}
        self._server_options = server_options or {}
        self._pooler_options = pooler_options or {}
        self._exits = None
        self._sender = None

    def __enter__(self):
        with contextlib.ExitStack() as exits:
            archives = odoo_database(self.build, self._modules)
            self.server = exits.enter_context(PostgreSQL(archive=archives["cluster"], **self._server_options))
            if not self._jobs:
                later = "UPDATE ir_cron SET nextcall = now() + interval '1 year'"
                self.server.execute(later, dbname=self.database)
            if self._proxy:
                self.proxy = exits.enter_context(Proxy((self.server.host, self.server.port)))
            if self._pooler:
                self.pooler = exits.enter_context(self._pooler(self.server, **self._pooler_options))
            self.odoo = exits.enter_context(self._new_odoo(self._odoo_environment(), filestore=archives["filestore"]))
            self._sender = exits.enter_context(contextlib.closing(self.sender()))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *exception):
        self._exits.close()

    @contextlib.contextmanager
    def another(self, **variables):
        """Run another Odoo beside the first, with its servers, database and data; yields this stack as that one has it.

        :param variables: of its environment, in addition to those of the first
        """
        with contextlib.ExitStack() as exits:
            other = copy.copy(self)
            other.odoo = self._new_odoo({**self.odoo.variables, **variables})
            other.odoo.conf["data_dir"] = self.odoo.folder / "data"
            other._exits = exits
            with other.odoo:
                yield other

    def _new_odoo(self, environment, **options):
        through = self.pooler or self.server
        return Odoo(self.build, through, self.database, environment=environment, **self._odoo_options, **options)

    def _odoo_environment(self):
        given = dict(self._environment(self) if callable(self._environment) else self._environment or {})
        if self.system_database != "postgres":
            given["IMDISPATCHER_DB_DBNAME"] = self.system_database
        if not self._direct or any(re.fullmatch(r"(ODOO_)?IMDISPATCHER_DB_(HOST|PORT)", name) for name in given):
            return given
        way = self.proxy or self.server
        direct = {"IMDISPATCHER_DB_HOST": way.host, "IMDISPATCHER_DB_PORT": str(way.port)}
        through = self.pooler or self.server
        if through.user != USER:
            direct["IMDISPATCHER_DB_USER"] = USER
        if through.password != PASSWORD:
            direct["IMDISPATCHER_DB_PASSWORD"] = PASSWORD
        return {**direct, **given}

    # Clients and messages

    def client(self, channels=("tests",), listening=True):
        """Return a client, logged in and subscribed; its ``close`` is called at the end of the stack at the latest.

        :param channels: names to subscribe to
        :param listening: wait until Odoo's LISTEN is in force
        """
        client = Client(self.odoo)
        self._exits.callback(client.close)
        client.subscribe(channels, self.last_id())
        if listening:
            self.wait_for_listen()
        return client

    def sender(self, direct=False):
        """Return a new :class:`~.sender.BusSender`, through the pooler unless ``direct``."""
        return BusSender(self, self.server if direct or not self.pooler else self.pooler)

    def send(self, channel, message):
        """Send a message as Odoo does, through the pooler; see :meth:`.BusSender.send`."""
        return self._sender.send(channel, message)

    def last_id(self):
        """Return the id of the last row in bus_bus, 0 if there is none."""
        return self.server.value("SELECT coalesce(max(id), 0) FROM bus_bus", dbname=self.database)

    # Facts

    def wait_for_listen(self, channel="imbus", since=0, deadline=15.0):
        """Wait until a LISTEN has been carried out; return the process id of the backend that did.

        It is found in the log of the server, so ``log_statement`` has to be ``all``, as it is by default.

        :param since: mark in that log, where to begin to look for it
        :raise TimeoutError: there is none within ``deadline`` seconds
        """
        statement = re.compile(r'\[(\d+)\].*[:;]\s*listen\s+"?%s\b' % re.escape(channel), re.IGNORECASE)

        def listener():
            # The log tells that it began; and by the end of its transaction it is done.
            backends = {int(pid) for pid in statement.findall(self.server.log_since(since))}
            idle = (row.pid for row in self.server.activity() if row.pid in backends and row.state == "idle")
            return next(idle, None)

        return wait_until(listener, deadline, "LISTEN %s" % channel, 0.05, self.odoo.log_tail)

    def direct_connections(self):
        """Return those rows of ``pg_stat_activity`` that do not come through the pooler, nor from the tests.

        Of the poolers only PgBouncer tells which are its own.
        """
        # Twice, lest a connection of the pooler's that has just come or gone is taken for a direct one.
        pooled = self._pooled_ports()
        rows = self.server.activity()
        pooled |= self._pooled_ports()
        return [row for row in rows if row.client_port not in pooled and row.application_name != "tests"]

    def _pooled_ports(self):
        return self.pooler.server_ports() if self.pooler else set()

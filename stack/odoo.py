"""A real Odoo server."""

import configparser
import contextlib
import os
import re
from typing import NamedTuple

import psutil
import requests

from .archive import unpack
from .process import Process

# What a worker logs when it starts. Up to 19.1 that is "Worker WorkerCron (123) alive", without a logger of its own.
_STARTED = re.compile(r" (\d+) INFO \S+ odoo\.service\.server(?:: Worker |\.)Worker(HTTP|Cron)(?: \(\d+\) a|: A)live")

# Of the one who runs the tests; they would change what Odoo, libpq or the addon do.
_FOREIGN_VARIABLES = re.compile(r"(PG|ODOO_|IMDISPATCHER_|PYTHON)")

#: of the administrator of all our databases
LOGIN = PASSWORD = "admin"


class Processes(NamedTuple):
    """Process ids of a running Odoo; with ``workers=0`` there is only ``main``."""

    main: int
    http: list
    cron: list
    gevent: int  # or None


class Odoo(Process):
    """An Odoo server that serves one database.

    :param build: what to run, from :mod:`.builds`
    :param database_server: what it connects to: a :class:`~.pgbouncer.PgBouncer` or a :class:`~.postgres.PostgreSQL`
    :param database: name of its database
    :param workers: 0 runs it threaded, more as prefork server with that many HTTP workers and the gevent process
    :param addon: folder that holds the folder ``bus_alt_connection``, None to run without it
    :param load: value for ``--load``; default: that of the series, and ``bus_alt_connection`` if there is an addon
    :param environment: environment variables in addition to those of the caller, of which those that would change
        anything (``PG*``, ``ODOO_*``, ``IMDISPATCHER_*``, ``PYTHON*``) are left out
    :param conf: additions to the section ``[options]`` of ``odoo.conf``, by name; None takes a name out of it; a
        dictionary is a section of its own
    :param options: further arguments of the command line
    :param filestore: tar file with the data folder to start from

    Up to early 15.0 a waiting long poll holds up the :meth:`stop` of a threaded server on Python 3.8 and later, for
    50 s at most: Odoo makes a daemon of the thread when it is too late. Hence the deadline, after which it is killed.

    Changes of the attributes ``variables`` (the environment), ``conf`` and ``options`` count from the next
    :meth:`start` on.
    """

    name = "odoo"
    start_deadline = 120.0
    stop_deadline = 20.0

    def __init__(
        self,
        build,
        database_server,
        database,
        workers=0,
        addon=None,
        load=None,
        environment=None,
        conf=None,
        options=(),
        filestore=None,
    ):
        super().__init__()
        self.build = build
        self.database_server = database_server
        self.database = database
        self.workers = workers
        self.addon = addon
        self.load = load or default_load(build.series) + (",bus_alt_connection" if addon else "")
        self.variables = dict(environment or {})
        self.conf = dict(conf or {})
        self.options = list(options)
        self.host = "127.0.0.1"
        self.http_port = self.take_port()
        self.event_port = self.take_port() if workers else self.http_port
        self._filestore = filestore
        self._started_at = 0

    @property
    def http_url(self):
        return "http://%s:%s" % (self.host, self.http_port)

    @property
    def event_url(self):
        """Where the bus is served: by the gevent process if there is one."""
        return "http://%s:%s" % (self.host, self.event_port)

    def command(self):
        return [*self.build.command, "-c", self.folder / "odoo.conf", "--load", self.load, *self.options]

    def environment(self):
        own = {name: value for name, value in os.environ.items() if not _FOREIGN_VARIABLES.match(name)}
        return {**own, **self.build.env, **self.variables}

    def prepare(self):
        data = self.folder / "data"
        if not data.exists():
            data.mkdir()
            if self._filestore:
                unpack(self._filestore, data)
        self._write_configuration()
        self._started_at = self.log_mark()

    def is_up(self):
        return all(map(_answers, {self.http_url, self.event_url}))

    def health(self, timeout=20):
        """Return what the health check says of the process that answers, as a dictionary; wait for so many seconds."""
        with http_session() as session:
            return session.get(self.event_url + "/bus_alt_connection/health", timeout=timeout).json()

    def log_in(self):
        """Return a session of requests, logged in as the administrator.

        :raise RuntimeError: Odoo refused
        """
        session = http_session()
        params = {"db": self.database, "login": LOGIN, "password": PASSWORD}
        answer = session.post(self.http_url + "/web/session/authenticate", json={"params": params}, timeout=60)
        if not (answer.json().get("result") or {}).get("uid"):
            raise RuntimeError("login refused: %s" % answer.text)
        return session

    def run_with(self, variables):
        """Have it run with these :attr:`variables`; return the mark in its log where that begins."""
        if self.variables == variables:
            return 0
        self.kill()
        mark = self.log_mark()
        self.variables = variables
        self.start()
        return mark

    def processes(self):
        """Return the :class:`Processes` that run now."""
        kinds = {int(pid): kind for pid, kind in _STARTED.findall(self.log_since(self._started_at))}
        found = Processes(self.pid, [], [], None)
        for child in psutil.Process(self.pid).children():
            kind = kinds.get(child.pid)
            # One that has just ended has no command line any more.
            with contextlib.suppress(psutil.NoSuchProcess):
                if kind == "HTTP":
                    found.http.append(child.pid)
                elif kind == "Cron":
                    found.cron.append(child.pid)
                elif "gevent" in child.cmdline():
                    found = found._replace(gevent=child.pid)
        return found

    def _write_configuration(self):
        addons_path = [*self.build.addons_paths, *filter(None, [self.addon])]
        conf = {
            "addons_path": ",".join(map(str, addons_path)) or None,
            "data_dir": self.folder / "data",
            "db_host": self.database_server.host,
            "db_port": self.database_server.port,
            "db_user": self.database_server.user,
            "db_password": self.database_server.password,
            "db_name": self.database,
            # Other databases of the cluster are none of its business.
            "dbfilter": "^%s$" % re.escape(self.database),
            "http_interface": self.host,
            "http_port": self.http_port,
            "gevent_port" if series_number(self.build.series) >= 16 else "longpolling_port": self.event_port,
            "workers": self.workers,
            "max_cron_threads": 1,
            **self.conf,
        }
        sections = {name: value for name, value in conf.items() if isinstance(value, dict)}
        options = {name: value for name, value in conf.items() if value is not None and name not in sections}
        parser = configparser.RawConfigParser()
        parser.read_dict({"options": options, **sections})
        path = self.folder / "odoo.conf"
        path.touch(0o600)
        with open(path, "w") as file:
            parser.write(file)


def series_number(series):
    """Return a series as a number that can be compared: 17.2 for ``saas-17.2``."""
    return float(series.rpartition("-")[2])


def default_load(series):
    """Return what Odoo's ``--load`` is by default."""
    return "base,rpc,web" if series_number(series) >= 19 else "base,web"


def _answers(url):
    # A request that needs the registry of the database, but neither a session nor assets.
    with http_session() as session:
        try:
            return session.post(url + "/web/webclient/version_info", json={"params": {}}, timeout=30).ok
        except requests.RequestException:
            return False


def http_session():
    """Return a session of requests that goes straight to the server, whatever proxy the environment names."""
    session = requests.Session()
    session.trust_env = False
    return session

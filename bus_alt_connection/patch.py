# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""What is patched: who says LISTEN is handed a cursor that goes past the pooler.

Odoo's listeners ask ``sql_db`` for a cursor in the very function that says LISTEN.
So when a cursor is asked for, the constants of the asking function tell: if one of
them is a LISTEN statement it gets a listening cursor, otherwise nothing changes.
That holds for the bus and cron of all series, and for other addons alike. The jobs
that a cron thread runs are asked for by other functions, and stay on the pooler. And
where there is a system database of one's own, it is what ``postgres`` leads to.

On its way from PostgreSQL to Odoo's loop a notification passes::

    connection.Connection -> listener.Listener -> cursor.Feed

and where the listener of another process has the connection, between the first two::

    listener.Listener -> sharing.Host -> sharing.GuestSession

`supervisor.Supervisor` sees to it that none is missed. When all is well, the log has::

    listeners go to db-01:5432, all other cursors to pgbouncer:6432
    listening on imbus at db-01:5432 (database postgres, backend pid 27444), confirmed in 1.0 ms
"""

import collections
import functools
import logging
import os
import re
import sys
import threading
import types

import odoo
import psycopg2
from odoo import release, sql_db, tools

from . import catchup, connection, log, settings, sharing
from .cursor import ListeningCursor
from .listener import DirectSession, Listener
from .supervisor import Supervisor

_logger = logging.getLogger(__name__)

# A whole statement, so that a docstring on listening is none. The channel may be
# put in later: "LISTEN ", "LISTEN %s", "LISTEN {}".
_LISTEN = re.compile(r'''\s*listen\s+("[^"]*"?|[\w$]+|%s|%\(\w+\)s|\{\w*\})?\s*;?\s*\Z''', re.IGNORECASE)
# These only pass on what somebody else asks for.
_GO_BETWEENS = ("odoo.sql_db", "odoo.modules.registry", "odoo.orm.registry", __name__)


class _Process(object):
    """What this process has of listeners: at most one per database."""

    def __init__(self):
        self.lock = threading.Lock()
        self.supervisors = {}
        #: the databases that Odoo has worked on, where bus_bus may be
        self.databases = set()
        self.backlog = catchup.Backlog(_open_ordinary)


#: by pid: a fork has the listeners of its parent only by name
_processes = collections.defaultdict(_Process)
_options = None


def install():
    """Patch Odoo's ``sql_db``, and say in the log what will go where."""
    global _options
    if _options is not None:
        return
    # To an earlier Odoo db_system means nothing, though it may be in odoo.conf.
    db_system = tools.config.get("db_system") if _series() >= 19.1 else None
    _options = settings.read(os.environ, tools.config.options, db_system)
    _report()
    original, original_info = sql_db.Connection.cursor, sql_db.connection_info_for

    def connection_info_for(db_or_uri, *args, **kwargs):
        name, info = original_info(db_or_uri, *args, **kwargs)
        if _options.system_database and db_or_uri == "postgres":
            # The name stays: by it Odoo knows what not to keep in its pool.
            info["database"] = _options.system_database
        return name, info

    def cursor(self, *args, **kwargs):
        code, dsn = _asking_code(), self.dsn
        listens, elsewhere = _says_listen(code), "dsn" in dsn
        if listens and not elsewhere:
            return _listening_cursor(dsn.get("database", self.dbname), lambda: original(self, *args, **kwargs))
        # By a URI other addons open databases of their own.
        if listens:
            _logger.info("%s listens at a URI of its own, which is left to it", code)
        opened = original(self, *args, **kwargs)
        if not elsewhere:
            _here().databases.add(self.dbname)
        return opened

    sql_db.Connection.cursor, sql_db.connection_info_for = cursor, connection_info_for


def supervisors():
    """Return the `Supervisor` of each listener of this process."""
    return [one for one in list(_here().supervisors.values()) if not one.listener.closed]


def _here():
    return _processes[os.getpid()]


def _listening_cursor(database, ordinary):
    here = _here()
    with here.lock:
        supervisor = here.supervisors.get(database)
        if supervisor is not None:
            cursor = ListeningCursor(supervisor.listener, database, ordinary)
            if supervisor.listener.add(cursor.connection):
                return cursor
        direct, parameters = functools.partial(_direct_session, database), functools.partial(_direct, database)
        shared = sharing.Sharing(direct, parameters, _options.share, getattr(odoo, "evented", False))
        outages = log.OutageLog(database)
        listener = shared.listener = Listener(database, shared.connect, _stopping, outages, _series())
        cursor = ListeningCursor(listener, database, ordinary)
        listener.add(cursor.connection)
        supervisor = Supervisor(listener, _open_ordinary, here.databases, here.backlog, _options, shared.better)
        try:
            for one in (supervisor, listener):
                threading.Thread(target=one.run, name="%s.%s" % (type(one).__module__, database), daemon=True).start()
        except Exception:
            # One without the other would be deaf without a word.
            listener.close()
            raise
        here.supervisors[database] = supervisor
        return cursor


def _ordinary(database):
    """Return the libpq keywords that Odoo itself connects to ``database`` with."""
    parameters = dict(sql_db.connection_info_for(database)[1])
    parameters["dbname"] = parameters.pop("database", database)
    return parameters


def _open_ordinary(database):
    return connection.connect(_ordinary(database))


def _direct(database):
    """Return the libpq keywords that listeners on ``database`` connect with."""
    return _options.parameters(_ordinary(database))


def _direct_session(database):
    return connection.connect(_direct(database), DirectSession)


def _series():
    """Return the series of Odoo as a number: 19.2, of saas~19.2 too."""
    return float(re.search("[0-9.]+", "%s.%s" % release.version_info[:2]).group())


def _stopping():
    """Return whether Odoo has been told to end."""
    server = getattr(sys.modules.get("odoo.service.server"), "server", None)
    return bool(getattr(server, "quit_signals_received", 0))


def _asking_code():
    """Return the code of the function that asks for a cursor."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__") in _GO_BETWEENS:
        frame = frame.f_back
    return frame.f_code


@functools.lru_cache(maxsize=4096)
def _says_listen(code):
    texts = [one for one in code.co_consts if isinstance(one, str)]
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return any(map(_LISTEN.match, texts)) or any(map(_says_listen, inner))


def _report():
    for level, problems in ((logging.ERROR, _options.errors), (logging.WARNING, _options.warnings)):
        for problem in problems:
            _logger.log(level, "%s", problem)
    if _options.system_database:
        try:
            _open_ordinary(_options.system_database).close()
        except (psycopg2.Error, OSError) as error:
            _logger.error("can't use database %s in place of postgres: %s", _options.system_database, error)
    if _options.share and not sharing.POSSIBLE:
        _logger.info("on this system no connection can be shared: each process that listens has its own")
    ordinary = settings.address(_ordinary("postgres"))
    if _options.configured and not _options.refused:
        direct = settings.address(_direct("postgres"))
        _logger.info("listeners go to %s, all other cursors to %s", direct, ordinary)
    elif not _options.refused:
        text = "neither IMDISPATCHER_DB_HOST nor IMDISPATCHER_DB_PORT is set: listeners go to %s like all other"
        text += " cursors. If that is a pooler, set them to where PostgreSQL itself is"
        _logger.warning(text, ordinary)

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Patch Odoo so that LISTEN, and the notifications that it brings, bypass the pooler.

Each cursor of ``sql_db`` checks how its statements begin. If one of them is a LISTEN, the cursor becomes a listening
cursor, see `cursor`. This applies to the bus of all series, to cron from 15.0 on, and to other addons. The jobs that a
cron thread runs have other cursors, which stay on the pooler.

Odoo's own listeners have to start even while the pooler is down. They open their cursor in the very function that
executes LISTEN. So if the function that opens a cursor has a LISTEN statement among its constants, the cursor is a
listening cursor from the start, and has no pooled connection until it needs one, see `cursor`. If a system database is
configured, connections to ``postgres`` go to it instead.

On its way from PostgreSQL to Odoo's loop, a notification passes through::

    connection.Connection -> listener.Listener -> cursor.Feed

If another process, the leader (see `sharing`), has the connection, these come between the first two::

    listener.Listener -> sharing.Follower -> sharing.FollowerSession

`supervisor.Supervisor` looks up what was missed. When all is well, the log shows::

    listeners go to db-01:5432, all other cursors to pgbouncer:6432
    listening on imbus at db-01:5432 (database postgres, backend pid 27444), confirmed in 1.0 ms
"""

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

from . import catchup, connection, log, settings, sharing, tasks, threads
from .cursor import NO_POOL, ListeningConnection, beginning, turn
from .listener import DirectSession, Listener
from .supervisor import Supervisor

_logger = logging.getLogger(__name__)

# Matches a whole statement only, so a docstring about listening does not match. The channel may be
# filled in later: "LISTEN ", "LISTEN %s", "LISTEN {}".
_LISTEN = re.compile(r'''\s*(?:listen|LISTEN)\s+("[^"]*"?|[\w$]+|%s|%\(\w+\)s|\{\w*\})?\s*;?\s*\Z''')
_begins_with_listen = re.compile(r"\s*listen\b", re.IGNORECASE).match
# Functions of these modules open cursors on behalf of their callers.
_GO_BETWEENS = frozenset(["odoo.sql_db", "odoo.modules.registry", "odoo.orm.registry", __name__])


class _Process(object):
    """The listeners of this process: at most one for each database."""

    def __init__(self):
        self.lock = threading.Lock()
        self.supervisors = {}
        #: the databases that Odoo has used, any of which may have a bus_bus
        self.databases = catchup.Databases()
        self.backlog = catchup.Backlog(_opening)


#: pid -> `_Process`. A forked child has copies of its parent's listeners, but not the threads that serve them.
_processes = {}
_options = None
#: id of a code object -> that object, and whether it contains LISTEN. An entry keeps its object alive, so that no
#: other object gets the same id.
_says_listen_cache = {}
_CACHE_SIZE = 4096


def install():
    """Patch Odoo's ``sql_db`` and log where connections will go. Any thread may call this, and more than once."""
    global _options
    with _here().lock:
        if _options is not None:
            return
        # Earlier series ignore db_system, even if odoo.conf has it.
        db_system = tools.config.get("db_system") if _series() >= 19.1 else None
        _options = settings.read(os.environ, tools.config.options, db_system)
        _report()
        _patch_connection_info()
        _patch_frame_codeinfo()
        _patch_execute()
        _patch_cursor()


def _patch_connection_info():
    original = sql_db.connection_info_for

    def connection_info_for(db_or_uri, *args, **kwargs):
        name, info = original(db_or_uri, *args, **kwargs)
        if _options.system_database and db_or_uri == "postgres":
            # Keep the name. Odoo uses it to decide which connections not to keep in its pool.
            info["database"] = _options.system_database
        return name, info

    sql_db.connection_info_for = connection_info_for


def _patch_frame_codeinfo():
    """In Odoo's warning about an unclosed cursor, name the function that opened it instead of this module."""
    original = sql_db.frame_codeinfo

    def frame_codeinfo(frame, back=0):
        for _step in range(back):
            frame = frame and frame.f_back
        while frame is not None and frame.f_globals.get("__name__") == __name__:
            frame = frame.f_back
        return original(frame)

    sql_db.frame_codeinfo = frame_codeinfo


def _patch_cursor():
    connection_class, original = sql_db.Connection, sql_db.Connection.cursor

    def cursor(self, *args, **kwargs):
        code = _asking_code()
        if _says_listen(code) and not _is_elsewhere(self):
            without_connection = original(connection_class(NO_POOL, self.dbname, self.dsn), *args, **kwargs)
            turn(without_connection, _listening_connection(self, lambda: original(self, *args, **kwargs)))
            return without_connection
        opened = original(self, *args, **kwargs)
        # `_take_past_pooler` needs this if the cursor executes LISTEN later.
        opened._opening = original, self, args, kwargs, code
        databases = _here().databases
        if opened.dbname not in databases and not _is_elsewhere(self):
            databases.add(opened.dbname)
        return opened

    sql_db.Connection.cursor = cursor


def _patch_execute():
    original = sql_db.Cursor.execute

    def execute(self, query, *args, **kwargs):
        text = query if query.__class__ is str else beginning(query)
        if _begins_with_listen(text) and _take_past_pooler(self):
            return self.execute(query, *args, **kwargs)
        return original(self, query, *args, **kwargs)

    sql_db.Cursor.execute = execute


def supervisors():
    """Return the `Supervisor` of each listener of this process."""
    return [each for each in list(_here().supervisors.values()) if not each.listener.has_ended()]


def _here():
    """Return the `_Process` of this process. Any thread may call it."""
    pid = os.getpid()
    process = _processes.get(pid)
    if process is None:
        # setdefault is atomic, so all threads get the same object.
        process = _processes.setdefault(pid, _Process())
    return process


def _take_past_pooler(cursor):
    """Turn ``cursor``, which is about to execute LISTEN, into a listening cursor.

    Return False if it already is one, or can't become one.
    """
    if isinstance(cursor._cnx, ListeningConnection):
        return False
    where = _name(_asking_code())
    if "_opening" not in vars(cursor):
        text = "%s executes LISTEN on a cursor that the addon does not know, so LISTEN goes to the pooler"
        text += " and no notification will arrive. Open the cursor with odoo.sql_db.db_connect"
        _logger.warning(text, where)
        return False
    original, connection, args, kwargs, opener = cursor._opening
    if _is_elsewhere(connection):
        _logger.info("%s listens through a connection URI of its own; the addon does not change that connection", where)
        return False
    listening = _listening_connection(connection, lambda: original(connection, *args, **kwargs))
    listening.adopt(cursor)
    turn(cursor, listening)
    text = "%s executes LISTEN on a cursor that %s opened: from now on, this cursor bypasses the pooler"
    _logger.info(text, where, _name(opener))
    return True


def _is_elsewhere(odoo_connection):
    """Return whether an Odoo ``Connection`` has a URI. Other addons use URIs for their own databases."""
    return "dsn" in odoo_connection.dsn


def _listening_connection(odoo_connection, open_pooled):
    """Return a `ListeningConnection` to the database of an Odoo ``Connection``."""
    database = odoo_connection.dsn.get("database", odoo_connection.dbname)
    return ListeningConnection(open_pooled, functools.partial(_start_listening, database))


def _start_listening(database, feed):
    """Add ``feed`` to the listener of ``database`` and return that listener; start one if there is none."""
    here = _here()
    with here.lock:
        supervisor = here.supervisors.get(database)
        if supervisor is not None and supervisor.listener.add(feed):
            return supervisor.listener
        direct, parameters = functools.partial(_direct_session, database), functools.partial(_direct, database)
        shared = sharing.Sharing(direct, parameters, _options.share, getattr(odoo, "evented", False))
        counters = dict.fromkeys(log.COUNTERS, 0)
        journal = log.Journal(log.OutageLog(database, counters))
        listener = Listener(database, shared.connect, _stopping, journal, _series(), shared.close, counters)
        listener.add(feed)
        supervisor = Supervisor(
            listener, _opening, here.databases, here.backlog, _options, shared.better, _configured_databases()
        )
        if _is_prefork():
            threads.limit_arenas()
        try:
            for part in (supervisor, listener):
                threads.start(part.run, "%s.%s" % (type(part).__module__, database))
        except Exception:
            # Keep neither: a listener without its supervisor would miss notifications silently.
            listener.close()
            raise
        here.supervisors[database] = supervisor
        return listener


def _pooled_parameters(database):
    """Return the libpq keywords with which Odoo itself connects to ``database``."""
    parameters = dict(sql_db.connection_info_for(database)[1])
    parameters["dbname"] = parameters.pop("database", database)
    return parameters


def _opening(database):
    """A task, see `tasks`: return a pooled connection to ``database``."""
    return (yield from connection.opening(_pooled_parameters(database)))


def _configured_databases():
    """Return the databases to which ``db_name`` limits Odoo. The option is a string; from 19.0 on, a list."""
    names = tools.config.get("db_name") or ()
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def _direct(database):
    """Return the libpq keywords with which listeners on ``database`` connect."""
    return _options.parameters(_pooled_parameters(database))


def _direct_session(database, last):
    return connection.connect(_direct(database), DirectSession, last)


def _series():
    """Return Odoo's series as a number; that of saas~19.2 is 19.2."""
    return float(re.search("[0-9.]+", "%s.%s" % release.version_info[:2]).group())


def _stopping():
    """Return whether Odoo has been told to shut down."""
    server = getattr(sys.modules.get("odoo.service.server"), "server", None)
    return bool(getattr(server, "quit_signals_received", 0))


def _is_prefork():
    """Return whether Odoo runs as several processes, each of which has few threads."""
    return bool(tools.config.get("workers")) or getattr(odoo, "evented", False)


def _asking_code():
    """Return the code of the function that asks for a cursor, or executes a statement on it."""
    # Frame 1 is the caller, a function of this module, so begin with its caller.
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__") in _GO_BETWEENS:
        frame = frame.f_back
    return frame.f_code


def _name(code):
    """Return the name and location of the function that ``code`` belongs to, for the log."""
    return "%s (%s:%d)" % (code.co_name, code.co_filename, code.co_firstlineno)


def _says_listen(code):
    """Return whether a constant of ``code``, or of a function nested in it, is a LISTEN statement."""
    # The key is the id, since hashing a code object hashes all of its contents each time.
    known = _says_listen_cache.get(id(code))
    if known is None:
        texts = [constant for constant in code.co_consts if isinstance(constant, str)]
        nested = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        known = code, any(map(_LISTEN.match, texts)) or any(map(_says_listen, nested))
        if len(_says_listen_cache) >= _CACHE_SIZE:
            # Code that is compiled again and again would fill the cache.
            _says_listen_cache.clear()
        _says_listen_cache[id(code)] = known
    return known[1]


def _report():
    for level, problems in ((logging.ERROR, _options.errors), (logging.WARNING, _options.warnings)):
        for problem in problems:
            _logger.log(level, "%s", problem)
    if _options.system_database:
        try:
            tasks.finish(_opening(_options.system_database)).close()
        except (psycopg2.Error, OSError) as error:
            _logger.error("can't use database %s in place of postgres: %s", _options.system_database, error)
    if _options.share and not _options.refused:
        _report_sharing()
    pooled = settings.address(_pooled_parameters("postgres"))
    if _options.configured and not _options.refused:
        direct = settings.address(_direct("postgres"))
        _logger.info("listeners go to %s, all other cursors to %s", direct, pooled)
    elif not _options.refused:
        text = "neither IMDISPATCHER_DB_HOST nor IMDISPATCHER_DB_PORT is set: listeners go to %s like all other"
        text += " cursors. If that is a pooler, set these variables to PostgreSQL's own address"
        _logger.warning(text, pooled)


def _report_sharing():
    if sharing.possible():
        text = "the listening processes of one user on this machine, or in this container, share a direct connection"
        _logger.info(text)
    else:
        _logger.info("this system can't share a connection: each listening process has a direct connection of its own")

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The one patch: who says LISTEN is handed a cursor that goes past the pooler.

Odoo's listeners ask ``sql_db`` for a cursor in the very function that says LISTEN.
So when a cursor is asked for, the constants of the asking function tell: if one of
them is a LISTEN statement it gets a listening cursor, otherwise nothing changes.
That holds for the bus and cron of all series, and for other addons alike. The jobs
that a cron thread runs are asked for by other functions, and stay on the pooler.
"""

import functools
import logging
import mmap
import os
import re
import sys
import threading
import types
import zlib

from odoo import sql_db
from odoo.tools import config

from . import settings
from .cursor import Feed, ListeningCursor
from .listener import Listener
from .supervisor import Supervisor

_logger = logging.getLogger(__name__)

# A whole statement, so that a docstring on listening is none. The channel may be
# put in later: "LISTEN ", "LISTEN %s", "LISTEN {}".
_LISTEN = re.compile(
    r"""\s*listen\s+("[^"]*"?|[\w$]+|%s|%\(\w+\)s|\{\w*\})?\s*;?\s*\Z""", re.IGNORECASE
)
# These only pass on what somebody else asks for.
_GO_BETWEENS = ("odoo.sql_db", "odoo.modules.registry", "odoo.orm.registry", __name__)


class _Process(object):
    """What this process has of listeners: at most one per database."""

    def __init__(self):
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.supervisors = {}
        #: the databases that Odoo has worked on, where bus_bus may be
        self.databases = set()


_process = _Process()
_options = None
# A byte for each listener, set if it needs more of a cursor than ours has. Forks share
# it: a cron worker dies of its first attempt, and its successor has to know.
_need_ordinary = mmap.mmap(-1, mmap.PAGESIZE)


def install():
    """Patch Odoo's ``Connection.cursor``, and say in the log what will go where."""
    global _options
    if _options is not None:
        return
    _options = settings.read(os.environ, config.options)
    _report()
    original = sql_db.Connection.cursor

    @functools.wraps(original)
    def cursor(self, *args, **kwargs):
        code = _asking_code()
        elsewhere = "dsn" in self.dsn  # a URI, as other addons use for their own databases
        if not _says_listen(code):
            if not elsewhere:
                _here().databases.add(self.dbname)
            return original(self, *args, **kwargs)
        if elsewhere:
            _logger.info("%s listens at a URI of its own, which is left to it", code)
            return original(self, *args, **kwargs)
        if _need_ordinary[_slot(code)]:
            direct = sql_db.Connection(sql_db._Pool, self.dbname, _direct(self.dbname))
            return original(direct, *args, **kwargs)
        missing = functools.partial(_report_missing, code)
        ordinary = functools.partial(original, self, *args, **kwargs)
        feed = _new_feed(self.dbname, missing)
        return ListeningCursor(feed, self.dbname, ordinary, missing)

    sql_db.Connection.cursor = cursor
    # Only now: its route is one of those things that importing must not change.
    from . import health  # noqa: F401


def supervisors():
    """Return the `Supervisor` of each listener of this process."""
    return [one for one in _here().supervisors.values() if not one.listener.closed]


def _here():
    global _process
    if _process.pid != os.getpid():
        # A fork has the listeners of its parent only by name.
        _process = _Process()
    return _process


def _new_feed(database, missing):
    here = _here()
    with here.lock:
        while True:
            supervisor = here.supervisors.get(database)
            if supervisor is None or supervisor.listener.closed:
                supervisor = here.supervisors[database] = Supervisor(
                    Listener(database, _direct(database), _stopping),
                    _ordinary,
                    here.databases,
                    _options,
                )
            feed = Feed(supervisor.listener, missing)
            if supervisor.listener.add(feed):
                return feed


def _ordinary(database):
    """Return the libpq keywords that Odoo itself connects to ``database`` with."""
    return dict(sql_db.connection_info_for(database)[1])


def _direct(database):
    system_database = config.get("db_system") or "postgres"
    return _options.parameters(_ordinary(database), system_database)


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
    return any(
        _LISTEN.match(constant)
        if isinstance(constant, str)
        else isinstance(constant, types.CodeType) and _says_listen(constant)
        for constant in code.co_consts
    )


def _report():
    for problem in _options.errors:
        _logger.error("%s", problem)
    for problem in _options.warnings:
        _logger.warning("%s", problem)
    ordinary = settings.address(_ordinary("postgres"))
    if _options.configured:
        _logger.info(
            "listeners go to %s, all other cursors to %s",
            settings.address(_direct("postgres")),
            ordinary,
        )
    else:
        _logger.warning(
            "neither %s nor %s is set: listeners go to %s like all other cursors."
            " If that is a pooler, set them to where PostgreSQL itself is",
            settings.HOST_OPTION,
            settings.PORT_OPTION,
            ordinary,
        )


def _slot(code):
    """Return the place of ``code`` in `_need_ordinary`, the same in all processes."""
    name = "%s:%d" % (code.co_filename, code.co_firstlineno)
    return zlib.crc32(name.encode()) % len(_need_ordinary)


def _report_missing(code, name):
    if not _need_ordinary[_slot(code)]:
        _need_ordinary[_slot(code)] = 1
        _logger.error(
            "%s wants %s of its listening cursor, which has none. From now on it gets"
            " an ordinary cursor straight to PostgreSQL: it listens, but a lost"
            " connection is not replaced. Please report this line",
            code,
            name,
        )

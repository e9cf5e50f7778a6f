"""A stack for demos, benchmarks and tools outside of this project: ``make up``.

It stays until Ctrl-C or SIGTERM. As soon as all is up, ``.stack/up.json`` says where what runs. Environment variables:

==============  ======================================================================================================
``SERIES``      of Odoo; default 19.0
``ODOO_GIT``    where git gets a series that Debian does not have, see :mod:`.clones`
``ODOO``        a source tree of Odoo, in place of these
``PYTHON``      interpreter for Odoo
``WORKERS``     number of HTTP workers; default 0, a threaded server
``CRON``        number of cron threads, or of cron workers beside HTTP workers; default 1
``ADDON``       a folder that holds a ``bus_alt_connection`` to load; default: this one; ``none``: without
``POOLER``      ``pgbouncer`` (default) or ``none``
``MODULES``     what to install, separated by commas; default ``bus``
``LOAD``        the whole value for Odoo's ``--load``
``DIRECT``      ``none``: do not tell the addon how to reach PostgreSQL directly
``POSTGRESQL``  major version of it; default: that of this machine, see :mod:`.servers`
``PGBOUNCER``   suite of Debian that has it; default: the one of this machine
==============  ======================================================================================================

All variables ``IMDISPATCHER_*`` and ``ODOO_IMDISPATCHER_*`` are passed on to Odoo. Unless there is a host or a port for
the direct connection among them, the addon is told that of the PostgreSQL server.

It ends with exit code 2 and one line on stderr if one of the values is no good.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
from pathlib import Path

from . import guard, servers
from .archive import CACHE
from .database import LOGIN, PASSWORD, UnknownModule
from .postgres import SUPERUSER, SUPERUSER_PASSWORD
from .stack import ADDON, Stack
from .waiting import wait_until

STATE = CACHE / "up.json"


class Refused(Exception):
    """A value of the environment that is no good."""


def stack_from(environ):
    """Return the :class:`.Stack`, not started yet, that the variables ask for.

    :raise Refused: one of them is no good
    """

    def value(name, default=None):
        return environ.get(name, "").strip() or default

    series = value("SERIES")
    if series and not re.fullmatch(r"(saas-)?\d+\.\d+", series):
        raise Refused("SERIES=%s: not a series of Odoo, such as 19.0" % series)
    tree = value("ODOO")
    if tree and not (Path(tree) / "odoo-bin").is_file():
        raise Refused("ODOO=%s: not a source tree of Odoo" % tree)
    workers = value("WORKERS", "0")
    if not workers.isdecimal():
        raise Refused("WORKERS=%s: not a number" % workers)
    cron = value("CRON", "1")
    if not cron.isdecimal():
        raise Refused("CRON=%s: not a number" % cron)
    addon = value("ADDON", str(ADDON))
    if addon == "none":
        addon = None
    elif not (Path(addon) / "bus_alt_connection" / "__manifest__.py").is_file():
        raise Refused("ADDON=%s: no addon bus_alt_connection in this folder" % addon)
    pooler = value("POOLER", "pgbouncer")
    if pooler not in ("pgbouncer", "none"):
        raise Refused("POOLER=%s: neither pgbouncer nor none" % pooler)
    direct = value("DIRECT")
    if direct not in (None, "none"):
        raise Refused("DIRECT=%s: only none is known" % direct)
    modules = value("MODULES", "bus")
    if not re.fullmatch(r"\w+(,\w+)*", modules):
        raise Refused("MODULES=%s: not names of modules, separated by commas" % modules)
    try:
        servers.check(environ)
        return Stack(
            series,
            workers=int(workers),
            addon=addon,
            pooler=pooler == "pgbouncer",
            direct=direct is None,
            modules=modules,
            tree=tree,
            python=value("PYTHON"),
            environment={name: text for name, text in environ.items() if re.match(r"(ODOO_)?IMDISPATCHER_", name)},
            load=value("LOAD"),
            conf={"max_cron_threads": int(cron)},
        )
    except RuntimeError as error:  # no such build
        raise Refused(error) from error


def describe(stack):
    """Return what others need in order to use the running stack, for JSON."""

    def login(server):
        return {"host": server.host, "port": server.port, "user": server.user, "password": server.password}

    return {
        "series": stack.series,
        "http_url": stack.odoo.http_url,
        "event_url": stack.odoo.event_url,
        "websocket_version": stack.build.websocket_version,
        "database": stack.database,
        "login": LOGIN,
        "password": PASSWORD,
        "pooler": stack.pooler and login(stack.pooler),
        "server": login(stack.server),
        "superuser": {"user": SUPERUSER, "password": SUPERUSER_PASSWORD},
        "odoo_log": str(stack.odoo.log_path),
        "pid": stack.odoo.pid,
    }


def main():
    # All end as Ctrl-C does, so that the servers are ended on each way. That itself included, since a shell that starts
    # us in the background has it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with _only_one(), stack_from(os.environ) as stack:
            guard.watch(STATE)
            try:
                _announce(describe(stack), stack)
                while True:
                    signal.pause()
            finally:
                with contextlib.suppress(FileNotFoundError):
                    STATE.unlink()
                guard.forget(STATE)
    except (Refused, UnknownModule) as error:
        print("make up: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


@contextlib.contextmanager
def _only_one():
    """Keep a second one of this clone out, which would write the same file; one that is just ending is waited for."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "up.lock", "w") as lock:

        def ours():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        try:
            wait_until(ours, 10, interval=0.1)
        except TimeoutError:
            raise Refused("there is one running in this clone already") from None
        yield


def _announce(state, stack):
    lines = [
        ("Odoo", "%s, %s" % (state["http_url"], stack.build.description)),
        ("bus", state["event_url"]),
        ("login", "%(login)s, password %(password)s, database %(database)s" % state),
        ("PgBouncer", "%(host)s:%(port)s" % state["pooler"] if state["pooler"] else "none"),
        ("PostgreSQL", "%(host)s:%(port)s, user %(user)s, password %(password)s" % state["server"]),
        ("log", state["odoo_log"]),
        ("all this", STATE),
    ]
    for line in lines:
        print("%-12s%s" % line)
    print("Ctrl-C ends it.", flush=True)
    part = STATE.with_suffix(".part")
    part.write_text(json.dumps(state, indent=4) + "\n")
    os.replace(part, STATE)


if __name__ == "__main__":
    sys.exit(main())

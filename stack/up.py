"""A stack to try things by hand: ``make up``. It stays until Ctrl-C or SIGTERM. Environment variables:

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
``POSTGRESQL``  major version of it, see :mod:`.servers`
==============  ======================================================================================================

All variables ``IMDISPATCHER_*`` and ``ODOO_IMDISPATCHER_*`` are passed on to Odoo. Unless there is a host or a port for
the direct connection among them, the addon is told that of the PostgreSQL server.

It ends with exit code 2 and one line on stderr if one of the values is no good.
"""

import os
import re
import signal
import sys
from pathlib import Path

from . import servers
from .builds import find_build
from .database import LOGIN, PASSWORD, UnknownModule
from .stack import ADDON, DEFAULT_SERIES, Stack

# Name -> what its value looks like, and what to say of another one.
_VALUES = {
    "SERIES": (r"(saas-)?\d+\.\d+", "not a series of Odoo, such as 19.0"),
    "WORKERS": (r"\d+", "not a number"),
    "CRON": (r"\d+", "not a number"),
    "POOLER": ("pgbouncer|none", "neither pgbouncer nor none"),
    "DIRECT": ("none", "only none is known"),
    "MODULES": (r"\w+(,\w+)*", "not names of modules, separated by commas"),
}


class Refused(Exception):
    """A value of the environment that is no good."""


def stack_from(environ):
    """Return the :class:`.Stack`, not started yet, that the variables ask for.

    :raise Refused: one of them is no good
    """
    given = {name: text.strip() for name, text in environ.items() if text.strip()}
    for name, (pattern, complaint) in _VALUES.items():
        if name in given and not re.fullmatch(pattern, given[name]):
            raise Refused("%s=%s: %s" % (name, given[name], complaint))
    addon = given.get("ADDON", str(ADDON))
    if addon != "none" and not (Path(addon) / "bus_alt_connection" / "__manifest__.py").is_file():
        raise Refused("ADDON=%s: no addon bus_alt_connection in this folder" % addon)
    try:
        servers.check()
        tree = given.get("ODOO")
        series = given.get("SERIES") or (None if tree else DEFAULT_SERIES)
        return Stack(
            build=find_build(series, tree, given.get("PYTHON")),
            workers=int(given.get("WORKERS", 0)),
            addon=None if addon == "none" else addon,
            pooler=given.get("POOLER") != "none",
            direct="DIRECT" not in given,
            modules=given.get("MODULES", "bus"),
            environment={name: text for name, text in environ.items() if re.match(r"(ODOO_)?IMDISPATCHER_", name)},
            load=given.get("LOAD"),
            conf={"max_cron_threads": int(given.get("CRON", 1))},
        )
    except RuntimeError as error:  # no such build
        raise Refused(error) from error


def describe(stack):
    """Return lines that say where what runs."""
    server = stack.server
    lines = [
        ("Odoo", "%s, %s" % (stack.odoo.http_url, stack.build.description)),
        ("bus", stack.odoo.event_url),
        ("login", "%s, password %s, database %s" % (LOGIN, PASSWORD, stack.database)),
        ("PgBouncer", "%s:%s" % (stack.pooler.host, stack.pooler.port) if stack.pooler else "none"),
        ("PostgreSQL", "%s:%s, user %s, password %s" % (server.host, server.port, server.user, server.password)),
        ("log", stack.odoo.log_path),
    ]
    return ["%-12s%s" % line for line in lines]


def main():
    # All end as Ctrl-C does, so that the servers are ended on each way. That itself included, since a shell that starts
    # us in the background has it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with stack_from(os.environ) as stack:
            print("\n".join([*describe(stack), "Ctrl-C ends it."]), flush=True)
            signal.pause()
    except (Refused, UnknownModule) as error:
        print("make up: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

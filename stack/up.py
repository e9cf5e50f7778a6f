"""A stack to try things by hand: ``make up``. It stays until Ctrl-C or SIGTERM. Environment variables:

==============  ======================================================================================================
``SERIES``      of Odoo; default 19.0
``ODOO_GIT``    where git gets a series that Debian does not have, see :mod:`.clones`
``ODOO``        a source tree of Odoo, in place of these
``PYTHON``      interpreter for Odoo
``WORKERS``     number of HTTP workers; default 0, a threaded server
``ADDON``       ``none``: without it
``DIRECT``      ``none``: do not tell the addon how to reach PostgreSQL directly
``POSTGRESQL``  major version of it, see :mod:`.servers`
==============  ======================================================================================================

All variables ``IMDISPATCHER_*`` and ``ODOO_IMDISPATCHER_*`` are passed on to Odoo. Unless there is a host or a port for
the direct connection among them, the addon is told that of the PostgreSQL server.

It ends with exit code 2 and what is wrong on stderr if one of the values is no good.
"""

import os
import re
import signal
import sys

from .builds import find_build
from .odoo import LOGIN, PASSWORD
from .stack import ADDON, DEFAULT_SERIES, Stack


def stack_from(environ):
    """Return the :class:`.Stack`, not started yet, that the variables ask for.

    :raise RuntimeError: one of them is no good
    """
    given = {name: text.strip() for name, text in environ.items() if text.strip()}
    for name, pattern in {"WORKERS": r"\d+", "ADDON": "none", "DIRECT": "none"}.items():
        if name in given and not re.fullmatch(pattern, given[name]):
            raise RuntimeError("%s=%s: not %s" % (name, given[name], "a number" if name == "WORKERS" else "none"))
    tree = given.get("ODOO")
    return Stack(
        build=find_build(given.get("SERIES") or (None if tree else DEFAULT_SERIES), tree, given.get("PYTHON")),
        workers=int(given.get("WORKERS", 0)),
        addon=None if "ADDON" in given else ADDON,
        direct="DIRECT" not in given,
        environment={name: text for name, text in environ.items() if re.match(r"(ODOO_)?IMDISPATCHER_", name)},
    )


def describe(stack):
    """Return lines that say where what runs."""
    server = stack.server
    lines = [
        ("Odoo", "%s, %s" % (stack.odoo.http_url, stack.build.version)),
        ("bus", stack.odoo.event_url),
        ("login", "%s, password %s, database %s" % (LOGIN, PASSWORD, stack.database)),
        ("PgBouncer", "%s:%s" % (stack.pooler.host, stack.pooler.port)),
        ("PostgreSQL", "%s:%s, user %s, password %s" % (server.host, server.port, server.user, server.password)),
        ("log", stack.odoo.log_path),
    ]
    return ["%-12s%s" % line for line in lines]


def main():
    try:
        with stack_from(os.environ) as stack:
            print("\n".join([*describe(stack), "Ctrl-C ends it."]), flush=True)
            signal.pause()
    except RuntimeError as error:
        print("make up: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

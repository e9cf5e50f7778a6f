"""How many NOTIFYs a second a cluster takes while connections listen and do nothing else."""

import contextlib
import random

from stack.postgres import PostgreSQL, full_version, version
from stack.servers import postgres_programs

from .bare import CHANNEL, BareListeners, notifies_per_second
from .figures import spread

TITLE = "NOTIFYs that a cluster takes beside bare listeners"
_COUNTS = (0, 1, 8, 24, 100, 300, 1000)
_NEWER = ("18", "19")


def run(quick, tell):
    """No Odoo: a number of bare connections listen in the database in which the NOTIFYs are sent, either all on the
    channel of the NOTIFYs (imbus), or all on another one. One thread reads what they receive and does not look at it.
    pgbench sends from four connections as fast as it can, each NOTIFY in a transaction of its own, for 1 s. The
    versions of PostgreSQL, that of this machine and newer ones of Debian, take turns in rounds of random order. The
    next turn begins when every listener has read everything.
    """
    counts = _COUNTS[:4] if quick else _COUNTS
    with contextlib.ExitStack() as exits:
        settings = {"max_connections": 100 + counts[-1], "log_statement": "none"}
        servers = {}
        for name in (version(), *(_NEWER[-1:] if quick else _NEWER)):
            try:
                programs = None if name == version() else postgres_programs(name)
                server = exits.enter_context(PostgreSQL(settings, programs=programs))
            except RuntimeError as error:  # the other versions are worth measuring
                tell("there is no PostgreSQL %s: %s" % (name, str(error).split("\n")[0]))
                continue
            servers[full_version(programs).split()[0]] = server
        listeners = {
            name: exits.enter_context(contextlib.closing(BareListeners(server))) for name, server in servers.items()
        }
        cases = [(name, channel) for name in servers for channel in (CHANNEL, "another")]
        for count in counts:
            tell("%d listener(s)" % count)
            runs = {case: [] for case in cases}
            for _ in range(1 if quick else 3):
                for name, channel in random.sample(cases, len(cases)):
                    listeners[name].listen(count, channel)
                    sent = listeners[name].beside(lambda server=servers[name]: notifies_per_second(server))
                    runs[name, channel].append(sent)
            yield TITLE, {"listeners": count, **{"%s on %s" % case: spread(found, 0) for case, found in runs.items()}}

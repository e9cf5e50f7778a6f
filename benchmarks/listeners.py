"""What it costs a cluster that somebody listens."""

import contextlib
import random

from stack.postgres import PostgreSQL, full_version, version
from stack.servers import postgres_programs

from .bare import CHANNEL, BareListeners, notifies_per_second
from .figures import spread

HOW = """\
No Odoo: as many bare connections that LISTEN, to the database that the NOTIFYs are sent in, held by one process, which
reads what they get and looks at none of it; either all on the channel that is sent to, or all on another one. pgbench
sends from four connections as fast as it can, each NOTIFY in a transaction of its own, for 1 s; the versions of
PostgreSQL, that of this machine and those that Debian has elsewhere, take turns in rounds of random order. The next one
begins when each listener has read all."""

_COUNTS = (0, 1, 8, 24, 100, 300, 1000)
_OTHER_CHANNEL = "another"
_NEWER = ("18", "19")


def run(quick, tell):
    counts = _COUNTS[:4] if quick else _COUNTS
    with contextlib.ExitStack() as exits:
        servers, versions = {}, {}
        settings = {"max_connections": 100 + counts[-1], "log_statement": "none"}
        for name in (version(), *(_NEWER[-1:] if quick else _NEWER)):
            try:
                programs = None if name == version() else postgres_programs(name)
                servers[name] = exits.enter_context(PostgreSQL(settings, programs=programs))
                versions[name] = full_version(programs)
            except RuntimeError as error:  # the others are worth having
                versions[name] = "not to be had: " + str(error).split("\n")[0]
                tell("PostgreSQL %s: %s" % (name, versions[name]))
        yield "versions", versions
        listeners = {name: exits.enter_context(BareListeners(server)) for name, server in servers.items()}
        for count in counts:
            tell("%d listener(s)" % count)
            cases = [(name, channel) for name in servers for channel in (CHANNEL, _OTHER_CHANNEL)]
            runs = {case: [] for case in cases}
            for _ in range(1 if quick else 3):
                for name, channel in random.sample(cases, len(cases)):
                    listeners[name].listen(count, channel)
                    runs[name, channel].append(notifies_per_second(servers[name], 1))
                    listeners[name].catch_up()
            yield (
                "%d listeners" % count,
                {
                    name: {
                        "same_channel": spread(runs[name, CHANNEL], 0),
                        "other_channel": spread(runs[name, _OTHER_CHANNEL], 0),
                    }
                    for name in servers
                },
            )

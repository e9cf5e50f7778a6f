"""Show what breaks behind PgBouncer, and the addon repair it: ``make demo``.

Exit code 0: all that it shows is true; 1: it is not; 2: it could not be tried. Environment variables:

=============  =======================================================================================================
``SERIES``     of Odoo; default 19.0
``WORKERS``    number of HTTP workers; default 2; 0: a threaded server
``ODOO``       a source tree of Odoo, with ``PYTHON`` to run it; default: the package of Debian, or by git
``DIRECT``     ``none``: do not tell the addon how to reach PostgreSQL directly, and see what happens then
=============  =======================================================================================================

All variables ``IMDISPATCHER_*`` and ``ODOO_IMDISPATCHER_*`` are passed on to Odoo.
"""

import os
import sys
import time

from stack.up import stack_from

from . import report, trial

_INTRODUCTION = """\
Odoo behind PgBouncer, without and with the addon bus_alt_connection

Chat messages and notifications appear in Odoo's browser pages at once, because PostgreSQL passes
them on: Odoo sends a NOTIFY for each new message, and the Odoo process that executed LISTEN
receives it and tells the browsers.

Behind PgBouncer in transaction mode that is broken. A LISTEN belongs to one connection of
PostgreSQL, but PgBouncer takes this connection back right after the LISTEN and lends it to others.
No error is shown anywhere; the messages just do not arrive until the page is reloaded.

The addon lets what LISTENs, and only that, go straight to PostgreSQL, on one connection for all
processes. All others stay with PgBouncer. Here are both, on real servers, with a real client.
"""


def main():
    try:
        return demo()
    except KeyboardInterrupt:
        print("\ninterrupted; all servers are stopped", file=sys.stderr)
        return 130
    except (RuntimeError, TimeoutError) as error:  # the message says it all
        print("make demo: %s" % error, file=sys.stderr)
        return 2


def demo():
    began = time.monotonic()
    print(_INTRODUCTION)
    without = _try("1. Without the addon", with_addon=False)
    with_addon = _try("2. With the addon", with_addon=True)
    print("What the addon says in Odoo's log:")
    for line in report.addon_log(with_addon) or ["nothing"]:
        print("   " + line)
    print("\n%s\n" % report.table(without, with_addon))
    return _verdict(without, with_addon, time.monotonic() - began)


def _try(title, with_addon):
    _tell(title)
    # What it takes to have it comes first, and tells so itself.
    stack = stack_from(_variables(with_addon))
    _tell("   starting PostgreSQL, PgBouncer and Odoo ...")
    with stack:
        if not with_addon:
            _tell("\n".join("     " + line for line in trial.versions(stack)))
        facts = trial.measure(stack, lambda text: _tell("   " + text), shares=with_addon)
    _tell("")
    return facts


def _tell(text):
    print(text, flush=True)


def _variables(with_addon):
    # Processes find a better one to listen through at a check.
    variables = {"WORKERS": "2", "IMDISPATCHER_CHECK_INTERVAL": "3", **os.environ}
    return {**variables, "ADDON": "" if with_addon else "none"}


def _verdict(without, with_addon, seconds):
    untrue = report.untrue(without, with_addon)
    for claim in untrue:
        print("Not true: %s." % claim)
    if untrue:
        print("FAILED (%.0f s)" % seconds)
        return 1
    print(
        "Without the addon no message arrives until the page is reloaded; with it all of them arrive at once, for the"
    )
    print("price of one direct connection for all processes that listen (here %d)." % len(with_addon.listeners))
    print("All of this was measured: OK (%.0f s)" % seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
import textwrap
import time

from stack.up import stack_from

from . import report, trial

_WIDTH = 96
_INTRODUCTION = """\
Odoo behind PgBouncer, without and with the addon bus_alt_connection

Chat messages and notifications appear in Odoo's browser pages at once. For that PostgreSQL is the bell: who has \
something new says NOTIFY to it, and an Odoo process that has said LISTEN to it passes the message on.

Behind PgBouncer in transaction mode that is broken. A LISTEN belongs to one connection of PostgreSQL, but PgBouncer \
takes this connection back right after the LISTEN and lends it to others. No error is shown anywhere; the messages \
just do not arrive until the page is reloaded.

The addon lets what LISTENs, and only that, go straight to PostgreSQL, on one connection for all processes. All \
others stay with PgBouncer. Here are both, on real servers, with a real client.
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
    for paragraph in _INTRODUCTION.splitlines():
        _print(paragraph)
    _print()
    without = _try("1. Without the addon", with_addon=False)
    _print()
    with_addon = _try("2. With the addon", with_addon=True)
    _print("   what the addon says in Odoo's log:")
    for line in report.addon_log(with_addon) or ["nothing"]:
        _print(line, indent=6)
    _print()
    for line in report.table(without, with_addon):
        print(line)
    _print()
    return _verdict(without, with_addon, time.monotonic() - began)


def _try(title, with_addon):
    _print(title)
    # What it takes to have it comes first, and tells so itself.
    stack = stack_from(_variables(with_addon))
    _tell("starting PostgreSQL, PgBouncer and Odoo ...")
    with stack:
        if not with_addon:
            for line in trial.versions(stack):
                _tell("  " + line)
        return trial.measure(stack, _tell, shares=with_addon)


def _variables(with_addon):
    # Processes find a better one to listen through at a check.
    variables = {"WORKERS": "2", "IMDISPATCHER_CHECK_INTERVAL": "3", **os.environ}
    return {**variables, "ADDON": "" if with_addon else "none"}


def _verdict(without, with_addon, seconds):
    untrue = report.untrue(without, with_addon)
    for claim in untrue:
        _print("Not true: %s." % claim)
    if untrue:
        _print("FAILED (%.0f s)" % seconds)
        return 1
    _print(
        "Without the addon no message arrives until the page is reloaded; with it all of them arrive at once, for the"
        " price of one direct connection for all processes that listen (here %d). All of this was measured: OK (%.0f s)"
        % (len(with_addon.listeners), seconds)
    )
    return 0


def _tell(text):
    _print(text, indent=3)


def _print(text="", indent=0):
    prefix = " " * (indent + len(text) - len(text.lstrip()))
    print(
        textwrap.fill(
            text.strip(),
            _WIDTH,
            initial_indent=prefix,
            subsequent_indent=prefix + "  " * (indent > 0),
            break_long_words=False,
        ),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Before going live: will the listeners hear what Odoo sends?

    python3 path/to/bus_alt_connection/check.py -c /etc/odoo/odoo.conf

Needs Python and psycopg2, but no Odoo. It reads odoo.conf and the environment as Odoo
and the addon do, so run it as Odoo's user and in Odoo's environment. It connects both
ways, the ordinary one of Odoo's cursors (through the pooler) and the direct one of the
listeners, prints what is there, and sends a notification by the first that has to arrive
on the second. That has a channel of its own: no worker of Odoo's hears it.

Exit code: 0 if all is well; 1 if not, with a line on each error; 2 if the options or
odoo.conf can't be read, or can't be reconciled with the environment.
"""
# A program prints: that is its result. pylint: disable=print-used

import argparse
import collections
import configparser
import contextlib
import os
import sys
import time
import uuid

# Run by its path, it would find what is beside it, but not the package that it is in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

try:
    import psycopg2
except ImportError:
    sys.stderr.write("psycopg2 is missing: use the Python that runs Odoo\n")
    sys.exit(2)

from bus_alt_connection import connection, log, settings, supervisor

# What may come of connecting.
FAILURES = (psycopg2.Error, OSError)
# Nobody else listens to it.
CHANNEL = "bus_alt_connection_%s" % uuid.uuid4().hex
# As many server connections as a pool of PgBouncer has by default.
POOL_SIZE = 20
# Less than this part of the notification queue is used unless something keeps PostgreSQL from shortening it.
QUEUE_USAGE = 0.01
# What a server connection listens on, the usage of the queue, the connection's start and the server's time.
_LISTENS = (
    "SELECT ARRAY(SELECT pg_catalog.pg_listening_channels()), pg_catalog.pg_notification_queue_usage(),"
    " pg_catalog.date_part('epoch', backend_start), pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())"
    " FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())"
)
ROW = "%-8s  %-6s  %-7s  %-7s  %-7s  %s"

#: an address that can be used: ``facts``: `connection.Facts`; ``keeps``: whether a server
#: connection is kept for us, None: can't tell; ``kind``: what that makes it, for people
Place = collections.namedtuple("Place", "parameters facts keeps kind")


def main(arguments=None):
    """Check, print, and return the exit code."""
    path, own, configured = read(arguments, os.environ)
    _say("odoo.conf: %s\n%s" % (path or "none", ROW % ("way", "is a", "version", "role", "server", "address")))
    problems = ["ERROR: " + text for text in configured.errors] + ["WARNING: " + text for text in configured.warnings]
    ordinary, direct = _look("ordinary", own, problems), None
    # If nothing is configured it is the same way, and what is wrong with that is told once.
    if not configured.refused and (configured.configured or ordinary):
        direct = _look("direct", configured.parameters(own), problems, ordinary)
    if ordinary:
        problems += _left_behind(ordinary.parameters)
    if ordinary and direct:
        problems += _why_deaf(direct, ordinary)
    errors = sum(line.startswith("ERROR") for line in problems)
    verdict = "NOT OK: %d error(s)" % errors if errors else _verdict(ordinary)
    _say("\n".join(sorted(problems, key=lambda line: line.startswith("ERROR")) + [verdict]))
    return 1 if errors else 0


def read(arguments, environ):
    """Return where odoo.conf is (None: nowhere), Odoo's own libpq keywords, and the `settings.Settings`.

    The keywords are for the database that Odoo sends notifications on. Ends the program if there is no telling.
    """
    parser = argparse.ArgumentParser(prog="check.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("-c", "--config", metavar="FILE", help="odoo.conf")
    for names in (["--db_host"], ["--db_port"], ["-r", "--db_user"], ["--db_sslmode"]):
        parser.add_argument(*names, help="if Odoo is given it")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Nor is it shown.
        parser.error("there is what is no option; if it is a password, others can see it here: set PGPASSWORD instead")

    homes = filter(os.path.isfile, map(os.path.expanduser, ("~/.odoorc", "~/.openerp_serverrc")))
    path = given.config or environ.get("ODOO_RC") or environ.get("OPENERP_SERVER") or next(homes, None)
    conf = configparser.RawConfigParser(default_section="options")
    try:
        with open(path or os.devnull, encoding="utf-8") as lines:
            conf.read_file(lines)
    except (OSError, UnicodeError, configparser.Error) as error:
        # Without its message, which may have the line, with a password.
        line = getattr(error, "lineno", None) or getattr(error, "errors", [["-"]])[0][0]
        parser.exit(2, "%s:%s: %s\n" % (path, line, getattr(error, "strerror", None) or type(error).__name__))
    # Odoo writes an unset option as False.
    options = {name: value for name, value in conf.defaults().items() if value not in ("", "False", "false", "None")}

    # So does Odoo, and nobody has decided on it.
    options.setdefault("db_sslmode", "prefer")
    configured = settings.read(environ, options, options.get("db_system"))
    own = {"dbname": options.get("db_system") or configured.system_database or "postgres"}
    for keyword in ("host", "port", "user", "password", "sslmode"):
        option, variable = "db_" + keyword, "PG" + keyword.upper()
        value, of_file, of_env = getattr(given, option, None), options.get(option), environ.get(variable)
        if not value and of_file and of_env and of_file not in (of_env, "prefer"):
            text = "%s and %s of odoo.conf differ: Odoo 19.0 goes by the former, earlier ones by the latter. Unset one"
            parser.exit(2, (text + " of them, or give --db_host or the like\n") % (variable, option))
        own[keyword] = value or of_env or of_file
    return path, own, configured


def _look(way, parameters, problems, ordinary=None):
    """Print what is at each address of a way, add to ``problems``; return the first that can be used, a `Place`."""
    usable, unusable = [], []
    attempts = [parameters]  # if there are none, connecting tells why
    with contextlib.suppress(*FAILURES):
        attempts = connection.attempts(parameters)
    for one in attempts:
        fields = ["-"] * 4
        try:
            with contextlib.closing(connection.connect(one)) as opened:
                facts, keeps = opened.examine(), connection.keeps_session(one)
            kind = "pooler" if facts.pooled or keeps is False else "server" if keeps else "?"
            same = way == "ordinary" or ordinary and facts.started == ordinary.facts.started
            server = "?" if same is None else "same" if same else "another"
            fields = [kind, str(facts.version).split(" ")[0], "standby" if facts.standby else "primary", server]
            if facts.standby:
                raise psycopg2.OperationalError(connection.why_deaf(facts, facts))
            usable.append(Place(one, facts, keeps, kind))
        except FAILURES as error:
            unusable.append("%s: %s" % (way, log.redact(error, one)))
        _say(ROW % tuple([way] + fields + [log.redact(settings.address(one), one)]))
    problems += ["WARNING: %s; passed over" % text if usable else "ERROR: " + text for text in unusable]
    return usable[0] if usable else None


def _why_deaf(listening, sending):
    """Return why a LISTEN at one `Place` does not hear what another sends, in a list; an empty one if it does."""
    there, here = listening.facts, sending.facts
    pooled = listening.keeps is False or there.pooled and there.started == here.started
    try:
        with contextlib.ExitStack() as stack:
            receiver, other, sender = [connection.connect(one.parameters) for one in (listening, listening, sending)]
            for one in (receiver, other, sender):
                stack.callback(one.close)
            receiver.execute("LISTEN " + CHANNEL)
            # No LISTEN stays behind in a pooler, though that may give us any of its connections for this.
            for _attempt in range(9):
                stack.callback(receiver.execute, "UNLISTEN " + CHANNEL)
            # Once may be luck: a pooler that does not keep our server connection may now give it to another client.
            other.execute("BEGIN; SELECT 1; ROLLBACK")
            sender.execute(supervisor.NOTIFY, (CHANNEL, "check"))
            for _tick in range(300):  # It takes milliseconds.
                heard, leaked = [CHANNEL in {it.channel for it in one.receive()} for one in (receiver, sender)]
                # The sender said no LISTEN: it was given the server connection on which we did.
                if heard or leaked:
                    break
                time.sleep(0.01)
    except FAILURES as error:
        return ["ERROR: no notification gets from the ordinary way to the direct one: %s" % error]
    reason = connection.why_deaf(there._replace(pooled=pooled or leaked), here)
    return [] if heard else ["ERROR: direct: " + reason]


def _left_behind(parameters):
    """Return a warning, in a list, if server connections of a pooler LISTEN; and one if the notification queue is full.

    A client that sends LISTEN through a pooler in transaction mode leaves it on a server connection. The listeners of
    the addon have none of these.
    """
    quickly = dict(parameters, connect_timeout=connection.PROBE_TIMEOUT)
    channels, usage, began = set(), 0.0, None
    # If the pooler has no connection left, those that were looked at are enough.
    with contextlib.suppress(*FAILURES), contextlib.ExitStack() as stack:
        for _server_connection in range(POOL_SIZE):
            client = connection.connect(quickly)
            stack.callback(client.close)
            # Its transaction keeps a server connection, so that the pooler has to give the next client another one.
            found, usage, started, now = client.row("BEGIN; " + _LISTENS, None, 4, connection.PROBE_TIMEOUT)
            stack.callback(client.execute, "ROLLBACK")
            channels.update(found)
            began = began or now
            if started > began:
                # The pooler opened this one for us, so it had no other left.
                break
    warnings = []
    if channels:
        text = "WARNING: the pooler at %s has server connections that still LISTEN, on %s. Odoo left them there before"
        text += " it had the addon, or a wrong option did. While one is in a transaction, PostgreSQL can't shorten the"
        text += " notification queue. Once Odoo runs with the addon, have PgBouncer RECONNECT, or restart the pooler"
        # The name of a channel may be anything.
        warnings.append(log.redact(text % (settings.address(parameters), ", ".join(sorted(channels))), parameters))
    if usage > QUEUE_USAGE:
        text = "WARNING: the notification queue of PostgreSQL is %.0f%% full. A connection that listens has been in a"
        text += " transaction for long: end it, or no NOTIFY works once the queue is full"
        warnings.append(text % (100 * usage))
    return warnings


def _verdict(ordinary):
    # A pooler that goes round its connections may seem to keep ours: only the round trip tells.
    if _why_deaf(ordinary, ordinary):
        return "OK: listeners hear what Odoo sends"
    if ordinary.kind == "server":
        return "OK; but Odoo uses no pooler, or one that keeps sessions, so it needs no addon to listen"
    return "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"


def _say(line):
    # A server may speak a language that this terminal, or Python 3.5, has no signs for.
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())

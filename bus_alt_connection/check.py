#!/usr/bin/env python3
# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Check before going live whether the listeners receive what Odoo sends.

    python3 path/to/bus_alt_connection/check.py -c /etc/odoo/odoo.conf

The program needs Python and psycopg2, but no Odoo. It reads odoo.conf and the environment as Odoo
and the addon do, so run it as Odoo's user and in Odoo's environment. It opens a pooled
connection, as Odoo's cursors do, and a direct connection, as the listeners do. It prints
what each of them leads to, and sends a notification on the pooled connection that has to
arrive on the direct one. The notification has a channel of its own, so no process of Odoo
receives it.

The exit code is 0 if all is well; 1 if there are errors, with a line for each; 2 if the
options or odoo.conf can't be read, or contradict the environment.
"""
# Printing is what this program is for. pylint: disable=print-used

import argparse
import collections
import configparser
import contextlib
import os
import sys
import time
import uuid

# A program that is run by its path can import the modules beside it, but not the package that contains it.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

try:
    import psycopg2
except ImportError:
    sys.stderr.write("psycopg2 is missing: use the Python that runs Odoo\n")
    sys.exit(2)

from bus_alt_connection import connection, log, settings, supervisor

# The exceptions that connecting may raise.
FAILURES = (psycopg2.Error, OSError)
# No other process listens on this channel.
CHANNEL = "bus_alt_connection_%s" % uuid.uuid4().hex
# The number of server connections in a pool of PgBouncer, by default.
POOL_SIZE = 20
# More than this share of the notification queue is in use only if something, such as a listener in a long
# transaction, keeps PostgreSQL from shortening the queue.
QUEUE_USAGE = 0.01
# Selects the channels on which the server connection listens, the usage of the queue, when the connection
# began, and the server's time.
_LISTENS = (
    "SELECT ARRAY(SELECT pg_catalog.pg_listening_channels()), pg_catalog.pg_notification_queue_usage(),"
    " pg_catalog.date_part('epoch', backend_start), pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())"
    " FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())"
)
ROW = "%-8s  %-6s  %-7s  %-7s  %-7s  %s"

#: a usable address: ``facts``: `connection.Facts`; ``keeps``: whether we keep the same server connection
#: between transactions, None if unknown; ``kind``: the word for that in the output
Place = collections.namedtuple("Place", "parameters facts keeps kind")


def main(arguments=None):
    """Check, print, and return the exit code."""
    path, own, configured = read(arguments, os.environ)
    _say("odoo.conf: %s\n%s" % (path or "none", ROW % ("way", "is a", "version", "role", "server", "address")))
    problems = ["ERROR: " + text for text in configured.errors] + ["WARNING: " + text for text in configured.warnings]
    pooled = _look("ordinary", own, problems)
    direct = None
    # Without configuration, listeners go where Odoo's cursors go, whose problems have been reported already.
    if not configured.refused and (configured.configured or pooled):
        direct = _look("direct", configured.parameters(own), problems, pooled)
    if pooled:
        problems += _left_behind(pooled.parameters)
    if pooled and direct:
        problems += _why_deaf(direct, pooled)
    errors = sum(line.startswith("ERROR") for line in problems)
    verdict = "NOT OK: %d error(s)" % errors if errors else _verdict(pooled)
    _say("\n".join(sorted(problems, key=lambda line: line.startswith("ERROR")) + [verdict]))
    return 1 if errors else 0


def read(arguments, environ):
    """Return the path of odoo.conf or None, Odoo's own libpq keywords, and the `settings.Settings`.

    The keywords are for the database in which Odoo sends notifications. Exits with code 2 if they can't be
    determined.
    """
    parser = argparse.ArgumentParser(prog="check.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("-c", "--config", metavar="FILE", help="odoo.conf")
    for names in (["--db_host"], ["--db_port"], ["-r", "--db_user"], ["--db_sslmode"]):
        parser.add_argument(*names, help="the same as Odoo's option, if Odoo is started with it")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Do not print the argument, which may be a password.
        parser.error("an argument is not an option. If it is a password, others can see it: set PGPASSWORD instead")

    homes = filter(os.path.isfile, map(os.path.expanduser, ("~/.odoorc", "~/.openerp_serverrc")))
    path = given.config or environ.get("ODOO_RC") or environ.get("OPENERP_SERVER") or next(homes, None)
    conf = configparser.RawConfigParser(default_section="options")
    try:
        with open(path or os.devnull, encoding="utf-8") as lines:
            conf.read_file(lines)
    except (OSError, UnicodeError, configparser.Error) as error:
        # Do not print the error's message: it may quote the line, and the line may hold a password.
        line = getattr(error, "lineno", None) or getattr(error, "errors", [["-"]])[0][0]
        parser.exit(2, "%s:%s: %s\n" % (path, line, getattr(error, "strerror", None) or type(error).__name__))
    # Odoo writes an unset option as False.
    options = {name: value for name, value in conf.defaults().items() if value not in ("", "False", "false", "None")}

    # Odoo has the same default. Since the operator did not choose it, it may differ from PGSSLMODE.
    options.setdefault("db_sslmode", "prefer")
    configured = settings.read(environ, options, options.get("db_system"))
    own = {"dbname": options.get("db_system") or configured.system_database or "postgres"}
    for keyword in ("host", "port", "user", "password", "sslmode"):
        option, variable = "db_" + keyword, "PG" + keyword.upper()
        value, of_file, of_env = getattr(given, option, None), options.get(option), environ.get(variable)
        if not value and of_file and of_env and of_file not in (of_env, "prefer"):
            text = "%s and %s of odoo.conf differ: Odoo 19.0 uses the former, earlier series use the latter. Unset one"
            parser.exit(2, (text + " of them, or pass the value as --db_host or the like\n") % (variable, option))
        own[keyword] = value or of_env or of_file
    return path, own, configured


def _look(way, parameters, problems, pooled=None):
    """Print what each address in ``parameters`` leads to, and append what is wrong to ``problems``.

    ``pooled`` is the `Place` of the pooled connections. Returns the first usable address, a `Place`, or None.
    """
    usable, unusable = [], []
    attempts = [parameters]  # if the next statement fails, connecting below reports why
    with contextlib.suppress(*FAILURES):
        attempts = connection.attempts(parameters)
    for attempt in attempts:
        fields = ["-"] * 4
        try:
            with contextlib.closing(connection.connect(attempt)) as opened:
                facts, keeps = opened.examine(), connection.keeps_session(attempt)
            kind = "pooler" if facts.pooled or keeps is False else "server" if keeps else "?"
            same = way == "ordinary" or pooled and facts.started == pooled.facts.started
            server = "?" if same is None else "same" if same else "another"
            fields = [kind, str(facts.version).split(" ")[0], "standby" if facts.standby else "primary", server]
            if facts.standby:
                raise psycopg2.OperationalError(connection.why_deaf(facts, facts))
            usable.append(Place(attempt, facts, keeps, kind))
        except FAILURES as error:
            unusable.append("%s: %s" % (way, log.redact(error, attempt)))
        _say(ROW % tuple([way] + fields + [log.redact(settings.address(attempt), attempt)]))
    problems += ["WARNING: %s; passed over" % text if usable else "ERROR: " + text for text in unusable]
    return usable[0] if usable else None


def _why_deaf(listening, sending):
    """Return a list with the reason why ``listening`` does not receive what ``sending`` sends, both a `Place`.

    The list is empty if it does.
    """
    there, here = listening.facts, sending.facts
    pooled = listening.keeps is False or there.pooled and there.started == here.started
    try:
        with contextlib.ExitStack() as stack:
            receiver, other, sender = [connection.connect(at.parameters) for at in (listening, listening, sending)]
            for opened in (receiver, other, sender):
                stack.callback(opened.close)
            receiver.execute("LISTEN " + CHANNEL)
            # Leave no LISTEN behind in a pooler. It may run an UNLISTEN on another server connection, so repeat it.
            for _attempt in range(9):
                stack.callback(receiver.execute, "UNLISTEN " + CHANNEL)
            # Let another client run a transaction first. A pooler that does not keep our server connection for us may
            # give it to that client. Otherwise such a pooler could pass this check by luck.
            other.execute("BEGIN; SELECT 1; ROLLBACK")
            sender.execute(supervisor.NOTIFY, (CHANNEL, "check"))
            for _tick in range(300):  # Normally the notification arrives within milliseconds.
                heard, leaked = [CHANNEL in {each.channel for each in end.receive()} for end in (receiver, sender)]
                # The sender never executed LISTEN. If it receives the notification, the pooler gave it our server
                # connection.
                if heard or leaked:
                    break
                time.sleep(0.01)
    except FAILURES as error:
        return ["ERROR: can't send a notification from the pooled connection to the direct one: %s" % error]
    reason = connection.why_deaf(there._replace(pooled=pooled or leaked), here)
    return [] if heard else ["ERROR: direct: " + reason]


def _left_behind(parameters):
    """Return a list of warnings: one if server connections of the pooler LISTEN, one if the notification queue fills.

    A client that sends LISTEN through a pooler in transaction mode leaves it on a server connection. The listeners of
    the addon never use these server connections.
    """
    quickly = dict(parameters, connect_timeout=connection.PROBE_TIMEOUT)
    channels, usage, began = set(), 0.0, None
    # If the pooler has no connection left, the ones that were examined are enough.
    with contextlib.suppress(*FAILURES), contextlib.ExitStack() as stack:
        for _server_connection in range(POOL_SIZE):
            client = connection.connect(quickly)
            stack.callback(client.close)
            # The open transaction occupies a server connection, so the pooler has to give the next client another one.
            found, usage, started, now = client.row("BEGIN; " + _LISTENS, None, 4, connection.PROBE_TIMEOUT)
            stack.callback(client.execute, "ROLLBACK")
            channels.update(found)
            began = began or now
            if started > began:
                # The pooler has just opened this server connection, so it had no idle one left.
                break
    warnings = []
    if channels:
        text = "WARNING: the pooler at %s has server connections that still LISTEN, on %s. Odoo left them there before"
        text += " it had the addon, or due to a wrong option. While one is in a transaction, PostgreSQL can't shrink"
        text += " the notification queue. Once Odoo runs with the addon, run RECONNECT in PgBouncer, or restart it"
        # Other clients choose the names of channels, which may contain anything.
        warnings.append(log.redact(text % (settings.address(parameters), ", ".join(sorted(channels))), parameters))
    if usage > QUEUE_USAGE:
        text = "WARNING: the notification queue of PostgreSQL is %.0f%% full. A listening connection has been in a"
        text += " transaction for a long time. End it: once the queue is full, every NOTIFY fails"
        warnings.append(text % (100 * usage))
    return warnings


def _verdict(pooled):
    # A pooler that uses its server connections in turn may seem to keep ours. Only a notification proves that it does.
    if _why_deaf(pooled, pooled):
        return "OK: listeners hear what Odoo sends"
    if pooled.kind == "server":
        return "OK; but Odoo uses no pooler, or one that keeps sessions, so it needs no addon to listen"
    return "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"


def _say(line):
    # A message of the server may contain characters that this terminal, or Python 3.5, can't print.
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())

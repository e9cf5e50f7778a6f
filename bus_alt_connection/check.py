#!/usr/bin/env python3
# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Check before going live whether the listeners receive what Odoo sends.

    python3 path/to/bus_alt_connection/check.py -c /etc/odoo/odoo.conf

The program needs Python and psycopg2, but not Odoo. It reads odoo.conf and the environment as Odoo
and the addon do, so run it as Odoo's user and in Odoo's environment. It opens a pooled
connection, as Odoo's cursors do, and a direct connection, as the listeners do. It prints
what each of them leads to, and sends a notification on the pooled connection, which has to
arrive on the direct one. The notification has its own channel, so no Odoo process
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

from bus_alt_connection import catchup, connection, listener, log, settings, supervisor, tasks

# The exceptions that connecting may raise.
FAILURES = (psycopg2.Error, OSError)
# No other process listens on this channel.
CHANNEL = "bus_alt_connection_%s" % uuid.uuid4().hex
# Seconds for the notification to arrive. Normally it takes milliseconds.
TIMEOUT = 3.0
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
# Selects the maximum number of connections, how many of these are reserved for superusers, and how many are in use.
_CAPACITY = (
    "SELECT pg_catalog.current_setting('max_connections')::pg_catalog.int4,"
    " pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4,"
    " (SELECT pg_catalog.count(datid) FROM pg_catalog.pg_stat_get_activity(NULL::pg_catalog.int4))"
)
# Odoo's defaults: the connections in the pool of one process, and the number of cron threads.
DB_MAXCONN, MAX_CRON_THREADS = 64, 2
ROW = "%-8s  %-7s  %-7s  %-7s  %s"

#: a usable address: libpq keywords, and `connection.Facts`
Place = collections.namedtuple("Place", "parameters facts")


def main(arguments=None):
    """Check, print, and return the exit code."""
    path, options, own, configured = read(arguments, os.environ)
    _say("odoo.conf: %s\n%s" % (path or "none", ROW % ("way", "version", "role", "server", "address")))
    problems = ["ERROR: " + text for text in configured.errors] + ["WARNING: " + text for text in configured.warnings]
    pooled = _examine_all("ordinary", own, problems)
    direct = None
    # Without configuration, listeners use the same address as Odoo's cursors. Anything wrong with it has been
    # reported already.
    if not configured.refused and (configured.configured or pooled):
        direct = _examine_all("direct", configured.parameters(own), problems, pooled)
    if pooled:
        problems += _left_behind(pooled.parameters)
    if pooled and direct:
        reason = why_deaf(direct, pooled)
        problems += ["ERROR: direct: " + reason] if reason else []
    if direct:
        problems += plan(direct, options, configured.share)
    errors = sum(line.startswith("ERROR") for line in problems)
    verdict = "NOT OK: %d error(s)" % errors if errors else _verdict(pooled)
    _say("\n".join(sorted(problems, key=lambda line: line.startswith("ERROR")) + [verdict]))
    return 1 if errors else 0


def read(arguments, environ):
    """Return the path of odoo.conf or None, its options, Odoo's own libpq keywords, and the `settings.Settings`.

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
        parser.error("unknown argument. If it is a password, others can see it: set PGPASSWORD instead")

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
            text = "%s and %s of odoo.conf differ: Odoo 19.0 uses the former, earlier series the latter. Unset one\n"
            parser.exit(2, text % (variable, option))
        own[keyword] = value or of_env or of_file
    return path, options, own, configured


def _examine_all(way, parameters, problems, pooled=None):
    """Print what each address in ``parameters`` leads to, and append what is wrong to ``problems``.

    ``pooled`` is the `Place` of the pooled connections. Returns the first usable address, a `Place`, or None.
    """
    usable, unusable = [], []
    attempts = [parameters]  # if the next statement fails, connecting below reports why
    with contextlib.suppress(*FAILURES):
        attempts = connection.attempts(parameters)
    for attempt in attempts:
        fields = ["-"] * 3
        try:
            with contextlib.closing(connection.connect(attempt)) as opened:
                facts = opened.examine()
            same = way == "ordinary" or pooled and facts.started == pooled.facts.started
            server = "?" if same is None else "same" if same else "another"
            fields = [str(facts.version).split(" ")[0], "standby" if facts.standby else "primary", server]
            if facts.standby:
                raise psycopg2.OperationalError(connection.why_deaf(facts, facts))
            usable.append(Place(attempt, facts))
        except FAILURES as error:
            text = "%s: %s" % (way, log.redact(error, attempt))
            if "no such database" in text or 'database "' in text:
                text += "; IMDISPATCHER_DB_DBNAME may name another one"
            unusable.append(text)
        _say(ROW % tuple([way] + fields + [log.redact(settings.address(attempt), attempt)]))
    problems += ["WARNING: %s; skipped" % text if usable else "ERROR: " + text for text in unusable]
    return usable[0] if usable else None


def why_deaf(listening, sending):
    """Return why a listener at ``listening`` does not receive what is sent at ``sending``, both a `Place`.

    Return None if it does.
    """
    try:
        with contextlib.ExitStack() as stack:
            session = connection.connect(listening.parameters, listener.DirectSession)
            stack.callback(session.close)
            other = connection.connect(listening.parameters)
            stack.callback(other.close)
            sender = connection.connect(sending.parameters)
            stack.callback(sender.close)
            session.listen(frozenset([CHANNEL]), lambda *_warning: None)
            # Leave no LISTEN behind in a pooler. It may run an UNLISTEN on another server connection, so repeat it.
            for _attempt in range(9):
                stack.callback(session.execute, "UNLISTEN " + CHANNEL)
            # Let another client run a transaction first. A pooler that does not keep our server connection for us may
            # give it to that client. Otherwise such a pooler could pass this check by luck.
            other.execute("BEGIN; SELECT 1; ROLLBACK")
            sent_at = time.monotonic()
            sender.execute(supervisor.NOTIFY, (CHANNEL, "check"))
            is_heard = is_leaked = False
            while not (is_heard or is_leaked) and time.monotonic() < sent_at + TIMEOUT:
                time.sleep(0.01)
                is_heard = _arrived(session)
                is_leaked = _arrived(sender)
            if is_heard:
                return None
            _kind, reason = tasks.finish(session.explaining(sender.examining, sent_at, is_leaked))
            return reason
    except FAILURES as error:
        return "can't send a notification from the pooled connection to the direct one: %s" % error


def _arrived(opened):
    return any(each.channel == CHANNEL for each in opened.receive())


def plan(direct, options, share):
    """Print how many connections to plan for, and how many the server at ``direct`` has.

    ``options`` are those of odoo.conf; ``share``: whether processes share a direct connection. Returns a list of
    warnings.
    """
    workers = _number(options, "workers", 0)
    cron = _number(options, "max_cron_threads", MAX_CRON_THREADS)
    size = _number(options, "db_maxconn", DB_MAXCONN)
    # In prefork mode there is also a gevent process; in threaded mode there is only one process.
    listeners = cron + 1 if workers else 1
    processes = workers + listeners if workers else 1
    text = "plan for %d direct connection(s)" % (1 if share else listeners)
    if share and listeners > 1:
        text += ", %d for a moment when the process that shares its connection ends" % listeners
    _say(text)
    look_ups = listeners * (catchup.QUICK_AT_ONCE + catchup.SLOW_AT_ONCE)
    text = "plan for at most %d connections to the pooler: %d for each of %d process(es)"
    text += " and %d for look-ups after an outage"
    _say(text % (processes * size + look_ups, size, processes, look_ups))
    try:
        with contextlib.closing(connection.connect(direct.parameters)) as opened:
            most, reserved, used = opened.row(_CAPACITY, None, 3)
    except FAILURES as error:
        return ["WARNING: can't tell how many connections the server has: %s" % error]
    text = "the server: max_connections is %d, %d of them are for superusers only, %d are in use"
    _say(text % (most, reserved, used))
    free = most - reserved - used
    if free < listeners:
        text = "WARNING: the server has %d connection(s) left, fewer than this Odoo may open past the pooler: %d"
        return [text % (free, listeners)]
    return []


def _number(options, name, default):
    """Return an option of odoo.conf as a number, or ``default`` if it is not a number."""
    try:
        return int(options.get(name, default))
    except ValueError:
        return default


def _left_behind(parameters):
    """Return a list of warnings: one if server connections of the pooler LISTEN, one if the notification queue fills.

    A client that sends LISTEN through a pooler in transaction mode leaves it on a server connection. The addon's
    listeners never use these server connections if they have an address of their own.
    """
    quickly = dict(parameters, connect_timeout=connection.PROBE_TIMEOUT)
    warnings = []
    channels, began = set(), None
    # If the pooler has no connection left, the ones that were examined are enough.
    with contextlib.suppress(*FAILURES), contextlib.ExitStack() as stack:
        for _server_connection in range(POOL_SIZE):
            client = connection.connect(quickly)
            stack.callback(client.close)
            # The open transaction occupies a server connection, so the pooler has to give the next client another one.
            found, usage, started, now = client.row("BEGIN; " + _LISTENS, None, 4, connection.PROBE_TIMEOUT)
            stack.callback(client.execute, "ROLLBACK")
            channels.update(found)
            if usage > QUEUE_USAGE and not warnings:
                text = "WARNING: PostgreSQL's notification queue is %.0f%% full, because a listening connection is in a"
                text += " long transaction. End it, or every NOTIFY will fail once the queue is full. The"
                text += " oldest transaction: %s"
                oldest = tasks.finish(connection.finding_oldest_transaction(client))
                warnings.append(text % (100 * usage, oldest))
            began = began or now
            if started > began:
                # The pooler has just opened this server connection, so it had no idle one left.
                break
    if channels:
        text = "WARNING: the pooler at %s has server connections that still LISTEN, on %s. Odoo left them there before"
        text += " it had the addon, or due to a wrong option. While one is in a transaction, PostgreSQL can't shrink"
        text += " the notification queue. Once Odoo runs with the addon, run RECONNECT in PgBouncer, or restart it"
        # Other clients choose the names of channels, which may contain anything.
        warnings.append(log.redact(text % (settings.address(parameters), ", ".join(sorted(channels))), parameters))
    return warnings


def _verdict(pooled):
    if why_deaf(pooled, pooled):
        return "OK: listeners hear what Odoo sends"
    return "OK; but Odoo uses no pooler, or one that keeps LISTEN, so it needs no addon to listen"


def _say(line):
    # A message of the server may contain characters that this terminal, or Python 3.5, can't print.
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())

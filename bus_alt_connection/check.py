#!/usr/bin/env python3
# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Before going live: will the listeners hear what Odoo sends?

    python3 path/to/bus_alt_connection/check.py -c /etc/odoo/odoo.conf

Needs Python and psycopg2, but no Odoo. It reads odoo.conf and the environment as Odoo
and the addon do, so run it as Odoo's user and in Odoo's environment. It connects both
ways, that of Odoo's cursors (through the pooler) and that of the listeners (direct),
prints what is there, sends one notification on each channel by the first and waits for
it on the second.

Every Odoo of the cluster hears these two. That on imbus names a channel that nobody is
subscribed to, and is ignored. That on cron_trigger names a database that there is not,
and cron looks for jobs that are due, as it does once a minute anyway.

Exit code: 0 if all is well; 1 if not, with a line on each problem and what to do; 2 if
the options or odoo.conf can't be read.
"""
# A program prints: that is its result. pylint: disable=print-used

import argparse
import configparser
import json
import os
import re
import select
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

from bus_alt_connection import connection, settings
from bus_alt_connection.listener import (
    BUS_CHANNEL,
    CRON_CHANNEL,
    IDENTITY,
    quoted,
)

# Seconds. It takes milliseconds.
ROUND_TRIP_TIMEOUT = 5.0

# Odoo's options, and the variables that Odoo itself reads from 19.0 on.
OWN = (
    ("db_host", "PGHOST"),
    ("db_port", "PGPORT"),
    ("db_user", "PGUSER"),
    ("db_password", "PGPASSWORD"),
    ("db_sslmode", "PGSSLMODE"),
)
SSLMODES = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

_FACTS = (
    "SELECT pg_backend_pid(), pg_is_in_recovery(), (%s),"
    " current_setting('server_version')" % IDENTITY
)
_CLUSTER = "SELECT system_identifier::text FROM pg_control_system()"
_TLS = (
    "SELECT CASE WHEN ssl THEN version ELSE 'no' END"
    " FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
)
_NOTIFY = "SELECT %s(%%s, %%s)" % quoted(
    os.environ.get("ODOO_NOTIFY_FUNCTION") or "pg_notify"
)

# What libpq, PostgreSQL or PgBouncer say, and what to do; the first that matches
# counts. In braces: what the options are called, on the way in question.
ADVICE = (
    (
        "no such database",
        "add 'postgres = host=...' or '* = host=...' to [databases] in pgbouncer.ini",
    ),
    ("could not translate host name", "correct {host}, or the DNS"),
    ("does not match host name", "set {host} to the name in the certificate"),
    (
        "certificate verify failed|root certificate",
        "set {sslrootcert} to the certificate of the authority that signed the server's",
    ),
    (
        "does not support SSL",
        "set {sslmode} to prefer, or switch TLS on there (PostgreSQL: ssl = on;"
        " PgBouncer: client_tls_sslmode)",
    ),
    (
        r"\A(?!.*(SSL encryption|SSL on)).*pg_hba.conf.*(no encryption|SSL off)"
        "|SSL required",
        "set {sslmode} to require, or allow connections without TLS there",
    ),
    (
        "pg_hba.conf",
        "add a line for this user, database and address to pg_hba.conf, and reload",
    ),
    ('role ".*" does not exist|no such user', "correct {user}, or create the role"),
    ("password|SASL|authentication|permitted to log in", "correct {user} and {password}"),
    (
        'database ".*" does not exist',
        "Odoo sends its notifications on the database {database}: {dbname}",
    ),
    ("permission denied for database", "GRANT CONNECT ON DATABASE to that role"),
    (
        "unsupported startup parameter",
        "add it to ignore_startup_parameters in pgbouncer.ini",
    ),
    (
        "too many (clients|connections)|connection slots|no more connections",
        "raise max_connections (PostgreSQL) or max_client_conn (PgBouncer)",
    ),
    (
        "standby|read-only|read-write|writable",
        "set {host} to the primary, or to all hosts: db-01,db-02",
    ),
    (
        "Connection refused|No such file or directory",
        "correct {host} and {port}, start the server, or have it listen there",
    ),
    (
        "query_wait_timeout|server login|cannot connect to server|server conn",
        "the pooler gets no connection to PostgreSQL: see its log and its [databases]",
    ),
    ("no answer in|timed out|[Nn]o route|unreachable", "{silence}"),
    ("", "mend that; the log there may tell more"),
)

_NAMES = {
    "host": "db_host",
    "port": "db_port",
    "user": "db_user",
    "password": "db_password, or what the pooler's auth_file has",
    "sslmode": "db_sslmode",
    "sslrootcert": "PGSSLROOTCERT",
    "dbname": "create it, or correct [databases] in pgbouncer.ini",
    "silence": "correct db_host and db_port, and look for a firewall; or the pooler gets"
    " no connection to PostgreSQL: see its log",
}
_DIRECT_NAMES = {
    "host": settings.HOST_OPTION,
    "port": settings.PORT_OPTION,
    "user": "IMDISPATCHER_DB_USER",
    "password": "IMDISPATCHER_DB_PASSWORD",
    "sslmode": "IMDISPATCHER_DB_SSLMODE",
    "sslrootcert": "IMDISPATCHER_DB_SSLROOTCERT",
    "dbname": "unset IMDISPATCHER_DB_DBNAME",
    "silence": "correct %s and %s, and look for a firewall"
    % (settings.HOST_OPTION, settings.PORT_OPTION),
}


class Unusable(Exception):
    """The options or odoo.conf can't be read; says why in one line, without secrets."""


class Host(object):
    """One host of a way, and what is there.

    ``connection``: a `connection.Connection`, None if there is no getting one;
    ``problem``: why it is of no use, in a line, else None; ``advice``: what to do then;
    ``keeps``: whether a pooler keeps one server connection for us; None: can't tell.
    """

    def __init__(self, way, parameters, names):
        self.way = way
        self.address = settings.redact(settings.address(parameters))
        self.connection = self.problem = self.advice = None
        self._parameters = parameters
        self._names = names
        try:
            self.connection, _ = connection.connect(parameters, self._examine)
        except psycopg2.Error as error:
            self._fails(_plain(error, self.address))
            return
        if self.standby:
            self._fails("is a standby, and only a primary takes LISTEN and NOTIFY")

    def _examine(self, opened, _parameters):
        ((pid, self.standby, identity, version),) = opened.execute(_FACTS)
        self.version = version.split()[0]
        self.started, self.database = identity.split(" ", 1)
        self.pooled = pid != opened.told_pid
        # Not all servers have it, or allow it.
        self.cluster = _value(opened, _CLUSTER)
        self.tls = _tls_to_pooler(opened) if self.pooled else _value(opened, _TLS)
        self.keeps = self.pooled and _keeps_session(opened, self._parameters)

    def _fails(self, what):
        self.problem = "%s: %s %s" % (self.way, self.address, what)
        advice = next(advice for pattern, advice in ADVICE if re.search(pattern, what))
        self.advice = advice.format(**self._names)

    def row(self, ordinary):
        """Return the fields of the table; ``ordinary``: the `Host` to compare with."""
        if self.connection is None:
            return [self.way] + ["-"] * 5 + [self.address]
        return [
            self.way,
            "pooler" if self.pooled else "server",
            self.version,
            "standby" if self.standby else "primary",
            _relation(self, ordinary) if ordinary.connection else "?",
            self.tls or "?",
            self.address,
        ]


def main(arguments=None):
    """Check, print, and return the exit code."""
    try:
        path, options, own = read(arguments, os.environ)
    except Unusable as error:
        sys.stderr.write("%s\n" % error)
        return 2
    configured = settings.read(os.environ, options)
    errors, warnings = list(configured.errors), list(configured.warnings)

    _say("odoo.conf: %s" % (path or "none"))
    names = dict(_NAMES, database=own["database"])
    ordinary_hosts = _hosts("ordinary", own, names)
    ordinary = _best(ordinary_hosts)
    direct_hosts = []
    if configured.configured or not ordinary.problem:
        parameters = configured.parameters(own, own["database"])
        direct_hosts = _hosts("direct", parameters, dict(names, **_DIRECT_NAMES))
    _print_table(
        [["way", "is a", "version", "role", "server", "TLS", "address"]]
        + [host.row(ordinary) for host in ordinary_hosts + direct_hosts]
    )

    ways = [(_best(hosts), hosts) for hosts in (ordinary_hosts, direct_hosts) if hosts]
    for best, hosts in ways:
        for host in hosts:
            if best.problem:
                errors.append("%s => %s" % (host.problem, host.advice))
            elif host.problem:
                warnings.append("%s; passed over" % host.problem)
    if not any(best.problem for best, _ in ways):
        direct = ways[1][0]
        problem = _why_deaf(ordinary, direct, configured.configured)
        try:
            problem = problem or _print_round_trips(ordinary.connection, direct)
        except psycopg2.Error as error:
            problem = "a notification can't be sent: %s => %s" % (
                _plain(error, ""),
                "correct ODOO_NOTIFY_FUNCTION, or see the log of PostgreSQL",
            )
        errors += [problem] if problem else []

    for host in ordinary_hosts + direct_hosts:
        if host.connection:
            host.connection.close()
    for word, lines in (("WARNING", warnings), ("ERROR", errors)):
        for line in lines:
            _say("%s: %s" % (word, line))
    _say(_verdict(ordinary, errors))
    return 1 if errors else 0


def read(arguments, environ):
    """Return where odoo.conf is (None: nowhere), its options, and libpq's keywords.

    The options are as Odoo would have them, the keywords those that its ``sql_db``
    would connect with to the database of notifications. Raises `Unusable`.
    """
    given = _parse(arguments)
    path = given.config or environ.get("ODOO_RC") or environ.get("OPENERP_SERVER")
    if not path:
        homes = [os.path.expanduser(n) for n in ("~/.odoorc", "~/.openerp_serverrc")]
        path = next((home for home in homes if os.path.isfile(home)), None)
    options = _read_file(path) if path else {}
    own = {}
    for option, variable in OWN:
        of_file = _text(options.get(option))
        if option == "db_sslmode" and option not in options:
            of_file = "prefer"
        of_env = _text(environ.get(variable))
        value = getattr(given, option) or of_file or of_env
        if of_file and of_env and of_file != of_env and not getattr(given, option):
            if given.odoo is None:
                raise Unusable(
                    "%s in the environment and %s in odoo.conf%s differ. Odoo 19.0 goes"
                    " by the former, earlier ones by the latter: unset one of them, or"
                    " tell which Odoo it is, such as --odoo 19.0"
                    % (variable, option, "" if option in options else " (by default)")
                )
            value = of_env if given.odoo >= 19 else of_file
        if value:
            options[option] = own[option[len("db_") :]] = value
    own["database"] = _text(options.get("db_system")) or "postgres"
    return path, options, own


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="check.py",
        description="Will the listeners of Odoo hear what it sends?",
        epilog="All else is read from odoo.conf and from the environment, so run it as"
        " Odoo's user and in its environment. Passwords are taken from there only, or"
        " from ~/.pgpass.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="odoo.conf")
    parser.add_argument("--db_host", help="if Odoo is given it, and so on")
    parser.add_argument("--db_port")
    parser.add_argument("-r", "--db_user")
    parser.add_argument("--db_sslmode", choices=SSLMODES)
    parser.add_argument("-w", "--db_password", help=argparse.SUPPRESS)
    parser.add_argument(
        "--odoo",
        metavar="SERIES",
        type=_major,
        help="such as 19.0; asked for if odoo.conf and PGHOST or the like differ",
    )
    given, unknown = parser.parse_known_args(arguments)
    if given.db_password:
        parser.error("others can see a password here: set PGPASSWORD instead")
    if unknown:
        # What is no option may be a password.
        name = unknown[0].split("=")[0] if unknown[0].startswith("--") else ""
        parser.error("there is an argument that is no option %s" % name)
    return given


def _major(series):
    try:
        return int(re.search("[0-9]+", series).group())
    except AttributeError:
        raise argparse.ArgumentTypeError("no series, such as 19.0") from None


def _read_file(path):
    parser = configparser.RawConfigParser()
    try:
        with open(path, encoding="utf-8") as lines:
            parser.read_file(lines)
        return dict(parser.items("options"))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
    except configparser.NoSectionError:
        reason = "has no section [options]"
    except configparser.Error as error:
        # Not the message, which has the line with the password, say.
        numbers = [number for number, _line in getattr(error, "errors", ())]
        reason = "can't be read, because of line %s" % (
            numbers[0] if numbers else getattr(error, "lineno", "?")
        )
    raise Unusable("%s: %s" % (path, reason))


def _text(value):
    # Odoo writes an unset option as False.
    return None if value in ("", "False", "false", "None") else value


# What is there ---------------------------------------------------------------


def _hosts(way, parameters, names):
    return [Host(way, one, names) for one in settings.each_host(parameters)]


def _best(hosts):
    return next((host for host in hosts if not host.problem), hosts[0])


def _value(opened, query):
    """Return the one value of ``query``, None if it is refused."""
    try:
        return opened.execute(query)[0][0]
    except psycopg2.OperationalError:
        raise
    except (psycopg2.Error, IndexError):
        return None


def _tls_to_pooler(opened):
    # Since psycopg2 2.8. The server knows only of the path between it and the pooler.
    info = getattr(opened._cnx, "info", None)
    if info is None:
        return None
    return info.ssl_attribute("protocol") if info.ssl_in_use else "no"


def _keeps_session(opened, parameters):
    """Return whether the pooler keeps a server connection for us; None: can't tell.

    If not, we get another one while somebody else has ours, or else they get ours.
    Busy poolers are asked repeatedly.
    """
    pid = "SELECT pg_backend_pid()"
    try:
        with connection.connect(parameters)[0] as other:
            for _attempt in range(5):
                ours = opened.execute(pid)
                theirs = other.execute("BEGIN; " + pid)
                if ours == theirs or ours != opened.execute(pid):
                    return False
                other.execute("ROLLBACK")
            return True
    except psycopg2.Error:
        return None


def _relation(host, ordinary):
    """Return how the server is related to that of ``ordinary``, in a word."""
    if host.started == ordinary.started:
        return "same"
    if host.cluster and host.cluster == ordinary.cluster:
        return "a copy"
    return "another"


def _why_deaf(ordinary, direct, configured):
    """Return why ``direct`` can't hear what ``ordinary`` sends; None: nothing known."""
    lead = "set %s and %s to" % (settings.HOST_OPTION, settings.PORT_OPTION)
    if direct.pooled and direct.keeps is False:
        return "direct: %s%s is a pooler, where LISTEN is lost => %s PostgreSQL itself" % (
            "" if configured else "neither option is set, and ",
            direct.address,
            lead,
        )
    if direct.started != ordinary.started:
        return "direct: %s is %s, not the server that Odoo sends to => %s that one" % (
            direct.address,
            _relation(direct, ordinary),
            lead,
        )
    if direct.database != ordinary.database:
        return (
            "direct: listens on the database %s, but Odoo sends on %s => unset"
            " IMDISPATCHER_DB_DBNAME, or correct [databases] in pgbouncer.ini"
            % (direct.database, ordinary.database)
        )
    return None


def _print_round_trips(sender, direct):
    """Send on each channel; return what is wrong, or None."""
    token = uuid.uuid4().hex
    nobodys = "bus_alt_connection_" + token
    # Nobody is to be woken for nothing, so first on a channel that nobody else has.
    for channel, payload in (
        (nobodys, token),
        (BUS_CHANNEL, json.dumps([["bus_alt_connection", "check", token]])),
        (CRON_CHANNEL, nobodys),
    ):
        seconds = _round_trip(sender, direct.connection, channel, payload)
        if seconds is None:
            return (
                "direct: nothing comes from %s in %g s, the path is silent => look for a"
                " firewall or pooler on the way" % (direct.address, ROUND_TRIP_TIMEOUT)
            )
        if channel != nobodys:
            _say("NOTIFY %-12s  heard after %.1f ms" % (channel, seconds * 1000))
    return None


def _round_trip(sender, receiver, channel, payload):
    """Return the seconds until ``payload`` has come, None if it does not."""
    receiver.execute("LISTEN %s" % quoted(channel))
    began = time.monotonic()
    sender.execute(_NOTIFY, (channel, payload))
    while True:
        for notification in receiver.receive():
            if (notification.channel, notification.payload) == (channel, payload):
                return time.monotonic() - began
        left = began + ROUND_TRIP_TIMEOUT - time.monotonic()
        if left <= 0 or not select.select([receiver], [], [], left)[0]:
            return None


# What is said of it ------------------------------------------------------------


def _plain(error, address):
    """Return what libpq says, without the address and its guesses."""
    text = str(error)
    if text.startswith(address + ": "):
        text = text[len(address) + 2 :]
    text = re.sub(r"connection to server (at|on) .*? failed: |(FATAL|ERROR):  ", "", text)
    pieces = re.sub(r"; Is the server running.*?\?", "", text).split("; ")
    return "; ".join(sorted(set(pieces), key=pieces.index))


def _say(line):
    # A server may speak a language that this terminal, or Python 3.5, has no signs for.
    encoding = sys.stdout.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        fields = (field.ljust(width) for field, width in zip(row, widths))
        _say("  ".join(fields).rstrip())


def _verdict(ordinary, errors):
    if errors:
        return "NOT OK: %d error(s)" % len(errors)
    if not ordinary.pooled:
        return "OK; but Odoo uses no pooler, so it needs no addon to listen"
    if ordinary.keeps:
        return "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"
    return "OK: listeners hear what Odoo sends"


if __name__ == "__main__":
    sys.exit(main())

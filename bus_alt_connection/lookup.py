# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Look up in one database's bus_bus what was sent while nobody listened.

Odoo's bus keeps what it sends as rows of ``bus_bus`` and NOTIFYs no more than the
channels, so the channels of the rows that came since are what the NOTIFYs would
have said. Rows are told by the transaction that wrote them: a long transaction
commits late, so neither ids nor dates come in the order in which rows appear.
"""

import collections
import contextlib

import psycopg2

from .payload import quote

# Seconds. How far back by date, besides, when the past is not known for sure: at
# the start, and after a failover, where transaction ids may have been set back.
OVERLAP = 60.0
# Rows that are committed later than others with a higher id are at most this many rows behind them.
LATE_ROWS = 100000
# Rows beyond `LATE_ROWS` that a look-up reads at first, and the factor by which it goes further back.
NEW_ROWS, FURTHER = 10000, 10

# What is executed must be found in pg_catalog alone: whoever may create objects in a schema of
# the search_path can define an operator or function that matches a call better, which then runs
# as Odoo's role. The name bus_bus is the exception, since it has to mean the table that Odoo
# uses. Odoo goes by the search_path that is configured for the role and database; that of a
# pooled connection may be what another client has left there, such as pg_dump an empty one. So
# there are two steps: a qualified query finds the table by name, with the configured path; then
# everything else has pg_catalog as its path. pg_temp is named last, or it would be searched first.
#
# SET LOCAL needs no function. "BEGIN READ ONLY" would make some poolers go to a standby.
_BEGIN = """
    BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL transaction_read_only = on; SET LOCAL row_security = off;
    SET LOCAL lock_timeout = %d; SET LOCAL statement_timeout = %d; SET LOCAL search_path TO DEFAULT
"""
_FIND = """
    SELECT (SELECT found.nspname::pg_catalog.text FROM pg_catalog.pg_namespace AS found
              JOIN pg_catalog.pg_class AS bus ON bus.relnamespace OPERATOR(pg_catalog.=) found.oid
             WHERE bus.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass('bus_bus')::pg_catalog.oid)
"""
# The lock keeps the table from being replaced between the check and the look-up.
_LOCK = "SET LOCAL search_path = pg_catalog, pg_temp; LOCK TABLE TABLE_NAME IN ACCESS SHARE MODE"
# What reading from a table may execute, besides the query: the rule of a view; the policies of row security
# (with row_security = off they are an error instead); casts and operators of a column's own type; and, as the
# query is planned, immutable functions in the table's indexes and constraints. Triggers and defaults are not
# executed; virtual generated columns can't use functions of users. All of it is the table owner's choice. So the
# owner must be one whom Odoo's role trusts anyway: itself, a role that it belongs to, or a superuser.
_CHECK = """
    SELECT bus.relkind IN ('r', 'p') AND bus.relpersistence <> 't',
           pg_has_role(bus.relowner, 'USAGE') OR (SELECT rolsuper FROM pg_roles WHERE oid = bus.relowner),
           pg_is_in_recovery(), current_database()::text
      FROM pg_class AS bus WHERE bus.oid = %s::regclass
"""
# Milliseconds to wait for a lock. VACUUM holds one for moments, a module update for minutes.
_LOCK_TIMEOUT = 200

# A server is told from any other, a restarted or promoted copy included, by when it was started; `connection.Facts`
# has the same value.
STARTED = "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
# Transaction ids of rows have 32 bits, those of today 64.
_TXID = "next - (next - xmin::text::bigint) %% 4294967296"
# A snapshot does not know the subtransactions (savepoints) under way, and takes their
# rows for visible. So all that came after its oldest transaction is new, but for those
# rows that are known by their id: the last column, when it was asked last.
# There is no index on anything but the id, and Odoo keeps a day of rows. So the query reads
# back from the highest id, and says whether it went far enough: whether LATE_ROWS rows in a
# row, or none at all, are older than what it has found. On one line, for the server's log.
_MISSED = """
    WITH today AS (
        SELECT snapshot, txid_snapshot_xmin(snapshot) AS oldest, txid_snapshot_xmax(snapshot) AS next,
               txid_snapshot_xmin(%(since)s::txid_snapshot) AS since FROM txid_current_snapshot() AS snapshot
    ), tail AS (
        SELECT id, channel, TXID AS txid,
               create_date > now() AT TIME ZONE 'UTC' - %(overlap)s::float8 * interval '1 second' AS young
          FROM TABLE_NAME, today ORDER BY id DESC LIMIT %(rows)s
    ), found AS (
        SELECT tail.* FROM tail, today WHERE young OR txid >= LEAST(oldest, since)
    ), older AS (
        SELECT count(*) AS number FROM tail WHERE id < (SELECT coalesce(min(id), 9223372036854775807) FROM found)
    )
    SELECT snapshot::text, STARTED,
           (SELECT number FROM older) >= %(late)s OR (SELECT count(*) FROM tail) < %(rows)s,
           array(SELECT DISTINCT channel FROM found
                  WHERE young OR txid >= since AND id NOT IN (SELECT unnest(%(known)s::bigint[]))),
           array(SELECT id FROM found WHERE txid >= oldest)
      FROM today
"""
_DATABASES = """
    BEGIN; SET LOCAL search_path = pg_catalog, pg_temp;
    SELECT array(SELECT datname::text FROM pg_database),
           array(SELECT datname::text FROM pg_database WHERE datallowconn AND NOT datistemplate), STARTED
"""
_BEGIN, _FIND, _CHECK, _MISSED, _DATABASES = (
    " ".join(query.split()) for query in (_BEGIN, _FIND, _CHECK, _MISSED, _DATABASES)
)
_DATABASES = _DATABASES.replace("STARTED", STARTED)
_MISSED = _MISSED.replace("TXID", _TXID).replace("STARTED", STARTED)

#: a snapshot (a text) of a server, which is told by when it was `STARTED`
Moment = collections.namedtuple("Moment", "snapshot started")
#: what is known up to a moment: monotonic seconds, `Moment`, ids of rows beyond the snapshot that are known
Mark = collections.namedtuple("Mark", "at moment known")
#: what a look-up found: channels that got rows, as JSON texts; the new `Mark`, None if there is no table bus_bus;
#: the name that the server has for the database
Found = collections.namedtuple("Found", "channels mark database")


def looking_up(opened, since, overlap, timeout, now):
    """A task: return what database ``opened`` got since the `Mark` ``since``, as `Found`.

    ``overlap``: go further back by date as well; ``timeout``: seconds for each statement in the server;
    ``now``: monotonic seconds. Raises ``psycopg2.Error``.
    """
    try:
        table, database = yield from _finding(opened, timeout)
        if table is None:
            found = Found([], None, None)
        else:
            channels, mark = yield from _reading(opened, table, since, overlap, timeout, now)
            found = Found(channels, mark, database)
        yield from opened.asking("COMMIT")
        return found
    except psycopg2.Error as error:
        if has_answered(error):
            # The pooler would throw away a server connection that is left within a transaction.
            with contextlib.suppress(psycopg2.Error):
                yield from opened.asking("ROLLBACK")
        raise


def listing(opened):
    """A task: return all databases of the server, those that Odoo may use, and when the server was started."""
    row = yield from opened.asking_row(_DATABASES, columns=3)
    yield from opened.asking("COMMIT")
    return row


def has_answered(error):
    """Return whether the server itself has answered, so that the way there works."""
    return bool(getattr(error, "sqlstate", None)) or not isinstance(error, psycopg2.OperationalError)


def _finding(opened, timeout):
    """A task: begin a transaction and lock the table bus_bus.

    Return its name for SQL, None if there is none, and the name of the database that has it.
    """
    begin = _BEGIN % (_LOCK_TIMEOUT, timeout * 1000)
    (schema,) = yield from opened.asking_row("%s; %s" % (begin, _FIND))
    if schema is None:
        return None, None
    table = "%s.bus_bus" % quote(schema)
    check = "%s; %s" % (_LOCK.replace("TABLE_NAME", table.replace("%", "%%")), _CHECK)
    is_table, is_trusted, is_standby, reached = yield from opened.asking_row(check, (table,), 4)
    if not is_table:
        raise psycopg2.NotSupportedError("%s is not an ordinary table" % table)
    if not is_trusted:
        raise psycopg2.NotSupportedError("%s belongs to another role than Odoo's" % table)
    if is_standby:
        raise psycopg2.NotSupportedError("the pooler leads to a standby")
    return table, reached


def _reading(opened, table, since, overlap, timeout, now):
    """A task: return the channels that got rows in ``table``, and the `Mark` that this sets."""
    query = _MISSED.replace("TABLE_NAME", table.replace("%", "%%"))
    # Those that are known are found again.
    rows = NEW_ROWS + len(since.known)
    by_date = {"since": None, "known": [], "overlap": now - since.at + OVERLAP}
    if since.moment.snapshot is None:
        where = by_date
    else:
        where = dict(by_date, since=since.moment.snapshot, known=since.known)
        if not overlap:
            where["overlap"] = 0
    while True:
        values = dict(where, rows=LATE_ROWS + rows, late=LATE_ROWS)
        answer = yield from opened.asking_row(query, values, 5, timeout + 1)
        snapshot, started, is_complete, channels, known = answer
        if where is not by_date and started != since.moment.started:
            # Another server numbers transactions differently; one that is behind may have passed the mark by now.
            where = by_date
        elif not is_complete:
            rows *= FURTHER
        else:
            return channels, Mark(now, Moment(snapshot, started), known)

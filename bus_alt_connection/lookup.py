# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Look up in one database's bus_bus what was sent while nobody listened.

Odoo's bus stores messages as rows of ``bus_bus``, and its NOTIFY names only their
channels. So the channels of new rows are what the missed NOTIFYs contained.
Transaction ids show which rows are new: a long transaction commits late, so rows
do not become visible in the order of their ids or dates.
"""

import collections
import contextlib

import psycopg2

from .payload import quote

# Seconds that a look-up by date reaches back beyond the mark. Dates select the rows if transaction ids prove nothing
# (at the start, and after a failover, which may have lowered the ids). After an outage, both are used.
OVERLAP = 60.0
# At most this many rows with higher ids are assumed to become visible before a given row does.
LATE_ROWS = 100000
# Rows beyond `LATE_ROWS` that a look-up reads at first, and the factor by which it goes further back.
NEW_ROWS, FURTHER = 10000, 10

# Everything that is executed must resolve in pg_catalog alone. A user who may create objects in a schema
# of the search_path can define an operator or function that matches a call more exactly, and PostgreSQL
# would run it as Odoo's role. The name bus_bus is the exception, since it has to mean the table that Odoo
# uses. Odoo uses the search_path that is configured for the role and database. A pooled connection may
# have one that another client left there; pg_dump leaves an empty one. So there are two steps: a qualified
# query finds the table by name, with the configured path; then everything else has pg_catalog as its path.
# pg_temp is named last, or PostgreSQL would search it first.
#
# Unlike set_config(), SET LOCAL calls no function. The transaction becomes read-only this way because some poolers
# would send "BEGIN READ ONLY" to a standby.
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
# Reading a table may execute code that the table's owner has chosen:
# - the rule of a view;
# - policies of row security (with row_security = off they are an error instead);
# - casts and operators of a column's own type;
# - immutable functions in indexes and constraints, while the query is planned.
# Triggers and defaults are not executed; virtual generated columns can't use user-defined functions. So the owner
# must be a role that Odoo's role trusts anyway: itself, a role that it belongs to, or a superuser.
_CHECK = """
    SELECT bus.relkind IN ('r', 'p') AND bus.relpersistence <> 't',
           pg_has_role(bus.relowner, 'USAGE') OR (SELECT rolsuper FROM pg_roles WHERE oid = bus.relowner),
           pg_is_in_recovery(), current_database()::text
      FROM pg_class AS bus WHERE bus.oid = %s::regclass
"""
# Milliseconds to wait for a lock. VACUUM holds one for moments, a module update for minutes.
_LOCK_TIMEOUT = 200

# The start time identifies a server: a restarted server or a promoted copy has another one. `connection.Facts` has
# the same value.
STARTED = "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
# A row stores only the lower 32 bits of its transaction id, see "Transactions and Identifiers" in PostgreSQL's
# documentation. This adds the upper ones: the id is the highest one up to `next` that has these lower bits.
_TXID = "next - (next - xmin::text::bigint) %% 4294967296"
# A snapshot does not list the subtransactions (savepoints) under way, and treats their rows as visible. So all
# rows from the snapshot's oldest transaction on count as new, except those whose ids the previous look-up returned
# in its last column.
#
# Only the id has an index, and Odoo keeps rows for a day. So the query reads backwards from the highest id. Its
# third column says whether it read far enough: LATE_ROWS rows beyond the oldest row that it found, or the whole
# table. All queries are put on one line for the server's log.
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

#: ``snapshot``: a string; ``started``: when the server of the snapshot was started, which identifies it, see `STARTED`
Moment = collections.namedtuple("Moment", "snapshot started")
#: the point up to which rows have been looked up or received: ``at``: monotonic seconds; ``moment``: a `Moment`;
#: ``known``: the ids of later rows that have been looked up as well
Mark = collections.namedtuple("Mark", "at moment known")
#: what a look-up found: ``channels`` that got rows, as JSON texts; ``mark``: the new `Mark`, None if there is no
#: table bus_bus; ``database``: the name that the server has for the database
Found = collections.namedtuple("Found", "channels mark database")


def looking_up(opened, since, overlap, timeout, now):
    """A task: return, as `Found`, what was added to the database of ``opened`` after ``since``, a `Mark`.

    ``overlap``: whether to go further back by date as well; ``timeout``: seconds for each statement in the server;
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
            # End the transaction: a pooler closes a server connection whose client leaves in the middle of one.
            with contextlib.suppress(psycopg2.Error):
                yield from opened.asking("ROLLBACK")
        raise


def listing(opened):
    """A task: return all databases of the server, the non-template ones that accept connections, and its start time."""
    row = yield from opened.asking_row(_DATABASES, columns=3)
    yield from opened.asking("COMMIT")
    return row


def has_answered(error):
    """Return whether ``error`` is an answer of the server, which proves that the path to it works."""
    return bool(getattr(error, "sqlstate", None)) or not isinstance(error, psycopg2.OperationalError)


def _finding(opened, timeout):
    """A task: begin a transaction and lock the table bus_bus.

    Return the table's quoted name and the name of its database; None for both if there is no such table.
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
        raise psycopg2.NotSupportedError("%s belongs to another role, which Odoo's role does not trust" % table)
    if is_standby:
        raise psycopg2.NotSupportedError("the pooler leads to a standby")
    return table, reached


def _reading(opened, table, since, overlap, timeout, now):
    """A task: return the channels that have new rows in ``table``, and the new `Mark`."""
    query = _MISSED.replace("TABLE_NAME", table.replace("%", "%%"))
    # The query reads the known rows again.
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
            # Transaction ids of another server can't be compared, even if they are higher than the mark: a server that
            # was behind may have passed it by now.
            where = by_date
        elif not is_complete:
            rows *= FURTHER
        else:
            return channels, Mark(now, Moment(snapshot, started), known)

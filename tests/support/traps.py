"""Operators, functions and the like that a user sets as traps for the statements of another role (CVE-2018-1058).

PostgreSQL looks an unqualified name up in all schemas of the search path, and prefers what matches the types of the
arguments more exactly, wherever it is. So for each name in a statement there is a trap in schema ``public`` for every
combination of types that may occur. A trap writes a line to the server's log, which also a read-only or aborted
transaction does.
"""

import collections
import contextlib
import itertools
import re

OWNER = "mallory"
_PASSWORD = "mallory-s3cret"
MARK = "TRAP"

# What an operator or function may be given; the last ones are polymorphic.
_TYPES = (
    'int2 int4 int8 numeric float4 float8 text varchar bpchar name "char" bool oid xid cid txid_snapshot'
    " timestamp timestamptz interval date regclass int4[] int8[] text[] varchar[] name[] anyelement anyarray"
).split()
# For IN, CASE x WHEN, NULLIF, USING, IS DISTINCT FROM, BETWEEN and LIKE, PostgreSQL looks these operators up as if they
# were written out.
_HIDDEN_OPERATORS = {"=", "<>", "<=", ">=", "~~"}
_COMPARE = re.compile("[=<>~]")

_LITERAL = re.compile(r"E?'(?:[^'\\]|''|\\.)*'")
_LOGGED = re.compile(r"^\d{4}-\d\d-\d\d .*?\[(\d+)\] (\S*) (.*?) ?([A-Z]+):  (.*(?:\n\t.*)*)", re.MULTILINE)

#: For ``log_line_prefix``: pid, role and application.
LOG_LINE_PREFIX = "%m [%p] %u %a "


#: a line of the server's log
Entry = collections.namedtuple("Entry", "pid role application level text")


def entries(log):
    """Return what the server has logged, a list of `Entry`."""
    return [Entry(*found) for found in _LOGGED.findall(log)]


def statements_of(log, role):
    """Return the statements that ``role`` has sent, except for those of the tests themselves."""
    found = [one for one in entries(log) if one.role == role and one.application != "tests"]
    return [one.text.partition("statement: ")[2] for one in found if one.text.startswith("statement: ")]


def caught(log, role):
    """Return a line for each trap that a statement of ``role`` has set off, and for each of its errors; none twice."""
    found, statement = {}, {}
    for one in entries(log):
        if one.role != role or one.application == "tests":
            continue
        if one.text.startswith("statement: "):
            statement[one.pid] = one.text
        elif one.level == "ERROR" or MARK in one.text:
            found["%s: %s" % (one.text, statement.get(one.pid))] = None
    return list(found)


def names_in(statements):
    """Return all words of SQL statements, in lower case, without what is between quotes."""
    return set(re.findall(r"[a-z_]\w*", _LITERAL.sub("''", "\n".join(statements)).lower()))


def symbols_in(statements):
    return set(re.findall(r"[-+*/<>=~!@#%^&|`?]+", _LITERAL.sub("''", "\n".join(statements))))


def let_everybody_create(server):
    """Give every role what it has up to PostgreSQL 14, and make one that will use it."""
    server.execute("CREATE ROLE %s LOGIN PASSWORD '%s'" % (OWNER, _PASSWORD))
    # Megabytes.
    server.execute("ALTER ROLE %s SET log_statement = 'none'" % OWNER)
    for (database,) in server.execute("SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate"):
        server.execute("GRANT CREATE ON SCHEMA public TO PUBLIC", dbname=database)


def set_traps(server, statements, database):
    """Set a trap in ``database`` for each name in ``statements``."""
    with contextlib.closing(server.connect(database, OWNER, _PASSWORD, application_name="tests")) as attacker:
        with attacker, attacker.cursor() as cr:
            cr.execute("SET search_path = pg_catalog")
            names, symbols = names_in(statements), symbols_in(statements)
            made = [*_operators(cr, symbols), *_functions(cr, names), *_types(cr, names), *_relations(cr, names)]
            cr.execute("; ".join(made))


def remove_traps(server, database):
    server.execute("DROP OWNED BY %s" % OWNER, dbname=database)


def _trap(name, arguments, result="text"):
    body = "BEGIN RAISE LOG '%s %s(%s)'; RETURN NULL; END" % (MARK, name, ", ".join(arguments))
    head = "CREATE FUNCTION public.%s(%s) RETURNS %s" % (_quoted(name), ", ".join(arguments), result)
    return "%s LANGUAGE plpgsql AS $trap$%s$trap$" % (head, body)


def _operators(cr, symbols):
    cr.execute("SELECT DISTINCT oprname FROM pg_operator")
    known = {name for (name,) in cr.fetchall()}
    symbols = sorted(known & (symbols | _HIDDEN_OPERATORS))
    for kind, result in (("compare", "bool"), ("compute", "text")):
        for left, right in itertools.product(_TYPES, repeat=2):
            yield _trap("trap_" + kind, [left, right], result)
        for operand in _TYPES:
            yield _trap("trap_" + kind, [operand], result)
    for symbol in symbols:
        function = "public.trap_" + ("compare" if _COMPARE.search(symbol) else "compute")
        for left, right in itertools.product(_TYPES, repeat=2):
            operands = "FUNCTION = %s, LEFTARG = %s, RIGHTARG = %s" % (function, left, right)
            yield "CREATE OPERATOR public.%s (%s)" % (symbol, operands)
        # PostgreSQL reserves these.
        if symbol not in ("=>", "!=", "<>"):
            for operand in _TYPES:
                yield "CREATE OPERATOR public.%s (FUNCTION = %s, RIGHTARG = %s)" % (symbol, function, operand)


def _functions(cr, names):
    """Yield traps for all functions and aggregates of PostgreSQL with one of these names."""
    for operand in _TYPES:
        yield _trap("trap_step", ["text", operand])
    cr.execute(
        "SELECT proname, pronargs - n, bool_or(prokind = 'a') FROM pg_proc, generate_series(0, pronargdefaults) n"
        " WHERE proname = ANY(%s) AND pronamespace = 'pg_catalog'::regnamespace GROUP BY 1, 2 ORDER BY 1, 2",
        (sorted(names),),
    )
    for name, count, aggregates in cr.fetchall():
        if aggregates and count == 1:
            for operand in _TYPES:
                options = "SFUNC = public.trap_step, STYPE = text"
                yield "CREATE AGGREGATE public.%s(%s) (%s)" % (_quoted(name), operand, options)
        elif count <= 2:
            for arguments in itertools.product(_TYPES, repeat=count):
                # A trap may take any number of arguments as well.
                several = count > 1 and arguments[-1].endswith("[]")
                yield _trap(name, [*arguments[:-1], "VARIADIC " + arguments[-1]] if several else arguments)


def _types(cr, names):
    """Yield domains with the names of PostgreSQL's types."""
    yield _trap("trap_domain", ["text"], "bool")
    cr.execute(
        "SELECT typname FROM pg_type WHERE typname = ANY(%s) AND typtype = 'b'"
        " AND typnamespace = 'pg_catalog'::regnamespace",
        (sorted(names),),
    )
    for (name,) in cr.fetchall():
        yield "CREATE DOMAIN public.%s AS text CHECK (public.trap_domain(VALUE))" % _quoted(name)


def _relations(cr, names):
    """Yield views with the names of PostgreSQL's tables and views."""
    cr.execute(
        "SELECT relname FROM pg_class WHERE relname = ANY(%s) AND relkind IN ('r', 'v')"
        " AND relnamespace = 'pg_catalog'::regnamespace",
        (sorted(names),),
    )
    for (name,) in cr.fetchall():
        yield _trap("trap_view_" + name, [], "bool")
        columns = "'a'::text AS datname, true AS datallowconn, false AS datistemplate"
        yield "CREATE VIEW public.%s AS SELECT %s WHERE public.trap_view_%s()" % (_quoted(name), columns, name)


def _quoted(name):
    return '"%s"' % name

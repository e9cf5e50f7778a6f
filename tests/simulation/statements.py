"""What the server answers to each statement. Every statement that is known stands in `_STATEMENTS` or `_COLUMNS`.

They are recognised by key words, since their text changes. One that is not known ends the run with its text. After a
change of the addon's SQL, adapt the two tables here, and `look_up` if the meaning of that query has changed.
"""

import functools
import re

from . import kernel


class UnknownStatement(AssertionError):
    pass


class Failure(Exception):
    """What the server says instead of an answer: an SQLSTATE and a text."""


@functools.lru_cache(maxsize=1000)
def split(text):
    """Return the statements of ``text``, which may have semicolons in quotes."""
    parts = re.findall(r"""(?:'(?:[^']|'')*'|"(?:[^"]|"")*"|[^;'"])+""", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


@functools.lru_cache(maxsize=1000)
def touches_bus(statement):
    """Return whether the statement needs a lock on bus_bus."""
    return bool(re.search(r"\bbus_bus\b", re.sub(r"'[^']*'", "", statement)))


@functools.lru_cache(maxsize=1000)
def is_look_up(statement):
    """Return whether the statement reads the rows of bus_bus."""
    return touches_bus(statement) and bool(re.search(r"\bxmin\b", statement))


def run(backend, statement, values):
    """Return the rows of one statement, None if it has none; raise `Failure`."""
    for pattern, answer in _STATEMENTS:
        match = pattern.search(statement)
        if match:
            return answer(backend, statement, values)
    raise UnknownStatement("tests/simulation/statements.py does not know: %s" % statement)


# Statements that are no SELECT


def _begin(backend, _statement, _values):
    backend.in_transaction = True


def _end(backend, _statement, _values):
    backend.end_transaction()


def _listen(backend, statement, _values):
    stop, quoted, plain = re.match(r'(UN)?LISTEN\s+(?:"((?:[^"]|"")*)"|(\S+))', statement, re.IGNORECASE).groups()
    channel = quoted.replace('""', '"') if quoted is not None else plain.lower()
    if stop:
        backend.listens.discard(channel)
    elif backend.cluster.standby and backend.is_direct:
        raise Failure("25006", "cannot execute LISTEN during recovery")
    else:
        backend.listens.add(channel)


def _set(backend, statement, _values):
    match = re.search(r"\b(statement_timeout|lock_timeout)\b\s*(?:=|to)\s*'?(\d+)\s*(m?s)?", statement, re.IGNORECASE)
    if match:
        name, number, unit = match.groups()
        backend.set_timeout(name.lower(), int(number) / (1 if unit == "s" else 1000))


def _nothing(_backend, _statement, _values):
    return None


# SELECTs of tables


def _settings(_backend, _statement, values):
    return [(name, "default") for name in values[0]]


def _namespace(backend, _statement, _values):
    return [("public" if backend.cluster.has_bus(backend.database) else None,)]


def _catch_up(backend, _statement, values):
    answer = look_up(backend.cluster, backend.database, **values)
    text = "look-up in %s for %s since %s, %g s by date: snapshot %s, %d channels"
    overlap = float(values["overlap"] or 0)
    what = (backend.database, backend.client_name, values["since"], overlap, answer[0], len(answer[-2]))
    kernel.K.note(text % what)
    return [answer]


def look_up(cluster, database, since, known, overlap, rows, late):
    """Return what the addon's query on bus_bus returns, see `bus_alt_connection.lookup`."""
    tail = sorted(cluster.rows(database), reverse=True)[:rows]
    snapshot = cluster.snapshot()
    channels, found, beyond = _new_rows(tail, snapshot, since, known, overlap)
    first = min([row.id for row in found] or [float("inf")])
    is_complete = len(tail) < rows or sum(row.id < first for row in tail) >= late
    return snapshot, cluster.started, is_complete, channels, beyond


def _new_rows(tail, snapshot, since, known, overlap):
    """Return the channels that are new, the rows that may be, and the ids of those beyond the snapshot."""
    oldest = int(snapshot.split(":")[0])
    since = int(since.split(":")[0]) if since else None
    least = oldest if since is None else min(oldest, since)
    young_from = kernel.K.now - float(overlap or 0)
    found = [row for row in tail if row.date > young_from or row.xid >= least]
    known = set(known)
    channels = {}
    for row in found:
        if row.date > young_from or since is not None and row.xid >= since and row.id not in known:
            channels[row.channel] = True
    return list(channels), found, [row.id for row in found if row.xid >= oldest]


# Other SELECTs: each column by itself


def _columns(backend, statement, values):
    row = []
    for expression in _select_list(statement):
        for pattern, answer in _COLUMNS:
            if pattern.search(expression):
                row.append(answer(backend, values))
                break
        else:
            raise UnknownStatement("tests/simulation/statements.py does not know the column: %s" % expression)
    return [tuple(row)]


@functools.lru_cache(maxsize=1000)
def _select_list(statement):
    """Return the expressions between SELECT and FROM or the end, split at commas that are not in parentheses."""
    parts, depth = [""], 0
    for token in re.findall(r"\bFROM\b|.", statement[len("SELECT") :], re.IGNORECASE):
        depth += (token == "(") - (token == ")")
        if depth == 0 and token.upper() == "FROM":
            break
        if depth == 0 and token == ",":
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _notify(backend, values):
    assert not backend.in_transaction, "the simulation delivers each notification at once"
    backend.cluster.notify(backend.pid, backend.database, *values)
    return ""


def _find(pattern):
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


_STATEMENTS = [
    (_find(r"^(BEGIN|START)\b"), _begin),
    (_find(r"^(COMMIT|ROLLBACK)\b"), _end),
    (_find(r"^(UN)?LISTEN\b"), _listen),
    (_find(r"^SET\b"), _set),
    (_find(r"^LOCK\b"), _nothing),
    (_find(r"\bxmin\b"), _catch_up),
    (_find(r"\bnspname\b.*\bpg_namespace\b.*\bto_regclass\b"), _namespace),
    (_find(r"\bFROM\b.*\bpg_settings\b"), _settings),
    (_find(r"^SELECT\b"), _columns),
]

_COLUMNS = [
    (_find(r"\bpg_database\b"), lambda backend, _values: list(backend.cluster.databases)),
    # What kind of table bus_bus is, and whether its owner is trusted.
    (_find(r"\brelkind\b|\brelowner\b"), lambda backend, _values: True),
    (_find(r"\bpg_notify\b"), _notify),
    (_find(r"\bset_config\b"), lambda backend, _values: ""),
    (_find(r"\bpg_backend_pid\b"), lambda backend, _values: backend.pid),
    (_find(r"\bpg_is_in_recovery\b"), lambda backend, _values: backend.cluster.standby and backend.is_direct),
    (_find(r"\bcurrent_database\b"), lambda backend, _values: backend.database),
    (_find(r"\bserver_version\b"), lambda backend, _values: "15.3"),
    (_find(r"\bpg_postmaster_start_time\b"), lambda backend, _values: backend.cluster.started),
    (_find(r"\b(txid|pg)_current_snapshot\b"), lambda backend, _values: backend.cluster.snapshot()),
    (_find(r"\bto_regclass\b"), lambda backend, _values: backend.cluster.has_bus(backend.database)),
    (_find(r"\bpg_notification_queue_usage\b"), lambda backend, _values: 0.0),
]

"""Two trials side by side, and whether they show what the demo claims."""

import re

from .trial import MESSAGES, PATIENCE

_TITLES = ("without the addon", "with the addon")
_LISTENS = {"imbus": "the bus", "cron_trigger": "scheduled jobs"}


def table(without, with_addon):
    """Return the facts of both trials as lines of text."""
    columns = [_column(without), _column(with_addon)]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [("",) + _TITLES]
    rows += [(label, *(column.get(label, "-") for column in columns)) for label in labels]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _column(facts):
    connections = facts.connections
    column = {
        "messages delivered to the client": "%d of %d" % (facts.delivered, MESSAGES),
        "  seen only after a reload of the page": str(facts.reloaded),
        "median time from NOTIFY to client": "-" if facts.median is None else "%.1f ms" % (facts.median * 1000),
    }
    for channel, backend in facts.listens.items():
        label = "LISTEN %s, for %s" % (channel, _LISTENS[channel])
        column[label] = "%s, backend %s" % (connections.kind(backend), backend) if backend else "none"
    column["connections from Odoo to PgBouncer"] = str(connections.clients)
    column["server connections in PostgreSQL"] = str(len(connections.pooled) + len(connections.direct))
    column["  of PgBouncer"] = str(len(connections.pooled))
    column["  direct"] = str(len(connections.direct))
    for number, name in enumerate(sorted(connections.direct.values()), 1):
        column["    application_name, no. %d" % number] = _whose(facts, name)
    return column


def _whose(facts, application_name):
    listener = facts.listeners.get(_listener_pid(application_name))
    return "%s (%s)" % (application_name, listener) if listener else application_name or "(no name)"


def _listener_pid(application_name):
    found = re.fullmatch(r"odoo-listener-(\d+)", application_name)
    return found and int(found[1])


def addon_log(facts, most=6):
    """Return what the addon itself has logged, each line once: the processes repeat some."""
    lines = ["%s %s: %s" % line for line in facts.log]
    return list(dict.fromkeys(lines))[:most]


def untrue(without, with_addon):
    """Return those claims of the demo, in words, that the facts do not bear out."""
    return [claim for claim, holds in [*_without(without), *_with(with_addon)] if not holds]


def _without(facts):
    kinds = {facts.connections.kind(backend) for backend in facts.listens.values()}
    return [
        ("without the addon none is delivered within %g s" % PATIENCE, facts.delivered == 0),
        # Otherwise it may have been for another reason that nothing came.
        ("without the addon the client is fine, and gets all after a reload", facts.reloaded == MESSAGES),
        ("without the addon each LISTEN is pooled", kinds == {"pooled"}),
        ("without the addon nothing is connected directly", not facts.connections.direct),
        ("without the addon the client's connection holds", not facts.failures),
    ]


def _with(facts):
    kinds = {facts.connections.kind(backend) for backend in facts.listens.values()}
    owners = sorted(_listener_pid(name) or 0 for name in facts.connections.direct.values())
    return [
        ("with the addon all messages are delivered", facts.delivered == MESSAGES),
        ("with the addon no message is delivered twice", not facts.repeated),
        ("with the addon each LISTEN is direct", kinds == {"direct"}),
        (
            "with the addon one of the listening processes has a direct connection for all, and nobody else has any",
            len(owners) == 1 and owners[0] in facts.listeners,
        ),
        ("with the addon the client's connection holds", not facts.failures),
    ]

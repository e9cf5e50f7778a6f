"""Two trials side by side, and whether they show what the demo claims."""

from tabulate import tabulate

from .trial import MESSAGES, PATIENCE

_LISTENS = {"imbus": "the bus", "cron_trigger": "scheduled jobs"}


def table(without, with_addon):
    """Return the facts of both trials as text."""
    columns = [_column(without), _column(with_addon)]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    return tabulate(rows, ("", "without the addon", "with the addon"), disable_numparse=True)


def _column(facts):
    connections = facts.connections
    column = {
        "messages delivered to the client": "%d of %d" % (facts.delivered, MESSAGES),
        "- seen only after a reload of the page": facts.reloaded,
        "median time from NOTIFY to client": "-" if facts.median is None else "%.1f ms" % (facts.median * 1000),
    }
    for channel, backend in facts.listens.items():
        label = "LISTEN %s, for %s" % (channel, _LISTENS[channel])
        column[label] = "%s, backend %s" % (connections.kind(backend), backend) if backend else "none"
    column["connections from Odoo to PgBouncer"] = connections.clients
    column["server connections in PostgreSQL"] = len(connections.pooled) + len(connections.direct)
    column["- of PgBouncer"] = len(connections.pooled)
    column["- direct"] = len(connections.direct)
    for number, name in enumerate(sorted(connections.direct.values()), 1):
        column["- application_name, no. %d" % number] = name
    return column


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
    names = list(facts.connections.direct.values())
    return [
        ("with the addon all messages are delivered", facts.delivered == MESSAGES),
        ("with the addon no message is delivered twice", not facts.repeated),
        ("with the addon each LISTEN is direct", kinds == {"direct"}),
        (
            "with the addon one of the listening processes has a direct connection for all, and nobody else has any",
            len(names) == 1 and names[0] in ["odoo-listener-%d" % pid for pid in facts.listeners],
        ),
        ("with the addon the client's connection holds", not facts.failures),
    ]

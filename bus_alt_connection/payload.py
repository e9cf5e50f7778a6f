# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The channels that Odoo listens on, and which notifications it can read."""

import json

BUS_CHANNEL, CRON_CHANNEL = "imbus", "cron_trigger"
# On which listeners that have heard nothing for long let each other hear something.
HEARTBEAT_CHANNEL = "bus_alt_connection"


def readable(payload, series):
    """Return ``payload``, of `BUS_CHANNEL`, as Odoo can read it; None if it can't.

    The bus takes a JSON list of channels, each a string or a flat list, and up to
    ``series`` 19.1 dies of anything else; that of 19.5 dies of an empty one, too. A later
    one may send lists within lists, as a public copy of its sources does. It is written
    anew, since the JSON libraries of the series differ in what they forgive.
    """
    try:
        channels = json.loads(payload)
        if not isinstance(channels, list):
            return None
        depth = 100 if series > 19.1 else 1
        if not all(one and isinstance(one, (str, list)) and _fits(one, depth) for one in channels):
            return None
        payload = json.dumps(channels, ensure_ascii=False, separators=(",", ":"))
        payload.encode()  # lone surrogates
    except (ValueError, RecursionError):
        return None
    return payload


def quote(name):
    """Return ``name`` as an SQL identifier."""
    # As Odoo itself has them, for those who look for them in pg_stat_activity.
    if name in (BUS_CHANNEL, CRON_CHANNEL):
        return name
    return '"%s"' % name.replace('"', '""')


def _fits(value, depth):
    if isinstance(value, list):
        return depth > 0 and all(_fits(part, depth - 1) for part in value)
    if isinstance(value, (int, float)):
        return abs(value) < 2**63  # which is false of nan
    return value is None or isinstance(value, str)

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The channels that Odoo listens on, and which notifications it can read."""

import json

BUS_CHANNEL, CRON_CHANNEL = "imbus", "cron_trigger"
# On which listeners that have heard nothing for long let each other hear something.
HEARTBEAT_CHANNEL = "bus_alt_connection"


def readable(payload):
    """Return ``payload``, of `BUS_CHANNEL`, as Odoo can read it; None if it can't.

    The bus takes a JSON list of channels, each a string or a flat list, and dies of
    nearly anything else; that of 19.5 of an empty one, too. It is written anew, since
    the JSON libraries of the series differ in what they forgive.
    """
    try:
        channels = json.loads(payload)
        if not isinstance(channels, list) or not all(map(_is_channel, channels)):
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


def _is_channel(value):
    return bool(value) and (isinstance(value, str) or isinstance(value, list) and all(map(_is_part, value)))


def _is_part(value):
    if isinstance(value, (int, float)):
        return abs(value) < 2**63  # which is false of nan
    return value is None or isinstance(value, str)

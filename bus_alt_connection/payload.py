# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The channels that Odoo listens on, and which notifications it can read."""

import json
import string

BUS_CHANNEL, CRON_CHANNEL = "imbus", "cron_trigger"
# On which listeners that have heard nothing for long let each other hear something.
HEARTBEAT_CHANNEL = "bus_alt_connection"

# NAMEDATALEN - 1: PostgreSQL truncates longer identifiers.
MAX_IDENTIFIER_BYTES = 63
_ASCII_TO_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


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


def fold(name):
    """Return the channel that ``LISTEN "name"`` listens on: ``name``, at most 63 bytes of it in UTF-8.

    PostgreSQL truncates a quoted identifier between two characters (``truncate_identifier`` in its
    ``src/backend/parser/scansup.c``). It counts bytes in the encoding of the database, which this function takes
    to be UTF-8.

    :raise ValueError: ``name`` is no text that UTF-8 can encode, so that no channel has this name
    """
    # What "ignore" ignores is the character that the cut has split.
    return name.encode("utf-8")[:MAX_IDENTIFIER_BYTES].decode("utf-8", "ignore")


def fold_plain(name):
    """Return the channel that ``LISTEN name``, without quotes, listens on.

    PostgreSQL folds an unquoted identifier to lower case before it truncates it, but in UTF-8 only the ASCII letters
    (``downcase_truncate_identifier`` in the same file). `str.lower` changes others, too.

    :raise ValueError: as :func:`fold`
    """
    return fold(name.translate(_ASCII_TO_LOWER))


def _fits(value, depth):
    if isinstance(value, list):
        return depth > 0 and all(_fits(part, depth - 1) for part in value)
    if isinstance(value, (int, float)):
        return abs(value) < 2**63  # which is false of nan
    return value is None or isinstance(value, str)

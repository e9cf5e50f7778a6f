# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The channels on which Odoo listens, and the notifications that it can read."""

import json
import string

BUS_CHANNEL, CRON_CHANNEL = "imbus", "cron_trigger"
# The channel for tokens to a session that a first token has confirmed, mainly if it has received nothing for a long
# time.
HEARTBEAT_CHANNEL = "bus_alt_connection"

# The deepest nesting of lists. Each JSON library has a limit of its own, which is higher.
MAX_DEPTH = 100
# NAMEDATALEN - 1: PostgreSQL truncates longer identifiers.
MAX_IDENTIFIER_BYTES = 63
_ASCII_TO_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def readable(payload, series):
    """Return ``payload``, of `BUS_CHANNEL`, in a form that Odoo can read; None if Odoo can't read it.

    Odoo's bus takes a JSON list of channels, and stops when it reads anything else: for 50 s in 19.1 and older, for 20
    to 30 s in newer series. A channel is a string or a flat list, neither of them empty. After ``series`` 19.1, the
    first element of a channel may be a list as well: Odoo's master branch sends pairs of a channel and a number. Its
    dispatcher ignores errors that the first element causes. It turns a channel into a tuple, but not the lists inside
    it, so a list in any other place can't be hashed and would stop the bus.

    The payload is encoded again, since the JSON libraries of the series tolerate different errors.
    """
    try:
        channels = json.loads(payload)
        depth = MAX_DEPTH if series > 19.1 else 0
        if not isinstance(channels, list) or not all(_is_channel(value, depth) for value in channels):
            return None
        payload = json.dumps(channels, ensure_ascii=False, separators=(",", ":"))
        payload.encode()  # lone surrogates
    except (ValueError, RecursionError):
        return None
    return payload


def quote(name):
    """Return ``name`` as an SQL identifier."""
    # Odoo does not quote these, and administrators search pg_stat_activity for the unquoted text.
    if name in (BUS_CHANNEL, CRON_CHANNEL):
        return name
    return '"%s"' % name.replace('"', '""')


def fold(name):
    """Return the channel that ``LISTEN "name"`` listens on: ``name``, at most 63 bytes of it in UTF-8.

    PostgreSQL truncates a quoted identifier between two characters (``truncate_identifier`` in its
    ``src/backend/parser/scansup.c``). It counts bytes in the encoding of the database, which this function takes
    to be UTF-8.

    :raise ValueError: UTF-8 can't encode ``name``, so no channel has this name
    """
    # "ignore" drops the character that the cut has split.
    return name.encode("utf-8")[:MAX_IDENTIFIER_BYTES].decode("utf-8", "ignore")


def fold_plain(name):
    """Return the channel that ``LISTEN name``, without quotes, listens on.

    PostgreSQL folds an unquoted identifier to lower case before it truncates it, but in UTF-8 only the ASCII letters
    (``downcase_truncate_identifier`` in the same file). `str.lower` would change other letters, too.

    :raise ValueError: as :func:`fold`
    """
    return fold(name.translate(_ASCII_TO_LOWER))


def _is_channel(value, depth):
    """Return whether Odoo takes ``value`` as a channel whose first element is at most ``depth`` lists deep."""
    if isinstance(value, str):
        return value != ""
    if not isinstance(value, list) or not value:
        return False
    return _is_part(value[0], depth) and all(_is_part(part, 0) for part in value[1:])


def _is_part(value, depth):
    if isinstance(value, list):
        return depth > 0 and all(_is_part(part, depth - 1) for part in value)
    if isinstance(value, (int, float)):
        return abs(value) < 2**63  # false for NaN
    return value is None or isinstance(value, str)

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""What was sent while nobody listened: the rows of bus_bus tell.

Odoo's bus keeps what it sends as rows of ``bus_bus`` and NOTIFYs no more than the
channels, so the channels of the rows that came since are what the NOTIFYs would
have said. Rows are told by the transaction that wrote them: a long transaction
commits late, so neither ids nor dates come in the order in which rows appear.
"""

import collections
import time

from . import connection

# Seconds. NOTIFY follows the commit of its rows in a transaction of its own: rows
# this much older than a snapshot may still have their NOTIFY before them.
MARGIN = 10.0
# Seconds. How far back by date, besides, when the past is not known for sure: at
# the start, and after a failover, where transaction ids may have been set back.
OVERLAP = 60.0

# Of the row's 32 bits of transaction id, and today's 64.
_XMIN = "now_.xmax - (now_.xmax - b.xmin::text::bigint) %% 4294967296"
_HORIZON = (
    "SELECT txid_current_snapshot() AS snapshot,"
    " txid_snapshot_xmax(txid_current_snapshot()) AS xmax"
)
# A snapshot does not know the subtransactions (savepoints) under way, and takes their
# rows for visible. So all that came after its oldest transaction is new, but for those
# rows that are known by their id: the second array, when it was asked last.
_MISSED = (
    "SELECT now_.snapshot::text, array(SELECT DISTINCT b.channel FROM bus_bus b WHERE"
    " " + _XMIN + " >= txid_snapshot_xmin(%s::txid_snapshot)"
    " AND b.id NOT IN (SELECT unnest(%s::bigint[]))"
    " OR b.create_date > now() AT TIME ZONE 'UTC' - %s * interval '1 second'),"
    " array(SELECT b.id FROM bus_bus b WHERE"
    " " + _XMIN + " >= txid_snapshot_xmin(now_.snapshot))"
    " FROM (" + _HORIZON + ") now_"
)

#: what `Backlog.all_heard` wants to know
SNAPSHOT = "SELECT txid_current_snapshot()::text"


class Backlog(object):
    """What each database's bus_bus got since it was last asked.

    ``parameters_for(database)`` gives the libpq keywords of the ordinary way.
    """

    def __init__(self, parameters_for):
        self._parameters_for = parameters_for
        self._began = time.monotonic()
        #: (monotonic seconds, snapshot, no ids) of moments when all was heard
        self._heard = collections.deque(maxlen=20)
        #: database -> (monotonic seconds, snapshot, ids) when it was last asked
        self._asked = {}
        self._with_bus = set()

    def all_heard(self, snapshot):
        """Take note that whatever ``snapshot`` shows has been notified, or will be.

        Snapshots hold for all databases of a cluster.
        """
        self._heard.append((time.monotonic(), snapshot, []))

    def missed(self, database, overlap=True):
        """Return the channels that got rows in ``database``, as JSON texts.

        ``overlap``: look further back by date as well, see `OVERLAP`. A database
        without bus_bus has none. Raises ``psycopg2.Error``.
        """
        now = time.monotonic()
        since, snapshot, known = self._since(database)
        overlap = now - since + OVERLAP if overlap or snapshot is None else 0
        with connection.connect(self._parameters_for(database))[0] as pooled:
            if database not in self._with_bus:
                ((exists,),) = pooled.execute("SELECT to_regclass('bus_bus') IS NOT NULL")
                if not exists:
                    return []
                self._with_bus.add(database)
            ((snapshot, channels, known),) = pooled.execute(
                _MISSED, (snapshot, known, overlap)
            )
        self._asked[database] = (now, snapshot, known)
        return channels

    def _since(self, database):
        """Return when nothing was known to be missing, in which snapshot and rows."""
        known = [(self._began, None, [])]
        if database in self._asked:
            known.append(self._asked[database])
        # A notification may have been on its way to a listener already lost: only
        # what was heard well before the last sign of life is sure.
        known += [one for one in self._heard if one[0] <= self._heard[-1][0] - MARGIN]
        return max(known, key=lambda one: one[0])

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""What was sent while nobody listened: the rows of bus_bus tell.

Odoo's bus keeps what it sends as rows of ``bus_bus`` and NOTIFYs no more than the
channels, so the channels of the rows that came since are what the NOTIFYs would
have said. Rows are told by the transaction that wrote them: a long transaction
commits late, so neither ids nor dates come in the order in which rows appear.
"""

import collections
import contextlib
import time

import psycopg2

# Seconds. NOTIFY follows the commit of its rows in a transaction of its own: rows
# this much older than a snapshot may still have their NOTIFY before them.
MARGIN = 10.0
# Seconds. How far back by date, besides, when the past is not known for sure: at
# the start, and after a failover, where transaction ids may have been set back.
OVERLAP = 60.0
# Rows that are committed later than others with a higher id are no further behind them.
LATE_IDS = 100000
# Seconds for one look, in the server too. The first may have to read the whole table.
LOOK_TIMEOUT = 30.0
# Seconds until a database that could not be asked is asked again, doubling.
FIRST_DELAY, LONGEST_DELAY = 2.0, 10.0

# Transaction ids of rows have 32 bits, those of today 64.
_TXID = "next - (next - xmin::text::bigint) %% 4294967296"
# A snapshot does not know the subtransactions (savepoints) under way, and takes their
# rows for visible. So all that came after its oldest transaction is new, but for those
# rows that are known by their id: the last column, when it was asked last. There is no
# index on anything but the id. On one line, for who reads it in the server's log.
_MISSED = """
    WITH today AS (
        SELECT snapshot, txid_snapshot_xmin(snapshot) AS oldest, txid_snapshot_xmax(snapshot) AS next,
               txid_snapshot_xmin(%(since)s::txid_snapshot) AS since FROM txid_current_snapshot() AS snapshot
    ), tail AS (
        SELECT id, channel, TXID AS txid,
               create_date > now() AT TIME ZONE 'UTC' - %(overlap)s * interval '1 second' AS young
          FROM bus_bus, today WHERE id > %(floor)s
    ), found AS (
        SELECT tail.* FROM tail, today WHERE young OR txid >= LEAST(oldest, since)
    )
    SELECT snapshot::text, (SELECT coalesce(max(id), 0) FROM bus_bus),
           array(SELECT DISTINCT channel FROM found
                  WHERE young OR txid >= since AND id NOT IN (SELECT unnest(%(known)s::bigint[]))),
           array(SELECT id FROM found WHERE txid >= oldest)
      FROM today
"""
_MISSED = " ".join(_MISSED.split()).replace("TXID", _TXID)

#: a moment: monotonic seconds, snapshot, ids of rows beyond it that are known, highest id
_Mark = collections.namedtuple("_Mark", "at snapshot known highest")
#: monotonic seconds of the next look; seconds to wait if it fails; see `Backlog.owe`
_Owed = collections.namedtuple("_Owed", "due delay overlap")


class Backlog(object):
    """What each database's bus_bus got since it was last known; one for each process.

    ``open_ordinary(database)`` returns a `connection.Connection` the ordinary way. What
    can't be asked stays owed, and as long as anything is, no mark moves forward.
    """

    def __init__(self, open_ordinary):
        self._open = open_ordinary
        self._began = None
        #: marks of when all was heard, in all databases of the cluster
        self._heard = collections.deque(maxlen=20)
        #: database -> mark of when it was last asked
        self._asked = {}
        self._owed = {}
        #: whether any of the databases could be asked when they last were
        self.works = False

    def begin(self, now):
        """From now on somebody wants to know; what is older is nobody's."""
        if self._began is None:
            self._began = now

    def heard_up_to(self, snapshot, now):
        """Take note that whatever ``snapshot``, a text, shows has been notified or will be.

        Snapshots hold for all databases of a cluster. Ignored while anything is owed.
        """
        if not self._owed:
            self._heard.append(_Mark(now, snapshot, [], 0))

    def owe(self, databases, now, afresh=False):
        """Have ``databases`` asked at ``now``, or when their back-off is over.

        ``afresh``: the server is just back: at once, and further back by date as well.
        """
        self.begin(now)
        for database in databases:
            owed = self._owed.setdefault(database, _Owed(now, FIRST_DELAY, False))
            if afresh:
                self._owed[database] = owed._replace(due=now, overlap=True)

    def forget(self, database):
        """The database is gone."""
        self._owed.pop(database, None)
        self._asked.pop(database, None)

    @property
    def due(self):
        """Monotonic seconds of when something is to be asked; infinite: never."""
        return min([owed.due for owed in self._owed.values()] or [float("inf")])

    def pay(self, give, now):
        """Ask the databases that are due; return ``{database: (error, seconds)}`` of what failed.

        It is asked again after so many seconds, at most `LONGEST_DELAY`.

        ``give(channels)`` is called with the channels that got rows in one of them, as
        JSON texts; it returns whether it took them, else they stay owed.
        """
        failed, due = {}, [item for item in self._owed.items() if item[1].due <= now]
        began = time.monotonic()
        # First those that are most likely to answer.
        for database, owed in sorted(due, key=lambda item: (item[1].delay, item[0])):
            try:
                channels, mark = self._look(database, owed.overlap, now)
                if not channels or give(channels):
                    self._asked[database] = mark
                    self._owed.pop(database, None)
                    continue
            except (psycopg2.Error, OSError) as error:
                failed[database] = error, owed.delay
            later, delay = now + time.monotonic() - began + owed.delay, min(2 * owed.delay, LONGEST_DELAY)
            self._owed[database] = owed._replace(due=later, delay=delay)
        self.works = len(failed) < len(due) if due else self.works
        return failed

    def _look(self, database, overlap, now):
        """Return the channels that got rows, and the mark that this sets."""
        asked = self._asked.get(database, _Mark(self._began, None, [], 0))
        # A notification may have been on its way to a listener already lost: only
        # what was heard well before the last sign of life is sure.
        sure = [one for one in self._heard if one.at <= self._heard[-1].at - MARGIN]
        since = max(sure + [asked], key=lambda mark: mark.at)
        overlap = now - since.at + OVERLAP if overlap or since.snapshot is None else 0
        values = {"since": since.snapshot, "known": since.known, "overlap": overlap}
        with contextlib.closing(self._open(database)) as ordinary:
            if not ordinary.row("SELECT to_regclass('bus_bus') IS NOT NULL")[0]:
                return [], asked
            # There as well: who hangs up does not stop what the server is at.
            ordinary.execute("BEGIN; SET LOCAL statement_timeout = %d" % (LOOK_TIMEOUT * 1000))
            # Another table of that name, or a server that is behind, has other ids: dates tell.
            for values["floor"] in (asked.highest - LATE_IDS, 0):
                snapshot, highest, channels, known = ordinary.row(_MISSED, values, 4, LOOK_TIMEOUT + 1)
                if highest >= asked.highest and _next(snapshot) >= _next(since.snapshot or "0:0:"):
                    break
                values["overlap"] = now - since.at + OVERLAP
            ordinary.execute("COMMIT")
        return channels, _Mark(now, snapshot, known, highest)


def _next(snapshot):
    """Return the transaction id that comes next after a snapshot."""
    return int(snapshot.split(":")[1])

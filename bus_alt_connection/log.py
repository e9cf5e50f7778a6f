# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""The events of a listener, the log lines about them, and what never appears in a log line.

An outage is logged when it begins, once a minute while it lasts, and when it is over. If a token, the notification that
a check sends, does not arrive and an operator has to act, each new reason is logged at once.
"""

import collections
import contextlib
import logging
import re
import time
import traceback

_logger = logging.getLogger(__name__)

# Seconds between two log lines about the same problem.
REMINDER = 60.0
# Seconds that a line waits in a `Journal` during an outage or look-ups: reconnecting, checking and catching up come
# first.
LOG_DELAY = 0.5
# Lines that a `Journal` keeps. When it is full, the oldest is dropped. It fills up only if a log handler blocks for
# long.
LONGEST_JOURNAL = 1000

#: libpq keywords whose values must never be shown
SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
# Greedy, since a user who writes a password in the wrong place does not escape its characters.
_URI_PASSWORD = re.compile(r"(://[^:/@\s]*:).*@", re.DOTALL)
_DSN_PASSWORD = re.compile(r"((?:password|secret|client_key|server_key)\s*=\s*).+", re.IGNORECASE | re.DOTALL)

# The kinds of `Event`.
#: connecting failed
FAILED = "failed"
#: a token that was sent has arrived on ``session``, which is new or has new channels
CONFIRMED = "confirmed"
#: ``session`` was lost
LOST = "lost"
#: ``session`` is given up since a token did not arrive on it; an operator has to act
UNHEARD = "unheard"
#: ``session`` is given up for another one, without an outage
MOVED = "moved"

#: what a listener counts from its start: notifications on the channels that this process listens on; those that did
#: not fit into a feed; channels that were looked up in bus_bus and delivered; outages that are over; their length
COUNTERS = (
    "notifications_received",
    "notifications_dropped",
    "notifications_caught_up",
    "outages",
    "outage_seconds",
)
_TOTALS = (
    "Since the listener started: %(outages)d outage(s), %(outage_seconds).2f s;"
    " %(notifications_received)d notification(s) received, %(notifications_dropped)d dropped,"
    " %(notifications_caught_up)d caught up"
)

#: ``kind``: one of the above; ``session``: None if there was none; ``reason``: a string; for CONFIRMED,
#: the channels; ``at``: monotonic seconds
Event = collections.namedtuple("Event", "kind session reason at")


class Journal(object):
    """Log lines of threads that must not wait for a log handler, which may block for seconds.

    Any thread may add lines. One thread, the supervisor's, calls `write`. ``outages`` is an `OutageLog`. Calling a
    journal with an `Event` queues a call of ``outages`` with that event.
    """

    def __init__(self, outages):
        self._outages = outages
        self._entries = collections.deque(maxlen=LONGEST_JOURNAL)

    def __call__(self, event):
        self.add(self._outages, event)

    def add(self, write, *args):
        """Queue the call ``write(*args)``. The method `write` makes it later."""
        self._entries.append((time.monotonic() + LOG_DELAY, write, args))

    @property
    def due(self):
        """Monotonic time at which to call `write`; infinite if there is nothing to write."""
        with contextlib.suppress(IndexError):
            return self._entries[0][0]
        return float("inf")

    def write(self, now):  # pylint: disable=method-required-super
        """Write the lines that are due at ``now``. May block as long as the log handlers do."""
        while self._entries and self.due <= now:
            _due, write, args = self._entries.popleft()
            write(*args)


class OutageLog(object):
    """Write the log lines about the listener of ``database``. To be called with each `Event`, in order.

    An outage lasts from the first FAILED, LOST or UNHEARD to the next CONFIRMED. ``counters`` are those of the
    listener, see `COUNTERS`.
    """

    def __init__(self, database, counters):
        self._database = database
        self._counters = counters
        self._began = None
        self._reminded_at = None
        #: how many attempts of this outage have failed
        self._attempts = 0
        self._reasons_logged = set()
        self._listened_before = False

    def __call__(self, event):
        if event.kind == CONFIRMED:
            self._log_end(event)
        elif event.kind == MOVED:
            # Without a limit, leaders that come and go would fill the log; in an outage there are other lines.
            if self._began is None and rarely(("moved", self._database)):
                text = "the listener of database %s is switching to another connection: %s"
                _logger.info(text, self._database, event.reason)
        else:
            self._log_trouble(event)

    def _log_trouble(self, event):
        first = self._began is None
        if first:
            self._began = self._reminded_at = event.at
            self._attempts = 0
        if event.session is None or not first:
            self._attempts += 1
        if event.kind == UNHEARD and event.reason not in self._reasons_logged:
            # Each reason is logged at once: an operator has to do something about it.
            self._reasons_logged.add(event.reason)
            _logger.error("can't listen on database %s: %s", self._database, event.reason)
        elif first and event.session:
            text = "lost the listener of database %s: %s (it was backend pid %d at %s); trying again"
            facts = event.session.facts
            _logger.warning(text, self._database, event.reason, facts.backend_pid, facts.address)
        elif first:
            text = "can't listen on database %s: %s; trying again"
            _logger.error(text, self._database, event.reason)
        elif event.at - self._reminded_at >= REMINDER:
            self._reminded_at = event.at
            text = "still not listening on database %s: %s (for %.0f s, %d attempts)"
            _logger.warning(text, self._database, event.reason, event.at - self._began, self._attempts)

    def _log_end(self, event):
        session = event.session
        again, outage = "", ""
        if self._began is not None:
            seconds = event.at - self._began
            self._counters["outages"] += 1
            self._counters["outage_seconds"] = round(self._counters["outage_seconds"] + seconds, 3)
            outage = "; the outage took %.2f s and %d attempt(s). %s"
            outage %= seconds, self._attempts + 1, _TOTALS % self._counters
            again = " again" if self._listened_before else ""
        through = "at" if session.leader_pid is None else "through"
        text = "listening%s on %s %s %s (database %s, backend pid %d), confirmed in %.1f ms%s"
        facts, milliseconds = session.facts, session.round_trip * 1000
        _logger.info(
            text, again, event.reason, through, facts.address, self._database, facts.backend_pid, milliseconds, outage
        )
        self._began = None
        self._reasons_logged = set()
        self._listened_before = True


_last = {}


def rarely(problem):
    """Return True for ``problem`` at most once in `REMINDER` seconds.

    Each problem stays in memory for good. So pass only things that can take few values: kinds of problems, tracebacks
    of bugs, names of channels that PostgreSQL refused.
    """
    now = time.monotonic()
    if now - _last.get(problem, -REMINDER) < REMINDER:
        return False
    _last[problem] = now
    return True


def redact(text, parameters=(), lines=None):
    """Return ``text`` as one line and without passwords.

    This removes the passwords in ``parameters`` and those in anything that looks like a URI or DSN.
    ``lines``: how many lines of the text to use, None for all.
    """
    # DSN first: a password at the end of a URI, as in "?password=a@b", may have an "@" as well.
    text = _URI_PASSWORD.sub(r"\1***@", _DSN_PASSWORD.sub(r"\1***", str(text)))
    for secret in (parameters[keyword] for keyword in SECRETS if keyword in parameters):
        text = text.replace(str(secret), "***") if secret else text
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][:lines])


def log_bug(logger, error):
    """Log an unexpected exception and where it was raised, at most once a minute.

    ``exc_info`` would show the message unchanged, with any password in it.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    if rarely(where):
        logger.error("internal error, please report it: %s\n%s", redact(repr(error)), where)

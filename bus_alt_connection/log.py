# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""What happens to a listener, and what the log says of it; and what it never says.

One line when nothing is heard any more, a reminder a minute, one when all is well.
"""

import collections
import logging
import re
import time
import traceback

_logger = logging.getLogger(__name__)

# Seconds between two lines of the log on the same trouble.
REMINDER = 60.0

#: libpq keywords whose values are shown to nobody
SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
# Greedy, since whoever writes a password where none belongs won't escape it.
_URI_PASSWORD = re.compile(r"(://[^:/@\s]*:).*@", re.DOTALL)
_DSN_PASSWORD = re.compile(r"((?:password|secret|client_key|server_key)\s*=\s*).+", re.IGNORECASE | re.DOTALL)

# The kinds of `Event`.
#: no connection could be made
FAILED = "failed"
#: what was sent has arrived on ``session``, whose channels are new or all
CONFIRMED = "confirmed"
#: ``session`` was cut
LOST = "lost"
#: ``session`` is given up, since what was sent does not arrive there
DEAF = "deaf"
#: ``session`` is given up for another one: no outage
MOVED = "moved"

#: ``kind``: one of the above; ``session``: None if there is none; ``reason``: a text, of trouble
Event = collections.namedtuple("Event", "kind session reason")


class OutageLog(object):
    """Write the lines on the listener of ``database``. Called with each `Event`, one after the other.

    An outage is the time from the first event of another kind up to the next CONFIRMED.
    """

    def __init__(self, database):
        self._database = database
        self._began, self._told, self._listened = None, set(), False
        # Those of this outage, the next included.
        self._reminded, self._attempts = None, 0

    def __call__(self, event):
        if event.kind == CONFIRMED:
            self._tell_end(event.session)
            return
        if event.kind == MOVED:
            _logger.info("the listener of database %s moves: %s", self._database, event.reason)
            return
        now, first, what = time.monotonic(), self._began is None, (self._database, event.reason)
        if first:
            self._began = self._reminded = now
            self._attempts = 0 if event.session else 1
        self._attempts += 1
        if event.kind == DEAF and event.reason not in self._told:
            # An operator has to do something about it.
            self._told.add(event.reason)
            _logger.error("can't listen on database %s: %s", *what)
        elif first and event.session:
            text = "lost the listener of database %s: %s (it was backend pid %d at %s); trying again until it works"
            _logger.warning(text, *what, event.session.facts.backend_pid, event.session.facts.address)
        elif first:
            _logger.error("can't listen on database %s: %s; trying again until it works", *what)
        elif now - self._reminded >= REMINDER:
            self._reminded = now
            text = "still not listening on database %s: %s (for %.0f s, %d attempts)"
            _logger.warning(text, *what, now - self._began, self._attempts)

    def _tell_end(self, session):
        text, outage = "listening%s on %s %s %s (database %s, backend pid %d), confirmed in %.1f ms%s", ""
        if self._began is not None:
            outage = "; it took %.2f s and %d attempt(s)" % (time.monotonic() - self._began, self._attempts)
        again = " again" if outage and self._listened else ""
        where = "at" if session.host_kind is None else "through", session.facts.address
        what = (*where, self._database, session.facts.backend_pid, session.round_trip * 1000, outage)
        _logger.info(text, again, ", ".join(sorted(session.confirmed)), *what)
        self._began, self._told, self._listened = None, set(), True


_last = {}


def rarely(what):
    """Return True once in `REMINDER` seconds for each ``what``, of which there are few."""
    now = time.monotonic()
    if now - _last.get(what, -REMINDER) < REMINDER:
        return False
    _last[what] = now
    return True


def redact(text, parameters=(), lines=None):
    """Return so many ``lines`` of ``text``, None: all, without passwords and as one line.

    Passwords are those of ``parameters`` and whatever stands in a URI or DSN.
    """
    # In this order: a password at the end of a URI may have an "@" as well.
    text = _URI_PASSWORD.sub(r"\1***@", _DSN_PASSWORD.sub(r"\1***", str(text)))
    for secret in (parameters[keyword] for keyword in SECRETS if keyword in parameters):
        text = text.replace(str(secret), "***") if secret else text
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][:lines])


def log_bug(logger, error):
    """Log an exception that nobody thought of and where it came from, once a minute.

    Not with ``exc_info``, which would show the message as it is.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    if rarely(where):
        logger.error("internal error, please report it: %s\n%s", redact(repr(error)), where)

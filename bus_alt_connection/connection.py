# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""A connection to PostgreSQL that never waits without a deadline, and what is there.

psycopg2's ordinary connections wait in libpq for as long as the network likes, and
under gevent libpq's ``connect_timeout`` does not apply either, nor do its lists of
hosts. An asynchronous one leaves the waiting to us: the same code, bounded, in threads
and in greenlets.
"""

import collections
import contextlib
import selectors
import socket
import time

import psycopg2
from psycopg2 import extensions

from . import tasks
from .log import redact
from .settings import address

# Seconds, for one address. ``connect_timeout`` replaces it, if it is one.
CONNECT_TIMEOUT = 5.0
# Seconds, for one statement.
QUERY_TIMEOUT = 5.0
# Whole seconds, for each step of `keeps_session`.
PROBE_TIMEOUT = 1
# A path that died without a word is noticed in 15 + 3 * 5 seconds while it is idle,
# and in 10 while something is on the way. PostgreSQL's documentation of libpq tells
# which are seconds and which milliseconds.
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
if extensions.libpq_version() >= 120000:
    KEEPALIVES["tcp_user_timeout"] = 10000
# What to do about a listener that is connected to the wrong server.
SET_THEM_TO = "set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to"

# An unqualified name can mean an object that another user has put into schema public, if it matches the types of the
# arguments better than PostgreSQL's own (CVE-2018-1058). So the addon qualifies each name in its statements. "extract"
# needs no schema: PostgreSQL looks for it in pg_catalog only.
PID = "SELECT pg_catalog.pg_backend_pid()"
# A server is told from any other, a restarted or promoted copy included, by when it was started.
_FACTS = PID + (
    ", pg_catalog.pg_is_in_recovery(), pg_catalog.current_database()::pg_catalog.text,"
    " pg_catalog.current_setting('server_version'),"
    " (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8"
)
#: what is at the other end: ``pooled``: libpq was told another backend pid than the
#: server knows, so there is a pooler in between; the converse does not hold
Facts = collections.namedtuple("Facts", "address backend_pid pooled standby database version started")


class Connection(object):
    """One open connection, in autocommit mode, for one thread or greenlet.

    Its methods wait until the answer is there. `opening`, `asking` and `asking_row` are the same
    as tasks, see `tasks`: with them, one thread waits for several connections at once.

    Every method raises ``psycopg2.OperationalError`` once the connection is lost or
    a deadline has passed; the connection is of no use then. No message of a
    ``psycopg2.Error`` has a password or more than one line; ``sqlstate`` is the server's
    code, or None.
    """

    #: if it is true, it is to be given up, and nothing waits for an answer any more; any thread may set it
    fault = None

    def __init__(self, parameters):
        tasks.finish(self._connecting(parameters))

    @classmethod
    def opening(cls, parameters):
        """A task: connect, and return the connection."""
        opened = cls.__new__(cls)
        yield from opened._connecting(parameters)
        return opened

    def _connecting(self, parameters):
        self.parameters = parameters
        with self._plain_errors():
            self._cnx = psycopg2.connect(async_=1, **parameters)
            try:
                yield from self._waiting(max(int(parameters.get("connect_timeout") or 0), 0) or CONNECT_TIMEOUT)
                self.server_version = self._cnx.server_version
                self.prepare()
            except BaseException:
                # A task that is closed while it waits gets a GeneratorExit.
                self.close()
                raise

    def prepare(self):
        """Done last of connecting; raises ``psycopg2.Error`` if this place is of no use. May block."""

    def execute(self, query, values=None, timeout=QUERY_TIMEOUT):
        """Run one statement and return its rows, or None if it has none."""
        return tasks.finish(self.asking(query, values, timeout))

    def row(self, query, values=None, columns=1, timeout=QUERY_TIMEOUT):
        """Return the one row of ``query``, which has to have so many ``columns``."""
        return self._only_row(self.execute(query, values, timeout), columns)

    def asking(self, query, values=None, timeout=QUERY_TIMEOUT):
        """A task: `execute`."""
        with self._plain_errors():
            cursor = self._cnx.cursor()
            cursor.execute(query, values)
            yield from self._waiting(timeout)
            del self._cnx.notices[:]
            return cursor.fetchall() if cursor.description else None

    def asking_row(self, query, values=None, columns=1, timeout=QUERY_TIMEOUT):
        """A task: `row`."""
        rows = yield from self.asking(query, values, timeout)
        return self._only_row(rows, columns)

    def _only_row(self, rows, columns):
        if not rows or len(rows[0]) != columns:
            # Of a broken pooler, that is: the answer to somebody else's question.
            raise psycopg2.OperationalError("%s: not the answer" % address(self.parameters))
        return rows[0]

    def examine(self):
        """Return the `Facts` on what is at the other end."""
        return tasks.finish(self.examining())

    def examining(self):
        """A task: `examine`."""
        pid, *others = yield from self.asking_row(_FACTS, columns=5)
        return Facts(address(self.parameters), pid, pid != self._cnx.get_backend_pid(), *others)

    def receive(self):
        """Return the notifications that have arrived, without waiting for any."""
        with self._plain_errors():
            try:
                self._cnx.poll()
            except psycopg2.OperationalError as error:
                # Why the server hangs up arrives as a notice, if there is no statement.
                reason = (self._cnx.notices or [str(error)])[-1]
                raise psycopg2.OperationalError(reason) from None
        notifications = list(self._cnx.notifies)
        del self._cnx.notifies[:]
        return notifications

    def fileno(self):
        return self._cnx.fileno()

    def close(self):
        self._cnx.close()

    @contextlib.contextmanager
    def _plain_errors(self):
        try:
            yield
        except psycopg2.Error as error:
            # The first line tells; after it libpq only supposes.
            plain = type(error)(redact(str(error).strip() or repr(error), self.parameters, lines=1))
            plain.sqlstate = error.pgcode
            raise plain from None
        except UnicodeError:
            # psycopg2 itself refuses a statement that the database's encoding can't have.
            is_name = hasattr(self, "server_version")
            text = "some name has characters that the database's encoding does not have"
            plain = psycopg2.OperationalError(text if is_name else "some option is not UTF-8")
            plain.sqlstate = "22P05" if is_name else None
            raise plain from None

    def _waiting(self, timeout):
        deadline = time.monotonic() + timeout
        too_late = False
        for state in iter(self._cnx.poll, extensions.POLL_OK):
            if too_late:
                raise psycopg2.OperationalError("no answer in %g s" % timeout)
            event = selectors.EVENT_WRITE if state == extensions.POLL_WRITE else selectors.EVENT_READ
            # libpq may have gone on to another way to log in, hence another descriptor. While it
            # connects, it must not be polled before the descriptor is ready.
            while not (yield tasks.Wait(self._cnx.fileno(), event, deadline)):
                if self.fault or time.monotonic() >= deadline:
                    raise psycopg2.OperationalError("no answer in %g s" % timeout)
            # An answer that has arrived meanwhile counts; an endless one does not.
            too_late = time.monotonic() >= deadline


def connect(parameters, kind=Connection, last=()):
    """Return a `Connection`, or a ``kind`` of it, to the first of `attempts` that takes us.

    The places in the sequence ``last`` are tried last, in that order.
    Raises ``psycopg2.OperationalError`` with what each address had to say; ``reasons`` has
    the errors one by one.
    """
    return tasks.finish(opening(parameters, kind, last))


def opening(parameters, kind=Connection, last=()):
    """A task: `connect`. Only the resolver of host names may block."""
    reasons = []
    problems = []
    order = {known: number for number, known in enumerate(last)}
    for one in sorted(attempts(parameters), key=lambda each: order.get(place(each), -1)):
        try:
            return (yield from kind.opening(one))
        except psycopg2.Error as error:
            reasons.append(error)
            problems.append("%s: %s" % (address(one), error))
    failure = psycopg2.OperationalError(", ".join(problems))
    failure.reasons = reasons
    raise failure


def place(parameters):
    """Return what identifies the address in one of the `attempts`."""
    return tuple(parameters.get(keyword) for keyword in ("host", "hostaddr", "port"))


def attempts(parameters):
    """Return a list of ``parameters``, one for each host and each of its addresses.

    libpq would spend one deadline on all addresses of a name. As there, one port may
    stand for all hosts. Raises ``psycopg2.OperationalError`` if a list does not fit.
    """
    # An empty value would come before that of a service or PGHOST.
    own = dict(KEEPALIVES, **{keyword: value for keyword, value in parameters.items() if value not in (None, "")})
    if parameters.get("password") == "":
        # The settings want that, so that libpq reads the passfile instead of PGPASSWORD.
        own["password"] = ""
    lists = {keyword: str(own[keyword]).split(",") for keyword in ("host", "hostaddr", "port") if keyword in own}
    number = max(len(lists.get(keyword, "-")) for keyword in ("host", "hostaddr"))
    for keyword, values in lists.items():
        if len(values) != number and (keyword != "port" or len(values) > 1):
            raise psycopg2.OperationalError("%d values of %s for %d host(s)" % (len(values), keyword, number))
    found, problems = [], []
    for index in range(number):
        one = dict(own, **{keyword: values[index % len(values)].strip() for keyword, values in lists.items()})
        try:
            found += [dict(one, hostaddr=each) for each in _addresses(**one)] or [one]
        except (OSError, UnicodeError) as error:
            problems.append("%s: %s" % (address(one), getattr(error, "strerror", None) or error))
    if not found:
        raise psycopg2.OperationalError(", ".join(problems))
    return found


def _addresses(host="", hostaddr="", **_others):
    """Return those of a host name; none if it is a socket, or has one already."""
    if hostaddr or not host or host[0] in "/@":
        return ()
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return collections.OrderedDict.fromkeys(info[4][0] for info in found)


def keeps_session(parameters):
    """Return what `keeping_session` does."""
    return tasks.finish(keeping_session(parameters))


def keeping_session(parameters):
    """A task: return whether a connection keeps its server connection; None: can't tell.

    A pooler in transaction mode may hand on the pid of the server, but it gives us
    another server connection while somebody else has ours, or gives ours to them. It
    is asked repeatedly, since it may be busy with others.
    """
    try:
        quickly = dict(parameters, connect_timeout=PROBE_TIMEOUT)
        with contextlib.ExitStack() as stack:
            one = stack.enter_context(contextlib.closing((yield from opening(quickly))))
            other = stack.enter_context(contextlib.closing((yield from opening(quickly))))
            for _attempt in range(5):
                ours = yield from one.asking_row(PID, timeout=PROBE_TIMEOUT)
                theirs = yield from other.asking_row("BEGIN; " + PID, timeout=PROBE_TIMEOUT)
                # A pool that has no other connection would not answer.
                again = theirs != ours and (yield from one.asking_row(PID, timeout=PROBE_TIMEOUT))
                # A pooler ends a server connection if its client leaves within a transaction.
                yield from other.asking("ROLLBACK", timeout=PROBE_TIMEOUT)
                if again != ours:
                    return False
        return True
    except (psycopg2.Error, OSError):
        return None


def why_deaf(direct, ordinary):
    """Return why ``direct`` can't hear what is sent on ``ordinary``, both `Facts`."""
    there = direct.address
    if direct.standby:
        return "%s is a standby, and only a primary takes LISTEN" % there
    if direct.pooled:
        return "%s is a pooler that does not keep the connection for us; %s PostgreSQL itself" % (there, SET_THEM_TO)
    if direct.started != ordinary.started:
        return "%s is another server than the one that Odoo sends to; %s that one" % (there, SET_THEM_TO)
    if direct.database != ordinary.database:
        return "it listens on database %s, but Odoo sends on %s" % (direct.database, ordinary.database)
    return "the path to %s is silent, nothing comes through" % there

# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Connect to PostgreSQL, never wait without a deadline, and examine what a connection leads to.

psycopg2's ordinary connections wait in libpq without a limit. Under gevent, libpq's
``connect_timeout`` and lists of hosts do not work either. So the connections of this
module are asynchronous, and the module does the waiting: with deadlines, and with the
same code in threads and in greenlets. Only the resolution of a host name has no deadline here.
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

# Seconds to connect to one address. A positive ``connect_timeout`` replaces it.
CONNECT_TIMEOUT = 5.0
# Seconds for one statement.
QUERY_TIMEOUT = 5.0
# Whole seconds for each step of a quick test, such as `keeping_session`.
PROBE_TIMEOUT = 1
# A path that breaks silently is noticed after 15 + 3 * 5 seconds at most while it is idle; from libpq 12 on, after 10
# while data is on the way. In seconds; tcp_user_timeout in milliseconds.
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
if extensions.libpq_version() >= 120000:
    KEEPALIVES["tcp_user_timeout"] = 10000

# An unqualified name can mean an object that another user has put into schema public, if it matches the types of the
# arguments better than PostgreSQL's own (CVE-2018-1058). So the addon qualifies each name in its statements (except an
# ODOO_NOTIFY_FUNCTION, which Odoo calls in the same way), or first sets a search_path of pg_catalog, as `lookup` does.
# "extract" needs no schema: PostgreSQL looks for it in pg_catalog only.
PID = "SELECT pg_catalog.pg_backend_pid()"
# The last column identifies the server: a restarted server or a promoted copy has another start time.
_FACTS = PID + (
    ", pg_catalog.pg_is_in_recovery(), pg_catalog.current_database()::pg_catalog.text,"
    " pg_catalog.current_setting('server_version'),"
    " (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8"
)
# The oldest transaction of another client, as far as the role may see it.
_OLDEST_TRANSACTION = (
    "SELECT pid, application_name,"
    " pg_catalog.date_part('epoch'::pg_catalog.text, pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) xact_start)"
    " FROM pg_catalog.pg_stat_get_activity(NULL::pg_catalog.int4)"
    " WHERE xact_start IS NOT NULL AND pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()"
    " ORDER BY xact_start LIMIT 1"
)
#: what a connection leads to; ``pooled``: True if the server's backend pid differs from the one that libpq
#: received at login, which proves that there is a pooler in between. False proves nothing.
Facts = collections.namedtuple("Facts", "address backend_pid pooled standby database version started")


class Connection(object):
    """One open connection, in autocommit mode, for one thread or greenlet.

    Except for `receive`, its methods wait until the answer has arrived. `opening`, `asking`, `asking_row` and
    `examining` do the same as tasks (see `tasks`), so that one thread can wait for several connections.

    A method raises ``psycopg2.OperationalError`` when the connection is lost or a deadline has passed. The connection
    is unusable then, and methods may also raise ``InterfaceError``. The message of a ``psycopg2.Error`` never contains
    a password, nor more than one line. If the server answered a statement with the error, ``sqlstate`` is its code.
    """

    #: any thread may set this to a true value to give the connection up; a wait for an answer then ends soon
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
        """The last step of connecting, for subclasses. Raises ``psycopg2.Error`` to refuse this server. May block."""

    def execute(self, query, values=None, timeout=QUERY_TIMEOUT):
        """Run one statement and return its rows, or None if it has none."""
        return tasks.finish(self.asking(query, values, timeout))

    def row(self, query, values=None, columns=1, timeout=QUERY_TIMEOUT):
        """Return the first row of ``query``; raise ``psycopg2.OperationalError`` unless it has ``columns`` columns."""
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
            # A broken pooler returned the result of another client's query.
            raise psycopg2.OperationalError("%s returned the result of another query" % address(self.parameters))
        return rows[0]

    def examine(self):
        """Return the `Facts` on what the connection leads to."""
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
                # If no statement is running, the server's reason for closing the connection arrives as a notice.
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
            # The first line has the error. The other lines are libpq's guesses about its cause.
            plain = type(error)(redact(str(error).strip() or repr(error), self.parameters, lines=1))
            plain.sqlstate = error.pgcode
            raise plain from None
        except UnicodeError:
            # psycopg2 itself refuses a text that it can't encode for the database.
            is_name = hasattr(self, "server_version")
            text = "a name has characters that the database's encoding does not have"
            plain = psycopg2.OperationalError(text if is_name else "an option is not UTF-8")
            plain.sqlstate = "22P05" if is_name else None
            raise plain from None

    def _waiting(self, timeout):
        deadline = time.monotonic() + timeout
        too_late = False
        for state in iter(self._cnx.poll, extensions.POLL_OK):
            if too_late:
                raise psycopg2.OperationalError("no answer in %g s" % timeout)
            event = selectors.EVENT_WRITE if state == extensions.POLL_WRITE else selectors.EVENT_READ
            # libpq may have opened another connection, for example without TLS, which has another descriptor. While
            # libpq connects, it must not be polled before the descriptor is ready.
            while not (yield tasks.Wait(self._cnx.fileno(), event, deadline)):
                if self.fault or time.monotonic() >= deadline:
                    raise psycopg2.OperationalError("no answer in %g s" % timeout)
            # Accept an answer that is complete by now, but do not wait for the rest of one that is not.
            too_late = time.monotonic() >= deadline


def connect(parameters, session_type=Connection, last=()):
    """Return a `Connection`, or a ``session_type``, to the first of `attempts` that succeeds.

    Addresses in the sequence ``last`` are tried last, in that order. Raises ``psycopg2.OperationalError`` with the
    error of each address; its attribute ``reasons`` is the list of these errors, if there was an address to try.
    """
    return tasks.finish(opening(parameters, session_type, last))


def opening(parameters, session_type=Connection, last=()):
    """A task: `connect`. Only name resolution and `Connection.prepare` may block."""
    reasons = []
    problems = []
    order = {known: number for number, known in enumerate(last)}
    for attempt in sorted(attempts(parameters), key=lambda each: order.get(place(each), -1)):
        try:
            return (yield from session_type.opening(attempt))
        except psycopg2.Error as error:
            reasons.append(error)
            problems.append("%s: %s" % (address(attempt), error))
    failure = psycopg2.OperationalError(", ".join(problems))
    failure.reasons = reasons
    raise failure


def examining_once(opening_task):
    """A task: return the `Facts` on the connection that ``opening_task`` returns, and close that connection."""
    opened = yield from opening_task
    with contextlib.closing(opened):
        return (yield from opened.examining())


def place(parameters):
    """Return a tuple that identifies the address in ``parameters``, one of the `attempts`."""
    return tuple(parameters.get(keyword) for keyword in ("host", "hostaddr", "port"))


def attempts(parameters):
    """Return a list of dictionaries of libpq keywords, one for each address of each host.

    So each address gets a deadline of its own; libpq has none while it connects without blocking. As in libpq, one
    port may apply to all hosts. Raises ``psycopg2.OperationalError`` if the numbers of hosts, addresses and ports do
    not match, or if no name can be resolved.
    """
    # An empty value would override that of a service or PGHOST.
    own = dict(KEEPALIVES, **{keyword: value for keyword, value in parameters.items() if value not in (None, "")})
    if parameters.get("password") == "":
        # `settings` sets this, so that libpq reads the passfile instead of PGPASSWORD.
        own["password"] = ""
    lists = {keyword: str(own[keyword]).split(",") for keyword in ("host", "hostaddr", "port") if keyword in own}
    number = max(len(lists.get(keyword, "-")) for keyword in ("host", "hostaddr"))
    for keyword, values in lists.items():
        if len(values) != number and (keyword != "port" or len(values) > 1):
            raise psycopg2.OperationalError("%d values of %s for %d host(s)" % (len(values), keyword, number))
    found, problems = [], []
    for index in range(number):
        host = dict(own, **{keyword: values[index % len(values)].strip() for keyword, values in lists.items()})
        try:
            found += [dict(host, hostaddr=each) for each in _addresses(**host)] or [host]
        except (OSError, UnicodeError) as error:
            problems.append("%s: %s" % (address(host), getattr(error, "strerror", None) or error))
    if not found:
        raise psycopg2.OperationalError(", ".join(problems))
    return found


def _addresses(host="", hostaddr="", **_others):
    """Return the addresses of a host name; none if ``host`` is a socket, or the address is known already."""
    if hostaddr or not host or host[0] in "/@":
        return ()
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return collections.OrderedDict.fromkeys(info[4][0] for info in found)


def keeping_session(parameters):
    """A task: return whether a client keeps its server connection between transactions; None if unknown.

    Some poolers give the client the server's real pid at login, so that comparing pids does not reveal
    them, see `Facts`. But in transaction mode a pooler gives our server connection to another client, or
    another one to us. This asks repeatedly, since the pooler may be busy with others.
    """
    try:
        quickly = dict(parameters, connect_timeout=PROBE_TIMEOUT)
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(contextlib.closing((yield from opening(quickly))))
            other = stack.enter_context(contextlib.closing((yield from opening(quickly))))
            for _attempt in range(5):
                ours = yield from client.asking_row(PID, timeout=PROBE_TIMEOUT)
                theirs = yield from other.asking_row("BEGIN; " + PID, timeout=PROBE_TIMEOUT)
                # If the other client has our server connection, the pool may have no other one for us.
                again = theirs != ours and (yield from client.asking_row(PID, timeout=PROBE_TIMEOUT))
                # A pooler ends a server connection if its client leaves within a transaction.
                yield from other.asking("ROLLBACK", timeout=PROBE_TIMEOUT)
                if again != ours:
                    return False
        return True
    except (psycopg2.Error, OSError):
        return None


def finding_oldest_transaction(opened):
    """A task: return in words which client of the server at ``opened`` has the oldest transaction."""
    rows = yield from opened.asking(_OLDEST_TRANSACTION)
    if not rows:
        return "not visible to this role"
    pid, application, seconds = rows[0]
    # A client chooses the name of its application, which may contain anything.
    return redact("backend pid %d, application %s, for %.0f s" % (pid, ascii(application), seconds))


# What to do about a listener that is connected to the wrong server.
SET_THEM_TO = "set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to"


def why_deaf(direct, sender):
    """Return why ``direct`` does not receive what is sent on ``sender``, both `Facts`."""
    there = direct.address
    if direct.standby:
        return "%s is a standby, and only a primary accepts LISTEN" % there
    if direct.pooled:
        return "%s is a pooler that does not keep LISTEN; %s PostgreSQL's address" % (there, SET_THEM_TO)
    if direct.started != sender.started:
        return "%s is not the server that Odoo sends to; %s that server's address" % (there, SET_THEM_TO)
    if direct.database != sender.database:
        return "it listens on database %s, but Odoo sends on %s" % (direct.database, sender.database)
    return "%s accepts connections, but no notification arrives from it" % there

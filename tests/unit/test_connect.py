"""A connection has deadlines, each address one of its own, and messages without secrets."""

import contextlib
import errno
import socket

import psycopg2
import pytest
from psycopg2 import extensions

from bus_alt_connection import connection
from bus_alt_connection.connection import Connection, Facts, connect, keeps_session

SECRET = "zulu-s3cret"


class FakeLibpq:
    """As a connection of psycopg2. ``answer``: rows, or an exception; or a function of the statement."""

    server_version = 150000

    def __init__(self, silent=False, answer=(), told_pid=1):
        self.silent, self.answer, self.told_pid = silent, answer, told_pid
        self.statements, self.notices, self.notifies = [], [], []
        self.description, self.closed = True, False
        self._ends = socket.socketpair()
        self._rows = None

    def poll(self):
        return extensions.POLL_READ if self.silent else extensions.POLL_OK

    def cursor(self):
        return self

    def execute(self, query, values=None):
        self.statements.append(query)
        answer = self.answer(query) if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        self._rows = list(answer)

    def fetchall(self):
        return self._rows

    def fileno(self):
        return self._ends[0].fileno()

    def get_backend_pid(self):
        return self.told_pid

    def close(self):
        self.closed = True
        for end in self._ends:
            end.close()


@pytest.fixture
def libpq(monkeypatch):
    """Return a function that has psycopg2 connect with what it is given: a function of libpq's keywords."""
    made = []

    def use(make):
        def fake_connect(async_, **keywords):
            cnx = make(keywords)
            if isinstance(cnx, Exception):
                raise cnx
            made.append(cnx)
            return cnx

        monkeypatch.setattr(psycopg2, "connect", fake_connect)
        return made

    yield use
    for cnx in made:
        cnx.close()


@pytest.fixture
def names(monkeypatch):
    """Return a dictionary: what host names resolve to."""
    names = {}

    def resolve(host, port, *_arguments, **_named):
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names


# Attempts


# Connecting


def test_an_address_that_swallows_everything_does_not_use_up_the_time_of_the_next(names, libpq, monkeypatch):
    names.update(two=["192.0.2.1", "192.0.2.2"])
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)
    made = libpq(lambda keywords: FakeLibpq(silent=keywords.get("hostaddr") != "192.0.2.2"))
    with contextlib.closing(connect({"host": "two"})):
        assert [one.closed for one in made] == [True, False]


def test_what_each_address_had_to_say_is_told(names, libpq, monkeypatch):
    names.update(a=["192.0.2.1"], b=["192.0.2.2"])
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)

    def make(keywords):
        if keywords["host"] == "a":
            return psycopg2.OperationalError("FATAL: no\nIs the server running?\n")
        return FakeLibpq(silent=True)

    made = libpq(make)
    with pytest.raises(psycopg2.OperationalError) as raised:
        connect({"host": "a,b", "port": "1"})
    assert str(raised.value) == "a:1: FATAL: no, b:1: no answer in 0.1 s"
    assert made[0].closed


def test_libpqs_own_timeout_counts_if_it_is_one(names, libpq, monkeypatch):
    names.update(a=["192.0.2.1"])
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)
    libpq(lambda keywords: FakeLibpq(silent=True))
    for given, used in (("0", "0.1"), ("-1", "0.1"), ("1", "1")):
        with pytest.raises(psycopg2.OperationalError, match="no answer in %s s" % used):
            connect({"host": "a", "connect_timeout": given})


@pytest.mark.parametrize("where", ["connecting", "a statement", "receiving"])
def test_no_error_has_a_secret_or_a_second_line(names, libpq, where):
    names.update(a=["192.0.2.1"])
    error = psycopg2.OperationalError('role "%s" is wrong\nDETAIL: password=%s\n' % (SECRET, SECRET))
    libpq(lambda keywords: error if where == "connecting" else FakeLibpq(answer=error))
    with pytest.raises(psycopg2.OperationalError) as raised:
        opened = connect({"host": "a", "password": SECRET})
        if where == "receiving":
            opened._cnx.notices.append("FATAL: %s\nDETAIL: more" % SECRET)

            def lost():
                raise error

            opened._cnx.poll = lost
            opened.receive()
        opened.execute("SELECT 1")
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)
    assert "***" in str(raised.value)


def test_the_kind_of_an_error_is_kept(names, libpq):
    names.update(a=["192.0.2.1"])
    libpq(lambda keywords: FakeLibpq(answer=psycopg2.ProgrammingError("no such function")))
    with contextlib.closing(connect({"host": "a"})) as opened:
        with pytest.raises(psycopg2.ProgrammingError, match="no such function"):
            opened.execute("SELECT 1")


@pytest.mark.parametrize("rows", [[], [(1,)], [(1, 2, 3)], [()]])
def test_an_answer_with_other_columns_is_an_error_of_the_server(names, libpq, rows):
    names.update(a=["192.0.2.1"])
    libpq(lambda keywords: FakeLibpq(answer=rows))
    with contextlib.closing(connect({"host": "a"})) as opened:
        with pytest.raises(psycopg2.OperationalError, match="not the answer"):
            opened.row("SELECT 1, 2", columns=2)


@pytest.mark.parametrize("told_pid, pooled", [(42, False), (7, True)])
def test_it_is_examined_what_is_there(libpq, told_pid, pooled):
    libpq(lambda keywords: FakeLibpq(answer=[(42, False, "postgres", "15.3", 1000)], told_pid=told_pid))
    with contextlib.closing(Connection({"host": "a", "port": "1"})) as opened:
        assert opened.examine() == Facts("a:1", 42, pooled, False, "postgres", "15.3", 1000)


# Is it a pooler?


class Pooler:
    """Gives each transaction one of its server connections."""

    def __init__(self, *pids):
        self.idle = list(pids)

    def client(self, _keywords):
        held = []

        def answer(query):
            if query == "ROLLBACK":
                self.idle.append(held.pop())
                return []
            if "BEGIN" in query:
                held.append(self.idle.pop())
                return [(held[0],)]
            return [(self.idle[-1],)]

        return FakeLibpq(answer=answer)


def server():
    pids = iter(range(1, 1000))

    def client(_keywords):
        pid = next(pids)
        return FakeLibpq(answer=lambda query: [(pid,)])

    return client


def test_who_is_given_another_server_connection_while_others_have_it_is_behind_a_pooler(libpq):
    libpq(Pooler(11, 12).client)
    assert keeps_session({"hostaddr": "192.0.2.1"}) is False


def test_a_server_keeps_its_sessions(libpq):
    libpq(server())
    assert keeps_session({"hostaddr": "192.0.2.1"}) is True


@pytest.mark.parametrize(
    "error", [psycopg2.OperationalError("too many connections"), OSError(errno.EMFILE, "Too many open files")]
)
def test_who_can_not_be_asked_may_be_either(libpq, error):
    libpq(lambda keywords: error)
    assert keeps_session({"hostaddr": "192.0.2.1"}) is None

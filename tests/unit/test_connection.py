"""A connection has deadlines, each address one of its own, and says in one line without secrets why it fails."""

import contextlib
import errno
import re
import socket
import time

import psycopg2
import pytest
from psycopg2 import extensions

from bus_alt_connection import connection, log, settings
from bus_alt_connection.connection import Connection, Facts, attempts, connect, keeping_session
from bus_alt_connection.tasks import finish
from tests.support.secrets import SECRETS


class FakeLibpq:
    """As a connection of psycopg2.

    :ivar answer: rows, or an exception; or a function of the statement
    :ivar silent: whether it never answers
    :ivar lost: with which exception the connection is lost, or None
    """

    server_version = 150000

    def __init__(self, silent=False, answer=(), told_pid=1):
        self.silent, self.answer, self.told_pid = silent, answer, told_pid
        self.statements, self.notices, self.notifies = [], [], []
        self.description, self.closed, self.lost = True, False, None
        self._ends = socket.socketpair()
        self._rows = None

    def poll(self):
        if self.lost:
            raise self.lost
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
    """Return a function that has psycopg2 connect with what ``make(keywords)`` returns; it returns a list of them."""
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


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """The addresses of names, in place of those that the network knows."""
    resolve = socket.getaddrinfo
    addresses = {"db-01": ["192.0.2.1"], "db-02": ["192.0.2.2", "2001:db8::2"], "twice": ["192.0.2.3", "192.0.2.3"]}

    def getaddrinfo(host, port, *args, **kwargs):
        if host in addresses:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in addresses[host]]
        if host == "nowhere":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return addresses


# Attempts


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"host": None, "port": ""}, [("", "", "")]),
        # Odoo gives a port as a number.
        ({"host": "db-01", "port": 5433}, [("db-01", "192.0.2.1", "5433")]),
        ({"host": "db-01, twice", "port": "1, "}, [("db-01", "192.0.2.1", "1"), ("twice", "192.0.2.3", "")]),
        ({"host": "db-02", "port": "1"}, [("db-02", "192.0.2.2", "1"), ("db-02", "2001:db8::2", "1")]),
        ({"hostaddr": "192.0.2.8,192.0.2.9", "port": "1"}, [("", "192.0.2.8", "1"), ("", "192.0.2.9", "1")]),
        (
            {"host": "db-01,nowhere", "hostaddr": ",192.0.2.9"},
            [("db-01", "192.0.2.1", ""), ("nowhere", "192.0.2.9", "")],
        ),
        # A socket has no address.
        ({"host": "/run/postgresql,@abstract"}, [("/run/postgresql", "", ""), ("@abstract", "", "")]),
        # A name that nobody knows does not stand in the way of others.
        ({"host": "nowhere,db-01"}, [("db-01", "192.0.2.1", "")]),
    ],
)
def test_each_address_of_each_host_is_an_attempt(places, expected):
    found = attempts({"password": "", "keepalives_idle": "7", **places})
    assert [tuple(one.get(key) or "" for key in ("host", "hostaddr", "port")) for one in found] == expected
    for one in found:
        # Empty, as the settings want it for a passfile.
        assert one["password"] == ""
        assert {key: one[key] for key in connection.KEEPALIVES} == dict(connection.KEEPALIVES, keepalives_idle="7")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"host": "db-01,db-02", "port": "1,2,3"}, "3 .*port.* 2 host"),
        ({"host": "db-01,db-02", "hostaddr": "192.0.2.1"}, "1 .*addr.* 2 host"),
        # libpq refuses it as well: the name may be that of one of them only.
        ({"host": "db-01", "hostaddr": "192.0.2.1,192.0.2.2"}, "1 .*host.* 2 host"),
        ({"host": "nowhere,nowhere"}, "nowhere:5432: Name or service not known, nowhere:5432: "),
        # Python itself refuses these names.
        ({"host": "a" * 64}, "a" * 64 + ":5432: "),
    ],
)
def test_where_there_is_nothing_to_try_the_error_says_why(places, words):
    with pytest.raises(psycopg2.OperationalError) as raised:
        connect(places)
    assert re.search(words, str(raised.value))


# Connecting


def test_each_address_has_its_own_deadline_and_its_own_say(names, libpq, monkeypatch):
    names.update(two=["192.0.2.1", "192.0.2.2"])
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)
    made = libpq(lambda keywords: FakeLibpq(silent=keywords["hostaddr"] == "192.0.2.1"))
    with contextlib.closing(connect({"host": "two"})):
        assert [one.closed for one in made] == [True, False]
    errors = {"192.0.2.1": psycopg2.OperationalError("FATAL: no\nIs the server running?\n")}
    made = libpq(lambda keywords: errors.get(keywords["hostaddr"]) or FakeLibpq(silent=True))
    with pytest.raises(psycopg2.OperationalError) as raised:
        connect({"host": "two", "port": "1"})
    assert str(raised.value) == "two:1: FATAL: no, two:1: no answer in 0.1 s"
    assert made[-1].closed


@pytest.fixture
def place(monkeypatch):
    """A port that accepts clients and never answers; those of libpq are given up soon."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as place:
        place.setblocking(False)
        yield place


def has_come(place):
    """Return whether a client has connected since the last call."""
    with contextlib.suppress(BlockingIOError):
        place.accept()[0].close()
        return True
    return False


def refusal(place, options=(), **own):
    """Return why nobody can connect with these ``IMDISPATCHER_DB_...``, where Odoo itself would go to ``place``."""
    found = settings.read({"IMDISPATCHER_DB_" + name: value for name, value in dict(options).items()}, {})
    assert found.errors == []
    odoos = {"dbname": "a", "host": "127.0.0.1", "port": place.getsockname()[1], "user": "odoo", "sslmode": "prefer"}
    with pytest.raises(psycopg2.OperationalError) as raised:
        connect(found.parameters({**odoos, **own}))
    return str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"PORT": "54x2"}, "54x2"),
        ({"TARGET_SESSION_ATTRS": "primry"}, "invalid target_session_attrs value"),
    ],
)
def test_what_libpq_refuses_is_told_in_its_words_and_nothing_connects(options, words, place):
    assert words in refusal(place, options)
    assert not has_come(place)


def test_a_listener_goes_where_its_service_says(place, tmp_path, monkeypatch):
    (tmp_path / "services").write_text("[direct]\nhost=127.0.0.1\nport=%d\n" % place.getsockname()[1])
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    with socket.create_server(("127.0.0.1", 0)) as pooler:
        pooler.setblocking(False)
        assert refusal(pooler, {"SERVICE": "direct"}) == "service direct: no answer in 0.1 s"
        assert has_come(place) and not has_come(pooler)


@pytest.mark.parametrize("timeout", [None, "0", "-1", "1"])
def test_one_deadline_is_for_the_whole_of_an_attempt(timeout, place):
    began = time.monotonic()
    # libpq asks for TLS first, and gets no answer to that either.
    message = refusal(place, connect_timeout=timeout)
    assert message.endswith("no answer in %s s" % ("1" if timeout == "1" else "0.1"))
    assert time.monotonic() - began < 3


# Errors


@pytest.mark.parametrize("where", ["connecting", "a statement", "receiving"])
@pytest.mark.parametrize("keyword", log.SECRETS)
def test_no_error_has_a_secret_or_a_second_line(libpq, where, keyword):
    for secret in SECRETS:
        error = psycopg2.OperationalError('role "%s" is wrong\nDETAIL: password=%s\n' % (secret, secret))
        libpq(lambda keywords, error=error: error if where == "connecting" else FakeLibpq(answer=error))
        with pytest.raises(psycopg2.OperationalError) as raised:
            opened = connect({"host": "db-01", keyword: secret})
            if where == "receiving":
                opened._cnx.lost = error
                opened.receive()
            opened.execute("SELECT 1")
        assert secret not in str(raised.value) and "\n" not in str(raised.value)
        assert "***" in str(raised.value)


@pytest.mark.parametrize("keyword", ["user", "password"])
def test_a_value_that_is_no_text_is_an_error_without_it(keyword):
    with pytest.raises(psycopg2.OperationalError, match="is not UTF-8") as raised:
        connect({"host": "127.0.0.1", "port": "1", keyword: "zulu-s3cret\udce9"})
    assert "zulu" not in str(raised.value)


@pytest.mark.parametrize("rows", [[], [(1,)], [(1, 2, 3)], [()]])
def test_an_answer_with_other_columns_is_an_error(libpq, rows):
    libpq(lambda keywords: FakeLibpq(answer=rows))
    with contextlib.closing(connect({"host": "db-01"})) as opened:
        with pytest.raises(psycopg2.OperationalError, match="returned the result of another query"):
            opened.row("SELECT 1, 2", columns=2)


# What is at the other end


@pytest.mark.parametrize("told_pid, pooled", [(42, False), (7, True)])
def test_another_pid_than_libpq_was_told_means_a_pooler(libpq, told_pid, pooled):
    libpq(lambda keywords: FakeLibpq(answer=[(42, False, "postgres", "15.3", 1000)], told_pid=told_pid))
    with contextlib.closing(Connection({"host": "a", "port": "1"})) as opened:
        assert opened.examine() == Facts("a:1", 42, pooled, False, "postgres", "15.3", 1000)


@pytest.mark.parametrize("is_pooler", [True, False])
def test_a_pooler_is_told_by_giving_our_server_connection_to_others(libpq, is_pooler):
    """The pooler gives each transaction one of two server connections; a server has one for each client."""
    idle = [11, 12]

    def connect_client(_keywords):
        held = [] if is_pooler else [len(made)]

        def answer(query):
            if not is_pooler:
                return [held]
            if query == "ROLLBACK":
                idle.append(held.pop())
            if "BEGIN" in query:
                held.append(idle.pop())
            return [held or idle[-1:]]

        return FakeLibpq(answer=answer)

    made = libpq(connect_client)
    assert finish(keeping_session({"hostaddr": "192.0.2.1"})) is not is_pooler


def test_a_pooler_that_has_no_connection_left_is_not_judged(libpq):
    for error in (psycopg2.OperationalError("too many connections"), OSError(errno.EMFILE, "Too many open files")):
        libpq(lambda _keywords, error=error: error)
        assert finish(keeping_session({"hostaddr": "192.0.2.1"})) is None


DIRECT = Facts("db-01:5432", 2, False, False, "postgres", "15.18", 1000)
ORDINARY = Facts("pgbouncer:6432", 1, True, False, "postgres", "15.18", 1000)
POOLER = "db-01:5432 is a pooler that does not keep LISTEN; set IMDISPATCHER_DB_HOST and "


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        ({"version": "14.21", "backend_pid": 3}, "db-01:5432 accepts connections, but no notification arrives from it"),
        ({"database": "other"}, "it listens on database other, but Odoo sends on postgres"),
        # Of several reasons the first is what has to be mended whatever the others are.
        ({"started": 999, "database": "other"}, "db-01:5432 is not the server that Odoo sends to; set "),
        ({"pooled": True, "started": 999, "database": "other"}, POOLER),
        (
            {"standby": True, "pooled": True, "started": 999},
            "db-01:5432 is a standby, and only a primary accepts LISTEN",
        ),
    ],
)
def test_the_first_reason_to_be_deaf_is_told(different, sentence):
    assert connection.why_deaf(DIRECT._replace(**different), ORDINARY).startswith(sentence)

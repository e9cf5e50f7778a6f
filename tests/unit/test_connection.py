"""Which places are tried, with which deadlines and in whose words they refuse; on libpq itself, but no PostgreSQL."""

import contextlib
import re
import socket
import struct
import threading
import time

import psycopg2
import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from psycopg2 import extensions

from bus_alt_connection import connection, log, settings

# Attempts -------------------------------------------------------------------------------------------------------------

ADDRESSES = {"db-01": ["192.0.2.1"], "db-02": ["192.0.2.2", "2001:db8::2"], "twice": ["192.0.2.3", "192.0.2.3"]}


@pytest.fixture
def names(monkeypatch):
    """The addresses of names, in place of those that the network knows."""
    addresses = dict(ADDRESSES)

    def getaddrinfo(host, port, *_args, **_kwargs):
        if host not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in addresses[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return addresses


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({}, [("", "", "")]),
        ({"host": None, "port": ""}, [("", "", "")]),
        ({"host": "db-01"}, [("db-01", "192.0.2.1", "")]),
        # As Odoo has it.
        ({"host": "db-01", "port": 5433}, [("db-01", "192.0.2.1", "5433")]),
        # A list; one port may stand for all.
        ({"host": "db-01,twice"}, [("db-01", "192.0.2.1", ""), ("twice", "192.0.2.3", "")]),
        ({"host": "db-01,twice", "port": "1"}, [("db-01", "192.0.2.1", "1"), ("twice", "192.0.2.3", "1")]),
        ({"host": "db-01,twice", "port": "1,2"}, [("db-01", "192.0.2.1", "1"), ("twice", "192.0.2.3", "2")]),
        ({"host": "db-01, twice", "port": "1, "}, [("db-01", "192.0.2.1", "1"), ("twice", "192.0.2.3", "")]),
        # Each address of a name.
        ({"host": "db-02", "port": "1"}, [("db-02", "192.0.2.2", "1"), ("db-02", "2001:db8::2", "1")]),
        (
            {"host": "db-02,db-01", "port": "1,2"},
            [("db-02", "192.0.2.2", "1"), ("db-02", "2001:db8::2", "1"), ("db-01", "192.0.2.1", "2")],
        ),
        # Who gives an address is not asked for the name's, which is for the certificate.
        ({"host": "db-02", "hostaddr": "192.0.2.9"}, [("db-02", "192.0.2.9", "")]),
        ({"hostaddr": "192.0.2.8,192.0.2.9", "port": "1"}, [("", "192.0.2.8", "1"), ("", "192.0.2.9", "1")]),
        (
            {"host": "db-01,nowhere", "hostaddr": ",192.0.2.9"},
            [("db-01", "192.0.2.1", ""), ("nowhere", "192.0.2.9", "")],
        ),
        # Sockets have none.
        ({"host": "/run/postgresql"}, [("/run/postgresql", "", "")]),
        ({"host": "@abstract"}, [("@abstract", "", "")]),
        (
            {"host": "/run/postgresql,db-01", "port": ",5433"},
            [("/run/postgresql", "", ""), ("db-01", "192.0.2.1", "5433")],
        ),
        # A name that nobody knows does not stand in the way of others.
        ({"host": "nowhere,db-01"}, [("db-01", "192.0.2.1", "")]),
    ],
)
def test_each_address_of_each_host_is_an_attempt(places, expected, names):
    found = connection.attempts({"user": "odoo", "dbname": "postgres", **places})
    assert [tuple(one.get(key) or "" for key in ("host", "hostaddr", "port")) for one in found] == expected
    assert all((one["user"], one["dbname"]) == ("odoo", "postgres") for one in found)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"host": "db-01,db-02", "port": "1,2,3"}, "3 .*port.* 2 host"),
        ({"host": "db-01", "port": "1,2"}, "2 .*port.* 1 host"),
        ({"port": "1,2"}, "2 .*port.* 1 host"),
        ({"host": "db-01,db-02", "hostaddr": "192.0.2.1"}, "1 .*addr.* 2 host"),
        # libpq refuses it as well: the name may be that of one of them only.
        ({"host": "db-01", "hostaddr": "192.0.2.1,192.0.2.2"}, "1 .*host.* 2 host"),
        ({"host": "nowhere", "port": "1"}, "nowhere:1: Name or service not known"),
        ({"host": "nowhere,gone"}, "nowhere:5432: Name or service not known, gone:5432: "),
        # None that could be one, which Python finds in a way of its own.
        ({"host": "a" * 64}, "a" * 64 + ":5432: "),
        ({"host": "db..01"}, r"db\.\.01:5432: "),
    ],
)
def test_where_there_is_nothing_to_try_it_is_said_why(places, words, request):
    if words.startswith(("nowhere", "1", "2", "3")):
        request.getfixturevalue("names")
    with pytest.raises(psycopg2.OperationalError) as raised:
        connection.attempts(places)
    assert re.search(words, str(raised.value))


def test_keepalives_are_ours_unless_configured(names):
    for one in connection.attempts({"host": "db-02", "keepalives_idle": "7"}):
        assert {key: one[key] for key in connection.KEEPALIVES} == dict(connection.KEEPALIVES, keepalives_idle="7")


class Session:
    """Stands in for a connection."""

    def __init__(self, parameters):
        if parameters["hostaddr"] != "192.0.2.1":
            raise psycopg2.OperationalError("away")
        self.parameters = parameters

    @classmethod
    def opening(cls, parameters):
        yield from ()
        return cls(parameters)


def test_the_first_that_takes_us_is_taken(names):
    assert connection.connect({"host": "db-02,db-01,twice"}, Session).parameters["host"] == "db-01"


def test_if_none_takes_us_each_is_heard(names):
    with pytest.raises(psycopg2.OperationalError) as raised:
        connection.connect({"host": "db-02,twice", "port": "5,6"}, Session)
    assert str(raised.value) == "db-02:5: away, db-02:5: away, twice:6: away"


# On libpq -------------------------------------------------------------------------------------------------------------


class Place:
    """A port that counts clients, and refuses them with ``words`` as PostgreSQL does; None: it never answers."""

    def __init__(self, words=None, address="127.0.0.1", port=0):
        self.socket = socket.create_server((address, port))
        self.port = self.socket.getsockname()[1]
        self.words = words
        self.clients = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        # Wakes who accepts, as close alone does not.
        self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.socket.close()
        for client, _began in self.clients:
            client.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _address = self.socket.accept()
                self.clients.append((client, time.monotonic()))
                if self.words:
                    client.recv(4096)
                    error = b"SFATAL\0VFATAL\0C28000\0M%s\0\0" % self.words.encode()
                    client.sendall(b"E" + struct.pack("!i", len(error) + 4) + error)


@pytest.fixture
def place():
    with Place("no entry") as place:
        yield place


def own(place, **others):
    """What Odoo would connect with."""
    return {
        "dbname": "postgres",
        "host": "127.0.0.1",
        "port": place.port,
        "user": "odoo",
        "password": "S3CR3T",
        "sslmode": "prefer",
        **others,
    }


def refusal(parameters):
    with pytest.raises(psycopg2.OperationalError) as raised:
        connection.connect(parameters)
    message = str(raised.value)
    assert "S3CR3T" not in message
    assert len(message.splitlines()) == 1
    return message


def known_to_libpq(keyword):
    with contextlib.suppress(psycopg2.ProgrammingError):
        return bool(extensions.parse_dsn(keyword + "=0"))


#: what is wrong, and libpq's words
REFUSED = [
    ({"PORT": "54x2"}, "54x2"),
    ({"PORT": "0"}, "invalid port number"),
    ({"PORT": "65536"}, "invalid port number"),
    ({"PORT": "5432;5433"}, "5432;5433"),
    ({"HOSTADDR": "nonsense"}, "nonsense"),
    ({"SERVICE": "of_nobody"}, "of_nobody"),
    ({"CHANNEL_BINDING": "maybe"}, "invalid channel_binding value"),
    ({"REQUIRE_AUTH": "nonsense"}, "invalid require_auth value"),
    ({"GSSENCMODE": "maybe"}, "invalid gssencmode value"),
    ({"TARGET_SESSION_ATTRS": "primry"}, "invalid target_session_attrs value"),
    ({"SSL_MIN_PROTOCOL_VERSION": "TLSv9"}, 'value: "TLSv9"'),
    (
        {"SSL_MIN_PROTOCOL_VERSION": "TLSv1.3", "SSL_MAX_PROTOCOL_VERSION": "TLSv1.2"},
        "invalid SSL protocol version range",
    ),
    # Odoo's own sslmode is too weak for it.
    ({"SSLROOTCERT": "system"}, 'weak sslmode "prefer" may not be used with sslrootcert=system'),
]


@pytest.mark.parametrize(
    "options, words",
    [one for one in REFUSED if all(known_to_libpq(name.lower()) for name in one[0])],
    ids=lambda one: ",".join("%s=%s" % item for item in one.items()) if isinstance(one, dict) else "",
)
def test_what_libpq_refuses_is_told_in_its_words_and_nothing_connects(options, words, place):
    found = settings.read({"IMDISPATCHER_DB_" + name: value for name, value in options.items()}, {})
    assert found.errors == []
    assert words in refusal(found.parameters(own(place)))
    assert place.clients == []


@pytest.mark.parametrize("keyword", ["KEEPALIVES", "KEEPALIVES_IDLE", "TCP_USER_TIMEOUT"])
def test_a_number_that_is_none_is_refused_by_libpq(keyword, place):
    found = settings.read({"IMDISPATCHER_DB_" + keyword: "soon"}, {})
    assert keyword.lower() in refusal(found.parameters(own(place)))


def test_an_option_that_we_refuse_connects_nowhere(place):
    for name, value in {"SSLMODE": "verify_full", "SSL_MODE": "verify-full", "HOST": "odoo@127.0.0.1"}.items():
        with pytest.raises(psycopg2.OperationalError):
            found = settings.read({"IMDISPATCHER_DB_" + name: value}, {})
            connection.connect(found.parameters(own(place)))
    assert place.clients == []


def test_what_the_other_side_says_is_told_with_its_address(place):
    message = refusal(own(place, sslmode="disable"))
    assert message.startswith("127.0.0.1:%d: " % place.port)
    assert "FATAL:  no entry" in message
    assert len(place.clients) == 1


def test_a_service_is_where_it_says(place, tmp_path, monkeypatch):
    (tmp_path / "services").write_text("[direct]\nhost=127.0.0.1\nport=%d\nsslmode=disable\n" % place.port)
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    with Place() as pooler:
        found = settings.read({"IMDISPATCHER_DB_SERVICE": "direct"}, {})
        message = refusal(found.parameters(own(pooler)))
        assert message.startswith("service direct: ")
        assert "no entry" in message
        assert pooler.clients == []


def test_what_odoo_leaves_to_libpq_is_left_to_it(place, monkeypatch):
    # Its host and port, if it has none: those of the environment.
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(place.port))
    assert "no entry" in refusal({"dbname": "postgres", "user": "odoo", "sslmode": "disable"})
    assert len(place.clients) == 1


def test_each_address_of_a_name_has_its_own_deadline(place, names):
    names["db-01"] = ["127.0.0.2", "127.0.0.1"]
    with Place(address="127.0.0.2", port=place.port) as swallowing:
        parameters = own(place, host="db-01", connect_timeout="1", sslmode="disable")
        began = time.monotonic()
        message = refusal(parameters)
        assert "db-01:%d: no answer in 1 s, db-01:%d: " % (place.port, place.port) in message
        assert "no entry" in message
        assert len(swallowing.clients) == len(place.clients) == 1
        assert 0.9 < place.clients[0][1] - swallowing.clients[0][1] < 3
        assert time.monotonic() - began < 4


def test_a_deadline_is_the_whole_of_one_attempt():
    with Place() as swallowing:
        # libpq asks for TLS first, and gets no answer to that either.
        for sslmode in "disable", "prefer":
            began = time.monotonic()
            refused = refusal(own(swallowing, connect_timeout="1", sslmode=sslmode))
            assert refused.endswith("no answer in 1 s")
            assert 0.9 < time.monotonic() - began < 3


@pytest.mark.parametrize("value", [None, "", "0", "-1", 0])
def test_no_timeout_is_our_own_timeout(value, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.2)
    with Place() as swallowing:
        assert refusal(own(swallowing, connect_timeout=value)).endswith("no answer in 0.2 s")


# No environment variable holds a zero byte.
_text = strategies.text(strategies.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
_text |= strategies.text(" \n'\"\\/@:;=%&", max_size=5)


@hypothesis_settings(deadline=None)
@given(_text, _text, strategies.sampled_from(log.SECRETS))
def test_a_secret_that_libpq_names_is_not_told(before, after, keyword):
    secret = before + "S3CR3T" + after

    def connect(**_parameters):
        # As libpq 18 does with the keys of SCRAM.
        raise psycopg2.OperationalError('invalid %s value: "%s"\n' % (keyword, secret))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg2, "connect", connect)
        parameters = {"host": "/nowhere", keyword: secret}
        assert refusal(parameters).startswith("/nowhere:5432: invalid ")


# Why it is deaf -------------------------------------------------------------------------------------------------------

DIRECT = connection.Facts("db-01:5432", 2, False, False, "postgres", "15.18", 1000)
ORDINARY = connection.Facts("pgbouncer:6432", 1, True, False, "postgres", "15.18", 1000)
MEND = "; set IMDISPATCHER_DB_HOST and IMDISPATCHER_DB_PORT to "


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        ({}, "the path to db-01:5432 is silent, nothing comes through"),
        (
            {"pooled": True},
            "db-01:5432 is a pooler that does not keep the connection for us" + MEND + "PostgreSQL itself",
        ),
        ({"started": 999}, "db-01:5432 is another server than the one that Odoo sends to" + MEND + "that one"),
        ({"standby": True}, "db-01:5432 is a standby, and only a primary takes LISTEN"),
        ({"database": "other"}, "it listens on database other, but Odoo sends on postgres"),
        # What comes first of several: what has to be mended whatever the others are.
        ({"standby": True, "pooled": True, "started": 999}, "db-01:5432 is a standby, and only a primary takes LISTEN"),
        (
            {"pooled": True, "started": 999, "database": "other"},
            "db-01:5432 is a pooler that does not keep the connection",
        ),
        ({"started": 999, "database": "other"}, "db-01:5432 is another server than the one that Odoo sends to"),
        # Another version, or backend, is no reason.
        ({"version": "14.21", "backend_pid": 3}, "the path to db-01:5432 is silent, nothing comes through"),
    ],
)
def test_why_it_is_deaf_is_said_in_a_sentence(different, sentence):
    assert connection.why_deaf(DIRECT._replace(**different), ORDINARY).startswith(sentence)


@pytest.mark.parametrize("keyword", ["user", "password", "sslrootcert"])
def test_a_value_that_is_no_text_is_an_error_without_it(keyword):
    with pytest.raises(psycopg2.OperationalError) as refused:
        connection.connect({"host": "127.0.0.1", "port": "1", keyword: "zulu-s3cret\udce9"})
    assert "is not UTF-8" in str(refused.value)
    assert "zulu" not in str(refused.value)


def test_places_that_were_of_no_use_are_tried_last(monkeypatch):
    """A stale primary takes LISTEN, but nothing is sent there."""
    tried = []

    class Refused(connection.Connection):
        @classmethod
        def opening(cls, parameters):
            tried.append(parameters["host"])
            yield from ()
            raise psycopg2.OperationalError("refused")

    parameters = {"host": "/a,/b,/c", "port": "5432"}
    places = {one["host"]: connection.place(one) for one in connection.attempts(parameters)}
    for last, order in (((), "abc"), (("/a",), "bca"), (("/b", "/a"), "cba"), (("/a", "/b", "/c"), "abc")):
        del tried[:]
        with pytest.raises(psycopg2.OperationalError):
            connection.connect(parameters, Refused, [places[host] for host in last])
        assert tried == ["/" + letter for letter in order]

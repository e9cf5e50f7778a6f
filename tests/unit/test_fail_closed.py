"""A wrong setting never leads to a connection with less protection than was asked for, and the log names it."""

import contextlib
import socket

import psycopg2
import pytest

from bus_alt_connection import connection, settings

WRONG = [
    ("SSLMODE", "verify_full", "verify-full"),
    ("SSLMODE", "Verify-Full", "verify-full"),
    ("SSLMODE", "requires", "require"),
    ("SSL_MODE", "verify-full", "IMDISPATCHER_DB_SSLMODE"),
    ("SSLROOTCRT", "/root.crt", "IMDISPATCHER_DB_SSLROOTCERT"),
    ("PASSWRD", "s3cret", "IMDISPATCHER_DB_PASSWORD"),
    ("HOST", "postgresql://odoo:s3cret@db-01", None),
    ("HOST", "odoo:s3cret@db-01", None),
    ("USER", "postgresql://odoo:s3cret@db-01", None),
    ("CONNECT_TIMEOUT", "10s", None),
    ("NONSENSE", "s3cret", None),
]
#: what only libpq knows to be wrong
REFUSED_BY_LIBPQ = [
    ("CHANNEL_BINDING", "required"),
    ("REQUIRE_AUTH", "scram"),
    ("SSL_MIN_PROTOCOL_VERSION", "TLS1.2"),
    ("PORT", "54323x"),
    ("PORT", "5432,5433"),
    ("SSLROOTCERT", "system"),
    ("TARGET_SESSION_ATTRS", "primaries"),
]


@pytest.fixture
def way():
    """What Odoo itself connects with, and a function that says whether anybody has come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def came():
            with contextlib.suppress(BlockingIOError):
                server.accept()[0].close()
                return True
            return False

        own = {"host": "127.0.0.1", "port": server.getsockname()[1], "user": "odoo", "sslmode": "prefer"}
        yield dict(own, dbname="postgres", connect_timeout="1"), came


@pytest.mark.parametrize("name, value, meant", WRONG)
def test_a_wrong_option_is_refused_and_named(name, value, meant):
    found = settings.read({"IMDISPATCHER_DB_" + name: value}, {})
    assert found.refused == ["IMDISPATCHER_DB_" + name]
    (line,) = found.errors
    assert line.startswith("IMDISPATCHER_DB_%s is" % name)
    assert not meant or "Did you mean %s?" % meant in line
    assert "s3cret" not in line and value not in line.replace(meant or "", "")
    with pytest.raises(psycopg2.OperationalError, match="the ERROR on each at the start of Odoo"):
        found.parameters({"host": "pooler", "dbname": "postgres"})


@pytest.mark.parametrize("name, value", [one[:2] for one in WRONG] + REFUSED_BY_LIBPQ)
def test_nobody_is_connected_to_with_a_wrong_option(way, name, value):
    own, came = way
    found = settings.read({"IMDISPATCHER_DB_" + name: value}, {})
    with pytest.raises(psycopg2.OperationalError) as raised:
        connection.connect(found.parameters(own)).close()
    assert not came(), raised.value
    assert "s3cret" not in str(raised.value)


def test_the_trial_works_with_right_options(way):
    own, came = way
    found = settings.read({"IMDISPATCHER_DB_SSLMODE": "verify-full", "IMDISPATCHER_DB_CHANNEL_BINDING": "require"}, {})
    with pytest.raises(psycopg2.OperationalError):
        connection.connect(found.parameters(own)).close()
    assert came()


def test_one_wrong_option_is_enough_and_all_are_named():
    found = settings.read(
        {
            "IMDISPATCHER_DB_HOST": "db-01",
            "IMDISPATCHER_DB_SSLMODE": "verify_full",
            "ODOO_IMDISPATCHER_DB_SSL_ROOT_CERT": "x",
        },
        {"imdispatcher_db_prot": "5432"},
    )
    assert sorted(found.refused) == [
        "IMDISPATCHER_DB_SSLMODE",
        "ODOO_IMDISPATCHER_DB_SSL_ROOT_CERT",
        "imdispatcher_db_prot",
    ]
    assert len(found.errors) == 3
    assert any("Did you mean imdispatcher_db_port?" in line for line in found.errors)
    assert any("Did you mean ODOO_IMDISPATCHER_DB_SSLROOTCERT?" in line for line in found.errors)


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "inf", "1e9"])
def test_an_interval_that_is_none_keeps_nobody_from_connecting(value):
    found = settings.read({"IMDISPATCHER_CHECK_INTERVAL": value}, {})
    assert found.check_interval == 60 and not found.refused
    assert "IMDISPATCHER_CHECK_INTERVAL is not a number of seconds" in found.errors[0]


def test_a_service_says_where(monkeypatch, tmp_path, way):
    own, came_to_pooler = way
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        path = tmp_path / "services"
        path.write_text("[direct]\nhost=127.0.0.1\nport=%d\n" % server.getsockname()[1])
        monkeypatch.setenv("PGSERVICEFILE", str(path))
        found = settings.read({"IMDISPATCHER_DB_SERVICE": "direct"}, {})
        assert not found.errors and found.configured
        with pytest.raises(psycopg2.OperationalError):
            connection.connect(found.parameters(own)).close()
        assert not came_to_pooler()
        server.accept()[0].close()


def test_odoos_sslmode_does_not_weaken_that_of_a_service():
    own = {"host": "pooler", "dbname": "postgres"}
    found = settings.read({"IMDISPATCHER_DB_SERVICE": "direct"}, {})
    assert "sslmode" not in found.parameters(dict(own, sslmode="prefer"))
    assert found.parameters(dict(own, sslmode="verify-full"))["sslmode"] == "verify-full"

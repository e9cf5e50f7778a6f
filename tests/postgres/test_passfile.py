"""A password that is rotated while Odoo runs: the listeners read it from a file each time that they connect."""

import threading

import psycopg2
import pytest

from bus_alt_connection import connection, settings
from bus_alt_connection.listener import DirectSession, Listener
from bus_alt_connection.log import FAILED, LOST
from stack.postgres import USER, libpq_parameters
from tests.unit.fakes import Events, FakeFeed, connected


@pytest.fixture
def passfile(tmp_path):
    path = tmp_path / "passfile"
    path.touch(0o600)
    return path


@pytest.fixture
def rotate(server):
    """Return a function that changes the password of Odoo's role."""
    passwords = server.value("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (USER,))
    yield lambda password: server.execute("ALTER ROLE %s PASSWORD %%s" % USER, (password,))
    server.execute("ALTER ROLE %s PASSWORD %%s" % USER, (passwords,))


def reading(passfile, **more):
    """Return what is configured for the listeners."""
    return settings.read({"IMDISPATCHER_DB_PASSFILE": str(passfile), **more}, {})


def test_a_listener_reads_a_rotated_password_from_its_file(server, passfile, rotate):
    # Odoo itself has the first password, in its configuration.
    own, options = libpq_parameters(server), reading(passfile)
    feed, events = FakeFeed("imbus"), Events()
    rotate("second")
    passfile.write_text("*:*:*:%s:second\n" % USER)

    def connect(_listener):
        return connection.connect(options.parameters(own), DirectSession)

    listener = Listener("postgres", connect, lambda: False, events)
    listener.add(feed)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    try:
        session = connected(listener)
        rotate("third")
        server.execute("SELECT pg_terminate_backend(%s)", (session.facts.backend_pid,))
        events.expect(LOST)
        assert "password authentication failed" in events.expect(FAILED).reason
        passfile.write_text("*:*:*:%s:third\n" % USER)
        connected(listener, after=session)
    finally:
        listener.close()
        thread.join(10)


def test_neither_does_pgpassword_come_before_the_file(server, passfile, rotate, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "first")
    rotate("second")
    passfile.write_text("*:*:*:%s:second\n" % USER)
    own = libpq_parameters(server)
    del own["password"]
    connection.connect(reading(passfile).parameters(own)).close()


def test_a_password_of_the_listeners_own_comes_before_the_file(server, passfile, rotate):
    rotate("second")
    passfile.write_text("*:*:*:%s:first\n" % USER)
    own = libpq_parameters(server)
    connection.connect(reading(passfile, IMDISPATCHER_DB_PASSWORD="second").parameters(own)).close()
    with pytest.raises(psycopg2.OperationalError):
        connection.connect(reading(passfile).parameters(own))

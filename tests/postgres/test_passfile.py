"""A password that is rotated while Odoo runs: the listeners read it from a file each time that they connect."""

import pytest

from bus_alt_connection import connection, settings
from bus_alt_connection.listener import DirectSession
from bus_alt_connection.log import FAILED
from stack.postgres import USER, libpq_parameters
from tests.support.listening import listening
from tests.unit.fakes import connected


@pytest.fixture
def rotate(server):
    """Return a function that changes the password of Odoo's role."""
    password = server.value("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (USER,))
    yield lambda password: server.execute("ALTER ROLE %s PASSWORD %%s" % USER, (password,))
    server.execute("ALTER ROLE %s PASSWORD %%s" % USER, (password,))


def test_a_listener_reads_a_rotated_password_from_its_file(server, pooler, rotate, tmp_path, monkeypatch):
    # Odoo itself has the first password, in its configuration and environment.
    monkeypatch.setenv("PGPASSWORD", "first")
    own, passfile = libpq_parameters(server), tmp_path / "passfile"
    passfile.touch(0o600)
    configured = settings.read({"IMDISPATCHER_DB_PASSFILE": str(passfile)}, {})

    def connect():
        return connection.connect(configured.parameters(own), DirectSession)

    rotate("second")
    passfile.write_text("*:*:*:%s:second\n" % USER)
    with listening(pooler, connect, POLL_INTERVAL=0) as running:
        session = connected(running.listener)
        rotate("third")
        server.execute("SELECT pg_terminate_backend(%s)", (session.facts.backend_pid,))
        assert "password authentication failed" in running.events.wait_for(FAILED).reason
        passfile.write_text("*:*:*:%s:third\n" % USER)
        connected(running.listener, after=session)

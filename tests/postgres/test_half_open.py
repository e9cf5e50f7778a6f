"""A path that drops all packets silently: how soon both ends notice."""

import contextlib
import time

import psycopg2
import pytest

from bus_alt_connection import connection
from stack import namespaces
from stack.pgbouncer import PgBouncer
from stack.postgres import USER, PostgreSQL, libpq_parameters
from stack.waiting import wait_until
from tests.support.listening import directly, listening

pytestmark = pytest.mark.rest

# Seconds that the server needs at most, and more for a busy machine.
DEADLINE, TOLERANCE = 30, 3


@pytest.fixture
def cable():
    """A network that can be unplugged, where the machine allows it."""
    try:
        with namespaces.network() as network, namespaces.inside(network.near):
            yield network
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def server(cable):
    """A PostgreSQL at the near end of the cable."""
    with PostgreSQL({"listen_addresses": "127.0.0.1,%s" % namespaces.NEAR_HOST}) as server:
        with open(server.data / "pg_hba.conf", "a") as rules:
            rules.write("host all all samenet scram-sha-256\n")
        server.reload()
        server.host = namespaces.NEAR_HOST
        yield server


def wait_until_heard(running):
    wait_until(lambda: running.listener.deaf_since is None, 10, "the first check")


def test_lost_packets_are_noticed_while_something_is_on_the_way(cable, server):
    with namespaces.inside(cable.far):
        direct = connection.connect(libpq_parameters(server))
    assert direct.execute("SELECT 1") == [(1,)]
    cable.unplug(cable.near)
    began = time.monotonic()
    with pytest.raises(psycopg2.OperationalError, match="timed out"):
        # We are more patient than the kernel, whose verdict is to be seen here.
        direct.execute("SELECT 2", timeout=40)
    assert 8 < time.monotonic() - began < 25
    direct.close()


def test_the_server_drops_listeners_whose_machine_has_vanished(cable, server):
    with contextlib.ExitStack() as exits:
        # They run on the other machine, as their threads begin there.
        with namespaces.inside(cable.far):
            idle = exits.enter_context(listening(server, directly(server), ["idle"]))
            notified = exits.enter_context(listening(server, directly(server), ["notified"]))
            wait_until_heard(idle)
            wait_until_heard(notified)
        backends = [one.listener.session.facts.backend_pid for one in (idle, notified)]

        def states():
            return [row.state for row in server.activity() if row.pid in backends]

        wait_until(lambda: states() == ["idle"] * 2, 10, "the listeners to have nothing to do")
        cable.unplug(cable.far)
        # On its way to one of them.
        server.execute("NOTIFY notified")
        wait_until(lambda: not states(), DEADLINE + TOLERANCE, "the server to drop them", 0.2)


def test_what_the_administrator_has_configured_stays_and_nothing_is_configured_in_a_pool():
    configured = {"tcp_keepalives_idle": 77, "tcp_user_timeout": 88000}
    of_role = {"tcp_keepalives_interval": 11, "tcp_keepalives_count": 9}
    with PostgreSQL(configured) as server:
        for name, value in of_role.items():
            server.execute("ALTER ROLE %s SET %s = %d" % (USER, name, value))
        with contextlib.closing(directly(server)()) as session:
            session.listen({"imbus"}, lambda *_warning: None)
            session.settle()
            for name, value in {**configured, **of_role}.items():
                assert session.row("SHOW " + name) == (str(value),)
        mark = server.log_mark()
        with PgBouncer(server, settings={"pool_mode": "session"}) as keeping:
            with contextlib.closing(directly(keeping)()) as session:
                assert session.facts.pooled
                session.settle()
        assert "set_config" not in server.log_since(mark)

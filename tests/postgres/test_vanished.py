"""A machine vanishes without a word: the server drops the listener that ran there, within 30 s."""

import contextlib
import time
import types

from bus_alt_connection import connection
from bus_alt_connection.listener import DirectSession
from bus_alt_connection.settings import Settings
from stack.namespaces import Network
from stack.postgres import PASSWORD, USER, PostgreSQL, libpq_parameters
from stack.waiting import wait_until
from tests.postgres.test_half_open import listening
from tests.support.background import background, in_background  # noqa: F401
from tests.support.network import network

# Seconds that the server needs at most, and more for a busy machine.
DEADLINE, TOLERANCE = 30, 3


@contextlib.contextmanager
def _server_at(host):
    """Yield a server that takes connections from other machines at ``host``, and what clients need to know of it."""
    with PostgreSQL({"listen_addresses": "127.0.0.1,%s" % host}) as server:
        with open(server.data / "pg_hba.conf", "a") as rules:
            rules.write("host all all samenet scram-sha-256\n")
        server.reload()
        yield server, types.SimpleNamespace(host=host, port=server.port, user=USER, password=PASSWORD)


def _seconds_until_dropped(then=lambda server: None):
    """Have the machine of a confirmed listener vanish, and do what follows.

    :return: seconds from then on until the server has dropped the listener
    """
    with network() as cable, _server_at(Network.near_host) as (server, place):
        # The listener runs on the other machine, as its threads begin there.
        with cable.far():
            running = contextlib.ExitStack()
            listener, _feed = running.enter_context(listening(place, place, Settings()))
        with running:
            backend = listener.session.facts.backend_pid
            wait_until(lambda: _is_idle(server, backend), 10, "the listener to have nothing to do")
            cable.unplug()
            began = time.monotonic()
            then(server)
            wait_until(
                lambda: backend not in [row.pid for row in server.activity()],
                DEADLINE + TOLERANCE,
                "the server to drop the listener",
                0.2,
            )
            return time.monotonic() - began


def _is_idle(server, backend):
    return [row.state for row in server.activity() if row.pid == backend] == ["idle"]


@in_background
def test_the_server_drops_an_idle_listener_whose_machine_has_vanished(_stop):
    assert _seconds_until_dropped() < DEADLINE + TOLERANCE


@in_background
def test_the_server_drops_a_vanished_listener_to_which_a_notification_is_on_its_way(_stop):
    def notify(server):
        server.execute("SELECT pg_notify('imbus', '[]')")

    assert _seconds_until_dropped(notify) < DEADLINE + TOLERANCE


def test_what_the_administrator_has_configured_stays():
    configured = {"tcp_keepalives_idle": 77, "tcp_user_timeout": 88000}
    of_role = {"tcp_keepalives_interval": 11, "tcp_keepalives_count": 9}
    with PostgreSQL(configured) as server:
        for name, value in of_role.items():
            server.execute("ALTER ROLE %s SET %s = %d" % (USER, name, value))
        with contextlib.closing(connection.connect(libpq_parameters(server), DirectSession)) as session:
            session.listen({"imbus"}, lambda *_warning: None)
            session.settle()
            for name, value in {**configured, **of_role}.items():
                assert session.row("SHOW " + name) == (str(value),)
